"""Several scans read as one: of one network and layer, made alike, no image in two of them."""

from __future__ import annotations

import glob
import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from unbraid.base.arguments import as_path
from unbraid.base.errors import RunError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import one_line
from unbraid.images.dataset import join_names
from unbraid.images.identity import unpack_ids
from unbraid.scanning.fields import Records
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.records import Scan, open_one

# What may differ, as it tells images apart, not what a record of one is; the last three may change
# its last bits.
_FREE = {
    *("the images or labels", "the classes", "the places in the data set", "the shard size"),
    "which images come first",
    *("the number of threads", "whether it runs channels last", "whether it runs compiled"),
}


@in_plain_modes
def open_scan(path: str | Path | Sequence[str | Path]) -> Scan:
    """Open a finished scan, or several as one.

    Args:
        path: the folder of a scan, a pattern such as "scan-*", or a list of these. Several scans
            must be of one network and layer, made with the same options, and hold no image twice,
            which their ids tell; so all need ids (docs/data.md).

    Returns:
        The scan. Of several, images follow each other scan by scan, in an order that does not
        depend on that of the folders, and `index` counts through them; `parts` are the scans.

    Raises:
        RunError: there is no scan, it is damaged, or it was not finished; or scans do not belong
            together.
        UsageError: no folder is named.
    """
    given = list(path) if isinstance(path, (list, tuple)) else [path]
    named = [folder for one in given for folder in _expand(as_path("path", one))]
    folders = {os.path.realpath(folder): folder for folder in named}
    if not folders:
        raise UsageError("path names no scan; give one folder or several.")
    scans = [open_one(folder) for folder in folders.values()]
    return scans[0] if len(scans) == 1 else _join(scans)


def _expand(path: Path) -> list[Path]:
    """The folders that a pattern stands for, or the one that a path names."""
    if not glob.has_magic(str(path)) or path.exists():
        return [path]
    found = [Path(one) for one in sorted(glob.glob(str(path))) if os.path.isdir(one)]
    if not found:
        raise RunError(f"No folder fits {path}; make scans with `unbraid scan`.")
    return found


class _Place(NamedTuple):
    """One of several scans, and what is added to its numbers."""

    scan: Scan
    first: int  # of its images in all
    group: int  # the first of its groups


@dataclass(frozen=True)
class ManyScans(Scan):
    """Several scans as one; open them with `unbraid.open_scan`."""

    spans: tuple[_Place, ...]

    @property
    def parts(self) -> tuple[Scan, ...]:
        """The scans, in the order of their images."""
        return tuple(place.scan for place in self.spans)

    @property
    def n_shards(self) -> int:
        """How many shards they have together."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.n_shards for part in self.parts))

    @cached_property
    def _grouped(self) -> bool:
        return any(_has_groups(part) for part in self.parts)

    def _find(self, shard: int) -> tuple[_Place, int]:
        k = bisect_right(self._ends, shard)
        return self.spans[k], shard - (self._ends[k - 1] if k else 0)

    def shard(self, number: int) -> Records:
        """Read one shard."""
        place, own = self._find(number)
        records = place.scan.shard(own)
        for name, tensor in self._counted(place, vars(records)).items():
            setattr(records, name, tensor)
        return records

    def some(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Read some tensors of one shard, and nothing else."""
        place, own = self._find(shard)
        alone = "group" in names and not place.scan.holds(own, "group")
        asked = [name for name in names if not (alone and name == "group")]
        asked += ["index"] if alone and "index" not in asked else []
        tensors = place.scan.some(own, asked)
        counted = tensors | self._counted(place, {**tensors, "group": tensors.get("group")})
        return {name: counted[name] for name in names}

    def holds(self, shard: int, name: str) -> bool:
        """Whether one shard has a tensor; groups are told for all, if for any."""
        if name == "group":
            return self._grouped
        place, own = self._find(shard)
        return place.scan.holds(own, name)

    def _counted(self, place: _Place, tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """A shard's images and groups, counted through all scans."""
        index, broken, group = (tensors.get(name) for name in ("index", "broken", "group"))
        counted = {}
        if index is not None:
            counted["index"] = index + place.first
        if broken is not None:
            counted["broken"] = broken + place.first
        group = index if group is None else group  # without groups each image is on its own
        if self._grouped and group is not None:
            counted["group"] = group + place.group
        return counted

    @cached_property
    def _spread(self) -> Tensor | None:
        """Each scan's, thinned evenly to its part of all images, so that it does not grow."""
        rows = []
        for part in self.parts:
            own = part._spread
            if own is None:
                return None
            n = -(-len(own) * part.manifest.n_images // self.manifest.n_images)
            rows.append(own[torch.arange(n) * len(own) // max(n, 1)])
        return torch.cat(rows)


def _join(scans: list[Scan]) -> Scan:
    """Read scans as one; RunError if they do not belong together."""
    for scan in scans[1:]:
        differing = set(scan.manifest.differences(scans[0].manifest)) - _FREE
        if differing:
            raise RunError(
                f"The scans in {scans[0].path} and {scan.path} cannot be read as one, with a "
                f"difference in {', '.join(sorted(differing))}; name scans of one network and "
                "layer that were made alike."
            )
    if scans[0].manifest.places_of:
        raise RunError(
            f"{scans[0].path} and {scans[1].path} are scans of places, which are not read as one; "
            "scan all images into one folder."
        )
    # By what they are of, not by their names or in the order given, as sums round by their order.
    scans = sorted(scans, key=lambda scan: scan.manifest.scan_id)
    _refuse_twice(scans)
    places: list[_Place] = []
    first = group = 0
    for scan in scans:
        places.append(_Place(scan, first, group))
        n_places = _n_places(scan)
        first += n_places
        group += _n_groups(scan) if _has_groups(scan) else n_places
    folder = Path(os.path.commonpath([os.path.realpath(scan.path) for scan in scans]))
    return ManyScans(folder, _joined(scans), scans[0].weight, scans[0].bias, tuple(places))


def _n_places(scan: Scan) -> int:
    """How many places a scan's images take; those that come first may be from anywhere."""
    columns = (column for own in scan.tensors("index", "broken") for column in own.values())
    return 1 + max(int(column.max()) for column in columns if len(column))


def _has_groups(scan: Scan) -> bool:
    return scan.holds(0, "group")


def _n_groups(scan: Scan) -> int:
    return 1 + max(int(column.max()) for column in scan.columns("group") if len(column))


def _joined(scans: Sequence[Scan]) -> Manifest:
    """What several scans were made of; `source` tells all of them."""
    own = [scan.manifest for scan in scans]
    first = own[0]
    data = hashlib.sha256("\n".join(one.scan_id for one in own).encode()).hexdigest()
    classes = {label for one in own for label in one.classes or ()}
    n_whole = sum(one.classes is None for one in own)
    is_part = 0 < n_whole < len(own) or any(one.indices for one in own)
    same = {k: v for k, v in first.source.items() if all(one.source.get(k) == v for one in own)}
    names = sorted({name for one in own for name in one.versions})
    told = [
        {"folder": str(scan.path), "data": one.data, "n_images": one.n_images, "source": one.source}
        for scan, one in zip(scans, own, strict=True)
    ]
    return replace(
        first,
        data=data,
        n_images=sum(one.n_images for one in own),
        class_names=_names_of(scans),
        classes=None if n_whole else tuple(sorted(classes)),
        indices=data if is_part else "",
        skip_broken=any(one.skip_broken for one in own),
        first="",
        n_first=0,
        threads=first.threads if len({one.threads for one in own}) == 1 else 0,
        source={**same, "scans": told},
        versions={n: ", ".join(sorted({one.versions.get(n, "?") for one in own})) for n in names},
    )


def _names_of(scans: Sequence[Scan]) -> tuple[str, ...]:
    """The names of classes by label; RunError where scans disagree on one."""
    return join_names(
        (scan.class_names for scan in scans),
        lambda number, label, before, name: RunError(
            f"The scans in {scans[0].path} and {scans[number].path} cannot be read as one, as "
            f"label {label} is {one_line(before)!r} in one and {one_line(name)!r} in the other; "
            "name scans whose labels mean the same."
        ),
    )


# --- no image twice -------------------------------------------------------------------------------


def _refuse_twice(scans: Sequence[Scan]) -> None:
    """Raise a RunError if two scans hold the same image, or one does not name its images."""
    hashes = [np.fromiter(map(hash, _ids(scan)), np.int64) for scan in scans]
    together = np.sort(np.concatenate(hashes))  # of 8 bytes each, where texts would take hundreds
    twice = set(together[1:][together[1:] == together[:-1]].tolist())
    first: dict[str, Scan] = {}
    for scan in scans if twice else ():
        for one in (one for one in _ids(scan) if hash(one) in twice):
            if first.setdefault(one, scan) is not scan:
                raise RunError(
                    f"The scans in {first[one].path} and {scan.path} both hold the image "
                    f"{one_line(one)!r}; name scans that share no image, or, if these are two "
                    "images, scan the folder above both."
                )


def _ids(scan: Scan) -> Iterator[str]:
    for shard in range(scan.n_shards):
        if not scan.holds(shard, "id_start"):
            raise RunError(
                f"The scan in {scan.path} does not name its images, so that nobody knows whether "
                "another scan holds them too; scan a data set that has ids."
            )
        own = scan.some(shard, ("id_start", "id_bytes"))
        yield from unpack_ids(own["id_start"], own["id_bytes"])
