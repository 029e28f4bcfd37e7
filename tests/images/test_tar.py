"""Tar files: members as Python's library finds them, and every damage told."""

from __future__ import annotations

import errno
import gzip
import io
import os
import random
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import unbraid
from tiny_networks import build
from unbraid.base.errors import DataError, OutOfReach
from unbraid.images.open import open_images
from unbraid.images.tar import Members, list_shards, members, read_content, stamp_of

LONG = "folder/" * 30 + "name.png"
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def write(path: Path, *files: tuple[str, bytes], kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(n: int) -> list[tuple[str, bytes]]:
    return [
        (f"{k:03d}.{ending}", content)
        for k in range(n)
        for ending, content in (("png", bytes([k]) * (300 * k + 1)), ("cls", b"%d" % (k % 3)))
    ]


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """One block, with a size of any kind."""
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (
        b"\xff" * 4 + struct.pack(">q", size)
        if size < 0
        else (b"\x80\0\0\0" + struct.pack(">q", size))
    )
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


# --- members --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_members_are_those_that_the_library_finds(kind, tmp_path):
    names = ["a.png", "./b.png", "../c.png", "/d.png", "x/é.png", "y/" + "z" * 90 + ".png"]
    names += [] if kind == tarfile.USTAR_FORMAT else [LONG, "n" * 300]
    path = write(tmp_path / "a.tar", *((name, name.encode() * 7) for name in names), kind=kind)
    with tarfile.open(path, "a", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "t" * (90 if kind == FORMATS[0] else 300)
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [
            (m.name.removeprefix("./"), m.isreg(), m.isdir(), m.offset_data, m.size) for m in tar
        ]
    found = [(m.name, m.isreg(), m.isdir(), m.offset_data, m.size) for m in members(str(path))]
    assert found == expected
    for member in members(str(path)):
        if member.isreg():
            content = path.read_bytes()[member.offset_data : member.offset_data + member.size]
            assert content.removeprefix(b"./").startswith(member.name.encode())


def test_a_tar_file_that_is_cut_off_anywhere_is_told(tmp_path):
    whole = write(tmp_path / "a.tar", *samples(6), kind=tarfile.PAX_FORMAT).read_bytes()
    end = max(k for k in range(0, len(whole), 512) if any(whole[k : k + 512])) + 512
    draw = random.Random(0)
    cuts = [*range(0, end + 1024, 512), *(draw.randrange(end + 512) for _ in range(50))]
    for cut in cuts:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar is no sound, uncompressed tar file \("):
            list(members(str(tmp_path / "cut.tar")))
    (tmp_path / "cut.tar").write_bytes(whole[: end + 1024])  # with the blocks that end it
    assert len(list(members(str(tmp_path / "cut.tar")))) == 12


def test_a_damaged_header_is_no_end(tmp_path):
    path = write(tmp_path / "a.tar", *samples(6))
    whole = path.read_bytes()
    starts = [member.offset_data - 512 for member in members(str(path))]
    draw = random.Random(0)
    for start in starts:
        damaged = bytearray(whole)
        damaged[start + draw.randrange(148)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="no sound"):
            list(members(str(path)))


def test_zeros_in_place_of_members_are_no_end(tmp_path):
    path = write(tmp_path / "a.tar", *samples(60))
    whole = path.read_bytes()
    starts = [member.offset_data - 512 for member in members(str(path))]
    for start in starts[1:]:
        for n_zeros in (512, 1024, 4096):
            lost = whole[:start] + bytes(n_zeros) + whole[start + n_zeros :]
            path.write_bytes(lost)
            if any(lost[start:]):
                with pytest.raises(DataError, match="no sound"):
                    list(members(str(path)))
    middle = next(start for start in starts if start > len(whole) // 2)
    path.write_bytes(whole[:middle] + bytes(len(whole) - middle))
    with pytest.raises(DataError, match="bytes are zeros, where members may have been"):
        list(members(str(path)))
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="neither a member nor an end at byte"):
        list(members(str(path)))


@pytest.mark.parametrize("record", [512, 1024, 10_240, 32_768, 1 << 20])
def test_a_tar_file_may_be_padded_to_records_of_any_usual_size(record, tmp_path):
    path = write(tmp_path / "a.tar", *samples(4))
    last = list(members(str(path)))[-1]
    content = path.read_bytes()[: last.offset_data + 512] + bytes(1024)
    path.write_bytes(content + bytes(-len(content) % record))
    assert len(list(members(str(path)))) == 8
    path.write_bytes(content + bytes(-len(content) % record + 4 * max(record, 10_240)))
    with pytest.raises(DataError, match="bytes are zeros"):
        list(members(str(path)))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [-512, -1024, -(2**62), 2**40, 2**62])
def test_sizes_that_cannot_be_are_told(size, kind, tmp_path):
    content = write(tmp_path / "a.tar", *samples(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(header("a.png", size, kind) + content)
    with pytest.raises(DataError, match="no sound"):
        list(members(str(tmp_path / "b.tar")))


@pytest.mark.parametrize(
    "said",
    [
        b"0 path=a\n",
        b"12 size=1e5\n",
        b"17 size=99999999\n",
        b"11 size=-9\n",
        b"5010 size=" + b"9" * 4999 + b"\n",
    ],
)
def test_headers_that_lie_are_told(said, tmp_path):
    padded = said + bytes(-len(said) % 512)
    rest = write(tmp_path / "a.tar", *samples(2)).read_bytes()
    (tmp_path / "b.tar").write_bytes(header("x", len(said), tarfile.XHDTYPE) + padded + rest)
    with pytest.raises(DataError, match="no sound"):
        list(members(str(tmp_path / "b.tar")))


def test_a_header_that_is_too_long_is_told(tmp_path):
    text = bytes(2 << 20)
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        (tmp_path / "a.tar").write_bytes(header("x", len(text), kind) + text + bytes(1024))
        with pytest.raises(DataError, match="a header is too long"):
            list(members(str(tmp_path / "a.tar")))


def test_a_compressed_or_missing_tar_file_is_told(tmp_path):
    content = write(tmp_path / "a.tar", *samples(2)).read_bytes()
    (tmp_path / "a.tar").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match="no sound, uncompressed"):
        list(members(str(tmp_path / "a.tar")))
    with pytest.raises(DataError, match="No such file"):
        list(members(str(tmp_path / "b.tar")))


# --- shards ---------------------------------------------------------------------------------------


def told(tmp_path: Path, match: str, *files: tuple[str, bytes]) -> None:
    path = write(tmp_path / "shard.tar", *files)
    with pytest.raises(DataError, match=match) as error:
        list_shards(str(path))
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_a_shard_is_told(tmp_path):
    image = ("a.png", b"x")
    told(tmp_path, "two files 'image' for a;", image, ("a.jpg", b"x"))
    told(tmp_path, "two files 'cls' for a;", image, ("a.cls", b"1"), ("a.cls", b"1"))
    told(tmp_path, r"a label but no image for b \(", image, ("a.cls", b"1"), ("b.cls", b"1"))
    told(tmp_path, r"shard\.tar/b has no label", image, ("a.cls", b"1"), ("b.png", b""))
    for label in (b"", b"ant", b"-1", b"1.0", b"9" * 5000, b"\xff"):
        told(tmp_path, r"The label of a in .* cannot be read", image, ("a.cls", label))
    for label in (b"", b'{"label": 1.5}', b'{"label": true}', b'{"label": [1]}', b"[" * 99999):
        told(tmp_path, r"The label of a in .* cannot be read", image, ("a.json", label))
    told(tmp_path, "a class of number 999999999", image, ("a.cls", b"9" * 9))
    told(tmp_path, "a class of number", image, ("a.json", b'{"label": %d}' % 10**30))
    told(
        tmp_path, "a label of 300 characters", image, ("a.json", b'{"label": "%s"}' % (b"n" * 300))
    )
    told(tmp_path, "more than 1048576; remove it", image, ("a.cls", bytes(2 << 20)))


def test_an_image_that_is_no_regular_file_is_told(tmp_path):
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"):
        blocks = header("a.png", 0, kind) + bytes(1024)
        (tmp_path / "a.tar").write_bytes(blocks)
        with pytest.raises(DataError, match=r"a\.png in .* is no regular file"):
            list_shards(str(tmp_path / "a.tar"))


def test_an_absurdly_large_image_is_told_before_it_is_read(tmp_path):
    size = 3 << 30
    with (tmp_path / "a.tar").open("wb") as file:  # with a hole, so that it takes no room
        file.write(header("a.png", size))
        file.truncate(512 + size)
        file.seek(0, 2)
        file.write(bytes(1024))
    with pytest.raises(DataError, match=f"a.png in .* has {size} bytes"):
        list_shards(str(tmp_path / "a.tar"))


def test_names_that_climb_touch_nothing(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    names = ["../climbs.png", "/tmp/absolute.png", "a/../../b.png", "..png", ".png", "no-ending"]
    path = write(tmp_path / "shard.tar", *((name, b"x") for name in names))
    listing = list_shards(str(path))
    assert listing.ids == [
        f"shard.tar/{key}" for key in ("../climbs", "/tmp/absolute", "a/../../b")
    ]
    assert listing.sizes == [1, 1, 1]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inside", "shard.tar"]


def test_a_label_may_stand_before_its_image_or_in_json_beside_a_number(tmp_path):
    files: list[Any] = [("b.cls", b"2"), ("a.cls", b" 10\n"), ("a.png", b"x"), ("b.png", b"xy")]
    listing = list_shards(str(write(tmp_path / "s.tar", *files, ("a.json", b"nonsense"))))
    assert listing.ids == ["s.tar/b", "s.tar/a"]
    assert listing.classes == ["2", "10"]
    assert listing.class_of == [0, 1]
    assert listing.sizes == [2, 1]


def test_shards_of_one_name_are_told(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "s.tar", *samples(1))
    with pytest.raises(DataError, match=r"two shards called s\.tar"):
        list_shards(f"{tmp_path}/*/s.tar")


# --- changed since it was listed ------------------------------------------------------------------


def bitmap(k: int) -> bytes:
    """One colour; all are of one size, so that one may lie where another one did."""
    file = io.BytesIO()
    Image.new("RGB", (6, 7), (k, k, k)).save(file, "BMP")
    return file.getvalue()


def write_pictures(path: Path, order: list[int]) -> Path:
    """Shards whose pictures have their number for a colour, in another order in each."""
    return write(path, *((f"{k}.bmp", bitmap(k)) for k in order))


def to_tensor(picture: Image.Image) -> Any:
    return torch.from_numpy(np.array(picture)).movedim(-1, 0).double()


def assert_own_pictures(images: Any) -> None:
    """Each id has the picture of that colour."""
    for k, one in enumerate(images.ids):
        colour = int(one.partition("/")[2])
        assert images.picture(k).getpixel((0, 0)) == (colour,) * 3, one


def rewritten(path: Path) -> None:
    """In place, of the same size."""
    before = path.stat()
    path.write_bytes(write_pictures(path.with_suffix(".new"), [3, 2, 1, 0]).read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size


def replaced(path: Path) -> None:
    """By another file of the same size and time."""
    before = path.stat()
    new = write_pictures(path.with_suffix(".new"), [3, 2, 1, 0])
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1024])


def grown(path: Path) -> None:
    before = path.stat()
    with path.open("ab") as file:
        file.write(bytes(512))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = (rewritten, replaced, cut_off, grown)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_was_changed_since_it_was_listed_is_not_read(change, workers, tmp_path):
    path = write_pictures(tmp_path / "a.tar", [0, 1, 2, 3])
    images = open_images(path, to_tensor)
    assert_own_pictures(images)
    change(path)
    with pytest.raises(
        OutOfReach, match=r"^\S*a\.tar was changed since it was listed; start again"
    ):
        images[1]
    options = {"labels": "predicted", "skip_broken": True, "workers": workers}
    with pytest.raises(DataError, match=r"a\.tar was changed since it was listed; start again\.$"):
        unbraid.scan(build("3x3"), "layer", images, tmp_path / "scan", **options)
    assert not list((tmp_path / "scan").glob("shard-*"))
    if change in (rewritten, replaced):
        assert_own_pictures(open_images(path))


@pytest.mark.parametrize("change", [rewritten, replaced])
def test_what_a_changed_shard_would_give_if_it_was_taken_for_the_old_one_is_noticed(
    change, tmp_path
):
    path = write_pictures(tmp_path / "a.tar", [0, 1, 2, 3])
    images = open_images(path)
    change(path)
    reader: Members = images._read
    reader.stamps[0] = stamp_of(path.stat())
    with pytest.raises(AssertionError, match=r"a\.tar/0"):
        assert_own_pictures(images)


def test_a_shard_that_is_changed_while_it_is_listed_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", *samples(3))

    def listed(name: str) -> Any:
        yield from members(name)
        os.utime(name, ns=(0, 0))

    list_shards(str(path))
    monkeypatch.setattr("unbraid.images.tar.members", listed)
    with pytest.raises(OutOfReach, match="was changed since it was listed"):
        list_shards(str(path))


def test_a_shard_that_is_changed_while_it_is_read_is_told(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", ("a.png", b"old"))
    (member,) = members(str(path))
    place = (str(path), stamp_of(path.stat()), member.offset_data, member.size)
    assert read_content(*place) == b"old"
    look = os.fstat

    def changed(handle: int) -> os.stat_result:
        os.utime(path, ns=(0, 0))
        return look(handle)

    monkeypatch.setattr(os, "fstat", changed)
    with pytest.raises(OutOfReach, match="was changed since it was listed"):
        read_content(*place)


def test_a_member_that_ends_before_its_end_is_told(tmp_path):
    path = write(tmp_path / "a.tar", ("a.png", b"old"))
    size = path.stat().st_size
    with pytest.raises(OSError, match="cut off"):
        read_content(str(path), stamp_of(path.stat()), 512, size)


def test_a_tar_file_that_the_system_fails_to_give_is_not_called_damaged(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tar", *samples(3))

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("unbraid.images.tar.open", fail, raising=False)
    with pytest.raises(OutOfReach, match=r"a\.tar cannot be reached \(Input/output error\); mend"):
        list_shards(str(path))
