"""Which concept channels one image uses, how much and where.

Shapes: S split channels, R concept channels of all of them, C_out channels, P positions, T classes
asked for. What is computed of channels stands in S + R rows: whole channels, then concept channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unbraid.base.arguments import whole_number
from unbraid.base.errors import ModelError, UsageError, brief, nearest
from unbraid.base.tables import Table, Tabular, figure, one_line
from unbraid.finding.findings import Concept
from unbraid.finding.membership import name_of
from unbraid.images.which import image_named
from unbraid.measuring.heatmap import heatmap
from unbraid.measuring.where import grid_of, grids_seen
from unbraid.networks.copying import device_of
from unbraid.networks.outputs import logits_of, refuse_broken_values, run_network, run_raw
from unbraid.networks.preflight import refuse_unsteady
from unbraid.networks.relevance import (
    cut_at,
    gradients_at,
    never_ran,
    output_relevance,
    undisturbed,
)
from unbraid.networks.spec import channels_first
from unbraid.scanning.targets import Scalar
from unbraid.splitting.quantiles import percentile
from unbraid.surgery.apply import in_force
from unbraid.surgery.split_layer import SplitLayer, make_moves

Part = int | Literal["rest"] | None  # a concept channel, the rest channel, or the whole channel

_NOTE = (
    "share: part of all positive relevance in the layer for the class",
    "pct: percentile of the response among the scan's images",
    "whole: response, pct and share of the whole channel",
)
_UNKNOWN = "percentiles are unknown, as the split was made from places or by an earlier version"


@dataclass(frozen=True, eq=False)
class Response:
    """What a channel, one of its concept channels or its rest channel does in one image."""

    channel: int
    part: Part
    classes: Concept  # of the concept; empty for the whole channel and the rest
    concept: str  # its name
    response: float  # mean pre-activation over positions
    percentile: float  # of it among the scan's images; NaN where that is not known
    # Of each class asked for, the predicted one first: gradient x activation in units of its logit,
    # and that as a part of all positive relevance in the layer.
    relevance: tuple[float, ...]
    share: tuple[float, ...]
    # (h, w), of a signal (l,), of a clip or volume (d, h, w): pre-activation at the layer's
    # positions; None where these are not the image's
    map: Tensor | None = field(default=None, repr=False)
    # (H, W), (L,) or (D, H, W), how much each pixel adds to it; only of the strongest
    heatmap: Tensor | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """Such as "7" for a whole channel, "7.0" for a concept channel, "7.rest"."""
        return str(self.channel) if self.part is None else f"{self.channel}.{self.part}"


@dataclass(frozen=True, eq=False)
class ChannelResponses:
    """One split channel in one image; its concept channels and its rest add up to it."""

    whole: Response
    concepts: tuple[Response, ...]
    rest: Response


@dataclass(frozen=True, eq=False)
class ImageExplanation(Tabular):
    """What the concept channels of a layer do in one image."""

    image: str  # its name
    layer: str
    classes: tuple[int, ...]  # asked for, the predicted one first; none of another target
    class_names: tuple[str, ...]  # of these, or the target's name
    logits: tuple[float, ...]  # of these, or the target
    channels: tuple[ChannelResponses, ...]
    n: int = 8  # concept channels to show
    note: str = ""  # what there is not, and why
    target: str = "label"  # in whose units relevance is
    sizes: tuple[int, ...] = ()  # of the image without channels: (H, W), (L,) or (D, H, W)

    def __getitem__(self, channel: int) -> ChannelResponses:
        """Return one split channel; KeyError if it is none."""
        for own in self.channels:
            if own.whole.channel == channel:
                return own
        raise KeyError(f"channel {channel} was not split")

    @property
    def strongest(self) -> list[tuple[Response, Response]]:
        """The concept channels with the largest shares, below zero too, beside whole channels."""
        pairs = [(concept, own.whole) for own in self.channels for concept in own.concepts]
        return sorted(pairs, key=lambda pair: -abs(pair[0].share[0]))[: self.n]

    @property
    def title(self) -> str:
        """What the network takes the image for."""
        told = zip(self.class_names, self.logits, strict=True)
        (first, logit), *others = told
        more = "".join(f"; {name} {value:.2f}" for name, value in others)
        if not self.classes:
            return one_line(f"{_printable(self.image)}: {first} {logit:.3g}")
        return one_line(f"{_printable(self.image)}: {first}, logit {logit:.2f}{more}")

    def table(self) -> Table:
        """Show the strongest concept channels, strongest first."""
        others = [f"for {name}" for name in self.class_names[1:]]
        heads = ("concept", "response", "pct", "share", *others, "whole", "pct", "share", "classes")
        rows = [
            (
                *(concept.name, *_figures(concept)),
                *(f"{share:.1%}" for share in concept.share[1:]),
                *(*_figures(whole), concept.concept),
            )
            for concept, whole in self.strongest
        ]
        n_all = sum(len(own.concepts) for own in self.channels)
        known = any(not math.isnan(own.whole.percentile) for own in self.channels)
        notes = [note for note in (*_NOTE, "" if known else _UNKNOWN, self.note) if note]
        title = f"{self.title} ({len(rows)} of {n_all} concept channels)"
        return Table([heads, *rows], title, "\n".join(notes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, without heatmaps; None for what is not known."""
        kept = ("layer", "classes", "class_names", "logits")
        # A file's name may hold bytes that are no text.
        image = self.image.encode("utf-8", "backslashreplace").decode()
        return (
            {"image": image}
            | {name: getattr(self, name) for name in kept}
            | {
                "channels": [
                    {
                        "channel": own.whole.channel,
                        "whole": _plain(own.whole),
                        "concepts": [_plain(concept) for concept in own.concepts],
                        "rest": _plain(own.rest),
                    }
                    for own in self.channels
                ]
            }
        )


def _printable(name: str) -> str:
    """Spell out bytes of a file's name that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def _figures(one: Response) -> tuple[str, str, str]:
    return f"{one.response:.3g}", figure(one.percentile, ".1f"), f"{one.share[0]:.1%}"


def _plain(one: Response) -> dict[str, Any]:
    known = not math.isnan(one.percentile)
    kept = {name: getattr(one, name) for name in ("response", "relevance", "share")}
    named = {"classes": one.classes, "name": one.concept} if isinstance(one.part, int) else {}
    where = None if one.map is None else one.map.tolist()
    return {**named, **kept, "percentile": one.percentile if known else None, "map": where}


def untold(target: Scalar) -> str:
    """Say what a target lacks for an image without a label to be explained by; "" for nothing."""
    if target.value is None:
        return "no relevance to tell"
    return "no class to compare images with" if target.by_label else ""


def explain_images(
    model2: nn.Module,
    layer: SplitLayer,
    images: Iterable[tuple[str, Tensor]],
    *,
    classes: Sequence[int | str],
    class_names: Sequence[str],
    n: int,
    heatmaps: bool,
    target: Scalar,
) -> Iterator[ImageExplanation]:
    """Explain images one after the other, as `unbraid.explain` says.

    Args:
        model2: a split network.
        layer: one of its split layers.
        images: names and images, (C, H, W), (C, L) or (C, D, H, W) each.
        classes: numbers or names of outputs to explain besides the predicted one.
        class_names: of the outputs, by number.
        n: concept channels to show.
        heatmaps: whether those get heatmaps.
        target: whose gradient tells relevance.
    """
    why = untold(target)
    if why:
        raise UsageError(
            f"With the target {target.name!r} there is {why}; give another one, such as "
            "'regression:INDEX' or a function."
        )
    with undisturbed(model2), torch.enable_grad(), in_force(model2):
        for number, (name, image) in enumerate(images):
            x = image[None].to(device_of(model2))
            if number == 0:
                refuse_unsteady(model2, x)
            with image_named(name):
                wanted, logits, measured = _measure(model2, layer, x, classes, class_names, target)
            names = tuple(name_of(class_names, t) for t in wanted) or (target.name,)
            explained = ImageExplanation(
                image=name,
                layer=layer.spec.name,
                classes=wanted,
                class_names=names,
                target=target.name,
                logits=logits,
                channels=tuple(_channels(layer, measured)),
                n=n,
                sizes=tuple(x.shape[2:]),
            )
            yield _with_heatmaps(explained, model2, layer, x) if heatmaps else explained


class _Measured(NamedTuple):
    mean: Tensor  # (S + R,), pre-activation over positions
    relevance: Tensor  # (T, S + R)
    total: Tensor  # (T,), positive relevance in the whole layer
    maps: Tensor | None  # (S + R, h, w), or (l,) or (d, h, w) in place of these: pre-activation


def _measure(
    model2: nn.Module,
    layer: SplitLayer,
    x: Tensor,
    classes: Sequence[int | str],
    names: Sequence[str],
    target: Scalar,
) -> tuple[tuple[int, ...], tuple[float, ...], _Measured]:
    """Run the network on one image, (1, C, positions ...): classes, their logits, the rest."""
    with (
        cut_at(layer, lambda _: None) as cut,
        _concepts_seen(layer) as seen,
        grids_seen(model2, layer, x.dim() - 2) as grids,
    ):
        output = run_raw(model2, x)
        cut.recording = False
        if not cut.outputs:
            raise never_ran(layer.spec.name)
        first = torch.zeros(1, dtype=torch.int64)
        wanted: list[int] = []
        if target.of_class:
            logits = logits_of(output, 1)
            refuse_broken_values(logits, first)
            wanted = _wanted(classes, logits[0], names)
            values = list(logits[0, wanted])
        else:
            values = list(target.of(output, first, first))
        gradients = [gradients_at(cut.outputs, value) for value in values]
    output_relevance(layer.spec.name, cut.outputs, gradients[0])  # refuses a layer without a way
    outputs = [_flat(layer, z) for z in cut.outputs]
    rows = [
        torch.cat([z[:, layer.channels.cpu()], _flat(layer, own)], 1)
        for z, own in zip(outputs, seen, strict=True)
    ]
    n_positions = sum(len(z) * z.shape[2] for z in rows)
    owners = torch.cat([layer.channels, layer.channels[layer.owners]]).cpu()
    relevance, total = [], []
    for of_class in gradients:
        slopes = [
            torch.zeros_like(z) if g is None else _flat(layer, g)
            for z, g in zip(outputs, of_class, strict=True)
        ]
        every = _summed(z * slope for z, slope in zip(outputs, slopes, strict=True))
        total.append(every.clamp(min=0).sum())
        own = (z * slope[:, owners] for z, slope in zip(rows, slopes, strict=True))
        relevance.append(_summed(own))
    grid = grid_of(layer.spec, cut.outputs, grids, x.shape[2:])
    # A class token and registers come before the tokens of the picture.
    maps = None if grid is None else rows[0][0, :, -prod(grid) :].unflatten(1, grid)
    measured = _Measured(
        _summed(rows) / n_positions, torch.stack(relevance), torch.stack(total), maps
    )
    return tuple(wanted), tuple(value.item() for value in values), measured


def _channels(layer: SplitLayer, measured: _Measured) -> Iterator[ChannelResponses]:
    """Put the figures of each split channel together."""
    mean, relevance, total, maps = measured

    def response(channel: int, part: Part, row: int | None, less: Sequence[int] = ()) -> Response:
        """Of a row of the figures, or of the first less some others."""
        rows = list(less)
        own = mean[row] - mean[rows].sum()
        relevant = relevance[:, row] - relevance[:, rows].sum(1)
        where = None if maps is None else maps[row] - maps[rows].sum(0)
        known = None if part == "rest" else layer.quantiles.get(channel)
        place = 0 if part is None else int(part) + 1 if part != "rest" else 0
        concept = layer.divided[channel][part] if isinstance(part, int) else ()
        return Response(
            channel=channel,
            part=part,
            classes=concept,
            concept=", ".join(name_of(layer.class_names, number) for number in concept),
            response=float(own),
            percentile=math.nan if known is None else percentile(known[place], float(own)),
            relevance=tuple(relevant.tolist()),
            share=tuple(torch.where(total > 0, relevant / total, 0.0).tolist()),
            map=where,
        )

    for place, (channel, concepts) in enumerate(layer.divided.items()):
        first = len(layer.divided) + layer.names.index(f"{channel}.0")
        rows = range(first, first + len(concepts))
        yield ChannelResponses(
            whole=response(channel, None, place),
            concepts=tuple(response(channel, k, row) for k, row in enumerate(rows)),
            # What concept channels leave of the channel, so that all add up to it.
            rest=response(channel, "rest", place, rows),
        )


def _wanted(classes: Sequence[int | str], logits: Tensor, names: Sequence[str]) -> list[int]:
    """Numbers of the predicted class and of those asked for, each once; logits are (T,)."""
    own = [name_of(names, t) for t in range(len(logits))]
    found = [int(logits.argmax())]
    for one in classes:
        if isinstance(one, str) and one in own:
            found.append(own.index(one))
        elif isinstance(one, str) and not one.isdecimal():
            raise UsageError(
                f"There is no class {one!r}; name one of the network's.{nearest(one, own)}"
            )
        else:
            number = int(one) if isinstance(one, str) else one
            found.append(whole_number("A class", number, 0, len(own) - 1))
    return list(dict.fromkeys(found))


def _flat(layer: SplitLayer, z: Tensor) -> Tensor:
    """Bring what a layer puts out for one image to (windows, channels, P), float64."""
    return channels_first(layer.spec, z.detach()).flatten(2).cpu().double()


def _summed(calls: Iterable[Tensor]) -> Tensor:
    """Sum over calls, windows and positions, (channels,)."""
    return torch.stack([z.sum((0, 2)) for z in calls]).sum(0)


@contextmanager
def _concepts_seen(layer: SplitLayer) -> Iterator[list[Tensor]]:
    """Keep what the concept channels put out, moved by gates and clamps, call by call."""
    seen: list[Tensor] = []
    dim, rows = -1 if layer.spec.channels_last else 1, range(len(layer.names))

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(make_moves(output, layer.moves, dim, rows))

    with layer.concepts.register_forward_hook(keep):
        yield seen


def _with_heatmaps(
    explained: ImageExplanation, model2: nn.Module, layer: SplitLayer, x: Tensor
) -> ImageExplanation:
    """Add heatmaps of the strongest concept channels in an image, (1, C, positions ...)."""
    if not 3 <= x.dim() <= 5:
        return replace(explained, note="there are no heatmaps, as it is no picture")
    made: dict[str, Tensor] = {}
    leaf = x.detach().clone()
    try:
        leaf.requires_grad_()
        with _concepts_seen(layer) as seen:
            run_network(model2, leaf)
        for concept, _ in explained.strongest:
            row = layer.names.index(concept.name)
            heat = heatmap(
                [z.select(-1 if layer.spec.channels_last else 1, row) for z in seen], leaf
            )
            made[concept.name] = heat
    except (ModelError, RuntimeError) as error:  # whole numbers, or parts without a gradient
        why = brief(error.__cause__ or error).rstrip(".")
        return replace(
            explained, note=f"there are no heatmaps, as no gradient reaches the image ({why})"
        )
    channels = tuple(
        replace(own, concepts=tuple(replace(c, heatmap=made.get(c.name)) for c in own.concepts))
        for own in explained.channels
    )
    return replace(explained, channels=channels)
