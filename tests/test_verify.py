"""`verify` names what is damaged; commands take in files of any kind safely."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.reliability.damaged_files import ask, continue_run, damaged_files, make_run
from experiment.commands import compare, convert, evaluate, predict, report, study, train, verify
from experiment.errors import LONGEST, UserError, printable
from experiment.files import predictions, soundness, weights
from experiment.program import ROOT
from experiment.reading import checked_json, read_bytes


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "run"
    make_run(folder)
    return folder


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run"))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_sound_run_has_a_line_for_each_file(run: Path) -> None:
    answer = ask(verify.main, [str(run)])
    *lines, last = answer.output.splitlines()
    assert (answer.status, answer.errors) == (0, [])
    assert last == f"{len(lines)} verified, all sound"
    assert all(line.startswith("ok ") for line in lines)
    named = {Path(line.split()[1].rstrip(":")).relative_to(run).as_posix() for line in lines}
    assert named == {
        *("config.json", "metrics.jsonl", "checkpoints/4", "checkpoints/8", "weights.safetensors"),
        *("weights-best.safetensors", "summary.json", "predictions.npz"),
    }


def test_a_report_is_sound_whatever_the_folder_and_the_program_are_called(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a figure that another version has drawn is noted."""
    assert ask(report.main, [str(run)]).status == 0
    page = run / "report" / "index.html"
    moved = run.rename(run.with_name("moved"))
    monkeypatch.setattr("sys.argv", ["threeway-resnet", "verify"])
    answer = ask(verify.main, [str(moved)])
    assert answer.status == 0, answer
    assert f"ok       {moved / 'report' / 'index.html'}\n" in answer.output
    page = moved / "report" / "index.html"
    text = page.read_text()
    page.write_text(text.replace("base64,", "base64,A", 1))
    answer = ask(verify.main, [str(moved)])
    assert answer.status == 0
    assert "its figures are damaged, or of other versions" in answer.output
    page.write_text(text.replace("test images", "tost images", 1))
    assert ask(verify.main, [str(moved)]).status == 1


def test_a_checkpoint_that_comes_or_goes_is_passed_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run / "checkpoints" / "8", run / "checkpoints" / "12.incomplete")
    answer = ask(verify.main, [str(run / "checkpoints")])
    assert (answer.status, "incomplete" in answer.output) == (0, False)
    original = soundness.verify_checkpoint

    def verify_late(folder: Path, *arguments: Any) -> Any:
        if folder.name == "4":
            shutil.rmtree(folder)
        return original(folder, *arguments)

    monkeypatch.setattr(soundness, "verify_checkpoint", verify_late)
    answer = ask(verify.main, [str(run)])
    assert answer.status == 0, answer
    assert "checkpoints/4" not in answer.output


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_something_in_place_of_the_metrics_is_damage(run: Path, kind: str) -> None:
    path = run / "metrics.jsonl"
    path.unlink()
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    answer = ask(verify.main, [str(run)])
    assert answer.status == 1
    assert re.search(r"^DAMAGED  \S+metrics.jsonl: it cannot be read \(", answer.output, re.MULTILINE)
    assert "weights.safetensors" in answer.output
    answer = ask(train.main, ["--resume", "--run-dir", str(run), "--steps", "12"])
    assert answer.in_one_line, answer
    assert "metrics.jsonl: cannot be read" in answer.errors[0]


def test_a_published_run_may_leave_out_weights_and_checkpoints() -> None:
    answer = ask(verify.main, [str(ROOT / "docs" / "runs" / "digits-adam")])
    assert answer.status == 0
    assert "weights.safetensors: it is absent" in answer.output


def test_runs_below_a_folder_and_single_things(run: Path) -> None:
    whole = ask(verify.main, [str(run.parent), "--json"])
    assert len(json.loads(whole.output)) == 8
    assert whole.status == 0
    for path in (run / "checkpoints" / "8", run / "weights.safetensors"):
        assert ask(verify.main, [str(path)]).output.splitlines()[-1] == "1 verified, all sound"


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "options": ("config.json", lambda p: edit(p, lambda c: c["config"].update(seed=7)), "seed"),
    "mean": ("config.json", lambda p: edit(p, lambda c: c["resolved"].update(mean=[0.9])), "mean"),
    "classes": (
        "config.json",
        lambda p: edit(p, lambda c: c["resolved"].update(num_classes=7)),
        "differ in number",
    ),
    "sessions": ("config.json", lambda p: edit(p, lambda c: c.update(sessions=[3])), "sessions"),
    "nested": ("config.json", lambda p: p.write_text("[" * 100_000), "nested"),
    "line": ("metrics.jsonl", lambda p: p.write_bytes(b"{}\n" + p.read_bytes()), "line 1"),
    "changed": ("metrics.jsonl", lambda p: p.write_bytes(p.read_bytes().replace(b"0.", b"1.", 1)), "changed"),
    "result": ("summary.json", lambda p: edit(p, lambda c: c["test"].update(accuracy=1.0)), "test results"),
    "steps": ("summary.json", lambda p: edit(p, lambda c: c.update(steps=-1)), "steps"),
    "kept": ("checkpoints/4/run.json", lambda p: p.write_text("{}"), "run.json"),
    "absent": ("weights.safetensors", lambda p: p.unlink(), "absent"),
    "npz": ("predictions.npz", lambda p: p.write_bytes(p.read_bytes()[:-30]), "not what a run writes"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(run: Path, name: str) -> None:
    path, damage, words = DAMAGES[name]
    damage(run / path)
    answer = ask(verify.main, [str(run)])
    damaged = [line for line in answer.output.splitlines() if line.startswith("DAMAGED")]
    assert answer.status == 1, answer
    assert any(words in line for line in damaged), answer


def test_every_flipped_bit_of_weights_is_noticed(run: Path) -> None:
    """In the tensors and in the header, wherever it still is a header."""
    path, rng = run / "weights.safetensors", np.random.default_rng(0)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    places = [*rng.integers(8 + size, len(whole), 30), *rng.integers(0, 8 + size, 30)]
    for place in places:
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        answers = [ask(main, [str(run)]) for main in (verify.main, evaluate.main)]
        assert answers[0].status == 1, place
        if place >= 8 + size:
            assert answers[1].in_one_line
            assert "SHA-256" in answers[1].errors[0]
        assert answers[1].status is not None


def test_weights_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    record = weights.record_of(run / "weights.safetensors")
    record["identity"]["dataset"] = "mnist"
    del record[weights.HASH]
    tensors = weights.load(run / "weights.safetensors")
    weights.save(run / "weights.safetensors", tensors, record)
    answer = ask(evaluate.main, [str(run)])
    assert answer.in_one_line
    assert "was written by a run with dataset mnist" in answer.errors[0]


def test_predictions_that_lie_are_refused(run: Path) -> None:
    with np.load(run / "predictions.npz") as file:
        arrays = dict(file)
    (images,) = (name for name, array in arrays.items() if array.ndim == 4)
    for name, value in {
        "step": np.array(-3),
        images: arrays[images][:, :0],
        "samples": np.array(-1),
    }.items():
        np.savez(run / "predictions.npz", **{**arrays, name: value})
        with pytest.raises(UserError, match="not what a run writes"):
            predictions.load(run / "predictions.npz")


def test_pipes_and_devices_are_refused_at_once(run: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [
        (predict.main, [str(run), str(pipe)]),
        (train.main, ["--model", "cnn", "--init-from", str(pipe), "--run-dir", str(tmp_path / "other")]),
        (study.main, [str(pipe)]),
        (convert.main, [str(pipe), str(tmp_path / "out.safetensors")]),
        (verify.main, [str(tmp_path / "nothing")]),
    ]
    for main, argv in commands:
        answer = ask(main, argv)
        assert answer.in_one_line, (argv, answer)
        assert answer.status == 2, (argv, answer)
    assert not (tmp_path / "other").exists()
    with pytest.raises(OSError, match="pipe or a device"):
        read_bytes(Path("/dev/zero"))
    (run / "config.json").unlink()
    os.mkfifo(run / "config.json")
    for main in (report.main, evaluate.main):
        answer = ask(main, [str(run)])
        assert answer.status == 2
        assert len(answer.errors) == 1


@pytest.mark.parametrize("name", ["8", "8.incomplete", "12", "12.incomplete"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_something_in_place_of_a_checkpoint_hinders_nothing(
    run: Path, name: str, kind: str, tmp_path: Path
) -> None:
    """Its target, elsewhere, is left alone."""
    target = tmp_path / "elsewhere"
    target.mkdir()
    (target / "precious").write_text("mine")
    path = run / "checkpoints" / name
    if path.exists():
        shutil.rmtree(path)
    path.write_text("") if kind == "file" else path.symlink_to(target)
    answer = continue_run(run)
    assert answer.status == 0, answer
    assert (run / "checkpoints" / "12" / "manifest.json").is_file()
    assert not (run / "checkpoints" / "12").is_symlink()
    assert (target / "precious").read_text() == "mine"


def test_links_are_not_written_through(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (run / "config.json.tmp").symlink_to(mine)
    assert continue_run(run).status == 0
    for name in ("log.txt", "metrics.jsonl"):
        content = (run / name).read_bytes()
        (run / name).unlink()
        mine.write_bytes(content)
        (run / name).symlink_to(mine)
        answer = ask(train.main, ["--resume", "--steps", "13", "--run-dir", str(run)])
        assert answer.status in (1, 2), answer
        assert "it is a link" in answer.errors[-1], answer
        assert mine.read_bytes() == content
        (run / name).unlink()
        (run / name).write_bytes(content)


def test_files_of_others_are_left_alone(run: Path) -> None:
    """In the folders of the report and of TensorBoard."""
    for folder, name in (("report", "mine.png"), ("tensorboard", "events.out.tfevents.1.mine")):
        (run / folder).mkdir(exist_ok=True)
        (run / folder / name).write_text("mine")
    assert ask(train.main, ["--resume", "--steps", "10", "--report", "--run-dir", str(run)]).status == 0
    assert (run / "report" / "mine.png").exists()
    assert (run / "tensorboard" / "events.out.tfevents.1.mine").exists()
    answer = ask(verify.main, [str(run)])
    assert answer.status == 0, answer
    assert "report/index.html" in answer.output, answer
    page = run / "report" / "index.html"
    page.write_text(page.read_text().replace("cnn", "resnet18", 1))
    assert ask(verify.main, [str(run)]).status == 1


def test_compare_names_a_damaged_summary(run: Path, tmp_path: Path) -> None:
    (run / "summary.json").write_text("{")
    answer = ask(compare.main, [str(run), str(run), "--out", str(tmp_path / "out")])
    assert answer.status == 0
    assert any("summary.json is damaged" in line for line in answer.errors)


def test_a_long_name_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'seeds = [1]\n[base]\nsteps = 1\n[[optimizers]]\nname = "{"a" * 300}"\noptimizer = "adam"\n'
    )
    for main, argv in (
        (study.main, [str(plan)]),
        (train.main, ["--model", "cnn", "--run-dir", "r" * 300]),
        (train.main, ["--model", "cnn", "--run-dir", "r/" * 3000]),
        (report.main, ["x" * 300]),
    ):
        answer = ask(main, argv)
        assert answer.in_one_line, answer
        assert answer.status == 2, answer
        assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


def test_what_is_printed_is_one_line() -> None:
    assert printable("a\x1b[31m\tb\n  c\u202e\udc80") == r"a\x1b[31m\tb c\u202e\udc80"
    assert len(printable("x" * 10**6)) <= LONGEST
    answer = ask(train.main, ["--model", "no\nsuch\x1b[2Jmodel"])
    assert answer.status == 2
    assert len(answer.errors) == 1
    assert "\x1b" not in answer.errors[0]


@pytest.mark.parametrize("content", [b"[" * 200_000, b"{'a': 1}", b"[NaN]", b'"\xff"', b""])
def test_json_of_any_kind(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"JSON|nested|truncated|UTF-8"):
        checked_json(content)


def test_a_small_part_of_the_campaign(tmp_path: Path) -> None:
    tally = damaged_files(tmp_path, 12, seed=0)
    assert not tally.wrong


@pytest.mark.slow
def test_the_campaign_of_damaged_files(tmp_path: Path) -> None:
    tally = damaged_files(tmp_path, 500, seed=1)
    print(dict(tally.counts))
    assert not tally.wrong
