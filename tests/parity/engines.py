"""Who computes a case: both engines in each of their forms, and the judge."""

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
    """Those that a case is computed by, in the order of `ENGINES`."""
    wanted = {"numpy", "jax", "torch"} | _FORMS.get(case.kind, set())
    if case.precision == "float32":
        # The readable forms add up number by number, which float32 does not bear: 2e-6 of a thousand
        wanted = wanted - {"numpy-plain", "numpy-loops"} | {"truth"}
        if case.kind == "network":
            wanted.add("torch-channels-last")
    if case.kind == "max_pool" and not all(isinstance(side, int) for side in case.options.values()):
        wanted.discard("jax")  # its pooling has square windows
    return [name for name in ENGINES if name in wanted]


def run_all(case: Case, inputs: Inputs, engines: Iterable[str]) -> dict[str, Results]:
    """{engine: {tensor: array}}."""
    return {name: ENGINES[name](case, inputs) for name in engines}
