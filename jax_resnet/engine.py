"""The JAX engine: a jitted training step over plain dicts, and the loop that drives it.

The loop is a generator that yields after each step. Logging, saving, early stopping and signals are the
caller's, once for all engines. Batches lie sharded over the `data` axis of a mesh of all devices, those of
other processes included, and the state is replicated, so that one device, eight, or two hosts are the same
code and batch norm sees the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_resnet import resnet
from jax_resnet.blockwise import Blockwise, jit_for_cpu
from jax_resnet.chunks import Batch, Row, best_chunk, chunks_of
from jax_resnet.layers import parameter_dtype, use_matmul
from jax_resnet.optimizers import bound_metrics, make_optimizer, state_from_dict, state_to_dict
from jax_resnet.pictures import normalize, picture
from jax_resnet.state_dict import Parts, apply, from_torch_layout, split, to_torch_layout

State = dict[str, Any]  # {params, batch_stats, optimizer, step, first_nonfinite_step}
Params = dict[str, jax.Array]
Metrics = dict[str, Any]
Tree = dict[str, Any]


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
        precision: "float32", "bfloat16" (compute only) or "float64".
        seed: seed of the initial weights.
        freeze_backbone: only the head `fc` is trained; everything before it computes as in evaluation.
        accumulate: how many micro-batches a batch is taken in, one after another, for the memory of one.
            Gradients are averaged; batch norm sees a micro-batch, and its running statistics move with each.
        remat: backward computes each residual block anew instead of keeping what is inside.
        chunk: the most steps that one call of a compiled program takes; None is what suits the back end.
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
        accumulate: int = 1,
        remat: bool = False,
        chunk: int | None = None,
    ) -> None:
        self.learning_rate = learning_rate
        self._x64 = precision == "float64"
        self._mean, self._std = np.asarray(mean), np.asarray(std)
        self._optimizer, self._optimizer_options = optimizer, dict(optimizer_options)
        extra = {"image_size": image_shape[:2]} if model == "cnn" else {"remat": remat}
        self._accumulate = accumulate
        self._build = partial(
            resnet.MODELS[model],
            num_classes,
            image_shape[2],
            **extra,
            **model_options,
            dtype=jnp.dtype(precision),
        )
        self._seed, self._frozen, self._num_classes = seed, freeze_backbone, num_classes
        with self._precision():
            self._dtype = parameter_dtype(precision)
            network = self._build(rngs=nnx.Rngs(seed))
            parts = split(network)
        self._graph = {"train": parts.eval if freeze_backbone else parts.train, "eval": parts.eval}
        self._initial: Parts | None = parts  # until `init` or `from_tree`: steps take over what they get
        mesh = Mesh(np.array(jax.devices()), ("data",))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        self._sharded = NamedSharding(mesh, PartitionSpec("data"))
        self._chunked = NamedSharding(mesh, PartitionSpec(None, "data"))
        self.chunk = chunk or best_chunk()
        self._pictures: dict[str, jax.Array] = {}
        self._whole_step = jax.jit(self._step, donate_argnums=0, out_shardings=self._replicated)
        self._train_step: Any = self._whole_step
        self._train_steps = jax.jit(self._steps, donate_argnums=0, out_shardings=self._replicated)
        self._eval_step: Any = jax.jit(self._logits, out_shardings=self._replicated)
        if use_matmul() and self.device_count == 1 and model != "cnn":
            self._blockwise = Blockwise(network, cross_entropy, self._descend)
            self._normalize_alone = jit_for_cpu(self._normalize)
            self._summarize_alone = jit_for_cpu(self._summarize)
            self._eval_step = self._logits_blockwise
            if not (remat or freeze_backbone or accumulate > 1):
                self._train_step = self._step_blockwise

    @property
    def device(self) -> str:
        """The devices in words."""
        devices = jax.devices()
        processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
        return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){processes}"

    @property
    def device_count(self) -> int:
        """How many devices share a batch; its size must be a multiple of it."""
        return jax.device_count()

    def init(self) -> State:
        """The state before the first step."""
        with self._precision():
            parts, self._initial = self._initial or split(self._build(rngs=nnx.Rngs(self._seed))), None
            # Every optimizer begins at zero; optax would compile a program for each shape.
            template = self._optimizer_template(parts.params)
            state = {
                "params": parts.params,
                "batch_stats": parts.batch_stats,
                "optimizer": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template),
                "step": jnp.zeros((), jnp.int32),
                "first_nonfinite_step": jnp.full((), -1, jnp.int32),
            }
            return self._replicate(state)

    @property
    def compiles(self) -> bool:
        """True: the first step waits for XLA."""
        return True

    @property
    def is_synchronized(self) -> bool:
        """True if other processes take the same steps: `all_reduce_max` waits for them."""
        return jax.process_count() > 1

    @property
    def holds_images(self) -> bool:
        """Whether it is worth while to `hold` a data set that fits: on a CPU its memory is the host's."""
        return jax.default_backend() != "cpu"

    def hold(self, image: np.ndarray, fill: Sequence[int]) -> None:
        """Keep pictures uint8 [M, H, W, C] on the devices; `train` may then be given their indices instead.

        Such a batch is {"index": int32 [N], "label", "shift": int32 [N, 2], "flip": bool [N]}: see
        `pictures.picture`. `fill` [C] is what surrounds a picture that is shifted.
        """
        self._pictures = self._replicate({"image": image, "fill": np.asarray(fill, np.uint8)})

    def train(
        self, state: State, batches: Iterable[Batch], needs_state: Callable[[int], bool] = lambda step: True
    ) -> Iterator[tuple[Any, Metrics]]:
        """Take one step for each batch; yields the state after it and {"loss", "logits", "label",
        "grad_norm", ...}.

        A step is followed by others in the same call of the program where `needs_state` is false of it (steps
        count from 1): then None stands for its state. How steps are divided into calls changes no bit.

        Raises ValueError, before the step, for labels [N] that are not integers in range(num_classes).

        Of several processes each gives its share of the rows of a batch, in the order of their numbers, and
        is given the metrics of the whole batch. They stay on the device until someone reads them, and the
        state that went in is gone (donated).
        """
        step, batches = int(state["step"]), map(self._checked, batches)
        if self.chunk > 1 or self._pictures:
            yield from self._train_in_chunks(state, step, batches, needs_state)
            return
        for batch in batches:
            with self._precision():
                lr = np.asarray(self.learning_rate(step), self._dtype)
                state, metrics = self._train_step(state, self._place(batch), lr)
            step += 1
            if jax.process_count() == 1:
                metrics["label"] = batch["label"]
            yield state, metrics

    def _checked(self, batch: Batch) -> Batch:
        check_labels(batch["label"], self._num_classes)
        return batch

    def _train_in_chunks(
        self, state: State, step: int, batches: Iterable[Batch], needs_state: Callable[[int], bool]
    ) -> Iterator[tuple[Any, Metrics]]:
        for chunk in chunks_of(batches, step, self.chunk, needs_state):
            rates = [self.learning_rate(step + min(i, len(chunk) - 1)) for i in range(self.chunk)]
            full = [*chunk, *chunk[-1:] * (self.chunk - len(chunk))]  # what is too many is not computed
            stacked = {name: np.stack([batch[name] for batch in full]) for name in chunk[0]}
            with self._precision():
                placed = jax.make_array_from_process_local_data(self._chunked, stacked)
                lrs = np.asarray(rates, self._dtype)
                state, metrics = self._train_steps(state, self._pictures, placed, lrs, len(chunk))
            step += len(chunk)
            for i, batch in enumerate(chunk):
                row: Metrics = {name: Row(values, i) for name, values in metrics.items()}
                if jax.process_count() == 1:
                    row["label"] = batch["label"]
                yield state if i + 1 == len(chunk) else None, row

    def evaluate(self, state: State, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """The logits [N, num_classes] of each batch, with the running statistics.

        Batches may differ in size; smaller ones are filled up to the size of the first, so that one program
        serves. Every process gives, and is given, whole batches, of which it computes its share.
        """
        size = 0
        for batch in batches:
            n = len(batch["image"])
            size = max(size, n + -n % self.device_count)
            padding = ((0, size - n), (0, 0), (0, 0), (0, 0))
            with self._precision():
                image = np.pad(batch["image"], padding)
                image = jax.make_array_from_process_local_data(self._sharded, image, image.shape)
                logits = self._eval_step(state["params"], state["batch_stats"], image)
                yield np.asarray(logits)[:n]

    def first_nonfinite_step(self, state: State) -> int | None:
        """The first step (from 1) whose loss or gradient was not finite, or None; waits for the device."""
        first_nonfinite_step = int(state["first_nonfinite_step"])
        return None if first_nonfinite_step < 0 else first_nonfinite_step

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any process passed; every process must call this."""
        if jax.process_count() == 1:
            return number
        return int(process_allgather(np.int32(number)).max())

    def to_tree(self, state: State) -> Tree:
        """The engine-neutral tree {params, batch_stats, optimizer, step}: copies, in PyTorch's layout."""
        fields = state_to_dict(state["optimizer"])
        tree = {"params": state["params"], "batch_stats": state["batch_stats"], "optimizer": fields}
        return {**jax.tree.map(to_torch_layout, tree), "step": np.array(state["step"])}

    def from_tree(self, tree: Tree) -> State:
        """The inverse of `to_tree`; the tree must have the names and shapes of this engine's own."""
        self._initial = None
        with self._precision():
            native = jax.tree.map(
                from_torch_layout, {k: tree[k] for k in ("params", "batch_stats", "optimizer")}
            )
            template = self._optimizer_template(native["params"])
            state = {
                "params": jax.tree.map(jax.device_put, native["params"]),  # copies already
                "batch_stats": jax.tree.map(jax.device_put, native["batch_stats"]),
                "optimizer": state_from_dict(template, native["optimizer"]),
                "step": jnp.array(tree["step"], jnp.int32),
                "first_nonfinite_step": jnp.full((), -1, jnp.int32),
            }
            return self._replicate(state)

    def _make_optimizer(self, lr: float | jax.Array) -> optax.GradientTransformation:
        return make_optimizer(self._optimizer, lr, **self._optimizer_options)

    def _optimizer_template(self, params: Mapping[str, Any]) -> optax.OptState:
        """The optimizer's state as shapes and types."""
        return jax.eval_shape(self._make_optimizer(self.learning_rate(0)).init, self._trained(params))

    def _trained(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that are trained; the optimizer knows of no others."""
        return {name: p for name, p in params.items() if not self._frozen or name.startswith("fc.")}

    def _precision(self) -> Any:
        return jax.enable_x64(self._x64)

    def _place(self, batch: Batch) -> dict[str, jax.Array]:
        return jax.make_array_from_process_local_data(self._sharded, dict(batch))

    def _replicate(self, state: State) -> State:
        """A state that every process has made alike, as arrays that all devices hold."""
        if jax.process_count() == 1:
            return jax.device_put(state, self._replicated)

        def spread(x: jax.Array) -> jax.Array:
            return jax.make_array_from_process_local_data(self._replicated, np.asarray(x), x.shape)

        return jax.tree.map(spread, state)

    def _normalize(self, image: jax.Array) -> jax.Array:
        return normalize(image, self._mean, self._std, self._dtype)

    def _logits(
        self, params: Mapping[str, jax.Array], stats: Mapping[str, jax.Array], image: jax.Array
    ) -> jax.Array:
        return apply(self._graph["eval"], params, stats, self._normalize(image))[0]

    def _step(self, state: State, batch: Mapping[str, jax.Array], lr: jax.Array) -> tuple[State, Metrics]:
        """One step of gradient descent, pure: forward, backward, update."""
        trained = self._trained(state["params"])
        if self._accumulate == 1:
            loss, logits, grads, batch_stats = self._gradient(state, state["batch_stats"], batch)
        else:
            loss, logits, grads, batch_stats = self._gradient_of_parts(state, batch)
        trained, optimizer, each = self._descend(trained, state["optimizer"], grads, lr)
        metrics, counts = self._summarize(state, loss, [each])
        params = {**state["params"], **trained}
        new_state = {"params": params, "batch_stats": batch_stats, "optimizer": optimizer, **counts}
        return new_state, {"logits": logits, "label": batch["label"], **metrics}

    def _step_blockwise(
        self, state: State, batch: Mapping[str, jax.Array], lr: jax.Array
    ) -> tuple[State, Metrics]:
        """`_step`, but for rounding, in a row of programs; the state that went in is gone, too."""
        image, label = self._normalize_alone(batch["image"]), batch["label"]
        params, stats, optimizer = state["params"], state["batch_stats"], state["optimizer"]
        params, stats, optimizer, each, loss, logits = self._blockwise.step(
            params, stats, optimizer, image, label, lr
        )
        metrics, counts = self._summarize_alone(
            {k: state[k] for k in ("step", "first_nonfinite_step")}, loss, each
        )
        new_state = {"params": params, "batch_stats": stats, "optimizer": optimizer, **counts}
        return new_state, {"logits": logits, "label": label, **metrics}

    def _descend(
        self, params: Params, optimizer: optax.OptState, grads: Params, lr: jax.Array
    ) -> tuple[Params, optax.OptState, Metrics]:
        """Parameters, all or some, and the optimizer's state for them, after an update by their gradients."""
        updates, optimizer = self._make_optimizer(lr).update(grads, optimizer, params)
        metrics = {
            "size": jnp.array(sum(p.size for p in params.values()), self._dtype),
            "grad_norm": norm(grads),
            "update_norm": norm(updates),
            **bound_metrics(self._optimizer, optimizer, lr, **self._optimizer_options),
        }
        return optax.apply_updates(params, updates), optimizer, metrics

    def _summarize(
        self, state: Mapping[str, Any], loss: jax.Array, parts: Sequence[Metrics]
    ) -> tuple[Metrics, dict[str, jax.Array]]:
        """The metrics of a step, from those of the updates of parts of the parameters; the counts after."""
        first, total = parts[0], sum(part["size"] for part in parts)
        metrics = {"loss": loss, **{name: first[name] for name in first if name.endswith("_bound")}}
        for name in ("grad_norm", "update_norm"):
            metrics[name] = optax.tree.norm([part[name] for part in parts])
        for name in first.keys() & {"at_lower", "at_upper"}:
            metrics[name] = sum(part[name] * part["size"] for part in parts) / total
        step = state["step"] + 1
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])) & (state["first_nonfinite_step"] < 0)
        return metrics, {
            "step": step,
            "first_nonfinite_step": jnp.where(bad, step, state["first_nonfinite_step"]),
        }

    def _logits_blockwise(self, params: Params, stats: Params, image: jax.Array) -> jax.Array:
        return self._blockwise.logits(params, stats, self._normalize_alone(image))

    def _steps(
        self,
        state: State,
        pictures: Mapping[str, jax.Array],
        batches: Mapping[str, jax.Array],
        lrs: jax.Array,
        count: jax.Array,
    ) -> tuple[State, Metrics]:
        """The first `count` of the steps whose batches and rates are stacked along the first axis.

        The count is an argument, so that chunks of any length are one program, and the bits of a step do not
        hang on the chunk that it is in.
        """

        def nth(i: Any) -> tuple[dict[str, jax.Array], jax.Array]:
            batch = {name: x[i] for name, x in batches.items()}
            if pictures:
                image = picture(pictures["image"], pictures["fill"], batch)
                batch = {"image": image, "label": batch["label"]}
            return batch, lrs[i]

        def step(i: jax.Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, kept = carry
            state, latest = self._step(state, *nth(i))
            return state, jax.tree.map(lambda rows, row: rows.at[i].set(row), kept, latest)

        _, one = jax.eval_shape(self._step, state, *nth(0))
        kept = jax.tree.map(lambda x: jnp.zeros((len(lrs), *x.shape), x.dtype), one)
        return jax.lax.fori_loop(0, count, step, (state, kept))

    def _gradient(
        self, state: State, stats: Params, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, Params, Params]:
        """The mean loss of a batch, its logits, the gradient, and the batch statistics after it.

        Only parameters that are trained are differentiated by: there is no backward through a frozen part.
        """
        image = self._normalize(batch["image"])

        def loss_fn(trained: Params) -> tuple[jax.Array, tuple[jax.Array, Params]]:
            logits, after = apply(self._graph["train"], {**state["params"], **trained}, stats, image)
            return cross_entropy(logits, batch["label"]), (logits, after)

        trained = self._trained(state["params"])
        (loss, (logits, after)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
        return loss, logits, grads, after

    def _gradient_of_parts(
        self, state: State, batch: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array, Params, Params]:
        """What `_gradient` gives, from `accumulate` micro-batches in a loop, of which one is in memory.

        Micro-batch i has the examples i, i + accumulate, ...: each device has its share of every one.
        """
        k = self._accumulate

        def add(carry: tuple[Any, Params], part: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
            sums, stats = carry
            loss, logits, grads, stats = self._gradient(state, stats, part)
            return (jax.tree.map(jnp.add, sums, (loss, grads)), stats), logits

        parts = {name: jnp.moveaxis(x.reshape(-1, k, *x.shape[1:]), 1, 0) for name, x in batch.items()}
        zeros = jax.tree.map(jnp.zeros_like, self._trained(state["params"]))
        start = (jnp.zeros((), self._dtype), zeros), state["batch_stats"]
        (sums, stats), logits = jax.lax.scan(add, start, parts)
        loss, grads = jax.tree.map(lambda total: total / k, sums)
        return loss, jnp.moveaxis(logits, 0, 1).reshape(-1, logits.shape[-1]), grads, stats


def norm(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """The L2 norm of all numbers of {name: array}.

    The vectors, two thirds of a ResNet's arrays, are summed as one: XLA compiles, and loads from its cache,
    each sum by itself, which for ResNet-101 takes seconds. The barrier is for CPUs: without it XLA finds that
    Adam squares the gradient, too, and writes the squares to memory for both.
    """
    if use_matmul():
        arrays = jax.lax.optimization_barrier(dict(arrays))
    vectors = [x for x in arrays.values() if x.ndim == 1]
    rest = [x for x in arrays.values() if x.ndim != 1]
    return optax.tree.norm([*rest, jnp.concatenate(vectors)] if vectors else rest)


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Mean over the batch of -log softmax(logits [N, C])[label [N]]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()


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
