"""Measure how alike the images are that a channel and its concept channels answer to.

Shapes: N images, K concepts, C channels in all (originals and concept channels), D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.crops import Box, Crops, answering_box
from unbraid.data import GoodItem, labels_of
from unbraid.doors import in_plain_modes
from unbraid.embed import Encode, in_batches, load_batches, ready
from unbraid.encoders import Encoder, load_encoder, name_of_encoder
from unbraid.errors import UsageError
from unbraid.given import as_kind, loading, whole_number
from unbraid.monosemanticity import Moments, add_images, clarity, pure_distances, score
from unbraid.progress import image_progress
from unbraid.records import Records, Scan
from unbraid.semantics import ChannelSemantics, Likeness, Semantics
from unbraid.splits import ChannelSplit, Split
from unbraid.visualize.reference import ReferenceImages, reference_images

N_TOP = 20


@dataclass(frozen=True)
class _Place:
    """A top image of a concept channel."""

    channel: int
    concept: int
    index: int  # in the data set


@dataclass(frozen=True)
class _Source:
    """Where images come from and how they are embedded."""

    scan: Scan
    dataset: Dataset[Any]
    n_images: int  # that could be read
    encoder: Encoder
    batch_size: int
    workers: int


@in_plain_modes
def measure_semantics(
    split: Split,
    scan: Scan,
    dataset: Dataset[Any],
    encoder: Encoder | str,
    *,
    n_top: int = N_TOP,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Semantics:
    """Compare every split channel with its concept channels by the images that they answer to.

    What a channel answers is its positive response: sum_p max(z, 0) where the scan holds
    positions, else max(sum_p z, 0). Negative responses are silence; counted, the single most
    negative image would set the zero of the scale from 0 to 1.

    PURE's distances are those between the top images of the concept channels: where the scan holds
    positions of a two-dimensional convolution, between the parts of the images where the concept
    channels answer, else between whole images.

    Args:
        split: whose channels to measure.
        scan: of the images, from the network that was split.
        dataset: the images that `scan` was made of, perhaps in another preprocessing.
        encoder: from images (N, C, H, W) to embeddings (N, D), such as
            `unbraid.Penultimate(model)`; or `timm:NAME`.
        n_top: how many of the images that excite a channel most count for clarity and PURE's
            distances; all, where there are fewer.
        batch_size: images per call of the encoder.
        workers: processes that load images.
        progress: show a progress bar on standard error.

    Raises:
        UsageError: split, scan and data set do not belong together, or n_top is below 2.
        ModelError: the encoder cannot be loaded, fails, or gives something else than finite
            embeddings.
        DataError: an image cannot be read.

    Source:
        METHOD.md section 6, which names the papers.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    n_top = whole_number("n_top", n_top, 2)  # to be compared with one another
    batch_size, workers = loading(batch_size, workers)
    top = reference_images(scan, split, n=n_top)
    _refuse_other_images(scan, dataset)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder)
    n_images = scan.manifest.n_images - len(scan.broken())
    source = _Source(scan, dataset, n_images, encoder, batch_size, workers)
    with ready(encoder) as encode:
        sums, whole = _embed_images(source, split, encode, _indices(top), progress)
        crops = _embed_crops(source, split, encode, top)
    scores = score(sums).split([1 + len(part.concepts) for part in split.channels])
    return Semantics(
        {
            part.channel: _describe(
                source, part.channel, top[part.channel], own.tolist(), whole, crops
            )
            for part, own in zip(split.channels, scores, strict=True)
        }
    )


def _embed_images(
    source: _Source, split: Split, encode: Encode, wanted: set[int], progress: bool
) -> tuple[Moments, dict[int, Tensor]]:
    """Embed all images once: sums for monosemanticity scores, and the embeddings asked for."""
    scan = source.scan
    sums: Moments | None = None
    kept: dict[int, Tensor] = {}
    with image_progress("Embedding images", source.n_images, show=progress) as advance:
        for records, batches in _read(source):
            parts = []
            for items in batches:
                parts.append(encode(items))
                advance(len(items))
            embeddings = torch.cat(parts)
            answers = [_answers(scan, records, part) for part in split.channels]
            sums = add_images(sums, torch.cat(answers, dim=1), embeddings)
            rows = zip(records.index.tolist(), embeddings, strict=True)
            # A row alone would keep the whole shard's in memory.
            kept |= {index: row.clone() for index, row in rows if index in wanted}
    assert sums is not None  # a scan has an image
    return sums, kept


def _read(source: _Source) -> Iterator[tuple[Records, Iterator[list[GoodItem]]]]:
    """Records and images, shard by shard, so that memory does not grow with their number."""
    shards = [index.tolist() for index in source.scan.columns("index")]
    batches = [in_batches(shard, source.batch_size) for shard in shards]
    in_a_row = [batch for part in batches for batch in part]
    loaded = load_batches(source.encoder, source.dataset, in_a_row, source.workers)
    for records, part in zip(source.scan.shards(), batches, strict=True):
        if part:  # else every image of the shard was broken
            yield records, islice(loaded, len(part))


def _answers(scan: Scan, records: Records, part: ChannelSplit) -> Tensor:
    """Positive responses of a channel and its concept channels, (N, 1 + K)."""
    if records.input_map is not None:
        return part.response_maps(scan.layer, records.input_map).clamp(min=0).flatten(2).sum(2)
    pooled = records.pooled[:, scan.layer.group_of(part.channel)]
    return part.pooled_responses(pooled, records.n_positions)[:, :-1].clamp(min=0)


def _embed_crops(
    source: _Source, split: Split, encode: Encode, top: dict[int, ReferenceImages]
) -> dict[_Place, Tensor]:
    """Embed where concept channels answer in their top images; empty if that is not known."""
    boxes = _answering_boxes(source.scan, split, top)
    crops = Crops(source.dataset, [(place.index, box) for place, box in boxes.items()])
    batches = in_batches(range(len(crops)), source.batch_size)
    loaded = load_batches(source.encoder, crops, batches, source.workers)
    embeddings = [row for items in loaded for row in encode(items)]
    return dict(zip(boxes, embeddings, strict=True))


def _answering_boxes(
    scan: Scan, split: Split, top: dict[int, ReferenceImages]
) -> dict[_Place, Box]:
    boxes: dict[_Place, Box] = {}
    if not scan.positions or len(scan.layer.kernel) != 2:
        return boxes
    for records in scan.shards():
        assert records.input_map is not None
        for part in split.channels:
            for k, images in enumerate(top[part.channel].concepts):
                here = torch.isin(records.index, images.index)
                if not here.any():
                    continue
                maps = part.response_maps(scan.layer, records.input_map[here])[:, 1 + k]
                for index, answer in zip(records.index[here].tolist(), maps, strict=True):
                    boxes[_Place(part.channel, k, index)] = answering_box(answer)
    return boxes


def _describe(
    source: _Source,
    channel: int,
    top: ReferenceImages,
    scores: list[float],
    whole: dict[int, Tensor],
    crops: dict[_Place, Tensor],
) -> ChannelSemantics:
    """Put one channel's measures together."""
    original, *concepts = (
        Likeness(score, clarity(torch.stack([whole[index] for index in images.index.tolist()])))
        for score, images in zip(scores, (top.original, *top.concepts), strict=True)
    )
    places = [
        _Place(channel, k, index)
        for k, images in enumerate(top.concepts)
        for index in images.index.tolist()
    ]
    embeddings = torch.stack([crops.get(place, whole[place.index]) for place in places])
    owners = torch.tensor([place.concept for place in places], dtype=torch.int64)
    within, between = pure_distances(embeddings, owners)
    return ChannelSemantics(
        encoder=name_of_encoder(source.encoder),
        n_images=source.n_images,
        n_top=len(top.original.index),
        positions=source.scan.positions,
        crops=bool(crops),
        original=original,
        concepts=tuple(concepts),
        within=within,
        between=between,
    )


def _indices(top: dict[int, ReferenceImages]) -> set[int]:
    """Places in the data set of all top images."""
    return {
        index
        for images in top.values()
        for chosen in (images.original, *images.concepts)
        for index in chosen.index.tolist()
    }


def _refuse_other_images(scan: Scan, dataset: Dataset[Any]) -> None:
    """Raise if the data set cannot be the one that was scanned."""
    given = scan.manifest.labels == "given"
    labels = labels_of(dataset, needed=given)
    for own in scan.tensors("index", "label"):
        for index, label in zip(own["index"].tolist(), own["label"].tolist(), strict=True):
            if index >= len(labels) or (given and labels[index] != label):
                raise UsageError(
                    "The data set is not the one that was scanned (its labels or number of images "
                    "differ); pass the data set that the scan was made of."
                )
