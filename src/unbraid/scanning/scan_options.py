"""The options of a scan, each with its type, default, help and check; a new one begins here.

No torch in here, so that the command line shows its help at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal, Self, TypedDict, get_args

from cyclopts import Parameter

from unbraid.base.arguments import (
    MAX_WORKERS,
    a_type,
    flag,
    real_number,
    whole_number,
    whole_numbers,
)
from unbraid.base.errors import UsageError, brief
from unbraid.base.schema import parse_json

MIN_SHARE = 0.005  # with shares adding up to one, at most 200 an image; a few dozen in practice
MAX_THREADS = 4096
MAX_PLACES = 2**16

Labels = Literal["given", "predicted", "none"]

# The command line takes these apart into options, and its help from the docstrings, which
# `unbraid.scan` says more fully.


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Loading:
    """How images go through a network.

    Args:
        batch_size: Images per forward pass. By default as many as memory holds for sure.
        workers: Processes that load images.
        skip_broken: Leave out images that cannot be read, and list them.
    """

    batch_size: int | None = None
    workers: int = 0
    skip_broken: bool = False

    def checked(self) -> Self:
        """Bring the options to plain types; UsageError if one is wrong."""
        plain: dict[str, Any] = {"workers": whole_number("workers", self.workers, 0, MAX_WORKERS)}
        plain["skip_broken"] = flag("skip_broken", self.skip_broken)
        if self.batch_size is not None:
            plain["batch_size"] = whole_number("batch_size", self.batch_size, 1)
        return replace(self, **plain)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ScanOptions(Loading):
    """What `unbraid.scan` and `unbraid scan` can be asked for.

    Args:
        labels: What gives an image its class: its folder (given), the network (predicted) or
            nothing (none).
        classes: Scan only images of these classes, by label number.
        positions: Keep the layer's input maps too. They are large.
        min_share: Smallest share to keep.
        threads: Threads to compute with. The same number gives the same bits.
        autocast: Run the network in bfloat16 where torch sees fit.
        channels_last: Run convolutions channels last. By default where that is known to be faster.
        places: Places in images to keep for each channel, those that excite it most, with what
            feeds it there. They go into OUT/places; 0 keeps none.
        prefix_tokens: Tokens before those of the image, such as CLS and registers. By default the
            network says.
    """

    labels: Labels = "given"
    target: Annotated[Any, Parameter(parse=False)] = "label"
    classes: Annotated[Sequence[int] | None, Parameter(consume_multiple=True)] = None
    indices: Annotated[Sequence[int] | None, Parameter(parse=False)] = None
    positions: bool = False
    min_share: float = MIN_SHARE
    progress: Annotated[bool, Parameter(parse=False)] = False
    source: Annotated[dict[str, Any] | None, Parameter(parse=False)] = None
    threads: int | None = None
    autocast: bool = False
    channels_last: Annotated[bool | None, Parameter(negative="--no-channels-last")] = None
    places: int = 0
    prefix_tokens: int | None = None

    def checked(self) -> Self:
        """Bring the options to plain types, lists in order; UsageError if one is wrong."""
        if self.labels not in get_args(Labels):
            raise UsageError(f"labels is {self.labels!r}; use 'given', 'predicted' or 'none'.")
        plain: dict[str, Any] = {"min_share": real_number("min_share", self.min_share)}
        if not 0 < plain["min_share"] < 1:
            raise UsageError(f"min_share is {self.min_share}; it must lie between 0 and 1.")
        if self.classes is not None and self.indices is not None:
            raise UsageError("classes and indices both say what to scan; pass one of them.")
        for option in fields(self):
            if isinstance(option.default, bool):
                plain[option.name] = flag(option.name, getattr(self, option.name))
        if self.channels_last is not None:
            plain["channels_last"] = flag("channels_last", self.channels_last)
        for name in ("classes", "indices"):
            if getattr(self, name) is not None:
                plain[name] = tuple(sorted(set(whole_numbers(name, getattr(self, name)))))
        if self.threads is not None:
            plain["threads"] = whole_number("threads", self.threads, 1, MAX_THREADS)
        plain["places"] = whole_number("places", self.places, 0, MAX_PLACES)
        if self.prefix_tokens is not None:
            plain["prefix_tokens"] = whole_number(
                "prefix_tokens", self.prefix_tokens, 0, MAX_PLACES
            )
            if not plain["places"]:
                raise UsageError("prefix_tokens is for places; ask for some with places=1000.")
        source = {} if self.source is None else self.source
        try:
            plain["source"] = parse_json(json.dumps(source, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(
                f"source cannot be written as JSON ({brief(error)}); give a dictionary of texts, "
                "numbers, and lists and dictionaries of them."
            ) from None
        if not isinstance(plain["source"], dict):
            raise UsageError(f"source is {a_type(source)}; give a dictionary, or None.")
        return replace(super().checked(), **plain)


def in_command_words(text: str) -> str:
    """Say what a message advises as the command line has it, its options in place of arguments.

    >>> in_command_words("lower batch_size, scan with positions=True or give rho=0.7.")
    'lower --batch-size, scan with --positions or give --rho 0.7.'
    """

    def as_option(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if value is None and (name not in _ARGUMENTS or "_" not in name):
            return found[0]
        option = f"--{name.replace('_', '-')}"
        return option if value in (None, "True") else f"{option} {value.strip(chr(39))}"

    return _ARGUMENT.sub(as_option, text)


_ARGUMENTS = frozenset(own.name for own in fields(ScanOptions))
# Neither a part of a path, a pattern or a text in quotes, nor one that goes on.
_ARGUMENT = re.compile(
    r"(?<![\w./'\"=?&-])(?P<name>[a-z]+(?:_[a-z]+)*)(?:=(?P<value>True|\d[\d.]*(?<!\.)|'\w+'))?"
    r"(?![\w/=-]|\.\w)"
)


class Options(TypedDict, total=False):
    """The same in the order of the signature, for type checkers, which read no dataclass there."""

    labels: Labels
    target: str | Callable[[Any], Any] | None
    classes: Sequence[int] | None
    indices: Sequence[int] | None
    positions: bool
    min_share: float
    batch_size: int | None
    workers: int
    skip_broken: bool
    progress: bool
    source: dict[str, Any] | None
    threads: int | None
    autocast: bool
    channels_last: bool | None
    places: int
    prefix_tokens: int | None
