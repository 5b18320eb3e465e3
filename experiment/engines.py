"""The interface between the experiment and an engine, and the only place that looks an engine up."""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

Batch = Mapping[str, np.ndarray]

ENGINES = {"jax": "jax_resnet", "numpy": "numpy_ref"}


class Engine(Protocol):
    """A network and the loop that trains it. `State` is the engine's own and opaque to everyone else."""

    learning_rate: Callable[[int], float]

    @property
    def device(self) -> str:
        """The device in words."""

    @property
    def threads(self) -> int | None:
        """The number of threads or processes that compute on a CPU, or None for another device."""

    @property
    def device_count(self) -> int:
        """The number of devices that share a batch, whose size must be a multiple of it."""

    @property
    def compiles(self) -> bool:
        """True if the first step takes long because it is compiled."""

    @property
    def holds_images(self) -> bool:
        """True if it saves time to `hold` a data set that fits in the device's memory."""

    @property
    def is_synchronized(self) -> bool:
        """True if other processes or engines take the same steps: `all_reduce_max` waits for them."""

    @property
    def num_blocks(self) -> int:
        """The number of residual blocks, whose branches `--drop-path` drops."""

    def init(self) -> Any:
        """The state before the first step, a function of the seed."""

    def train(
        self, state: Any, batches: Iterable[Batch], needs_state: Callable[[int], bool] = ...
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Take a step for each batch; yield the state and {"loss", "logits", "label", "grad_norm", ...}.

        `needs_state(step)` is True for the steps, counted from 1, after which the caller uses the state.
        After any other step the engine may yield None for it. A batch may have "drop_path", float64
        [N, num_blocks]: the factor of each residual branch.
        """

    def hold(self, images: np.ndarray, fill: Sequence[int]) -> None:
        """Copy images uint8 [M, H, W, C] to the device; `train` then takes batches of their indices."""

    def evaluate(self, state: Any, batches: Iterable[Batch]) -> Iterator[np.ndarray]:
        """The logits [N, num_classes] of each batch, with the running statistics, or with the averages."""

    def first_nonfinite_step(self, state: Any) -> int | None:
        """The first step (from 1) whose loss or gradient was not finite, or None."""

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any of the synchronized processes or engines passed."""

    def to_tree(self, state: Any) -> dict[str, Any]:
        """The state as {params, batch_stats, optimizer, step} of NumPy arrays under torchvision's names.

        With --model-ema-decay also "ema": {params, batch_stats}, the averages.
        """

    def from_tree(self, tree: dict[str, Any]) -> Any:
        """The inverse of `to_tree`."""

    def arrays(self, state: Any) -> dict[str, np.ndarray]:
        """The arrays of `to_tree` by their paths, such as "params/fc.bias", but in the engines' own layout
        (kernels HWIO, matrices [in, out]), and on a CPU not copied."""

    def from_arrays(self, arrays: Mapping[str, np.ndarray], reuse: Any = None) -> Any:
        """The inverse of `arrays`: a state with copies. It may be `reuse`, a state that is lost then."""


def set_environment(framework: str, *, deterministic: bool) -> None:
    """Set what JAX reads once, at its import; a value the user has set is left alone.

    Orbax and Grain import JAX in every run. If JAX is not the engine, it is limited to the CPU: it would take
    most of a GPU's memory. Compiled functions are kept in the user's cache folder:
    `JAX_COMPILATION_CACHE_DIR` names another, `JAX_ENABLE_COMPILATION_CACHE=false` keeps none.
    """
    if framework != "jax":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache_directory())
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")
    if not can_hold_files(os.environ["JAX_COMPILATION_CACHE_DIR"]):  # JAX would warn at each function
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if deterministic:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def cache_directory(name: str = "jax") -> str:
    """Return the default folder of the compilation cache, or of another; empty without a home folder."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return ""
    return str(base / "threeway-resnet" / name)


def can_hold_files(directory: str) -> bool:
    """True if files can be written in a directory that exists or can be made. Nothing is created."""
    if not directory or "://" in directory:  # JAX checks a bucket
        return bool(directory)
    path = Path(directory).absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def caches_compilation() -> bool:
    """True if the next start will find what this one compiles; after `set_environment`."""
    return os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "true").lower() not in ("false", "0", "no", "off")


def load_module(framework: str, name: str) -> ModuleType:
    """A module of an engine, imported when it is asked for and not before. Each has `engine` and `stages`."""
    return importlib.import_module(f"{ENGINES[framework]}.{name}")


def core_count() -> int:
    """Return the number of cores that this process may use; see `numpy_ref.cores`."""
    cores: int = load_module("numpy", "cores").core_count()
    return cores


def load_engine(framework: str) -> Callable[..., Engine]:
    """The class of the engine."""
    engine: Callable[..., Engine] = load_module(framework, "engine").Engine
    return engine
