"""AdaBound, AMSBound and AdaBoundW: Adam whose step sizes are clipped between bounds that close on SGD's.

And their control, SGDBound: a momentum SGD whose one rate is clipped between the same bounds.

Implementation of "Adaptive Gradient Methods with Dynamic Bound of Learning Rate"
(https://arxiv.org/abs/1902.09843) by Liangchen Luo, Yuanhao Xiong, Yan Liu and Xu Sun, ICLR 2019.
The authors' code: https://github.com/Luolc/AdaBound
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

Scalar = float | jax.Array  # a hyperparameter: a Python number, or a scalar array, tracers among them
Step = Callable[[optax.Updates, optax.Updates, optax.Updates, jax.Array], optax.Updates]

_POSITIVE = (lambda x: 0 < x < math.inf, "positive and finite")
_NON_NEGATIVE = (lambda x: 0 <= x < math.inf, "non-negative and finite")
_DECAY = (lambda x: 0 <= x < 1, "in [0, 1)")
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "learning_rate": _NON_NEGATIVE,
    "base_lr": (_POSITIVE[0], "positive and finite (it is learning_rate when not given)"),
    "final_lr": _POSITIVE,
    "ratio": _POSITIVE,
    "gamma": _POSITIVE,  # the authors' code accepts 0, then divides by it
    "b1": _DECAY,
    "b2": _DECAY,
    "momentum": _NON_NEGATIVE,
    "eps": _NON_NEGATIVE,
    "eps_root": _NON_NEGATIVE,
    "weight_decay": _NON_NEGATIVE,
}


class ScaleByAdaBoundState(NamedTuple):
    """State of AdaBound.

    Attributes:
        count: number of updates made; shape (), int32.
        mu: exponential average of the gradients; shapes of the parameters, in `mu_dtype` or at least float32.
        nu: exponential average of the squared gradients; at least float32. Neither is bias-corrected.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: optax.Updates
    nu: optax.Updates


class ScaleByAmsBoundState(NamedTuple):
    """State of AMSBound: AdaBound's, and `nu_max`, the element-wise maximum of every (raw) `nu` so far."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: optax.Updates
    nu: optax.Updates
    nu_max: optax.Updates


class ScaleBySgdBoundState(NamedTuple):
    """State of SGDBound: AdaBound's `count` and `mu`."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax
    mu: optax.Updates


def is_number(value: Any) -> bool:
    """True for a number of Python or NumPy, a NumPy array of shape () among them."""
    return isinstance(value, int | float | np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)


def is_zero(value: Scalar) -> bool:
    """True for the number 0. False for every array of JAX, whose value may be unknown."""
    return is_number(value) and bool(value == 0)


def check_hyperparameters(**values: Any) -> None:
    """Raise a ValueError that names the first number of Python or NumPy out of its range.

    Anything else passes: under `jax.jit` or `optax.inject_hyperparams` a hyperparameter is a tracer, whose
    value is not known.
    """
    for name, value in values.items():
        valid, requirement = _RANGES[name]
        if is_number(value) and not valid(value):
            raise ValueError(f"{name} must be {requirement}, got {value}")


def check_mu_dtype(mu_dtype: DTypeLike | None) -> jnp.dtype | None:
    """Return `mu_dtype` as a type of JAX. Raises ValueError if it is not a floating-point type."""
    if mu_dtype is None:
        return None
    if not jnp.issubdtype(mu_dtype, jnp.floating):
        raise ValueError(f"mu_dtype must be a floating-point type, got {jnp.dtype(mu_dtype)}")
    return jax.dtypes.canonicalize_dtype(mu_dtype)


def moment_dtype(x: ArrayLike) -> jnp.dtype:
    """Type of x, at least float32: in bfloat16, 0.999 * nu rounds back to nu."""
    dtype = jnp.result_type(x)
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def zero_moments(params: optax.Params, dtype: DTypeLike | None = None) -> optax.Updates:
    """Zeros in the shapes of `params`, in `dtype` or each in its `moment_dtype`.

    Raises:
        ValueError: if a parameter is not of a real floating-point type; the message names it.
    """

    def zeros(path: Any, p: jax.Array) -> jax.Array:
        p_dtype = jnp.result_type(p)
        if not jnp.issubdtype(p_dtype, jnp.floating):
            is_complex = jnp.issubdtype(p_dtype, jnp.complexfloating)
            remedy = "optax.contrib.split_real_and_imaginary" if is_complex else "optax.masked"
            name = jax.tree_util.keystr(path, simple=True, separator=".") or "a parameter"
            raise ValueError(
                f"parameters must be real floating-point numbers, {name} is {p_dtype}; use {remedy}"
            )
        return jnp.zeros_like(p, dtype or moment_dtype(p))

    return jax.tree_util.tree_map_with_path(zeros, params)


def update_moments(
    grads: optax.Updates, mu: optax.Updates, nu: optax.Updates, b1: Scalar, b2: Scalar
) -> tuple[optax.Updates, optax.Updates]:
    """The next exponential averages of `grads` and of their squares, in the types of `nu`."""
    grads, mu = optax.tree.cast_like(grads, nu), optax.tree.cast_like(mu, nu)
    return optax.tree.update_moment(grads, mu, b1, 1), optax.tree.update_moment(grads, nu, b2, 2)


def one_minus_power(decay: Scalar, count: ArrayLike) -> jax.Array:
    """1 - decay^count, the weight of an exponential average that starts at zero.

    `expm1` is used because 1 - 0.999 of float32 numbers is wrong from its fifth digit on.
    """
    t = jnp.asarray(count, jnp.result_type(float))
    return -jnp.expm1(t * jnp.log1p(decay - 1.0))


def adabound_bounds(
    count: ArrayLike, ratio: Scalar = 100.0, gamma: Scalar = 1e-3
) -> tuple[jax.Array, jax.Array]:
    r"""The interval AdaBound clips its step sizes to, in units of the learning rate, at steps `count`.

    $$ \text{lower}_t = r \left(1 - \frac{1}{\gamma t + 1}\right), \qquad
       \text{upper}_t = r \left(1 + \frac{1}{\gamma t}\right) $$

    Args:
        count: the step t, counted from 1, of any shape.
        ratio: r = `final_lr / base_lr`, to which both bounds converge.
        gamma: how fast they do, per step: after 1 / gamma steps they are r / 2 and 2 r.

    Returns:
        `(lower, upper)`, floating-point, in the shape of `count`. Times the learning rate of step t they
        bound the step size of every coordinate.
    """
    x = gamma * jnp.asarray(count, jnp.result_type(float))
    # The lower bound as x / (x + 1): 1 - 1 / (x + 1) would cancel to 4 digits at the first float32 steps
    return ratio * (x / (x + 1)), ratio * (1 + 1 / x)


def unclipped_size(
    nu: jax.Array, count: jax.Array, b1: Scalar, b2: Scalar, eps: Scalar, eps_root: Scalar = 0.0
) -> jax.Array:
    """Adam's step size of every coordinate, before the bounds clip it, in units of the learning rate.

    sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(nu_t + eps_root) + eps), of the second moment or its maximum, in its
    shape.
    """
    correction = jnp.sqrt(one_minus_power(b2, count)) / one_minus_power(b1, count)
    # eps is added to the *uncorrected* root, so this is not optax.scale_by_adam and a clip
    if not is_zero(eps_root):
        nu = nu + eps_root
    return correction.astype(nu.dtype) / (jnp.sqrt(nu) + eps)


def scale_by_moments(
    state_type: type[Any], step: Step, b1: Scalar, b2: Scalar, mu_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """Rescale updates by both moments: the common form of AdaBound, AMSBound and AMSGrad.

    Args:
        state_type: the type of the state, of `count`, `mu`, `nu` and perhaps `nu_max`, which then replaces
            `nu` in the step.
        step: the rule (grads, mu, nu, count) -> updates.
        b1, b2, mu_dtype: as in :func:`scale_by_adabound`.
    """
    mu_dtype = check_mu_dtype(mu_dtype)
    has_maximum = "nu_max" in state_type._fields

    def init_fn(params: optax.Params) -> Any:
        # A call for each field: one buffer in two fields could not be donated
        seconds = [zero_moments(params) for _ in range(1 + has_maximum)]
        return state_type(jnp.zeros([], jnp.int32), zero_moments(params, mu_dtype), *seconds)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, Any]:
        del params
        count = optax.safe_increment(state.count)
        mu, nu = update_moments(updates, state.mu, state.nu, b1, b2)
        seconds = [nu]
        if has_maximum:
            seconds.append(jax.tree.map(jnp.maximum, state.nu_max, nu))
        scaled = step(updates, mu, seconds[-1], count)
        return scaled, state_type(count, optax.tree.cast(mu, mu_dtype), *seconds)

    return optax.GradientTransformation(init_fn, update_fn)


def _clipped_step(
    ratio: Scalar, b1: Scalar, b2: Scalar, gamma: Scalar, eps: Scalar, eps_root: Scalar
) -> Step:
    """The rule (grads, mu, nu, count) -> clip(c_t / (sqrt(nu + eps_root) + eps), lower_t, upper_t) * mu."""
    check_hyperparameters(ratio=ratio, b1=b1, b2=b2, gamma=gamma, eps=eps, eps_root=eps_root)

    def step(grads: optax.Updates, mu: optax.Updates, nu: optax.Updates, count: jax.Array) -> optax.Updates:
        lower, upper = adabound_bounds(count, ratio, gamma)

        def leaf(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            size = unclipped_size(v, count, b1, b2, eps, eps_root)
            return (jnp.clip(size, lower.astype(v.dtype), upper.astype(v.dtype)) * m).astype(g.dtype)

        return jax.tree.map(leaf, grads, mu, nu)

    return step


def scale_by_adabound(
    ratio: Scalar = 100.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 1e-3,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescale updates according to the AdaBound algorithm.

    See :func:`adabound` for the equations.

    Args:
        ratio: `final_lr / base_lr`, the step size the bounds converge to, in units of the learning rate.
        b1: decay rate, per step, of the exponential average of the gradients.
        b2: decay rate, per step, of the exponential average of the squared gradients.
        gamma: how fast the bounds converge, per step; see :func:`adabound_bounds`.
        eps: added to the root of the second moment; in units of the gradient.
        eps_root: added to the second moment under the root, to differentiate through an update where a
            gradient may be 0.
        mu_dtype: the type `mu` is stored in; by default that of the parameter, at least float32.

    Returns:
        The transformation. Its updates are not yet multiplied by the (negative) learning rate.

    Raises:
        ValueError: if an argument that is a number of Python or NumPy is out of its range; in `init`, if a
            parameter is not of a real floating-point type.
    """
    step = _clipped_step(ratio, b1, b2, gamma, eps, eps_root)
    return scale_by_moments(ScaleByAdaBoundState, step, b1, b2, mu_dtype)


def scale_by_amsbound(
    ratio: Scalar = 100.0,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 1e-3,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    *,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Rescale updates according to the AMSBound algorithm.

    :func:`scale_by_adabound` with the running maximum of the second moment, before any bias correction, in
    its place. Arguments, result and errors are the same.
    """
    step = _clipped_step(ratio, b1, b2, gamma, eps, eps_root)
    return scale_by_moments(ScaleByAmsBoundState, step, b1, b2, mu_dtype)


def scale_by_sgdbound(
    ratio: Scalar = 100.0, b1: Scalar = 0.9, gamma: Scalar = 1e-3, *, mu_dtype: DTypeLike | None = None
) -> optax.GradientTransformation:
    """Rescale updates according to SGDBound; see :func:`sgdbound`, and :func:`scale_by_adabound`."""
    check_hyperparameters(ratio=ratio, b1=b1, gamma=gamma)
    mu_dtype = check_mu_dtype(mu_dtype)

    def init_fn(params: optax.Params) -> ScaleBySgdBoundState:
        return ScaleBySgdBoundState(jnp.zeros([], jnp.int32), zero_moments(params, mu_dtype))

    def update_fn(
        updates: optax.Updates, state: ScaleBySgdBoundState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleBySgdBoundState]:
        del params
        count = optax.safe_increment(state.count)
        mu = state.mu
        if mu_dtype is not None:
            mu = jax.tree.map(lambda g, m: m.astype(moment_dtype(g)), updates, mu)
        mu = optax.tree.update_moment(optax.tree.cast_like(updates, mu), mu, b1, 1)
        size = jnp.clip(1.0, *adabound_bounds(count, ratio, gamma))
        scaled = jax.tree.map(lambda g, m: (size.astype(m.dtype) * m).astype(g.dtype), updates, mu)
        return scaled, ScaleBySgdBoundState(count, optax.tree.cast(mu, mu_dtype))

    return optax.GradientTransformation(init_fn, update_fn)


def bound_ratio(learning_rate: optax.ScalarOrSchedule, final_lr: Scalar, base_lr: Scalar | None) -> Scalar:
    """final_lr / base_lr, where base_lr is by default the learning rate, if that is a number."""
    check_hyperparameters(learning_rate=learning_rate, final_lr=final_lr)
    if base_lr is None:
        if not is_number(learning_rate):
            raise ValueError(
                f"base_lr is required where learning_rate is a schedule or an array of JAX: {learning_rate}"
            )
        base_lr = float(learning_rate)
    check_hyperparameters(base_lr=base_lr)
    return final_lr / base_lr


def adabound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: Scalar = 0.1,
    *,
    base_lr: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 1e-3,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBound: starts as Adam and ends as SGD with momentum and step size `final_lr`.

    With $t$ from 1, learning rates $\alpha_t$, gradients $g_t$ and $r$ = `final_lr / base_lr`:

    $$ \begin{aligned}
      g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      \eta_t &= \alpha_t \operatorname{clip}\left(
        \frac{\sqrt{1 - \beta_2^t} \,/\, (1 - \beta_1^t)}{\sqrt{v_t} + \epsilon},\;
        r \left(1 - \frac{1}{\gamma t + 1}\right),\; r \left(1 + \frac{1}{\gamma t}\right) \right) \\
      \theta_t &= \theta_{t-1} - \eta_t m_t
    \end{aligned} $$

    **Does the schedule move the bounds?** Yes. The learning rate multiplies the clipped step size, bounds
    and all. The authors' code does the same: its `final_lr * lr / base_lr` is $r$ times `lr`. So a rate cut
    by ten cuts the bounds by ten, and a warm-up from zero starts with both bounds at zero. The bounds
    converge to `final_lr` while the rate is `base_lr`, and to `final_lr * lr / base_lr` at a rate `lr`;
    give the schedule's peak as `base_lr`. A schedule, or a rate injected at run time, does not
    reveal the rate it started from, and division by the current one would make the bounds ignore the
    schedule. So `base_lr` is required with both.

    Args:
        learning_rate: Adam's step size: a number, a scalar array, or a schedule from update count (from 0).
        final_lr: SGD's step size, which the bounds converge to when the learning rate is `base_lr`.
        base_lr: the rate to which `final_lr` belongs; `learning_rate` if that is a number of Python or NumPy.
        b1: decay rate, per step, of the exponential average of the gradients.
        b2: decay rate, per step, of the exponential average of the squared gradients.
        gamma: how fast the bounds converge, per step; see :func:`adabound_bounds`.
        eps: added to the root of the second moment; in units of the gradient.
        eps_root: added to the second moment under the root, to differentiate through an update where a
            gradient may be 0.
        weight_decay: the L2 penalty $\lambda$, added to the gradient.
        mask: which parameters decay, as in `optax.adamw`: a tree of bools, or a function of the
            parameters that returns one. By default all do.
        mu_dtype: the type $m_t$ is stored in; by default that of the parameter, at least float32.

    Returns:
        The optimizer. `update` needs `params`.

    Raises:
        ValueError: if an argument that is a number of Python or NumPy is out of its range, or `base_lr` is
            missing; in `init`, if a parameter is not of a real floating-point type.

    References:
        Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
        <https://arxiv.org/abs/1902.09843>`_, 2019
    """
    check_hyperparameters(weight_decay=weight_decay)
    ratio = bound_ratio(learning_rate, final_lr, base_lr)
    scale = scale_by_adabound(ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype)
    l2 = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(l2, scale, optax.scale_by_learning_rate(learning_rate))


def amsbound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: Scalar = 0.1,
    *,
    base_lr: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 1e-3,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AMSBound: :func:`adabound` with $\max_{s \le t} v_s$ in place of $v_t$.

    The maximum is that of the raw moments, before bias correction. Arguments, result and errors are those
    of :func:`adabound`.
    """
    check_hyperparameters(weight_decay=weight_decay)
    ratio = bound_ratio(learning_rate, final_lr, base_lr)
    scale = scale_by_amsbound(ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype)
    l2 = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(l2, scale, optax.scale_by_learning_rate(learning_rate))


def adaboundw(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: Scalar = 0.1,
    *,
    base_lr: Scalar | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    gamma: Scalar = 1e-3,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaBoundW: :func:`adabound` with decoupled weight decay, scaled by the learning rate as in AdamW.

    $$ \theta_t = \theta_{t-1} - \eta_t m_t - \alpha_t \lambda \theta_{t-1} $$

    where the gradients in $m_t$ and $v_t$ contain no decay. The `AdaBoundW` of the authors' code subtracts
    $\lambda \theta_{t-1}$ without $\alpha_t$, so that no schedule affects it. To get its results at a
    constant rate, divide its `weight_decay` by that rate. Arguments, result and errors are otherwise those
    of :func:`adabound`.

    References:
        Loshchilov and Hutter, `Decoupled Weight Decay Regularization
        <https://arxiv.org/abs/1711.05101>`_, 2019
    """
    check_hyperparameters(weight_decay=weight_decay)
    ratio = bound_ratio(learning_rate, final_lr, base_lr)
    scale = scale_by_adabound(ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype)
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))


def sgdbound(
    learning_rate: optax.ScalarOrSchedule,
    final_lr: Scalar = 0.1,
    *,
    base_lr: Scalar | None = None,
    b1: Scalar = 0.9,
    gamma: Scalar = 1e-3,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDBound: :func:`adabound` without the second moment, the control that shows what adaptivity adds.

    One step size for all coordinates, clipped to AdaBound's bounds:

    $$ \theta_t = \theta_{t-1} - \alpha_t \operatorname{clip}(1, \text{lower}_t, \text{upper}_t) \, m_t $$

    With the defaults the lower bound passes the learning rate at the eleventh step, and from there on this is
    momentum SGD whose rate is the lower bound. Arguments and errors are those of :func:`adabound`.

    References:
        Savarese, `On the Convergence of AdaBound and its Connection to SGD
        <https://arxiv.org/abs/1908.04457>`_, 2019, whose idea this follows
    """
    check_hyperparameters(weight_decay=weight_decay)
    scale = scale_by_sgdbound(bound_ratio(learning_rate, final_lr, base_lr), b1, gamma, mu_dtype=mu_dtype)
    l2 = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(l2, scale, optax.scale_by_learning_rate(learning_rate))
