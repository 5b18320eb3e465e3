"""The contribution to optax has the code of jax_resnet/adabound.py, and passes the tests of optax."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_resnet
from contrib.optax import _adabound, generate

SOURCE = generate.SOURCE.read_text("utf-8")
CURRENT = (generate.FOLDER / "_adabound.py").read_text("utf-8")

INIT = """\
from optax.contrib._acprop import acprop
from optax.contrib._ademamix import ademamix
"""
COMMON_TEST = """\
OPTIMIZERS = [
    {'opt_name': 'acprop', 'opt_kwargs': {'learning_rate': 1e-3}},
    {
        'opt_name': 'ademamix',
        'opt_kwargs': {'learning_rate': 1e-3},
    },
]
"""
PAGE = """\
Contrib
=======

.. autosummary::
    :toctree: generated/

    acprop
    ademamix
    scale_by_acprop
    scale_by_ademamix
"""


def problem() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Parameters, and gradients over eight decades, in float32 and bfloat16."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=9), jnp.float32), "b": jnp.ones(9, jnp.bfloat16)}
    grads = np.logspace(-6, 2, 9) * rng.normal(size=(20, 9))
    return params, {name: jnp.asarray(grads, p.dtype) for name, p in params.items()}


def optimizer(module: ModuleType, name: str) -> optax.GradientTransformation:
    """An optimizer with every argument off its default, and an exponential schedule."""
    return getattr(module, name)(
        optax.exponential_decay(1e-2, 10, 0.5),
        final_lr=0.2,
        base_lr=1e-2,
        b1=0.8,
        b2=0.99,
        gamma=0.02,
        eps=1e-7,
        eps_root=1e-12,
        weight_decay=0.03,
        mask={"w": True, "b": False},
        mu_dtype=jnp.bfloat16,
    )


def test_files_are_those_that_the_script_writes() -> None:
    for name, text in generate.generated().items():
        committed = (generate.FOLDER / name).read_text("utf-8")
        assert committed == text, f"{name} differs: run python contrib/optax/generate.py"


def test_adabound_equals_ours_to_the_bit() -> None:
    params, grads = problem()

    def train(tx: optax.GradientTransformation):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            return (optax.apply_updates(params, updates), state), updates

        return jax.jit(lambda p, g: jax.lax.scan(step, (p, tx.init(p)), g))(params, grads)

    ours = train(optimizer(jax_resnet, "adabound"))
    theirs = train(optimizer(_adabound, "adabound"))
    for expected, actual in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert np.all(np.isfinite(ours[1]["w"]))
    assert np.all(ours[1]["w"] != 0)


@pytest.mark.parametrize("name", generate.OPTIMIZERS)
def test_each_optimizer_is_the_same_computation(name: str) -> None:
    params, grads = problem()
    first = {name: g[0] for name, g in grads.items()}

    def computation(tx: optax.GradientTransformation) -> str:
        return str(jax.make_jaxpr(tx.update)(first, tx.init(params), params))

    assert computation(getattr(_adabound, name)(1e-3)) == computation(getattr(jax_resnet, name)(1e-3))
    ours = computation(optimizer(jax_resnet, name))
    assert computation(optimizer(_adabound, name)) == ours
    others = [other for other in generate.OPTIMIZERS if other != name]
    assert all(computation(optimizer(_adabound, other)) != ours for other in others)


@pytest.mark.parametrize("name", ["adabound", "adaboundw"])
def test_equations_of_the_docstrings_are_ours(name: str) -> None:
    ours = re.findall(r"\$\$(.*?)\$\$", getattr(jax_resnet, name).__doc__, re.DOTALL)
    theirs = re.findall(r"\.\. math::\n\n((?:    .*\n)+)", getattr(_adabound, name).__doc__)
    assert ["".join(text.split()) for text in theirs] == ["".join(text.split()) for text in ours]
    assert len(ours) == 1


def test_a_changed_formula_changes_the_file() -> None:
    changed = generate.adabound_file(SOURCE.replace("ratio * (1 + 1 / x)", "ratio * (1 + 2 / x)"), CURRENT)
    assert changed == CURRENT.replace("ratio * (1 + 1 / x)", "ratio * (1 + 2 / x)") != CURRENT


def test_a_new_helper_needs_a_docstring() -> None:
    helper = "\n\ndef slope(gamma):\n    '''A.'''\n    return gamma\n"
    source = SOURCE.replace("x = gamma *", "x = slope(gamma) *") + helper
    with pytest.raises(ValueError, match=r"_adabound\.py has no _slope"):
        generate.adabound_file(source, CURRENT)
    current = CURRENT + '\n\ndef _slope(gamma):\n  """Slope of the bounds."""\n'
    text = generate.adabound_file(source, current)
    assert 'def _slope(gamma):\n  """Slope of the bounds."""\n  return gamma\n' in text
    assert "x = _slope(gamma) *" in text


def test_a_replaced_line_that_is_gone_is_noticed() -> None:
    with pytest.raises(ValueError, match="change LINES"):
        generate.adabound_file(SOURCE.replace("parameters must be real", "parameters are real"), CURRENT)


def tree(folder: Path) -> Path:
    """Write the files of optax that get entries."""
    files = {
        "optax/contrib/__init__.py": INIT,
        "optax/contrib/_common_test.py": COMMON_TEST,
        "docs/api/contrib.rst": PAGE,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def test_entries_are_inserted_where_they_belong(tmp_path: Path) -> None:
    generate.main(["--apply", str(tree(tmp_path))])
    folder = tmp_path / "optax" / "contrib"
    assert (folder / "_adabound.py").read_text("utf-8") == CURRENT
    assert (folder / "_adabound_test.py").is_file()

    first, *imports, last = (folder / "__init__.py").read_text("utf-8").splitlines()
    assert [first, last] == INIT.splitlines()
    names = [line.removeprefix("from optax.contrib._adabound import ") for line in imports]
    assert names == list(generate.PUBLIC) == sorted(names, key=str.lower)
    assert all(hasattr(_adabound, name) for name in names)

    scope: dict[str, list[dict[str, object]]] = {}
    exec((folder / "_common_test.py").read_text("utf-8"), scope)
    order = [entry["opt_name"] for entry in scope["OPTIMIZERS"]]
    assert order == ["acprop", "adabound", "adaboundw", "amsbound", "ademamix"]

    page = (tmp_path / "docs" / "api" / "contrib.rst").read_text("utf-8")
    listed = page.partition(":toctree: generated/\n\n")[2].split()
    transformations = ["scale_by_acprop", *generate.PUBLIC[3:], "scale_by_ademamix"]
    assert listed == ["acprop", *generate.OPTIMIZERS, "ademamix", *transformations]

    with pytest.raises(SystemExit, match="already: give a tree without it"):
        generate.main(["--apply", str(tmp_path)])


def test_a_tree_in_which_an_entry_has_no_place_is_left_alone(tmp_path: Path) -> None:
    page = tree(tmp_path) / "docs" / "api" / "contrib.rst"
    page.write_text("Contrib\n=======\n", "utf-8")
    with pytest.raises(SystemExit, match="change EDITS"):
        generate.main(["--apply", str(tmp_path)])
    assert (tmp_path / "optax" / "contrib" / "__init__.py").read_text("utf-8") == INIT
    assert not (tmp_path / "optax" / "contrib" / "_adabound.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--apply"], "--apply needs TREE"),
        (["."], "TREE is for --check or --apply"),
        (["--check", "absent"], "absent is no folder"),
        (["--apply", "."], r"\. has no optax/contrib/_common_test\.py"),
    ],
)
def test_a_mistake_gives_one_line(arguments, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        generate.main(arguments)
    assert re.search(message, f"{capsys.readouterr().err}{error.value}")


@pytest.mark.slow
def test_optax_tests_the_contribution(tmp_path: Path) -> None:
    """The installed optax is a source tree without documents: its wheel has the tests."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(optax.__file__).parent, tmp_path / "optax", ignore=ignored)
    command = [sys.executable, str(generate.FOLDER / "generate.py"), "--check", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"passed [1-9]\d* common tests, [1-9]\d* of _adabound_test\.py", result.stdout)
