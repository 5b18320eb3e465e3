"""What a case is, and the numbers that it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from experiment.data.drop_path import DropPath
from experiment.run.schedules import make_schedule
from tests.helpers.comparing import random_state

Inputs = dict[str, np.ndarray]
"""`x` and `target`, or what an optimizer or a trajectory needs; `state/NAME`: parameters and statistics;
`keep`: the factors of residual branches, [N, blocks]."""

Results = dict[str, np.ndarray]
"""The outputs by their names (`y`, or a network's stages), `loss`, `dx`, `grad.NAME`, `after.NAME`; or what
an optimizer or a trajectory leaves."""

CLASSES = 5
# Of an optimizer's parameters. The last ones are batch norm's.
SHAPES = {"weight": (7, 5), "bias": (5,), "kernel": (3, 3, 2, 4), "bn1.weight": (4,), "bn1.bias": (4,)}


@dataclass(frozen=True)
class Case:
    """Something that all engines compute.

    Attributes:
        name: what it is called in tests, messages and dumps.
        kind: a layer ("conv", "batch_norm", ...), "loss", "stage", "network", "optimizer" or "trajectory".
        shape: of the input, [N, H, W, C] or [N, C].
        options: by the names of PyTorch, or those of the builder of a network.
        train: PyTorch's train mode.
        precision: "float64", "float32" or, in JAX alone, "bfloat16".
        values: the kind of numbers in x; see `VALUES`.
        seed: of the inputs.
        drop_path: stochastic depth of a network: the rate of its last block.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True
    precision: str = "float64"
    values: str = "normal"
    seed: int = 0
    drop_path: float = 0.0

    @property
    def input_precision(self) -> str:
        """NumPy has no bfloat16: JAX takes float32 and rounds it."""
        return "float32" if self.precision == "bfloat16" else self.precision


def _with_zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = 10 * rng.normal(size=shape)
    x[0] = 0
    return x


VALUES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "shifted": lambda rng, shape: (
        3 + 2 * rng.normal(size=shape)
    ),  # a mean to take away, a deviation to divide by
    "ties": lambda rng, shape: rng.integers(-1, 1, size=shape),  # most windows have several maxima
    "equal": lambda rng, shape: np.zeros(shape),
    "negative": lambda rng, shape: -1 - np.abs(rng.normal(size=shape)),  # padding with zeros would win
    "large": lambda rng, shape: 1000 * rng.normal(size=shape),  # exp of them overflows
    "with zeros": _with_zeros,  # the kink of ReLU
}


def group(inputs: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays under `prefix/`, by the rest of their names."""
    return {k.removeprefix(f"{prefix}/"): v for k, v in inputs.items() if k.startswith(f"{prefix}/")}


def make_inputs(case: Case) -> Inputs:
    """The numbers of a case, from its seed."""
    rng = np.random.default_rng((case.seed, 1))  # not the stream of the weights
    if case.kind == "optimizer":
        return _optimizer_inputs(rng, case)
    from tests.parity import torch_side  # which needs what stands above

    shapes, output = torch_side.shapes(case)
    state = {f"state/{name}": array for name, array in random_state(shapes, case.seed).items()}
    if case.kind == "trajectory":
        return {**state, **_trajectory_inputs(rng, case), **_keep(case)}
    label = case.kind in ("loss", "network")
    x = VALUES[case.values](rng, case.shape)
    target = rng.integers(output[-1], size=output[0]) if label else rng.normal(size=output)
    arrays = {"x": x, **({} if label else {"target": target}), **state}
    cast = {name: array.astype(case.input_precision) for name, array in arrays.items()}
    return {**cast, **({"target": target.astype(np.int32)} if label else {}), **_keep(case)}


def _keep(case: Case) -> Inputs:
    """The factors of the branches of each example, from the project's draws; of a trajectory each step's."""
    if not case.drop_path:
        return {}
    from tests.parity import torch_side

    network: Any = torch_side.build(case)
    drop_path = DropPath(case.drop_path, network.num_blocks, case.seed)
    examples = np.arange(case.shape[0])
    if case.kind == "network":
        return {"keep": drop_path.factors(examples, 0)}
    return {"keep": np.stack([drop_path.factors(examples, step) for step in range(case.options["steps"])])}


def _optimizer_inputs(rng: np.random.Generator, case: Case) -> Inputs:
    """Gradients whose sizes differ by orders and fade, some of them 0; rates from the project's schedules."""
    schedule = dict(case.options["schedule"])
    (steps,) = case.shape
    rate = make_schedule(schedule.pop("name"), case.options["learning_rate"], length=steps, **schedule)
    fading = 0.05 + np.exp(-np.arange(steps) / (steps / 7))
    inputs = {"rates": np.array([rate(step) for step in range(steps)])}
    for name, shape in SHAPES.items():
        size = (steps, *shape)
        noise = (0.3 + rng.normal(size=size)) * (rng.random(size) > 0.1)
        sizes = 10.0 ** rng.uniform(-5, 1.5, size=shape)
        inputs[f"state/{name}"] = rng.normal(size=shape)
        inputs[f"gradients/{name}"] = sizes * noise * fading.reshape(-1, *[1] * len(shape))
    return inputs


def _trajectory_inputs(rng: np.random.Generator, case: Case) -> Inputs:
    """A few batches, repeated, and a different learning rate for every step."""
    batches, steps = 8, case.options["steps"]
    falling = 0.6 + 0.4 * np.cos(np.linspace(0, math.pi, steps))
    return {
        "images": rng.normal(size=(batches, *case.shape)),
        "labels": rng.integers(CLASSES, size=(batches, case.shape[0])).astype(np.int32),
        "rates": case.options["learning_rate"] * falling,
    }
