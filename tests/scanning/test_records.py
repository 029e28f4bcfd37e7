"""The table of a record's fields: what is made of it, and that damage to any field is noticed."""

import shutil

import pytest
import torch

import unbraid
from tiny_networks import WithBroken, build
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.scanning.fields import COLUMNS, OF_PLACES, choose_records, join_records, no_records
from unbraid.scanning.records import shard_path

CORRUPTORS = {
    "dropped": lambda _: None,
    "too short": lambda x: x[:-1] if len(x) else torch.zeros(1, dtype=x.dtype),
    "too long": lambda x: torch.cat([x, x[-1:] if len(x) else torch.zeros(1, dtype=x.dtype)]),
    "of another type": lambda x: x.to(torch.int16),
    "of more dimensions": lambda x: x[..., None],
    "negative": lambda x: -1 - x if x.dtype.is_signed else x[:1],
}
SOUND = {("dropped", "group"), *(("negative", n) for n in ("pooled", "input_map", "spread"))}
SPREAD = ("spread_start", "spread")
# With positions, without, and of places.
ABSENT = {True: (*SPREAD, *OF_PLACES), False: ("input_map", *OF_PLACES), "places": ("input_map",)}
DAMAGES = [(how, name) for how in CORRUPTORS for name in COLUMNS if (how, name) not in SOUND]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """By whether they keep positions, and one of places."""
    images = WithBroken(9)
    images.groups, images.ids = [n // 2 for n in range(9)], [f"é/{n}" for n in range(9)]
    made = {
        positions: unbraid.scan(
            *(build("groups"), "layer", images, tmp_path_factory.mktemp("a")),
            **{"positions": positions, "skip_broken": True, "places": 3 * (not positions)},
        )
        for positions in (True, False)
    }
    return made | {"places": made[False].places}


@pytest.fixture
def shards_with(scans, tmp_path):
    """Read the shards of a scan with other tensors, under checksums that fit."""

    def read(columns, positions=True):
        whole = scans[positions].path
        folder = shutil.copytree(whole, tmp_path / "scan", dirs_exist_ok=True)
        tensors, about = read_tensors(shard_path(whole, 0))
        changed = {k: v for k, v in {**tensors, **columns}.items() if v is not None}
        about.pop("crc32", None)
        write_tensors(shard_path(folder, 0), changed, about)
        return list(unbraid.open_scan(folder).shards())

    return read


@pytest.mark.parametrize(("how", "name"), DAMAGES)
def test_shards_of_a_scan_with_a_damaged_field_are_refused(how, name, scans, shards_with):
    positions = "places" if name in OF_PLACES else name not in SPREAD
    (records,) = scans[positions].shards()
    with pytest.raises(RunError, match=r"shard-000000\.safetensors (holds|is not a shard)"):
        shards_with({name: CORRUPTORS[how](getattr(records, name))}, positions)


@pytest.mark.parametrize("dropped", [(), ("group",), ("id_start", "id_bytes")])
def test_shards_of_a_scan_that_is_whole_are_read(dropped, shards_with):
    (records,) = shards_with(dict.fromkeys(dropped))
    assert (len(records), records.broken.tolist()) == (8, [3])


@pytest.mark.parametrize("positions", [True, False])
def test_join_records_of_parts_gives_the_whole(positions, scans):
    (records,) = scans[positions].shards()
    empty = no_records(scans[positions].layer, positions)
    joined = join_records([empty, records, records, empty])
    for name, column in COLUMNS.items():
        own, twice = getattr(records, name), getattr(joined, name)
        if name in ABSENT[positions]:
            assert (own, twice) == (None, None)
            continue
        if column.starts:
            own, twice = own.diff(), twice.diff()
        assert torch.equal(twice, torch.cat([own, own])), name
    assert joined.ids == records.ids * 2


@pytest.mark.parametrize("positions", [True, False])
def test_choose_records_and_the_others_join_to_the_whole(positions, scans):
    (records,) = scans[positions].shards()
    for n in range(len(records) + 1):
        first = torch.arange(len(records)) < n
        parts = [choose_records(records, chosen) for chosen in (first, ~first)]
        assert [len(part) for part in parts] == [n, len(records) - n]
        assert parts[0].ids == records.ids[:n]
        joined = join_records(parts)
        joined.broken = records.broken  # which choosing leaves out
        for name in COLUMNS:
            own, again = getattr(records, name), getattr(joined, name)
            assert (own is None and again is None) or torch.equal(own, again), name
