"""What all optimizers of the NumPy engine share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np

from numpy_ref.layers import Array, Parameter
from numpy_ref.parallel import omp_threads

TILE = 1 << 17  # numbers: five arrays of so many about fill a second-level cache
_threads = omp_threads() or os.cpu_count() or 1
_pool = ThreadPoolExecutor(_threads)

RANGES: dict[str, tuple[str, float, float]] = {  # what it must be, at least, less than
    **dict.fromkeys(("b1", "b2"), ("in [0, 1)", 0, 1)),
    **dict.fromkeys(("lr", "eps", "momentum", "weight_decay"), ("finite and not negative", 0, math.inf)),
    **dict.fromkeys(("final_lr", "base_lr", "gamma"), ("finite and positive", math.ulp(0), math.inf)),
}


def check_hyperparameters(**values: float) -> None:
    """Raise a ValueError that names the first value out of its range."""
    for name, value in values.items():
        requirement, least, limit = RANGES[name]
        if not least <= value < limit:
            raise ValueError(f"{name} must be {requirement}, got {value}")


class Optimizer:
    """Parameters, a count of steps, and moments in the parameters' shapes.

    Args:
        parameters: what to train; those with `trainable` False are passed over.
        lr: the learning rate; may be set anew before every step.
        weight_decay: the L2 penalty, added to the gradient of all parameters, as in PyTorch; in the
            optimizers whose names end in W, decoupled from the gradient and scaled by the learning rate.

    Raises:
        ValueError: if an argument is out of its range.

    Attributes:
        count: the number of steps made.
        moments: {field: [array for each parameter]}.
        fields: the names of the moments, those of the checkpoint tree.
        counts: whether `count` matters, and is part of the state.
    """

    fields: ClassVar[tuple[str, ...]] = ("mu", "nu")
    counts: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False

    def __init__(self, parameters: Iterable[Parameter], lr: float, *, weight_decay: float = 0.0) -> None:
        check_hyperparameters(lr=lr, weight_decay=weight_decay)
        self.parameters = list(parameters)
        self.lr, self.weight_decay, self.count = lr, weight_decay, 0
        self.moments = {
            name: [np.zeros(p.value.shape, p.value.dtype) for p in self.parameters] for name in self.fields
        }

    def zero_grad(self) -> None:
        """Start the sum of gradients anew."""
        for parameter in self.parameters:
            parameter.zero_grad()

    def step(self) -> Array:
        """Change all parameters by their gradients; what it returns is that of `change`."""
        self.begin()
        return self.change(range(len(self.parameters)))

    def begin(self) -> None:
        """Begin the next step; then every parameter is changed once."""
        self.count += 1
        self.prepare()

    def change(
        self,
        which: Iterable[int],
        gradients: Sequence[Sequence[Array]] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> Array:
        """Change some of the parameters by their gradients.

        Every number is on its own, so the arrays are walked through in tiles, which stay in the cache through
        all the operations of an update; each tile by some thread, since NumPy lets go of Python's lock.

        Args:
            which: the indices of the parameters.
            gradients: for each part of the batch, the gradient of every parameter; they are added up. By
                default the parameters' own.
            share: (i, n): only every n-th tile, from the i-th on; the others are somebody else's.

        Returns:
            float64 [4]: the sums of the squares of the gradients, without decay, and of the changes; and how
            many step sizes were clipped to a lower and to an upper bound (AdaBound and its kin).
        """
        tiles = []
        for index in which:
            parameter = self.parameters[index]
            if parameter.trainable:
                own = [parameter.grad] if gradients is None else [part[index] for part in gradients]
                arrays = [parameter.value, *(self.moments[name][index] for name in self.fields)]
                flat = [a.reshape(-1) for a in (*own, *arrays)]
                tiles += [[a[i : i + TILE] for a in flat] for i in range(0, flat[0].size, TILE)]
        tiles = tiles[share[0] :: share[1]]
        parts = 1 if gradients is None else len(gradients)
        work = [tiles[thread::_threads] for thread in range(_threads)]
        if _threads == 1:
            return self._step_tiles(work[0], parts)
        return np.asarray(sum(_pool.map(lambda each: self._step_tiles(each, parts), work)))

    @np.errstate(all="ignore")  # the norms tell; threads do not have what their caller has set
    def _step_tiles(self, tiles: Sequence[Sequence[Array]], parts: int) -> Array:
        sums = np.zeros(4)
        if not tiles:
            return sums
        scratch = np.empty((2, TILE), tiles[0][0].dtype)
        for arrays in tiles:
            (grad, *others), (value, *moments) = arrays[:parts], arrays[parts:]
            change, total = scratch[:, : len(value)]
            for other in others:
                grad = np.add(grad, other, out=total)
            sums[0] += grad @ grad
            if self.weight_decay and not self.decoupled:
                grad = grad + self.weight_decay * value
            held = self.update(grad, moments, change)
            if held:
                sums[2:] += held
            if self.weight_decay and self.decoupled:
                change += self.lr * self.weight_decay * value
            value -= change
            sums[1] += change @ change
        return sums

    def prepare(self) -> None:
        """Work out what is the same for every number in step `count`."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval of the step sizes in step `count`, or None if they have no bounds."""
        return None

    def update(self, grad: Array, moments: Sequence[Array], change: Array) -> tuple[int, int] | None:
        """Advance the moments in place, and write what is to be subtracted from the value into `change`.

        Returns how many step sizes were clipped to the lower bound and to the upper, or None.
        """
        raise NotImplementedError


def update_moments(grad: Array, mu: Array, nu: Array, b1: float, b2: float, scratch: Array) -> None:
    """The next exponential averages of gradients and of their squares, in place.

    mu_t = b1 mu_(t-1) + (1 - b1) g_t,   nu_t = b2 nu_(t-1) + (1 - b2) g_t^2
    """
    mu *= b1
    mu += np.multiply(grad, 1 - b1, out=scratch)
    nu *= b2
    np.multiply(grad, grad, out=scratch)
    scratch *= 1 - b2
    nu += scratch
