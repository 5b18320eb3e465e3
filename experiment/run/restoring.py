"""Where a run starts: a fresh one at step 0, a resumed one at its newest whole checkpoint."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any

from experiment.engines import Engine
from experiment.errors import UserError, first_of
from experiment.files.arrays import differences
from experiment.files.metrics_log import NAME, parse, unchanged_start
from experiment.files.results import WEIGHTS
from experiment.files.run_folder import differing
from experiment.run.output import RunOutput
from experiment.run.schedules import ValidationHistory


@dataclasses.dataclass
class Start:
    """Where a run starts: a state, and the entries of run.json of its checkpoint."""

    state: Any
    step: int = 0
    history: dict[str, Any] = dataclasses.field(default_factory=dict)
    epoch_metrics: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    clock: dict[str, Any] = dataclasses.field(default_factory=dict)
    validation_due: bool = False  # a signal came before or during the validation of this step


def restore(
    engine: Engine,
    output: RunOutput,
    validations: ValidationHistory,
    total_steps: int,
    identity: Mapping[str, Any],
) -> Start | None:
    """Return the start of a resumed run: its newest checkpoint that is whole, or None if there is none yet.

    Args:
        engine: what trains.
        output: the folder of the run.
        validations: gets those that were made until then.
        total_steps: the last step.
        identity: what the run may not change, as `run_folder.identity` returns it.

    Raises:
        UserError: the checkpoint is of other options, of a newer version, of another model, optimizer or
            number of classes, it is beyond `total_steps`, or the metrics.jsonl it belongs to was changed.
            Nothing is written before these checks.
    """
    checkpoints, console, folder = output.checkpoints, output.console, output.folder
    newest = checkpoints.load_newest(console.report)
    if newest is None:
        checkpoints.remove_incomplete()
        console.report("no checkpoint yet: starting at step 0")
        return None
    step, tree, run = newest
    where = f"checkpoint {step} in {checkpoints.directory}"
    made_with = run.pop("identity", None)
    if name := differing(made_with, identity):
        old, new = (textwrap.shorten(str(values[name]), 60) for values in (made_with, identity))
        fault = f"{where} was made with {name} {old}, and config.json has {new}"
        raise UserError(f"--resume: {fault}; restore the config.json of that run")
    if unknown := sorted(run.keys() - {field.name for field in dataclasses.fields(Start)}):
        raise UserError(
            f"--resume: {where} has an unknown entry {unknown[0]!r}, of a newer version; use that version"
        )
    lines = differences(engine.to_tree(engine.init()), tree)
    if lines:
        raise UserError(
            f"--resume: {where} is of another model or optimizer: {first_of(lines, 3)}; name the run it "
            "belongs to"
        )
    totals = run.get("epoch_metrics")
    lengths = {len(totals[name]) for name in ("hits", "labels", "predictions")} if totals else set()
    if lengths - {identity["num_classes"]}:
        raise UserError(f"--resume: {where} counts other classes than config.json has; name another run")
    if step > total_steps:
        raise UserError(f"--steps: the run is at step {step}; give as many or more")
    validations.restore(parse(unchanged_start(folder / NAME, **run["history"]).splitlines()))
    checkpoints.remove_incomplete()
    if made_with is None:
        console.report(
            f"checkpoint {step} is of an older version and holds no options: those of config.json are taken"
        )
    start = Start(state=engine.from_tree(tree), step=step, **run)
    best_weights = folder / WEIGHTS["best"]
    if start.best is not None and not checkpoints.restore_best(best_weights, start.best["step"]):
        console.report(
            f"{best_weights}: the best weights so far, of step {start.best['step']}, are lost; "
            "the next better ones are written there"
        )
    console.report(f"resuming at step {step}")
    return start
