"""What the page shows, as plain data: names, figures in words, pictures as files or data URIs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from unbraid.exploring.bench import Laid
from unbraid.finding.membership import name_of
from unbraid.measuring.explain import ImageExplanation, Response
from unbraid.measuring.reference_images import ReferenceImages, TopImages
from unbraid.measuring.results import ChannelEvaluation
from unbraid.reporting.drawing import as_drawn
from unbraid.reporting.explain import light_up
from unbraid.reporting.pictures import encode
from unbraid.reporting.words import ABSENT, MINUS, bounded, letter, number, percent, significant
from unbraid.splitting.splits import ChannelSplit, Split

_TILE = 192  # pixels of a side of a map
_FEW = 96  # pixels of a side, below which a picture is enlarged so that a map over it is smooth
_MOST_CLASSES = 5  # of those with the largest logits, before gates and after
Plain = dict[str, Any]


def concepts_of(split: Split, part: ChannelSplit) -> list[Plain]:
    """Name the concepts of a channel."""
    return [
        {"k": k, "letter": letter(k), "name": bounded(split.name(concept))}
        for k, concept in enumerate(part.concepts)
    ]


def channel_entry(split: Split, part: ChannelSplit) -> Plain:
    """One channel in the list."""
    by_hand = any(
        n in split.clusters and split.clusters[n].images is not None
        for concept in part.concepts
        for n in concept
    )
    return {"channel": part.channel, "byHand": by_hand, "concepts": concepts_of(split, part)}


def shots(kind: str, top: TopImages, names: Sequence[str]) -> list[Plain]:
    """Reference images, strongest first."""
    columns = (top.index.tolist(), top.label.tolist(), top.concept.tolist())
    return [
        {
            "picture": f"{kind}/{index}",
            "label": class_name(names, label),
            "k": concept,
            "response": significant(response),
        }
        for index, label, concept, response in zip(*columns, top.activation.tolist(), strict=True)
    ]


def class_name(names: Sequence[str], label: int) -> str:
    """Name a label; "" for an image without."""
    return "" if label < 0 else bounded(name_of(names, label))


def channel_view(
    split: Split,
    part: ChannelSplit,
    kind: str,
    found: ReferenceImages | None,
    measured: ChannelEvaluation | None,
    note: str,
) -> Plain:
    """A channel with its reference images and its measures."""
    rows = []
    for concept in concepts_of(split, part):
        k = concept["k"]
        own = shots(kind, found.concepts[k], split.class_names) if found else []
        figures = None if measured is None else _concept_figures(measured, k)
        rows.append({**concept, "shots": own, "figures": figures})
    return {
        **channel_entry(split, part),
        "shots": shots(kind, found.original, split.class_names) if found else [],
        "concepts": rows,
        "figures": [] if measured is None else _channel_figures(measured),
        "note": note,
    }


def _channel_figures(measured: ChannelEvaluation) -> list[Plain]:
    """Measures of a channel: what, how much, and what is ideal."""
    told = [
        ("Separation error", number(measured.separation_error), "ideal 0"),
        ("Explained share", percent(measured.explained_share), "ideal 100%"),
        ("Coverage", percent(measured.coverage), "of its activity, by the concepts"),
    ]
    return [{"what": w, "figure": f, "note": note} for w, f, note in told if f != ABSENT]


def _concept_figures(measured: ChannelEvaluation, k: int) -> list[Plain]:
    own = measured.concepts[k]
    told = [
        ("R-precision", own.r_precision, own.whole_r_precision),
        ("AUROC", own.auroc, None),
        ("Retention", own.retention, None),
    ]
    return [
        {
            "what": what,
            "figure": number(value),
            "note": "" if whole is None else f"whole {number(whole)}",
        }
        for what, value, whole in told
        if value is not None
    ]


def bench_view(laid: Laid, kind: str, names: Sequence[str]) -> list[Plain]:
    """The images on the bench."""
    columns = (laid.index.tolist(), laid.label.tolist(), laid.group.tolist())
    return [
        {
            "index": index,
            "picture": f"{kind}/{index}",
            "label": class_name(names, label),
            "group": group,
            "response": significant(response),
        }
        for index, label, group, response in zip(*columns, laid.response.tolist(), strict=True)
    ]


def explained_view(own: ImageExplanation, picture: Image.Image, channel: int | None) -> Plain:
    """What concept channels do in a picture: the strongest, or all of one channel and its rest."""
    if channel is None:
        pairs = own.strongest
    else:
        chosen = own[channel]
        pairs = [(part, chosen.whole) for part in (*chosen.concepts, chosen.rest)]
    under = _enlarged(picture)
    return {
        "predicted": bounded(own.class_names[0]),
        "n": sum(len(one.concepts) for one in own.channels),
        "rows": [_row(concept, whole, under, own.sizes) for concept, whole in pairs],
    }


def _row(concept: Response, whole: Response, under: Image.Image, sizes: Sequence[int]) -> Plain:
    strongest = max([float(m.max()) for m in (whole.map, concept.map) if m is not None] or [0])
    return {
        "gate": concept.name,
        "k": concept.part if isinstance(concept.part, int) else None,
        "name": bounded(concept.concept) if concept.concept else "what no concept names",
        "map": _map(under, concept.map, sizes, strongest),
        "figures": _figures(concept),
        "whole": {
            "name": whole.name,
            "map": _map(under, whole.map, sizes, strongest),
            "figures": _figures(whole),
        },
    }


def _figures(one: Response) -> Plain:
    known = not math.isnan(one.percentile)
    return {
        "response": significant(one.response),
        "percentile": f"{one.percentile:.1f}" if known else ABSENT,
        "share": f"{one.share[0]:.1%}".replace("-", MINUS),
    }


def _map(
    under: Image.Image, values: Tensor | None, sizes: Sequence[int], strongest: float
) -> str | None:
    if values is None:
        return None
    return encode(light_up(under, as_drawn(values, sizes), strongest), _TILE, 70).uri


def _enlarged(picture: Image.Image) -> Image.Image:
    times = max(1, math.ceil(_FEW / max(picture.size)))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def logits_view(before: Tensor, now: Tensor, names: Sequence[str]) -> Plain:
    """Logits (T,) before gates and now: of the largest few of both, in the order before."""
    largest = [z.topk(min(_MOST_CLASSES, len(z))).indices.tolist() for z in (before, now)]
    chosen = sorted(set(largest[0]), key=lambda t: -float(before[t]))
    chosen += [t for t in largest[1] if t not in chosen]
    return {
        "ofClass": True,
        "classes": [
            {
                "name": bounded(name_of(names, t)),
                "before": float(before[t]),
                "now": float(now[t]),
                "words": [_logit(float(z[t])) for z in (before, now)],
            }
            for t in chosen
        ],
        "predicted": chosen.index(largest[1][0]),
        "low": float(torch.minimum(before.min(), now.min())),
        "high": float(torch.maximum(before.max(), now.max())),
    }


def target_view(before: float, now: float, name: str) -> Plain:
    """Show a target that is no class's logit, before gates and now, in the form of logits."""
    words = [significant(before), significant(now)]
    return {
        "ofClass": False,
        "classes": [{"name": bounded(name), "before": before, "now": now, "words": words}],
        "predicted": 0,
        "low": min(before, now, 0.0),
        "high": max(before, now, 0.0),
    }


def _logit(value: float) -> str:
    return f"{value:.2f}".replace("-", MINUS)


def as_file(picture: Image.Image, side: int) -> tuple[bytes, str]:
    """Write a picture as a file of at most so many pixels a side; a tiny one keeps every pixel."""
    shown, content = picture.convert("RGB"), io.BytesIO()
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    if max(shown.size) <= _FEW:
        shown.save(content, "PNG")
        return content.getvalue(), "image/png"
    shown.save(content, "WEBP", quality=80)
    return content.getvalue(), "image/webp"


def thumbs(found: Mapping[int, ReferenceImages], kind: str) -> dict[str, list[str]]:
    """The first reference image of each concept, by channel."""
    return {
        str(channel): [f"{kind}/{int(top.index[0])}" for top in own.concepts if len(top.index)]
        for channel, own in found.items()
    }
