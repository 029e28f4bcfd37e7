"""The table of a record's fields: what is made of it, and that damage to any field is noticed."""

import shutil

import pytest
import torch

import unbraid
from tiny_networks import WithBroken, build
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.scanning.records import COLUMNS, join_records, no_records, shard_path

CORRUPTORS = {
    "dropped": lambda _: None,
    "too short": lambda x: x[:-1] if len(x) else torch.zeros(1, dtype=x.dtype),
    "too long": lambda x: torch.cat([x, x[-1:] if len(x) else torch.zeros(1, dtype=x.dtype)]),
    "of another type": lambda x: x.to(torch.int16),
    "of more dimensions": lambda x: x[..., None],
    "negative": lambda x: -1 - x if x.dtype.is_signed else x[:1],
}
SOUND = {("dropped", "group"), ("negative", "pooled"), ("negative", "input_map")}
DAMAGES = [(how, name) for how in CORRUPTORS for name in COLUMNS if (how, name) not in SOUND]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    images = WithBroken(9)
    images.groups, images.ids = [n // 2 for n in range(9)], [f"é/{n}" for n in range(9)]
    options = {"positions": True, "skip_broken": True}
    return unbraid.scan(build("groups"), "layer", images, tmp_path_factory.mktemp("a"), **options)


@pytest.fixture
def shards_with(whole, tmp_path):
    """Read the shards of the scan with other tensors, under checksums that fit."""

    def read(columns):
        folder = shutil.copytree(whole.path, tmp_path / "scan")
        tensors, about = read_tensors(shard_path(whole.path, 0))
        changed = {k: v for k, v in {**tensors, **columns}.items() if v is not None}
        about.pop("crc32", None)
        write_tensors(shard_path(folder, 0), changed, about)
        return list(unbraid.open_scan(folder).shards())

    return read


@pytest.mark.parametrize(("how", "name"), DAMAGES)
def test_shards_of_a_scan_with_a_damaged_field_are_refused(how, name, whole, shards_with):
    (records,) = whole.shards()
    with pytest.raises(RunError, match=r"shard-000000\.safetensors (holds|is not a shard)"):
        shards_with({name: CORRUPTORS[how](getattr(records, name))})


@pytest.mark.parametrize("dropped", [(), ("group",), ("id_start", "id_bytes")])
def test_shards_of_a_scan_that_is_whole_are_read(dropped, shards_with):
    (records,) = shards_with(dict.fromkeys(dropped))
    assert (len(records), records.broken.tolist()) == (8, [3])


def test_join_records_of_parts_gives_the_whole(whole):
    (records,) = whole.shards()
    empty = no_records(whole.layer, positions=True)
    joined = join_records([empty, records, records, empty])
    for name, column in COLUMNS.items():
        own, twice = getattr(records, name), getattr(joined, name)
        if column.starts:
            own, twice = own.diff(), twice.diff()
        assert torch.equal(twice, torch.cat([own, own])), name
    assert joined.ids == records.ids * 2
