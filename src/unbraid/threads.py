"""Run many small jobs side by side, each on one processor.

Matrices of a few hundred rows gain nothing from several processors at once, and lose a lot where
others want these too; several matrices do gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Answer = TypeVar("Answer")


def side_by_side(work: Callable[[Job], Answer], jobs: Iterable[Job]) -> list[Answer]:
    """Do the jobs on as many processors as torch may use, and return the answers in order.

    >>> side_by_side(abs, [-1, 2, -3])
    [1, 2, 3]
    """
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(
            n_threads, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, jobs))
    finally:
        torch.set_num_threads(n_threads)
