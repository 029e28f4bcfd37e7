"""The doors of the package: what every public function does with the modes that it is called in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def in_plain_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Run a public function as if it were called outside of any of torch's modes.

    Inference mode, no_grad and autocast around it do not reach what it computes, and the caller's
    random numbers go on where they were.
    """

    @functools.wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        from unbraid.as_found import plain_modes  # here, since torch takes long to import

        with plain_modes():
            return function(*args, **named)

    return run
