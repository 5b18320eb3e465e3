"""Paths as users type them, for every flag and argument: `~`, URLs, names that are not UTF-8."""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from experiment.__main__ import main
from experiment.commands import train
from experiment.errors import UserError
from experiment.files.run_folder import check_fresh
from experiment.options.command_line import parse
from experiment.options.paths import local_path
from experiment.options.resolving import resolve

BYTES = os.fsdecode(b"caf\xe9")
# Every path that a command line takes: its name in messages, and the arguments with a place for it.
COMMANDS = {
    "compare RUN": ("RUN", ["compare", "{}", "b"]),
    "compare --out": ("--out", ["compare", "a", "b", "--out", "{}"]),
    "convert IN": ("IN", ["convert", "{}.pth", "b.safetensors"]),
    "convert OUT": ("OUT", ["convert", "a.safetensors", "{}/x.pth"]),
    "evaluate RUN": ("RUN", ["evaluate", "{}"]),
    "evaluate --data-dir": ("--data-dir", ["evaluate", "a", "--data-dir", "{}"]),
    "parity WEIGHTS": ("WEIGHTS", ["parity", "{}"]),
    "parity IMAGE": ("IMAGE", ["parity", "a", "{}"]),
    "parity --reference": ("--reference", ["parity", "a", "--reference", "{}"]),
    "parity --dump": ("--dump", ["parity", "a", "--dump", "{}/x"]),
    "predict RUN": ("RUN", ["predict", "{}"]),
    "predict IMAGE": ("IMAGE", ["predict", ".", "{}"]),
    "predict --out": ("--out", ["predict", ".", "a.png", "--out", "{}/x.csv"]),
    "prepare --data-dir": ("--data-dir", ["prepare", "mnist", "--data-dir", "{}"]),
    "report RUN": ("RUN", ["report", "{}"]),
    "study STUDY": ("STUDY", ["study", "{}"]),
    "study --run-dir": ("--run-dir", ["study", "a", "--run-dir", "{}"]),
    "study --data-dir": ("--data-dir", ["study", "a", "--data-dir", "{}"]),
}
OPTIONS = ("--run-dir", "--data-dir", "--init-from")
ANY_BYTES = ("predict RUN", "predict IMAGE", "predict --out", "evaluate RUN", "convert IN", "convert OUT")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder, and an empty working directory beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that refuses a command, which leaves nothing behind."""
    status = train.main(argv) if argv[0].startswith("-") else main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2, line
    assert not list(Path.cwd().iterdir())
    return line


@pytest.mark.parametrize("what", COMMANDS)
def test_a_url_is_refused_by_every_command(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, argv = COMMANDS[what]
    line = refusal([each.replace("{}", "gs://bucket") for each in argv], capsys)
    assert line.startswith(f"error: {name}: gs://bucket")
    assert "is a URL" in line


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://x", "file:///x"])
@pytest.mark.parametrize("flag", OPTIONS)
def test_a_url_is_refused_by_train(flag: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal([flag, url], capsys).startswith(f"train.py: error: {flag}: {url} is a URL")


@pytest.mark.parametrize("what", [each for each in COMMANDS if each != "compare --out"])
def test_every_command_expands_the_home_folder(
    what: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is refused afterwards names the folder itself, or is of another argument; `~` is nowhere made."""
    seen: list[str] = []
    expand = local_path

    def spy(name: str, text: str, *, any_bytes: bool = False) -> str:
        seen.append(expand(name, text, any_bytes=any_bytes))
        return seen[-1]

    monkeypatch.setattr("experiment.options.command_line.local_path", spy)
    monkeypatch.setattr("experiment.commands.prepare.find_prepared", lambda name, data_dir: refuse(data_dir))
    _, argv = COMMANDS[what]
    refusal([each.replace("{}", "~/absent") for each in argv], capsys)
    assert any(path.startswith(f"{home}/absent") for path in seen)
    assert not any(path.startswith("~") for path in seen)


def refuse(path: str) -> NoReturn:
    raise UserError(path)


def test_train_expands_the_home_folder(home: Path) -> None:
    given = parse(["--run-dir=~/x", "--data-dir=~/data", "--init-from=~/w.safetensors"])
    expected = {"run_dir": f"{home}/x", "data_dir": f"{home}/data", "init_from": f"{home}/w.safetensors"}
    assert given == expected
    # In a recipe, in a study's file and in an older config.json, too
    assert resolve({"init_from": "~/w.safetensors"}).init_from == f"{home}/w.safetensors"
    assert resolve({}, {"init_from": "~/w.safetensors"}).init_from == f"{home}/w.safetensors"
    argv = ["--framework", "numpy", "--model", "cnn", "--steps", "0", "--no-report", "--run-dir=~/x"]
    assert train.main(argv) == 0
    assert (home / "x" / "summary.json").exists()
    assert not list(Path.cwd().iterdir())


def test_a_folder_that_is_called_like_the_home_folder_can_be_named() -> None:
    assert local_path("--run-dir", local_path("--run-dir", "./~")) == "./~"
    assert local_path("--run-dir", "a~b/~") == "a~b/~"


@pytest.mark.parametrize(("text", "words"), [("~nobody-of-that-name/x", "home folder of"), ("a\0b", "null")])
def test_what_is_no_path_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--run-dir: .*{words}"):
        local_path("--run-dir", text)


@pytest.mark.parametrize("what", [each for each in COMMANDS if each not in ANY_BYTES])
def test_a_name_that_is_not_utf8_is_refused_where_a_library_cannot_take_it(
    what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, argv = COMMANDS[what]
    line = refusal([each.replace("{}", BYTES) for each in argv], capsys)
    assert line.startswith(f"error: {name}: the name ")
    assert "is not UTF-8; rename it" in line


@pytest.mark.parametrize("flag", OPTIONS)
def test_a_name_that_is_not_utf8_is_refused_by_train(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not UTF-8; rename it" in refusal([flag, BYTES], capsys)


def test_an_image_whose_name_is_not_utf8_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    Image.new("L", (32, 32)).save(f"{BYTES}.png")
    assert main(["predict", f"{BYTES}.png", "--framework", "numpy"]) == 0
    assert capsys.readouterr().out.startswith("caf\\udce9.png\n")


PREDICT = {
    "a missing image": (["digit.png"], "digit.png: not found"),
    "a missing image beside a run": (["run", "digit.png"], "digit.png: not found"),
    "a folder without an image": (["my images"], "my images/1.png: no image that Pillow reads"),
    "an empty folder": (["empty"], "empty: is a folder without files; name image files"),
    "an empty folder beside a run": (["run", "empty"], "empty: is a folder without files"),
    "a pattern": (["run", "*.png"], "*.png: no file matches this pattern"),
    "a run alone": (["run"], "IMAGE: name image files after the run run"),
    "no run": (["my images", "my images/1.png"], "my images: is not the folder of a run"),
}


def test_a_study_named_as_a_run_is_refused_with_the_way_to_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 2
    words = f"error: {tmp_path}: is the folder of a study; name runs in it: {tmp_path}/runs/*/*\n"
    assert capsys.readouterr().err == words


def test_the_usage_of_predict_is_what_a_user_types(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "--help"])
    assert capsys.readouterr().out.startswith(
        "usage: python -m experiment predict [options] IMAGE ...\n"
        "       python -m experiment predict [options] RUN IMAGE ...\n"
    )


@pytest.mark.parametrize("what", PREDICT)
def test_predict_says_what_is_wrong_with_its_arguments(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in ("run/config.json", "my images/1.png"):
        Path(path).parent.mkdir()
        Path(path).write_text("{}")
    Path("empty").mkdir()
    argv, words = PREDICT[what]
    assert main(["predict", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"error: {words}")


def test_without_a_home_folder_a_data_set_needs_a_data_dir(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container whose user has no entry in the passwd file."""

    import tensorflow_datasets as tfds

    def unknown(*_: object) -> NoReturn:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    # What TFDS makes of it when it is imported there
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", os.path.expanduser("~/tensorflow_datasets"))
    line = refusal(["--dataset", "mnist", "--framework", "numpy"], capsys)
    assert "--data-dir: the home folder of ~" in line


def test_output_redirected_into_the_run_folder_is_no_circle(capsys: pytest.CaptureFixture[str]) -> None:
    """`mkdir X; python train.py --run-dir X > X/log.out`: --resume is not proposed, nor to leave it out."""
    folder = Path.cwd().parent / "X"
    folder.mkdir()
    (folder / "log.out").write_text("")
    argv = ["--framework", "numpy", "--run-dir", str(folder)]
    line = refusal(argv, capsys)
    assert f"{folder} holds log.out and no run; name a folder that is empty or does not exist" in line
    assert "--resume" not in line
    line = refusal([*argv, "--resume"], capsys)
    assert "has no config.json); name another" in line
    assert "leave --resume out" not in line
    (folder / "log.out").unlink()
    (folder / "log.txt").write_text("")  # what a run killed at its start leaves
    check_fresh(folder)
    assert "leave --resume out" in refusal([*argv, "--resume"], capsys)
