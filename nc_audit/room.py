"""Room for many vectors: in memory, or, where they would take much of it, in a file read as it is needed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nc_audit.run import writing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PART = 8
"""What takes more than one part in so many of the memory goes into a file."""


def room_for(num: int, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of `num` vectors on the processor, shape [num, dim], float32 where no other is asked for.

    A large one lies in a nameless file of the folder for temporary files (`TMPDIR`), which the operating system reads
    and writes as memory allows, and which ends with the tensor or the process.

    Raises:
        DiskError: there is no room in that folder.
    """
    import torch

    dtype = dtype or torch.float32
    size = dtype.itemsize * num * dim
    limit = memory_limit()
    if limit is None or size * PART <= limit:
        return torch.empty(num, dim, dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="nc-audit-vectors-")
    try:
        # Room is claimed before anything is written: a full disk would end the process at some later write.
        with writing(Path(name)):
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
        return torch.from_file(name, shared=True, size=num * dim, dtype=dtype).view(num, dim)
    finally:
        os.close(handle)
        Path(name).unlink()


def memory_limit() -> int | None:
    """Bytes of memory that this process may use: the machine's, or less where a control group says so.

    None where the platform does not tell.
    """
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):
        return None
    return min(limits + _group_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")))


def _group_limits(membership: Path, mounted: Path) -> list[int]:
    """Limits of the control groups that a process is in, and of those above them, of either version."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if controllers == "":
            root, name = mounted, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mounted / "memory", "memory.limit_in_bytes"
        else:
            continue
        inside = Path(place.lstrip("/"))
        for folder in (inside, *inside.parents):
            try:
                limits.append(int((root / folder / name).read_text()))
            except (OSError, ValueError):  # not there (a container sees its own group as the root), or "max"
                continue
    return limits
