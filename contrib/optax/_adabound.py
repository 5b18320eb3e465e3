# Copyright 2026 DeepMind Technologies Limited. All Rights Reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
# ==============================================================================
"""AdaBound, AMSBound and AdaBoundW.

Implementation of
"Adaptive Gradient Methods with Dynamic Bound of Learning Rate"
(https://arxiv.org/abs/1902.09843) by Liangchen Luo, Yuanhao Xiong, Yan Liu and
Xu Sun.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax._src import base
from optax._src import combine
from optax._src import numerics
from optax._src import transform
from optax._src import utils
import optax.tree


_Step = Callable[
    [base.Updates, base.Updates, base.Updates, jax.Array], base.Updates
]


class ScaleByAdaBoundState(NamedTuple):
  """State of AdaBound.

  Attributes:
    count: number of updates made.
    mu: exponential average of the gradients, without bias correction.
    nu: exponential average of the squared gradients, without bias correction;
      at least float32.
  """

  count: jax.Array  # shape=(), dtype=jnp.int32.
  mu: base.Updates
  nu: base.Updates


class ScaleByAmsBoundState(NamedTuple):
  """State of AMSBound.

  Attributes:
    count: number of updates made.
    mu: exponential average of the gradients, without bias correction.
    nu: exponential average of the squared gradients, without bias correction;
      at least float32.
    nu_max: element-wise maximum of every ``nu`` so far.
  """

  count: jax.Array  # shape=(), dtype=jnp.int32.
  mu: base.Updates
  nu: base.Updates
  nu_max: base.Updates


def _is_number(value: Any) -> bool:
  """True for a number of Python or NumPy, or a NumPy array of shape ()."""
  return isinstance(value, int | float | np.generic) or (
      isinstance(value, np.ndarray) and value.ndim == 0
  )


def _is_zero(value: jax.typing.ArrayLike) -> bool:
  """True for the number 0; False for every JAX array, perhaps a tracer."""
  return _is_number(value) and bool(value == 0)


def _moment_dtype(x: jax.typing.ArrayLike) -> jnp.dtype:
  """Type of x, at least float32: in bfloat16, 0.999 * nu rounds back to nu."""
  dtype = jnp.result_type(x)
  return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


def _zero_moments(
    params: base.Params, dtype: jax.typing.DTypeLike | None = None
) -> base.Updates:
  """Zeros like ``params``, in ``dtype`` or each in its ``_moment_dtype``.

  Args:
    params: the parameters.
    dtype: optional type of the zeros.

  Returns:
    A tree like ``params``.

  Raises:
    ValueError: if a parameter is not of a real floating-point type.
  """

  def zeros(path: Any, p: jax.Array) -> jax.Array:
    p_dtype = jnp.result_type(p)
    if not jnp.issubdtype(p_dtype, jnp.floating):
      is_complex = jnp.issubdtype(p_dtype, jnp.complexfloating)
      remedy = (
          "optax.contrib.split_real_and_imaginary"
          if is_complex
          else "optax.masked"
      )
      name = (
          jax.tree_util.keystr(path, simple=True, separator=".")
          or "a parameter"
      )
      raise ValueError(
          f"parameters must be real floating-point numbers, {name} is "
          f"{p_dtype}; use {remedy}"
      )
    return jnp.zeros_like(p, dtype or _moment_dtype(p))

  return jax.tree_util.tree_map_with_path(zeros, params)


def _update_moments(
    grads: base.Updates,
    mu: base.Updates,
    nu: base.Updates,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
) -> tuple[base.Updates, base.Updates]:
  """Next averages of the gradients and their squares, in the types of nu."""
  grads, mu = optax.tree.cast_like(grads, nu), optax.tree.cast_like(mu, nu)
  return optax.tree.update_moment(grads, mu, b1, 1), optax.tree.update_moment(
      grads, nu, b2, 2
  )


def _one_minus_power(
    decay: jax.typing.ArrayLike, count: jax.typing.ArrayLike
) -> jax.Array:
  """1 - decay^count, the weight of an exponential average that starts at zero.

  ``expm1`` is used because 1 - 0.999 of float32 numbers is wrong from its fifth
  digit on.

  Args:
    decay: decay rate per step.
    count: number of steps.

  Returns:
    The weight, at least float32.
  """
  t = jnp.asarray(count, jnp.result_type(float))
  return -jnp.expm1(t * jnp.log1p(decay - 1.0))


def _adabound_bounds(
    count: jax.typing.ArrayLike,
    ratio: jax.typing.ArrayLike = 100.0,
    gamma: jax.typing.ArrayLike = 1e-3,
) -> tuple[jax.Array, jax.Array]:
  """The interval AdaBound clips step sizes to, in units of the learning rate.

  Args:
    count: the step, counted from 1.
    ratio: ``final_lr / base_lr``, to which both bounds converge.
    gamma: convergence speed of the bounds: after 1 / gamma steps they are
      half of ``ratio`` and twice ``ratio``.

  Returns:
    A tuple of lower and upper bound.
  """
  x = gamma * jnp.asarray(count, jnp.result_type(float))
  # The lower bound as x / (x + 1): 1 - 1 / (x + 1) would cancel to 4 digits at
  # the first float32 steps
  return ratio * (x / (x + 1)), ratio * (1 + 1 / x)


def _unclipped_size(
    nu: jax.Array,
    count: jax.Array,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
  """Adam's step sizes before clipping, in units of the learning rate.

  Args:
    nu: second moments, or their maximum.
    count: the step, counted from 1.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    eps: term added to the root of the second moment.
    eps_root: term added to the second moment.

  Returns:
    An array in the shape of ``nu``.
  """
  correction = jnp.sqrt(_one_minus_power(b2, count)) / _one_minus_power(
      b1, count
  )
  # eps is added to the *uncorrected* root, so this is not optax.scale_by_adam
  # and a clip
  if not _is_zero(eps_root):
    nu = nu + eps_root
  return correction.astype(nu.dtype) / (jnp.sqrt(nu) + eps)


def _scale_by_moments(
    state_type: type[Any],
    step: _Step,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    mu_dtype: jax.typing.DTypeLike | None,
) -> base.GradientTransformation:
  """Rescale updates by both moments: the common form of AdaBound and AMSBound.

  Args:
    state_type: type of the state. If it has a field ``nu_max``, the step takes
      that in place of ``nu``.
    step: the rule (grads, mu, nu, count) -> updates.
    b1: decay rate of the first moment.
    b2: decay rate of the second moment.
    mu_dtype: optional dtype of the first moment.

  Returns:
    A :class:`optax.GradientTransformation` object.
  """
  mu_dtype = utils.canonicalize_dtype(mu_dtype)
  has_maximum = "nu_max" in state_type._fields

  def init_fn(params: base.Params) -> Any:
    # A call for each field: one buffer in two fields could not be donated
    seconds = [_zero_moments(params) for _ in range(1 + has_maximum)]
    return state_type(
        jnp.zeros([], jnp.int32), _zero_moments(params, mu_dtype), *seconds
    )

  def update_fn(
      updates: base.Updates, state: Any, params: base.Params | None = None
  ) -> tuple[base.Updates, Any]:
    del params
    count = numerics.safe_increment(state.count)
    mu, nu = _update_moments(updates, state.mu, state.nu, b1, b2)
    seconds = [nu]
    if has_maximum:
      seconds.append(jax.tree.map(jnp.maximum, state.nu_max, nu))
    scaled = step(updates, mu, seconds[-1], count)
    return scaled, state_type(
        count, optax.tree.cast(mu, mu_dtype), *seconds
    )

  return base.GradientTransformation(init_fn, update_fn)


def _clipped_step(
    ratio: jax.typing.ArrayLike,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    gamma: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    eps_root: jax.typing.ArrayLike,
) -> _Step:
  """The rule (grads, mu, nu, count) -> clipped step sizes times mu."""

  def step(
      grads: base.Updates,
      mu: base.Updates,
      nu: base.Updates,
      count: jax.Array,
  ) -> base.Updates:
    lower, upper = _adabound_bounds(count, ratio, gamma)

    def leaf(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
      size = _unclipped_size(v, count, b1, b2, eps, eps_root)
      return (
          jnp.clip(size, lower.astype(v.dtype), upper.astype(v.dtype)) * m
      ).astype(g.dtype)

    return jax.tree.map(leaf, grads, mu, nu)

  return step


def scale_by_adabound(
    ratio: jax.typing.ArrayLike = 100.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    gamma: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> base.GradientTransformation:
  """Rescale updates according to the AdaBound algorithm.

  See :func:`optax.contrib.adabound` for a full description of the algorithm.

  Args:
    ratio: ``final_lr / base_lr``, the step size that the bounds converge to, in
      units of the learning rate.
    b1: Exponential decay rate to track the first moment of past gradients.
    b2: Exponential decay rate to track the second moment of past gradients.
    gamma: Convergence speed of the bounds; must be positive.
    eps: A small constant added to the root of the second moment, which is not
      corrected for its bias.
    eps_root: A small constant added to the second moment inside the square
      root, to avoid dividing by zero when rescaling. This is needed for
      instance when computing (meta-)gradients through AdaBound.
    mu_dtype: Optional ``dtype`` to be used for the first order accumulator; if
      ``None``, that of the parameter, and at least float32.

  Returns:
    A :class:`optax.GradientTransformation` object. Its updates are to be
    multiplied by the negative learning rate.

  Raises:
    ValueError: In ``init``, if a parameter is not of a real floating-point
      type.

  References:
    Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
    <https://arxiv.org/abs/1902.09843>`_, 2019
  """
  step = _clipped_step(ratio, b1, b2, gamma, eps, eps_root)
  return _scale_by_moments(ScaleByAdaBoundState, step, b1, b2, mu_dtype)


def scale_by_amsbound(
    ratio: jax.typing.ArrayLike = 100.0,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    gamma: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    *,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> base.GradientTransformation:
  """Rescale updates according to the AMSBound algorithm.

  See :func:`optax.contrib.amsbound` for a full description of the algorithm.

  Args:
    ratio: ``final_lr / base_lr``, the step size that the bounds converge to, in
      units of the learning rate.
    b1: Exponential decay rate to track the first moment of past gradients.
    b2: Exponential decay rate to track the second moment of past gradients.
    gamma: Convergence speed of the bounds; must be positive.
    eps: A small constant added to the root of the second moment, which is not
      corrected for its bias.
    eps_root: A small constant added to the second moment inside the square
      root, to avoid dividing by zero when rescaling. This is needed for
      instance when computing (meta-)gradients through AMSBound.
    mu_dtype: Optional ``dtype`` to be used for the first order accumulator; if
      ``None``, that of the parameter, and at least float32.

  Returns:
    A :class:`optax.GradientTransformation` object. Its updates are to be
    multiplied by the negative learning rate.

  Raises:
    ValueError: In ``init``, if a parameter is not of a real floating-point
      type.

  References:
    Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
    <https://arxiv.org/abs/1902.09843>`_, 2019
  """
  step = _clipped_step(ratio, b1, b2, gamma, eps, eps_root)
  return _scale_by_moments(ScaleByAmsBoundState, step, b1, b2, mu_dtype)


def _bound_ratio(
    learning_rate: base.ScalarOrSchedule,
    final_lr: jax.typing.ArrayLike,
    base_lr: jax.typing.ArrayLike | None,
) -> jax.typing.ArrayLike:
  """final_lr / base_lr; by default base_lr is the learning rate, a number."""
  if base_lr is None:
    if not _is_number(learning_rate):
      raise ValueError(
          "base_lr is required where learning_rate is a schedule or an array "
          f"of JAX: {learning_rate}"
      )
    base_lr = float(learning_rate)
  return final_lr / base_lr


def adabound(
    learning_rate: base.ScalarOrSchedule,
    final_lr: jax.typing.ArrayLike = 0.1,
    *,
    base_lr: jax.typing.ArrayLike | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    gamma: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> base.GradientTransformationExtraArgs:
  r"""AdaBound: starts as Adam and ends as SGD with momentum.

  AdaBound clips the step size that Adam has for each coordinate to an interval,
  which is wide at first and converges to the step size ``final_lr`` of SGD.

  Let :math:`\alpha_t` represent the learning rate of step :math:`t`, counted
  from 1, :math:`g_t` its gradient, and :math:`r` the quotient
  ``final_lr / base_lr``. Let :math:`\beta_1, \beta_2`, :math:`\gamma`,
  :math:`\epsilon` and :math:`\lambda` represent the arguments ``b1``, ``b2``,
  ``gamma``, ``eps`` and ``weight_decay``. Then

  .. math::

    \begin{aligned}
      g_t &\leftarrow g_t + \lambda \theta_{t-1} \\
      m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
      v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
      \eta_t &= \alpha_t \operatorname{clip}\left(
        \frac{\sqrt{1 - \beta_2^t} \,/\, (1 - \beta_1^t)}
          {\sqrt{v_t} + \epsilon},\;
        r \left(1 - \frac{1}{\gamma t + 1}\right),\;
        r \left(1 + \frac{1}{\gamma t}\right) \right) \\
      \theta_t &= \theta_{t-1} - \eta_t m_t
    \end{aligned}

  .. note::
    The learning rate multiplies the clipped step size, bounds and all, as in
    the implementation of the authors. So a learning rate cut by ten cuts the
    bounds by ten. They converge to ``final_lr`` while the learning rate is
    ``base_lr``. A schedule, or a learning rate that is injected at run time,
    does not reveal the rate it started from, and requires ``base_lr``: give the
    peak of the schedule.

  Args:
    learning_rate: A global scaling factor, either fixed or evolving along
      iterations with a scheduler, see :func:`optax.scale_by_learning_rate`.
    final_lr: Step size of SGD, to which the bounds converge while the learning
      rate is ``base_lr``.
    base_lr: The learning rate to which ``final_lr`` belongs. By default
      ``learning_rate``, which then must be a number of Python or NumPy.
    b1: Exponential decay rate to track the first moment of past gradients.
    b2: Exponential decay rate to track the second moment of past gradients.
    gamma: Convergence speed of the bounds; must be positive.
    eps: A small constant added to the root of the second moment, which is not
      corrected for its bias.
    eps_root: A small constant added to the second moment inside the square
      root, to avoid dividing by zero when rescaling. This is needed for
      instance when computing (meta-)gradients through AdaBound.
    weight_decay: Strength of the L2 penalty, which is added to the gradient.
    mask: A tree with same structure as (or a prefix of) the params PyTree,
      or a Callable that returns such a pytree given the params/updates.
      The leaves should be booleans, ``True`` for leaves/subtrees you want to
      apply the weight decay to, and ``False`` for those you want to skip.
    mu_dtype: Optional ``dtype`` to be used for the first order accumulator; if
      ``None``, that of the parameter, and at least float32.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If ``base_lr`` is missing where it is required; in ``init``, if
      a parameter is not of a real floating-point type.

  Examples:
    >>> import optax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = optax.contrib.adabound(learning_rate=0.1)
    >>> params = jnp.array([1., 2., 3.])
    >>> print('Objective function: ', f(params))
    Objective function:  14.0
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  grad = jax.grad(f)(params)
    ...  updates, opt_state = solver.update(grad, opt_state, params)
    ...  params = optax.apply_updates(params, updates)
    ...  print('Objective function: {:.2E}'.format(f(params)))
    Objective function: 1.28E+01
    Objective function: 1.17E+01
    Objective function: 1.07E+01
    Objective function: 9.69E+00
    Objective function: 8.78E+00

  References:
    Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
    <https://arxiv.org/abs/1902.09843>`_, 2019

  .. seealso:: :func:`optax.contrib.amsbound`, :func:`optax.contrib.adaboundw`.
  """
  ratio = _bound_ratio(learning_rate, final_lr, base_lr)
  scale = scale_by_adabound(
      ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype
  )
  l2 = transform.add_decayed_weights(weight_decay, mask)
  return combine.chain(
      l2, scale, transform.scale_by_learning_rate(learning_rate)
  )


def amsbound(
    learning_rate: base.ScalarOrSchedule,
    final_lr: jax.typing.ArrayLike = 0.1,
    *,
    base_lr: jax.typing.ArrayLike | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    gamma: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> base.GradientTransformationExtraArgs:
  r"""AMSBound: AdaBound with the maximum of all second moments so far.

  This is :func:`optax.contrib.adabound` with :math:`\max_{s \le t} v_s` in
  place of :math:`v_t`. The maximum is that of the raw moments, before any
  correction of their bias.

  Args:
    learning_rate: A global scaling factor, either fixed or evolving along
      iterations with a scheduler, see :func:`optax.scale_by_learning_rate`.
    final_lr: Step size of SGD, to which the bounds converge while the learning
      rate is ``base_lr``.
    base_lr: The learning rate to which ``final_lr`` belongs. By default
      ``learning_rate``, which then must be a number of Python or NumPy.
    b1: Exponential decay rate to track the first moment of past gradients.
    b2: Exponential decay rate to track the second moment of past gradients.
    gamma: Convergence speed of the bounds; must be positive.
    eps: A small constant added to the root of the second moment, which is not
      corrected for its bias.
    eps_root: A small constant added to the second moment inside the square
      root, to avoid dividing by zero when rescaling. This is needed for
      instance when computing (meta-)gradients through AMSBound.
    weight_decay: Strength of the L2 penalty, which is added to the gradient.
    mask: A tree with same structure as (or a prefix of) the params PyTree,
      or a Callable that returns such a pytree given the params/updates.
      The leaves should be booleans, ``True`` for leaves/subtrees you want to
      apply the weight decay to, and ``False`` for those you want to skip.
    mu_dtype: Optional ``dtype`` to be used for the first order accumulator; if
      ``None``, that of the parameter, and at least float32.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If ``base_lr`` is missing where it is required; in ``init``, if
      a parameter is not of a real floating-point type.

  Examples:
    >>> import optax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = optax.contrib.amsbound(learning_rate=0.1)
    >>> params = jnp.array([1., 2., 3.])
    >>> print('Objective function: ', f(params))
    Objective function:  14.0
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  grad = jax.grad(f)(params)
    ...  updates, opt_state = solver.update(grad, opt_state, params)
    ...  params = optax.apply_updates(params, updates)
    ...  print('Objective function: {:.2E}'.format(f(params)))
    Objective function: 1.28E+01
    Objective function: 1.17E+01
    Objective function: 1.07E+01
    Objective function: 9.69E+00
    Objective function: 8.78E+00

  References:
    Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
    <https://arxiv.org/abs/1902.09843>`_, 2019

  .. seealso:: :func:`optax.contrib.adabound`, :func:`optax.amsgrad`.
  """
  ratio = _bound_ratio(learning_rate, final_lr, base_lr)
  scale = scale_by_amsbound(
      ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype
  )
  l2 = transform.add_decayed_weights(weight_decay, mask)
  return combine.chain(
      l2, scale, transform.scale_by_learning_rate(learning_rate)
  )


def adaboundw(
    learning_rate: base.ScalarOrSchedule,
    final_lr: jax.typing.ArrayLike = 0.1,
    *,
    base_lr: jax.typing.ArrayLike | None = None,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    gamma: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    weight_decay: jax.typing.ArrayLike = 0.0,
    mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> base.GradientTransformationExtraArgs:
  r"""AdaBoundW: AdaBound with decoupled weight decay.

  The weight decay is multiplied with the learning rate, as in
  :func:`optax.adamw`. In the notation of :func:`optax.contrib.adabound`,

  .. math::

    \theta_t = \theta_{t-1} - \eta_t m_t - \alpha_t \lambda \theta_{t-1}

  where the gradients in :math:`m_t` and :math:`v_t` contain no decay.

  .. note::
    The implementation of the authors subtracts :math:`\lambda \theta_{t-1}`
    without :math:`\alpha_t`, so that no schedule affects it. To get its results
    at a constant learning rate, divide its weight decay by that rate.

  Args:
    learning_rate: A global scaling factor, either fixed or evolving along
      iterations with a scheduler, see :func:`optax.scale_by_learning_rate`.
    final_lr: Step size of SGD, to which the bounds converge while the learning
      rate is ``base_lr``.
    base_lr: The learning rate to which ``final_lr`` belongs. By default
      ``learning_rate``, which then must be a number of Python or NumPy.
    b1: Exponential decay rate to track the first moment of past gradients.
    b2: Exponential decay rate to track the second moment of past gradients.
    gamma: Convergence speed of the bounds; must be positive.
    eps: A small constant added to the root of the second moment, which is not
      corrected for its bias.
    eps_root: A small constant added to the second moment inside the square
      root, to avoid dividing by zero when rescaling. This is needed for
      instance when computing (meta-)gradients through AdaBoundW.
    weight_decay: Strength of the weight decay regularization. Note that this
      weight decay is multiplied with the learning rate.
    mask: A tree with same structure as (or a prefix of) the params PyTree,
      or a Callable that returns such a pytree given the params/updates.
      The leaves should be booleans, ``True`` for leaves/subtrees you want to
      apply the weight decay to, and ``False`` for those you want to skip.
    mu_dtype: Optional ``dtype`` to be used for the first order accumulator; if
      ``None``, that of the parameter, and at least float32.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: If ``base_lr`` is missing where it is required; in ``init``, if
      a parameter is not of a real floating-point type.

  Examples:
    >>> import optax
    >>> import jax
    >>> import jax.numpy as jnp
    >>> def f(x): return jnp.sum(x ** 2)  # simple quadratic function
    >>> solver = optax.contrib.adaboundw(learning_rate=0.1)
    >>> params = jnp.array([1., 2., 3.])
    >>> print('Objective function: ', f(params))
    Objective function:  14.0
    >>> opt_state = solver.init(params)
    >>> for _ in range(5):
    ...  grad = jax.grad(f)(params)
    ...  updates, opt_state = solver.update(grad, opt_state, params)
    ...  params = optax.apply_updates(params, updates)
    ...  print('Objective function: {:.2E}'.format(f(params)))
    Objective function: 1.28E+01
    Objective function: 1.17E+01
    Objective function: 1.07E+01
    Objective function: 9.69E+00
    Objective function: 8.78E+00

  References:
    Luo et al, `Adaptive Gradient Methods with Dynamic Bound of Learning Rate
    <https://arxiv.org/abs/1902.09843>`_, 2019

    Loshchilov et al, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2019

  .. seealso:: :func:`optax.contrib.adabound`, :func:`optax.adamw`.
  """
  ratio = _bound_ratio(learning_rate, final_lr, base_lr)
  scale = scale_by_adabound(
      ratio, b1, b2, gamma, eps, eps_root, mu_dtype=mu_dtype
  )
  decay = transform.add_decayed_weights(weight_decay, mask)
  return combine.chain(
      scale, decay, transform.scale_by_learning_rate(learning_rate)
  )
