"""How a process of ours is set up before anything heavy is imported: threads, memory, garbage."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000", "THP_MEM_ALLOC_ENABLE": "1"}
"""How threads of a product wait for each other, and that tensors lie in large pages, where the user does not say.

Threads that wait by spinning take the processor from every other job that shares it, and from each other; those that
sleep at once are late for the next of many small products. So they spin for microseconds, then sleep.
"""
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # names of `mallopt`
_KEPT = 256 << 20
"""So many bytes that are free may stay with the process."""
_LARGE = (64 << 20, 32 << 20)
"""What takes more bytes goes back as soon as it is free; the second where the C library refuses the first."""


def set_up() -> None:
    """Set up this process; before torch is imported, whose libraries read the environment once."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Importing torch makes next to no garbage, and looking for it takes half a second.
    gc.set_threshold(100_000)
    keep_freed_memory()


def give_back_memory() -> None:
    """Give back what tables of Arrow took that are gone; its allocator would keep it for the next ones."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def keep_freed_memory() -> None:
    """Have the C library use freed memory again, where it would hand it back and ask for it anew.

    Encoders free and ask for tens of MB with every layer. The kernel clears each page anew, which takes up to a fifth
    of the time of embedding on a processor. Nothing is done where the C library is not glibc, or the user's environment
    says how memory is to be kept (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    told = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if not sys.platform.startswith("linux") or told:
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGE):
            mallopt(_TRIM_THRESHOLD, _KEPT)
            mallopt(_ARENA_MAX, 1)  # of other threads' arenas, none is larger than 64 MB
