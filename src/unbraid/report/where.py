"""Where in its reference images a channel answers, and where its input comes from.

Shapes: h, w positions of the layer's output; H, W of its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.layers import LayerSpec, respond
from unbraid.records import Scan
from unbraid.splits import ChannelSplit


@dataclass(frozen=True)
class Spot:
    """One image as a channel's reference image."""

    channel: int
    concept: int | None  # whose concept channel; None for the original
    index: int  # place in the data set


@dataclass(frozen=True, eq=False)
class Where:
    """What lies where in an image, in parts of the strongest place; zero where it is negative."""

    answer: Tensor  # (h, w), pre-activation
    source: Tensor | None  # (H, W), input relevance; None where it is the same up to the bias


def find_where(maps: Scan, parts: Sequence[ChannelSplit], spots: set[Spot]) -> dict[Spot, Where]:
    """Compute where channels answer and what feeds them.

    Args:
        maps: a scan with positions; of images that it does not hold nothing is known.
        parts: the split channels.
        spots: which channels to look at in which images.

    Returns:
        Nothing for a layer whose positions are not those of a picture.
    """
    if not maps.positions or len(maps.layer.kernel) != 2:
        return {}
    wanted: dict[int, dict[int, list[Spot]]] = {}
    for spot in spots:
        wanted.setdefault(spot.channel, {}).setdefault(spot.index, []).append(spot)
    known: dict[Spot, Where] = {}
    for records in maps.shards():
        assert records.input_map is not None
        for part in parts:
            of_channel = wanted.get(part.channel, {})
            here = torch.isin(records.index, torch.tensor([*of_channel], dtype=torch.int64))
            if not here.any():
                continue
            images = records.input_map[here].double()
            for place, index in enumerate(records.index[here].tolist()):
                known |= _of_image(maps.layer, part, images[place], of_channel[index])
    return known


def _of_image(
    layer: LayerSpec, part: ChannelSplit, image: Tensor, spots: Sequence[Spot]
) -> dict[Spot, Where]:
    rows = torch.stack([_row(part, spot.concept) for spot in spots])
    bias = torch.full((len(rows),), part.bias, dtype=torch.float64)
    answers = respond(layer, image[None], rows, bias, [part.channel] * len(rows))[0]
    sources: Iterator[Tensor | None] = iter([None] * len(rows))
    if layer.taps_per_input > 1 or answers.shape[1:] != image.shape[1:]:
        sources = iter(source_maps(layer, part.channel, image, rows))
    return {
        spot: Where(_shade(answer), None if source is None else _shade(source))
        for spot, answer, source in zip(spots, answers, sources, strict=True)
    }


def source_maps(layer: LayerSpec, channel: int, image: Tensor, rows: Tensor) -> Tensor:
    """Compute, position by position, how much of a summed pre-activation comes in there.

    Args:
        layer: that the rows belong to.
        channel: that they were made from.
        image: (C_in, H, W), the layer's input, float64.
        rows: (R, J), float64.

    Returns:
        (R, H, W), input times gradient of the summed pre-activation, summed over input channels;
        over all positions it adds up to the summed pre-activation without the bias.

    Source:
        METHOD.md section 2, before the sum over positions.
    """
    leaf = image[None].detach().requires_grad_()
    with torch.enable_grad():
        none = torch.zeros(len(rows), dtype=rows.dtype)
        summed = respond(layer, leaf, rows, none, [channel] * len(rows)).flatten(2).sum(2)[0]
        gradients = [torch.autograd.grad(one, leaf, retain_graph=True)[0][0] for one in summed]
    return torch.stack([(image * gradient).sum(0) for gradient in gradients])


def _row(part: ChannelSplit, concept: int | None) -> Tensor:
    return (part.weight if concept is None else part.rows[concept]).double()


def _shade(values: Tensor) -> Tensor:
    """Divide by the largest value, if any is above zero."""
    positive = values.clamp(min=0)
    largest = positive.max()
    return positive / largest if largest > 0 else positive
