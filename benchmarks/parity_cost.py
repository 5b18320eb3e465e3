"""Time and memory of `parity.compare`: ResNet-50 in PyTorch against JAX, train mode, two images of 64x64.

python -m benchmarks.parity_cost

The time is also given as a multiple of a forward and backward pass of the reference, which is measured in
the same process. The memory is the largest of the process, the libraries among it.
"""

from __future__ import annotations

import os
import resource
import statistics
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import torch
from flax import nnx

import jax_resnet
import parity
import torch_oracle


def seconds_of_a_pass(module: torch.nn.Module, x: np.ndarray, rounds: int = 9) -> float:
    """The median time of a forward and backward pass, after one that is not counted."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        module(torch.tensor(x)).sum().backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Compare the two and print what it took."""
    torch.manual_seed(0)
    reference = torch_oracle.MODELS["resnet50"](10).train()
    candidate = jax_resnet.MODELS["resnet50"](10, rngs=nnx.Rngs(0))
    jax_resnet.load_state_dict(candidate, torch_oracle.state_dict(reference))
    candidate.train()
    x = np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)
    models = parity.torch_model(reference), parity.nnx_model(candidate)
    start = time.perf_counter()
    report = parity.compare(*models, x, x.transpose(0, 2, 3, 1))
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    multiple = seconds / seconds_of_a_pass(reference, x)
    print(report.verdict)
    print(f"{seconds:.0f} s, {multiple:.0f} forward and backward passes of the reference; {memory:.1f} GB")


if __name__ == "__main__":
    main()
