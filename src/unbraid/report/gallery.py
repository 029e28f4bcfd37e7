"""The page's pictures: reference images, veils over them, feature visualisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from unbraid.report.material import Material
from unbraid.report.pictures import Album, Look, Picture, encode, refuse_other_images, veil
from unbraid.report.view import Page
from unbraid.report.where import Spot, find_where
from unbraid.visualize.features import Features

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
