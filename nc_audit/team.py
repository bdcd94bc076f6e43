"""Several processes that embed one dataset together, one per GPU, as `torchrun` or the Ray engine starts them.

The first process makes the run; the others wait until there is something to embed, embed their share of the shards
into the run's store, and are done. Which shards there are depends on the data alone, so that a team makes the same
bytes as a single process. Words go over the processor (gloo); no vector does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # what the first process does alone, such as fetching, may take long


@dataclass(frozen=True)
class Team:
    """This process among `size` of them; `rank` 0 is the first."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process makes the run."""
        return self.rank == 0

    def share(self, runs: Sequence[T]) -> list[T]:
        """Every `size`-th of some pieces of work, from the `rank`-th on.

        Example:
            >>> Team(1, 3).share("abcdefgh")
            ['b', 'e', 'h']
        """
        return list(runs[self.rank :: self.size])

    def meet(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            import torch.distributed

            torch.distributed.barrier()

    def agreed(self, value: T) -> T:
        """What the first process says."""
        if self.size == 1:
            return value
        import torch.distributed

        said: list[Any] = [value]
        torch.distributed.broadcast_object_list(said, src=0)
        return said[0]

    def gathered(self, value: T) -> list[T]:
        """What each process says, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed

        said: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(said, value)
        return said


ALONE = Team()


def of_torchrun() -> Team:
    """The team that `torchrun` started this process in, on a GPU of its own where there are any; else alone."""
    size = os.environ.get("WORLD_SIZE", "1")
    if not (size.isdecimal() and int(size) > 1 and "TORCHELASTIC_RUN_ID" in os.environ):
        return ALONE  # other launchers set WORLD_SIZE too, with processes that know nothing of each other
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)
    return Team(torch.distributed.get_rank(), torch.distributed.get_world_size())


def meeting_at(
    host: str, rank: int, size: int, tell: Callable[[list[int]], object], hear: Callable[[], int]
) -> Team:
    """The team of `size` processes on any machines.

    Args:
        host: address of the first one's machine.
        rank: of this process.
        size: how many there are.
        tell: sends the port to meet at to each of the others; called by the first.
        hear: waits for it; called by the others.
    """
    if size == 1:
        return ALONE
    import torch.distributed

    if rank == 0:
        store = torch.distributed.TCPStore(host, 0, size, is_master=True, wait_for_workers=False)
        tell([store.port] * (size - 1))
    else:
        store = torch.distributed.TCPStore(host, hear(), size, is_master=False)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    return Team(rank, size)
