"""The optimizer table: every optimizer by its name, with PyTorch's meaning of each argument.

Adam, AdamW and SGD are optax's own. AMSGrad is PyTorch's; optax's differs, as it keeps the maximum of the
bias-corrected second moment. AdaBound and its variants are in `adabound.py`.

`state_to_dict` and `state_from_dict` turn optax's nested tuples into plain data and back, so that none of
optax's types reaches a checkpoint.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from jax.typing import DTypeLike

from jax_resnet.adabound import (
    Scalar,
    adabound,
    adabound_bounds,
    adaboundw,
    amsbound,
    bound_ratio,
    check_hyperparameters,
    is_zero,
    one_minus_power,
    scale_by_moments,
    sgdbound,
    unclipped_size,
)

OPTIMIZERS = ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
BOUNDED = ("adabound", "amsbound", "adaboundw", "sgdbound")
DECOUPLED = ("adaboundw", "adamw")


class ScaleByAmsgradState(NamedTuple):
    """State of AMSGrad in PyTorch's form.

    Attributes:
        count: number of updates made; shape (), int32.
        mu: exponential average of the gradients; shapes of the parameters, in `mu_dtype` or at least float32.
        nu: exponential average of the squared gradients; at least float32.
        nu_max: element-wise maximum of every `nu` so far. None of the three is bias-corrected.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


def scale_by_amsgrad(
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    r"""Rescale updates according to AMSGrad as `torch.optim.Adam(amsgrad=True)` computes it.

    With $t$ from 1 and $m_t$, $v_t$ as in Adam, the maximum is taken *before* bias correction:

    $$ \hat v_t = \max(\hat v_{t-1}, v_t), \qquad
       u_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v_t / (1 - \beta_2^t) + \epsilon_r} + \epsilon} $$

    Args:
        b1: decay rate, per step, of the exponential average of the gradients.
        b2: decay rate, per step, of the exponential average of the squared gradients.
        eps: added to the corrected root of the second moment; in units of the gradient.
        eps_root: $\epsilon_r$, to differentiate through an update where a gradient may be 0.
        mu_dtype: the type `mu` is stored in; by default that of the parameter, at least float32.

    Returns:
        The transformation. Its updates are not yet multiplied by the (negative) learning rate.

    Raises:
        ValueError: if an argument that is a number of Python or NumPy is out of its range; in `init`, if a
            parameter is not of a real floating-point type.

    References:
        Reddi et al, `On the Convergence of Adam and Beyond <https://arxiv.org/abs/1904.09237>`_, 2018
    """
    check_hyperparameters(b1=b1, b2=b2, eps=eps, eps_root=eps_root)

    def step(
        grads: optax.Updates, mu: optax.Updates, nu_max: optax.Updates, count: jax.Array
    ) -> optax.Updates:
        correction1, correction2 = one_minus_power(b1, count), jnp.sqrt(one_minus_power(b2, count))

        def leaf(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            root = correction2.astype(v.dtype)
            if not is_zero(eps_root):
                v = v + eps_root * root**2
            denominator = jnp.sqrt(v) / root + eps
            return (m / correction1.astype(m.dtype) / denominator).astype(g.dtype)

        return jax.tree.map(leaf, grads, mu, nu_max)

    return scale_by_moments(ScaleByAmsgradState, step, b1, b2, mu_dtype)


def amsgrad(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AMSGrad as `torch.optim.Adam(amsgrad=True)` computes it; `optax.amsgrad` differs.

    See :func:`scale_by_amsgrad` for the equations, arguments and errors.

    Args:
        learning_rate: the step size: a number, a scalar array, or a schedule from update count (from 0).
        weight_decay: the L2 penalty, added to the gradient.
        mask: which parameters decay, as in `optax.adamw`: a tree of bools, or a function of the
            parameters that returns one. By default all do.

    Returns:
        The optimizer. `update` needs `params`.
    """
    check_hyperparameters(learning_rate=learning_rate, weight_decay=weight_decay)
    scale = scale_by_amsgrad(b1, b2, eps, eps_root, mu_dtype=mu_dtype)
    l2 = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(l2, scale, optax.scale_by_learning_rate(learning_rate))


def make_optimizer(
    name: str,
    learning_rate: Scalar,
    *,
    base_lr: Scalar | None = None,
    final_lr: Scalar = 0.1,
    gamma: Scalar = 1e-3,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    momentum: Scalar = 0.9,
    weight_decay: Scalar | None = None,
    norm_weight_decay: Scalar | None = None,
    bias_weight_decay: Scalar | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """Return the optimizer of a name; arguments that it does not use are ignored.

    The learning rate is usually an argument of the jitted training step, which builds the optimizer inside:
    the structure of the state depends on `name` alone.

    Args:
        name: one of `OPTIMIZERS`.
        learning_rate: that of this step, a number or a scalar array; a schedule is evaluated by the caller.
        base_lr: the four of `BOUNDED`: the rate to which `final_lr` belongs, usually the schedule's
            peak. Required unless `learning_rate` is a number of Python or NumPy.
        final_lr: the same four: SGD's step size, which the bounds converge to.
        gamma: the same four: how fast the bounds converge, per step.
        b1: all but sgd: decay rate, per step, of the exponential average of the gradients.
        b2: all but sgd and sgdbound: the same of the squared gradients.
        eps: all but sgd and sgdbound: added to the root of the second moment; in units of the gradient.
        momentum: sgd: the factor, per step, of the sum of past gradients, as in `torch.optim.SGD`.
        weight_decay: for the names that end in w, decoupled from the gradient and scaled by the learning
            rate; for the others, L2: added to the gradient. Of all parameters, as in PyTorch. The default,
            None, is PyTorch's: 0.01 for adamw, else 0.
        norm_weight_decay: the weight decay of batch norm's parameters in place of `weight_decay`, of flat
            parameters {torchvision name: array}; None makes no difference. See `weight_decay_of`.
        bias_weight_decay: the same of all biases.
        nesterov: sgd: Nesterov's momentum, as `torch.optim.SGD(nesterov=True)`.

    Returns:
        The optimizer. `update` needs `params`.

    Raises:
        ValueError: if the name is unknown, `base_lr` is missing, or an argument that is a number of Python or
            NumPy is out of its range; `nesterov` with sgd without momentum.
    """
    if weight_decay is None:
        weight_decay = 0.01 if name == "adamw" else 0.0
    check_hyperparameters(
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, momentum=momentum, weight_decay=weight_decay
    )
    if norm_weight_decay is not None or bias_weight_decay is not None:
        for decay in (norm_weight_decay, bias_weight_decay):
            check_hyperparameters(weight_decay=0.0 if decay is None else decay)
        decays = partial(
            weight_decay_of,
            weight_decay=weight_decay,
            norm_weight_decay=norm_weight_decay,
            bias_weight_decay=bias_weight_decay,
        )
        options: dict[str, Any] = {"base_lr": base_lr, "final_lr": final_lr, "gamma": gamma}
        options |= {"b1": b1, "b2": b2, "eps": eps, "momentum": momentum, "nesterov": nesterov}
        optimizer = make_optimizer(name, learning_rate, **options, weight_decay=0.0)
        if name in DECOUPLED:
            return optax.chain(optimizer, _add_decayed(lambda name: -learning_rate * decays(name)))
        return optax.chain(_add_decayed(decays), optimizer)
    l2 = optax.add_decayed_weights(weight_decay)
    adam: dict[str, Any] = {"b1": b1, "b2": b2, "eps": eps}
    bound: dict[str, Any] = {"final_lr": final_lr, "base_lr": base_lr, "gamma": gamma}
    bound |= {**adam, "weight_decay": weight_decay}
    match name:
        case "adam":
            return optax.chain(l2, optax.adam(learning_rate, **adam))
        case "adabound" | "amsbound" | "adaboundw":
            make = {"adabound": adabound, "amsbound": amsbound, "adaboundw": adaboundw}[name]
            return make(learning_rate, **bound)
        case "sgdbound":
            return sgdbound(learning_rate, **{k: v for k, v in bound.items() if k not in ("b2", "eps")})
        case "amsgrad":
            return amsgrad(learning_rate, **adam, weight_decay=weight_decay)
        case "adamw":
            return optax.adamw(learning_rate, **adam, weight_decay=weight_decay)
        case "sgd":
            if nesterov and is_zero(momentum):
                raise ValueError("nesterov needs a momentum above 0")
            return optax.chain(l2, optax.sgd(learning_rate, momentum, nesterov))
    raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")


def parameter_kind(name: str) -> str:
    """Return the kind of a parameter, from its torchvision name: what its weight decay depends on.

    Batch norms are called bn1, bn2, bn3 and downsample.1.

    Examples:
        >>> [parameter_kind(name) for name in ("layer1.0.bn2.weight", "layer2.0.downsample.1.bias")]
        ['norm.weight', 'norm.bias']
        >>> [parameter_kind(name) for name in ("conv1.weight", "fc.bias")]
        ['weight', 'bias']
    """
    *modules, last = name.split(".")
    of_norm = modules[-2:] == ["downsample", "1"] or (modules and modules[-1].startswith(("bn", "norm")))
    return f"norm.{last}" if of_norm else last


def weight_decay_of(
    name: str,
    weight_decay: Scalar,
    norm_weight_decay: Scalar | None = None,
    bias_weight_decay: Scalar | None = None,
) -> Scalar:
    """Return the weight decay of a parameter of that name.

    As torchvision's `set_weight_decay`, called as its training script does: `bias_weight_decay` is that of
    all biases, batch norm's too; `norm_weight_decay` that of batch norm's other parameters. Where one is
    None, the next rule applies, and at last `weight_decay`.

    Examples:
        >>> [weight_decay_of(name, 1e-4, 0.0) for name in ("conv1.weight", "bn1.weight", "bn1.bias")]
        [0.0001, 0.0, 0.0]
        >>> weight_decay_of("bn1.bias", 1e-4, 0.0, 1e-5)
        1e-05

    Source: torchvision, references/classification/utils.py
    """
    kind = parameter_kind(name)
    if kind.endswith("bias") and bias_weight_decay is not None:
        return bias_weight_decay
    if kind.startswith("norm.") and norm_weight_decay is not None:
        return norm_weight_decay
    return weight_decay


def _add_decayed(factor: Callable[[str], Any]) -> optax.GradientTransformation:
    """Add `factor(name)` times the parameter to each update of flat parameters {name: array}."""

    def add(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        assert isinstance(updates, Mapping)
        assert isinstance(params, Mapping)
        return {name: u + jnp.asarray(factor(name), u.dtype) * params[name] for name, u in updates.items()}

    return optax.stateless(add)


def clip_scale(grad_norm: jax.Array, max_norm: float) -> jax.Array:
    """The factor of all gradients that brings their common L2 norm down to `max_norm`:

        min(1, max_norm / (grad_norm + 1e-6))

    NaN for a norm that is NaN, and 0 for an infinite one, which leaves NaN of the infinite gradients.

    Args:
        grad_norm: the L2 norm of all gradients as one vector; shape ().
        max_norm: positive.

    References:
        Pascanu et al, `On the difficulty of training recurrent neural networks
        <https://arxiv.org/abs/1211.5063>`_, 2013; `torch.nn.utils.clip_grad_norm_`
    """
    return jnp.minimum(max_norm / (grad_norm + 1e-6), 1.0)


def bound_metrics(
    name: str, opt_state: optax.OptState, learning_rate: Scalar, **options: Scalar | None
) -> dict[str, jax.Array]:
    """The bounds of the latest step and how much they clipped; empty for an optimizer that has none.

    Args:
        name, learning_rate, options: the arguments of `make_optimizer`, with its defaults.
        opt_state: the optimizer's state after the step, of flat parameters {name: array}.

    Returns:
        Scalars: `lower_bound` and `upper_bound` of the step size, `at_lower` and `at_upper`, the fractions of
        all coordinates that were clipped to each. Inside a jitted step, XLA computes only
        once what the update needs too.
    """
    if name not in BOUNDED:
        return {}
    given: dict[str, Any] = {**(make_optimizer.__kwdefaults__ or {}), **options}
    fields = state_to_dict(opt_state)
    count = fields["count"]
    ratio = bound_ratio(learning_rate, given["final_lr"], given["base_lr"])
    lower, upper = adabound_bounds(count, ratio, given["gamma"])
    sizes = [jnp.ones(())]  # sgdbound: one for all
    if "nu" in fields:
        second = fields.get("nu_max", fields["nu"])
        constants = (given["b1"], given["b2"], given["eps"])
        sizes = [unclipped_size(nu, count, *constants) for nu in jax.tree.leaves(second)]
    total = sum(size.size for size in sizes)
    clipped = {
        "at_lower": sum(jnp.sum(size < lower.astype(size.dtype)) for size in sizes),
        "at_upper": sum(jnp.sum(size > upper.astype(size.dtype)) for size in sizes),
    }
    bounds = {"lower_bound": learning_rate * lower, "upper_bound": learning_rate * upper}
    return {**bounds, **{key: jnp.asarray(n, lower.dtype) / total for key, n in clipped.items()}}


def state_to_dict(opt_state: optax.OptState) -> dict[str, Any]:
    """The state of an optimizer as nested dicts, of only the fields that it has.

    Names are those of the fields. Positions in the tuples of a chain are left out, unless two arrays would
    have one name.

    Args:
        opt_state: the state of an optimizer, of flat parameters {name: array}.

    Returns:
        {"count": array, "mu": {name: array}, "nu": {name: array}, ...}; the arrays are not copied.
    """
    fields: dict[str, Any] = {}
    for names, leaf in zip(_names(opt_state), jax.tree.leaves(opt_state), strict=True):
        inner = fields
        for name in names[:-1]:
            inner = inner.setdefault(name, {})
        inner[names[-1]] = leaf
    return fields


def _names(opt_state: optax.OptState) -> list[tuple[str, ...]]:
    """The names of each array in the nested dicts of `state_to_dict`, in JAX's order."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(opt_state)]

    def without(kinds: tuple[type, ...]) -> list[tuple[str, ...]]:
        keys = ([key for key in path if not isinstance(key, kinds)] for path in paths)
        return [tuple(keystr((key,), simple=True) for key in path) or ("state",) for path in keys]

    short = without((jax.tree_util.SequenceKey,))
    ordered = sorted(short)  # the start of another name stands right before it
    clash = any(longer[: len(names)] == names for names, longer in itertools.pairwise(ordered))
    return without(()) if clash else short


def _entries(fields: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """{"mu": {"fc.weight": array}} as {"mu.fc.weight": array}."""
    entries: dict[str, Any] = {}
    for name, value in fields.items():
        inside = isinstance(value, Mapping)
        entries |= _entries(value, f"{start}{name}.") if inside else {start + name: value}
    return entries


def state_from_dict(template: optax.OptState, mapping: Mapping[str, Any]) -> optax.OptState:
    """The inverse of `state_to_dict`.

    Args:
        template: the state of the optimizer that continues, as `tx.init(params)` or
            `jax.eval_shape(tx.init, params)` gives it. Structure, shapes and types are taken from it.
        mapping: what `state_to_dict` returned, of arrays of NumPy or JAX.

    Returns:
        A state like `template` that holds copies of the arrays of `mapping`.

    Raises:
        ValueError: if entries are missing, unexpected or of another shape; it names them.
    """
    leaves, structure = jax.tree.flatten(template)
    expected = dict(zip(map(".".join, _names(template)), leaves, strict=True))
    given = _entries(mapping)
    problems = [f"{name} is missing" for name in expected if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in expected]
    problems += [
        f"{name} has shape {jnp.shape(given[name])}, not {jnp.shape(like)}"
        for name, like in expected.items()
        if name in given and jnp.shape(given[name]) != jnp.shape(like)
    ]
    if problems:
        raise ValueError(f"the optimizer state does not fit: {'; '.join(problems)}")
    # Copies, by NumPy: an alias of the caller's memory must not be donated to a training step, and JAX would
    # compile a function for each shape
    copies = [jax.device_put(np.array(given[name], like.dtype)) for name, like in expected.items()]
    return jax.tree.unflatten(structure, copies)
