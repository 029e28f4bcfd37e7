"""The Scan on disk: a manifest, the layer's weights, and shards of one record per image.

`docs/format.md` specifies the files. Everything is safetensors or JSON, and every file appears
whole or not at all: it is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.clustering import Clusters
from unbraid.doors import in_plain_modes
from unbraid.errors import RunError
from unbraid.files import names_in, read_some, read_tensors, write_tensors
from unbraid.given import as_path
from unbraid.identity import fit_ids, unpack_ids
from unbraid.layers import LayerSpec
from unbraid.manifest import Manifest, read_manifest
from unbraid.soundness import layer_fault, records_fault


@dataclass
class Records:
    """The records of some images. N images, S shares kept, B broken images."""

    index: Tensor  # (N,), place in the data set
    label: Tensor  # (N,)
    prediction: Tensor  # (N,)
    n_positions: Tensor  # (N,), output positions summed over
    pooled: Tensor  # (N, G, J)
    share_start: Tensor  # (N + 1,), image n has the shares share_start[n]:share_start[n + 1]
    share_channel: Tensor  # (S,)
    share_value: Tensor  # (S,)
    broken: Tensor  # (B,), places in the data set of images that could not be read
    input_map: Tensor | None = None  # (N, C_in, positions ...), only with positions=True
    group: Tensor | None = None  # (N,), which images belong together, if the data set knows
    id_start: Tensor | None = None  # (N + 1,), image n has the id id_bytes[id_start[n]:...[n + 1]]
    id_bytes: Tensor | None = None  # of all ids in a row, if the data set has any

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    @property
    def ids(self) -> list[str] | None:
        """What names each image for good, whatever its place; None if the data set has no ids."""
        if self.id_start is None or self.id_bytes is None:
            return None
        return unpack_ids(self.id_start, self.id_bytes)

    @property
    def share_image(self) -> Tensor:
        """(S,), which of the N images each share belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self), dtype=torch.int64), self.share_start.diff()
        )

    def share_of(self, channel: int) -> Tensor:
        """(N,), the share of one channel in every image, zero where it was too small to keep."""
        share = self.share_value.new_zeros(len(self))
        found = self.share_channel == channel
        share[self.share_image[found]] = self.share_value[found]
        return share


@dataclass(frozen=True)
class Scan:
    """A finished scan: open it with `unbraid.open_scan`, or get it from `unbraid.scan`."""

    path: Path
    manifest: Manifest
    weight: Tensor  # (C_out, J)
    bias: Tensor  # (C_out,)
    clusters: Clusters = field(default_factory=dict)  # that numbers behind the classes stand for

    @property
    def layer(self) -> LayerSpec:
        """The layer scanned."""
        return self.manifest.layer

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by label, also of those without images."""
        return self.manifest.class_names

    @property
    def positions(self) -> bool:
        """Whether the records hold the layer's input maps."""
        return self.manifest.positions

    def shards(self) -> Iterator[Records]:
        """Read the records shard by shard, so that memory does not grow with their number."""
        for shard in range(self.manifest.n_shards):
            yield sound_shard(self.path, self.manifest, shard)

    def broken(self) -> list[int]:
        """Places in the data set of images that could not be read and were left out."""
        return [int(index) for column in self.columns("broken") for index in column]

    def labels_seen(self) -> set[int]:
        """Classes that have an image."""
        return {int(label) for column in self.columns("label") for label in column.unique()}

    def ids(self) -> dict[int, str]:
        """What names each image for good, by place; empty where the data set had no ids."""
        ids: dict[int, str] = {}
        for shard in range(self.manifest.n_shards):
            if "id_start" not in names_in(shard_path(self.path, shard)):
                return {}
            own = sound_tensors(self.path, self.manifest, shard, ("index", "id_start", "id_bytes"))
            names = unpack_ids(own["id_start"], own["id_bytes"])
            ids.update(zip(own["index"].tolist(), names, strict=True))
        return ids

    def columns(self, name: str) -> Iterator[Tensor]:
        """Read one tensor of every shard, and nothing else."""
        return (tensors[name] for tensors in self.tensors(name))

    def tensors(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Read some tensors of every shard, and nothing else."""
        for shard in range(self.manifest.n_shards):
            yield sound_tensors(self.path, self.manifest, shard, names)


@in_plain_modes
def open_scan(path: str | Path) -> Scan:
    """Open a finished scan.

    Raises:
        RunError: there is no scan, it is damaged, or it was not finished.
    """
    folder = as_path("path", path)
    manifest = read_manifest(folder)
    if manifest is None:
        inside = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
        if inside:
            raise RunError(
                f"{folder} holds scans of several layers: {', '.join(inside)}; open one of these "
                "folders."
            )
        raise RunError(f"{folder} holds no scan; make one with `unbraid scan`.")
    n_missing = manifest.n_shards - len(shards_there(folder, manifest))
    if n_missing:
        raise RunError(
            f"The scan in {folder} is not finished ({n_missing} of {manifest.n_shards} shards "
            "are missing); start the same scan again and it goes on."
        )
    layer = sound_layer(folder, manifest)
    return Scan(folder, manifest, layer["weight"], layer["bias"])


def sound_layer(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Read the layer's weights, and make sure that they are this layer's.

    Raises:
        RunError: the file is missing or damaged, or of another layer.
    """
    path = folder / "layer.safetensors"
    layer = read_tensors(path)[0]
    fault = layer_fault(manifest, layer)
    if fault:
        raise RunError(f"{path} {fault}; delete it and start the scan again.")
    return layer


def shards_there(folder: Path, manifest: Manifest) -> list[int]:
    """List a scan's shards that are there, in order, however many a manifest claims."""
    names = {path.name for path in folder.glob("shard-*.safetensors")}
    digits = (name.removeprefix("shard-").removesuffix(".safetensors") for name in names)
    numbers = (int(own) for own in digits if own.isdecimal())
    there = (n for n in numbers if n < manifest.n_shards and shard_path(folder, n).name in names)
    return sorted(there)


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard:06d}.safetensors"


def write_shard(
    folder: Path, shard: int, records: Records, manifest: Manifest | None = None
) -> None:
    """Write one shard, with what ties it to its scan: the manifest's identity and its number."""
    tensors = {k: v for k, v in vars(records).items() if v is not None}
    about = {"scan": manifest.scan_id, "shard": shard} if manifest else {}
    write_tensors(shard_path(folder, shard), tensors, about)


def read_shard(folder: Path, shard: int, manifest: Manifest | None = None) -> Records:
    """Read one shard, of a certain scan if its manifest is given.

    Raises:
        RunError: the file is missing or damaged, or it is another scan's or another shard.
    """
    path = shard_path(folder, shard)
    tensors, about = read_tensors(path)
    _refuse_stranger(path, about, manifest, shard)
    try:
        return Records(**tensors)
    except TypeError:
        raise RunError(f"{path} is not a shard; delete it and start the scan again.") from None


def sound_shard(folder: Path, manifest: Manifest, shard: int) -> Records:
    """Read one shard, and make sure that it holds what a shard of this scan must.

    Raises:
        RunError: the file is missing or damaged, lacks images or holds impossible records.
    """
    records = read_shard(folder, shard, manifest)
    tensors = {k: v for k, v in vars(records).items() if v is not None}
    fault = _misses(tensors, manifest) or _fault(tensors, manifest, shard)
    if fault:
        raise RunError(f"{shard_path(folder, shard)} {fault}; delete it and start the scan again.")
    return records


def sound_tensors(
    folder: Path, manifest: Manifest, shard: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Read some tensors of a shard, and make sure that they are what they must be.

    Raises:
        RunError: the file is missing or damaged, or they are impossible.
    """
    path = shard_path(folder, shard)
    tensors, about = read_some(path, names)
    _refuse_stranger(path, about, manifest, shard)
    fault = _fault(tensors, manifest, shard)
    if fault:
        raise RunError(f"{path} {fault}; delete it and start the scan again.")
    return tensors


def _refuse_stranger(
    path: Path, about: dict[str, Any], manifest: Manifest | None, shard: int
) -> None:
    """Raise if a shard says that it is another one's; older shards say nothing."""
    if manifest is None or "scan" not in about:
        return
    if (about["scan"], about.get("shard")) != (manifest.scan_id, shard):
        other = "of another scan" if about["scan"] != manifest.scan_id else "another shard"
        raise RunError(f"{path} is {other}; delete it and start the scan again.")


def _misses(tensors: dict[str, Tensor], manifest: Manifest) -> str | None:
    there = tensors.get("input_map") is not None
    return None if there == manifest.positions else "holds input maps where none are, or none"


def _fault(tensors: dict[str, Tensor], manifest: Manifest, shard: int) -> str | None:
    """What is wrong with a shard's records, None if nothing is."""
    judged = {name: tensor for name, tensor in tensors.items() if not name.startswith("id_")}
    fault = records_fault(manifest, shard, judged)
    if fault is None and "index" in tensors:
        ids = tensors.get("id_start"), tensors.get("id_bytes")
        if not fit_ids(len(tensors["index"]), *ids):
            return "holds ids of other images"
    return fault
