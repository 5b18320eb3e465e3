"""What is wrong with the files of a run, of a checkpoint, or with weights; nothing is changed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import UserError, one_line
from experiment.files import metrics_log, predictions, results, run_folder, weights
from experiment.files.arrays import Tree
from experiment.files.checkpoints import CheckpointError, Checkpoints
from experiment.files.identify import identify
from experiment.options.resolving import resolve
from experiment.reading import read_bytes

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Finding:
    """One file or checkpoint that was verified.

    Attributes:
        path: it.
        kind: "run", "checkpoint", "weights", "metrics", "summary", "predictions" or "report".
        problems: a line for each thing that is wrong; empty if it is sound.
        notes: what could not be verified, as the file of an older version has no hash.
    """

    path: Path
    kind: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify_weights(path: Path, record: dict[str, Any] | None = None) -> tuple[Finding, Shapes]:
    """Verify a safetensors file: its hash, its values, its network and, with a run's record, its options.

    Returns:
        The finding, and the shapes of the tensors that were read.
    """
    finding, shapes = Finding(path, "weights"), Shapes()
    try:
        tensors = weights.load(path)
        shapes |= {name: array.shape for name, array in tensors.items()}
        weights.check(path, tensors)
        if record is None:
            names = weights.network_names(shapes)
            identify({name: shapes[original] for name, original in names.items()})
        else:
            _check_network(shapes, record)
            results.check_identity(path, record)
    except UserError as error:
        finding.problems.append(_without(path, error))
    written = weights.record_of(path)
    if record is not None and not written:
        finding.problems.append("it has no record of a run")
    elif weights.HASH not in written:
        finding.notes.append("it has no hash of its content: flipped bits cannot be noticed")
    return finding, shapes


def verify_checkpoint(
    folder: Path, record: dict[str, Any] | None = None, log: Path | None = None
) -> tuple[Finding, Shapes]:
    """Verify a checkpoint: sums, values, step; with a run's record and metrics.jsonl, also that they fit.

    Returns:
        The finding, and the shapes of the network's tensors.
    """
    finding, shapes = Finding(folder, "checkpoint"), Shapes()
    try:
        step = int(folder.name)
        tree, run = Checkpoints(folder.parent, 1, writes=False).load(step)
    except ValueError:
        finding.problems.append("its folder is not named by the step; give it that name")
        return finding, shapes
    except CheckpointError as error:
        finding.problems.append(str(error))
        return finding, shapes
    try:
        tensors = weights.from_tree(tree)
        shapes |= {name: array.shape for name, array in tensors.items()}
        if record is not None:
            _check_network(shapes, record)
            _check_options(run.get("identity"), record)
        if log is not None:
            metrics_log.unchanged_start(log, **run["history"])
    except (UserError, KeyError, TypeError) as error:
        finding.problems.append(one_line(error))
    finding.problems += _faults(tree)
    return finding, shapes


def verify_run(run_dir: Path) -> Iterator[Finding]:
    """Verify the folder of a run: every file that the run wrote, but for its report and its log."""
    run = Finding(run_dir / "config.json", "run")
    record: dict[str, Any] | None = None
    try:
        record = run_folder.read_named_record(run_dir)
        resolve({}, record["config"])
    except UserError as error:
        run.problems.append(_without(run.path, error))
    yield run
    log = run_dir / metrics_log.NAME
    metrics = _verify_metrics(log)
    if metrics is not None:
        yield metrics
    shapes: dict[Path, Shapes] = {}
    for step in run_folder.checkpoint_steps(run_dir / "checkpoints"):
        folder = run_dir / "checkpoints" / str(step)
        finding, shapes[folder] = verify_checkpoint(folder, record, log)
        if not folder.exists():  # the run goes on, and has removed it meanwhile
            del shapes[folder]
            continue
        yield _like_the_others(finding, shapes)
    named = [run_dir / name for name in results.WEIGHTS.values()]
    if results.is_complete(run_dir) and not named[0].exists():
        absent = Finding(named[0], "weights")
        # A run that is published may leave out weights and checkpoints
        lines = absent.problems if (run_dir / "checkpoints").exists() else absent.notes
        lines.append("it is absent, and the run is at its end")
        yield absent
    for path in [*named, *sorted((run_dir / "checkpoints").glob("weights-best-*.safetensors"))]:
        if path.exists():
            finding, shapes[path] = verify_weights(path, record)
            which = next((which for which, name in results.WEIGHTS.items() if path == run_dir / name), None)
            if which is not None:
                _check_step(finding, run_dir, which)
            yield _like_the_others(finding, shapes)
    yield from _verify_results(run_dir)


def _verify_metrics(path: Path) -> Finding | None:
    if not path.exists():
        return None
    finding = Finding(path, "metrics")
    try:
        texts = read_bytes(path).splitlines()
    except OSError as error:
        finding.problems.append(f"it cannot be read ({error.strerror}); restore the file")
        return finding
    bad = [number for number, text in enumerate(texts, 1) if not list(metrics_log.parse([text]))]
    if bad == [len(texts)]:
        finding.notes.append("its last line is not whole: the run goes on, or was killed")
    elif bad:
        finding.problems.append(f"line {bad[0]} is not what a run writes")
    steps = [line["step"] for line in metrics_log.parse(texts)]
    if steps != sorted(steps):
        finding.problems.append("its steps do not ascend")
    return finding


def _verify_results(run_dir: Path) -> Iterator[Finding]:
    """Verify summary.json and predictions.npz, against metrics.jsonl and against each other."""
    try:
        lines = list(metrics_log.read(run_dir / metrics_log.NAME, "test"))
    except OSError:  # which is in the finding on that file
        lines = []
    last = lines[-1] if lines else None
    tested: dict[str, Any] | None = None
    path = run_dir / results.SUMMARY
    if path.exists():
        finding = Finding(path, "summary")
        try:
            summary = results.read_summary(run_dir)
            if summary is None:
                finding.notes.append("it is of an earlier end of the run, which was continued")
            else:
                tested = summary.get("test")
                line = {name: last[name] for name in tested or {} if last and name in last}
                if tested and line != tested:
                    finding.problems.append("its test results are not those in metrics.jsonl")
        except UserError as error:
            finding.problems.append(_without(path, error))
        yield finding
    path = run_dir / results.PREDICTIONS
    if path.exists():
        finding = Finding(path, "predictions")
        try:
            found = predictions.load(path)
            accuracy = float((found.labels == found.predictions).mean())
            if tested and tested.get("accuracy") is not None and abs(accuracy - tested["accuracy"]) > 1e-12:
                finding.problems.append(
                    f"they give accuracy {accuracy:.6f}, and summary.json has {tested['accuracy']:.6f}"
                )
        except UserError as error:
            finding.problems.append(_without(path, error))
        yield finding


def _check_network(shapes: Mapping[str, tuple[int, ...]], record: dict[str, Any]) -> None:
    """Raise UserError if tensors are not of the network of a run."""
    config, resolved = record["config"], record["resolved"]
    network = identify(shapes, config.get("model"))
    expected = {"classes": resolved.get("num_classes"), "channels": resolved.get("image_shape", [0, 0, 0])[2]}
    for words, present in (("classes", network.num_classes), ("channels", network.in_channels)):
        if expected[words] and present != expected[words]:
            raise UserError(f"it is of {present} {words}, and config.json has {expected[words]}")


def _check_options(made_with: Any, record: dict[str, Any]) -> None:
    present = run_folder.identity(resolve({}, record["config"]), record["resolved"])
    if name := run_folder.differing(made_with, present):
        raise UserError(f"it was made with another {name} than config.json has")


def _faults(tree: Tree, prefix: str = "") -> list[str]:
    """Return a line for each array of a checkpoint tree with values that are not finite."""
    lines = []
    for name, value in tree.items():
        if isinstance(value, dict):
            lines += _faults(value, f"{prefix}{name}/")
        elif np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
            lines.append(f"{prefix}{name} has values that are NaN or infinite")
        elif problem := weights.fault(name, np.asarray(value)):
            lines.append(f"{prefix}{problem}")
    return lines


def _like_the_others(finding: Finding, shapes: dict[Path, Shapes]) -> Finding:
    """Add a problem if the last of some files has tensors of other names or shapes than the first."""
    (first, expected), (_, present) = next(iter(shapes.items())), list(shapes.items())[-1]
    if present and expected and present != expected:
        names = sorted(name for name in present.keys() | expected if present.get(name) != expected.get(name))
        finding.problems.append(f"{names[0]} is another than in {first}")
    return finding


def _check_step(finding: Finding, run_dir: Path, which: str) -> None:
    """Note weights of another step than metrics.jsonl says; of a completed run that is a problem."""
    try:
        results.check_weights(run_dir, which)
    except UserError as error:
        lines = finding.problems if results.is_complete(run_dir) else finding.notes
        lines.append(_without(finding.path, error))


def _without(path: Path, error: UserError) -> str:
    """Return a message without the name of the file, which the finding has."""
    return one_line(str(error).removeprefix(f"{path}: "))
