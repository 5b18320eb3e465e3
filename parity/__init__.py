"""Where do two models differ, and why? For PyTorch, Flax, any JAX function and NumPy layers.

    report = parity.compare(parity.torch_model(module), parity.nnx_model(port), x, candidate_inputs=x_nhwc)
    print(report)

A framework is imported only by the adapter that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parity.compare import compare as compare
from parity.files import save as save
from parity.files import saved_model as saved_model
from parity.function_adapter import function_model as function_model
from parity.numpy_adapter import numpy_model as numpy_model
from parity.optimizers import compare_optimizers as compare_optimizers
from parity.recorded import compare_tensors as compare_tensors
from parity.report import Difference as Difference
from parity.report import Report as Report
from parity.trace import Model as Model
from parity.trace import ParityError as ParityError
from parity.trace import Trace as Trace
from parity.trace import Value as Value
from parity.training import compare_schedules as compare_schedules
from parity.training import compare_training as compare_training

if TYPE_CHECKING:
    from parity.jax_adapter import jax_model as jax_model
    from parity.jax_adapter import linen_model as linen_model
    from parity.jax_adapter import nnx_model as nnx_model
    from parity.torch_adapter import torch_model as torch_model

_ADAPTERS = {
    "jax_model": "jax_adapter",
    "linen_model": "jax_adapter",
    "nnx_model": "jax_adapter",
    "torch_model": "torch_adapter",
}


def __getattr__(name: str) -> Any:
    """Import the adapter of a framework when it is first used."""
    if name not in _ADAPTERS:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"parity.{_ADAPTERS[name]}"), name)


def assert_agrees(*args: Any, **kwargs: Any) -> None:
    """`compare` for tests: takes its arguments.

    Raises:
        AssertionError: the models differ; the message is the verdict.
    """
    report = compare(*args, **kwargs)
    if not report.agrees:
        raise AssertionError(report.verdict)
