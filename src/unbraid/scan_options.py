"""What a scan is asked for: its options, checked and in plain types before anything is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack, cast, get_args

from unbraid.data import UNLABELLED
from unbraid.errors import UsageError, brief
from unbraid.given import MAX_WORKERS, flag, real_number, whole_number, whole_numbers
from unbraid.manifest import MAX_THREADS, Manifest
from unbraid.strict import parse_json

Labels = Literal["given", "predicted"]

MIN_SHARE = 0.005  # with shares adding up to one, at most 200 an image; a few dozen in practice


class Options(TypedDict, total=False):
    """The options of `unbraid.scan`, which tells what they mean."""

    labels: Labels
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
    channels_last: bool
    compiled: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of a scan in plain types, which a manifest can hold."""

    labels: Labels = "given"
    classes: tuple[int, ...] | None = None  # in order, each once, as are the following
    indices: tuple[int, ...] | None = None
    positions: bool = False
    min_share: float = MIN_SHARE
    batch_size: int | None = None
    workers: int = 0
    skip_broken: bool = False
    progress: bool = False
    source: dict[str, Any] | None = None
    threads: int | None = None
    autocast: bool = False
    channels_last: bool = False
    compiled: bool = False


_FLAGS = ("positions", "skip_broken", "progress", "autocast", "channels_last", "compiled")


def settle(**options: Unpack[Options]) -> Asked:
    """Check options, all by themselves, and bring them to plain types.

    Raises:
        UsageError: one is out of range or of another type, or two exclude each other.
    """
    asked = Asked(**cast(dict[str, Any], options))  # as it was given
    classes, indices = asked.classes, asked.indices
    batch_size, threads = asked.batch_size, asked.threads
    if asked.labels not in get_args(Labels):
        known = " or ".join(map(repr, get_args(Labels)))
        raise UsageError(f"labels is {asked.labels!r}; use {known}.")
    min_share = real_number("min_share", asked.min_share)
    if not 0 < min_share < 1:
        raise UsageError(f"min_share is {min_share}; it must lie between 0 and 1.")
    if classes is not None and indices is not None:
        raise UsageError("classes and indices both say what to scan; pass one of them.")
    flags: dict[str, Any] = {name: flag(name, getattr(asked, name)) for name in _FLAGS}
    return replace(
        asked,
        classes=None if classes is None else _in_order(whole_numbers("classes", classes)),
        indices=None if indices is None else _in_order(whole_numbers("indices", indices)),
        min_share=min_share,
        batch_size=None if batch_size is None else whole_number("batch_size", batch_size, 1),
        workers=whole_number("workers", asked.workers, 0, MAX_WORKERS),
        source=_as_json(asked.source),
        threads=None if threads is None else whole_number("threads", threads, 1, MAX_THREADS),
        **flags,
    )


def _in_order(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))


def _as_json(source: Any) -> dict[str, Any]:
    """What comes back from a manifest that holds it."""
    try:
        plain = {} if source is None else parse_json(json.dumps(source, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"source cannot be written as JSON ({brief(error)}); give a dictionary of texts, "
            "numbers, and lists and dictionaries of them."
        ) from None
    if not isinstance(plain, dict):
        raise UsageError(f"source is a {type(source).__name__}; give a dictionary, or None.")
    return plain


def places_of(asked: Asked, labels: Sequence[int]) -> list[int]:
    """Places in the data set of the images to scan, in order.

    Args:
        asked: options.
        labels: given ones of all images, `UNLABELLED` for none.

    Raises:
        UsageError: there is no such place or no image of such a class, or labels are to be taken as
            given where there are none.
    """
    if asked.labels == "given" and set(labels) == {UNLABELLED}:
        raise UsageError("The data set has no labels; pass labels='predicted'.")
    if asked.indices is not None:
        places = list(asked.indices)
        if not places or places[0] < 0 or places[-1] >= len(labels):
            raise UsageError(
                f"indices must name places in the data set, 0 to {len(labels) - 1}, one or more."
            )
        return places
    if asked.classes is None:
        return list(range(len(labels)))
    wanted = set(asked.classes)
    empty = wanted - set(labels)
    if not wanted:
        raise UsageError("classes is empty; name the classes to scan, or None for all.")
    if empty:
        raise UsageError(f"classes names {sorted(empty)}, of which the data set has no image.")
    return [index for index, label in enumerate(labels) if label in wanted]


def refuse_impossible(manifest: Manifest) -> None:
    """Raise where the scan, once finished, would be refused on reading.

    Raises:
        UsageError: it would be.
    """
    try:
        Manifest.from_json(manifest.to_json())
    except ValueError as error:
        raise UsageError(
            f"A scan of layer {manifest.layer.name!r} would be too large to work with ({error}); "
            "scan a smaller layer, or images of fewer classes."
        ) from None
