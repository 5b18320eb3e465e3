"""What is printed where: streams that are closed, broken, of another encoding, or no terminals."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiment.__main__ import main
from experiment.run.console import Console, prepare_streams

ROOT = Path(__file__).parents[1]
BYTES = os.fsdecode(b"caf\xe9.png")  # a file name that is not UTF-8


class Broken(io.StringIO):
    """A stream whose reader or disk is gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


class Tee:
    """What notebooks and loggers put in the place of sys.stdout."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


STREAMS: dict[str, Any] = {
    "a pipe without a reader": Broken(BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "a full disk": Broken(OSError(errno.ENOSPC, "No space")),
    "a lost terminal": Broken(OSError(errno.EIO, "I/O error")),
    "closed": closed(),
    "without isatty": Tee(),
    "ascii": io.TextIOWrapper(io.BytesIO(), "ascii"),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_no_stream_ends_a_run_and_the_log_has_every_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    lines = Console(tmp_path / "log.txt", stream)
    lines.report("before")
    lines.start(0, 2, 4)
    lines.report(f"in é {BYTES}")
    lines.progress(2, 2, "1/1", 0.5, 0.5, 10.0)
    lines.fail("after")
    lines.close()
    log = [line.split(" ", 2)[2] for line in (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()]
    assert log[:2] == ["before", "in é caf\\udce9.png"]
    assert log[-1] == "after"


def test_output_redirected_into_the_log_is_there_once(tmp_path: Path) -> None:
    """`python train.py --run-dir X > X/log.txt`: two writers would write over each other."""
    with open(tmp_path / "log.txt", "w") as stream:
        lines = Console(tmp_path / "log.txt", stream)
        lines.report("one")
        lines.report("two")
        lines.close()
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["one", "two"]


def test_a_closed_standard_stream_becomes_the_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    prepare_streams()
    print("into nothing", flush=True)
    print("into nothing", file=sys.stderr, flush=True)
    assert sys.stdin.read() == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_of_another_encoding_gets_escapes(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding))
    prepare_streams()
    print(f"{BYTES} \N{GREEK SMALL LETTER PI}", flush=True)
    assert buffer.getvalue() == rb"caf\udce9.png \u03c0" + os.linesep.encode()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), MemoryError()])
def test_a_failure_of_the_system_in_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("experiment.__main__.importlib.import_module", fail)
    assert main(["report"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line in ("error: [Errno 28] No space left", "error: out of memory")


SHELL = {
    "closed": ("{} -m experiment --help >&-", 0),
    "all closed": ("{} -m experiment --help <&- >&- 2>&-", 0),
    "full": ("{} -m experiment --help > /dev/full", 1),
    "train.py closed": ("{} train.py --help >&-", 0),
    "train.py refused": ("{} train.py --steps -1 >&- 2>&-", 2),
}


@pytest.mark.parametrize("what", SHELL)
def test_a_shell_that_closes_or_cuts_the_output(what: str) -> None:
    command, status = SHELL[what]
    program = ["bash", "-c", command.format(sys.executable)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status
    assert done.stderr == ("error: [Errno 28] No space left on device\n" if what == "full" else "")


@pytest.mark.parametrize("argv", [["-m", "experiment"], ["train.py"]])
def test_a_reader_that_has_gone(argv: list[str]) -> None:
    """As `| head -1` after its line. The status depends on how much Python buffers, which Python 3.11.2 does
    less than 3.11.7: 0 if the whole output was written to the buffer, else 141."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, *argv, "--help"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False
    )
    os.close(write)
    assert done.returncode in (0, 128 + signal.SIGPIPE)
    assert done.stderr == ""
