"""Trees of arrays on the disk, by Orbax: the only file that knows it, as its v1 interface still moves."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import numpy as np

Tree = dict[str, Any]
_one_at_a_time = Lock()  # Orbax fails where two threads of a process save, as runs that train together do


def differences(expected: Tree, given: Tree) -> list[str]:
    """Return the differences between two trees of arrays in names, shapes and types, a line for each."""
    old_leaves, new_leaves = dict(_leaves(expected)), dict(_leaves(given))
    lines = [f"{name} is missing" for name in old_leaves.keys() - new_leaves.keys()]
    lines += [f"{name} is unexpected" for name in new_leaves.keys() - old_leaves.keys()]
    for name in old_leaves.keys() & new_leaves.keys():
        old, new = old_leaves[name], new_leaves[name]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            lines.append(f"{name} is {new.dtype}{list(new.shape)}, not {old.dtype}{list(old.shape)}")
    return sorted(lines)


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield prefix + name, np.asarray(value)


def save_arrays(path: Path, tree: Tree) -> None:
    """Write a tree of NumPy arrays as the folder `path`."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    # Trained weights hardly compress, and zstd would take its time from training.
    context.array_options.saving.use_compression = False
    with _one_at_a_time, context, _closed_loops_unreported():
        ocp.save(path, tree)


@contextmanager
def _closed_loops_unreported() -> Iterator[None]:
    """Suppress the tracebacks of TensorStore, which after a failed write reports to a closed event loop.

    The failure itself is raised. The tracebacks may come late, so that the hook stays after a failure.
    """
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = report


def load_arrays(path: Path) -> Tree:
    """Return the tree that `save_arrays` wrote."""
    from orbax.checkpoint import v1 as ocp

    with _one_at_a_time:
        tree: Tree = ocp.load(path)
    return tree


def call_alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return function(*arguments); if JAX has joined several processes, call it in a new process.

    Orbax saves from all joined processes together. Even when only one of them saves, it asks the others to
    confirm the path. It would ask in the middle of their steps, and from our background thread.
    """
    import jax

    if jax.process_count() == 1:
        return function(*arguments)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _hold_to_cpu) as pool:
        return pool.submit(function, *arguments).result()


def _hold_to_cpu() -> None:
    """Limit JAX of this process to the CPU, and end the process with the one that started it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Wait for the end of the process that started this one, then end this one, too."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
