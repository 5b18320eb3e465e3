"""The report of a run and the comparison of runs: what stands in them, and what is done without."""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from experiment.__main__ import main
from experiment.commands import train
from experiment.errors import UserError
from experiment.files import predictions
from experiment.files import weights as run_weights
from experiment.options.command_line import argv_of, parse
from experiment.options.config import Config
from experiment.options.resolving import resolve
from experiment.report import comparison, figures, page, style, tables
from experiment.report.reading import read_run
from experiment.run.console import Console
from tests.helpers import made_run

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = "<script>alert('$1_{$')</script>"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def report_of(run: Path) -> tuple[str, Elements]:
    """Write a run's report by the command; the page as it is, and taken apart."""
    assert main(["report", str(run)]) == 0
    text = (run / "report" / "index.html").read_text()
    elements = Elements(text)
    assert_self_contained(elements)
    return text, elements


def assert_self_contained(elements: Elements) -> None:
    """Every image is inside, whole, and has words for those who cannot see it; nothing is loaded or run."""
    for tag, attributes in elements.found:
        assert tag not in {"script", "iframe", "object", "embed", "base"}
        assert not [name for name in attributes if name.startswith("on")]
        address = attributes.get("src") or attributes.get("href")
        assert address is None or address.startswith("data:")
        if tag == "img":
            assert attributes["alt"]
            kind, _, content = (attributes["src"] or "").partition(";base64,")
            data = base64.b64decode(content, validate=True)
            if kind == "data:image/svg+xml":
                ElementTree.fromstring(data)
            else:
                Image.open(io.BytesIO(data)).verify()


def names_of(run: Path) -> set[str]:
    files = list((run / "report").glob("*.png"))
    assert all(path.read_bytes()[:8] == PNG for path in files)
    return {path.stem for path in files}


CURVES = {"loss", "accuracy", "f1", "lr", "norms"}
CLASSES = {"confusion", "samples", "mistakes"}


# What stands in a report


def test_a_finished_run(tmp_path: Path) -> None:
    run = made_run.write(
        tmp_path / "run", bounds=True, resumes=(20, 40), optimizer="adabound", seed=3, lr=0.002
    )
    _, elements = report_of(run)
    assert names_of(run) == CURVES | CLASSES | {"bounds", "clipped"}
    summary = json.loads((run / "summary.json").read_text())
    for words in (
        "cnn on digits, adabound",
        "finished at step 60",
        f"{summary['test']['accuracy']:.4f}",
        f"{summary['test']['f1']:.4f}",
        "python train.py --model cnn --optimizer adabound --lr 0.002 --seed 3",
        "0123456789abcdef0123456789abcdef01234567, which had changes that were not committed",
        "Dashed lines: the run was resumed there.",
        "1 x made, 2 CPUs",
        "jax 0.0.1, numpy 0.0.2",
    ):
        assert words in " ".join(elements.text.split())
    assert not (run / "report" / "index.html.tmp").exists()


def test_the_metrics_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every value of metrics.jsonl, read by another reader; what is absent or null is an empty cell."""
    run = made_run.write(tmp_path / "run", bounds=True)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "scope": "step", "step": 61, "epoch": 4, "loss": null}\n')
    assert main(["report", str(run), "--csv"]) == 0
    table = run / "report" / "metrics.csv"
    assert capsys.readouterr().out.splitlines()[-1] == str(table)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) > 60
    for row, line in zip(rows, lines, strict=True):
        assert row == {name: "" if line.get(name) is None else str(line[name]) for name in row}
        assert set(line) <= set(row)


def test_a_report_says_what_is_absent_and_damaged(tmp_path: Path) -> None:
    """A run that was killed while it wrote, after it had been continued."""
    run = made_run.write(tmp_path / "run", finished=False, steps=33)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[10:]:  # not finite
        line.update(loss=None, **({"grad_norm": None} if "grad_norm" in line else {}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with open(run / "metrics.jsonl", "a") as file:
        file.write('null\n{"split": "train", "scope": "step", "st')
    _, elements = report_of(run)
    assert names_of(run) == CURVES
    text = " ".join(elements.text.split())
    assert "not finished: step 33 of 66 is the last that is recorded" in text
    assert "Last line of its log: 2026-01-02 03:04:05 cnn: <made>" in text
    assert "summary.json is absent" in text
    assert "predictions.npz is absent" in text
    assert "2 of the 37 lines of metrics.jsonl cannot be read" in text
    (run / "summary.json").write_text("[")
    (run / "predictions.npz").write_bytes(b"PK")
    assert read_run(run).absent[1:] == ["summary.json is damaged.", "predictions.npz is damaged."]


def test_nothing_but_a_config(tmp_path: Path) -> None:
    run = made_run.write(tmp_path / "run", finished=False, steps=0)
    for name in ("metrics.jsonl", "log.txt"):
        (run / name).unlink()
    (run / "report").mkdir()
    (run / "report" / "loss.png").write_bytes(PNG)  # of a run that was there before
    _, elements = report_of(run)
    assert names_of(run) == set()
    assert "no step yet" in elements.text
    assert "metrics.jsonl is absent" in elements.text


def test_a_run_of_no_steps(tmp_path: Path) -> None:
    run = made_run.write(tmp_path / "run", steps=0)
    _, elements = report_of(run)
    assert names_of(run) == {"loss", "accuracy", "f1"} | CLASSES
    assert "finished without a step" in elements.text


def test_196_classes_whose_names_are_text_and_nothing_else(tmp_path: Path) -> None:
    odd = (HOSTILE, "a & b", "$\\frac{1}$", "漢字", "</svg>")
    names = (*odd, *(f"Maker Model {number} 2012" for number in range(5, 196)))
    run = made_run.write(tmp_path / HOSTILE.replace("/", "|"), class_names=names, shape=(64, 96, 3), steps=20)
    record = json.loads((run / "config.json").read_text())
    record["config"]["dataset"] = record["sessions"][0]["device"] = HOSTILE
    (run / "config.json").write_text(json.dumps(record))
    text, elements = report_of(run)
    assert "<script" not in text
    assert elements.text.count(HOSTILE) > 3
    assert all(name in elements.text for name in names)
    assert "Each class, the lowest F1 first" in elements.text
    assert 'class="pixels"' not in text  # photographs
    assert len(text) < 3_000_000
    assert main(["compare", str(run), str(run), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<script" not in page
    assert_self_contained(Elements(page))


def test_up_to_twenty_names_of_classes_stand_in_the_matrix(tmp_path: Path) -> None:
    names = (HOSTILE, "a & b", "$\\frac{1}$", "漢字", "</svg>")
    found = made_run.collect(names, (8, 8, 1), np.random.default_rng(0)).finish(0, names)
    with style.style():
        drawn = [style.svg(figures._confusion(found)) for _ in range(2)]
    assert drawn[0] == drawn[1], "the same image, other bytes"
    ElementTree.fromstring(drawn[0])


def test_the_filters_of_the_first_convolution_are_drawn(tmp_path: Path) -> None:
    run = made_run.write(tmp_path / "run")
    kernel = np.random.default_rng(0).standard_normal((8, 1, 3, 3), np.float32)
    run_weights.save(run / "weights.safetensors", {"conv.weight": kernel, "fc.bias": kernel[0]}, {"step": 60})
    _, elements = report_of(run)
    assert "filters" in names_of(run)
    assert [a for _, a in elements.found if "filters of the first" in (a.get("alt") or "")]
    with style.style():
        drawn = figures.filters(kernel, 60)
        assert drawn is not None
        (axes,) = drawn.axes
        assert axes.get_title("left") == "Filters of the first convolution (8), step 60"
        mosaic = np.asarray(axes.images[0].get_array())
        np.testing.assert_allclose(
            mosaic[:3, 4:7, 0], 0.5 + kernel[1, 0] / (2 * np.abs(kernel).max()), atol=1e-6
        )
        assert figures.filters(np.zeros((4, 2, 3, 3))) is None
        assert figures.filters(np.full((4, 3, 3, 3), np.nan)) is None


def test_the_matrix_is_of_the_classes_that_occur() -> None:
    found = made_run.collect(("a", "b"), (8, 8, 1), np.random.default_rng(0)).finish(0, ("a", "b", "c", "d"))
    with style.style():
        (axes,) = figures._confusion(found).axes
    assert axes.get_title("left") == "Confusion of 2 of 4 classes"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


@pytest.mark.parametrize("command", ["report", "compare"])
def test_what_is_no_run_is_refused_in_a_line(
    command: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    good = made_run.write(tmp_path / "good", steps=0)
    damaged = made_run.write(tmp_path / "damaged", steps=0)
    (damaged / "config.json").write_text("{")
    wrong = made_run.write(tmp_path / "wrong", steps=0)
    record = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**record, "config": {"lr": "fast"}}))
    for name, words in (
        ("absent", "not the folder of a run"),
        ("damaged", "cannot be read"),
        ("wrong", "lr"),
    ):
        before = sorted(path for path in tmp_path.rglob("*"))
        assert main([command, str(good), name]) == 2
        assert sorted(path for path in tmp_path.rglob("*")) == before
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error


# What they are made of


def test_predictions_by_hand(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 500).astype(np.int32)
    logits = rng.normal(size=(500, 3)).astype(np.float32)
    images = rng.integers(0, 256, (500, 8, 6, 1), dtype=np.uint8)
    collector = predictions.Collector(500)
    for start in range(0, 500, 77):
        part = slice(start, start + 77)
        collector.update(images[part], logits[part], labels[part])
    collector.finish(7, ("a", "b", "c")).save(tmp_path / "predictions.npz")
    found = predictions.load(tmp_path / "predictions.npz")
    chance = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(found.predictions, logits.argmax(1))
    np.testing.assert_allclose(found.confidences, chance.max(1), rtol=1e-5)
    assert (found.step, found.class_names, found.samples) == (7, ("a", "b", "c"), 32)
    np.testing.assert_array_equal(found.shown[:32], np.linspace(0, 499, 32).round())
    np.testing.assert_array_equal(found.images, images[found.shown])
    wrong = np.flatnonzero(logits.argmax(1) != labels)
    np.testing.assert_array_equal(found.shown[32:], wrong[np.argsort(-chance.max(1)[wrong])][:32])


def test_large_images_are_kept_small() -> None:
    collector = predictions.Collector(1)
    collector.update(np.zeros((1, 224, 448, 3), np.uint8), np.array([[0.0, np.nan]]), np.array([0], np.int32))
    found = collector.finish(0, ("a", "b"))
    assert found.images.shape == (
        2,
        48,
        96,
        3,
    )  # a sample and a mistake: what is no number counts as larger
    assert np.isnan(found.confidences[0])


def test_the_classes_as_scikit_learn_has_them() -> None:
    import sklearn.metrics

    names = tuple("abcde")
    found = made_run.collect(names, (2, 2, 1), np.random.default_rng(1)).finish(0, names)
    labels, said = found.labels, found.predictions.copy()
    said[said == 4] = 3  # one class is never said
    found = dataclasses.replace(found, predictions=said)
    np.testing.assert_array_equal(tables.confusion(found), sklearn.metrics.confusion_matrix(labels, said))
    want = sklearn.metrics.precision_recall_fscore_support(labels, said, zero_division=np.nan)
    table = tables.class_table(found)
    np.testing.assert_allclose([row.precision for row in table], want[0])
    np.testing.assert_allclose([row.recall for row in table], want[1])
    np.testing.assert_allclose([row.f1 for row in table], np.nan_to_num(want[2]))
    assert table[4].taken_for == "d"
    first = tables.most_confused(found)[0]
    assert (first.true, first.predicted, first.errors, first.share) == ("e", "d", 8, 1.0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"framework": "numpy", "model": "resnet20", "steps": 7, "batch_norm": False, "milestones": (3, 5)}
        | {"schedule": "multistep", "image_size": "64x96", "resize": (70, 80), "augment": "crop-flip"},
        {"optimizer": "sgd", "data_dir": "my data", "weight_decay": 1e-4, "epochs": 2, "eps": 1e-10},
        {"optimizer": "adamw", "lr": 3e-4, "report": False, "deterministic": True},
    ],
)
def test_the_command_gives_the_options_again(given: dict[str, Any]) -> None:
    config: Config = resolve(given)
    assert resolve(parse(argv_of(config))) == config


def test_long_curves_are_drawn_short() -> None:
    steps = np.arange(1.0, 10_001)
    x, y = figures.thin(steps, 2 * steps)
    assert len(x) == figures.MOST_POINTS
    np.testing.assert_allclose(y, 2 * x)
    np.testing.assert_allclose(figures.smooth(steps, 5)[2:-2], steps[2:-2])
    assert figures.smooth(steps, 5)[0] == 2


def test_every_color_of_the_style_sheet_has_one_for_the_dark() -> None:
    colors = set(re.findall(r"color: ([0-9a-f]{6})\b", style.STYLE.read_text()))
    assert colors
    assert colors <= {light.removeprefix("#") for light, _ in style.COLORS.values()}


def test_every_colour_follows_light_and_dark() -> None:
    with style.style():
        figure, axes = style.panel("a title")
        for color in style.CYCLE:
            axes.plot([1, 2], color=color, label=color)
        style.legend(axes)
        text = style.svg(figure).decode()
    rules, rest = text.split("</style>", 1)
    for name, (light, dark) in style.COLORS.items():
        assert f"--{name}:{light};" in rules
        assert f"--{name}:{dark};" in rules
        assert light not in rest
    assert set(re.findall(r"#[0-9a-f]{6}", rest)) <= {"#000000", "#ffffff"}


# Comparison


def test_a_comparison(tmp_path: Path) -> None:
    """Of runs with epochs of different lengths, one of which is not finished."""
    a = made_run.write(tmp_path / "a" / "run", seed=1, optimizer="adabound")
    b = made_run.write(tmp_path / "b" / "run", seed=2, per_epoch=30)
    c = made_run.write(tmp_path / "c" / "other", finished=False)
    out = tmp_path / "out"
    for _ in range(2):  # in the place of the one before
        assert main(["compare", str(a), str(b), str(c), "--out", str(out)]) == 0
    text = (out / "index.html").read_text()
    elements = Elements(text)
    assert_self_contained(elements)
    both = {f"{key}-{split}" for key in ("loss", "accuracy", "f1") for split in ("train", "val")}
    assert {path.stem for path in out.glob("*.png")} == both
    runs = [read_run(run) for run in (a, b, c)]
    assert comparison.labels(runs) == ["a/run", "b/run", "c/other"]
    rows = dict(comparison.differences(runs))
    assert rows["optimizer"] == ["adabound", "adam", "adam"]
    assert rows["seed"] == ["1", "2", "0"]
    assert rows["steps_per_epoch"] == ["20", "30", "20"]
    assert "model" not in rows
    accuracy = comparison.results(runs)[0]
    assert accuracy.values[2] is None
    assert accuracy.winner == max(value for value in accuracy.values if value is not None)
    assert f"<strong>{accuracy.winner:.4f}</strong>" in text
    speed = next(column for column in comparison.results(runs) if column.title == "images/s")
    assert speed.words == ["121", "122", "–"]


def test_a_run_beside_itself(tmp_path: Path) -> None:
    run = read_run(made_run.write(tmp_path / "run", steps=0, finished=False))
    assert comparison.labels([run, run]) == ["run (1)", "run (2)"]
    text, drawn = comparison.render_comparison([run, run])
    assert not drawn
    assert "None of the runs has recorded a step." in text
    assert "None: options, data, versions and devices are the same." in text


@pytest.mark.parametrize("what", ["one run", "a file", "a folder in use", "in a file"])
def test_a_comparison_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(made_run.write(tmp_path / "run", steps=0))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    argv = {
        "one run": [run],
        "a file": [run, run, "--out", str(tmp_path / "file")],
        "a folder in use": [run, run, "--out", str(tmp_path / "used")],
        "in a file": [run, run, "--out", str(tmp_path / "file" / "out")],
    }[what]
    assert main(["compare", *argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("RUN" if what == "one run" else "--out") in error
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["thesis.txt"]


# A run from its beginning


def test_a_run_writes_its_report_and_event_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped and continued: TensorBoard's own reader finds each line of metrics.jsonl once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    small = ["--model", "cnn", "--framework", "numpy", "--train-subset", "0.1", "--batch-size", "16"]
    more = ["--steps", "6", "--schedule", "constant", "--eval-every", "2", "--run-dir", str(run)]
    assert train.main([*small, *more]) == 0
    assert train.main(["--resume", "--steps", "9", "--run-dir", str(run)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"report: {run / 'report' / 'index.html'}"
    assert names_of(run) == CURVES | CLASSES | {"filters"}
    found = predictions.load(run / "predictions.npz")
    test = json.loads((run / "summary.json").read_text())["test"]
    assert (found.labels == found.predictions).mean() == pytest.approx(test["accuracy"])
    assert found.step == 9

    (file,) = (run / "tensorboard").iterdir()
    events = EventAccumulator(str(file.parent), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    lines = read_run(run).lines
    for part, split, scope in (
        *(("batch", "train", "step"), ("train", "train", "epoch")),
        *(("val", "val", "epoch"), ("test", "test", "epoch")),
    ):
        chosen = [line for line in lines if (line["split"], line["scope"]) == (split, scope)]
        assert chosen
        for key in ("loss", "accuracy", "f1", "top5"):
            read = [(event.step, event.value) for event in events.Scalars(f"{key}/{part}")]
            assert read == [(line["step"], pytest.approx(line[key])) for line in chosen]
    assert [event.step for event in events.Scalars("step/lr")] == list(range(1, 10))
    assert set(events.Tags()["images"]) == {f"report/{name}" for name in CURVES | CLASSES | {"filters"}}
    assert events.Images("report/loss")[0].encoded_image_string == (run / "report" / "loss.png").read_bytes()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"optimizer" in content


def test_a_run_without_a_report(tmp_path: Path) -> None:
    argv = ["--model", "cnn", "--framework", "numpy", "--steps", "0", "--no-report"]
    assert train.main([*argv, "--run-dir", str(tmp_path / "run")]) == 0
    assert not {"report", "tensorboard"} & {path.name for path in (tmp_path / "run").iterdir()}
    report_of(tmp_path / "run")


def test_a_report_that_fails_costs_nothing_else(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def broken(run: Any) -> Any:
        raise RuntimeError("no font")

    monkeypatch.setattr("experiment.report.draw", broken)
    argv = ["--model", "cnn", "--framework", "numpy", "--steps", "0", "--run-dir", str(tmp_path / "run")]
    assert train.main(argv) == 0
    assert "its report could not be made (RuntimeError: no font)" in capsys.readouterr().out
    assert (tmp_path / "run" / "weights.safetensors").exists()


def test_damaged_predictions_are_refused(tmp_path: Path) -> None:
    path = made_run.write(tmp_path / "run", steps=0) / "predictions.npz"
    with np.load(path) as file:
        arrays = dict(file)
    for change in (
        {"labels": arrays["labels"] + 10},
        {"shown": arrays["shown"][:-1]},
        {"pictures": np.zeros(3)},
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(UserError, match="do not fit together"):
            predictions.load(path)
    np.savez(path, labels=arrays["labels"])
    with pytest.raises(UserError, match="is not what a run writes"):
        predictions.load(path)


def test_words_for_values() -> None:
    assert page.duration(61.5) == "62 s"
    assert page.duration(600) == "10.0 min"
    assert page.percent(float("nan")) == "–"
    assert page.value_words([]) == "–"
    assert page.value_words((1, 2)) == "1 2"
    assert page.value_words(True) == "yes"


def test_the_bar_of_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    console = Console(stream=stream)
    console.start(0, 100, 32)
    console.progress(10, 100, "1/3", loss=0.5, accuracy=0.75, speed=120.0)
    console.report("a line above it")
    console.close()
    shown = stream.getvalue()
    assert "a line above it\n" in shown
    assert re.search(r"epoch 1/3: +10%.* 320/3\.20k \[.*<.* images/s, accuracy=0\.750, loss=0\.5000\]", shown)
