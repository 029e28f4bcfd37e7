"""Images at the places that they had when they were scanned, whatever their order is now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.arguments import as_path
from unbraid.base.errors import DataError, RunError
from unbraid.base.files import names_in, read_some, read_tensors, write_tensors
from unbraid.base.modes import in_plain_modes
from unbraid.images.dataset import UNLABELLED, Around, labels_of
from unbraid.images.identity import fit_ids, ids_of, unpack_ids
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.manifest import MAX_CLASSES, Manifest, read_manifest

# What tensors from disk must be like before anything is computed of them.


_LARGEST = torch.finfo(torch.float32).max  # of a sound number; squares of it still fit into float64
_MOST_SHARE = 1.001  # rounding may put the only share a little above one
_PLACES = 2**62  # more images than any data set has
_POSITIONS = 2**53  # the last whole number of which float64 knows both neighbours
# Padding may make an input map so many times larger, or as many numbers larger in any case.
_PADDED_TIMES, _PADDED_FREE = 16, 2**26


def layer_fault(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge layer.safetensors: weight (C_out, J) and bias (C_out,)."""
    spec = manifest.layer
    shapes = {"weight": (spec.n_out, spec.n_taps), "bias": (spec.n_out,)}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            return f"holds no {name!r} of the layer's shape"
        if not sound_figures(tensors[name]):
            return f"holds a {name!r} that is not of finite numbers"
    if tensors["weight"].dtype != tensors["bias"].dtype:
        return "holds weights and biases of different types"
    same = _widened(tensors["weight"]) == _wide(manifest.dtype)
    return None if same else "holds weights of another type than the network's"


def column_fault(manifest: Manifest, shard: int, name: str, column: Tensor) -> str | None:
    """Judge one tensor of a shard by itself."""
    spec, n_images = manifest.layer, manifest.images_in(shard)
    if name in ("pooled", "share_value", "input_map"):
        if not sound_figures(column):
            return f"holds a {name!r} that is not of finite numbers"
        # A shard of broken images alone says nothing of types.
        kind = column.dtype if name == "pooled" else _widened(column)
        if name != "share_value" and column.numel() and kind != _wide(manifest.dtype):
            return f"holds a {name!r} of another type than the network's"
        least, most = (0.0, _MOST_SHARE) if name == "share_value" else (-_LARGEST, _LARGEST)
    else:
        whole = torch.int32 if name == "share_channel" else torch.int64
        if column.dtype != whole or column.dim() != 1:
            return f"holds a {name!r} that is no list of whole numbers"
        n_shares = n_images * spec.n_out
        most_of: dict[str, int] = {
            "label": manifest.most_classes - 1,
            "prediction": MAX_CLASSES - 1,
            "n_positions": _POSITIONS,
            "share_start": n_shares,
            "share_channel": spec.n_out - 1,
        }
        if len(column) > {"share_start": n_images + 1, "share_channel": n_shares}.get(
            name, n_images
        ):
            return f"holds a {name!r} of a wrong shape"
        least, most = int(name == "n_positions"), most_of.get(name, _PLACES)
    if column.numel() and not (least <= column.min() and column.max() <= most):
        return f"holds a {name!r} with numbers that cannot be"
    if name == "share_start" and (not len(column) or column[0] or (column.diff() < 0).any()):
        return "holds shares of no image"
    return None


def records_fault(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge all tensors of a shard, each by itself and one beside the other.

    What is not there is not judged.
    """
    faults = (column_fault(manifest, shard, name, t) for name, t in tensors.items())
    fault = next(filter(None, faults), None)
    return fault or _misfit(manifest, shard, tensors)


def _misfit(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
    spec = manifest.layer
    per_image = ("index", "label", "prediction", "n_positions", "group")
    there = [len(tensors[name]) for name in per_image if name in tensors]
    n = there[0] if there else len(tensors.get("share_start", [0])) - 1
    if len(set(there)) > 1:
        return "holds tensors of different numbers of images"
    if "broken" in tensors and there:
        n_images = n + len(tensors["broken"])
        if n_images != manifest.images_in(shard):
            return f"holds {n_images} images of {manifest.images_in(shard)}"
        if any(
            (tensors[name].diff() <= 0).any() for name in ("index", "broken") if name in tensors
        ):
            return "holds images out of order"
        if _elsewhere(manifest, shard, tensors):
            return "holds images of another shard"
    start = tensors.get("share_start")
    if start is not None:
        ends = (int(start[-1]),)
        if len(start) != n + 1 or any(
            tensors[name].shape != ends
            for name in ("share_channel", "share_value")
            if name in tensors
        ):
            return "holds shares of no image"
    pooled, input_map = tensors.get("pooled"), tensors.get("input_map")
    if pooled is not None and there and pooled.shape != (n, spec.groups, spec.n_taps):
        return "holds a 'pooled' of a wrong shape"
    return None if input_map is None else _map_fault(spec, n, input_map)


def _elsewhere(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether images lie elsewhere in the data set than this shard's, where all were scanned."""
    if manifest.classes is not None or manifest.indices:
        return False
    first = shard * manifest.shard_size
    last = first + manifest.images_in(shard)
    columns = (tensors[name] for name in ("index", "broken") if name in tensors)
    return any(bool(((c < first) | (c >= last)).any()) for c in columns)


def _map_fault(spec: LayerSpec, n: int, input_map: Tensor) -> str | None:
    sizes = input_map.shape[2:]
    if input_map.shape[:2] != (n, spec.n_in) or len(sizes) != len(spec.kernel):
        return "holds an 'input_map' of a wrong shape"
    if n == 0:
        return None
    padded = n * spec.n_in
    for dim, size in enumerate(sizes):
        pads = spec.pads(dim, size)
        reach = spec.dilation[dim] * (spec.kernel[dim] - 1) + 1
        # The modes that repeat the input cannot go beyond it.
        most = {"reflect": size - 1, "circular": size}.get(spec.pad_mode, max(pads))
        if size + sum(pads) < reach or size < 1 or max(pads) > most:
            return "holds an 'input_map' that is too small for the layer"
        padded *= size + sum(pads)
    if padded > _PADDED_TIMES * input_map.numel() + _PADDED_FREE:
        return "holds an 'input_map' that the layer's padding makes too large"
    return None


def _wide(dtype: str) -> torch.dtype:
    """What pooled inputs of a network of a type are kept in."""
    return torch.float64 if dtype == "float64" else torch.float32


def _widened(tensor: Tensor) -> torch.dtype:
    """What numbers of a tensor are computed with."""
    return torch.promote_types(tensor.dtype, torch.float32)


def sound_figures(tensor: Tensor) -> bool:
    """Whether a tensor holds fractions, all of them finite and none beyond float32."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return False
    if tensor.numel() == 0:
        return True
    least, most = tensor.aminmax()  # NaN if any is
    return bool(least >= -_LARGEST) and bool(most <= _LARGEST)


# Records of a part of a shard, put together batch by batch.


def no_records(spec: LayerSpec, positions: bool) -> Records:
    """Records of no image: what remains of a batch in which every image was broken."""
    none = torch.zeros(0, dtype=torch.int64)
    return Records(
        index=none,
        label=none,
        prediction=none,
        n_positions=none,
        pooled=torch.zeros(0, spec.groups, spec.n_taps, dtype=torch.float32),
        share_start=torch.zeros(1, dtype=torch.int64),
        share_channel=none.to(torch.int32),
        share_value=torch.zeros(0, dtype=torch.float32),
        broken=none,
        input_map=torch.zeros(0, spec.n_in, *(0 for _ in spec.kernel), dtype=torch.float32)
        if positions
        else None,
    )


def join_records(parts: Sequence[Records]) -> Records:
    """Put the records of a shard's batches into one."""
    some = [part for part in parts if len(part)] or list(parts[:1])
    starts = [0]
    for part in some:
        starts += (part.share_start[1:] + starts[-1]).tolist()
    maps = [part.input_map for part in some if part.input_map is not None]

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in some])

    try:
        input_map = torch.cat(maps) if maps else None
    except RuntimeError:
        raise DataError(
            "Images of different sizes give input maps of different sizes, which positions=True "
            "cannot keep; bring all to one size in the data set's transform."
        ) from None
    return Records(
        index=cat("index"),
        label=cat("label"),
        prediction=cat("prediction"),
        n_positions=cat("n_positions"),
        pooled=cat("pooled"),
        share_start=torch.tensor(starts, dtype=torch.int64),
        share_channel=cat("share_channel"),
        share_value=cat("share_value"),
        broken=torch.cat([part.broken for part in parts]),
        input_map=input_map,
    )


# The Scan on disk: a manifest, the layer's weights, and shards of one record per image.


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


# Images at the places that they had when they were scanned, whatever their order is now.


class AsScanned(Around):
    """A data set in another order; all else is the data set's own.

    Args:
        dataset: of (image, label).
        places: where in it the images are now, by the place at which they were scanned.
        ids: by that place too.
    """

    samples = root = sizes = groups = None  # the data set's are in its own order

    def __init__(
        self, dataset: Dataset[Any], places: Mapping[int, int], ids: Mapping[int, str]
    ) -> None:
        """Look up the labels; no image is read."""
        self.dataset, self.places = dataset, places
        own, places_scanned = labels_of(dataset), range(max(ids) + 1)
        self.targets = [own[places[i]] if i in places else UNLABELLED for i in places_scanned]
        self.ids = [ids.get(i, f"image {i}") for i in places_scanned]

    def __len__(self) -> int:
        """Number of places."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return the image that was scanned at a place, and its label."""
        image, label = self.dataset[self.source(index)]
        return image, label

    def __getattr__(self, name: str) -> Any:
        """Give what else the data set has, such as `classes`."""
        if name == "dataset":  # not yet there, as in a copy being made
            raise AttributeError(name)
        kept = getattr(self.dataset, name)
        return (lambda index: kept(self.source(index))) if name == "picture" else kept

    def source(self, index: int) -> int:
        """Return the place in the data set of the image that was scanned at a place."""
        if index not in self.places:
            raise DataError(f"Image {self.ids[index]} is gone; bring it back, or scan anew.")
        return self.places[index]


def as_scanned(dataset: Dataset[Any], scan: Scan) -> Dataset[Any]:
    """Find the images of a scan again by their ids.

    Returns:
        The data set itself where scan or data set have no ids, no id is known, or all are where
        they were; else its images at the places of the scan.
    """
    known, scanned = ids_of(dataset), scan.ids()
    if known is None:
        return dataset
    now = {one: place for place, one in enumerate(known)}
    places = {index: now[one] for index, one in scanned.items() if one in now}
    unmoved = len(places) == len(scanned) and all(i == place for i, place in places.items())
    return dataset if unmoved or not places else AsScanned(dataset, places, scanned)
