"""Tar files: members and labels, every damage told, and nothing read of a file that was changed."""

import errno
import functools
import gzip
import http.server
import itertools
import os
import random
import shutil
import struct
import tarfile
import threading
from unittest.mock import Mock

import pytest
from PIL import Image
from sources import MEMBERS, PATHS, keys, scanned, to_tensor, write_shards, write_tar

from unbraid.base.errors import DataError, OutOfReach, UsageError
from unbraid.images.identity import ids_of
from unbraid.images.open import open_images
from unbraid.images.tar import expand, list_shards, members, read_content, stamp_of

IMAGE = ("a.png", b"x")


def samples(n):
    images = [(f"{k:03d}.png", bytes([k]) * (300 * k + 1)) for k in range(n)]
    return [one for image in images for one in (image, (f"{image[0][:3]}.cls", b"1"))]


def header(name, size, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.type = kind
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\xff" * 4 if size < 0 else b"\x80\0\0\0") + struct.pack(">q", size)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def refuse(path, content, match="no sound, uncompressed tar file"):
    path.write_bytes(content)
    with pytest.raises(DataError, match=match) as told:
        list(members(str(path)))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_they_are_said_to(kind, tmp_path):
    names = ["a.png", "./b.png", "../c.png", "/d.png", "x/é.png", "y/" + "z" * 90 + ".png"]
    names += [] if kind == tarfile.USTAR_FORMAT else ["folder/" * 30 + "name.png", "n" * 300]
    path = write_tar(tmp_path / "a.tar", *((name, name.encode() * 7) for name in names), kind=kind)
    found = list(members(str(path)))
    assert [member.name for member in found] == [name.removeprefix("./") for name in names]
    for name, member in zip(names, found, strict=True):
        place = (member.offset_data, member.size)
        assert read_content(str(path), stamp_of(path.stat()), *place) == name.encode() * 7


def test_members_of_a_file_that_is_cut_off_anywhere_or_goes_on_in_zeros_are_refused(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples(6), kind=tarfile.PAX_FORMAT)
    whole = path.read_bytes()
    end = max(k for k in range(0, len(whole), 512) if any(whole[k : k + 512])) + 512
    draw = random.Random(0)
    for cut in (*range(0, end + 1024, 512), *(draw.randrange(end + 512) for _ in range(50))):
        refuse(path, whole[:cut])
    for record in (512, 10_240, 1 << 20):  # to which programs pad the blocks that end it
        padded = whole[:end] + bytes(1024)
        padded += bytes(-len(padded) % record)
        path.write_bytes(padded)
        assert len(list(members(str(path)))) == 12
        refuse(path, padded + bytes(4 * max(record, 10_240)), "bytes are zeros")


def test_members_behind_a_damaged_header_or_zeros_are_not_lost_without_a_word(tmp_path):
    path = write_tar(tmp_path / "a.tar", *samples(24))
    whole = path.read_bytes()
    sizes = (-512, -(2**62), 2**20, 2**62)
    for size, kind in itertools.product(sizes, (b"0", b"L", b"x")):  # headers that lie
        refuse(path, header("a.png", size, kind) + whole)
    for said in (b"0 path=a\n", b"11 size=-9\n", b"5010 size=%b\n" % (b"9" * 4999), bytes(2 << 20)):
        refuse(path, header("x", len(said), b"x") + said + bytes(-len(said) % 512) + whole)
    path.write_bytes(whole)
    starts = [member.offset_data - 512 for member in members(str(path))]
    draw = random.Random(0)
    for start in starts:
        damaged = bytearray(whole)
        damaged[start + draw.randrange(148)] ^= 1 << draw.randrange(8)
        refuse(path, damaged)
        for n_zeros in (512, 1024, 4096):
            lost = whole[:start] + bytes(n_zeros) + whole[start + n_zeros :]
            if start and any(lost[start:]):
                refuse(path, lost)
    middle = next(start for start in starts if start > len(whole) // 2)
    zeros = "bytes are zeros, where members may have been"
    refuse(path, whole[:middle] + bytes(len(whole) - middle), zeros)
    refuse(path, whole + whole, "neither a member nor an end at byte")
    refuse(path, gzip.compress(whole))


def test_list_shards_what_is_wrong_is_told(tmp_path):
    for files, match in (
        ([IMAGE, ("a.jpg", b"x")], r"a\.jpg in .* is a second 'image' of one image"),
        ([IMAGE, ("a.cls", b"1"), ("b.cls", b"1")], r"a label but no image for b;"),
        ([IMAGE, ("a.cls", b"1"), ("b.png", b"")], r"shard\.tar/b has no label"),
        ([IMAGE, ("a.cls", b"-1")], r"^a in .* has the label"),
        ([IMAGE, ("a.json", b'{"label": true}')], r"^a in .* has the label"),
        ([IMAGE, ("a.cls", b"\xff")], r"The label of a in .* cannot be read"),
        ([IMAGE, ("a.cls", b"9" * 5000)], "a label of 5000 characters"),
        ([IMAGE, ("a.json", b"[" * 99999)], r"The label of a in .* cannot be read"),
        ([IMAGE, ("a.json", b'{"label": %d}' % 10**30)], "a class of number"),
        ([IMAGE, ("a.cls", bytes(2 << 20))], "more than 1048576; remove it"),
        ([IMAGE, ("2.HEIC", b"x")], r"2\.HEIC in .* is a picture of a kind that is not read"),
    ):
        path = write_tar(tmp_path / "shard.tar", *files)
        with pytest.raises(DataError, match=match) as error:
            open_images(path)
        assert "\n" not in str(error.value)


def test_list_shards_label_may_stand_before_its_image_or_in_json_beside_a_number(tmp_path):
    files = [("b.cls", b"2"), ("a.cls", b" 10\n"), ("a.png", b"x"), ("b.png", b"xy")]
    listing = list_shards(str(write_tar(tmp_path / "s.tar", *files, ("a.json", b"nonsense"))))
    assert listing.ids == ["s.tar/b", "s.tar/a"]
    assert (listing.classes, listing.class_of, listing.sizes) == (["2", "10"], [0, 1], [2, 1])
    for name in "bc":
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "s.tar", tmp_path / name)
    with pytest.raises(DataError, match=r"two shards called s\.tar"):
        list_shards(f"{tmp_path}/*/s.tar")


def test_list_shards_names_that_climb_and_links_touch_nothing(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    names = ["../climbs.png", "/tmp/absolute.png", "a/../../b.png", "..png", ".png", "no-ending"]
    path = write_tar(tmp_path / "shard.tar", *((name, b"x") for name in names))
    listing = list_shards(str(path))
    climbing = ("../climbs", "/tmp/absolute", "a/../../b")
    assert (listing.ids, listing.sizes) == ([f"shard.tar/{key}" for key in climbing], [1, 1, 1])
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["inside", "shard.tar"]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S"):
        path.write_bytes(header("a.png", 0, kind) + bytes(1024))
        with pytest.raises(DataError, match=r"a\.png in .* is no regular file"):
            list_shards(str(path))


def test_list_shards_image_that_is_absurdly_large_is_told(tmp_path):
    path, size = tmp_path / "a.tar", 3 << 30
    with path.open("wb") as file:  # with a hole, so that it takes no room
        file.write(header("a.png", size))
        file.truncate(512 + size)
        file.seek(0, os.SEEK_END)
        file.write(bytes(1024))
    with pytest.raises(DataError, match=rf"a\.png in .* has {size} bytes"):
        list_shards(str(path))


def write_pictures(path, order):
    """Pictures of their number's colour; all are of one size, so each may lie where another did."""
    return write_tar(path, *((f"{k}.ppm", b"P6 6 7 255\n" + bytes([k] * 126)) for k in order))


def assert_own_pictures(images):
    for k, one in enumerate(images.ids):
        colour = int(one.partition("/")[2])
        assert images.picture(k).getpixel((0, 0)) == (colour,) * 3, one


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("change", ["rewritten in place", "replaced", "cut off"])
def test_members_of_a_shard_that_was_changed_are_not_read(change, workers, tmp_path):
    path = write_pictures(tmp_path / "a.tar", [0, 1, 2, 3])
    other = write_pictures(tmp_path / "b.tar", [3, 2, 1, 0])
    images, before = open_images(path, to_tensor), path.stat()
    assert_own_pictures(images)
    if change == "replaced":  # by a file of the same size and time
        os.utime(other, ns=(0, before.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(other.read_bytes()[: 1024 if change == "cut off" else None])
        os.utime(path, ns=(0, before.st_mtime_ns + 1))
    with pytest.raises(OutOfReach, match=r"^\S*a\.tar was changed since it was listed; st"):
        images[1]
    options = {"labels": "predicted", "skip_broken": True, "workers": workers}
    with pytest.raises(DataError, match=r"a\.tar was changed since it was listed; start again\.$"):
        scanned(images, tmp_path / "scan", **options)
    assert not list((tmp_path / "scan").glob("shard-*"))
    if change != "cut off":
        assert_own_pictures(open_images(path))
        images._read.stamps[0] = stamp_of(path.stat())  # as if it was taken for the old one
        with pytest.raises(AssertionError, match=r"a\.tar/0"):
            assert_own_pictures(images)


def test_list_shards_that_change_or_fail_while_they_are_read_are_told(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", ("a.png", b"old"), ("a.cls", b"1"))
    member = next(members(str(path)))
    place = (str(path), stamp_of(path.stat()), member.offset_data, member.size)
    assert read_content(*place) == b"old"
    with pytest.raises(OSError, match="cut off"):
        read_content(*place[:3], path.stat().st_size)
    look = os.fstat

    def changed(handle):
        os.utime(path, ns=(0, 0))
        return look(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", changed)
        for read in (lambda: read_content(*place), lambda: list_shards(str(path))):
            os.utime(path, ns=place[1][2:] * 2)
            with pytest.raises(OutOfReach, match="was changed since it was listed"):
                read()

    fail = Mock(side_effect=OSError(errno.EIO, "Input/output error"))
    monkeypatch.setattr("unbraid.images.tar._Headers.read", fail)
    with pytest.raises(OutOfReach, match=r"a\.tar cannot be reached \(Input/output error\); mend"):
        list_shards(str(path))


def test_expand_writes_ranges_out():
    assert expand("a{8..10}b{0..1}") == ["a8b0", "a8b1", "a9b0", "a9b1", "a10b0", "a10b1"]
    assert expand("{x}.tar") == ["{x}.tar"]
    for many in ("{0..99999999999}", "{0..999999}-{0..999999}.tar", "{1..1000}{1..1000}{1..2}"):
        with pytest.raises(UsageError, match="more than"):
            expand(many)


@pytest.mark.usefixtures("_caches")
def test_fetch_shards_behind_a_url_once(folder, tmp_path):
    shards = write_shards(folder, MEMBERS, 3, 5)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        url = address + "/train-{000..001}.tar"
        images = open_images(url, to_tensor)
        assert ids_of(images) == keys(3, 5)
        for k, path in enumerate(PATHS):
            assert images.picture(k).tobytes() == Image.open(folder / path).tobytes()
        shutil.rmtree(shards)  # from now on, nothing can be fetched
        assert ids_of(open_images(url)) == ids_of(images)
        with pytest.raises(DataError, match=r"train-009\.tar cannot be fetched"):
            open_images(address + "/train-009.tar")
        server.shutdown()
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.t*"))
    assert kept == ["train-000.tar", "train-001.tar"]
