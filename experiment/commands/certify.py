"""Compare exported files with the run they were made of, by the package `parity`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from experiment.data.loading import Data
from experiment.engines import Batch, Engine
from experiment.errors import first_of
from experiment.run.completed_run import CompletedRun

if TYPE_CHECKING:
    import parity.training

COUNT, STEPS = 8, 3
SPLITS: tuple[Literal["test", "val", "train"], ...] = ("test", "val", "train")

# Of the largest logit. Right programs differ by 1e-7 to 3e-6 in float32, in ResNet-101 the most.
TOLERANCES = {"float32": 1e-5, "float64": 1e-12}


@dataclass(frozen=True)
class Check:
    """One comparison of an exported file with the run.

    Attributes:
        file: its name.
        compared: what was compared, on which images.
        error: the largest difference, relative to the largest magnitude of the run's tensor.
        allowed: the limit.
        agrees: the verdict of `parity`.
        note: the first difference, or "".
    """

    file: str
    compared: str
    error: float
    allowed: float
    agrees: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "agrees" if self.agrees else f"DIFFERS: {self.note}"
        return f"{self.file}: {self.compared}: off by {self.error:.1e}, allowed {self.allowed:.1e}: {verdict}"


@dataclass(frozen=True)
class Images:
    """The images that are compared, uint8 [N, H, W, C] by name, and batches to train on.

    Attributes:
        sets: {"random": ..., "real": ...}; real ones only where the data set is at hand.
        batches: returns 1 + `STEPS` batches of a size and an image shape; random images if the run's data
            set is not at hand, or is evaluated in another shape.
        note: why there are no real images, or "".
    """

    sets: dict[str, np.ndarray]
    batches: Callable[[int, tuple[int, int, int]], Iterable[Batch]]
    note: str


class StepRunner(Protocol):
    """The exported training step with its state: see `jax_resnet/export.py`."""

    def take(self, batch: Batch, lr: float) -> dict[str, np.ndarray]:
        """Take a step; return loss, logits and the state after it, under the names of a checkpoint."""


def take_images(run: CompletedRun, data: Data | str) -> Images:
    """Draw random images, and take the first ones of the run's data set.

    Args:
        run: whose network is exported.
        data: the run's data set, or why it is not at hand.
    """
    rng = np.random.default_rng(0)
    sets = {"random": rng.integers(0, 256, (COUNT, *run.image_shape), np.uint8)}

    def random_batches(size: int, shape: tuple[int, int, int]) -> Iterator[Batch]:
        for _ in range(1 + STEPS):
            image = rng.integers(0, 256, (size, *shape), np.uint8)
            label = rng.integers(run.resolved["num_classes"], size=size, dtype=np.int32)
            yield {"image": image, "label": label}

    if isinstance(data, str):
        return Images(sets, random_batches, data)
    split = next(split for split in SPLITS if len(data.parts[split][1]))
    batch = next(iter(data.eval_batches(split, COUNT - 3)))  # another number than of the random ones
    sets["real"] = batch["image"]

    def real_batches(size: int, shape: tuple[int, int, int]) -> Iterator[Batch]:
        if shape != run.image_shape:
            yield from random_batches(size, shape)
            return
        first = next(iter(data.eval_batches("train", (1 + STEPS) * size)))
        for start in range(0, (1 + STEPS) * size, size):
            rows = np.arange(start, start + size) % len(first["label"])  # again from the first, if few
            yield {name: array[rows] for name, array in first.items()}

    return Images(sets, real_batches, "")


def normalized(run: CompletedRun, image: np.ndarray) -> np.ndarray:
    """Images uint8 [N, H, W, C] as the network takes them, (x / 255 - mean) / std, in float64."""
    pixels = image.astype(np.float64) / 255
    return np.asarray((pixels - np.asarray(run.resolved["mean"])) / np.asarray(run.resolved["std"]))


def logits(
    file: str,
    run: CompletedRun,
    images: Images,
    candidate: Callable[[np.ndarray], np.ndarray],
    *,
    precision: str,
) -> list[Check]:
    """Compare the logits of a file with those of the run's engine, on each set of images.

    Args:
        file: its name.
        run: the reference.
        images: what both get.
        candidate: images uint8 [N, H, W, C] to logits [N, num_classes], by the file.
        precision: in which the file computes.
    """
    import parity

    checks = []
    for name, image in images.sets.items():
        reference = {"logits": next(run.logits([image]))}
        report = parity.compare_tensors(reference, {"logits": candidate(image)}, TOLERANCES[precision])
        (tensor,) = report.tensors
        note = "" if report.first_difference is None else report.first_difference.distance
        compared = f"logits of {len(image)} {name} images"
        checks.append(Check(file, compared, tensor.error, tensor.allowed, report.agrees, note))
    return checks


def after_first_step(engine: Engine, tree: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """Return the state after an engine's first step, as a checkpoint has it.

    From here two right programs stay together. At the first step itself they need not: Adam divides each
    gradient by its own magnitude then, so that one that is nothing but rounding becomes a whole step.
    """
    after = _steps(engine, tree)(batch)
    return {name: value for name, value in after.items() if name in tree}


def training_step(
    file: str,
    engine: Engine,
    tree: Mapping[str, Any],
    candidate: StepRunner,
    batches: Sequence[Batch],
    compared: str,
) -> Check:
    """Compare steps with those of an engine: loss, logits, parameters, statistics, moments.

    Two right programs depart from step to step. So the limit is measured: `parity` compares with how far the
    engine itself departs if every weight is moved by a last bit.

    Args:
        file: its name.
        engine: the reference; its learning rate is that of step 0.
        tree: the state before the first step, as a checkpoint has it.
        candidate: the exported step, in that state.
        batches: one for each step.
        compared: what is compared, in words.
    """
    import parity

    lr = engine.learning_rate(0)
    report = parity.compare_training(
        _steps(engine, tree),
        lambda batch: candidate.take(batch, lr),
        batches,
        perturbed=_steps(engine, {**tree, "params": _moved(tree["params"])}),
    )
    error, allowed = max(report.errors, key=lambda pair: pair[0] / pair[1])
    return Check(file, compared, float(error), float(allowed), report.agrees, _first(report))


def _first(report: parity.training.TrainingReport) -> str:
    """Return the first difference in words, or ""."""
    first = report.first_difference
    if first is None:
        return "" if report.agrees else f"without a partner: {first_of(report.unmatched, 4, ', ')}"
    return f"{first.reference} at step {first.step}, where {first.noise:.1e} is noise"


def _steps(engine: Engine, tree: Mapping[str, Any]) -> Callable[[Batch], dict[str, Any]]:
    """Return a function that takes the next step of an engine, from a state."""
    state = engine.from_tree(dict(tree))

    def take(batch: Batch) -> dict[str, Any]:
        nonlocal state
        state, metrics = next(iter(engine.train(state, [batch])))
        return {"loss": metrics["loss"], "logits": metrics["logits"], **engine.to_tree(state)}

    return take


def _moved(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Move each number by a last bit, up or down at random."""
    rng = np.random.default_rng(1)
    moved = {}
    for name, array in params.items():
        towards = np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf)
        moved[name] = np.nextafter(array, towards.astype(array.dtype))
    return moved
