"""The NumPy engine: the training step written out, and the loop that drives it.

The loop is a generator that yields after each step. Logging, saving, early stopping and signals are the
caller's, once for all engines. The batch is split between as many processes as there are cores
(`parallel.py`); with one process everything happens right here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numpy_ref import resnet
from numpy_ref.fast import BatchNorm, Conv2d
from numpy_ref.layers import Array, Layer, Parameter, check_labels, cross_entropy, no_grad
from numpy_ref.memory import trim
from numpy_ref.network import Network
from numpy_ref.optimizers import make_optimizer
from numpy_ref.parallel import Communicator, Group, SharedMemory, aligned, board_size, core_count, split
from numpy_ref.state_dict import from_torch_layout, to_torch_layout

GROUP = 1 << 25  # bytes of gradients that one process has at a time

Batch = Mapping[str, Array]
Metrics = dict[str, Any]
Tree = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """Plain values from which every process builds the same replica."""

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

    def network(self, *, initial: bool) -> Network:
        """The network with its initial weights, or with zeros."""
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

    def normalise(self, image: Array) -> Array:
        """Pictures of type uint8 become (x / 255 - mean) / std; others are taken as they are."""
        if image.dtype != np.uint8:
            return image.astype(self.dtype)
        mean, std = (np.asarray(a, self.dtype) for a in (self.mean, self.std))
        return np.asarray((image.astype(self.dtype) / 255 - mean) / std)

    def make(self, communicator: Communicator, memory: SharedMemory) -> Replica:
        """The replica of one process, its arrays in the memory that all share."""
        return Replica(self, communicator, memory)


class Replica:
    """One process's network and optimizer, and its part in a step.

    The weights are zeros, but for `initial`. With `memory`, all that a step changes lies there: parameters,
    running statistics, the optimizer's moments, and the gradients of every process.
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
        self.parameters = {name: p for name, p in named.items() if p.trainable}
        self.optimizer = make_optimizer(
            setup.optimizer, self.parameters.values(), 0.0, **setup.optimizer_options
        )
        self.norms = [layer for layer in self.network.walk() if isinstance(layer, BatchNorm)]
        for norm in self.norms:
            norm.all_reduce = communicator.all_reduce
            norm.keeps_running = communicator.rank == 0
        first = next(layer for _, layer in self.network.body())
        assert isinstance(first, Conv2d)
        first.needs_dx = False
        self.groups = update_groups(self.network)
        self.size = sum(parameter.value.size for parameter in self.parameters.values())
        self.index = {id(parameter): i for i, parameter in enumerate(self.parameters.values())}
        self.gradients: list[list[Array]] | None = None
        if memory is not None:
            self._share(memory)

    def _share(self, memory: SharedMemory) -> None:
        """Have every array in shared memory. What it holds there at first, `Engine` has written."""

        def shared(array: Array) -> Array:
            return memory.empty(array.shape, array.dtype)

        for parameter in self.network.parameters():
            parameter.value = shared(parameter.value)
        for norm in self.norms:
            norm.running_mean, norm.running_var = shared(norm.running_mean), shared(norm.running_var)
        for arrays in self.optimizer.moments.values():
            arrays[:] = [shared(array) for array in arrays]
        self.gradients = [self._lay_out(memory) for _ in range(self.communicator.size)]
        own = self.gradients[self.communicator.rank]
        for parameter, gradient in zip(self.parameters.values(), own, strict=True):
            parameter.store_grad_in(gradient)

    def _lay_out(self, memory: SharedMemory) -> list[Array]:
        """A gradient for every parameter, those of different groups on top of each other."""
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
        """Everything that lasts from step to step, as it lies: {params, batch_stats, optimizer}."""
        variables = self.network.variables()
        optimizer: Tree = {
            field: dict(zip(self.parameters, arrays, strict=True))
            for field, arrays in self.optimizer.moments.items()
        }
        if self.optimizer.counts:
            optimizer["count"] = np.array(self.optimizer.count, np.int32)
        return {
            "params": {name: v.value for name, v in variables.items() if isinstance(v, Parameter)},
            "batch_stats": {name: v for name, v in variables.items() if not isinstance(v, Parameter)},
            "optimizer": optimizer,
        }

    def __call__(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """Do `train` or `evaluate`."""
        return getattr(self, what)(*arguments)

    def train(self, image: Array, label: Array, batch_size: int, lr: float, step: int) -> Metrics:
        """Step number `step`, from 1, on this process's part of a batch of `batch_size` examples: forward,
        backward, update. Returns loss and norms of the whole batch, and the part's logits.

        Groups of layers are updated as soon as backward is done with them, and the gradients of the next
        group take the same memory: a gradient for each process would else be a network more for each.
        """
        self.optimizer.lr, self.optimizer.count = lr, step - 1
        self.optimizer.begin()
        self.optimizer.zero_grad()
        sums: list[Array] = []
        with np.errstate(all="ignore"):  # loss and norms tell
            logits = self.network.forward(self.setup.normalise(image), train=True)
            loss, dlogits = cross_entropy(logits, label, batch_size)
            self.network.backward(dlogits, lambda layer: sums.append(self._update(layer)))
            total = self.communicator.all_reduce(np.append(np.sum(sums, 0), loss))
            grad_norm, update_norm = np.sqrt(total[:2])
        metrics: Metrics = {
            "loss": total[4],
            "logits": logits,
            "grad_norm": grad_norm,
            "update_norm": update_norm,
        }
        if self.optimizer.bounds is not None:
            metrics["lower_bound"], metrics["upper_bound"] = self.optimizer.bounds
            metrics["at_lower"], metrics["at_upper"] = total[2:4] / self.size
        return metrics

    def _update(self, layer: Layer) -> Array:
        """Update this process's share of the group that ends with this layer, if one does: see `change`."""
        which = [self.index[id(parameter)] for parameter in self.groups.get(id(layer), [])]
        if not which or self.gradients is None:
            return self.optimizer.change(which)
        active, rank = self.communicator.active, self.communicator.rank
        self.communicator.wait()  # until all parts' gradients are there
        sums = self.optimizer.change(which, self.gradients[:active], (rank, active))
        self.communicator.wait()  # until nobody reads them any more
        return sums

    def evaluate(self, image: Array) -> Array:
        """The logits of this process's part of a batch, with the running statistics."""
        with no_grad(), np.errstate(all="ignore"):
            return self.network.forward(self.setup.normalise(image))


@dataclass
class State:
    """Where training stands. The arrays change in place: after a step the state before it is gone.

    Attributes:
        replica: the arrays, and what computes if there is but one process.
        start: starts the processes, if there are more; done before the first step.
        step: how many steps were taken.
        first_nonfinite_step: the first of them whose loss or gradient was not finite.
    """

    replica: Replica
    start: Callable[[], Group] | None = None
    step: int = 0
    first_nonfinite_step: int | None = None
    _group: Group | None = None

    def call(self, what: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Have the first processes, one for each tuple, do `what`."""
        if self.start is None:
            return [self.replica(what, arguments[0])]
        if self._group is None:
            trim()  # of the arrays that those in shared memory were copied from
            self._group = self.start()
        return self._group.call(what, arguments)


class Engine:
    """Trains and evaluates one network.

    Args:
        model: name in `resnet.MODELS`.
        model_options: keyword arguments of its builder.
        num_classes: number of logits.
        image_shape: (height, width, channels) of the pictures.
        mean, std: per channel, for pictures of type uint8, which become (x / 255 - mean) / std; pictures of a
            floating type are taken as they are.
        optimizer: name in `optimizers.OPTIMIZERS`.
        optimizer_options: keyword arguments of `make_optimizer`.
        learning_rate: the rate as a function of the step, which counts from 0.
        precision: "float32" or "float64".
        seed: seed of the initial weights, which are those of the JAX engine.
        freeze_backbone: only the head `fc` is trained; everything before it computes as in evaluation.
        processes: how many share a batch; by default as many as there are cores. With more than one, a script
            must have `if __name__ == "__main__":` around what it runs, since each process imports it again.

    Raises:
        ValueError: if a name is unknown or a number out of its range.
    """

    def __init__(
        self,
        *,
        model: str,
        model_options: Mapping[str, Any],
        num_classes: int,
        image_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        optimizer: str,
        optimizer_options: Mapping[str, Any],
        learning_rate: Callable[[int], float],
        precision: str = "float32",
        seed: int = 0,
        freeze_backbone: bool = False,
        processes: int | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self.processes = core_count() if processes is None else processes
        self._setup = Setup(
            model=model,
            model_options=dict(model_options),
            num_classes=num_classes,
            image_shape=image_shape,
            mean=tuple(mean),
            std=tuple(std),
            optimizer=optimizer,
            optimizer_options=dict(optimizer_options),
            dtype=precision,
            seed=seed,
            freeze_backbone=freeze_backbone,
        )
        if model not in resnet.MODELS:
            raise ValueError(f"unknown model {model!r}; choose one of {', '.join(resnet.MODELS)}")
        if self.processes < 1:
            raise ValueError(f"processes must be 1 or more, got {processes}")
        make_optimizer(optimizer, [], 0.0, **optimizer_options)  # refuses what is out of range

    @property
    def device(self) -> str:
        """What computes, in words."""
        return f"NumPy {np.__version__}, {self.processes} process{'es' if self.processes > 1 else ''}"

    @property
    def device_count(self) -> int:
        """The size of a batch must be a multiple of 1: processes may get parts of different sizes."""
        return 1

    @property
    def compiles(self) -> bool:
        """False: there is no compilation."""
        return False

    @property
    def holds_images(self) -> bool:
        """False: the device is the host."""
        return False

    @property
    def is_synchronized(self) -> bool:
        """False: the processes that share a batch are this engine's own."""
        return False

    def init(self) -> State:
        """The state before the first step."""
        initial = Replica(self._setup, Communicator(), initial=True)
        return self._state(initial.arrays()) if self.processes > 1 else State(initial)

    def _state(self, arrays: Tree) -> State:
        """A state that holds these arrays, in this engine's layout."""
        if self.processes == 1:
            state = State(Replica(self._setup, Communicator()))
        else:
            memory = SharedMemory(self._memory_size(arrays))
            replica = Replica(self._setup, Communicator(0, self.processes, memory), memory)
            state = State(replica, lambda: Group(self.processes, memory, self._setup.make))
        given = dict(leaves(arrays))
        for name, place in leaves(state.replica.arrays()):
            if name not in given or np.shape(given[name]) != place.shape:
                raise ValueError(f"the tree is of another model or optimizer: it does not fit {name}")
            place[...] = given[name]
        return state

    def hold(self, images: Array, fill: Sequence[int]) -> None:
        """Not supported: `holds_images` is False."""
        raise NotImplementedError("the NumPy engine holds no images: they are in its memory anyway")

    def train(
        self, state: State, batches: Iterable[Batch], needs_state: Callable[[int], bool] = lambda step: True
    ) -> Iterator[tuple[State, Metrics]]:
        """Take one step for each batch; yields the state after it and {"loss", "logits", "label",
        "grad_norm", "update_norm"}. `needs_state` is ignored: the state is yielded after every step.

        Raises ValueError, before the step, for labels that are not one integer in range(num_classes) for each
        image, and for a batch of 0.
        """
        for batch in batches:
            image, label = batch["image"], batch["label"]
            check_labels(label, self._setup.num_classes, len(image))
            if not len(image):
                raise ValueError("a training step needs at least 1 example, got a batch of 0")
            parts = split(len(image), min(self.processes, len(image)))
            lr = self.learning_rate(state.step)
            state.step += 1
            results = state.call(
                "train", [(image[part], label[part], len(image), lr, state.step) for part in parts]
            )
            metrics = {**results[0], "logits": np.concatenate([each["logits"] for each in results])}
            finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            if not finite and state.first_nonfinite_step is None:
                state.first_nonfinite_step = state.step
            yield state, {**metrics, "label": label}

    def evaluate(self, state: State, batches: Iterable[Batch]) -> Iterator[Array]:
        """The logits [N, num_classes] of each batch, with the running statistics."""
        for batch in batches:
            image = batch["image"]
            parts = split(len(image), max(1, min(self.processes, len(image))))
            yield np.concatenate(state.call("evaluate", [(image[part],) for part in parts]))

    def first_nonfinite_step(self, state: State) -> int | None:
        """The first step (from 1) whose loss or gradient was not finite, or None."""
        return state.first_nonfinite_step

    def all_reduce_max(self, number: int) -> int:
        """Return the number: no other engine takes part."""
        return number

    def to_tree(self, state: State) -> Tree:
        """The engine-neutral tree {params, batch_stats, optimizer, step}: copies, in PyTorch's layout."""
        tree = _map(to_torch_layout, state.replica.arrays())
        if "count" in tree["optimizer"]:
            tree["optimizer"]["count"] = np.array(state.step, np.int32)
        return {**tree, "step": np.array(state.step, np.int32)}

    def from_tree(self, tree: Tree) -> State:
        """The inverse of `to_tree`; the tree must have the names and shapes of this engine's own."""
        arrays = {name: tree[name] for name in ("params", "batch_stats", "optimizer")}
        state = self._state(_map(from_torch_layout, arrays))
        state.step = int(tree["step"])
        return state

    def _memory_size(self, arrays: Tree) -> int:
        """Bytes that the arrays take in shared memory, with a gradient for each process and the board."""
        own = sum(aligned(array.nbytes) for _, array in leaves(arrays))
        groups = update_groups(self._setup.network(initial=False))
        return own + max(map(size_of, groups.values())) * self.processes + board_size(self.processes)


def update_groups(network: Network) -> dict[int, list[Parameter]]:
    """The parameters in groups that are updated at once, each under the id of the layer that backward is then
    done with: as many trained layers as have `GROUP` bytes of gradients, or one that has more."""
    groups: list[tuple[int, list[Parameter]]] = []
    for layer in reversed(network.trained_layers()):
        parameters = layer.parameters()
        if groups and size_of(groups[-1][1] + parameters) <= GROUP:
            parameters = groups.pop()[1] + parameters
        groups.append((id(layer), parameters))
    return dict(groups)


def size_of(parameters: Sequence[Parameter]) -> int:
    """Bytes of the gradients of parameters, in whole cache lines."""
    return sum(aligned(parameter.value.nbytes) for parameter in parameters)


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays of nested dicts with their paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(dict(value), f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _map(function: Callable[[Array], Array], tree: Tree) -> Tree:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}
