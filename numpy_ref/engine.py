"""The NumPy engine: the loop that drives the training step of `step.py`.

The loop is a generator that yields after each step. Logging, saving, early stopping and signals are the
caller's, once for all engines. The batch is split between `cores.thread_count()` processes
(`parallel.py`); with one process everything is computed in this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from numpy_ref import openblas, resnet
from numpy_ref.cores import core_count, thread_count
from numpy_ref.layers import Array, check_labels, group_count
from numpy_ref.losses import Loss
from numpy_ref.memory import trim
from numpy_ref.optimizers import make_optimizer
from numpy_ref.parallel import Communicator, Group, SharedMemory, aligned, board_size, split
from numpy_ref.replica import Replica, Setup, Tree, size_of, update_groups
from numpy_ref.state_dict import from_torch_layout, to_torch_layout
from numpy_ref.step import Metrics, make_worker, run_step

Batch = Mapping[str, Array]


@dataclass
class State:
    """The state of training. The arrays change in place: after a step the state before it is gone.

    Attributes:
        replica: the arrays, and the network that computes if there is only one process.
        start: starts the processes, if there are several; called before the first step.
        step: the number of steps taken.
        first_nonfinite_step: the first of them whose loss or gradient was not finite.
    """

    replica: Replica
    start: Callable[[], Group] | None = None
    step: int = 0
    first_nonfinite_step: int | None = None
    _group: Group | None = None

    def run(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Take the step of that name (`step.STEPS`) in as many processes as there are tuples of arguments."""
        if self.start is None:
            return [run_step(self.replica, name, arguments[0])]
        if self._group is None:
            trim()  # frees the arrays that those in shared memory were copied from
            self._group = self.start()
        return self._group.call(name, arguments)


class Engine:
    """Trains and evaluates one network.

    Args:
        model: name in `resnet.MODELS`.
        model_options: keyword arguments of its builder.
        num_classes: number of logits.
        image_shape: (height, width, channels) of the images.
        mean, std: per channel, for images of type uint8, which become (x / 255 - mean) / std; images of a
            floating type are not normalized.
        optimizer: name in `optimizers.OPTIMIZERS`.
        optimizer_options: keyword arguments of `make_optimizer`.
        learning_rate: the rate as a function of the step, from 0.
        precision: "float32" or "float64".
        seed: seed of the initial weights, which are those of the JAX engine.
        freeze_backbone: train only the head `fc`; everything before it computes as in evaluation.
        processes: the number of processes that share a batch; by default `cores.thread_count()`. With
            `batch_norm_group` each computes whole groups of a batch: at most as many processes as groups.
            With more than one process, a script must have `if __name__ == "__main__":` around its main
            program, since each process imports the script again.
        log_gradients: add the norm of each parameter's gradient to the metrics, as "grad_norm/NAME".
        clip_grad_norm: scale the gradients so that their common norm is at most this; "grad_norm" and the
            norms of `log_gradients` are those before. See `optimizers.clip_scale`.
        ema_decay: maintain exponential moving averages of parameters and running statistics, with this decay
            per step; see `Replica.update_average`. `evaluate` uses the averages.
        loss, label_smoothing, class_weights: what training minimizes; see `losses.Loss`.

    Raises:
        ValueError: if a name is unknown or a number out of its range.
    """

    device_count = 1  # the size of a batch may be any number: processes may get parts of different sizes
    compiles = False
    holds_images = False  # the device is the host
    is_synchronized = False  # the processes that share a batch are this engine's own

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
        log_gradients: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        loss: str = "cross-entropy",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self.processes = thread_count() if processes is None else processes
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
            log_gradients=log_gradients,
            clip_grad_norm=clip_grad_norm,
            ema_decay=ema_decay,
            loss=Loss(loss, label_smoothing, class_weights),
        )
        if model not in resnet.MODELS:
            raise ValueError(f"unknown model {model!r}; choose one of {', '.join(resnet.MODELS)}")
        if self.processes < 1:
            raise ValueError(f"processes must be 1 or more, got {processes}")
        if self.processes == core_count() == 1:
            openblas.use_one_thread()
        make_optimizer(optimizer, {}, 0.0, **optimizer_options)  # raises if an option is out of range

    @property
    def threads(self) -> int:
        """The number of processes, each of which computes with one thread if there are several."""
        return self.processes

    @property
    def num_blocks(self) -> int:
        """The number of residual blocks."""
        network = self._setup.network(initial=False)
        return network.num_blocks if isinstance(network, resnet.ResNet) else 0

    @property
    def device(self) -> str:
        """A description of the device."""
        words = f"NumPy {np.__version__}, {self.processes} process{'es' if self.processes > 1 else ''}"
        group = self._setup.model_options.get("batch_norm_group")
        if group is not None and self.processes > 1:
            words += f", each with whole batch-norm groups of {group}"
        kernels = openblas.kernels()
        return words if kernels is None else f"{words}, OpenBLAS {kernels}"

    def init(self) -> State:
        """The state before the first step."""
        initial = Replica(self._setup, Communicator(), initial=True)
        return self._state(initial.arrays()) if self.processes > 1 else State(initial)

    def _state(self, arrays: Tree, reuse: State | None = None) -> State:
        """A state with copies of these arrays, in this engine's layout; `reuse` itself, if it is given."""
        if reuse is not None:
            state = reuse
        elif self.processes == 1:
            state = State(Replica(self._setup, Communicator()))
        else:
            memory = SharedMemory(self._memory_size(arrays))
            replica = Replica(self._setup, Communicator(0, self.processes, memory), memory)
            state = State(replica, lambda: Group(self.processes, memory, partial(make_worker, self._setup)))
        given = dict(leaves(arrays))
        for name, array in leaves(state.replica.arrays()):
            if name not in given or np.shape(given[name]) != array.shape:
                raise ValueError(f"the tree is of another model or optimizer: it does not fit {name}")
            array[...] = given[name]
        return state

    def hold(self, images: Array, fill: Sequence[int]) -> None:
        """Not supported: `holds_images` is False."""
        raise NotImplementedError("the NumPy engine holds no images: they are in its memory anyway")

    def train(
        self, state: State, batches: Iterable[Batch], needs_state: Callable[[int], bool] = lambda step: True
    ) -> Iterator[tuple[State, Metrics]]:
        """Take one step for each batch.

        Yields the state after it and {"loss", "logits", "label", "grad_norm", "update_norm"}. `needs_state`
        is ignored: the state is yielded after every step. A batch may have "drop_path" [N, num_blocks], the
        factors of the residual branches, and for mixed images "label2" and "lam" [N]; see
        `losses.soft_targets`.

        Raises ValueError, before the step, unless there is one label in range(num_classes) for each image,
        and for a batch of 0, or one that is not a multiple of `batch_norm_group`.
        """
        for batch in batches:
            image, label = batch["image"], batch["label"]
            for name in batch.keys() & {"label", "label2"}:
                check_labels(batch[name], self._setup.num_classes, len(image))
            if not len(image):
                raise ValueError("a training step needs at least 1 example, got a batch of 0")
            parts = self._parts(len(image))
            lr = self.learning_rate(state.step)
            state.step += 1
            arguments = [
                ({name: rows[part] for name, rows in batch.items()}, len(image), lr, state.step)
                for part in parts
            ]
            results: list[Metrics] = state.run("train", arguments)
            metrics = {**results[0], "logits": np.concatenate([result["logits"] for result in results])}
            finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
            if not finite and state.first_nonfinite_step is None:
                state.first_nonfinite_step = state.step
            yield state, {**metrics, "label": label}

    def _parts(self, size: int) -> list[slice]:
        """The examples of each process in a training batch: even shares, of whole groups of batch norm."""
        unit = self._setup.model_options.get("batch_norm_group") or 1
        count = group_count(size, unit)
        shares = split(count, min(self.processes, count))
        return [slice(unit * share.start, unit * share.stop) for share in shares]

    def evaluate(self, state: State, batches: Iterable[Batch]) -> Iterator[Array]:
        """The logits [N, num_classes] of each batch, with the running statistics."""
        for batch in batches:
            image = batch["image"]
            parts = split(len(image), max(1, min(self.processes, len(image))))
            yield np.concatenate(state.run("evaluate", [(image[part],) for part in parts]))

    def first_nonfinite_step(self, state: State) -> int | None:
        """The first step (from 1) whose loss or gradient was not finite, or None."""
        return state.first_nonfinite_step

    def all_reduce_max(self, number: int) -> int:
        """Return the number: no other engine takes part."""
        return number

    def to_tree(self, state: State) -> Tree:
        """The engine-neutral tree {params, batch_stats, optimizer, step}: copies, in PyTorch's layout.

        With `ema_decay` also "ema": {params, batch_stats}.
        """
        tree = _map(to_torch_layout, state.replica.arrays())
        if "count" in tree["optimizer"]:
            tree["optimizer"]["count"] = np.array(state.step, np.int32)
        return {**tree, "step": np.array(state.step, np.int32)}

    def from_tree(self, tree: Tree) -> State:
        """The inverse of `to_tree`. Raises ValueError if a name or a shape does not fit this engine."""
        names = ["params", "batch_stats", "optimizer"]
        names += [] if self._setup.ema_decay is None else ["ema"]
        arrays = {name: tree[name] for name in names}
        state = self._state(_map(from_torch_layout, arrays))
        state.step = int(tree["step"])
        return state

    def arrays(self, state: State) -> dict[str, Array]:
        """Everything in the tree of `to_tree` by its path, but in this engine's layout and not copied."""
        step = np.array(state.step, np.int32)
        arrays = dict(leaves(state.replica.arrays()))
        return {**arrays, **dict.fromkeys(arrays.keys() & {"optimizer/count"}, step), "step": step}

    def from_arrays(self, arrays: Mapping[str, Array], reuse: State | None = None) -> State:
        """The inverse of `arrays`. With `reuse`, a state of this engine, the arrays are written into it, and
        its processes go on."""
        state = self._state(dict(arrays), reuse)
        state.step, state.first_nonfinite_step = int(arrays["step"]), None
        return state

    def _memory_size(self, arrays: Tree) -> int:
        """Bytes of shared memory: of these arrays, and per process of gradients and `all_reduce`."""
        size = sum(aligned(array.nbytes) for _, array in leaves(arrays))
        at_once = self._setup.clip_grad_norm is not None
        groups = update_groups(self._setup.network(initial=False), at_once=at_once)
        return size + max(map(size_of, groups.values())) * self.processes + board_size(self.processes)


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays of nested mappings, with their paths."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(dict(value), f"{prefix}{name}/")
        else:
            yield prefix + name, value


def _map(function: Callable[[Array], Array], tree: Tree) -> Tree:
    return {k: _map(function, v) if isinstance(v, dict) else function(v) for k, v in tree.items()}
