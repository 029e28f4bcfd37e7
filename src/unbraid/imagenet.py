"""ImageNet-1k's classes: their WordNet ids and names, in the order of networks' outputs."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files

from torch import nn

N_IMAGENET = 1000


@cache
def imagenet_classes() -> dict[str, str]:
    """Return the names of the classes by WordNet id.

    >>> len(imagenet_classes()), next(iter(imagenet_classes().items()))
    (1000, ('n01440764', 'tench'))
    """
    text = files("unbraid").joinpath("reference", "imagenet.csv").read_text(encoding="utf-8")
    return {row["id"]: row["name"] for row in csv.DictReader(text.splitlines())}


def are_imagenet_names(names: Sequence[str]) -> bool:
    """Say whether outputs are named as ImageNet's classes, in their order, ids or words.

    >>> are_imagenet_names(list(imagenet_classes().values())), are_imagenet_names(["cat"] * 1000)
    (True, False)
    """
    known = imagenet_classes()
    if len(names) != len(known):
        return False
    same = sum(
        name[:9] == one or _first_word(name) == _first_word(word)
        for name, (one, word) in zip(names, known.items(), strict=True)
    )
    return same > N_IMAGENET // 2  # lists of them differ in some words


def _first_word(name: str) -> str:
    return "".join(name.split(",")[0].replace("_", " ").replace("-", " ").split()).casefold()


def output_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a network's outputs where it is one of timm's, which knows them.

    Its `label_names`, or else those of ImageNet-1k for a network made for that.
    """
    config = getattr(model, "pretrained_cfg", None)
    n = getattr(model, "num_classes", None)
    if not isinstance(config, Mapping):
        return ()
    names = config.get("label_names")
    if isinstance(names, Sequence) and len(names) == n:
        return tuple(map(str, names))
    if n == N_IMAGENET == config.get("num_classes"):
        return tuple(imagenet_classes().values())
    return ()
