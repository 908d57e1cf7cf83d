"""Keeping freed memory in the process.

A bundle's activations and gradients are M times as large as one model's. glibc gives every block
of more than 32 MB back to the system as soon as it is freed, so each training step would get its
large tensors as fresh pages, which the kernel has to clear one by one: with a ResNet-8 bundle that
costs as much as computing it. Told to keep freed memory, glibc hands the same pages out again.
"""

import ctypes
import functools
import os
import platform

# <malloc.h> of glibc
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc's malloc keep what is freed for the next allocation, for the whole process.

    Called when the first bundle is made. The process then does not shrink below the most memory it
    has used at one time. `MODELBATCH_KEEP_MEMORY=0` in the environment switches it off. Only glibc
    is affected; other C libraries and preloaded allocators are left alone.

    Returns:
        Whether freed memory is kept.
    """
    if os.environ.get("MODELBATCH_KEEP_MEMORY", "1") == "0":
        return False
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    if any(name in os.environ.get("LD_PRELOAD", "") for name in ("jemalloc", "tcmalloc")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
