"""The step that each file of a run outside its checkpoints belongs to, so that outdated files are noticed.

After a run is continued past its end, or resumed from an older checkpoint, its weights, summary and
predictions no longer belong to its last step. They do again when the run has rewritten them.
"""

import textwrap
from pathlib import Path
from typing import Any

from experiment.errors import UserError
from experiment.files import metrics_log, run_folder, weights
from experiment.files.schema import Summary
from experiment.options.resolving import resolve

WEIGHTS = {"final": "weights.safetensors", "best": "weights-best.safetensors"}
SUMMARY = "summary.json"
PREDICTIONS = "predictions.npz"


def last_step(run_dir: Path) -> int | None:
    """Return the step of the last whole line of metrics.jsonl, or None if there is no such line."""
    newest = metrics_log.parse(reversed(metrics_log.raw_lines(run_dir / metrics_log.NAME)))
    return next((line["step"] for line in newest), None)


def best_step(run_dir: Path) -> int | None:
    """Return the step of the first lowest validation loss in metrics.jsonl, or None if there is no such line.

    The run takes its best weights from the same step.
    """
    line = metrics_log.best(metrics_log.read(run_dir / metrics_log.NAME))
    return line["step"] if line else None


def read_summary(run_dir: Path) -> dict[str, Any] | None:
    """Return what summary.json of a run holds, or None if the run is not at its end.

    A summary of another step than the last one in metrics.jsonl is that of an earlier end.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / SUMMARY
    if not path.is_file():
        return None
    summary: dict[str, Any] = run_folder.read_json(path, Summary)
    return summary if last_step(run_dir) in (None, summary["steps"]) else None


def is_complete(run_dir: Path) -> bool:
    """True if the run is at its end: summary.json is whole, and of the last step."""
    try:
        return read_summary(run_dir) is not None
    except UserError:
        return False


def check_weights(run_dir: Path, which: str) -> None:
    """Raise UserError if a file of weights is of another step than metrics.jsonl says.

    Args:
        run_dir: the folder of the run; without metrics.jsonl in it nothing is known.
        which: "final", the weights of the last step, or "best", those of the lowest validation loss.
    """
    path = run_dir / WEIGHTS[which]
    step = weights.step_of(path)
    expected = last_step(run_dir) if which == "final" else best_step(run_dir)
    if step is None or last_step(run_dir) is None or step == expected:
        return
    present = {
        "final": f"the run is at step {expected}; continue it to its end with --resume",
        "best": f"the best validation of the run is of step {expected}; continue it with --resume",
    }
    if expected is None:
        present["best"] = "the run has no validation yet; continue it with --resume"
    raise UserError(f"{path}: is of step {step}, and {present[which]}")


def check_identity(path: Path, record: dict[str, Any]) -> None:
    """Raise UserError if a file of weights was written by a run of other options or data than the record's.

    Args:
        path: the file of weights; older versions wrote no options into it, and then nothing is known.
        record: what config.json holds.
    """
    present = run_folder.identity(resolve({}, record["config"]), record["resolved"])
    made_with: Any = weights.record_of(path).get("identity")
    if name := run_folder.differing(made_with, present):
        old, new = (textwrap.shorten(str(values[name]), 60) for values in (made_with, present))
        raise UserError(
            f"{path}: was written by a run with {name} {old}, and config.json has {new}; restore the "
            "files of one run"
        )


def check_startable(run_dir: Path, record: dict[str, Any]) -> None:
    """Raise UserError if a run has no checkpoint to continue from, and step 0 would discard results.

    A run that was killed before its first checkpoint was complete discards nothing: it makes the same lines
    again. It may have recorded two checkpoint intervals, as saving goes on in the background.

    Args:
        run_dir: the folder of the run.
        record: what its config.json holds.
    """
    if run_folder.checkpoint_steps(run_dir / "checkpoints"):
        return
    interval = record["config"].get("checkpoint_every") or record["resolved"].get("steps_per_epoch")
    before_first = 2 * interval if isinstance(interval, int) else 0
    resumed = [session.get("step", 0) for session in record["sessions"] if isinstance(session, dict)]
    limits = {metrics_log.NAME: before_first, WEIGHTS["best"]: before_first}
    steps = {name: _step_of(run_dir / name) for name in (*limits, *WEIGHTS.values(), SUMMARY, PREDICTIONS)}
    steps["config.json"] = max(resumed, default=0)
    for name, step in steps.items():
        if step is None or step > limits.get(name, 0):
            of = "results" if step is None else f"results of step {step}"
            raise UserError(
                f"--resume: {run_dir} has {of} ({name}) but no checkpoint to continue from, and step 0 would "
                "overwrite them; restore its checkpoints, or start a fresh run in another --run-dir"
            )


def _step_of(path: Path) -> int | None:
    """Return the step that a file of a run belongs to: 0 without such a file, None if it does not say."""
    if not path.exists():
        return 0
    if path.name == metrics_log.NAME:
        return last_step(path.parent) or 0
    if path.name == SUMMARY:
        try:
            return int(run_folder.read_json(path, Summary)["steps"])
        except UserError:
            return None
    if path.name == PREDICTIONS:
        from experiment.files import predictions

        try:
            return predictions.load(path).step
        except UserError:
            return None
    return weights.step_of(path)
