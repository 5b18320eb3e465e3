"""The import rules between the packages, held by reading every file's syntax tree.

`PACKAGES` is the table. The snippets in `BROKEN` show that each rule can fail, those in `KEPT` what may pass.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
ENGINES = frozenset({"jax_resnet", "numpy_ref"})
TORCH = frozenset({"torch", "torch_oracle"})
TENSORFLOW = frozenset({"tensorflow"})
PICKLE = frozenset({"_pickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"})

# What takes long to import, or takes a GPU's memory: in `experiment` only inside functions.
HEAVY = frozenset(
    {
        "PIL",
        "array_record",
        "grain",
        "huggingface_hub",
        "jax",
        "jinja2",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "orbax",
        "scipy",
        "sklearn",
        "tensorboard",
        "tensorboardX",
        "tensorflow_datasets",
    }
)


@dataclass(frozen=True)
class Rules:
    """What the files of one package may import beside the standard library and the package itself."""

    libraries: frozenset[str] | None  # None: everything that is not forbidden
    forbidden: frozenset[str] = frozenset()
    lazily: dict[str, frozenset[str]] = field(default_factory=dict)  # by file, inside functions: these too
    adapters: dict[str, frozenset[str]] = field(default_factory=dict)  # by file, which is imported lazily


PACKAGES = {
    "numpy_ref": Rules(frozenset({"numpy"})),
    "jax_resnet": Rules(frozenset({"jax", "flax", "optax", "numpy", "jaxtyping"})),
    "torch_oracle": Rules(frozenset({"torch", "numpy", "safetensors"})),
    "parity": Rules(
        frozenset({"numpy", "scipy", "safetensors", "matplotlib", "jinja2"}),
        lazily={
            "parity/optimizers.py": frozenset({"jax", "optax", "torch"}),
            "parity/optimizer_hints.py": frozenset({"jax", "optax", "torch"}),
            "parity/training.py": frozenset({"jax", "optax", "torch"}),
        },
        adapters={
            "parity/jax_adapter.py": frozenset({"jax", "flax"}),
            "parity/jax_tape.py": frozenset({"jax"}),
            "parity/torch_adapter.py": frozenset({"torch"}),
            "parity/torch_functions.py": frozenset({"torch"}),
            "parity/torch_recorder.py": frozenset({"torch"}),
        },
    ),
    "experiment": Rules(
        HEAVY | {"filelock", "msgspec", "numpy", "rich", "safetensors", "tqdm"},
        lazily={
            "experiment/commands/certify.py": frozenset({"parity"}),
            "experiment/commands/export.py": TORCH,
            "experiment/commands/parity.py": TORCH | {"parity"},
            "experiment/commands/convert.py": TORCH,
            "experiment/commands/prepare.py": TENSORFLOW | {"importlib_resources"},
            "experiment/run/sentinel.py": frozenset({"parity"}),
        },
    ),
    "train.py": Rules(None, forbidden=TORCH | TENSORFLOW),
    "tests": Rules(None, forbidden=TENSORFLOW),
    "benchmarks": Rules(None, forbidden=TENSORFLOW),
}


@dataclass(frozen=True)
class Import:
    """One import of a module, by a statement or by a call; `root` is None where only the run can tell."""

    root: str | None
    line: int
    function: str | None  # the function it stands in
    types_only: bool  # under `if TYPE_CHECKING:`, never executed
    by_name: bool  # importlib.import_module(name) or the like


def named_module(node: ast.expr) -> str | None:
    """The module that `import_module` is given: "a.b" itself, "a" of f"a.{x}" and of "a." + x, else None."""
    match node:
        case ast.Constant(value=str(name)):
            return name
        case (
            ast.JoinedStr(values=[ast.Constant(value=str(start)), *_])
            | ast.BinOp(left=ast.Constant(value=str(start)))
        ) if "." in start:
            return start.rpartition(".")[0]
    return None


def called(node: ast.Call) -> str:
    """The name of what is called, as it is written: "torch.load"."""
    return ast.unparse(node.func)


def imports(path: str, source: str) -> list[Import]:
    """Every import in a file, whatever it stands in."""
    package = PurePosixPath(path).parent.parts

    def root(module: str) -> str:
        """The first part of a name; of one that begins with a dot or is empty, the package's own."""
        return module.split(".")[0] or package[0]

    def visit(node: ast.AST, function: str | None, types_only: bool) -> Iterator[Import]:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                function = name
            case ast.If() if ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
                for statement in node.body:
                    yield from visit(statement, function, True)
                for statement in node.orelse:
                    yield from visit(statement, function, types_only)
                return
            case ast.Import(names=aliases):
                for alias in aliases:
                    yield Import(root(alias.name), node.lineno, function, types_only, False)
            case ast.ImportFrom(module=module, level=level):
                start = package[: len(package) + 1 - level] if level else ()
                absolute = ".".join([*start, module or ""])
                yield Import(root(absolute), node.lineno, function, types_only, False)
            case ast.Call(args=[argument, *_]) if re.search(r"\b(import_module|__import__)$", called(node)):
                written = named_module(argument)
                target = None if written is None else root(written)
                yield Import(target, node.lineno, function, types_only, True)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, function, types_only)

    return list(visit(ast.parse(source), None, False))


def import_violations(path: str, source: str) -> Iterator[str]:
    """What in one file breaks the table of packages."""
    package = path.split("/")[0]
    rules = PACKAGES[package]
    for found in imports(path, source):
        root, where = found.root, f"{path}:{found.line}"
        lazy = found.function is not None or found.types_only
        if root is None or root in ENGINES - {package}:
            # `engine_lookups` counts those of `experiment`, where one function may do this.
            if rules.libraries is not None and not (
                package == "experiment" and found.by_name and found.function
            ):
                yield f"{where}: {package} must not import {root or 'a module that only the run can name'}"
        elif root in sys.stdlib_module_names or root == package or root in rules.adapters.get(path, ()):
            continue
        elif root in rules.lazily.get(path, ()):
            if not lazy:
                yield f"{where}: imports {root} outside a function"
        elif root in rules.forbidden or (rules.libraries is not None and root not in rules.libraries):
            yield f"{where}: {package} must not import {root}"
        elif package == "experiment" and root in HEAVY and not lazy:
            yield f"{where}: imports {root} outside a function"


def pickle_violations(path: str, source: str) -> Iterator[str]:
    """What in one file could load a pickle. Tests may import `pickle`, to write what must be refused."""
    if not path.startswith("tests/"):
        for found in imports(path, source):
            if found.root in PICKLE:
                yield f"{path}:{found.line}: imports {found.root}"
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if given.get("allow_pickle", "False") != "False":
            yield f"{path}:{node.lineno}: allow_pickle={given['allow_pickle']}"
        if called(node) == "torch.load" and given.get("weights_only") != "True":
            yield f"{path}:{node.lineno}: torch.load without weights_only=True"
        if called(node) in {"pickle.load", "pickle.loads", "pickle.Unpickler"}:
            yield f"{path}:{node.lineno}: {called(node)}"


# The folders of `experiment`, the lowest first: each may import itself and those before it. The modules
# beside the folders (errors, engines, processes, metrics) are below all of them.
LAYERS = ("", "options", "data", "files", "report", "run", "study", "commands")


def layer(module: str) -> int:
    """The place in `LAYERS` of a module of `experiment`, such as "experiment.data.images"."""
    _, *parts = module.split(".")
    if parts[:1] == ["__main__"]:
        return LAYERS.index("commands")
    return LAYERS.index(parts[0]) if parts and parts[0] in LAYERS else 0


def experiment_imports(path: str, source: str) -> Iterator[tuple[str, int]]:
    """The modules of `experiment` that one of its files imports, and the lines; in functions, too."""
    package = PurePosixPath(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            whole = {f"{module}.{alias.name}" for alias in node.names}
            names = sorted(whole & MODULES) or [module]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "experiment")


def layer_violations(path: str, source: str) -> Iterator[str]:
    """The imports in a file of `experiment` of a layer above its own."""
    if path.startswith("experiment/"):
        own = layer(path.removesuffix(".py").replace("/", "."))
        for name, line in experiment_imports(path, source):
            if layer(name) > own:
                yield f"{path}:{line}: {LAYERS[own] or 'experiment'} must not import {name}, a layer above"


def violations(path: str, source: str) -> list[str]:
    """Every broken rule in one file, as "file:line: what"; `path` is relative to the repository."""
    return [
        *import_violations(path, source),
        *layer_violations(path, source),
        *pickle_violations(path, source),
    ]


def engine_lookups(path: str, source: str) -> set[str]:
    """The functions of one file that import an engine by its name, as "file:function"."""
    by_name = [found for found in imports(path, source) if found.by_name]
    return {f"{path}:{found.function}" for found in by_name if found.root is None or found.root in ENGINES}


FILES = [
    ROOT / "train.py",
    *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))),
]
SOURCES = {f.relative_to(ROOT).as_posix(): f.read_text(encoding="utf-8") for f in FILES if f.is_file()}
MODULES = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for path in SOURCES
    if path.startswith("experiment/")
}


@pytest.mark.parametrize("path", SOURCES)
def test_file_keeps_the_rules(path: str) -> None:
    assert violations(path, SOURCES[path]) == []


def test_files_were_found() -> None:
    packages = {path.split("/")[0] for path in SOURCES}
    assert packages >= {"jax_resnet", "torch_oracle", "experiment", "tests", "train.py"}


def test_experiment_looks_engines_up_in_one_function() -> None:
    package = [path for path in SOURCES if path.startswith("experiment/")]
    lookups = {found for path in package for found in engine_lookups(path, SOURCES[path])}
    assert len(lookups) <= 1, lookups


def test_modules_of_experiment_import_in_no_circle() -> None:
    graph = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): {
            name for name, _ in experiment_imports(path, SOURCES[path]) if name in MODULES
        }
        for path in SOURCES
        if path.startswith("experiment/")
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("path", [path for path in SOURCES if path.startswith("tests/test_")])
def test_no_test_imports_from_the_file_of_another(path: str) -> None:
    """What tests share is in tests/helpers/."""
    others = re.findall(r"tests\.(test_\w+)|from tests import (test_\w+)", SOURCES[path])
    assert {"".join(names) for names in others} <= {PurePosixPath(path).stem}


def test_what_is_imported_is_declared() -> None:
    """A library that is only there because another one brings it may be gone tomorrow."""

    def normal(name: str) -> str:
        return re.split(r"[^\w.-]", name)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {normal(requirement) for group in groups for requirement in group}
    installed = {**importlib.metadata.packages_distributions(), "tensorflow": ["tensorflow-cpu"]}
    known = sys.stdlib_module_names | {package.removesuffix(".py") for package in PACKAGES} | {"contrib"}
    undeclared = {
        f"{path}:{found.line}: {found.root}"
        for path, source in SOURCES.items()
        for found in imports(path, source)
        if found.root and found.root not in known
        if declared.isdisjoint(normal(name) for name in installed.get(found.root, [found.root]))
    }
    assert undeclared == set()


def test_help_imports_nothing_heavy() -> None:
    """`python train.py --help` answers at once: no JAX, PyTorch or TFDS, nor anything of their weight."""
    program = """
import json, runpy, sys
sys.argv = ["train.py", "--help"]
try:
    runpy.run_path("train.py", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *help_text, modules = done.stdout.splitlines()
    assert "--optimizer" in "\n".join(help_text)
    assert (HEAVY | TORCH | TENSORFLOW | {"flax", "optax"}).isdisjoint(json.loads(modules))


LOOK_UP = "import importlib\ndef f(n):\n    return importlib.import_module({})"

BROKEN = [
    ("numpy_ref/layers.py", "import jax.numpy as jnp"),
    ("numpy_ref/layers.py", "def f():\n    from scipy import signal"),
    ("numpy_ref/layers.py", "from jax_resnet.layers import im2col"),
    ("numpy_ref/engine.py", "from experiment import config"),
    ("numpy_ref/engine.py", "from ..experiment import config"),
    ("numpy_ref/engine.py", LOOK_UP.format("n")),
    ("jax_resnet/engine.py", "import experiment.errors"),
    ("jax_resnet/engine.py", "from numpy_ref.layers import conv2d"),
    ("jax_resnet/resnet.py", "class A:\n    def f(self):\n        if self:\n            import torch"),
    ("jax_resnet/resnet.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ("jax_resnet/resnet.py", "from importlib import import_module\nt = import_module('torch.nn')"),
    ("jax_resnet/resnet.py", "t = __import__('torch')"),
    ("torch_oracle/resnet.py", "import jax_resnet"),
    ("torch_oracle/resnet.py", "def f():\n    import experiment"),
    ("experiment/files/weights.py", "def f():\n    import torch"),
    ("experiment/files/weights.py", "def f():\n    import flax"),
    ("experiment/report/page.py", "def f():\n    import torch_oracle"),
    ("experiment/engines.py", "def f():\n    from jax_resnet import engine"),
    ("experiment/engines.py", "import importlib\nE = importlib.import_module('numpy_ref.engine')"),
    ("experiment/data/loading.py", "class A:\n    import grain"),
    *(("experiment/data/loading.py", f"import numpy\nimport {name}.a as b") for name in sorted(HEAVY)),
    ("experiment/data/loading.py", "def f():\n    import tensorflow as tf"),
    ("experiment/errors.py", "from experiment.options import config"),
    ("experiment/data/loading.py", "def f():\n    from experiment.files.weights import save"),
    ("experiment/files/weights.py", "from ..run import console"),
    ("experiment/run/trainer.py", "from experiment import study"),
    ("experiment/study/plan.py", "import experiment.commands.train as t"),
    ("experiment/run/sentinel.py", "import parity"),
    ("experiment/run/verifier.py", "def f():\n    import parity"),
    ("experiment/commands/parity.py", "import torch_oracle"),
    ("experiment/commands/parity.py", "def f():\n    import jax_resnet"),
    ("experiment/commands/report.py", "def f():\n    import torch_oracle"),
    ("experiment/commands/prepare.py", "import tensorflow as tf"),
    ("train.py", "def main():\n    import torch"),
    ("train.py", "from torch_oracle import resnet"),
    ("tests/test_data.py", "def test():\n    import tensorflow"),
    ("experiment/files/checkpoints.py", "import pickle"),
    ("train.py", "def f():\n    from pickle import loads"),
    ("train.py", "import joblib"),
    ("tests/test_weights.py", "import pickle\npickle.loads(b'')"),
    ("numpy_ref/resnet.py", "import numpy as np\nnp.load('x', allow_pickle=True)"),
    ("benchmarks/a.py", "import numpy as np\nnp.load('x', allow_pickle=flag)"),
    ("torch_oracle/resnet.py", "import torch\ntorch.load('x')"),
    ("tests/test_a.py", "import torch\ntorch.load('x', weights_only=False)"),
]


@pytest.mark.parametrize(("path", "source"), BROKEN)
def test_broken_rule_is_found(path: str, source: str) -> None:
    (finding,) = violations(path, source)
    assert re.match(rf"{path}:\d+: ", finding)


KEPT = [
    ("numpy_ref/engine.py", "import time\nimport numpy as np\nfrom . import layers\nfrom .layers import f"),
    ("jax_resnet/engine.py", "import jax\nimport optax\nfrom flax import nnx\nfrom jax_resnet import layers"),
    ("torch_oracle/resnet.py", "import torch\ntorch.load('x', weights_only=True)"),
    (
        "experiment/data/loading.py",
        "import numpy\nimport tqdm\ndef f():\n    import grain\n    import sklearn.datasets",
    ),
    ("experiment/data/loading.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import grain"),
    ("experiment/engines.py", LOOK_UP.format("TABLE[n]")),
    ("experiment/commands/report.py", "from ..errors import UserError\nfrom . import study"),
    ("experiment/commands/parity.py", "def run():\n    import torch\n    import torch_oracle"),
    ("experiment/commands/prepare.py", "def run():\n    import tensorflow"),
    ("experiment/run/sentinel.py", "def f():\n    import parity"),
    ("train.py", "import experiment\ndef main():\n    import jax_resnet"),
    ("tests/test_a.py", "import pickle\nimport torch\nimport jax_resnet\npickle.dumps(1)"),
]


@pytest.mark.parametrize(("path", "source"), KEPT)
def test_kept_rule_is_not_found(path: str, source: str) -> None:
    assert violations(path, source) == []


@pytest.mark.parametrize(
    ("name", "counted"),
    [
        ("TABLE[n]", True),
        ("f'{n}.loop'", True),
        ("'jax_resnet.engine'", True),
        ("'numpy_ref.' + n", True),
        ("'experiment.commands.report'", False),
        ("f'experiment.commands.{n}'", False),
        ("'experiment.commands.' + n", False),
        ("'.' + n, 'experiment.commands'", False),
    ],
)
def test_look_up_of_an_engine_is_counted(name: str, counted: bool) -> None:
    assert engine_lookups("experiment/a.py", LOOK_UP.format(name)) == (
        {"experiment/a.py:f"} if counted else set()
    )
