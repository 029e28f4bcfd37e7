"""A data set of anyone's own, FILE.py:FUNCTION on the command line, listed as other sources are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset

from unbraid.base.arguments import a_type
from unbraid.base.errors import DataError, UsageError
from unbraid.base.own_code import call_function
from unbraid.base.tables import count
from unbraid.images.broken import UNLABELLED
from unbraid.images.dataset import class_names_of, group_names_of, labels_of, size_of
from unbraid.images.division import TRAIN, VAL, Divided, divide
from unbraid.images.identity import ids_of, sizes_of
from unbraid.images.listing import Items, Listing, make_listing
from unbraid.images.mapped import distinct
from unbraid.images.which import holder_of

_MARK = ".py:"
_named: set[str] = set()  # what was named in this process, not by a folder


def is_own(where: str) -> bool:
    """Whether a source is a function of a file of code, which no file or folder is called."""
    return _MARK in where and not os.path.exists(where)


def refuse_own(where: str) -> None:
    """Raise DataError of a source that would run code which only a folder names, no one here."""
    if is_own(where) and place_of(where) not in _named:
        raise DataError(
            f"The run's images come from your own code, {where}, which runs only if you name it; "
            "add --data FILE.py:FUNCTION, or start `unbraid run` again with the same options."
        )


def own_named(where: str) -> str:
    """Take a source as named here and now, so that its code may be run."""
    if is_own(where):
        _named.add(place_of(where))
    return where


def place_of(where: str) -> str:
    """Name a function of a file of code so that it is found again from any folder."""
    path, _, function = where.rpartition(":")
    return f"{Path(path).resolve()}:{function}"


def list_own(where: str) -> Listing:
    """List a data set that FILE.py:FUNCTION returns, or a part of it, FILE.py:FUNCTION/train.

    The function, without arguments, returns a data set of (tensor, label), the tensor as the
    network takes it, or (training, validation); a single one is divided.

    Raises:
        UsageError: the file or function is missing or fails, returns something else, or is asked
            for another part.
        DataError: a label has no name though others have.
    """
    path, _, called = where.rpartition(":")
    function, _, part = called.partition("/")
    if part not in ("", TRAIN, VAL):
        raise UsageError(
            f"{where} asks for a part {part!r}, and there are train and val; name "
            f"{path}:{function} or one of these."
        )
    _named.add(place_of(f"{path}:{function}"))
    made = call_function(path, function, "DATA")
    several = made if isinstance(made, tuple) else (made,)
    if len(several) > 2 or not all(hasattr(type(one), "__getitem__") for one in several):
        raise UsageError(
            f"{path}:{function} must return a data set or (training, validation), not "
            f"{a_type(made)}."
        )
    if len(several) == 2:
        if not part:
            raise UsageError(
                f"{path}:{function} returns training and validation images; name {where}/train or "
                f"{where}/val."
            )
        return _list(several[part == VAL], where)
    whole = _list(several[0], f"{path}:{function}")
    if not part:
        return whole
    own = divide(whole, part)
    assert isinstance(own.read, Divided)
    assert isinstance(whole.read, Items)
    return replace(own, read=replace(whole.read, dataset=Subset(several[0], own.read.indices)))


def _list(dataset: Dataset[Any], source: str) -> Listing:
    labels, names = labels_of(dataset), class_names_of(dataset)
    _refuse_unnamed(labels, names, source)
    ids: Sequence[str] = ids_of(dataset) or [str(index) for index in range(size_of(dataset))]
    held = holder_of(dataset, 0, "bands")
    read = Items(dataset, held and held[0].bands)
    groups, sizes = group_names_of(dataset), sizes_of(dataset)
    if names and distinct(labels) != {UNLABELLED}:
        return Listing(source, ids, read, list(names), labels, groups, sizes)
    told = [None if label == UNLABELLED else str(label) for label in labels]
    return make_listing(source, [*ids], read, told, groups, None if sizes is None else [*sizes])


def _refuse_unnamed(labels: Sequence[int], names: Sequence[str], source: str) -> None:
    """Raise DataError of a label that no name stands for, or that is below UNLABELLED."""
    for label in sorted(distinct(labels)):
        if label < UNLABELLED or (names and label >= len(names)):
            told = f"has {count(len(names), 'class name')} but" if names else "has"
            raise DataError(
                f"{source} {told} the label {label}; give labels from 0 on, {UNLABELLED} for none, "
                "and each a name in classes or none at all."
            )
