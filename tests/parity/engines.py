"""The implementations that compute a case: both engines in each of their forms, and PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tests.parity import jax_side, numpy_side, torch_side
from tests.parity.case import Case, Inputs, Results

ENGINES: dict[str, Callable[[Case, Inputs], Results]] = {
    "numpy": numpy_side.run,
    "numpy-plain": partial(numpy_side.run, form="plain"),
    "numpy-loops": partial(numpy_side.run, form="loops"),
    "jax": jax_side.run,
    "jax-other-convolution": partial(jax_side.run, other_convolution=True),
    "torch": torch_side.run,
    "torch-channels-last": partial(torch_side.run, channels_last=True),
    "truth": partial(torch_side.run, precision="float64"),  # of the inputs as float32 has them
}

_FORMS = {
    "conv": {"numpy-plain", "numpy-loops", "jax-other-convolution"},
    "batch_norm": {"numpy-plain"},
    "max_pool": {"numpy-plain"},
    "stage": {"numpy-plain", "jax-other-convolution"},
    "network": {"numpy-plain"},
}


def engines_for(case: Case) -> list[str]:
    """Return the engines that compute a case, in the order of `ENGINES`."""
    names = {"numpy", "jax", "torch"} | _FORMS.get(case.kind, set())
    if case.precision == "float32":
        # The readable forms add one number after another: in float32 an error of 2e-6 for a thousand terms
        names = names - {"numpy-plain", "numpy-loops"} | {"truth"}
        if case.kind == "network":
            names.add("torch-channels-last")
    if case.kind == "max_pool" and not all(isinstance(side, int) for side in case.options.values()):
        names.discard("jax")  # its pooling has square windows
    return [name for name in ENGINES if name in names]


def run_all(case: Case, inputs: Inputs, engines: Iterable[str]) -> dict[str, Results]:
    """Return {engine: {tensor: array}}."""
    return {name: ENGINES[name](case, inputs) for name in engines}
