"""OpenBLAS, the library of NumPy's matrix products, in this process: its kernels and its threads."""

from __future__ import annotations

import ctypes
import importlib
from functools import cache


@cache
def _library() -> ctypes.CDLL | None:
    """Return what finds the functions of the OpenBLAS in NumPy's wheels; None for another library."""
    try:
        extension = importlib.import_module("numpy._core._multiarray_umath")
        library = ctypes.CDLL(extension.__file__)  # with all that it is linked to
        library.scipy_openblas_get_corename64_.restype = ctypes.c_char_p
    except (ImportError, OSError, AttributeError):
        return None
    return library


def kernels() -> str | None:
    """Return the name of OpenBLAS's kernels, such as "Haswell" (AVX2), or None for another library.

    OpenBLAS chooses them by the CPU when it is loaded, unless OPENBLAS_CORETYPE in the environment names
    others. Processes that are started use the same ones. Other kernels round otherwise.
    """
    library = _library()
    if library is None:
        return None
    name: bytes = library.scipy_openblas_get_corename64_()
    return name.decode()


def use_one_thread() -> None:
    """Let OpenBLAS compute with one thread: it does not see the limits of control groups."""
    library = _library()
    if library is not None:
        library.scipy_openblas_set_num_threads64_(1)
