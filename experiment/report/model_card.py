"""The model card of an export, in Markdown: where the network comes from, its accuracy, what was compared."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from experiment.files import results, run_folder, weights
from experiment.options.command_line import argv_of
from experiment.options.config import Config
from experiment.program import SCRIPT
from experiment.report.reading import RunFiles, read_run

KINDS = ("onnx", "pth", "network", "weights", "step", "state")
PACKAGES = ("jax", "jaxlib", "numpy", "onnx", "onnxruntime", "torch")
MOST_CLASSES = 100
"""Names of more classes are not listed."""


@dataclass(frozen=True)
class ExportedFile:
    """One file of an export.

    Attributes:
        name: in its folder.
        kind: one of `KINDS`.
        leaves: of a training step: (name, shape, type) of each array of its state, in JAX's order.
        batch_size: of a training step.
    """

    name: str
    kind: str
    leaves: Sequence[tuple[str, tuple[int, ...], str]] = ()
    batch_size: int = 0


class Verdict(Protocol):
    """A comparison with the run: `experiment.commands.certify.Check`."""

    @property
    def file(self) -> str: ...
    @property
    def compared(self) -> str: ...
    @property
    def error(self) -> float: ...
    @property
    def allowed(self) -> float: ...
    @property
    def agrees(self) -> bool: ...


def model_card(
    run_dir: Path,
    which: str,
    config: Config,
    image_shape: tuple[int, int, int],
    files: Sequence[ExportedFile],
    checks: Sequence[Verdict],
    no_images: str,
    folder: Path,
) -> str:
    """Return the card.

    Args:
        run_dir: the folder of the run.
        which: which of its weights were exported, "final" or "best".
        config: the options with which it was opened.
        image_shape: height, width and channels of the images that it is evaluated on.
        files: that were written.
        checks: their comparisons with the run.
        no_images: why there were no real images, or "".
        folder: where the files are.
    """
    import jinja2

    run = read_run(run_dir)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    first = run.sessions[0] if run.sessions else {}
    return environment.get_template("model_card.md").render(
        run=run,
        config=config,
        resolved={**dict.fromkeys(run_folder.RESOLVED), **run.resolved},  # older runs lack some
        trained_in=run.config.precision,
        image=image_shape,
        trained_image=run.resolved["image_shape"],
        weights_name=results.WEIGHTS[which],
        weights_sha256=run_folder.file_sha256(run_dir / results.WEIGHTS[which]),
        step=weights.step_of(run_dir / results.WEIGHTS[which]),
        accuracy=_accuracy(run, which),
        tested=run.summary is not None and which == "final" and "test" in run.summary,
        parameters=_parameters(run_dir / results.WEIGHTS[which]),
        classes=None if len(run.resolved["class_names"]) > MOST_CLASSES else run.resolved["class_names"],
        command=" ".join(["python train.py", *_flags(run.config)]),
        files=[
            {
                **dataclasses.asdict(file),
                "bytes": (folder / file.name).stat().st_size,
                "sha256": run_folder.file_sha256(folder / file.name),
            }
            for file in files
        ],
        kinds={**dict.fromkeys(KINDS), **{file.kind: file for file in files}},
        checks=checks,
        no_images=" ".join(no_images.split()),
        resize=min(config.resize, default=None),
        trained_with=first,
        exported_with={"python": platform.python_version(), **_versions()},
        commit=run_folder.git_commit(),
        date=time.strftime("%Y-%m-%d"),
        program=SCRIPT,
    )


def cell(text: Any) -> str:
    """Text in a cell of a Markdown table, on one line, with nothing in it read as Markdown."""
    line = " ".join(str(text).split())
    return "".join(f"\\{character}" if character in "\\|`*_<>[]" else character for character in line)


def _accuracy(run: RunFiles, which: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (part of the data, metrics) of the exported weights, as the run measured them."""
    validation = run.best if which == "best" else run.last("val")
    rows = [] if validation is None else [("validation", validation)]
    if which == "final" and run.summary is not None and run.summary.get("test"):
        rows.append(("test", run.summary["test"]))
    return [(name, row) for name, row in rows if row.get("loss") is not None]


def _parameters(path: Path) -> int:
    """Count the numbers in a file of weights, without running statistics."""
    return sum(array.size for name, array in weights.load(path).items() if ".running_" not in name)


def _flags(config: Config) -> list[str]:
    """Return the flags that repeat the run, without the paths of the machine it ran on."""
    hidden: dict[str, Any] = {}
    if config.data_dir is not None:
        hidden["data_dir"] = "DIR"
    if config.init_from is not None and "://" not in config.init_from:
        hidden["init_from"] = Path(config.init_from).name
    return argv_of(dataclasses.replace(config, **hidden))


def _versions() -> dict[str, str]:
    """Return the versions of the packages that an export uses and that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
