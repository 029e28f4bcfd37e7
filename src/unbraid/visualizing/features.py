"""What `visualize` returns: images made to excite channels, kept as PNG files and one JSON file."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta
from PIL import Image

from unbraid.base.arguments import as_path
from unbraid.base.errors import brief
from unbraid.base.files import write_whole
from unbraid.base.schema import build, check_schema, read_json, unread

SCHEMA = 1
MAX_SIDE = 4096  # pixels; a larger picture in a folder is none of ours
MAX_PIXELS = 2**28  # of all pictures together, 1 GiB of memory
INDEX = "features.json"

Count = Annotated[int, Meta(ge=0)]


@dataclass(frozen=True)
class _Entry:
    channel: Count
    concept: Count | None
    place: Count
    responses: tuple[float, ...]


@dataclass(frozen=True)
class _About:
    schema: int
    layer: str
    weights: str
    settings: dict[str, Any]
    left_out: Count
    features: tuple[_Entry, ...]


@dataclass(frozen=True, eq=False)
class Feature:
    """An image made to excite a channel, or one of its concept channels."""

    channel: int
    concept: int | None  # None: the whole channel
    place: int  # among the images made for the same (concept) channel, best first
    picture: Image.Image  # RGBA; opaque where the objective drew on the image most
    # Mean pre-activation over positions when the network sees the image (without transparency):
    # of the whole channel, then of each of its concept channels.
    responses: tuple[float, ...]

    @property
    def name(self) -> str:
        """Its file's name without the ending, such as 1660, 1660.0 or 1660.0_1."""
        return _name(self.channel, self.concept, self.place)


@dataclass(frozen=True, eq=False)
class Features:
    """Feature visualisations of one layer's channels.

    Attributes:
        layer: name of the layer.
        weights: hash of the network, concept channels and all, that they were made with.
        features: images of whole channels and of concept channels, each with its response (mean
            pre-activation over positions).
        settings: how they were made.
        left_out: split channels without images, for want of time.
    """

    layer: str
    weights: str  # hash of the network, concept channels and all, that they were made with
    features: tuple[Feature, ...]
    settings: dict[str, Any] = field(default_factory=dict)  # how they were made
    left_out: int = 0  # split channels without images, for want of time

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels that there are images of, in order."""
        return tuple(sorted({feature.channel for feature in self.features}))

    def of(self, channel: int, concept: int | None = None) -> tuple[Feature, ...]:
        """Return the images of a channel, or of one of its concept channels; perhaps none."""
        return tuple(f for f in self.features if (f.channel, f.concept) == (channel, concept))

    def image(self, channel: int, concept: int | None = None) -> Image.Image:
        """Return the best picture, RGBA, of a channel or one of its concept channels.

        Raises:
            KeyError: there is none.
        """
        for feature in self.of(channel, concept):
            return feature.picture
        what = f"channel {channel}" + ("" if concept is None else f", concept {concept}")
        raise KeyError(f"there is no visualisation of {what}")

    def save(self, folder: str | Path) -> None:
        """Write `CHANNEL.png`, `CHANNEL.CONCEPT.png` and so on, and `features.json`.

        Raises:
            RunError: the disk is full or may not be written.
        """
        folder = as_path("folder", folder)
        for feature in self.features:
            content = io.BytesIO()
            feature.picture.save(content, "PNG", optimize=True)
            write_whole(folder / f"{feature.name}.png", content.getvalue())
        kept = ("channel", "concept", "place", "responses")
        about = {
            "schema": SCHEMA,
            "layer": self.layer,
            "weights": self.weights,
            "settings": self.settings,
            "left_out": self.left_out,
            "features": [{name: getattr(f, name) for name in kept} for f in self.features],
        }
        write_whole(folder / INDEX, (json.dumps(about, indent=1) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> Features:
        """Read what `save` wrote.

        Raises:
            RunError: a file is missing, damaged or not one that `save` writes.
        """
        folder = as_path("folder", folder)
        try:
            read = read_json(folder / INDEX)
            check_schema(read, SCHEMA)
            about = build(_About, read)
            features = tuple(_read_features(folder, about.features))
            return cls(about.layer, about.weights, features, about.settings, about.left_out)
        except Exception as error:  # a damaged picture fails in any way
            text = (
                f"{folder} holds no feature visualisations that can be read ({brief(error)}); make "
                "them again."
            )
            raise unread(error, text) from None


def _read_features(folder: Path, entries: Sequence[_Entry]) -> Iterator[Feature]:
    """Read the pictures, unless they are too many or one stands there twice."""
    # By number, never by a name that the file gives: that might lead anywhere.
    names = [f"{_name(entry.channel, entry.concept, entry.place)}.png" for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError("a picture stands there twice")
    n_pixels = 0
    for name in names:  # before any picture takes memory
        with Image.open(folder / name, formats=("PNG",)) as file:
            n_pixels += file.width * file.height
            if max(file.size) > MAX_SIDE:
                raise ValueError(f"{name} has {file.width} x {file.height} pixels")
    if n_pixels > MAX_PIXELS:
        raise ValueError(f"its pictures have {n_pixels} pixels")
    for name, entry in zip(names, entries, strict=True):
        with Image.open(folder / name, formats=("PNG",)) as file:
            picture = file.convert("RGBA")
        yield Feature(entry.channel, entry.concept, entry.place, picture, entry.responses)


def _name(channel: int, concept: int | None, place: int) -> str:
    part = "" if concept is None else f".{concept}"
    return f"{channel}{part}" + (f"_{place}" if place else "")
