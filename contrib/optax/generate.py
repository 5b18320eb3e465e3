"""AdaBound as a contribution to optax: its code, written from `jax_resnet/adabound.py`, and its tests.

python contrib/optax/generate.py                  # write the code of _adabound.py, and ENTRIES.md
python contrib/optax/generate.py --check [TREE]   # run optax's tests in a copy of its source tree; without
                                                  # TREE, in that of the installed version, by pip download
python contrib/optax/generate.py --apply TREE     # add files and entries to a clone of optax

The docstrings, the header and the imports of _adabound.py are written by hand, in that file.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tokenize
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCE = FOLDER.parents[1] / "jax_resnet" / "adabound.py"
Definition = ast.FunctionDef | ast.ClassDef | ast.Assign

OPTIMIZERS = ("adabound", "adaboundw", "amsbound")
PUBLIC = (  # in the order of optax's imports
    *OPTIMIZERS,
    "scale_by_adabound",
    "scale_by_amsbound",
    "ScaleByAdaBoundState",
    "ScaleByAmsBoundState",
)

MODULES = {  # where optax itself finds what the source takes from `optax`
    "GradientTransformation": "base",
    "GradientTransformationExtraArgs": "base",
    "Params": "base",
    "ScalarOrSchedule": "base",
    "Updates": "base",
    "add_decayed_weights": "transform",
    "chain": "combine",
    "safe_increment": "numerics",
    "scale_by_learning_rate": "transform",
    "tree": "optax",
}
NAMES = {  # names of the source, and what optax's contributions write
    "ArrayLike": "jax.typing.ArrayLike",
    "DTypeLike": "jax.typing.DTypeLike",
    "Scalar": "jax.typing.ArrayLike",
    "check_mu_dtype": "utils.canonicalize_dtype",
}
CHECK = "check_hyperparameters"  # left out: optax checks no ranges
LINES = (  # other replacements: a comment, and strings longer than 80 columns
    ("  # type: ignore[assignment]  # hides tuple.count, as in optax", "  # shape=(), dtype=jnp.int32."),
    (
        'f"parameters must be real floating-point numbers, {name} is {p_dtype}; use {remedy}"',
        'f"parameters must be real floating-point numbers, {name} is "\nf"{p_dtype}; use {remedy}"',
    ),
    (
        'f"base_lr is required where learning_rate is a schedule or an array of JAX: {learning_rate}"',
        '"base_lr is required where learning_rate is a schedule or an array "\nf"of JAX: {learning_rate}"',
    ),
)

IMPORTS = "".join(f"from optax.contrib._adabound import {name}\n" for name in PUBLIC)
TESTED = "".join(
    f"""\
    {{
        'opt_name': '{name}',
        'opt_kwargs': {{
            'learning_rate': 1e-2,
            'final_lr': 1e-2,
            'base_lr': 1e-2,
        }},
    }},
"""
    for name in OPTIMIZERS
)
LISTED = "".join(f"    {name}\n" for name in OPTIMIZERS)
LISTED_LAST = "".join(f"    {name}\n" for name in PUBLIC if name not in OPTIMIZERS)
EDITS = (  # file, entry, and what the entry comes before, with the name by which its neighbors are sorted
    ("optax/contrib/__init__.py", IMPORTS, r"^from optax\.contrib\._(\w+) import "),
    ("optax/contrib/_common_test.py", TESTED, r"^    \{\s*'opt_name': '(\w+)'"),
    ("docs/api/contrib.rst", LISTED, r"^    (\w+)$"),
    ("docs/api/contrib.rst", LISTED_LAST, r"^    scale_by_(\w+)$"),
)


def definitions(source: str) -> dict[str, Definition]:
    """Return what the public names need of the source, in its order."""
    found: dict[str, Definition] = {}
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = node
    needed: set[str] = set()
    names = set(PUBLIC)
    while names:
        name = names.pop()
        needed.add(name)
        used = {part.id for part in ast.walk(found[name]) if isinstance(part, ast.Name)}
        names |= (used & found.keys()) - {CHECK, *NAMES} - needed
    return {name: node for name, node in found.items() if name in needed}


def written_by_hand(current: str) -> tuple[str, dict[str, str]]:
    """Return what is before the first definition of a file, and the docstring of each, with its quotes."""
    lines = current.splitlines()
    start = len(lines)
    docstrings: dict[str, str] = {}
    for node in ast.parse(current).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign):
            start = min(start, node.lineno - 1)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            text = node.body[0]
            docstrings[node.name] = "\n".join(lines[text.lineno - 1 : text.end_lineno])
    return "\n".join(lines[:start]), docstrings


def optax_name(name: str) -> str:
    """Return the name of a definition in _adabound.py: helpers are private."""
    return name if name in PUBLIC or name.startswith("_") else f"_{name}"


def translation(node: ast.AST, defined: AbstractSet[str]) -> tuple[str, str] | None:
    """Return the text that begins at a node and what replaces it; None where nothing does."""
    match node:
        case ast.Attribute(value=ast.Name(id="optax"), attr=name):
            return f"optax.{name}", f"{MODULES[name]}.{name}"
        case ast.Name(id=name) if name in NAMES:
            return name, NAMES[name]
        case ast.Name(id=name) if name in defined:
            return name, optax_name(name)
        case ast.FunctionDef(name=name) if name in defined:
            return f"def {name}", f"def {optax_name(name)}"
    return None


def is_check(node: ast.AST) -> bool:
    """Return True for a statement that calls CHECK."""
    match node:
        case ast.Expr(value=ast.Call(func=ast.Name(id=name))):
            return name == CHECK
    return False


def rewrite(source: str, node: Definition, defined: AbstractSet[str], docstring: str) -> str:
    """Return the lines of a definition with optax's names, without checks of ranges."""
    lines = source.splitlines()
    removed: set[int] = set()
    parts = [part for part in ast.walk(node) if isinstance(part, ast.expr | ast.stmt)]
    for part in sorted(parts, key=lambda part: (part.lineno, part.col_offset), reverse=True):
        row, column = part.lineno - 1, part.col_offset
        if is_check(part):
            removed.update(range(row, part.end_lineno or part.lineno))
        elif pair := translation(part, defined):
            old, new = pair
            if not lines[row].startswith(old, column):
                raise ValueError(f"{SOURCE.name}:{part.lineno}: {old!r} is not at column {column}")
            lines[row] = lines[row][:column] + new + lines[row][column + len(old) :]
    if not isinstance(node, ast.Assign):
        if ast.get_docstring(node) is None:
            raise ValueError(f"{SOURCE.name}: {node.name} has no docstring")
        text = node.body[0]
        lines[text.lineno - 1] = textwrap.indent(docstring, "  ")  # to 4 columns, as the source
        removed.update(range(text.lineno, text.end_lineno or text.lineno))
    rows = range(node.lineno - 1, node.end_lineno or node.lineno)
    return "\n".join(lines[row] for row in rows if row not in removed)


def in_optax_style(code: str) -> str:
    """Format code as optax does: 80 columns, blocks indented by 2, continued lines by 4.

    Raises:
        ValueError: for a line that stays longer.
    """
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length", "80", "-"]
    formatted = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    begins: dict[int, int] = {}  # the row of each line of a statement: that of its first
    first = 0
    between = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(formatted).readline):
        if token.type == tokenize.NEWLINE:
            begins.update(dict.fromkeys(range(first, token.start[0] + 1), first))
            first = 0
        elif not first and token.type not in between:
            first = token.start[0]
    lines = formatted.splitlines()
    narrow: list[str] = []
    for row, line in enumerate(lines, 1):
        statement = lines[begins.get(row, row) - 1]
        depth = (len(statement) - len(statement.lstrip())) // 4
        line = line.removeprefix("  " * depth)
        if len(line) > 80 and (comment := re.fullmatch(r"( *# )(.*)", line)):
            start = comment[1]
            narrow += textwrap.wrap(comment[2], 80, initial_indent=start, subsequent_indent=start)
        elif len(line) > 80:
            raise ValueError(f"longer than 80 columns: {line!r}: add it to LINES in generate.py")
        else:
            narrow.append(line)
    return "\n".join(narrow) + "\n"


def adabound_file(source: str, current: str) -> str:
    """Return optax/contrib/_adabound.py: the code of `source`, the header and the docstrings of `current`.

    Raises:
        ValueError: if a docstring is missing in `current`, or a text of LINES in `source`.
    """
    nodes = definitions(source)
    header, docstrings = written_by_hand(current)
    parts = [header]
    for name, node in nodes.items():
        docstring = docstrings.get(optax_name(name), "")
        if not docstring and not isinstance(node, ast.Assign):
            raise ValueError(f"_adabound.py has no {optax_name(name)}: add it there, with a docstring")
        parts.append(rewrite(source, node, nodes.keys(), docstring))
    code = "\n\n\n".join(parts)
    for old, new in LINES:
        if old not in code:
            raise ValueError(f"{SOURCE.name} has no {old!r}: change LINES in generate.py")
        code = code.replace(old, new)
    return in_optax_style(code)


def entries_page() -> str:
    """Return the text of ENTRIES.md."""
    return f"""\
# AdaBound's entries in optax's files

`generate.py` writes this page, and `generate.py --apply TREE` makes these entries.

`optax/contrib/__init__.py`:

```python
{IMPORTS}```

`optax/contrib/_common_test.py`, in `_MAIN_OPTIMIZERS_UNDER_TEST`:

```python
{TESTED}```

`docs/api/contrib.rst`, in its list, with the optimizers and with the transformations at its end:

```rst
{LISTED}```

```rst
{LISTED_LAST}```
"""


def generated() -> dict[str, str]:
    """Return the text of each file that is generated."""
    source, current = SOURCE.read_text("utf-8"), (FOLDER / "_adabound.py").read_text("utf-8")
    return {"_adabound.py": adabound_file(source, current), "ENTRIES.md": entries_page()}


def insert(text: str, entry: str, pattern: str, path: Path) -> str:
    """Return the text of a file with an entry before the first match whose group comes after "adabound"."""
    for match in re.finditer(pattern, text, re.MULTILINE):
        if match[1].lower() > "adabound":
            return text[: match.start()] + entry + text[match.start() :]
    sys.exit(f"{path}: no match of {pattern!r} comes after AdaBound: change EDITS in generate.py")


def apply(tree: Path) -> None:
    """Add the files and entries to a source tree of optax. An sdist has no docs/api/contrib.rst."""
    folder = tree / "optax" / "contrib"
    if not (folder / "_common_test.py").is_file():
        sys.exit(f"{tree} has no optax/contrib/_common_test.py: give a source tree of optax")
    if (folder / "_adabound.py").exists():
        sys.exit(f"{tree} has optax/contrib/_adabound.py already: give a tree without it")
    texts = {
        folder / "_adabound.py": generated()["_adabound.py"],
        folder / "_adabound_test.py": (FOLDER / "_adabound_test.py").read_text("utf-8"),
    }
    for name, entry, pattern in EDITS:
        path = tree / name
        if path.is_file():
            texts[path] = insert(texts.get(path) or path.read_text("utf-8"), entry, pattern, path)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")


def download(folder: Path) -> Path:
    """Download and unpack the source of the installed optax; return its tree."""
    requirement = f"optax=={importlib.metadata.version('optax')}"
    options = ["--quiet", "--no-deps", "--no-binary", "optax", "--dest", str(folder)]
    if subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement]).returncode:
        sys.exit(f"pip could not download the source of {requirement}: give an unpacked one as --check TREE")
    (archive,) = folder.glob("optax-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def check(tree: Path | None) -> None:
    """Run optax's linter and common tests, and AdaBound's tests and examples, in a copy of a source tree."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "copy"
        ignored = shutil.ignore_patterns(".git", "__pycache__")
        shutil.copytree(tree or download(Path(name)), copy, ignore=ignored)
        apply(copy)
        files = ["optax/contrib/_adabound.py", "optax/contrib/_adabound_test.py"]
        commands = [[str(FOLDER / "run_tests.py"), *OPTIMIZERS]]
        if (copy / "pyproject.toml").is_file():  # it has optax's settings of ruff
            commands.insert(0, ["-m", "ruff", "check", "--no-cache", *files])
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        for command in commands:
            status = subprocess.run([sys.executable, *command], cwd=copy, env=environment).returncode
            if status:
                sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files, or run or apply them."""
    parser = argparse.ArgumentParser(description="AdaBound as a contribution to optax")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="run optax's tests in a copy of its source tree")
    action.add_argument("--apply", action="store_true", help="add files and entries to a clone of optax")
    parser.add_argument("tree", nargs="?", type=Path, metavar="TREE", help="a source tree of optax")
    options = parser.parse_args(arguments)
    if options.apply and options.tree is None:
        parser.error("--apply needs TREE, a clone of optax")
    if options.tree is not None and not (options.check or options.apply):
        parser.error("TREE is for --check or --apply")
    if options.tree is not None and not options.tree.is_dir():
        parser.error(f"{options.tree} is no folder: give a source tree of optax")
    if options.check:
        check(options.tree)
    elif options.apply:
        apply(options.tree)
    else:
        for name, text in generated().items():
            (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
