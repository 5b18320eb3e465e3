"""Freed memory reused by the next arrays, on a CPU with the GNU C library."""

from __future__ import annotations

import ctypes
import os
import sys

# malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def reuse_freed_memory() -> bool:
    """Make the C library keep freed memory for later arrays; return True if it does.

    XLA allocates and frees the arrays of a step with malloc. glibc returns large ones to the system, which
    provides new memory page by page, at the first write to each: for a large array as slow as a pass over
    it. So there is one heap for all threads (M_ARENA_MAX), with the large arrays in it (M_MMAP_THRESHOLD),
    and its end is not returned (M_TRIM_THRESHOLD). See mallopt(3).

    Call it before JAX starts its threads. The setting is the whole process's. It does nothing with another C
    library, or where the environment sets malloc up (MALLOC_..., GLIBC_TUNABLES).

    A step takes, of the time before (two AMD EPYC cores, jax 0.10.2, 30 November 2026): ResNet-20 at
    128 @ 32x32x3 0.72, with up to half more memory in use; ResNet-18 with `small_images` at 64 @ 32x32x3
    0.88; ResNet-18, 34, 50 and 101 at 4 @ 224x224x3 0.89, 0.97, 0.97 and 0.95. Networks with small maps and
    large weights are not helped: ResNet-101 takes 1.10 or more at 32 @ 32x32x1 and 1.09 at 8 @ 96x96x3.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    options = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 1 << 30, M_TRIM_THRESHOLD: (1 << 31) - 1}
    return all(libc.mallopt(name, value) for name, value in options.items())
