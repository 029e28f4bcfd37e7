"""Which part of a picture a network sees, found out by showing known pictures to a transform.

A position of a layer's map is a place in what the network sees, not in the file: most transforms
cut a picture before they shrink it. What they cut is measured, as they may be anybody's code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.nested import all_hold, changes_images, inner_of, is_known, own

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
        dataset: of (image, label). One with a method `picture`, as `unbraid.ImageFolder`, has
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
