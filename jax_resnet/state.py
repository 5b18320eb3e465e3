"""The state of training: everything that a step changes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import optax

Arrays = dict[str, jax.Array]  # {torchvision name: array}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TrainState:
    """The result of one step and the input of the next.

    Attributes:
        params: all parameters, those that are not trained among them.
        batch_stats: the running statistics of batch norm.
        opt_state: optax's state, of the trained parameters.
        step: number of steps taken; shape (), int32.
        first_nonfinite_step: the first step, counted from 1, whose loss or gradient was not finite; -1 if
            there was none.
        ema: {"params", "batch_stats"}, the exponential moving averages of both; None in a run without.
    """

    params: Arrays
    batch_stats: Arrays
    opt_state: optax.OptState
    step: jax.Array
    first_nonfinite_step: jax.Array
    ema: dict[str, Arrays] | None = None
