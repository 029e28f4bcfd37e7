"""Processes that torchrun starts for one work: who is first, and who does what."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_LOOK = 0.05  # seconds between looks at what others have done


class Team:
    """Processes that scan together, or one alone: they share a store, where shards are claimed.

    Nobody waits for anybody before the end, so no number of processes or shards makes them hang.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Begin a work, in a store that holds nothing else."""
        self.first = rank == 0  # who speaks and prepares for all
        self._store, self._rank, self._size = store, rank, size
        self._counted = 0

    def lead(self, prepare: Callable[[], str], about: str = "prepared") -> str:
        """Let the first prepare; the others wait for it. Return what the first has to say.

        Of several things to prepare each has a name.
        """
        if self.first:
            self._store.set(about, prepare())
        self._wait_for([about])
        return bytes(self._store.get(about)).decode()

    def claims(self, n_pieces: int) -> Iterator[int]:
        """Hand out the pieces of the work one by one, each to whoever asks next."""
        while (piece := self._store.add("claimed", 1) - 1) < n_pieces:
            yield piece

    def count(self, n: int) -> int:
        """Add to what all have counted; return by how much that has grown since the last call."""
        total = self._store.add("counted", n)
        grown, self._counted = total - self._counted, total
        return int(grown)

    def finish(self) -> None:
        """Wait until all have done what they claimed; torchrun ends us if one dies."""
        self._store.set(f"done {self._rank}", "")
        self._wait_for([f"done {rank}" for rank in range(self._size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):  # in short steps, so that a signal is heard
            time.sleep(_LOOK)


def join_team() -> Team:
    """The team for the next work; every process must ask for the same works in the same order."""
    if n_ranks() == 1:
        return Team(HashStore(), 0, 1)
    store, rank, size = _joined()
    # The store outlives processes that torchrun starts again, and what they claimed does not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Team(PrefixStore(f"unbraid {attempt} {next(_works)}", store), rank, size)


def n_ranks() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0" or n_ranks() == 1


_works = itertools.count()


@functools.cache
def _joined() -> tuple[Store, int, int]:
    joined: tuple[Any, int, int] = next(rendezvous("env://"))
    return joined
