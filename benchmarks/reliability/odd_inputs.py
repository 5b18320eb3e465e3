"""Give every command odd arguments and every reader odd files: one line, in bounded time and memory.

Each trial is a process with limits on memory and time, in a folder of its own. A trial goes wrong if it ends
with a traceback, with another status than 0, 1 or 2, after more than `SECONDS`; or if it refuses (status 2)
in other than one line, or leaves something behind.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.reliability.damaged_files import Tally, make_run

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS, MEMORY = 60, 6 << 30
VALUES = [
    *("", " ", "0", "-1", "nan", "inf", "1e999", "9" * 400, "1.5", "true", "x", "x" * 300, "é" * 200),
    *(
        "\n",
        "a\nb",
        "\x1b[31m",
        "\u202e",
        "<script>alert(1)</script>",
        "'; rm -rf /",
        "--",
        "-",
        "$HOME",
        "~",
    ),
    *(
        "~nobody/x",
        "/dev/null",
        "/dev/zero",
        "/proc/self/environ",
        "/",
        ".",
        "..",
        "../../..",
        "nothing",
        "file",
    ),
    *(
        "http://example.org/x",
        "hf://",
        "hf://a/b/c",
        "s3://bucket",
        "C:\\x",
        "run",
        "run/config.json",
        "99999",
    ),
]
COMMANDS: dict[str, list[str]] = {
    "train": [
        *("--model", "--dataset", "--data-dir", "--image-size", "--test-size", "--resize", "--randaugment"),
        *(
            "--optimizer",
            "--lr",
            "--beta1",
            "--milestones",
            "--init-from",
            "--epochs",
            "--batch-size",
            "--seed",
        ),
        *("--recipe", "--run-dir", "--checkpoint-every", "--framework", "--precision", "--train-subset"),
        *(
            "--val-fraction",
            "--drop-path",
            "--label-smoothing",
            "--clip-grad-norm",
            "--no-such-flag",
            "--resume",
        ),
    ],
    "evaluate": ["--framework", "--weights", "--ten-crop", "--scales", "--split", "--data-dir"],
    "predict": ["--top", "--out", "--batch-size", "--weights"],
    "report": ["--csv", "--out"],
    "compare": ["--out"],
    "convert": ["--key"],
    "export": ["--out", "--format"],
    "parity": ["--size", "--dtype", "--batch-size"],
    "study": ["--run-dir", "--framework", "--report-only", "--data-dir"],
    "prepare": ["--data-dir"],
    "verify": ["--json"],
}
QUICK = [
    "--model",
    "cnn",
    "--framework",
    "numpy",
    "--train-subset",
    "0.05",
    "--steps",
    "1",
    "--no-report",
    "--no-test",
]


def limit() -> None:
    """Limit the memory of the process that is about to start."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def try_command(folder: Path, argv: list[str]) -> str | None:
    """Run a command in a folder; return what went wrong, or None."""
    before = listing(folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    try:
        process = subprocess.run(
            [sys.executable, "-m", "experiment", *argv],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            preexec_fn=limit,
        )
    except subprocess.TimeoutExpired:
        return f"took more than {SECONDS} s"
    errors = [line for line in process.stderr.decode(errors="replace").splitlines() if line]
    if any(line.startswith("Traceback") for line in errors):
        return f"traceback: {errors[-1][:200]}"
    if process.returncode not in (0, 1, 2):
        return f"status {process.returncode}: {errors[-1:]}"
    if process.returncode == 2 and len(errors) != 1:
        return f"{len(errors)} lines on stderr: {errors[:2]}"
    if any("\x1b" in line for line in errors):
        return "control characters on stderr"
    if process.returncode == 2 and listing(folder) != before:
        return f"refused, and left {sorted(listing(folder) - before)} behind"
    return None


def listing(folder: Path) -> set[str]:
    """Return the names in a folder and below it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def command_lines(times: int, seed: int) -> Iterator[list[str]]:
    """Yield command lines: of each command in turn, with up to three odd values."""
    rng = random.Random(seed)
    names = list(COMMANDS)
    for trial in range(times):
        name = names[trial % len(names)]
        argv = [name, *(QUICK if name == "train" else [])]
        for _ in range(rng.randrange(1, 4)):
            if name == "train" or rng.random() < 0.5:
                argv.append(rng.choice(COMMANDS[name]))
            argv.append(rng.choice(VALUES).replace("\0", ""))
        yield argv


def odd_command_lines(folder: Path, times: int, seed: int) -> Tally:
    """Run the campaign of command lines in an empty folder."""
    make_run(folder / "run")
    (folder / "file").write_text("a file\n")
    tally = Tally()
    for argv in command_lines(times, seed):
        wrong = try_command(folder, argv)
        tally.counts[argv[0]] += 1
        if wrong:
            tally.wrong.append(f"{' '.join(map(repr, argv))}: {wrong}")
    return tally


def safetensors(header: object, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    """Return a safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG file that states a size, with any compressed data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npz(**arrays: Any) -> bytes:
    """Return an npz file."""
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def huge_npz() -> bytes:
    """Return an npz file whose header states an array of a terabyte."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        head = b"{'descr': '<i4', 'fortran_order': False, 'shape': (250000000000,), }"
        head += b" " * (63 - (len(head) + 10) % 64) + b"\n"
        archive.writestr("labels.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head)
    return file.getvalue()


TENSOR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
HOSTILE: dict[str, list[bytes]] = {
    "safetensors": [
        b"",
        b"\xff" * 8,
        safetensors({}, length=1 << 60),
        safetensors(b"[" * 50_000),
        safetensors({"a": {**TENSOR, "data_offsets": [0, 1 << 50]}}),
        safetensors({"a": {**TENSOR, "data_offsets": [16, 0]}}),
        safetensors({"a": {**TENSOR, "shape": [-4]}}),
        safetensors({"a": {**TENSOR, "shape": [1 << 62, 1 << 62]}}),
        safetensors({"a": {**TENSOR, "dtype": "Q7"}}),
        safetensors({"a" * 1_000_000: TENSOR}),
        safetensors({"<script>alert(1)</script>\n\x1b[31m": TENSOR}),
        safetensors({"conv1.weight": {**TENSOR, "dtype": "I32"}}),
        safetensors({"__metadata__": {"run": "[" * 50_000}, "a": TENSOR}),
        safetensors({"__metadata__": {"run": '{"step": -1, "sha256": 3}'}, "a": TENSOR}),
    ],
    "toml": [
        b"",
        b"\xff\xfe",
        b"seeds = " + b"[" * 5_000,
        b"seeds = [" + b"9" * 5_000 + b"]",
        b"seeds = [1]\n[base]\nmodel = 3\n[[optimizers]]\nname = 'adam'",
        b"seeds = [1]\n[base]\nsteps = -5\n[[optimizers]]\nname = 'adam'",
        b"seeds = [1]\n[[optimizers]]\nname = '../../x'",
        b"seeds = [1]\n[[optimizers]]\nname = '<b>'",
        b"seeds = 1979-05-27\n[[optimizers]]\nname = 'adam'",
        b"seeds = [1]\noptimizers = 3",
        b"seeds = [1]\n[base]\nlr = nan\n[[optimizers]]\nname = 'adam'",
        b"seeds = [1]\n[base]\nimage_size = '99999'\n[[optimizers]]\nname = 'adam'\ncandidates = [[]]",
    ],
    "png": [
        b"",
        b"GIF89a",
        b"\xff\xd8\xff\xe0" + b"\0" * 100,
        png(60_000, 60_000),
        png(12_000, 12_000, b"\0" * 1_000_000),
        png(0, 0),
        png(2**31 - 1, 1),
        png(100, 100, b"\0" * 10),
        b"<svg onload='alert(1)'/>",
        b"%PDF-1.4",
        b"II*\0\x08\0\0\0" + b"\xff" * 64,
        b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\0" * 20,
    ],
    "npz": [
        b"",
        b"PK\x03\x04",
        huge_npz(),
        npz(labels=np.zeros(3)),
        npz(step=np.array([{"a": 1}], object)),
        npz(step=np.array(-1), class_names=np.array(["<b>"]), labels=np.zeros((2, 2), np.int32)),
    ],
}
CONFIGS: list[Callable[[dict[str, Any]], object]] = [
    lambda c: c.clear(),
    lambda c: c.update(config=[]),
    lambda c: c["resolved"].update(num_classes=-1),
    lambda c: c["resolved"].update(num_classes=10**18),
    lambda c: c["resolved"].update(image_shape=[1 << 40, 1, 1]),
    lambda c: c["resolved"].update(image_shape="32"),
    lambda c: c["resolved"].update(class_names=["<script>alert(1)</script>"] * 10),
    lambda c: c["resolved"].update(mean=[1e400]),
    lambda c: c["resolved"].update(std=[0.0]),
    lambda c: c["resolved"].update(schedule_steps=2**70),
    lambda c: c["resolved"].update(optimizer_options={"b1": "x"}),
    lambda c: c["config"].update(batch_size="many"),
    lambda c: c["config"].update(batch_size=2**62),
    lambda c: c["config"].update(model="resnet\n<b>"),
    lambda c: c["config"].update(dataset="folder", data_dir="/dev/zero"),
    lambda c: c.update(sessions=[{"step": "x", "versions": 3}]),
]


def odd_files(folder: Path) -> Tally:
    """Run the campaign of files in an empty folder."""
    run = folder / "run"
    make_run(run)
    whole = {
        name: (run / name).read_bytes() for name in ("config.json", "predictions.npz", "weights.safetensors")
    }
    tally = Tally()

    def tried(kind: str, number: int, commands: list[list[str]]) -> None:
        tally.counts[kind] += 1
        for argv in commands:
            if wrong := try_command(folder, argv):
                tally.wrong.append(f"{kind} {number}, {argv[0]}: {wrong}")

    for kind, contents in HOSTILE.items():
        for number, content in enumerate(contents):
            path = folder / f"odd.{kind}"
            path.write_bytes(content)
            if kind == "safetensors":
                init = ["train", *QUICK, "--init-from", path.name, "--run-dir", "new"]
                tried(kind, number, [["verify", path.name], init, ["convert", path.name, "new.pth"]])
            elif kind == "toml":
                tried(kind, number, [["study", path.name, "--run-dir", "new"]])
            elif kind == "png":
                tried(kind, number, [["predict", path.name]])
            else:
                (run / "predictions.npz").write_bytes(content)
                tried(kind, number, [["verify", "run"], ["report", "run"]])
                (run / "predictions.npz").write_bytes(whole["predictions.npz"])
    for number, change in enumerate(CONFIGS):
        record = json.loads(whole["config.json"])
        change(record)
        (run / "config.json").write_text(json.dumps(record))
        resume = ["train", "--resume", "--run-dir", "run", "--steps", "9"]
        tried("config", number, [["verify", "run"], ["report", "run"], ["evaluate", "run"], resume])
        (run / "config.json").write_bytes(whole["config.json"])
    return tally
