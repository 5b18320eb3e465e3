"""The JAX engine: where arrays live, how steps are taken, and the loop that yields after each step.

The step itself is `train_step` in `step.py`; on one CPU device `Blockwise.step` computes the same. Logging,
saving, early stopping and signals are the caller's, once for all engines.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.multihost_utils import process_allgather

from jax_resnet import resnet
from jax_resnet.layers import on_cpu, parameter_dtype
from jax_resnet.losses import Loss
from jax_resnet.memory import reuse_freed_memory
from jax_resnet.optimizers import state_from_dict, state_to_dict
from jax_resnet.placement import Placement
from jax_resnet.state import TrainState
from jax_resnet.state_dict import Parts, from_torch_layout, split, to_torch_layout
from jax_resnet.step import (
    Batch,
    GradientFn,
    Metrics,
    Network,
    Optimizer,
    compute_gradient,
    eval_step,
    train_step,
)
from jax_resnet.strategies import Strategy
from jax_resnet.strategies.accumulate import Accumulated, accumulate_gradient
from jax_resnet.strategies.blockwise import Blocks, Blockwise
from jax_resnet.strategies.chunked import Chunked, best_chunk, chunks_of
from jax_resnet.strategies.whole import Whole
from jax_resnet.transformations import check_transformation

Tree = dict[str, Any]


class Engine:
    """Trains and evaluates one network.

    Args:
        model: name in `resnet.MODELS`.
        model_options: keyword arguments of its builder.
        num_classes: number of logits.
        image_shape: (height, width, channels) of the images.
        mean, std: per channel, for images of type uint8, which become (x / 255 - mean) / std; images of a
            floating type are used unchanged.
        optimizer: name in `optimizers.OPTIMIZERS`, or of a transformation; see `transformations.py`.
        optimizer_options: keyword arguments of `make_optimizer`, or of the transformation.
        learning_rate: the rate as a function of the step, which counts from 0.
        precision: "float32", "bfloat16" (compute only) or "float64".
        seed: seed of the initial weights.
        freeze_backbone: only the head `fc` is trained; everything before it computes as in evaluation.
        accumulate: number of micro-batches that a batch is split into, computed one after another with the
            memory of one. Gradients are averaged; batch norm sees a micro-batch, and its running statistics
            move with each.
        remat: backward recomputes each residual block instead of saving its inner activations.
        chunk: the most steps that one call of a compiled function takes; None is what suits the back end.
        log_gradients: add the norm of each parameter's gradient to the metrics, as "grad_norm/NAME".
        clip_grad_norm: scale the gradients so that their common norm is at most this; "grad_norm" and the
            norms of `log_gradients` are those before. See `optimizers.clip_scale`.
        ema_decay: maintain exponential moving averages of parameters and batch statistics, with this decay
            per step; see `step.update_average`. `evaluate` uses the averages.
        loss, label_smoothing, class_weights: what training minimizes; see `losses.Loss`.
    """

    compiles = True  # the first step waits for XLA

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
        accumulate: int = 1,
        remat: bool = False,
        chunk: int | None = None,
        log_gradients: bool = False,
        clip_grad_norm: float | None = None,
        ema_decay: float | None = None,
        loss: str = "cross-entropy",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        self.learning_rate, self.ema_decay = learning_rate, ema_decay
        self.optimizer = Optimizer(optimizer, dict(optimizer_options), clip_grad_norm)
        self._x64 = precision == "float64"
        if has_large_maps(model, image_shape, **model_options):
            reuse_freed_memory()
        self._num_classes, self._seed = num_classes, seed
        self._build = partial(
            resnet.MODELS[model],
            num_classes,
            image_shape[2],
            **({"image_size": image_shape[:2]} if model == "cnn" else {"remat": remat}),
            **model_options,
            dtype=jnp.dtype(precision),
        )
        with self._precision():
            built = self._build(rngs=nnx.Rngs(seed))
            parts = split(built)
            self.network = Network(
                train_graph=parts.eval if freeze_backbone else parts.train,
                eval_graph=parts.eval,
                mean=np.asarray(mean),
                std=np.asarray(std),
                dtype=parameter_dtype(precision),
                freeze_backbone=freeze_backbone,
                loss=Loss(loss, label_smoothing, class_weights),
            )
            if self.optimizer.is_external:
                check_transformation(optimizer, optimizer_options, self.network.trainable(parts.params))
        self.gradient_fn: GradientFn = compute_gradient
        if accumulate > 1:
            self.gradient_fn = partial(accumulate_gradient, accumulate)
        self.log_gradients = log_gradients
        self._step = partial(
            train_step,
            self.network,
            self.optimizer,
            gradient_fn=self.gradient_fn,
            log_gradients=log_gradients,
            ema_decay=ema_decay,
        )
        self.num_blocks: int = 0 if model == "cnn" else built.num_blocks
        self._initial: Parts | None = parts  # for the first `init` alone: steps donate its arrays
        self._placement = Placement()
        self._chunk, self._accumulate = chunk or best_chunk(), accumulate
        blocks = None
        if on_cpu() and self.device_count == 1 and model != "cnn":  # a single CPU device, a ResNet
            blocks = Blocks(built, self.network)
        needs_whole = freeze_backbone or accumulate > 1 or self.optimizer.is_external
        self._strategy = self._choose_strategy(None if needs_whole else blocks, remat)
        self._eval_step: Callable[..., jax.Array] = blocks.eval_step if blocks else self._whole_eval_step()

    def _choose_strategy(self, blocks: Blocks | None, remat: bool) -> Strategy:
        """Choose how steps are taken; `blocks` is given where a step may be taken block by block."""
        if self._chunk > 1:  # a GPU, or `chunk` is given
            return Chunked(self._step, self._placement, self._chunk)
        if blocks is not None:  # a single CPU device
            options: Any = {"log_gradients": self.log_gradients, "ema_decay": self.ema_decay}
            return Blockwise(blocks, self.optimizer, self._placement, remat=remat, **options)
        if on_cpu() and self._accumulate > 1:
            return Accumulated(self._accumulate, self.network, self._step, self._placement)
        return self.whole()

    def whole(self) -> Whole:
        """Return the strategy that compiles the step as one, which every back end can run."""
        return Whole(self._step, self._placement)

    def _whole_eval_step(self) -> Callable[..., jax.Array]:
        return jax.jit(partial(eval_step, self.network), out_shardings=self._placement.replicated)

    @property
    def device(self) -> str:
        """The devices in words."""
        devices = jax.devices()
        words = f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"
        several = jax.process_count() > 1
        words += f" in {jax.process_count()} processes" if several else ""
        if self.threads is None:
            return words
        return f"{words}, {self.threads} thread{'s' if self.threads > 1 else ''}{' each' if several else ''}"

    @property
    def threads(self) -> int | None:
        """The number of threads with which XLA computes on a CPU, or None for another device.

        JAX does not report it. This is the rule of XLA's CPU client, which reads these variables.
        """
        if jax.default_backend() != "cpu":
            return None
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        given = [os.environ.get(name, "") for name in ("PJRT_NPROC", "NPROC")]
        threads = next((int(number) for number in given if number.isdecimal()), cores)
        return max(threads, jax.local_device_count())

    @property
    def device_count(self) -> int:
        """Number of devices that share a batch; its size must be a multiple of it."""
        return jax.device_count()

    @property
    def is_synchronized(self) -> bool:
        """True if other processes take the same steps: `all_reduce_max` waits for them."""
        return jax.process_count() > 1

    @property
    def holds_images(self) -> bool:
        """True if it saves time to `hold` a data set that fits: on a CPU its memory is the host's."""
        return jax.default_backend() != "cpu"

    def init(self) -> TrainState:
        """Return the state before the first step."""
        with self._precision():
            parts = self._initial or split(self._build(rngs=nnx.Rngs(self._seed)))
            self._initial = None
            opt_state = self._initial_opt_state(parts.params)
            params, batch_stats = parts.params, parts.batch_stats
            ema = None if self.ema_decay is None else copied({"params": params, "batch_stats": batch_stats})
            return self._make_state(params, batch_stats, opt_state, jnp.zeros((), jnp.int32), ema)

    def hold(self, images: np.ndarray, fill: Sequence[int]) -> None:
        """Copy images uint8 [M, H, W, C] to the devices; `train` then takes batches of their indices.

        Such a batch is {"index": int32 [N], "label", "shift": int32 [N, 2], "flip": bool [N], ...}: see
        `strategies.chunked.gather_images`. `fill` [C] pads an image that is shifted.
        """
        held: Any = self._placement.replicate({"images": images, "fill": np.asarray(fill, np.uint8)})
        self._strategy = Chunked(self._step, self._placement, self._chunk, held)

    def train(
        self,
        state: TrainState,
        batches: Iterable[Batch],
        needs_state: Callable[[int], bool] = lambda step: True,
    ) -> Iterator[tuple[Any, Metrics]]:
        """Take one step for each batch; yield the state after it and {"loss", "logits", "label",
        "grad_norm", ...}.

        Where `needs_state` is False for a step (steps count from 1), the next may be taken in the same call
        of a compiled function. Then None is yielded for its state. The division into calls changes no bit.

        A batch may have "drop_path" [N, num_blocks], the factors of the residual branches, and for mixed
        images "label2" and "lam" [N]; see `losses.soft_targets`.

        Raises ValueError, before the step, for labels [N] that are not integers in range(num_classes).

        With several processes, each passes its share of a batch's rows, ordered by process index, and gets
        the metrics of the whole batch. The metrics stay on the device until someone reads them. The state
        that went in is gone (donated).
        """
        step = int(state.step)
        for chunk in chunks_of(map(self._checked, batches), step, self._strategy.max_steps, needs_state):
            with self._precision():
                lrs = np.asarray(
                    [self.learning_rate(step + i) for i in range(len(chunk))], self.network.dtype
                )
                state, rows = self._strategy.run(state, chunk, lrs)
            step += len(chunk)
            for batch, metrics in zip(chunk, rows, strict=True):
                if jax.process_count() == 1:
                    metrics["label"] = batch["label"]  # not the copy on the device
                yield state if metrics is rows[-1] else None, metrics

    def _checked(self, batch: Batch) -> Batch:
        for name in batch.keys() & {"label", "label2"}:
            check_labels(batch[name], self._num_classes)
        wide = batch.keys() & {"drop_path", "lam"}  # float64
        return {**batch, **{name: batch[name].astype(self.network.dtype) for name in wide}}

    def evaluate(self, state: TrainState, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """Yield the logits [N, num_classes] of each batch, with the running statistics; or with the averages,
        where the engine maintains them.

        Batches may differ in size; smaller ones are padded to the size of the first, so that one compiled
        function serves all. Every process passes and receives whole batches, and computes its share.
        """
        size = 0
        for batch in batches:
            n = len(batch["image"])
            size = max(size, n + -n % self.device_count)
            padding = ((0, size - n), (0, 0), (0, 0), (0, 0))
            with self._precision():
                image = np.pad(batch["image"], padding)
                image = jax.make_array_from_process_local_data(self._placement.sharded, image, image.shape)
                weights = state.ema or {"params": state.params, "batch_stats": state.batch_stats}
                logits = self._eval_step(weights["params"], weights["batch_stats"], image)
                yield np.asarray(logits)[:n]

    def first_nonfinite_step(self, state: TrainState) -> int | None:
        """The first step (from 1) whose loss or gradient was not finite, or None; waits for the device."""
        first_nonfinite_step = int(state.first_nonfinite_step)
        return None if first_nonfinite_step < 0 else first_nonfinite_step

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any process passed; every process must call this."""
        if jax.process_count() == 1:
            return number
        return int(process_allgather(np.int32(number)).max())

    def to_tree(self, state: TrainState) -> Tree:
        """The state as {params, batch_stats, optimizer, step}: copies, in PyTorch's layout.

        With `ema_decay` also "ema": {params, batch_stats}.
        """
        moments = state_to_dict(state.opt_state)
        tree: Tree = {"params": state.params, "batch_stats": state.batch_stats, "optimizer": moments}
        if state.ema is not None:
            tree["ema"] = state.ema
        return {**jax.tree.map(to_torch_layout, tree), "step": np.array(state.step)}

    def from_tree(self, tree: Tree) -> TrainState:
        """The inverse of `to_tree`; the tree must have the names and shapes of this engine's own."""
        self._initial = None
        with self._precision():
            names = ["params", "batch_stats", "optimizer"]
            names += [] if self.ema_decay is None else ["ema"]
            native = jax.tree.map(from_torch_layout, {name: tree[name] for name in names})
            return self._from_native({**native, "step": tree["step"]})

    def arrays(self, state: TrainState) -> dict[str, np.ndarray]:
        """Everything in the tree of `to_tree` by its path, but in this engine's layout, and on a CPU not
        copied.

        From another device each call reads the memory again: JAX keeps the first copy of an array.
        """
        parts: Tree = {"params": state.params, "batch_stats": state.batch_stats, "step": state.step}
        parts |= {"optimizer": state_to_dict(state.opt_state), "ema": state.ema}
        with self._precision():
            leaves = jax.tree_util.tree_leaves_with_path(parts if on_cpu() else jax.tree.map(jnp.copy, parts))
        return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}

    def from_arrays(self, arrays: Mapping[str, np.ndarray], reuse: TrainState | None = None) -> TrainState:
        """The inverse of `arrays`. `reuse` is of no use here: a state is made of new arrays."""
        native: Tree = {}
        for path, array in arrays.items():
            *parts, name = path.split("/")
            inner = native
            for part in parts:
                inner = inner.setdefault(part, {})
            inner[name] = np.array(array)
        with self._precision():
            return self._from_native({"batch_stats": {}, "optimizer": {}, **native})  # either may have none

    def _from_native(self, tree: Tree) -> TrainState:
        """The state of a tree in this engine's layout, whose arrays are copies already."""
        template = self._opt_state_template(tree["params"])
        opt_state = state_from_dict(template, tree["optimizer"])
        params = jax.tree.map(jax.device_put, tree["params"])
        batch_stats = jax.tree.map(jax.device_put, tree["batch_stats"])
        step, ema = jnp.array(tree["step"], jnp.int32), jax.tree.map(jax.device_put, tree.get("ema"))
        return self._make_state(params, batch_stats, opt_state, step, ema)

    def _make_state(
        self, params: Tree, batch_stats: Tree, opt_state: Any, step: jax.Array, ema: Tree | None
    ) -> TrainState:
        no_step = jnp.full((), -1, jnp.int32)
        return self._placement.replicate(TrainState(params, batch_stats, opt_state, step, no_step, ema))

    def _opt_state_template(self, params: Mapping[str, Any]) -> optax.OptState:
        """The optimizer's state as shapes and types."""
        optimizer = self.optimizer.transformation(self.learning_rate(0))
        return jax.eval_shape(optimizer.init, self.network.trainable(params))

    def _initial_opt_state(self, params: Mapping[str, Any]) -> optax.OptState:
        """The optimizer's state before the first step, of arrays of NumPy."""
        if self.optimizer.is_external:
            init = jax.jit(self.optimizer.transformation(self.learning_rate(0)).init)
            return jax.tree.map(np.array, init(self.network.trainable(params)))
        # Those of the table begin at zero; optax would compile a function for each shape.
        template = self._opt_state_template(params)
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template)

    def _precision(self) -> Any:
        return jax.enable_x64(self._x64)


def has_large_maps(
    model: str, image_shape: tuple[int, int, int], *, small_images: bool = False, **_: Any
) -> bool:
    """True if the maps after a network's stem have 1,024 pixels or more: then they outweigh its weights."""
    height, width, _channels = image_shape
    full_size = small_images or getattr(resnet.MODELS[model], "func", None) is not resnet.resnet_imagenet
    return height * width >= (1024 if full_size else 16 * 1024)


def copied(tree: Tree) -> Tree:
    """A tree with copies of the arrays: what is donated must not be in a state twice."""
    return jax.tree.map(lambda array: jax.device_put(np.array(array)), tree)


def check_labels(label: np.ndarray, num_classes: int) -> None:
    """Raise ValueError that names the shape, the type or the first wrong label.

    XLA would take -1 for the last class, and give NaN for one that is too large.
    """
    label = np.asarray(label)
    if label.ndim != 1 or not label.size:
        raise ValueError(f"labels must have shape (N,) with N of 1 or more, got {label.shape}")
    if label.dtype.kind not in "iu":
        raise ValueError(f"labels must be integers, got {label.dtype}")
    if not 0 <= label.min() <= label.max() < num_classes:
        index = int(np.argmax((label < 0) | (label >= num_classes)))
        raise ValueError(f"label {index} is {label[index]}, where classes are 0 to {num_classes - 1}")
