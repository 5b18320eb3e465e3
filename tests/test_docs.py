"""The documents: their code runs."""

from __future__ import annotations

import functools
import itertools
import json
import math
import posixpath
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.numpy import load_file
from sklearn.datasets import load_digits

import jax_resnet
import numpy_ref
from experiment.__main__ import main
from experiment.run.schedules import make_schedule
from experiment.study.plan import read
from experiment.study.tables import tables
from numpy_ref import adabound_bounds

ROOT = Path(__file__).parents[1]


def code_blocks(document: str, language: str) -> list[str]:
    """Return the fenced blocks of one language in a document, whose path starts at the root."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)


def test_the_tour_runs():
    """Every block of docs/tour.md, in order, as one program."""
    blocks = code_blocks("docs/tour.md", "python")
    assert len(blocks) == 6
    exec("\n".join(blocks), {"__name__": "program"})


def test_the_step_of_the_readme_is_the_same_in_both_engines(capsys):
    """The three blocks of README.md: the loss that it names, and equal weights after the step."""
    batch, numpy_step, jax_step = code_blocks("README.md", "python")
    for block in (numpy_step, jax_step):
        assert len([line for line in block.splitlines() if line]) <= 10
    before = "numpy_loss, numpy_model = loss, model\n"
    after = """
assert f"{numpy_loss:.4f}" == f"{loss:.4f}"
print(f"{loss:.4f}")
expected = numpy_ref.state_dict(numpy_model)
for name, array in jax_resnet.state_dict(model).items():
    assert np.allclose(array, expected[name], rtol=1e-3, atol=1e-4), name
"""
    exec("\n".join([batch, numpy_step, before, jax_step, after]), {"__name__": "program"})
    assert f"The loss is {capsys.readouterr().out.strip()} in both" in (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) < 800


@functools.cache
def files() -> frozenset[str]:
    """Every file that git does not ignore, and every folder that has one, relative to ROOT."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [name for name in names if (ROOT / name).is_file()]
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    return frozenset(names) | folders


def documents() -> list[str]:
    """The Markdown files and the notebooks of the project."""
    names = (name for name in files() if not name.startswith(("docs/runs/", "tests/fixtures/")))
    return sorted(name for name in names if name.endswith((".md", ".ipynb")))


def markdown(document: str) -> str:
    """Return the text of a document; of a notebook, that of its Markdown cells."""
    text = (ROOT / document).read_text("utf-8")
    if not document.endswith(".ipynb"):
        return text
    cells = json.loads(text)["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings: small letters, hyphens for spaces, no other signs."""
    tokens = MarkdownIt().parse(text)
    result: set[str] = set()
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(
                part.content for part in inline.children or () if part.type in ("text", "code_inline")
            )
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            counted = (f"{slug}-{n}" for n in itertools.count(1))
            result.add(next(name for name in itertools.chain([slug], counted) if name not in result))
    return result


def link_errors(document: str, text: str) -> Iterator[str]:
    """Yield "document: target: reason" for each link or image in `text` that leads nowhere.

    Links to other hosts are not followed; they must be https://HOST/...
    """
    for token in MarkdownIt().enable("table").parse(text):
        for part in token.children or ():
            target = str(part.attrGet("href") or part.attrGet("src") or "")
            if part.type not in ("link_open", "image"):
                continue
            if ":" in target:
                if not re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/\S*)?", target):
                    yield f"{document}: {target}: not an address of the form https://HOST/..."
                continue
            path, _, anchor = target.partition("#")
            name = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
            if path and name not in files():
                yield f"{document}: {target}: no such file"
            elif anchor and anchor not in anchors(markdown(name) if path else text):
                yield f"{document}: {target}: no such heading"


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    names = documents()
    assert {"README.md", "benchmarks/RESULTS.md", "docs/studies/cars.md", "weights/README.md"} < set(names)
    assert "docs/notebooks/one_gradient_by_hand.ipynb" in names
    errors = [error for name in names for error in link_errors(name, markdown(name))]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[a](tour.md)", None),
        ("[a](../README.md)", None),
        ("[a](runs/digits-adam)", None),
        ("[a](tour.md#step-through-it-with-a-debugger)", None),
        ("# The `a_b` of C, 2\n\n[a](#the-a_b-of-c-2)", None),
        ("# A\n\n# A\n\n[a](#a-1)", None),
        ("[a](https://arxiv.org/abs/1412.6980)", None),
        ("`[a](nothing.md)`", None),
        ("```\n[a](nothing.md)\n```", None),
        ("[a](nothing.md)", "no such file"),
        ("![a](nothing.png)", "no such file"),
        ("| a |\n| --- |\n| [a](nothing.md) |", "no such file"),
        ("[a](Tour.md)", "no such file"),
        ("[a](../../README.md)", "no such file"),
        ("[a](../.git/config)", "no such file"),
        ("[a](tour.md#nothing)", "no such heading"),
        ("# A\n\n[a](#a-1)", "no such heading"),
        ("[a](http://arxiv.org)", "not an address of the form https://HOST/..."),
        ("[a](https:/arxiv.org)", "not an address of the form https://HOST/..."),
    ],
)
def test_a_link_that_leads_nowhere_is_noticed(text: str, reason: str | None) -> None:
    assert [error.rsplit(": ", 1)[1] for error in link_errors("docs/page.md", text)] == (
        [reason] if reason else []
    )


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "studies").glob("*.json")), ids=lambda p: p.stem)
def test_the_page_of_a_study_is_made_from_its_results(path: Path) -> None:
    """The stored results of older versions, without newer fields, give docs/studies/NAME.md."""
    script = runpy.run_path(str(ROOT / "docs" / "fill_adabound.py"))
    text = path.with_suffix(".md").read_text()
    assert text == script["page"](path.stem), "run python docs/fill_adabound.py"
    assert text.count("\n## ") == len(list(tables(json.loads(path.read_text()))))
    for curves in path.parent.glob(f"{path.stem}-curves*.png"):
        assert text.count(f"]({curves.name})") == 1
    linked = [(ROOT / "docs" / page).read_text() for page in ("adabound.md", "training.md")]
    assert any(f"](studies/{path.stem}.md)" in text for text in linked)


def test_the_table_of_readme_has_all_optimizers_of_the_study() -> None:
    study = json.loads((ROOT / "docs" / "studies" / "fashion-mnist.json").read_text())
    cells = [in_percent(method["accuracy"], 1) for method in study["contestants"].values()]
    assert f"| {' | '.join(cells)} |" in (ROOT / "README.md").read_text()


def in_percent(summary: dict[str, Any], digits: int, sign: str = "") -> str:
    """Return a mean with its interval, if it has one, as the tables of the documents show it."""
    mean, low, high = (
        "" if summary[key] is None else f"{100 * summary[key]:{sign}.{digits}f}"
        for key in ("mean", "low", "high")
    )
    return f"{mean} ({low} to {high})" if low else mean


@pytest.mark.parametrize(
    ("row", "study", "adam", "adabound", "sgd", "control"),
    [
        ("mnist-tenth", "mnist-tenth", "adam", "adabound", "sgd", "sgdbound"),
        ("fashion-mnist", "fashion-mnist", "adam", "adabound", "sgd", "sgdbound"),
        (
            "final-lr-gamma, 3 and 0.1",
            "final-lr-gamma",
            None,
            "final-lr-3-gamma-0.1",
            None,
            "control-final-lr-3-gamma-0.1",
        ),
        ("final-lr-gamma, 0.1 and 0.1", "final-lr-gamma", None, "gamma-0.1", None, "control-gamma-0.1"),
        (
            "batch-norm, with it",
            "batch-norm",
            "adam-batch-norm",
            "adabound-batch-norm",
            "sgd-batch-norm",
            None,
        ),
        (
            "batch-norm, without it",
            "batch-norm",
            "adam-no-batch-norm",
            "adabound-no-batch-norm",
            "sgd-no-batch-norm",
            None,
        ),
        ("cars, lr 0.001", "cars", "adam-lr-0.001", "adabound-lr-0.001", None, None),
        ("cars, lr 0.002", "cars", "adam-lr-0.002", "adabound-lr-0.002", None, None),
    ],
)
def test_the_summary_of_the_studies_is_that_of_their_results(row, study, adam, adabound, sgd, control):
    """A row of the summary table in docs/adabound.md; a dash where the study has no such method."""
    results = json.loads((ROOT / "docs" / "studies" / f"{study}.json").read_text())
    cells = [
        in_percent(results["contestants"][name]["accuracy"], 2) if name else "-"
        for name in (adam, adabound, sgd, control)
    ]
    for other in (adam, control):
        differences = [
            in_percent(comparison["accuracy"], 2, "+")
            for comparison in results["comparisons"]
            if (comparison["of"], comparison["with"]) == (adabound, other)
        ]
        cells += differences or ["-"]
    assert f"| {' | '.join([row, *cells])} |" in (ROOT / "docs" / "adabound.md").read_text()


def test_the_bounds_in_the_document_follow_the_schedule_of_the_studies() -> None:
    """Of `final-lr-gamma`: 336 steps, 33 of them warm-up, then half a cosine to 0."""
    plan = read(ROOT / "studies" / "final-lr-gamma.toml", {})
    named = {each.name: each.candidates[0] for each in plan.methods}
    settings = [named[name] for name in ("published", "gamma-0.1", "final-lr-3")]
    lr, length = settings[0]["lr"], 336
    schedule = make_schedule("cosine", lr, length=length, warmup_steps=length // 10)
    text = (ROOT / "docs" / "adabound.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, re.M)
    assert [int(row[0]) for row in rows] == [1, 34, 41, 100, 168, 201, 300, 336]
    for step, *cells in rows:
        rate = schedule(int(step) - 1)
        expected = [rate / lr]
        for setting in settings:
            bounds = adabound_bounds(int(step), setting.get("final_lr", 0.1) / lr, setting.get("gamma", 1e-3))
            expected += [rate * size for size in bounds]
        numbers = [float(number) for cell in cells for number in cell.split(", ")]
        assert numbers == pytest.approx(expected, rel=0.005), step  # three digits
    highest = {
        name: max(
            schedule(t - 1)
            * adabound_bounds(t, options.get("final_lr", 0.1) / lr, options.get("gamma", 1e-3))[1]
            for t in range(1, length + 1)
        )
        for name, options in named.items()
    }
    for name, words in (("gamma-0.1", "0.13"), ("gamma-0.01", "0.38"), ("final-lr-0.01", "0.30")):
        assert f"{highest[name]:.2f}" == words
        assert f"it is {words} at most" in " ".join(text.split())
    for gamma, steps, words in ((1e-3, 80_000, "1.03"), (1e-3, 336, "16"), (0.1, 336, "1.06")):
        low, high = adabound_bounds(steps, 1.0, gamma)
        assert high / low == pytest.approx((1 + 1 / (gamma * steps)) ** 2)
        assert math.isclose(high / low, float(words), rel_tol=0.02)


def test_the_walkthrough_of_parity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands and the program of docs/parity.md give the table that stands there."""
    program, _ = code_blocks("docs/parity.md", "python")
    shown, _ = code_blocks("docs/parity.md", "text")
    commands = [
        line.split()[3:]
        for block in code_blocks("docs/parity.md", "sh")
        for line in block.splitlines()
        if line.startswith("python -m experiment ")
    ]
    dump, compare = commands
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert main(dump) == 0
    capsys.readouterr()
    exec(program, {})
    assert main(compare) == 1
    printed = capsys.readouterr().out.splitlines()
    stages, verdict = shown.split("\n\n")
    assert verdict.splitlines()[0] in printed
    for row in stages.splitlines()[1:]:
        stage, *described, a, b, c = row.split()
        (cells,) = [line.split() for line in printed if line.startswith(f"{stage} ")][:1]
        assert cells[1:3] == described
        assert [cell[-1] == "!" for cell in cells[3:6]] == [cell[-1] == "!" for cell in (a, b, c)]
    exec(program.replace("EPSILON = 1e-3", "EPSILON = 1e-5"), {})
    ours, corrected = load_file("stages.safetensors"), load_file("mine.safetensors")
    assert ours.keys() == corrected.keys()
    for name, array in ours.items():
        assert np.abs(array - corrected[name]).max() < 1e-6 * np.abs(array).max()


def test_the_jax_program_of_the_parity_page_differs_as_the_page_says(tmp_path, capsys):
    _, program = code_blocks("docs/parity.md", "python")
    _, shown = code_blocks("docs/parity.md", "text")
    (tmp_path / "port.py").write_text(program)
    runpy.run_path(str(tmp_path / "port.py"))
    stage, cause = capsys.readouterr().out.splitlines()
    assert stage.startswith(shown.splitlines()[0].split(" off by ")[0])
    assert cause == shown.splitlines()[1]


def test_the_port_with_three_mistakes_is_told_as_the_page_says(tmp_path, capsys):
    """The program of docs/comparing_models.md, and the same with each mistake corrected in turn."""
    program = next(
        block for block in code_blocks("docs/comparing_models.md", "python") if "class Port" in block
    )
    shown = code_blocks("docs/comparing_models.md", "text")
    corrections = [
        ("", ""),
        ("strides=2, ", "strides=2, padding=1, "),
        ("x.reshape(len(x), -1)", "x.transpose(0, 3, 1, 2).reshape(len(x), -1)"),
    ]
    for (old, new), expected in zip(corrections, shown, strict=True):
        program = program.replace(old, new) if old else program
        (tmp_path / "port.py").write_text(program)
        runpy.run_path(str(tmp_path / "port.py"))
        stage, cause = capsys.readouterr().out.splitlines()
        assert stage.startswith(expected.splitlines()[0].split(" off by ")[0])
        assert cause == expected.splitlines()[1]


def test_the_digit_that_comes_along_is_predicted_as_the_page_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (predict,) = code_blocks("docs/evaluation.md", "sh")[1].splitlines()
    monkeypatch.setattr("numpy_ref.engine.thread_count", lambda: 1)  # too little work to start processes for
    monkeypatch.chdir(ROOT)
    assert main(predict.partition("#")[0].split()[3:]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "weights/digit.png"
    probability, digit = lines[1].split()
    assert (f"{float(probability):.2f}", digit) == ("0.70", "1")
    assert predict.endswith("# 0.70 for 1, which it is")
    with Image.open("weights/digit.png") as image:
        np.testing.assert_array_equal(image, (load_digits().images[21] * 15.9).astype("uint8"))


def test_the_sheet_of_augmented_images_can_be_drawn(tmp_path, monkeypatch):
    from experiment.data.loading import load

    script = runpy.run_path(str(ROOT / "docs" / "draw_augmentation.py"))
    monkeypatch.setitem(script["rows"].__globals__, "COLUMNS", 2)
    for name, count in (("digits", 8), ("synthetic", 10)):
        data = load(name, data_dir=None, batch_size=8, seed=0)
        assert len(script["rows"](data)) == count
    script["draw"](tmp_path / "sheet.png", data, "synthetic")
    for path in (tmp_path / "sheet.png", ROOT / "docs" / "augmentation.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_figures_of_convolution_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_convolution.py"))
    for draw in ("draw_windows", "draw_patches"):
        script[draw].__globals__["FOLDER"] = tmp_path
        script[draw]()
    for name in ("convolution.png", "im2col.png"):
        assert_drawn(tmp_path / name, ROOT / "docs" / name)


def test_the_outputs_in_the_figures_of_convolution_are_those_of_the_layer():
    convolve = runpy.run_path(str(ROOT / "docs" / "draw_convolution.py"))["convolve"]
    layer = numpy_ref.layers.Conv2d(1, 1, (3, 3), stride=2, padding=1, rng=np.random.default_rng(0))
    image = np.random.default_rng(1).standard_normal((5, 5))
    expected = layer.forward(image[None, :, :, None])[0, :, :, 0]
    assert np.allclose(convolve(image, layer.weight.value[:, :, 0, 0], 2, 1), expected)


def test_the_figure_of_resnet101_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_resnet101.py"))
    script["draw"].__globals__["FOLDER"] = tmp_path
    script["draw"]()
    assert_drawn(tmp_path / "resnet101.png", ROOT / "docs" / "resnet101.png")


def test_the_figure_of_runs_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_overview.py"))
    runs = {path.name: path for path in sorted((ROOT / "docs" / "runs").iterdir())}
    script["draw"](tmp_path / "overview.png", runs)
    assert_drawn(tmp_path / "overview.png", ROOT / "docs" / "overview.png")


def test_the_figures_of_features_and_gradients_can_be_drawn(tmp_path, monkeypatch):
    script = runpy.run_path(str(ROOT / "docs" / "draw_features.py"))
    names = script["main"].__globals__
    for name, value in (("FOLDER", tmp_path), ("BLOCKS", (1, 1, 1)), ("SEEDS", (0,)), ("BATCH", 4)):
        monkeypatch.setitem(names, name, value)
    script["main"]()
    for figure in ("features.png", "gradient_flow.png"):
        assert_drawn(tmp_path / figure, ROOT / "docs" / figure)


def test_the_block_without_shortcut_in_the_figure_has_the_gradient_of_its_branch():
    """The derivative in one direction, compared with a difference."""
    script = runpy.run_path(str(ROOT / "docs" / "draw_features.py"))
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"dtype": np.float64, "fast": False}
    block = script["PlainBlock"](2, 2, rng=rng, **options)
    x, dy, dx = (rng.standard_normal((2, 4, 4, 2)) for _ in range(3))
    block.forward(x, train=True)
    expected = np.sum(block.backward(dy) * dx)
    ends = [np.sum(block.forward(x + step * dx, train=True) * dy) for step in (1e-6, -1e-6)]
    assert np.isclose((ends[0] - ends[1]) / 2e-6, expected, rtol=1e-5)


def assert_drawn(made: Path, committed: Path | None = None) -> None:
    """Check that a figure was drawn, and that the committed one is of its size, and small."""
    with Image.open(made) as image:
        size = image.size
    if committed is not None:
        with Image.open(committed) as image:
            assert image.size == size, f"draw {committed.name} again"
        assert committed.stat().st_size < 150_000


def test_the_figure_of_adabounds_bounds_can_be_drawn(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "draw_adabound.py"))
    script["draw"].__globals__["FOLDER"] = tmp_path
    script["draw"]()
    assert_drawn(tmp_path / "adabound_bounds.png", ROOT / "docs" / "adabound_bounds.png")


def test_the_step_sizes_in_the_figure_of_adabound_are_those_of_the_optimizer():
    """Under a schedule, in NumPy and in JAX: the step divided by the mean of the gradients."""
    script = runpy.run_path(str(ROOT / "docs" / "draw_adabound.py"))
    rates, steps, gradients = script["scheduled"](50, 5), np.arange(1.0, 51), np.array([1e-4, 1e-2, 1.0])
    expected = np.array([script["sizes"](rates, steps, gradient) for gradient in gradients])
    parameter = numpy_ref.layers.Parameter(np.zeros(3))
    parameter.grad[:] = gradients
    optimizer = numpy_ref.AdaBound([parameter], lr=1e-3)
    tx = jax_resnet.adabound(lambda count: jnp.asarray(rates)[count], base_lr=1e-3)
    state, weights = tx.init(jnp.zeros(3)), jnp.zeros(3)
    for step, rate in enumerate(rates):
        before, mean = parameter.value.copy(), gradients * (1 - 0.9 ** (step + 1))
        optimizer.lr = rate
        optimizer.step()
        assert np.allclose((before - parameter.value) / mean, expected[:, step], rtol=1e-9)
        updates, state = tx.update(jnp.asarray(gradients), state, weights)
        assert np.allclose(-np.asarray(updates) / mean, expected[:, step], rtol=1e-4)


def test_the_bounds_in_the_figure_of_adabound_are_those_that_the_run_logged():
    script = runpy.run_path(str(ROOT / "docs" / "draw_adabound.py"))
    lines = map(json.loads, (script["RUN"] / "metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if line["scope"] == "step"]
    config = json.loads((script["RUN"] / "config.json").read_text())["resolved"]
    rates = script["scheduled"](config["total_steps"], config["warmup_steps"])
    assert np.allclose([line["lr"] for line in logged], rates, rtol=1e-5)
    lower, upper = script["bounds"](rates, np.arange(1.0, len(rates) + 1))
    assert np.allclose([line["lower_bound"] for line in logged], lower, rtol=1e-5)
    assert np.allclose([line["upper_bound"] for line in logged], upper, rtol=1e-5)


def test_results_of_a_study_become_a_page(tmp_path):
    summary = {"n": 2, "mean": 0.9, "sd": 0.01, "low": 0.81, "high": 0.99}
    measures = dict.fromkeys(("accuracy", "f1", "loss"), summary)
    method = {"chosen": 0, "setting": {"lr": 0.1}, "runs": {}, "diverged": [], "tuning": [], **measures}
    study: dict[str, Any] = {
        "name": "mnist-tenth",
        "command": ["FILE"],
        "made_with": [],
        "seeds": [1, 2],
        "tuning_seeds": [],
    }
    study |= {"contestants": {"adam": method}, "comparisons": []}
    (tmp_path / "study.json").write_text(json.dumps(study))
    (tmp_path / "curves.png").write_bytes(b"curves")
    script = runpy.run_path(str(ROOT / "docs" / "fill_adabound.py"))
    folder = script["main"].__globals__["FOLDER"] = tmp_path / "studies"
    script["main"]([str(tmp_path)])
    text = (folder / "mnist-tenth.md").read_text()
    assert "| adam | lr 0.1 | 2 | 90.00 (1.00) | 81.00 to 99.00 |" in text
    assert text.count("](mnist-tenth-curves.png)") == 1
    assert (folder / "mnist-tenth-curves.png").read_bytes() == b"curves"
    (folder / "mnist-tenth.md").unlink()
    script["main"]([])  # from the results in docs/studies
    assert (folder / "mnist-tenth.md").read_text() == text


def test_the_example_of_a_study_can_be_read(tmp_path):
    """The TOML file of docs/training.md: its methods, and the number of runs that stands there."""
    example, _ = code_blocks("docs/training.md", "toml")
    path = tmp_path / "example.toml"
    path.write_text(example)
    plan = read(path, {})
    assert [method.name for method in plan.methods] == [
        f"{optimizer}-{variant}"
        for variant in ("batch-norm", "no-batch-norm")
        for optimizer in ("adam", "bounded")
    ]
    trials = sum(len(method.trials) for method in plan.methods)
    runs = trials + len(plan.methods) * len(plan.seeds)
    assert f"= {runs}." in (ROOT / "docs" / "training.md").read_text()
    assert plan.methods[1].candidates[0]["report"] is True
