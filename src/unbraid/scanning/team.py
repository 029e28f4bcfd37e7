"""Processes that scan together, as `torchrun` starts them, on one machine or many.

They share nothing but a store, in which shards are claimed one by one. There is no collective
communication, so nobody waits for anybody before the end, and no number of processes or shards can
make them hang.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

_PAUSE = 0.05  # seconds between looks at what others have done


class Team(Protocol):
    """Those who do a piece of work together."""

    first: bool  # whether this process speaks and prepares for all

    def lead(self, prepare: Callable[[], None], work: str) -> str:
        """Let the first prepare; the others wait for it. Return the first's text for the work."""

    def claims(self, n_pieces: int) -> Iterator[int]:
        """Hand out the pieces of the work, each to one of the team."""

    def count(self, n: int) -> int:
        """Add to what all have counted together; return by how much that has grown since."""

    def finish(self) -> None:
        """Wait until all have done what they claimed."""


class Alone:
    """A team of one."""

    first = True

    def lead(self, prepare: Callable[[], None], work: str) -> str:
        """Prepare."""
        prepare()
        return work

    def claims(self, n_pieces: int) -> Iterator[int]:
        """Hand out all pieces."""
        return iter(range(n_pieces))

    def count(self, n: int) -> int:
        """Count."""
        return n

    def finish(self) -> None:
        """Be done."""


class Ranks:
    """The processes that torchrun started; each takes part in the same works in the same order."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Begin a work, in a store that holds nothing else."""
        self.first = rank == 0
        self._store, self._rank, self._size = store, rank, size
        self._counted = 0

    def lead(self, prepare: Callable[[], None], work: str) -> str:
        """Let rank 0 prepare; the others wait for it. Return rank 0's text for the work."""
        if self.first:
            prepare()
            self._store.set("prepared", work)
        self._wait_for(["prepared"])
        return bytes(self._store.get("prepared")).decode()

    def claims(self, n_pieces: int) -> Iterator[int]:
        """Hand out the pieces one by one, each to whoever asks next."""
        while (piece := self._store.add("claimed", 1) - 1) < n_pieces:
            yield piece

    def count(self, n: int) -> int:
        """Add to what all have counted; return by how much that has grown since the last call."""
        total = self._store.add("counted", n)
        grown, self._counted = total - self._counted, total
        return int(grown)

    def finish(self) -> None:
        """Wait until all ranks have done what they claimed; torchrun ends us if one dies."""
        self._store.set(f"done {self._rank}", "")
        self._wait_for([f"done {rank}" for rank in range(self._size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):  # in short steps, so that a signal is heard
            time.sleep(_PAUSE)


def team() -> Team:
    """The team for the next work: this process alone, or all that torchrun started.

    Every rank must ask for the same works in the same order.
    """
    if n_ranks() == 1:
        return Alone()
    store, rank, size = _joined()
    # The store outlives processes that torchrun starts anew, and what they claimed does not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Ranks(PrefixStore(f"unbraid {attempt} {next(_works)}", store), rank, size)


def n_ranks() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return n_ranks() == 1 or os.environ["RANK"] == "0"


_works = itertools.count()


@functools.cache
def _joined() -> tuple[Store, int, int]:
    joined: tuple[Any, int, int] = next(rendezvous("env://"))
    return joined
