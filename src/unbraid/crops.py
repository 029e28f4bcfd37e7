"""Where in an image a channel answers, and that part of the image cut out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

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
