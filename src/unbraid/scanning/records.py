"""A Scan on disk: a manifest, the layer's weights, and shards with one record per image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from unbraid.base.arguments import whole_number
from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import names_in, read_tensors, write_tensors
from unbraid.base.modes import in_plain_modes
from unbraid.images.identity import unpack_ids
from unbraid.networks.spec import LayerSpec, spread_inputs
from unbraid.scanning.fields import (
    COLUMNS,
    NEEDED,
    OF_PLACES,
    Records,
    layer_fault,
    no_records,
    records_fault,
)
from unbraid.scanning.manifest import Manifest, read_manifest

# What most steps ask for; all else may be many times as large.
_LIGHT = ("index", "label", "prediction", "n_positions", "pooled", "broken")
_OPTIONAL = ("group", "drawn")
PLACES = "places"  # folder of the scan of places in a scan's
PEAKS = "tokens.safetensors"  # of a scan of places, its `peaks`


@dataclass(frozen=True)
class Scan:
    """A finished scan: open it with `unbraid.open_scan`, or get it from `unbraid.scan`.

    It is read from disk shard by shard, so it takes little memory, whatever its size.

    Attributes:
        path: its folder.
        manifest: what was scanned, and how.
        weight: of the layer, (C_out, J).
        bias: of the layer, (C_out,).
    """

    path: Path
    manifest: Manifest
    weight: Tensor  # (C_out, J)
    bias: Tensor  # (C_out,)

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

    @property
    def parts(self) -> tuple[Scan, ...]:
        """The scans that it is read from: itself, unless several were opened as one."""
        return (self,)

    @cached_property
    def places(self) -> Scan:
        """The scan of places that was made with it: as this one, but with places for images.

        Raises:
            UsageError: none was asked for, or these are several scans.
        """
        if len(self.parts) > 1:
            raise UsageError(
                f"The scans in {self.path} were opened as one, but several scans of places are not "
                "read as one; open one of the scans, or scan all images into one folder."
            )
        if not self.manifest.places or self.manifest.places_of:
            raise UsageError(f"{self.path} keeps no places; scan with places=1000.")
        return open_one(self.path / PLACES)

    @property
    def peaks(self) -> Tensor:
        """In how many images tokens that are no part of them respond most, (C_out, tokens) int64.

        Of a scan of places; that is more than all places of the image, and than the other tokens.

        Raises:
            RunError: there are such tokens, but their file is gone or damaged.
        """
        if not has_peaks(self.path, self.manifest):
            return torch.zeros(self.layer.n_out, 0, dtype=torch.int64)
        return sound_peaks(self.path, self.manifest)

    @property
    def n_shards(self) -> int:
        """How many shards it has."""
        return self.manifest.n_shards

    def shard(self, number: int) -> Records:
        """Read one shard."""
        return read_shard(self.path, number, self.manifest)

    def some(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors of one shard, and nothing else."""
        return sound_tensors(self.path, self.manifest, shard, names)

    def holds(self, shard: int, name: str) -> bool:
        """Whether one shard has a tensor."""
        return name in names_in(shard_path(self.path, shard))

    def shards(self) -> Iterator[Records]:
        """Read the records shard by shard, so that memory does not grow with their number."""
        return map(self.shard, range(self.n_shards))

    def light_shard(self, number: int) -> Records:
        """Read one shard without shares, input maps, positions and ids."""
        empty = vars(no_records(self.layer, positions=True)) | {"input_map": None}
        names = [*_LIGHT, *(name for name in _OPTIONAL if self.holds(number, name))]
        own = self.some(number, names)
        no_share = torch.zeros(len(own["index"]) + 1, dtype=torch.int64)
        return Records(**{**empty, **own, "share_start": no_share})

    def light_shards(self) -> Iterator[Records]:
        """Read the records as `shards` does, but as light as `light_shard` does."""
        return map(self.light_shard, range(self.n_shards))

    def tensors(self, *names: str) -> Iterator[dict[str, Tensor]]:
        """Read some tensors of every shard, and nothing else."""
        return (self.some(shard, names) for shard in range(self.n_shards))

    def columns(self, name: str) -> Iterator[Tensor]:
        """Read one tensor of every shard, and nothing else."""
        return (tensors[name] for tensors in self.tensors(name))

    @in_plain_modes
    def spread(self, group: int) -> Tensor | None:
        """Tap inputs of a group's channels less their image's mean, (M, J) float64.

        They are of at most 64 positions of each of some 50 images spread evenly over those scanned,
        in order; their second moment, `spread.T @ spread / M`, is the layer's mean covariance
        within an image. Of a layer with one position M is 0. None for scans of earlier versions,
        but those with positions, whose input maps tell.
        """
        group = whole_number("group", group, 0, self.layer.groups - 1)
        return None if self._spread is None else self._spread[:, group].double()

    @cached_property
    def _spread(self) -> Tensor | None:
        """The same of all groups, (M, G, J); kept, since a fit asks for it each time."""
        parts = []
        for shard in sorted({k // self.manifest.shard_size for k in self.manifest.sampled}):
            spread = self._spread_of_maps(shard) if self.positions else self._spread_kept(shard)
            if spread is None:
                return None
            parts.append(spread)
        return torch.cat(parts)

    def _spread_kept(self, shard: int) -> Tensor | None:
        if not self.holds(shard, "spread"):
            return None
        return self.some(shard, ("spread_start", "spread"))["spread"]

    def _spread_of_maps(self, shard: int) -> Tensor:
        own = self.some(shard, ("index", "broken", "pooled", "input_map"))
        scanned = torch.cat([own["index"], own["broken"]]).sort().values
        first = shard * self.manifest.shard_size
        sampled = [k - first for k in self.manifest.sampled if 0 <= k - first < len(scanned)]
        rows = torch.isin(own["index"], scanned[sampled])
        spread = spread_inputs(self.layer, [own["input_map"][rows]], own["pooled"][rows])
        return spread.flatten(0, 1)

    def broken(self) -> list[int]:
        """Indices of images that could not be read and were left out."""
        return [int(index) for column in self.columns("broken") for index in column]

    @cached_property
    def n_by_label(self) -> Counter[int]:
        """How many images each class has; kept, since several steps ask for it."""
        counted: Counter[int] = Counter()
        for label in self.columns("label"):
            values, counts = label.unique(return_counts=True)
            counted.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        return counted

    def labels_seen(self) -> set[int]:
        """Classes that have an image."""
        return set(self.n_by_label)

    def ids(self, indices: Iterable[int] | None = None) -> dict[int, str]:
        """What names each image for good, or each of some, by index; empty where there are no ids.

        Of all images this takes a few hundred bytes each; `ids_by_shard` gives them in turn.
        """
        every = (pair for own in self.ids_by_shard() for pair in own.items())
        if indices is None:
            return dict(every)
        wanted = set(indices)
        return {index: one for index, one in every if index in wanted}

    def ids_by_shard(self) -> Iterator[dict[int, str]]:
        """The same shard by shard, so that memory does not grow with the number of images."""
        for shard in range(self.n_shards):
            if not self.holds(shard, "id_start"):
                return
            own = self.some(shard, ("index", "id_start", "id_bytes"))
            names = unpack_ids(own["id_start"], own["id_bytes"])
            yield dict(zip(own["index"].tolist(), names, strict=True))


def open_one(folder: Path) -> Scan:
    """Open the finished scan in a folder; the rest is as in `unbraid.open_scan`."""
    manifest = read_manifest(folder)
    if manifest is None:
        inside = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
        if inside:
            raise RunError(
                f"{folder} holds several scans: {', '.join(inside)}; name one of these folders."
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
    """Read the layer's weights; RunError if they are damaged or not this layer's."""
    path = folder / "layer.safetensors"
    tensors, _ = read_tensors(path)
    _refuse(path, layer_fault(manifest, tensors))
    return tensors


def has_peaks(folder: Path, manifest: Manifest) -> bool:
    """Whether a scan has counts of tokens before an image's; older manifests do not say so."""
    return manifest.n_prefix > 0 or (folder / PEAKS).exists()


def sound_peaks(folder: Path, manifest: Manifest) -> Tensor:
    """Read these counts; RunError if they are gone, damaged or not this layer's."""
    path = folder / PEAKS
    if not path.exists():
        raise RunError(f"{path} is gone; start the scan again, which makes it.")
    peaks = read_tensors(path, ["peaks"])[0]["peaks"]
    _refuse(path, None if len(peaks) == manifest.layer.n_out else "is of another layer")
    return peaks


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard:06d}.safetensors"


def shards_there(folder: Path, manifest: Manifest) -> list[int]:
    """List a scan's shards that are there, in order, however many a manifest claims."""
    names = {path.name for path in folder.glob("shard-*.safetensors")}
    digits = (name.removeprefix("shard-").removesuffix(".safetensors") for name in names)
    numbers = sorted(int(own) for own in digits if own.isdecimal())
    return [n for n in numbers if n < manifest.n_shards and shard_path(folder, n).name in names]


def write_shard(
    folder: Path, shard: int, records: Records, manifest: Manifest | None = None
) -> None:
    """Write one shard, with what ties it to its scan: the manifest's identity and its number."""
    tensors = {name: tensor for name, tensor in vars(records).items() if tensor is not None}
    about = {"scan": manifest.scan_id, "shard": shard} if manifest else {}
    write_tensors(shard_path(folder, shard), tensors, about)


def read_shard(folder: Path, shard: int, manifest: Manifest | None = None) -> Records:
    """Read one shard; with a manifest, RunError unless it holds what this scan's must."""
    path = shard_path(folder, shard)
    if manifest is None:
        return Records(**read_tensors(path)[0])
    tensors = sound_tensors(folder, manifest, shard)
    if ("input_map" in tensors) != manifest.positions:
        _refuse(path, "holds input maps where none are, or none")
    if {name in tensors for name in OF_PLACES} != {bool(manifest.places_of)}:
        _refuse(path, "holds places where none are, or lacks what is told of them")
    return Records(**tensors)


def sound_tensors(
    folder: Path, manifest: Manifest, shard: int, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Read some tensors of a shard, or all; RunError unless they are what they must be."""
    path = shard_path(folder, shard)
    tensors, about = read_tensors(path, names)
    if names is None and not NEEDED <= tensors.keys() <= COLUMNS.keys():
        _refuse(path, "is not a shard")
    if about.get("scan", manifest.scan_id) != manifest.scan_id:  # older shards say nothing
        _refuse(path, "is of another scan")
    if about.get("shard", shard) != shard:
        _refuse(path, "is another shard")
    _refuse(path, records_fault(manifest, shard, tensors))
    return tensors


def _refuse(path: Path, fault: str | None) -> None:
    if fault:
        raise RunError(f"{path} {fault}; delete it and start the scan again.")
