"""The training step and the evaluation step: pure functions of a state and a batch.

`train_step` is what every strategy in `strategies/` computes. They differ in how it is compiled and in how
many steps one call takes; `strategies/blockwise.py`, for one CPU device, writes it block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_resnet.layers import on_cpu
from jax_resnet.losses import PLAIN, Loss
from jax_resnet.optimizers import bound_metrics, clip_scale, make_optimizer, parameter_kind
from jax_resnet.state import Arrays, TrainState
from jax_resnet.state_dict import apply
from jax_resnet.transformations import is_external, make_transformation

Batch = Mapping[str, Any]  # {"image": [N, H, W, C], "label": [N]}
Metrics = dict[str, Any]
Tree = Any  # nested dicts of arrays


def train_step(
    network: Network,
    optimizer: Optimizer,
    state: TrainState,
    batch: Batch,
    lr: jax.Array,
    *,
    gradient_fn: GradientFn | None = None,
    log_gradients: bool = False,
    ema_decay: float | None = None,
) -> StepOutput:
    """Take one step of gradient descent.

    Args:
        network: the model and what its images need.
        optimizer: the rule that turns gradients into updates.
        state: the state before the step.
        batch: {"image": [N, H, W, C], "label": [N]}; for mixed images also "label2" and "lam" [N]; with
            stochastic depth also "drop_path" [N, blocks], the factors of the residual branches.
        lr: the learning rate of this step; shape ().
        gradient_fn: how the gradient is computed: None is `compute_gradient`; others are in
            `strategies/accumulate.py`.
        log_gradients: add `gradient_norms` to the metrics.
        ema_decay: the decay per step of `TrainState.ema`; see `update_average`.
    """
    gradient = (gradient_fn or compute_gradient)(network, state.params, state.batch_stats, batch)
    trainable = network.trainable(state.params)
    grads, clipped = clip_gradients(optimizer, gradient.grads)
    update = apply_gradients(optimizer, trainable, state.opt_state, grads, lr)
    metrics = {**merge_metrics([update.metrics]), **clipped}
    if log_gradients:
        metrics |= gradient_norms(gradient.grads)
    step, first_nonfinite_step = count_step(
        state.step, state.first_nonfinite_step, gradient.loss, metrics["grad_norm"]
    )
    params = {**state.params, **update.params}
    ema = state.ema
    if ema_decay is not None:
        latest = {"params": params, "batch_stats": gradient.batch_stats}
        ema = update_average(ema_decay, ema, latest, state.step)
    new_state = TrainState(params, gradient.batch_stats, update.opt_state, step, first_nonfinite_step, ema)
    return StepOutput(new_state, gradient.loss, gradient.logits, batch["label"], metrics)


def compute_gradient(network: Network, params: Arrays, batch_stats: Arrays, batch: Batch) -> Gradient:
    """Compute the loss of a batch and its gradient: forward, then backward.

    The gradient is that of the trainable parameters only: there is no backward pass through a frozen part.
    """
    image, keep = network.normalize(batch["image"]), batch.get("drop_path")

    def loss_fn(trainable: Arrays) -> tuple[jax.Array, tuple[jax.Array, Arrays]]:
        everything = {**params, **trainable}
        logits, new_batch_stats = apply(network.train_graph, everything, batch_stats, image, keep)
        return network.loss(logits, batch), (logits, new_batch_stats)

    loss_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, new_batch_stats)), grads = loss_and_grad(network.trainable(params))
    return Gradient(loss, logits, grads, new_batch_stats)


def clip_gradients(optimizer: Optimizer, grads: Arrays) -> tuple[Arrays, Metrics]:
    """Scale all gradients so that their common L2 norm is at most `optimizer.clip_grad_norm`.

    As `torch.nn.utils.clip_grad_norm_`; see `optimizers.clip_scale`. Returns the gradients and
    {"grad_norm": the norm before}; without clipping, the gradients themselves and {}.
    """
    if optimizer.clip_grad_norm is None:
        return grads, {}
    grad_norm = l2_norm(grads)
    return scale_gradients(grads, clip_scale(grad_norm, optimizer.clip_grad_norm)), {"grad_norm": grad_norm}


def scale_gradients(grads: Arrays, scale: jax.Array) -> Arrays:
    """All gradients times a scalar."""
    return {name: grad * scale.astype(grad.dtype) for name, grad in grads.items()}


def update_average(decay: float, average: Tree, latest: Tree, step: jax.Array) -> Tree:
    """Move exponential moving averages toward the latest values, after `step` + 1 steps:

        average = decay * average + (1 - decay) * latest,    after the first step average = latest

    As `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn(decay)` and `use_buffers=True`,
    updated after every step. There is no warm-up of the decay.

    Args:
        decay: in (0, 1). About 1 / (1 - decay) steps count.
        average, latest: trees of arrays of equal structure.
        step: the number of steps before this one; shape ().
    """

    def move(average: jax.Array, latest: jax.Array) -> jax.Array:
        return jnp.where(step == 0, latest, average + (1 - decay) * (latest - average))

    return jax.tree.map(move, average, latest)


def apply_gradients(
    optimizer: Optimizer, params: Arrays, opt_state: optax.OptState, grads: Arrays, lr: jax.Array
) -> Update:
    """Update parameters, all of them or one block's, by their gradients."""
    updates, opt_state = optimizer.transformation(lr).update(grads, opt_state, params)
    bounds: Metrics = {}
    if not optimizer.is_external:
        bounds = bound_metrics(optimizer.name, opt_state, lr, **optimizer.options)
    metrics = {
        "size": jnp.array(sum(p.size for p in params.values()), jnp.result_type(lr)),
        "grad_norm": l2_norm(grads),
        "update_norm": l2_norm(updates),
        **bounds,
    }
    return Update(optax.apply_updates(params, updates), opt_state, metrics)


def eval_step(network: Network, params: Arrays, batch_stats: Arrays, image: jax.Array) -> jax.Array:
    """Logits [N, num_classes] of images [N, H, W, C], with the running statistics."""
    return apply(network.eval_graph, params, batch_stats, network.normalize(image))[0]


def normalize(image: jax.Array, mean: ArrayLike, std: ArrayLike, dtype: DTypeLike) -> jax.Array:
    """Images [N, H, W, C] of type uint8 as (x / 255 - mean) / std, per channel; others unchanged."""
    if image.dtype != jnp.uint8:
        return image.astype(dtype)
    return (image.astype(dtype) / 255 - jnp.asarray(mean, dtype)) / jnp.asarray(std, dtype)


@dataclass(frozen=True, eq=False)
class Network:
    """The static description of a model, as a step needs it.

    Attributes:
        train_graph, eval_graph: the model in each mode, without its arrays; see `state_dict.apply`.
        mean, std: per channel, for images of type uint8.
        dtype: the type of the normalized images, of the loss and of the learning rate.
        freeze_backbone: only the head `fc` is trained.
        loss: what training minimizes.
    """

    train_graph: nnx.GraphDef[Any]
    eval_graph: nnx.GraphDef[Any]
    mean: ArrayLike
    std: ArrayLike
    dtype: DTypeLike
    freeze_backbone: bool = False
    loss: Loss = PLAIN

    def normalize(self, image: jax.Array) -> jax.Array:
        """Images as the model takes them."""
        return normalize(image, self.mean, self.std, self.dtype)

    def trainable(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that are trained; the optimizer knows of no others."""
        return {name: p for name, p in params.items() if not self.freeze_backbone or name.startswith("fc.")}


@dataclass(frozen=True)
class Optimizer:
    """The static description of an optimizer: its name and keyword arguments.

    Attributes:
        name, options: as `make_optimizer` takes them; of one beside the table, as `make_transformation` does.
        clip_grad_norm: the largest norm of all gradients together; None does not clip.
    """

    name: str
    options: Mapping[str, Any]
    clip_grad_norm: float | None = None

    def transformation(self, lr: float | jax.Array) -> optax.GradientTransformation:
        """The optimizer at a learning rate; the structure of its state does not depend on the rate."""
        if self.is_external:
            return make_transformation(self.name, lr, self.options)
        return make_optimizer(self.name, lr, **self.options)

    @property
    def is_external(self) -> bool:
        """True for a transformation beside the table, which may look at all parameters at once."""
        return is_external(self.name)

    def vectors_with(self, name: str) -> str:
        """The name under which a vector is updated together with others, as one array.

        Vectors with different weight decay must not be one array; see `optimizers.parameter_kind`.
        """
        by_kind = {"norm_weight_decay", "bias_weight_decay"}
        differs = any(self.options.get(option) is not None for option in by_kind)
        return parameter_kind(name) if differs else "vectors"


class Gradient(NamedTuple):
    """The result of a forward and a backward pass."""

    loss: jax.Array  # mean over the batch
    logits: jax.Array  # [N, num_classes]
    grads: Arrays  # of the trainable parameters
    batch_stats: Arrays  # the running statistics after the forward pass


GradientFn = Callable[["Network", Arrays, Arrays, Batch], Gradient]


class Update(NamedTuple):
    """The result of an update; `metrics` holds `size`, the number of parameters, for `merge_metrics`."""

    params: Arrays
    opt_state: optax.OptState
    metrics: Metrics


class StepOutput(NamedTuple):
    """The result of a training step.

    `label` [N] is that of the whole batch, of which each of several processes gave its share.
    """

    state: TrainState
    loss: jax.Array
    logits: jax.Array
    label: jax.Array
    metrics: Metrics

    def log(self) -> Metrics:
        """Everything but the state, as the training loop yields it."""
        return {"loss": self.loss, "logits": self.logits, "label": self.label, **self.metrics}


def merge_metrics(parts: Sequence[Metrics]) -> Metrics:
    """Combine the metrics of the updates of parts of the parameters; bounds are the same for every part."""
    first, total = parts[0], sum(part["size"] for part in parts)
    metrics: Metrics = {name: first[name] for name in first if name.endswith("_bound")}
    for name in ("grad_norm", "update_norm"):
        metrics[name] = optax.tree.norm([part[name] for part in parts])
    for name in first.keys() & {"at_lower", "at_upper"}:
        metrics[name] = sum(part[name] * part["size"] for part in parts) / total
    return metrics


def count_step(
    step: jax.Array, first_nonfinite_step: jax.Array, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The counters of `TrainState` after a step with this loss and gradient."""
    step = step + 1
    is_first = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm)) & (first_nonfinite_step < 0)
    return step, jnp.where(is_first, step, first_nonfinite_step)


def gradient_norms(grads: Mapping[str, jax.Array]) -> Metrics:
    """The L2 norm of each parameter's gradient: {"grad_norm/NAME": shape ()}.

    Behind a barrier, so that XLA computes the update with the same bits as without these norms.
    """
    grads = jax.lax.optimization_barrier(dict(grads))
    return {f"grad_norm/{name}": optax.tree.norm(grad) for name, grad in grads.items()}


def l2_norm(arrays: Mapping[str, jax.Array]) -> jax.Array:
    """The L2 norm of all numbers of {name: array}.

    The vectors, two thirds of a ResNet's arrays, are summed as one: XLA compiles, and loads from its cache,
    each sum by itself, which for ResNet-101 takes seconds. The barrier is for CPUs: without it XLA notices
    that Adam squares the gradient, too, and writes the squares to memory for both.
    """
    if on_cpu():
        arrays = jax.lax.optimization_barrier(dict(arrays))
    vectors = [x for x in arrays.values() if x.ndim == 1]
    others = [x for x in arrays.values() if x.ndim != 1]
    return optax.tree.norm([*others, jnp.concatenate(vectors)] if vectors else others)
