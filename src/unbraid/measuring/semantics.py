"""Measure how alike the images are that excite a channel and its concept channels.

Shapes: N images, K concepts, C channels in all (originals and concept channels), D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.arguments import as_kind, chosen_indices, loading, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.images.batches import image_progress, in_batches
from unbraid.images.dataset import labels_of, size_of
from unbraid.images.which import images_named, which_image
from unbraid.measuring.encoders import Encoder, load_batches, load_encoder, name_of_encoder, ready
from unbraid.measuring.likeness import ChannelSemantics, Likeness, Semantics
from unbraid.measuring.reference_images import TopImages, reference_images, shards_of
from unbraid.scanning.fields import Records
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit, Split

N_TOP = 20
_PART = 0.5  # of the largest response; positions below it are not cut out
_ROUNDING = 1e-12  # relative; what double precision may make of equal numbers

Place = tuple[int, int, int]  # of a top image: channel, concept, index in the data set


@in_plain_modes
def measure_semantics(
    split: Split,
    scan: Scan,
    dataset: Dataset[Any],
    encoder: Encoder | str,
    *,
    indices: Sequence[int] | None = None,
    n_top: int = N_TOP,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> Semantics:
    """Compare every split channel with its concept channels by the images that excite them.

    Only positive responses count: sum_p max(z, 0) where the scan holds positions, else
    max(sum_p z, 0). PURE's distances are between top images of the concept channels; where the scan
    holds positions of a two-dimensional convolution, between the parts that excite these.

    Args:
        split: whose channels to measure.
        scan: of the images, from the network that was split.
        dataset: the images that `scan` was made of, perhaps in another preprocessing.
        encoder: from images (N, C, H, W) to embeddings (N, D), such as
            `unbraid.Penultimate(model)`; or `timm:NAME`.
        indices: of the images to compare, in the data set; by default all that were scanned.
        n_top: how many of the images that excite a channel most count for clarity and PURE's
            distances; all, where there are fewer.
        batch_size: images per call of the encoder.
        workers: processes that load images.
        progress: show a progress bar on standard error.

    Returns:
        Semantics: measures of each channel and of its concept channels.

    Raises:
        UsageError: split, scan and data set do not belong together, or n_top is below 2.
        ModelError: the encoder cannot be loaded, fails, or gives no finite embeddings.
        DataError: an image cannot be read.

    Source:
        "Evaluate" in docs/method.md, which names the papers.
    """
    as_kind("split", split, Split)
    as_kind("scan", scan, Scan)
    n_top = whole_number("n_top", n_top, 2)  # to be compared with one another
    batch_size, workers = loading(batch_size, workers)
    _refuse_other_images(scan, dataset)
    if isinstance(encoder, str):
        encoder = load_encoder(encoder)
    if indices is not None:
        indices = chosen_indices(indices, size_of(dataset))
    looked = look(split, scan, indices, n_top)
    crops = _Crops(dataset, [(index, box) for (_, _, index), box in looked.boxes.items()])
    with (
        ready(encoder) as encode,
        image_progress("Embedding images", looked.n_images, show=progress) as advance,
    ):
        batches = [b for own in looked.shards() for b in in_batches(own, batch_size)]
        loaded = load_batches(encoder, dataset, batches, workers, advance)
        rows = (row for batch in loaded for row in encode(batch))
        with images_named(dataset):
            scores, whole = looked.embed(rows)
            next(rows, None)  # so that the last batch is counted
        loaded = load_batches(encoder, crops, in_batches(range(len(crops)), batch_size), workers)
        rows = (row for batch in loaded for row in encode(batch))
        with images_named(crops):
            cut = dict(zip(looked.boxes, rows, strict=True))
    return looked.judge(name_of_encoder(encoder), scores, whole, cut)


@dataclass(frozen=True)
class Looked:
    """What a scan says of the images to be embedded, and of those that excite channels most."""

    split: Split
    scan: Scan
    indices: Sequence[int] | None  # of the images; None for all
    tops: dict[int, tuple[TopImages, ...]]  # by channel: the original's, and concept channels'
    boxes: dict[Place, Box]
    n_images: int

    def shards(self) -> Iterator[list[int]]:
        """Indices of the images to be embedded, in order, shard by shard of the scan."""
        wanted = None if self.indices is None else set(self.indices)
        for own in self.scan.columns("index"):
            yield [index for index in own.tolist() if wanted is None or index in wanted]

    def embed(self, rows: Iterator[Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
        """Monosemanticity scores of all C channels in order, and embeddings of top images.

        The rows are the embeddings of all images, in order.
        """
        wanted = {i for own in self.tops.values() for one in own for i in one.index.tolist()}
        sums = MonosemanticitySums()
        kept: dict[int, Tensor] = {}
        # So that memory does not grow with the number of images.
        for records in shards_of(self.scan, self.indices):
            if len(records):  # else every image of the shard was broken, or not asked for
                embeddings = torch.stack(list(islice(rows, len(records))))
                parts = self.split.channels
                responses = [_responses(self.scan, records, part) for part in parts]
                sums.add(torch.cat(responses, dim=1), embeddings)
                for index, row in zip(records.index.tolist(), embeddings, strict=True):
                    if index in wanted:
                        kept[index] = row.clone()  # alone it would keep the whole shard's in memory
        return sums.scores(), kept

    def judge(
        self, encoder: str, scores: Tensor, whole: dict[int, Tensor], cut: dict[Place, Tensor]
    ) -> Semantics:
        """Put the measures together, of an encoder of a name; `cut` are embeddings of boxes."""
        channels: dict[int, ChannelSemantics] = {}
        of_channels = scores.split([len(own) for own in self.tops.values()])
        for (channel, own), of_channel in zip(self.tops.items(), of_channels, strict=True):
            likes = [
                Likeness(score, clarity(torch.stack([whole[n] for n in one.index.tolist()])))
                for score, one in zip(of_channel.tolist(), own, strict=True)
            ]
            places = [(channel, k, n) for k, one in enumerate(own[1:]) for n in one.index.tolist()]
            embeddings = torch.stack([cut.get(place, whole[place[2]]) for place in places])
            owners = torch.tensor([k for _, k, _ in places], dtype=torch.int64)
            channels[channel] = ChannelSemantics(
                encoder,
                self.n_images,
                len(own[0].index),
                self.scan.positions,
                bool(cut),
                likes[0],
                tuple(likes[1:]),
                *pure_distances(embeddings, owners),
            )
        return Semantics(channels)


def look(
    split: Split, scan: Scan, indices: Sequence[int] | None = None, n_top: int = N_TOP
) -> Looked:
    """Choose the images that excite channels most; UsageError if scan and split do not fit."""
    top = reference_images(scan, split, n=n_top, indices=indices)
    tops = {o: (own.original, *own.concepts) for o, own in top.items()}
    if indices is None:
        n_images = scan.manifest.n_images - len(scan.broken())
    else:
        n_images = sum(len(records) for records in shards_of(scan, indices))
    if not n_images:
        raise UsageError("indices names no image that the scan has; name some of its images.")
    return Looked(split, scan, indices, tops, _boxes(scan, split, tops), n_images)


def _refuse_other_images(scan: Scan, dataset: Dataset[Any]) -> None:
    """Raise if the data set cannot be the one that was scanned."""
    if scan.manifest.places_of:
        raise UsageError("Semantic measures are of whole images; pass the scan of the images.")
    given = scan.manifest.labels == "given"
    labels = labels_of(dataset, needed=given)
    for own in scan.tensors("index", "label"):
        for index, label in zip(own["index"].tolist(), own["label"].tolist(), strict=True):
            if index >= len(labels) or (given and labels[index] != label):
                raise UsageError(
                    "The data set is not the one that was scanned (its labels or number of images "
                    "differ); pass the data set that the scan was made of."
                )


def _responses(scan: Scan, records: Records, part: ChannelSplit) -> Tensor:
    """Positive responses of a channel and its concept channels, (N, 1 + K)."""
    # Negative ones are silence: the most negative image would set the zero of the scale.
    if records.input_map is not None:
        return part.response_maps(scan.layer, records.input_map).clamp(min=0).flatten(2).sum(2)
    pooled = records.pooled[:, scan.layer.group_of(part.channel)]
    return part.pooled_responses(pooled, records.n_positions)[:, :-1].clamp(min=0)


def _boxes(scan: Scan, split: Split, tops: dict[int, tuple[TopImages, ...]]) -> dict[Place, Box]:
    """Where concept channels respond in their top images; empty if that is not known."""
    boxes: dict[Place, Box] = {}
    if not scan.positions or len(scan.layer.kernel) != 2:
        return boxes
    for records in scan.shards():
        assert records.input_map is not None
        for part in split.channels:
            for k, images in enumerate(tops[part.channel][1:]):
                here = torch.isin(records.index, images.index)
                if here.any():
                    maps = part.response_maps(scan.layer, records.input_map[here])[:, 1 + k]
                    for index, response in zip(records.index[here].tolist(), maps, strict=True):
                        boxes[part.channel, k, index] = answering_box(response)
    return boxes


class MonosemanticitySums:
    """Sums over images that monosemanticity scores follow from, in one pass.

    Images whose embedding is zero have no direction and are left out. Pach et al. 2025,
    arXiv:2504.02821; "Evaluate" in docs/method.md has the one-pass form.
    """

    def __init__(self) -> None:
        """Start without an image."""
        self.n_images = 0
        self._shift: Tensor | None = None  # of activations, so that large ones lose no digits

    def add(self, activations: Tensor, embeddings: Tensor) -> None:
        """Add images, of activations (N, C) and embeddings (N, D)."""
        activations, embeddings = activations.double(), embeddings.double()
        if self._shift is None:
            self._shift = activations[0]
            self._low = torch.full_like(self._shift, torch.inf)
            self._high = -self._low
            self._a, self._aa = torch.zeros(2, len(self._shift), dtype=torch.float64)
            self._e = torch.zeros_like(embeddings[0])
            self._ae = self._a[:, None] * self._e
        directed, unit = _directions(embeddings)
        shifted = activations[directed] - self._shift
        self.n_images += len(unit)
        self._low = torch.cat([self._low[None], shifted]).amin(0)
        self._high = torch.cat([self._high[None], shifted]).amax(0)
        self._a = self._a + shifted.sum(0)
        self._aa = self._aa + shifted.square().sum(0)
        self._e = self._e + unit.sum(0)
        self._ae = self._ae + shifted.T @ unit

    def scores(self) -> Tensor:
        """Compute the scores, (C,); NaN where no two images share the activation."""
        assert self._shift is not None  # a scan has an image
        low, n = self._low, self.n_images
        spread = self._high - low
        # Sums of scaled activation x embedding, of scaled activations, and of their squares.
        w = (self._ae - low[:, None] * self._e) / spread[:, None]
        u = (self._a - n * low) / spread
        v = (self._aa - 2 * low * self._a + n * low.square()) / spread.square()
        pairs = u.square() - v  # twice the sum over pairs of images
        size = torch.maximum((low + self._shift).abs(), (self._high + self._shift).abs())
        shared = (spread > _ROUNDING * size) & (pairs > n * _ROUNDING * u.square())
        return torch.where(shared, (w.square().sum(1) - v) / pairs, torch.nan)


def clarity(embeddings: Tensor) -> float:
    """Mean cosine of pairs of images (N, D), NaN without one; SemanticLens, arXiv:2501.05398."""
    _, unit = _directions(embeddings.double())
    n = len(unit)
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1))) if n > 1 else math.nan


def pure_distances(embeddings: Tensor, concept: Tensor) -> tuple[float, float]:
    """Mean distance within concepts (N,) and between, NaN without one; PURE, arXiv:2404.06453."""
    distances: Tensor = F.pdist(embeddings.double())
    i, j = torch.triu_indices(len(concept), len(concept), offset=1)
    same = concept[i] == concept[j]
    return float(distances[same].mean()), float(distances[~same].mean())


def _directions(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Which embeddings are not zero, (N,), and those at unit length."""
    length = embeddings.norm(dim=1)
    directed = length > 0
    return directed, embeddings[directed] / length[directed, None]


class Box(NamedTuple):
    """A part of an image, in fractions of its height and width."""

    top: float
    bottom: float
    left: float
    right: float


WHOLE = Box(0.0, 1.0, 0.0, 1.0)


def answering_box(response: Tensor) -> Box:
    """Box around the positions (h, w) of at least half the largest response.

    Each draws on its surroundings too, so the box has a margin of one position.
    """
    strongest = response.max()
    if strongest <= 0:
        return WHOLE
    sides: list[float] = []
    for strong, n in zip((response >= _PART * strongest).nonzero().T, response.shape, strict=True):
        sides += [max(int(strong.min()) - 1, 0) / n, min(int(strong.max()) + 2, n) / n]
    return Box(*sides)


def cut_out(image: Tensor, box: Box) -> Tensor:
    """Cut a part, of at least one pixel, out of an image (C, H, W), and bring it to its size."""
    height, width = image.shape[1:]
    top, left = int(box.top * height), int(box.left * width)
    bottom = max(round(box.bottom * height), top + 1)
    right = max(round(box.right * width), left + 1)
    part = image[None, :, top:bottom, left:right].float()
    cut: Tensor = F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
    return cut.to(image.dtype)


class _Crops(Dataset[tuple[Tensor, int]]):
    """Parts of a data set's images, as the network sees them."""

    def __init__(self, dataset: Dataset[Any], parts: Sequence[tuple[int, Box]]) -> None:
        self.dataset, self.parts = dataset, parts
        self.ids = [which_image(dataset, index).removeprefix("image ") for index, _ in parts]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        index, box = self.parts[number]
        image, label = self.dataset[index]
        return cut_out(image, box), int(label)
