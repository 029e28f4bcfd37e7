"""The page's pictures: reference images, veils over them, feature visualisations."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import Dataset

from unbraid.base.errors import UsageError
from unbraid.images.broken import plain
from unbraid.images.dataset import (
    all_hold,
    changes_images,
    inner_of,
    is_known,
    own,
    picture_of,
    size_of,
)
from unbraid.networks.spec import LayerSpec, respond
from unbraid.reporting.material import Material
from unbraid.reporting.view import Page
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import ChannelSplit
from unbraid.visualizing.features import Features

# Which part of a picture a network sees, found out by showing known pictures to a transform.


_SIDES = (256, 512)  # of the pictures shown, upright and lying
_TOLERANCE = 0.02  # of a side

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class Sight:
    """The part of a picture that a network sees, in the middle of it."""

    width: float | None = None  # in units of the shorter side; None: all of it
    height: float | None = None
    ratio: float | None = None  # of what it is then stretched to, width to height; None: as it is

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Cut out what the network sees, stretched as it sees it."""
        short = min(picture.size)
        width, height = (
            whole if part is None else min(part * short, whole)
            for part, whole in zip((self.width, self.height), picture.size, strict=True)
        )
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        box = (round(left), round(top), round(left + width), round(top + height))
        seen = picture.crop(box)
        if self.ratio is None:
            return seen
        wide = seen.width if self.ratio >= 1 else max(1, round(seen.height * self.ratio))
        high = max(1, round(seen.width / self.ratio)) if self.ratio >= 1 else seen.height
        return seen if (wide, high) == seen.size else seen.resize((wide, high))

    def to_dict(self) -> dict[str, float | None]:
        """Return what `Sight(**values)` takes, ready for JSON."""
        return asdict(self)


def sight_of(dataset: Dataset[Any]) -> Sight | None:
    """Say which part of its pictures a data set hands on to a network.

    Args:
        dataset: of (image, label). One with a method `picture`, as `unbraid.open_images` gives, has
            pictures of their own besides the tensors; its `transform` is tried out.

    Returns:
        None where it cannot be said: the transform is random, turns or warps, or there is none
        and tensor and picture differ in size.
    """
    kept = own(dataset, "picture")[1]
    holder: Any = dataset
    if kept is None and is_known(dataset):
        inner = [sight_of(part) for part in inner_of(dataset)]
        unlike = changes_images(dataset) and all_hold(dataset, "picture")
        return inner[0] if inner.count(inner[0]) == len(inner) and not unlike else None
    if kept is None:
        return Sight()  # what is shown is what the network is given
    transform = getattr(dataset, "transform", None)
    if isinstance(transform, Sight):
        return transform
    if transform is not None:
        return measure_sight(transform)
    try:
        height, width = np.shape(dataset[0][0])[-2:]
        return Sight() if holder.picture(0).size == (width, height) else None
    except Exception:  # broken, or no tensor: nothing can be said
        return None


def measure_sight(transform: Transform) -> Sight | None:
    """Find out which part of a picture a transform hands on; None if that is no part in the middle.

    >>> from torchvision.transforms import v2
    >>> cut = v2.Compose([v2.PILToTensor(), v2.Resize(256), v2.CenterCrop(224)])
    >>> seen = measure_sight(cut)
    >>> round(seen.width, 2), round(seen.height, 2), seen.ratio
    (0.88, 0.88, 1.0)
    >>> measure_sight(v2.Compose([v2.PILToTensor(), v2.Resize((224, 224))]))
    Sight(width=None, height=None, ratio=1.0)
    """
    try:
        (lying, ratio), (upright, other) = (
            _box(transform, *size) for size in (_SIDES[::-1], _SIDES)
        )
    except Exception:  # whatever a transform raises, or a place that is not where it should be
        return None
    same = abs(ratio - other) < _TOLERANCE
    if max(abs(side - 1) for side in (*lying, *upright)) < _TOLERANCE:
        return Sight(ratio=ratio if same else None)
    short, long = _SIDES
    in_units = [
        (lying[0] * long / short, lying[1]),
        (upright[0], upright[1] * long / short),
    ]
    (width, height), again = in_units
    if not same or max(abs(width - again[0]), abs(height - again[1])) > 2 * _TOLERANCE:
        return None
    return Sight(round(width, 3), round(height, 3), ratio)


def _box(transform: Transform, width: int, height: int) -> tuple[tuple[float, float], float]:
    """What a transform shows of a picture of a size: part of its width and height, and its shape.

    Raises:
        ValueError: it shows something else than an upright part in the middle.
    """
    dark, light = (_values(transform, np.full((height, width), v)) for v in (0.0, 1.0))
    spans = []
    for axis, n in ((1, width), (0, height)):
        line = (np.arange(n) + 0.5) / n
        shown = np.broadcast_to(line if axis == 1 else line[:, None], (height, width))
        with np.errstate(all="ignore"):  # what stretches contrast makes light of dark
            places = (_values(transform, shown) - dark) / (light - dark)
        seen = places.mean(1 - axis)
        m = len(seen)
        slope, start = np.polyfit((np.arange(m) + 0.5) / m, seen, 1)
        straight = np.abs(seen - start - slope * (np.arange(m) + 0.5) / m).max()
        level = np.abs(places - np.expand_dims(seen, 1 - axis)).max()
        off = abs(start + slope / 2 - 0.5)  # from the middle
        if not max(straight, level, off) < _TOLERANCE or not 0 < slope < 1 + _TOLERANCE:
            raise ValueError("not an upright part in the middle")
        spans.append(min(float(slope), 1.0))
    return (spans[0], spans[1]), dark.shape[1] / dark.shape[0]


def _values(transform: Transform, brightness: np.ndarray) -> np.ndarray:
    """Show a transform a grey picture and return what it makes of it, (H, W)."""
    grey = Image.fromarray((255 * brightness).round().astype(np.uint8)).convert("RGB")
    made = transform(grey)
    if isinstance(made, Image.Image):
        return np.asarray(made.convert("L"), dtype=np.float64)
    values = made.double().numpy() if isinstance(made, Tensor) else np.asarray(made, np.float64)
    return values.mean(0) if values.ndim == 3 else values


# Pictures of a data set's images, small enough to stand in the page itself.


_SMALL = 48  # from this size down, enlarging should show the pixels as they are
_N_CHECKED = 16
_DENSEST = 0.72  # opacity of a veil over places that count for nothing
_GREY = 128  # of a veil: black would not be seen on a dark picture
_MAX_POSITIONS = 16  # of a veil, each way: it is shown smoothed anyway


@dataclass(frozen=True)
class Look:
    """How much room pictures are given."""

    n_images: int  # reference images of a channel
    side: int  # pixels at most
    quality: int  # 0 to 100


@dataclass(frozen=True)
class Picture:
    """One image, in the page itself."""

    uri: str
    small: bool


class Album:
    """A data set's images, read once and kept small; None stands for one that cannot be read.

    Args:
        dataset: of (image, label).
        indices: which of its images.
        side: pixels at most.
    """

    def __init__(self, dataset: Dataset[Any], indices: Iterable[int], side: int) -> None:
        """Read the images."""
        sight = sight_of(dataset)
        self.as_seen = sight is not None  # whether positions of a layer's map can be shown
        self.images = {index: _thumbnail(dataset, index, sight, side) for index in indices}

    def pictures(self, look: Look) -> dict[int, Picture | None]:
        """Encode them all."""
        return {
            index: None if image is None else encode(image, look.side, look.quality)
            for index, image in self.images.items()
        }


def refuse_other_images(dataset: Dataset[Any], labels: Mapping[int, int]) -> None:
    """Raise if the data set is not the one scanned, for its pictures would illustrate nothing.

    The classes may go by other numbers now, as when a folder is opened without the network; but
    images of one class must still be of one class.

    Args:
        dataset: of (image, label).
        labels: recorded labels by place in the data set; the first few are compared.

    Raises:
        UsageError: it is too short, or its labels are not the recorded ones.
    """
    differs = bool(labels) and max(labels) >= size_of(dataset)
    if not differs:
        pairs = {
            (recorded, label)
            for index, recorded in list(labels.items())[:_N_CHECKED]
            if (label := _label_of(dataset, index)) is not None
        }
        differs = any(len({pair[k] for pair in pairs}) < len(pairs) for k in (0, 1))
    if differs:
        raise UsageError(
            "The data set is not the one that was scanned (its labels differ); pass the data set "
            "that the validation scan was made of."
        )


def _label_of(dataset: Dataset[Any], index: int) -> int | None:
    try:
        return int(dataset[index][1])
    except Exception:  # an image that cannot be read is shown as such
        return None


def _thumbnail(
    dataset: Dataset[Any], index: int, sight: Sight | None, side: int
) -> Image.Image | None:
    try:
        picture = open_picture(dataset, index)
        picture = picture.convert("L" if picture.mode in ("1", "L") else "RGB")
        if sight is not None:
            picture = sight(picture)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    except Exception:  # whatever a data set raises, one image is not worth the page
        return None
    return picture


def open_picture(dataset: Dataset[Any], index: int) -> Image.Image:
    """Get a picture as it was before the transform where the data set can give it."""
    picture = picture_of(dataset, index)
    if picture is not None:
        return picture
    image = dataset[index][0]
    return image if isinstance(image, Image.Image) else to_picture(plain(image, index))


def to_picture(image: Tensor) -> Image.Image:
    """Make a picture of an image tensor, its values stretched to the full range.

    Args:
        image: (C, H, W) or (H, W); three channels are taken for red, green and blue, of any other
            number the mean is shown.

    Raises:
        ValueError: it has another shape.
    """
    image = image.detach().cpu().float().nan_to_num()
    image = image[None] if image.dim() == 2 else image
    if image.dim() != 3 or image.numel() == 0:
        raise ValueError(f"a tensor of shape {tuple(image.shape)} is no picture")
    if len(image) != 3:
        image = image.mean(0, keepdim=True)
    low, high = image.min(), image.max()
    scaled = (255 * (image - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8)
    values = scaled.movedim(0, -1).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def encode(picture: Image.Image, side: int, quality: int) -> Picture:
    """Make a picture small enough for the page; a tiny one keeps every pixel."""
    small = max(picture.size) <= _SMALL
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    if small:
        picture.save(content, "PNG", optimize=True)
    else:
        picture.save(content, "WEBP", quality=quality)
    return Picture(_data_uri("png" if small else "webp", content), small)


def veil(shade: Tensor) -> str:
    """Make a picture that hides places of shade 0 and leaves those of shade 1 as they are.

    Args:
        shade: (h, w), 0 to 1.
    """
    height, width = (min(side, _MAX_POSITIONS) for side in shade.shape)
    shade = adaptive_avg_pool2d(shade[None].float(), (height, width))[0]
    opacity = (255 * _DENSEST * (1 - shade)).round().to(torch.uint8).numpy()
    grey = Image.new("L", (width, height), _GREY)
    content = io.BytesIO()
    Image.merge("LA", (grey, Image.fromarray(opacity))).save(content, "PNG", optimize=True)
    return _data_uri("png", content)


def _data_uri(kind: str, content: io.BytesIO) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


# Where in its reference images a channel answers, and where its input comes from.


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


# The page's pictures: reference images, veils over them, feature visualisations.


LARGEST = 96  # pixels of a reference image
_FEATURE = 1.5  # how much larger a feature visualisation is than a reference image


@dataclass(frozen=True)
class Veil:
    """What is laid over a picture to show where, as images."""

    answer: str
    source: str | None


@dataclass(frozen=True)
class Pictures:
    """All pictures, ready for the template."""

    shots: dict[int, Picture | None] | None  # by place in the data set; None: none at all
    veils: dict[Spot, Veil]
    features: dict[tuple[int, int | None], Picture]  # by channel, and concept or None
    responses: dict[tuple[int, int | None], tuple[float, ...]]  # of concept channels, to each

    def veil(self, channel: int, row: int, index: int) -> Veil | None:
        """The veil over an image in a channel's row; row 0 is the original's."""
        return self.veils.get(Spot(channel, row - 1 if row else None, index))

    def feature(self, channel: int, row: int) -> Picture | None:
        """The feature visualisation of a channel's row."""
        return self.features.get((channel, row - 1 if row else None))

    def excites(self, channel: int, row: int) -> tuple[float, ...]:
        """What a row's feature visualisation excites: each concept channel, per position."""
        return self.responses.get((channel, row - 1 if row else None), ())

    @property
    def has_sources(self) -> bool:
        """Whether any veil tells where input comes from."""
        return any(veil.source for veil in self.veils.values())


class Gallery:
    """Pictures in the making: read once, hung as the room allows.

    Args:
        page: whose images.
        material: what the report is made from.
        dataset: the images; None for a page without pictures.

    Raises:
        UsageError: the data set is not the one scanned.
    """

    def __init__(self, page: Page, material: Material, dataset: Dataset[Any] | None) -> None:
        """Read the images, and find out what lies where in them."""
        spots = {
            Spot(section.number, row - 1 if row else None, shot.index): shot.label
            for section in page.channels
            for row, images in enumerate(section.rows)
            for shot in images.all
        }
        self.album: Album | None = None
        self.features = material.features
        self.channels = [section.number for section in page.channels]
        self.veils: dict[Spot, Veil] = {}
        if dataset is None:
            return
        refuse_other_images(dataset, {spot.index: label for spot, label in spots.items()})
        self.album = Album(dataset, dict.fromkeys(spot.index for spot in spots), LARGEST)
        if self.album.as_seen and material.positions is not None:
            known = find_where(material.positions, material.parts, set(spots))
            self.veils = {
                spot: Veil(veil(w.answer), None if w.source is None else veil(w.source))
                for spot, w in known.items()
            }

    def hang(self, look: Look) -> Pictures:
        """Encode what fits into the room."""
        return Pictures(
            None if self.album is None else self.album.pictures(look),
            self.veils,
            {} if self.features is None else self._features(self.features, look),
            self._responses(),
        )

    def _responses(self) -> dict[tuple[int, int | None], tuple[float, ...]]:
        features = () if self.features is None else self.features.features
        return {(f.channel, f.concept): f.responses[1:] for f in reversed(features)}

    def _features(self, features: Features, look: Look) -> dict[tuple[int, int | None], Picture]:
        side = round(_FEATURE * look.side)
        return {
            (feature.channel, feature.concept): encode(feature.picture, side, look.quality)
            for feature in reversed(features.features)  # the best of several comes first, and last
            if feature.channel in self.channels
        }
