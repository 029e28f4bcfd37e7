"""The table of a record's fields: what is made of it, and that damage to any field is noticed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import unbraid
from tiny_networks import WithBroken, build
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.scanning.records import COLUMNS, Scan, join_records, no_records, shard_path

CORRUPTORS = {
    "dropped": lambda _: None,
    "too short": lambda x: x[:-1] if len(x) else torch.zeros(1, dtype=x.dtype),
    "too long": lambda x: torch.cat([x, x[-1:] if len(x) else torch.zeros(1, dtype=x.dtype)]),
    "of another type": lambda x: x.to(torch.int16),
    "of more dimensions": lambda x: x[..., None],
    "negative": lambda x: -1 - x if x.dtype.is_signed else x[:1],
}
SOUND = {("dropped", "group"), ("negative", "pooled"), ("negative", "input_map")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Scan:
    """A scan whose records have every field."""
    images = WithBroken(9)
    images.groups, images.ids = [n // 2 for n in range(9)], [f"é/{n}" for n in range(9)]
    folder = tmp_path_factory.mktemp("whole") / "scan"
    options = {"positions": True, "skip_broken": True}
    return unbraid.scan(build("groups"), "layer", images, folder, **options)


def damaged(scan: Scan, folder: Path, **columns: Tensor | None) -> Scan:
    """A copy of a scan with other tensors, under checksums that fit."""
    shutil.copytree(scan.path, folder)
    tensors, about = read_tensors(shard_path(scan.path, 0))
    changed = {**tensors, **columns}
    about.pop("crc32", None)
    write_tensors(shard_path(folder, 0), {k: v for k, v in changed.items() if v is not None}, about)
    return unbraid.open_scan(folder)


@pytest.mark.parametrize(
    ("how", "name"), [(h, n) for h in CORRUPTORS for n in COLUMNS if (h, n) not in SOUND]
)
def test_shards_of_a_scan_with_a_damaged_field_are_refused(how, name, whole, tmp_path):
    (records,) = whole.shards()
    change = CORRUPTORS[how](getattr(records, name))
    with pytest.raises(RunError, match=r"shard-000000\.safetensors (holds|is not a shard)"):
        list(damaged(whole, tmp_path / "scan", **{name: change}).shards())


@pytest.mark.parametrize("dropped", [(), ("group",), ("id_start", "id_bytes")])
def test_shards_of_a_scan_that_is_whole_are_read(dropped, whole, tmp_path):
    (records,) = damaged(whole, tmp_path / "scan", **dict.fromkeys(dropped)).shards()
    assert (len(records), records.broken.tolist()) == (8, [3])


def test_join_records_of_parts_gives_the_whole(whole):
    (records,) = whole.shards()
    empty = no_records(whole.layer, positions=True)
    joined = join_records([empty, records, records, empty])
    for name, column in COLUMNS.items():
        own, twice = getattr(records, name), getattr(joined, name)
        if column.starts:
            own, twice = own.diff(), twice.diff()
        assert torch.equal(twice, torch.cat([own] * 2))
    assert joined.ids == records.ids * 2
