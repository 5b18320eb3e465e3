"""The training step and the evaluation of one process, on its part of a batch.

With one process the part is the whole batch. With more, each has the same network (`replica.py`) and calls
these functions at the same time; the sums over all parts are the only thing they exchange (`parallel.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from numpy_ref.layers import Array, Layer, no_grad
from numpy_ref.parallel import Communicator, SharedMemory, Worker
from numpy_ref.replica import Replica, Setup

Metrics = dict[str, Any]


def train_step(
    replica: Replica,
    batch: Mapping[str, Array],
    batch_size: int,
    lr: float,
    step: int,
) -> Metrics:
    """Take one step of gradient descent: forward, loss, backward, update.

    A group of layers is updated as soon as backward is done with it, and the gradients of the next group
    take the same memory: all gradients at once would be a second network in every process. Clipping needs
    the norm of all gradients first: with it, there is one group, which backward completes at its end.

    Args:
        replica: the network and the optimizer; they change in place.
        batch: this process's part of the batch: {"image": [n, H, W, C], "label": int [n]}; for mixed images
            also "label2" and "lam" [n]; with stochastic depth also "drop_path" [n, blocks], the factors of
            the residual branches.
        batch_size: the number of examples of the whole batch.
        lr: the learning rate of this step.
        step: the number of this step, from 1.

    Returns:
        The loss and the norms of the whole batch, those of gradients before clipping, and the logits of the
        part, [n, num_classes].
    """
    network, optimizer = replica.network, replica.optimizer
    optimizer.lr, optimizer.count = lr, step - 1
    optimizer.begin_step()
    optimizer.zero_grad()
    sums: list[Array] = []

    def update(layer: Layer) -> None:
        sums.append(replica.update_group(layer))

    with np.errstate(all="ignore"):  # loss and norms show what is not finite
        image = replica.setup.normalize(batch["image"])
        logits = network.forward(image, train=True, keep=batch.get("drop_path"))
        loss, dlogits = replica.setup.loss(logits, batch, batch_size)
        network.backward(dlogits, update)
        replica.update_average(step)
        total = replica.communicator.all_reduce(np.append(np.sum(sums, 0), loss))
        grad_norm, update_norm = np.sqrt(total[:2])
    metrics: Metrics = {
        "loss": total[-1],
        "logits": logits,
        "grad_norm": grad_norm,
        "update_norm": update_norm,
    }
    if replica.setup.log_gradients:
        norms = np.sqrt(total[4:-1])
        metrics |= {f"grad_norm/{name}": norm for name, norm in zip(replica.parameters, norms, strict=True)}
    if optimizer.bounds is not None:
        metrics["lower_bound"], metrics["upper_bound"] = optimizer.bounds
        metrics["at_lower"], metrics["at_upper"] = total[2:4] / replica.size
    return metrics


def eval_step(replica: Replica, image: Array) -> Array:
    """Return the logits [n, num_classes] of this process's part, with the running statistics, and with the
    averages where there are any."""
    with no_grad(), np.errstate(all="ignore"):
        return replica.average.forward(replica.setup.normalize(image))


STEPS: dict[str, Callable[..., Any]] = {"train": train_step, "evaluate": eval_step}


def run_step(replica: Replica, name: str, arguments: tuple[Any, ...]) -> Any:
    """Take the step of that name, in `STEPS`, for `Engine.train` and `Engine.evaluate`."""
    return STEPS[name](replica, *arguments)


def make_worker(setup: Setup, communicator: Communicator, memory: SharedMemory) -> Worker:
    """Return the function that takes the steps of one process, whose arrays all lie in shared memory."""
    return partial(run_step, Replica(setup, communicator, memory))
