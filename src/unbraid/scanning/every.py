"""Every layer of a network, or as many of them, over its depth, as a bounded disk holds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from unbraid.base.errors import UsageError
from unbraid.base.tables import count
from unbraid.images.dataset import size_of
from unbraid.networks.copying import unwrap
from unbraid.networks.layers import ALL, LayerName, describe, is_pattern, resolve_layer
from unbraid.networks.spec import LayerSpec, most_spread
from unbraid.scanning.place_shards import most_place_bytes
from unbraid.scanning.scan_options import MIN_SHARE

DISK = 20 * 10**9  # bytes that the scans of all layers together may take


def scan_bytes(layer: LayerSpec, n_images: int, number: int) -> int:
    """How much disk a scan without positions takes at most, of numbers of so many bytes."""
    taps = layer.groups * layer.n_taps
    n_shares = min(layer.n_out, round(1 / MIN_SHARE))
    fixed = 5 * 8  # index, label, prediction and the like
    return n_images * (taps * number + n_shares * (4 + number) + fixed) + number * most_spread(
        layer
    )


def within_disk(
    layers: Sequence[LayerSpec],
    n_images: Sequence[int],
    number: int,
    budget: int | None = None,
    *,
    places: int = 0,
) -> list[LayerSpec]:
    """Choose layers whose scans of some data sets the budget holds, in the network's order.

    With so many places of each channel besides, if any are kept.

    They are taken evenly over depth: the middle one, the middles of both halves, and so on, each
    if there is still room for it. The same network and numbers of images give the same layers.
    """
    left = DISK if budget is None else budget
    chosen = set()
    for k in _from_the_middle(len(layers)):
        need = sum(scan_bytes(layers[k], n, number) for n in n_images)
        if places:
            need += len(n_images) * most_place_bytes(layers[k], places, number)
        if need <= left:
            chosen.add(k)
            left -= need
    return [layer for k, layer in enumerate(layers) if k in chosen]


def as_many_as_fit(
    model: nn.Module,
    asked: Sequence[LayerName],
    names: Sequence[str],
    data: Sequence[Dataset[Any]],
    places: int = 0,
) -> tuple[list[str], list[str]]:
    """Divide the names of layers into those to scan and those that the disk's budget leaves out.

    All are scanned unless "all" was asked for. UsageError if the budget holds none.
    """
    if not any(isinstance(own, str) and own == ALL and is_pattern(model, own) for own in asked):
        return list(names), []
    number = max([4, *(weight.element_size() for weight in unwrap(model).parameters())])
    layers = [describe(name, resolve_layer(model, name)[1]) for name in names]
    held = within_disk(layers, [size_of(images) for images in data], number, places=places)
    if not held:
        raise UsageError(
            f"The scan of any layer takes more than {DISK / 1e9:g} GB; name the layers to scan, or "
            f"scan fewer images{' or keep fewer places' if places else ''}."
        )
    chosen = [layer.name for layer in held]
    return chosen, [name for name in names if name not in chosen]


def tell_rest(chosen: Sequence[str], left_out: Sequence[str]) -> str:
    """Say which layers the budget does not hold, and how to have them all the same."""
    return (
        f"{len(left_out)} of {count(len(left_out) + len(chosen), 'layer')} left out, as scans of "
        f"all might take more than {DISK / 1e9:g} GB; the same command with "
        f"{as_options(left_out)} in place of --layer {ALL} makes them."
    )


def as_options(names: Sequence[str]) -> str:
    """Name layers as the command line takes them."""
    return " ".join(f"--layer {shlex.quote(name)}" for name in names)


def _from_the_middle(n: int) -> Iterator[int]:
    """Numbers below n: the middle one, the middles of both halves, and so on.

    >>> list(_from_the_middle(7))
    [3, 1, 5, 0, 2, 4, 6]
    """
    spans = [(0, n)]
    while spans:
        spans = [(low, high) for low, high in spans if low < high]
        yield from ((low + high) // 2 for low, high in spans)
        spans = [
            half
            for low, high in spans
            for half in ((low, (low + high) // 2), ((low + high) // 2 + 1, high))
        ]
