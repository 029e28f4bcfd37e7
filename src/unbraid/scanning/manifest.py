"""What a Scan was made of: manifest.json, which `docs/format.md` specifies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from unbraid.base.schema import build, check_schema, in_range, parse_json, read_json, unread
from unbraid.networks.spec import SAMPLED_IMAGES, LayerSpec
from unbraid.scanning.scan_options import MAX_PLACES, MAX_THREADS

SCHEMA = 1
MAX_CLASSES = 2**20
_MOST_SUMS = 2**30  # numbers that a sum per class may hold, so that a label cannot take all memory
_MOST_IMAGES = 2**48


@dataclass(frozen=True)
class Manifest:
    """What a Scan was made of; two scans with the same identity hold the same records."""

    weights: str  # hash of the network's weights
    layer: LayerSpec
    data: str  # fingerprint of the images and labels
    n_images: int  # images concerned, broken ones included
    class_names: tuple[str, ...]
    preprocessing: str
    dtype: str  # of the network's weights
    min_share: float  # this and others named alike are options of `unbraid.scan`
    classes: tuple[int, ...] | None
    positions: bool
    shard_size: int
    batch_size: int
    skip_broken: bool
    source: dict[str, Any]
    versions: dict[str, str]
    labels: str = "given"
    output: str = ""  # which part of the network's output logits were taken from
    indices: str = ""  # hash of the indices in the data set, where only some were scanned
    autocast: bool = False
    channels_last: bool = False
    compiled: bool = False  # whether full batches ran compiled, which earlier versions could
    threads: int = 0  # 0: not known
    first: str = ""  # hash of the indices of images that come before all others, if some do
    n_first: int = 0  # how many they are, in whole shards
    target: str = "label"  # name of the number of each image whose gradient was taken
    places: int = 0  # that excite it most, kept of each channel
    prefix_tokens: int | None = None
    places_of: str = ""  # of a scan of places, the fingerprint of the images that they lie in
    n_prefix: int = 0  # of a scan of places, tokens before those of an image, which have `peaks`
    schema: int = SCHEMA

    # What must agree before a scan goes on in a folder, in words for people.
    _identity = {  # noqa: RUF012
        "weights": "the network's weights",
        "layer": "the layer",
        "data": "the images or labels",
        "preprocessing": "the preprocessing",
        "dtype": "the number format",
        "min_share": "the smallest share kept",
        "classes": "the classes",
        "labels": "whether labels are given or predicted",
        "target": "the target",
        "output": "which part of the output is the logits",
        "indices": "the places in the data set",
        "first": "which images come first",
        "positions": "whether positions are kept",
        "autocast": "whether it runs in bfloat16",
        "channels_last": "whether it runs channels last",
        "compiled": "whether it runs compiled",
        "threads": "the number of threads",
        "shard_size": "the shard size",
        "places": "how many places are kept",
        "prefix_tokens": "the tokens before those of the image",
        "places_of": "whether it is of places",
    }

    @property
    def n_shards(self) -> int:
        """Shards that a complete Scan has."""
        return -(-self.n_images // self.shard_size)

    @property
    def has_shares(self) -> bool:
        """Whether records tell which channels mattered, as they do with any target."""
        return self.target != "none"

    @property
    def is_classified(self) -> bool:
        """Whether an image's top class can be right or wrong."""
        return self.labels == "given" and self.target == "label"

    def images_in(self, shard: int) -> int:
        """Images that a shard holds, broken ones included."""
        return min(self.shard_size, self.n_images - shard * self.shard_size)

    @property
    def sampled(self) -> list[int]:
        """Which of the images concerned, by number, are kept tap inputs of at some positions."""
        n = self.n_first or self.n_images  # so that the first ones alone have all of them
        return sorted({k * n // SAMPLED_IMAGES for k in range(SAMPLED_IMAGES)})

    @property
    def most_classes(self) -> int:
        """Classes that sums of shares and pooled inputs per class have room for."""
        return most_classes(self.layer)

    def differences(self, other: Manifest) -> list[str]:
        """Name, in words, what makes two scans different things."""
        return [
            words
            for name, words in self._identity.items()
            if getattr(self, name) != getattr(other, name)
        ]

    @cached_property
    def scan_id(self) -> str:
        """What tells this scan's shards from those of any other scan."""
        whole = asdict(self)
        # What is as it was before there was a choice leaves no trace, so that old shards stay.
        own = {
            known.name: whole[known.name]
            for known in fields(self)
            if known.name in (*self._identity, "n_images") and whole[known.name] != known.default
        }
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:32]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of manifest.json; raises as `from_dict`."""
        return cls.from_dict(parse_json(text))

    @classmethod
    def from_dict(cls, values: Any) -> Manifest:
        """Build a Manifest from parsed JSON; ValueError if it is none or has impossible numbers."""
        check_schema(values, SCHEMA)
        manifest = build(cls, values)
        manifest.layer.check()
        for name in ("n_images", "shard_size", "batch_size"):
            in_range(name, getattr(manifest, name), 1, _MOST_IMAGES)
        in_range("min_share", manifest.min_share, 0, 1)
        in_range("threads", manifest.threads, 0, MAX_THREADS)
        in_range("places", manifest.places, 0, MAX_PLACES)
        in_range("prefix_tokens", manifest.prefix_tokens or 0, 0, MAX_PLACES)
        in_range("n_prefix", manifest.n_prefix, 0, _MOST_IMAGES)
        in_range("n_first", manifest.n_first, 0, manifest.n_images)
        if manifest.n_first % manifest.shard_size:
            raise ValueError("the images that come first are no whole shards")
        n_names = len(manifest.class_names)
        in_range("the number of class_names", n_names, 0, manifest.most_classes)
        for label in manifest.classes or ():
            in_range("a label in classes", label, 0, MAX_CLASSES - 1)
        return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest, None where there is none; RunError if it cannot be read."""
    path = folder / "manifest.json"
    try:
        return Manifest.from_dict(read_json(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        text = f"{path} is not a manifest that can be read ({error}); scan again."
        raise unread(error, text) from None


def most_classes(layer: LayerSpec) -> int:
    """Say how many classes sums of a layer's shares and pooled inputs per class have room for."""
    return min(MAX_CLASSES, _MOST_SUMS // (layer.n_out + layer.groups * layer.n_taps))


def hash_indices(indices: Sequence[int] | None) -> str:
    """Identify images by their indices in a data set, in order; empty for all of it."""
    if indices is None:
        return ""
    return hashlib.sha256(np.array(indices, dtype=np.int64).tobytes()).hexdigest()
