"""One process's network and optimizer, and where their arrays lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numpy_ref import resnet
from numpy_ref.fast import BatchNorm, Conv2d
from numpy_ref.layers import Array, Layer, Parameter
from numpy_ref.losses import PLAIN, Loss
from numpy_ref.network import Network
from numpy_ref.optimizers import clip_scale, make_optimizer
from numpy_ref.parallel import Communicator, SharedMemory, aligned

GROUP = 1 << 25  # bytes of gradients that one process has at a time

Tree = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The plain values from which every process builds the same replica."""

    model: str
    model_options: Mapping[str, Any]
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    optimizer: str
    optimizer_options: Mapping[str, Any]
    dtype: str
    seed: int
    freeze_backbone: bool
    log_gradients: bool = False
    clip_grad_norm: float | None = None
    ema_decay: float | None = None
    loss: Loss = PLAIN

    def network(self, *, initial: bool) -> Network:
        """Build the network, with its initial weights or with zeros."""
        extra = {"image_size": self.image_shape[:2]} if self.model == "cnn" else {}
        network = resnet.MODELS[self.model](
            self.num_classes,
            self.image_shape[2],
            **extra,
            **self.model_options,
            rng=np.random.default_rng(self.seed) if initial else None,
            dtype=np.dtype(self.dtype),
        )
        if self.freeze_backbone:
            network.freeze_backbone()
        return network

    def normalize(self, image: Array) -> Array:
        """Return (x / 255 - mean) / std for images of type uint8; others are only cast."""
        if image.dtype != np.uint8:
            return image.astype(self.dtype)
        mean, std = (np.asarray(a, self.dtype) for a in (self.mean, self.std))
        return np.asarray((image.astype(self.dtype) / 255 - mean) / std)


class Replica:
    """One process's network and optimizer.

    Args:
        setup: the values to build them from.
        communicator: the link to the other processes.
        memory: where all that a step changes lies, if processes share it: parameters, running statistics,
            the optimizer's moments, and the gradients of every process.
        initial: draw the initial weights; if False, they are zeros.

    Attributes:
        average: a network whose parameters and running statistics are the exponential moving averages of
            those of `network`; `network` itself in a run without.
    """

    def __init__(
        self,
        setup: Setup,
        communicator: Communicator,
        memory: SharedMemory | None = None,
        *,
        initial: bool = False,
    ) -> None:
        self.setup, self.communicator = setup, communicator
        self.network = setup.network(initial=initial)
        named = self.network.named_parameters()
        trained = {name: p for name, p in named.items() if p.trainable}
        self.optimizer = make_optimizer(setup.optimizer, trained, 0.0, **setup.optimizer_options)
        names = {id(parameter): name for name, parameter in trained.items()}
        self.parameters = {names[id(p)]: p for p in self.optimizer.parameters}  # in the optimizer's order
        self.norms = [layer for layer in self.network.walk() if isinstance(layer, BatchNorm)]
        for norm in self.norms:
            norm.all_reduce = communicator.all_reduce
            norm.keeps_running = communicator.rank == 0
        first = next(layer for _, layer in self.network.body())
        assert isinstance(first, Conv2d)
        first.needs_dx = False
        self.groups = update_groups(self.network, at_once=setup.clip_grad_norm is not None)
        self.size = sum(parameter.value.size for parameter in self.parameters.values())
        self.index = {id(parameter): i for i, parameter in enumerate(self.parameters.values())}
        self.gradients: list[list[Array]] | None = None
        self.average = self.network
        if setup.ema_decay is not None:
            self.average = setup.network(initial=False)
            for average, latest in self._averages():
                average[...] = latest
        if memory is not None:
            self._share(memory)

    def _share(self, memory: SharedMemory) -> None:
        """Move every array to shared memory. Its contents there are those that `Engine` has written."""

        def shared(array: Array) -> Array:
            return memory.empty(array.shape, array.dtype)

        for parameter in self.network.parameters():
            parameter.value = shared(parameter.value)
        for norm in self.norms:
            norm.running_mean, norm.running_var = shared(norm.running_mean), shared(norm.running_var)
        for arrays in self.optimizer.moments.values():
            arrays[:] = [shared(array) for array in arrays]
        if self.average is not self.network:
            for parameter in self.average.parameters():
                parameter.value = shared(parameter.value)
            for layer in self.average.walk():
                if isinstance(layer, BatchNorm):
                    layer.running_mean = shared(layer.running_mean)
                    layer.running_var = shared(layer.running_var)
        self.gradients = [self._lay_out(memory) for _ in range(self.communicator.size)]
        gradients = self.gradients[self.communicator.rank]
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.store_grad_in(gradient)

    def _lay_out(self, memory: SharedMemory) -> list[Array]:
        """A gradient for every parameter; all groups of parameters share the same memory."""
        space = memory.empty((max(map(size_of, self.groups.values())),), np.dtype(np.uint8))
        gradients = {}
        for group in self.groups.values():
            start = 0
            for parameter in group:
                value = parameter.value
                gradients[id(parameter)] = np.ndarray(value.shape, value.dtype, space, start)
                start += aligned(value.nbytes)
        return [gradients[id(parameter)] for parameter in self.parameters.values()]

    def arrays(self) -> Tree:
        """Everything that lasts from step to step, not copied: {params, batch_stats, optimizer}.

        With averages also "ema": {params, batch_stats}.
        """
        optimizer: Tree = {
            field: dict(zip(self.parameters, arrays, strict=True))
            for field, arrays in self.optimizer.moments.items()
        }
        if self.optimizer.uses_step_count:
            optimizer["count"] = np.array(self.optimizer.count, np.int32)
        tree = {**network_arrays(self.network), "optimizer": optimizer}
        return tree if self.average is self.network else {**tree, "ema": network_arrays(self.average)}

    def _averages(self) -> list[tuple[Array, Array]]:
        """Each average, and the array that it is the average of."""
        average, latest = network_arrays(self.average), network_arrays(self.network)
        return [(average[part][name], latest[part][name]) for part in latest for name in latest[part]]

    def update_average(self, step: int) -> None:
        """Move this process's share of the averages toward the values after step `step`, from 1:

            average = decay * average + (1 - decay) * latest,    after the first step average = latest

        As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)` and `use_buffers=True`,
        updated after every step. There is no warm-up of the decay.
        """
        decay = self.setup.ema_decay
        if decay is None:
            return
        active, rank = self.communicator.active, self.communicator.rank
        for average, latest in self._averages()[rank::active]:
            if step == 1:
                average[...] = latest
            else:
                change = latest - average
                change *= 1 - decay
                average += change

    def update_group(self, layer: Layer) -> Array:
        """Update this process's share of the group of parameters that is complete after `layer`, if any.

        Returns the sums of `Optimizer.update_parameters`; with `log_gradients`, also `_squares`.
        """
        indices = [self.index[id(parameter)] for parameter in self.groups.get(id(layer), [])]
        if not indices or self.gradients is None:
            squares, scale = self._squares(indices), self._scale(indices) if indices else 1.0
            return np.append(self.optimizer.update_parameters(indices, scale=scale), squares)
        active, rank = self.communicator.active, self.communicator.rank
        self.communicator.wait()  # until the gradients of all parts are written
        squares, scale = self._squares(indices[rank::active]), self._scale(indices[rank::active])
        sums = self.optimizer.update_parameters(indices, self.gradients[:active], (rank, active), scale)
        self.communicator.wait()  # until no process reads them any more
        return np.append(sums, squares)

    def _squares(self, indices: Sequence[int]) -> Array:
        """The sum of squares of each parameter's gradient, 0 if not in `indices`; empty if not logged."""
        squares = np.zeros(len(self.parameters) if self.setup.log_gradients else 0)
        for index in indices if self.setup.log_gradients else ():
            squares[index] = self._square(index)
        return squares

    def _square(self, index: int) -> float:
        """The sum of squares of a parameter's gradient."""
        grad = self.optimizer.parameters[index].grad
        if self.gradients is not None:  # those of the parts of the batch
            first, *others = (part[index] for part in self.gradients[: self.communicator.active])
            grad = sum(others, first)
        return float(np.vdot(grad, grad))

    def _scale(self, indices: Sequence[int]) -> float:
        """The factor of all gradients that clips their norm, from those of this process's share `indices`."""
        if self.setup.clip_grad_norm is None:
            return 1.0
        total = self.communicator.all_reduce(np.array(sum(self._square(index) for index in indices)))
        return clip_scale(float(np.sqrt(total)), self.setup.clip_grad_norm)


def network_arrays(network: Network) -> Tree:
    """The arrays of a network, not copied: {params, batch_stats}."""
    variables = network.variables()
    return {
        "params": {name: v.value for name, v in variables.items() if isinstance(v, Parameter)},
        "batch_stats": {name: v for name, v in variables.items() if not isinstance(v, Parameter)},
    }


def update_groups(network: Network, *, at_once: bool = False) -> dict[int, list[Parameter]]:
    """The parameters in groups that are updated together, each under the id of the layer that completes it.

    A group is as many trained layers as have `GROUP` bytes of gradients, or one layer that has more; or with
    `at_once` all layers.
    """
    groups: list[tuple[int, list[Parameter]]] = []
    for layer in reversed(network.trained_layers()):
        parameters = layer.parameters()
        if groups and (at_once or size_of(groups[-1][1] + parameters) <= GROUP):
            parameters = groups.pop()[1] + parameters
        groups.append((id(layer), parameters))
    return dict(groups)


def size_of(parameters: Sequence[Parameter]) -> int:
    """The bytes that the gradients of parameters take, in whole cache lines."""
    return sum(aligned(parameter.value.nbytes) for parameter in parameters)
