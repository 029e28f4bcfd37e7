"""What a Scan was made of: manifest.json, which `docs/format.md` specifies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from unbraid.errors import RunError
from unbraid.layers import LayerSpec

SCHEMA = 1


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
    min_share: float  # the smallest share kept
    classes: tuple[int, ...] | None  # only images of these classes; None for all
    positions: bool  # whether the layer's input map is kept too
    shard_size: int
    batch_size: int
    skip_broken: bool
    source: dict[str, Any]  # how the command line found network and images, for later commands
    versions: dict[str, str]
    labels: str = "given"  # or "predicted": each image counts as what the network takes it for
    output: str = ""  # which part of the network's output logits were taken from
    indices: str = ""  # hash of the places in the data set, where only some were scanned
    autocast: bool = False  # whether the network ran in bfloat16 where torch sees fit
    threads: int = 0  # of each process, since convolutions round otherwise with more; 0: not known
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
        "output": "which part of the output is the logits",
        "indices": "the places in the data set",
        "positions": "whether positions are kept",
        "autocast": "whether it runs in bfloat16",
        "threads": "the number of threads",
        "shard_size": "the shard size",
    }

    @property
    def n_shards(self) -> int:
        """Shards that a complete Scan has."""
        return -(-self.n_images // self.shard_size)

    def images_in(self, shard: int) -> int:
        """Images that a shard holds, broken ones included."""
        return min(self.shard_size, self.n_images - shard * self.shard_size)

    def differences(self, other: Manifest) -> list[str]:
        """Name, in words, what makes two scans different things."""
        return [
            words
            for key, words in self._identity.items()
            if getattr(self, key) != getattr(other, key)
        ]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read the text of manifest.json.

        Raises:
            ValueError, KeyError, TypeError: the text is not a manifest.
        """
        values = json.loads(text)
        if values["schema"] != SCHEMA:
            raise ValueError(f"schema {values['schema']}, this version reads {SCHEMA}")
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown entries {sorted(unknown)}")
        values["layer"] = LayerSpec.from_dict(values["layer"])
        values["class_names"] = tuple(values["class_names"])
        if values["classes"] is not None:
            values["classes"] = tuple(values["classes"])
        return cls(**values)


def read_manifest(folder: Path) -> Manifest | None:
    """Read a folder's manifest, None where there is none.

    Raises:
        RunError: the file is not a manifest that this version can read.
    """
    path = folder / "manifest.json"
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise RunError(f"{path} is not a manifest that can be read ({error}); scan anew.") from None


def hash_places(places: Sequence[int] | None) -> str:
    """Identify some places in a data set, in order; empty for all of it."""
    return (
        "" if places is None else hashlib.sha256(torch.tensor(places).numpy().tobytes()).hexdigest()
    )
