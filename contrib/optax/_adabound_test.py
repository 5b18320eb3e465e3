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
"""Tests for AdaBound, AMSBound and AdaBoundW.

Convergence, data types, schedules and injected hyperparameters are tested in
_common_test.py.
"""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
from optax._src import test_utils
from optax._src import update
from optax.contrib import _adabound

_STEPS = 300
_PEAK = 1e-3
_FINAL_LR = 0.1
_GAMMA = 1e-3


def _problem():
  """Parameters, fading gradients over seven decades, and learning rates."""
  rng = np.random.RandomState(0)
  params = rng.normal(size=16)
  scales = np.logspace(-5.5, 1.5, 16)
  fading = 0.05 + np.exp(-np.arange(_STEPS)[:, None] / 30)
  grads = scales * fading * (rng.normal(size=(_STEPS, 16)) + 0.5)
  learning_rates = _PEAK * np.minimum(np.arange(_STEPS) / 20, 1.0)
  return params, grads, learning_rates


def _published(opt_name, params, grads, learning_rates, weight_decay):
  """The algorithm as its authors wrote it, in NumPy.

  Args:
    opt_name: name of the optimizer.
    params: initial parameters, an array.
    grads: gradients, one row per step.
    learning_rates: learning rates, one per step.
    weight_decay: L2 penalty, or decoupled weight decay of AdaBoundW.

  Returns:
    The final parameters, and how many step sizes were at the lower bound,
    inside, and at the upper bound.
  """
  p, m, v, v_max = params, 0.0, 0.0, 0.0
  counts = np.zeros(3, int)
  for t, (g, lr) in enumerate(zip(grads, learning_rates), start=1):
    if opt_name != 'adaboundw':
      g = g + weight_decay * p
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    v_max = np.maximum(v_max, v)
    denominator = np.sqrt(v_max if opt_name == 'amsbound' else v) + 1e-8
    step_size = lr * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) / denominator
    final_lr = _FINAL_LR * lr / _PEAK
    lower_bound = final_lr * (1 - 1 / (_GAMMA * t + 1))
    upper_bound = final_lr * (1 + 1 / (_GAMMA * t))
    if lr > 0:
      below, above = step_size < lower_bound, step_size > upper_bound
      counts += np.sum(below), np.sum(~below & ~above), np.sum(above)
    decay = lr * weight_decay * p if opt_name == 'adaboundw' else 0.0
    p = p - np.clip(step_size, lower_bound, upper_bound) * m - decay
  return p, counts


def _run(opt, params, grads):
  """Returns the parameters after all gradients."""

  def step(carry, g):
    params, state = carry
    updates, state = opt.update(g, state, params)
    return (update.apply_updates(params, updates), state), None

  (params, _), _ = jax.lax.scan(step, (params, opt.init(params)), grads)
  return params


class AdaBoundTest(parameterized.TestCase):

  @parameterized.parameters(
      ('adabound', 0.0),
      ('adabound', 1e-3),
      ('amsbound', 0.0),
      ('amsbound', 1e-3),
      ('adaboundw', 0.0),
      ('adaboundw', 0.1),
  )
  def test_equals_published_algorithm(self, opt_name, weight_decay):
    params, grads, learning_rates = _problem()
    expected, counts = _published(
        opt_name, params, grads, learning_rates, weight_decay
    )
    schedule = jnp.asarray(learning_rates, jnp.float32)
    opt = getattr(_adabound, opt_name)(
        lambda count: schedule[count],
        _FINAL_LR,
        base_lr=_PEAK,
        gamma=_GAMMA,
        weight_decay=weight_decay,
    )
    actual = _run(opt, jnp.float32(params), jnp.float32(grads))
    # Each part of the algorithm matters in this problem.
    self.assertGreater(counts.min(), 0.1 * counts.sum())
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)

  def test_schedule_moves_bounds(self):
    """A clipped step size is a multiple of the learning rate."""
    for grad in (1e-7, 1e3):
      full = _adabound.adabound(_PEAK, base_lr=_PEAK)
      tenth = _adabound.adabound(_PEAK / 10, base_lr=_PEAK)
      params, grads = jnp.zeros(3), jnp.full((50, 3), grad)
      change = _run(full, params, grads)
      self.assertGreater(jnp.abs(change).min(), 0.0)
      np.testing.assert_allclose(
          10 * _run(tenth, params, grads), change, rtol=1e-5
      )

  def test_learning_rate_that_is_no_number_requires_base_lr(self):
    for learning_rate in (lambda count: _PEAK, jnp.float32(_PEAK)):
      with self.assertRaisesRegex(ValueError, 'base_lr is required'):
        _adabound.adabound(learning_rate)
      _adabound.adabound(learning_rate, base_lr=_PEAK)

  def test_complex_parameter_is_refused(self):
    with self.assertRaisesRegex(ValueError, 'split_real_and_imaginary'):
      _adabound.adabound(_PEAK).init({'w': jnp.ones(2, jnp.complex64)})

  @parameterized.product(mu_dtype=(None, jnp.bfloat16))
  def test_dtypes_of_moments(self, mu_dtype):
    opt = _adabound.scale_by_amsbound(mu_dtype=mu_dtype)
    params = jnp.ones(3, jnp.bfloat16)
    state = opt.init(params)
    _, new_state = opt.update(params, state)
    test_utils.assert_trees_all_equal_dtypes(new_state, state)
    self.assertEqual(new_state.mu.dtype, mu_dtype or jnp.float32)
    self.assertEqual(new_state.nu.dtype, jnp.float32)
    self.assertEqual(new_state.nu_max.dtype, jnp.float32)


if __name__ == '__main__':
  absltest.main()
