"""The page's pictures, small enough to stand in the page itself: reference images, veils, features.

A picture is cut as the transform says that it cuts; only where that is known can veils lie over it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, UsageError
from unbraid.images.broken import plain
from unbraid.images.dataset import picture_of, size_of
from unbraid.images.identity import preprocessing_of
from unbraid.images.which import holder_of
from unbraid.networks.spec import LayerSpec, respond
from unbraid.reporting.drawing import bands_of, is_unprepared, tell_bands, to_picture
from unbraid.reporting.view import Material, Page
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit

Changed = TypeVar("Changed")

# Rows of reference images on a page, and what their pictures then are: pixels of a side at most,
# and quality, 0 to 100.
_SIZES = ((30, 192, 70), (100, 96, 75), (200, 72, 55), (10**9, 56, 40))
_FEATURE = 1.5  # how much larger a feature visualisation is than a reference image
_SMALL = 48  # from this size down, enlarging should show the pixels as they are
_N_CHECKED = 16
# Steps of transforms, of torchvision and timm, that show all of a picture.
_KEEPS_ALL = (
    *("PILToTensor", "ToTensor", "ToImage", "MaybeToTensor", "MaybePILToTensor", "ToPureTensor"),
    *("ToDtype", "ConvertImageDtype", "Normalize", "Grayscale", "RGB"),
)
# Colours of a veil from nothing to the strongest place, and how opaque: cool and dense where it
# counts for nothing, clear and warm where it counts most. They differ in lightness too.
_COLD, _WARM = (38, 44, 92), (255, 170, 0)
_DENSEST, _CLEAREST = 0.72, 0.28
_THUMB, _THUMB_QUALITY = 40, 60  # pixels of a side
_NODE = 64  # likewise, in a circuit
_MOST_THUMBS = 100  # channels
_MOST_CIRCUITS = 30  # channels whose circuits have pictures
_MAX_POSITIONS = 16  # of a veil, each way: it is shown smoothed anyway


class Spot(NamedTuple):
    """One image as a channel's reference image."""

    channel: int
    concept: int | None  # whose concept channel; None for the original
    image: int  # its index


class Veil(NamedTuple):
    """What is laid over a picture to show where, as images."""

    response: str
    source: str | None  # None where it is the same as the response


class Picture(NamedTuple):
    """One picture as the template takes it."""

    uri: str
    small: bool
    responses: tuple[float, ...] = ()  # of a feature visualisation: of each concept channel


@dataclass
class Pictures:
    """All pictures, ready for the template."""

    shots: dict[int, Picture | None] | None = None  # by index; None: none at all, or not readable
    veils: dict[Spot, Veil] = field(default_factory=dict)
    features: dict[tuple[int, int | None], Picture] = field(default_factory=dict)
    thumbs: dict[tuple[int, int], Picture] = field(default_factory=dict)  # of concepts, to list
    # Of circuits, by channel and index.
    nodes: dict[tuple[int, int], Picture] = field(default_factory=dict)
    note: str = ""  # why there are no veils


def take_pictures(page: Page, material: Material, dataset: Dataset[Any] | None) -> Pictures:
    """Read and encode what is shown of channels, or of candidates."""
    channels = page.channels
    n_rows = sum(len(channel.rows) for channel in channels)
    side, quality = next(size for most, *size in _SIZES if n_rows <= most)
    shown, pictures = {channel.number for channel in channels}, Pictures()
    made = material.features.features if material.features else ()
    for feature in reversed(made):  # the best of several comes first, and last
        if feature.channel in shown:
            picture = encode(feature.picture, round(_FEATURE * side), quality)
            picture = picture._replace(responses=feature.responses[1:])
            pictures.features[feature.channel, feature.concept] = picture
    if dataset is None:
        return pictures
    spots = {
        Spot(channel.number, row.k, shot.index): shot.label
        for channel in channels
        for row in channel.rows
        for shot in row.shots
    }
    maps, sight = material.positions, sight_of(dataset)
    if maps is not None and sight is None:
        pictures.note = (
            "Where channels answer is left out: the data set's transform does not say which part "
            "of a picture the network sees."
        )
    elif maps is not None:
        for spot, (response, source) in find_where(maps, material.parts, spots).items():
            drawn = None if source is None else veil(source)
            pictures.veils[spot] = Veil(veil(response), drawn)
    labels = {spot.image: label for spot, label in spots.items()}
    for candidate, shown_of in zip(material.found.nearest, page.nearest, strict=True):
        for label, own in zip(
            (candidate.pair.class1, candidate.pair.class2), shown_of, strict=True
        ):
            labels |= dict.fromkeys(own, label)
    firsts = {
        (channel.number, row.k): row.shots[0].index
        for channel in channels[:_MOST_THUMBS]
        for row in channel.rows
        if row.k is not None and row.shots
    }

    in_circuits = {
        (channel.number, image.index): image.label
        for channel in channels[:_MOST_CIRCUITS]
        for circuit in (channel.circuit, material.through.get(channel.number))
        for node in (circuit.nodes if circuit else ())
        for image in node.images[:1]
    }

    def draw(image: Image.Image) -> tuple[Picture, Picture, Picture]:
        seen = sight(image) if sight else image
        sizes = (side, quality), (_THUMB, _THUMB_QUALITY), (min(_NODE, side), _THUMB_QUALITY)
        large, thumb, node = (encode(seen, *size) for size in sizes)
        return large, thumb, node

    more = {index: label for (_, index), label in in_circuits.items()}
    taken = read_pictures(dataset, labels | more, draw)
    pictures.shots = {index: own and own[0] for index, own in taken.items() if index in labels}
    told = tell_bands(dataset, next(iter(labels))) if labels else ""
    pictures.note = f"{pictures.note} {told}".strip()
    for place, index in firsts.items():
        if (sizes := taken[index]) is not None:
            pictures.thumbs[place] = sizes[1]
    for node in in_circuits:
        if (sizes := taken[node[1]]) is not None:
            pictures.nodes[node] = sizes[2]
    return pictures


def read_pictures(
    dataset: Dataset[Any], labels: Mapping[int, int], change: Callable[[Image.Image], Changed]
) -> dict[int, Changed | None]:
    """Read images by index and change them; None for what cannot be read.

    Raises a UsageError if `labels`, those that were scanned, say that the data set is another one,
    whose pictures would illustrate nothing. Classes may go by other numbers now, as when a folder
    is opened without the network.
    """
    fits = max(labels, default=0) < size_of(dataset)
    pairs = set()  # of the label that was scanned and that of now, which should be one to one
    for index, scanned in list(labels.items())[:_N_CHECKED] if fits else ():
        with suppress(Exception):  # an image that cannot be read is shown as such
            pairs.add((scanned, int(dataset[index][1])))
    if not fits or any(len({pair[k] for pair in pairs}) < len(pairs) for k in (0, 1)):
        raise UsageError(
            "The data set is not the one that was scanned (its labels differ); pass the data set "
            "that the validation scan was made of."
        )
    pictures: dict[int, Changed | None] = dict.fromkeys(labels)
    for index in labels:
        try:
            pictures[index] = change(open_picture(dataset, index))
        except UsageError:  # of how pictures are to be shown
            raise
        except Exception:  # whatever a data set raises, one image is not worth the page
            continue
    return pictures


def open_picture(dataset: Dataset[Any], index: int) -> Image.Image:
    """Get a picture as it was before the transform where the data set can give it."""
    picture = picture_of(dataset, index)
    image = dataset[index][0] if picture is None else picture
    if not isinstance(image, Image.Image):
        image = to_picture(plain(image, dataset, index), bands_of(dataset, index))
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def encode(picture: Image.Image, side: int, quality: int) -> Picture:
    """Make a picture small enough for the page; a tiny one keeps every pixel."""
    small = max(picture.size) <= _SMALL
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    options: dict[str, Any] = {"optimize": True} if small else {"quality": quality}
    return Picture(_data_uri(picture, "png" if small else "webp", **options), small)


def veil(shade: Tensor) -> str:
    """Veil places of shade (h, w) 0 in dense blue, those of 1 in thin amber."""
    height, width = (min(side, _MAX_POSITIONS) for side in shade.shape)
    shade = adaptive_avg_pool2d(shade[None].float(), (height, width))[0]
    ends = [(*_COLD, 255 * _DENSEST), (*_WARM, 255 * _CLEAREST)]
    bands = (low + (high - low) * shade for low, high in zip(*ends, strict=True))
    images = [Image.fromarray(band.round().to(torch.uint8).numpy()) for band in bands]
    return _data_uri(Image.merge("RGBA", images), "png", optimize=True)


def _data_uri(picture: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


@dataclass(frozen=True)
class Sight:
    """The part of a picture that a network sees, in the middle of it."""

    width: float | None = None  # in units of the shorter side; None: all of it
    height: float | None = None
    ratio: float | None = None  # of what it is then stretched to, width to height; None: as it is

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Cut out what the network sees, stretched as it sees it."""
        high, wide = (
            whole if part is None else min(round(part * min(picture.size)), whole)
            for part, whole in ((self.height, picture.height), (self.width, picture.width))
        )
        left, top = (round((a - b) / 2) for a, b in zip(picture.size, (wide, high), strict=True))
        seen = picture.crop((left, top, left + wide, top + high))
        if self.ratio is None:
            return seen
        if self.ratio >= 1:
            return seen.resize((wide, max(1, round(wide / self.ratio))))
        return seen.resize((max(1, round(high * self.ratio)), high))


def sight_of(dataset: Dataset[Any]) -> Sight | None:
    """Say which part of its pictures a data set hands on to a network; None if it is not said."""
    held = holder_of(dataset, 0, "picture")
    if held is None:  # what is shown is what the network is given, or of another shape
        return None if is_unprepared(dataset, 0) else Sight()
    holder = held[0]
    if preprocessing_of(dataset) != preprocessing_of(holder):  # more around it, or parts differ
        return None
    transform = getattr(holder, "transform", None)
    if transform is not None:
        return transform if isinstance(transform, Sight) else declared_sight(transform)
    with suppress(Exception):  # broken, or no tensor: nothing can be said
        height, width = holder[0][0].shape[-2:]
        return Sight() if holder.picture(0).size == (width, height) else None
    return None


def sight_of_files(dataset: Dataset[Any]) -> Sight | None:
    """Say the same of a data set without the preprocessing of its tensors, as it is opened later.

    Nothing is said if preprocessing changes their shape, or that of the first that can be read.
    """
    held = holder_of(dataset, 0, "file_tensor")
    if held is None:
        return sight_of(dataset)
    for index in range(min(size_of(dataset), _N_CHECKED)):
        with suppress(DataError):  # it is broken
            holder, own = holder_of(dataset, index, "file_tensor") or held
            same = holder[own][0].shape == holder.file_tensor(own).shape
            return Sight() if same else None
    return None


def declared_sight(transform: Any) -> Sight | None:
    """Read from a transform's steps which part of a picture it hands on; None for unknown steps.

    >>> from torchvision.transforms import v2
    >>> declared_sight(v2.Compose([v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224)]))
    Sight(width=0.875, height=0.875, ratio=1.0)
    """
    sizes: dict[str, list[int]] = {}
    for step in getattr(transform, "transforms", [transform]):
        kind = type(step).__name__
        if kind == "ImageClassification":  # what torchvision's weights come with
            sizes = {"Resize": step.resize_size, "CenterCrop": step.crop_size}
        elif kind in ("Resize", "CenterCrop") and "CenterCrop" not in sizes and kind not in sizes:
            sizes[kind] = [step.size] if isinstance(step.size, int) else list(step.size)
        elif kind not in _KEEPS_ALL:
            return None
    resize, crop = sizes.get("Resize", []), sizes.get("CenterCrop", [])
    if not crop:
        return Sight(ratio=resize[1] / resize[0] if len(resize) == 2 else None)
    height, width = crop[0], crop[-1]
    if len(resize) != 1 or max(crop) > resize[0]:  # a part that depends on the picture, or padding
        return Sight(ratio=width / height) if resize == crop else None
    return Sight(width / resize[0], height / resize[0], width / height)


class Where(NamedTuple):
    """What lies where in an image, in parts of the strongest place; zero where it is negative."""

    response: Tensor  # (h, w), pre-activation
    source: Tensor | None  # (H, W), input relevance; None where it is the same up to the bias


def find_where(
    maps: Scan, parts: Sequence[ChannelSplit], spots: Iterable[Spot]
) -> dict[Spot, Where]:
    """Compute where split channels respond in the images that `maps` holds, and what feeds them.

    Nothing is known without positions, or of a layer whose positions are not those of a picture.
    """
    layer = maps.layer
    if not maps.positions or len(layer.kernel) != 2:
        return {}
    by_channel = {part.channel: part for part in parts}
    wanted: dict[int, list[Spot]] = {}
    for spot in spots:
        wanted.setdefault(spot.image, []).append(spot)
    known: dict[Spot, Where] = {}
    for records in maps.shards():
        assert records.input_map is not None
        for index, image in zip(records.index.tolist(), records.input_map.double(), strict=True):
            for spot in wanted.get(index, ()):
                part, source = by_channel[spot.channel], None
                row = (part.weight if spot.concept is None else part.rows[spot.concept]).double()
                bias = torch.tensor([part.bias], dtype=torch.float64)
                z = respond(layer, image[None], row[None], bias, [part.channel])[0, 0]
                if layer.taps_per_input > 1 or z.shape != image.shape[1:]:
                    source = _shade(source_map(layer, part.channel, image, row))
                known[spot] = Where(_shade(z), source)
    return known


def source_map(layer: LayerSpec, channel: int, image: Tensor, row: Tensor) -> Tensor:
    """Compute, position by position, how much of a summed pre-activation comes in there.

    Of an image (C_in, H, W) and a row (J,) of a channel's, both float64, it is the input times the
    gradient of the summed pre-activation, summed over input channels (H, W). Over all positions it
    adds up to the summed pre-activation without the bias.

    Source:
        "One layer" in docs/method.md, before the sum over positions.
    """
    leaf = image[None].detach().requires_grad_()
    with torch.enable_grad():
        summed = respond(
            layer, leaf, row[None], torch.zeros(1, dtype=torch.float64), [channel]
        ).sum()
        (gradient,) = torch.autograd.grad(summed, leaf)
    return (image * gradient[0]).sum(0)


def _shade(values: Tensor) -> Tensor:
    """Divide by the largest value, if any is above zero."""
    positive = values.clamp(min=0)
    return positive / positive.max() if positive.max() > 0 else positive
