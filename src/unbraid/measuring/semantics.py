"""Measure how alike the images are that a channel and its concept channels answer to.

Shapes: N images, K concepts, C channels in all (originals and concept channels), D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, loading, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import image_progress
from unbraid.images.broken import Loaded
from unbraid.images.dataset import labels_of
from unbraid.measuring.encoders import (
    Encode,
    Encoder,
    in_batches,
    load_batches,
    load_encoder,
    name_of_encoder,
    ready,
)
from unbraid.measuring.reference_images import ReferenceImages, reference_images
from unbraid.measuring.results import ChannelSemantics, Likeness, Semantics
from unbraid.scanning.records import Records, Scan
from unbraid.splitting.splits import ChannelSplit, Split

# Where in an image a channel answers, and that part of the image cut out.


_PART = 0.5  # of the largest answer; positions below it are not cut out


@dataclass(frozen=True)
class Box:
    """A part of an image, in fractions of its height and width."""

    top: float
    bottom: float
    left: float
    right: float


WHOLE = Box(0.0, 1.0, 0.0, 1.0)


def answering_box(answer: Tensor) -> Box:
    """Box in the positions that answer at least half as much as the strongest one.

    A position draws on its surroundings too, so the box has a margin of one position.

    Args:
        answer: (h, w), a channel's pre-activation over the image.

    Returns:
        The whole image where no position answers with more than zero.

    >>> answer = torch.zeros(8, 8)
    >>> answer[3:5, 0] = 1.0
    >>> answering_box(answer)
    Box(top=0.25, bottom=0.75, left=0.0, right=0.25)
    """
    strongest = answer.max()
    if strongest <= 0:
        return WHOLE
    rows, columns = torch.nonzero(answer >= _PART * strongest, as_tuple=True)
    (top, bottom), (left, right) = (
        (max(int(places.min()) - 1, 0) / n, min(int(places.max()) + 2, n) / n)
        for places, n in zip((rows, columns), answer.shape, strict=True)
    )
    return Box(top, bottom, left, right)


def cut_out(image: Tensor, box: Box) -> Tensor:
    """Cut a part out of an image and bring it to the size of the whole.

    Args:
        image: (C, H, W).
        box: which part; at least one pixel of it is taken.

    Returns:
        (C, H, W).
    """
    height, width = image.shape[1:]
    top, left = int(box.top * height), int(box.left * width)
    bottom = max(round(box.bottom * height), top + 1)
    right = max(round(box.right * width), left + 1)
    part = image[None, :, top:bottom, left:right].float()
    cut: Tensor = F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
    return cut.to(image.dtype)


class Crops(Dataset[tuple[Tensor, int]]):
    """Parts of a data set's images, as the network sees them.

    Args:
        dataset: of (image tensor (C, H, W), label).
        places: which image each crop is cut from, and what part of it.
    """

    def __init__(self, dataset: Dataset[Any], places: Sequence[tuple[int, Box]]) -> None:
        """Keep where to cut; no image is read yet."""
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        """Number of crops."""
        return len(self.places)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        """Read one image and cut."""
        index, box = self.places[place]
        image, label = self.dataset[index]
        return cut_out(image, box), int(label)


# How alike the images are that a channel answers to, told from an encoder's embeddings.


_ROUNDING = 1e-12  # relative; what is smaller than that is told from zero by rounding alone


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over images from which monosemanticity scores follow, whatever the order of images."""

    n_images: int  # that have a direction
    shift: Tensor  # (C,), subtracted from all activations below, so that large ones lose no digits
    low: Tensor  # (C,), smallest activation
    high: Tensor  # (C,), largest activation
    a: Tensor  # (C,), sum of activations
    aa: Tensor  # (C,), of their squares
    e: Tensor  # (D,), sum of unit embeddings
    ae: Tensor  # (C, D), of unit embeddings times activations


def add_images(before: Moments | None, activations: Tensor, embeddings: Tensor) -> Moments:
    """Add some images, such as those of one shard, to the sums.

    Args:
        before: sums over the images before, None for the first.
        activations: (N, C), in any unit, N at least 1.
        embeddings: (N, D), of the same images.

    Raises:
        UsageError: shapes do not fit, or a number is NaN or infinite.
    """
    _check(activations, embeddings)
    activations, embeddings = activations.double(), embeddings.double()
    if before is None:
        endless = torch.full_like(activations[0], torch.inf)
        nothing, nowhere = torch.zeros_like(activations[0]), torch.zeros_like(embeddings[0])
        before = Moments(
            n_images=0,
            shift=activations[0],
            low=endless,
            high=-endless,
            a=nothing,
            aa=nothing,
            e=nowhere,
            ae=nothing[:, None] * nowhere,
        )
    directed, unit = _directions(embeddings)
    shifted = activations[directed] - before.shift
    return Moments(
        n_images=before.n_images + len(unit),
        shift=before.shift,
        low=torch.cat([before.low[None], shifted]).amin(0),
        high=torch.cat([before.high[None], shifted]).amax(0),
        a=before.a + shifted.sum(0),
        aa=before.aa + shifted.square().sum(0),
        e=before.e + unit.sum(0),
        ae=before.ae + shifted.T @ unit,
    )


def score(sums: Moments) -> Tensor:
    """Compute monosemanticity scores from sums over all images.

    Returns:
        (C,), at most 1; NaN for a channel whose activation is the same in all images, or in all
        but one: no two images then share it.

    Source:
        Pach et al. 2025, arXiv:2504.02821, in the one-pass form of METHOD.md section 6.
    """
    low, n = sums.low, sums.n_images
    spread = sums.high - low
    w = (sums.ae - low[:, None] * sums.e) / spread[:, None]  # sum of scaled activation x embedding
    u = (sums.a - n * low) / spread  # sum of scaled activations
    v = (sums.aa - 2 * low * sums.a + n * low.square()) / spread.square()  # of their squares
    pairs = u.square() - v  # twice the sum over pairs of images
    size = torch.maximum((low + sums.shift).abs(), (sums.high + sums.shift).abs())
    shared = (spread > _ROUNDING * size) & (pairs > n * _ROUNDING * u.square())
    return torch.where(shared, (w.square().sum(1) - v) / pairs, torch.nan)


def monosemanticity_score(activation: Tensor, embeddings: Tensor) -> Tensor:
    """How alike the images are that a channel answers to, weighted by how much it answers.

    The mean cosine over all pairs of images, each weighted by the product of the two activations,
    which are first scaled to run from 0 to 1 over all images.

    Args:
        activation: (N,) of one channel, or (N, C) of many.
        embeddings: (N, D), of the same images by any image encoder.

    Returns:
        A number, or (C,), float64; NaN for a channel whose activation is the same in all images,
        or in all but one.

    Raises:
        UsageError: shapes do not fit, or a number is NaN or infinite.

    Source:
        Pach et al. 2025, arXiv:2504.02821; METHOD.md section 6.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    >>> monosemanticity_score(torch.tensor([0.0, 3.0, 5.0]), embeddings).item()
    1.0
    >>> monosemanticity_score(torch.tensor([2.0, 2.0, 2.0]), embeddings).item()
    nan
    """
    if activation.dim() == 1:
        return score(add_images(None, activation[:, None], embeddings))[0]
    return score(add_images(None, activation, embeddings))


def clarity(embeddings: Tensor) -> float:
    """How alike the images are that excite a channel most: their mean pairwise cosine.

    Args:
        embeddings: (N, D), of a channel's top images.

    Returns:
        At most 1; NaN for less than two images.

    Source:
        Dreyer et al. 2025 (SemanticLens), arXiv:2501.05398; METHOD.md section 6.

    >>> clarity(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    0.3333333333333333
    """
    _, unit = _directions(embeddings.double())
    n = len(unit)
    if n < 2:
        return float("nan")
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def pure_distances(embeddings: Tensor, concept: Tensor) -> tuple[float, float]:
    """Mean Euclidean distance of embeddings within concepts and between them.

    Args:
        embeddings: (N, D), of crops of reference images, in the encoder's own unit.
        concept: (N,), the concept that each was chosen for.

    Returns:
        The mean over all pairs of the same concept, and over all pairs of different ones; NaN
        where there is no such pair.

    Raises:
        UsageError: there are not as many concepts as embeddings.

    Source:
        Dreyer et al. 2024 (PURE), arXiv:2404.06453; METHOD.md section 6.

    >>> pure_distances(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]))
    (1.0, 4.5)
    """
    if concept.shape != embeddings.shape[:1]:
        raise UsageError(
            f"There are {len(embeddings)} embeddings but {len(concept)} concepts; give one each."
        )
    distances: Tensor = F.pdist(embeddings.double())
    i, j = torch.triu_indices(len(concept), len(concept), offset=1)
    same = concept[i] == concept[j]
    return float(distances[same].mean()), float(distances[~same].mean())


def _directions(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Which embeddings are not zero, (N,), and those at unit length."""
    length = embeddings.norm(dim=1)
    directed = length > 0
    return directed, embeddings[directed] / length[directed, None]


def _check(activations: Tensor, embeddings: Tensor) -> None:
    if activations.dim() != 2 or embeddings.dim() != 2 or len(activations) != len(embeddings):
        raise UsageError(
            f"Activations {tuple(activations.shape)} and embeddings {tuple(embeddings.shape)} do "
            "not fit; give (images, channels) and (images, dimensions) of the same images."
        )
    if len(activations) == 0:
        raise UsageError("There is no image to measure; give one or more.")
    for name, values in (("activation", activations), ("embedding", embeddings)):
        if not values.isfinite().all():
            raise UsageError(f"An {name} is NaN or infinite; leave such images out.")


# Measure how alike the images are that a channel and its concept channels answer to.


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


def _read(source: _Source) -> Iterator[tuple[Records, Iterator[list[Loaded]]]]:
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
