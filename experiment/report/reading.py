"""Read the folder of a run for a report, however much of it is there."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiment.errors import UserError
from experiment.files import metrics_log, predictions, results, run_folder, weights
from experiment.options.command_line import argv_of
from experiment.options.config import Config
from experiment.options.resolving import resolve
from experiment.program import command

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RunFiles:
    """The content of a run's folder.

    Attributes:
        folder: its path.
        config: its options.
        resolved: what followed from the options and the data.
        sessions: one entry per start or resume: versions, commit and device.
        lines: those of metrics.jsonl.
        summary: summary.json, or None before the run's end.
        predictions: of the test set, or None.
        kernel: the first convolution's, [out, in, KH, KW], in weights.safetensors, and its step.
        absent: a line for each absent or damaged file.
    """

    folder: Path
    config: Config
    resolved: dict[str, Any]
    sessions: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    summary: dict[str, Any] | None
    predictions: predictions.Predictions | None
    kernel: tuple[npt.NDArray[Any], int | None] | None = None
    absent: list[str] = field(default_factory=list)

    @property
    def damaged(self) -> list[str]:
        """Those lines of `absent` that are about damaged files."""
        return [line for line in self.absent if "damaged" in line or "cannot be read" in line]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def title(self) -> str:
        """The model, the data set and the optimizer, in a line."""
        return f"{self.config.model} on {self.config.dataset}, {self.config.optimizer}"

    @property
    def words(self) -> list[str]:
        """The command line that repeats the run, in words as a shell takes them."""
        return [*command("train").split(), *map(shlex.quote, argv_of(self.config))]

    @property
    def step(self) -> int:
        """The last step that is recorded."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def total_steps(self) -> int | None:
        """The step at which the run was to end."""
        total = self.resolved.get("total_steps")
        return total if isinstance(total, int) else None

    @property
    def steps_per_epoch(self) -> int | None:
        """Training batches an epoch."""
        steps = self.resolved.get("steps_per_epoch")
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def newest_session(self) -> dict[str, Any]:
        """The last start or resume; empty if none is recorded."""
        return self.sessions[-1] if self.sessions else {}

    @property
    def finished(self) -> bool:
        """True if it has come to its end, and was not continued after that."""
        return self.summary is not None

    @property
    def resumes(self) -> list[int]:
        """The steps at which it was continued."""
        steps = [session.get("step") for session in self.sessions[1:]]
        return [step for step in steps if isinstance(step, int)]

    def curve(self, split: str, scope: str, key: str) -> tuple[Floats, Floats]:
        """Return the steps and the values [n] of a number in the lines; NaN where it was not finite."""
        pairs = [
            (line["step"], np.nan if line[key] is None else line[key])
            for line in metrics_log.select(self.lines, split, scope)
            if key in line
        ]
        points = np.array(pairs, np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def gradient_norms(self) -> list[tuple[int, dict[str, float]]]:
        """The first, middle and last step with gradient norms: (step, {layer: norm}).

        Norms are of weights alone, in network order; NaN where a norm was not finite.
        """
        lines = [
            line for line in self.lines if any(name.startswith(metrics_log.GRADIENT_NORM) for name in line)
        ]
        picked = sorted({0, len(lines) // 2, len(lines) - 1} & set(range(len(lines))))
        return [(lines[index]["step"], _weight_norms(lines[index])) for index in picked]

    def last(self, split: str) -> dict[str, Any] | None:
        """The newest line of a split over a whole epoch or part."""
        return next(metrics_log.select(reversed(self.lines), split, "epoch"), None)

    @property
    def best(self) -> dict[str, Any] | None:
        """The line of the lowest validation loss."""
        return metrics_log.best(self.lines)


def _weight_norms(line: dict[str, Any]) -> dict[str, float]:
    """Return the norms of the gradients of convolutions and the head, {layer: norm}, in network order."""
    layers = {}
    for name, value in line.items():
        layer = name.removeprefix(metrics_log.GRADIENT_NORM).removesuffix(".weight")
        is_batch_norm = re.search(r"(^|\.)bn\d|downsample\.1", layer)
        if name == f"{metrics_log.GRADIENT_NORM}{layer}.weight" and not is_batch_norm:
            layers[layer] = np.nan if value is None else value

    def depth(layer: str) -> tuple[bool, list[int]]:  # conv1, layer1.0.conv1, ..., layer4.2.conv3, fc
        return layer == "fc", [int(number) for number in re.findall(r"\d+", layer)]

    return {layer: layers[layer] for layer in sorted(layers, key=depth)}


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run, finished or not; nothing in it is changed.

    Raises:
        UserError: it has no config.json, or one that is damaged. All else may be missing.
    """
    record = run_folder.read_named_record(folder)
    absent: list[str] = []
    lines = _read_lines(folder / metrics_log.NAME, absent)
    return RunFiles(
        folder=folder,
        config=resolve({}, record["config"]),
        resolved=record["resolved"],
        sessions=record["sessions"],
        lines=lines,
        summary=_read_summary(folder, lines, absent),
        predictions=_read_predictions(folder / predictions.FILE, absent),
        kernel=_read_kernel(folder / results.WEIGHTS["final"]),
        absent=absent,
    )


def _read_lines(path: Path, absent: list[str]) -> list[metrics_log.Line]:
    """Return the whole lines of metrics.jsonl; note in `absent` if others are left out."""
    if not path.is_file():
        absent.append("metrics.jsonl is absent: no step was taken, or the file was removed.")
    texts = metrics_log.raw_lines(path)
    lines = list(metrics_log.parse(texts))
    if len(lines) < len(texts):
        bad = f"{len(texts) - len(lines)} of the {len(texts)} lines"
        absent.append(f"{bad} of metrics.jsonl cannot be read and are left out.")
    return lines


def _read_summary(folder: Path, lines: list[metrics_log.Line], absent: list[str]) -> dict[str, Any] | None:
    """Read summary.json; one of another step than the last line's is that of an earlier end of the run."""
    try:
        summary = results.read_summary(folder)
    except UserError:
        absent.append("summary.json is damaged.")
        return None
    if summary is None and (folder / results.SUMMARY).is_file():
        step = run_folder.read_json(folder / results.SUMMARY)["steps"]
        absent.append(f"summary.json is of step {step:,}, and the run is at step {lines[-1]['step']:,}.")
    elif summary is None:
        absent.append("summary.json is absent: the run has not come to its end.")
    return summary


def _read_predictions(path: Path, absent: list[str]) -> predictions.Predictions | None:
    if not path.is_file():
        absent.append(
            f"{path.name} is absent: confusion matrix, classes, mistakes and samples need it, and a run "
            "writes it when it tests, at its end."
        )
        return None
    try:
        return predictions.load(path)
    except UserError:
        absent.append(f"{path.name} is damaged.")
        return None


def _read_kernel(path: Path) -> tuple[npt.NDArray[Any], int | None] | None:
    kernel = weights.first_kernel(path)
    return None if kernel is None else (kernel, weights.step_of(path))
