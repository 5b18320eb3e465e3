"""What every test shares: where JAX runs, seeded property tests, the data and the device it may ask for.

Environment:
    THREEWAY_DATA_DIR   a TFDS data directory; without it the tests on real data are skipped.
    THREEWAY_GPU=1      JAX takes the GPU instead of the CPU; tests marked gpu fail where JAX finds none.
    JAX_PLATFORMS       as JAX reads it; left alone where it is set.
"""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    import jax

ON_GPU = os.environ.get("THREEWAY_GPU") == "1"

# Before any import of JAX, here and in subprocesses. One CPU device: what needs several starts a subprocess.
os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if ON_GPU else "cpu")
if ON_GPU:  # tests start training processes beside this one on the same GPU
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Many tests compile the same programs, and train.py would keep them in the user's home: one cache for the
# tests and the processes they start, gone afterwards. xdist's workers take the environment of this process.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="threeway-resnet-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    if not ON_GPU:  # else a key holds the folder's path, though only GPUs have these caches
        os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"

# Most of the time goes into compilation. These flags take a third of it, for slower code of the same kind:
# LLVM's lowest level (`train.py` has 3), fusions emitted by XLA's older code generator, one module for LLVM.
if not ON_GPU and "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    quick = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    quick += " --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}".strip()

# With `-n 2` two processes of tests share the cores. NumPy and PyTorch read this when they are imported.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, str(max(1, (os.cpu_count() or 1) // workers)))

# Compilation makes the first example slow, and a failure must come again at the next run.
hypothesis.settings.register_profile("threeway", deadline=None, derandomize=True)
hypothesis.settings.load_profile("threeway")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU; begin with test_resume.py.

    A test marked gpu that takes its device from `accelerator` runs on the CPU too; others need the GPU.
    The tests of test_resume.py share runs that take long to make. xdist gives the first tests to one worker,
    so that they are made once.
    """
    items.sort(key=lambda item: item.path.name != "test_resume.py")
    if ON_GPU:
        return
    needs_gpu = pytest.mark.skip(reason="needs an NVIDIA GPU: set THREEWAY_GPU=1 where there is one")
    for item in items:
        if item.get_closest_marker("gpu") and "accelerator" not in getattr(item, "fixturenames", ()):
            item.add_marker(needs_gpu)


def pytest_collection_finish() -> None:
    """What was imported stays: no garbage collection need look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def accelerator() -> jax.Device:
    """The device to compute on: JAX's first, which THREEWAY_GPU=1 promises to be a GPU."""
    import jax

    device = jax.devices()[0]
    if ON_GPU and device.platform != "gpu":
        pytest.fail(f"THREEWAY_GPU=1, but JAX finds no GPU: {device}")
    return device


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The TFDS data directory named by THREEWAY_DATA_DIR."""
    value = os.environ.get("THREEWAY_DATA_DIR")
    if not value:
        pytest.skip("real data: set THREEWAY_DATA_DIR to a TFDS data directory")
    path = Path(value).resolve()
    if not path.is_dir():
        pytest.fail(f"THREEWAY_DATA_DIR is not a directory: {path}")
    return path
