"""A list of images in a file: the same as in memory, damage told, nothing copied, made by one."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sources import MEMBERS, as_csv, as_odd_csv, as_tar, rows, scanned, to_tensor, write

import unbraid
from checks import assert_bit_equal
from tiny_networks import build
from unbraid.base.errors import DataError, OutOfReach, RunError, UnbraidError
from unbraid.base.files import read_tensors, temporary_for
from unbraid.images import kept, mapped
from unbraid.images.dataset import groups_of, labels_of
from unbraid.images.identity import fingerprint, ids_of
from unbraid.images.kept import Part, read_list, write_list
from unbraid.images.mapped import BLOCK, HEAD, Mapped, as_array, distinct
from unbraid.images.open import images_of_run, labelled
from unbraid.images.which import name_of
from unbraid.networks.models import LoadedModel
from unbraid.running.check import check


def unclassed(root, members):
    folder = root / "flat"
    for k, (path, *_) in enumerate(rows(members)):
        folder.mkdir(exist_ok=True)
        shutil.copy(root / path, folder / f"é {k}.png")
    return folder


def as_folder(root, members):
    return write(root / "again", members)


SOURCES = {
    "folder": as_folder,
    "no classes": unclassed,
    "table": as_csv,
    "odd table": as_odd_csv,
    "tar": as_tar,
}


def loaded():
    """A network of three outputs without names, in the preprocessing of these tests."""
    return LoadedModel(build("3x3"), to_tensor, (), {})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "out" / "images.safetensors"


@pytest.fixture
def listed(folder, file):
    """A folder's images by way of a file."""
    return unbraid.open_images(folder, to_tensor, listed=file)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_list_in_a_file_is_the_list(kind, folder, file):
    source = SOURCES[kind](folder, MEMBERS)
    plain = unbraid.open_images(source, to_tensor)
    ours = unbraid.open_images(source, to_tensor, listed=file)
    assert len(ours) == len(plain) == 8
    assert ours.ids == ids_of(plain)
    assert ours.targets == labels_of(plain)
    assert labels_of(ours) is ours.targets
    assert distinct(ours.targets) == set(plain.targets)
    assert as_array(ours.targets).tolist() == as_array(plain.targets).tolist() == plain.targets
    assert labelled(ours) == labelled(plain) == (kind != "no classes")
    assert (ours.classes, ours.reading) == (plain.classes, plain.reading)
    theirs = groups_of(plain)
    assert (groups_of(ours) == theirs) if theirs is not None else (groups_of(ours) is None)
    assert [name_of(ours, k) for k in range(8)] == [name_of(plain, k) for k in range(8)]
    expected = fingerprint(plain, plain.targets)
    assert fingerprint(ours, ours.targets) == expected  # told with the list
    assert fingerprint(ours, list(ours.targets)) == expected  # found again
    for k in range(8):
        assert_bit_equal(ours[k][0], plain[k][0])
        assert ours[k][1] == plain[k][1]


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "odd table"])
def test_parts_of_a_source_are_in_files_what_they_are_in_memory(kind, tmp_path, file, recwarn):
    members = {"ant": 30, "bee": 20, "cow": 2, "doe": 1}
    source = SOURCES[kind](write(tmp_path / "images", members), members)
    lists = {part: file.with_name(f"{part}.safetensors") for part in ("train", "val")}
    both = images_of_run(loaded(), str(source), lists)
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(
        path.name for path in lists.values()
    )
    for part, of_run in zip(lists, both, strict=False):
        plain = unbraid.open_images(f"{source}/{part}", to_tensor)
        ours = unbraid.open_images(f"{source}/{part}", to_tensor, listed=file)
        for images in (ours, of_run):
            assert isinstance(images.ids, mapped.Texts)
            assert 0 < len(images) == len(plain) < 53
            assert (images.ids, images.targets) == (plain.ids, plain.targets)
            assert (images.classes, images.divided) == (plain.classes, plain.divided) != ([], "")
            assert groups_of(images) == groups_of(plain)
            assert images.labels == plain.labels
            assert [name_of(images, k) for k in range(9)] == [name_of(plain, k) for k in range(9)]
            assert_bit_equal(images[8][0], plain[8][0])
            told = fingerprint(images, images.targets)
            assert told == fingerprint(plain, plain.targets)
            assert told == fingerprint(images, list(images.targets))


def test_a_source_to_be_divided_is_listed_once_for_a_run(tmp_path, monkeypatch):
    folder, listed = write(tmp_path / "images", {"ant": 30, "bee": 20}), []
    real = kept.walk_folder
    monkeypatch.setattr(kept, "walk_folder", lambda *told: listed.append(told) or real(*told))
    lists = {part: tmp_path / f"{part}.safetensors" for part in ("train", "val")}
    train, val, note = images_of_run(loaded(), str(folder), lists)
    assert (len(listed), len(train) + len(val)) == (1, 50)
    assert "has no train and val" in note


@pytest.mark.parametrize("way", ["in one", "by class"])
def test_a_scan_of_it_is_the_scan_byte_for_byte(way, folder, file, tmp_path):
    options = {} if way == "in one" else {"classes": [1]}
    ours = scanned(unbraid.open_images(folder, to_tensor, listed=file), tmp_path / "a", **options)
    theirs = scanned(unbraid.open_images(folder, to_tensor), tmp_path / "b", **options)
    assert ours.manifest.scan_id == theirs.manifest.scan_id
    for path in sorted(ours.path.glob("*.safetensors")):
        assert path.read_bytes() == (theirs.path / path.name).read_bytes()


def test_labels_beyond_the_outputs_are_told_at_once(folder, file, tmp_path):
    images = unbraid.open_images(folder, to_tensor, labels={"ant": 0, "bee": 7}, listed=file)
    with pytest.raises(DataError, match=r"bee/0\.png has label 7, but the network has 4 outputs"):
        scanned(images, tmp_path / "scan", labels="given")


def test_views_are_lists_to_those_who_look(listed, folder):
    ids, labels = listed.ids, listed.targets
    plain = unbraid.open_images(folder)
    for view, own in ((ids, plain.ids), (labels, plain.targets)):
        assert view == own
        assert own == view
        assert view != own[:-1]
        assert view != [*own[:-1], own[0]]
        assert list(view) == list(own)
        assert view[-1] == own[-1]
        assert view[2:5] == own[2:5]
        assert view[5:2] == own[5:2] == []
        assert view[::3] == own[::3]
        assert view[:99] == own
        assert own[3] in view
        for beyond in (8, -9):
            with pytest.raises(IndexError):
                view[beyond]


def test_what_travels_to_another_process_is_a_name(listed, file):
    sent = pickle.dumps(listed)
    assert len(sent) < 5000
    assert b"ant/0.png" not in sent
    again = pickle.loads(sent)
    assert again.ids.mapped is pickle.loads(pickle.dumps(again)).ids.mapped  # mapped once
    assert_bit_equal(again[3][0], listed[3][0])


def spawned(images, queue):
    queue.put((list(images.ids), list(images.targets)))


def test_a_spawned_process_maps_the_same(listed):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=spawned, args=(listed, queue))
    process.start()
    assert queue.get(timeout=300) == (list(listed.ids), list(listed.targets))
    process.join()


def test_workers_read_it(folder, file, tmp_path):
    ours = scanned(unbraid.open_images(folder, to_tensor, listed=file), tmp_path / "a", workers=2)
    theirs = scanned(unbraid.open_images(folder, to_tensor), tmp_path / "b")
    assert ours.ids() == theirs.ids()


def test_another_list_in_its_place_is_told_not_read(listed, folder, file, monkeypatch):
    sent = pickle.dumps(listed)
    (folder / "bee" / "0.png").unlink()
    unbraid.open_images(folder, to_tensor, listed=file)
    mapped.open_mapped.cache_clear()
    monkeypatch.setattr(mapped, "_PATIENCE", 0.1)
    with pytest.raises(OutOfReach, match="was replaced by another list of images; start again"):
        pickle.loads(sent)
    assert len(list(listed.ids)) == 8  # whoever had it mapped keeps what it had


def test_each_start_lists_anew_so_that_no_list_is_stale(folder, file):
    before = unbraid.open_images(folder, listed=file).fingerprints
    (folder / "bee" / "new.png").write_bytes((folder / "bee" / "0.png").read_bytes())
    after = unbraid.open_images(folder, listed=file)
    assert "bee/new.png" in after.ids
    assert after.fingerprints != before
    (folder / "bee" / "new.png").unlink()
    assert unbraid.open_images(folder, listed=file).fingerprints == before


def test_an_image_that_was_changed_since_is_not_read(listed, folder):
    path = folder / "ant" / "2.png"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    with pytest.raises(OutOfReach, match=r"2.png was changed since it was listed; start again"):
        listed[2]
    path.write_bytes(content)
    listed[2]


def test_what_cannot_be_listed_leaves_the_file_that_was(folder, file):
    unbraid.open_images(folder, listed=file)
    before = file.read_bytes()
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no image"):
        unbraid.open_images(folder, listed=file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_every_library_reads_the_file(listed, file):
    with safe_open(file, framework="np") as opened:
        starts, content = opened.get_tensor("id_start"), opened.get_tensor("id_bytes").tobytes()
        assert json.loads(opened.metadata()["unbraid"])["n_images"] == 8
    ends = pairwise(starts)
    assert [content[i:j].decode() for i, j in ends] == list(listed.ids)
    tensors, _ = read_tensors(file)  # which compares checksums
    assert tensors["class"].tolist() == [0] * 5 + [1] * 3
    assert tensors["first"].tolist() == [0, 5, -1]


# --- damage ---------------------------------------------------------------------------------------


def write_some(file, n=30_000, label=lambda k: k // 10_000):
    """A list of several blocks."""

    def parts():
        for start in range(0, n, 7_000):
            these = range(start, min(start + 7_000, n))
            ids = [
                f"class-{label(k):03d}/a-rather-long-name-of-an-image-{k:08d}.jpg" for k in these
            ]
            yield Part(ids, [label(k) for k in these], [1000 + k for k in these])

    write_list(file, {"source": "made up", "root": "/r"}, ["a", "b", "c"], parts(), {}, {})
    return file


def read_all(file):
    """Everything that a list says."""
    listing = read_list(Mapped(file))
    return list(listing.ids), list(listing.class_of), list(listing.sizes), listing.classes


def test_blocks_and_parts_do_not_show(file):
    ids, class_of, sizes, _ = read_all(write_some(file))
    assert file.stat().st_size > 2 * BLOCK
    assert ids[12_345] == "class-001/a-rather-long-name-of-an-image-00012345.jpg"
    assert len(set(ids)) == 30_000
    assert class_of == [k // 10_000 for k in range(30_000)]
    assert sizes == [1000 + k for k in range(30_000)]
    assert read_list(Mapped(file)).class_of.first() == {0: 0, 1: 10_000, 2: 20_000}


def outcome(file):
    """What a list says, or that it was refused in one sentence."""
    try:
        return read_all(file)
    except UnbraidError as error:
        fine = re.fullmatch(r".* is no list of images that can be used .*; delete it\.", str(error))
        return "refused" if fine else str(error)


def test_every_flipped_byte_is_told(file, tmp_path):
    whole = write_some(file).read_bytes()
    told = read_all(file)
    draw = np.random.default_rng(0)
    places = [*range(0, 2500, 61), HEAD, HEAD + BLOCK - 1, HEAD + BLOCK, len(whole) - 1]
    places += draw.integers(HEAD, len(whole), 40).tolist()
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(draw.integers(8))
        bad = tmp_path / f"{place}.safetensors"
        bad.write_bytes(changed)
        # Of the header only what changes no figure passes, such as a checksum of a column.
        assert outcome(bad) in ([told] if place < HEAD else []) + ["refused"]


def lie(header):
    """Headers that would lead astray."""
    for change in (
        lambda h: h["id_start"].update(shape=[10**12]),
        lambda h: h["id_start"]["data_offsets"].reverse(),
        lambda h: h["class"].update(dtype="F64"),
        lambda h: h["class"].update(shape=[True]),
        lambda h: h["class"].update(shape=[[3]]),
        lambda h: h["id_bytes"].update(data_offsets=[0, 2**70], shape=[2**70]),
        lambda h: h.pop("first"),
        lambda h: h.update(first=None),
        lambda h: h.pop("__metadata__"),
        lambda h: h["__metadata__"].update(unbraid='{"schema": 2, "crc32": {}}'),
        lambda h: h["__metadata__"].update(unbraid="[" * 1000),
    ):
        changed = json.loads(json.dumps(header))
        change(changed)
        yield changed


def test_cut_files_other_versions_and_lies_are_refused(file, tmp_path):
    whole = write_some(file).read_bytes()
    bad = [whole[:n] for n in (0, 7, 8, 4095, HEAD, HEAD + BLOCK, len(whole) - 1)]
    bad += [whole + b"\0", b"\0" * len(whole), b"{}" * 4096]
    for header in lie(json.loads(whole[8:HEAD])):
        bad.append(whole[:8] + json.dumps(header).encode().ljust(HEAD - 8) + whole[HEAD:])
    for k, content in enumerate(bad):
        (tmp_path / f"{k}").write_bytes(content)
        with pytest.raises(RunError, match="is no list of images that can be used") as told:
            read_all(tmp_path / f"{k}")
        assert "\n" not in str(told.value)
    with pytest.raises(RunError, match="no list of images"):
        Mapped(tmp_path)


def test_check_sets_a_damaged_list_aside(folder, tmp_path):
    file = tmp_path / "scan" / kept.LISTED
    scanned(unbraid.open_images(folder, to_tensor, listed=file), tmp_path / "scan")
    assert check(tmp_path / "scan").whole
    content = bytearray(file.read_bytes())
    content[HEAD + 3] ^= 1
    file.unlink()
    file.write_bytes(content)
    found = check(tmp_path / "scan")
    assert "no list of images that can be used" in found.damaged[0]
    assert not file.exists()


def test_whatever_lies_there_is_replaced(folder, file):
    for content in (b"", b"\0" * 9000, b"{}"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        assert len(unbraid.open_images(folder, listed=file)) == 8


# --- kills, and several processes -----------------------------------------------------------------

MAKING = """
import sys, os, signal
from pathlib import Path
import unbraid
from unbraid.images import kept
source, file, how = sys.argv[1:]
if how.startswith("part"):
    put, left = kept._Columns.put, [int(how[4:])]
    def put_and_die(self, *column):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        put(self, *column)
    kept._Columns.put = put_and_die
if how == "rename":
    Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
images = unbraid.open_images(source, listed=file)
print(len(images), images.ids[0], next(iter(images.fingerprints.values())))
"""


def making(folder, file, how="", n_ranks=1):
    many = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks))
    script = file.parent.parent / "making.py"
    script.write_text(MAKING)
    command = [sys.executable, *(many if n_ranks > 1 else ()), script, folder, file, how]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("how", "before"), [("part0", False), ("part4", True), ("rename", False), ("rename", True)]
)
def test_a_kill_leaves_the_old_list_or_none(how, before, folder, file):
    if before:
        unbraid.open_images(folder, listed=file)
    content = file.read_bytes() if before else None
    (folder / "bee" / "new.png").write_bytes((folder / "bee" / "0.png").read_bytes())
    assert making(folder, file, how).returncode == -signal.SIGKILL
    assert (file.read_bytes() if file.exists() else None) == content
    assert list(file.parent.glob("*.tmp"))
    done = making(folder, file)
    assert done.stdout.startswith("9 ant/0.png"), done.stderr
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing of the killed


def test_one_process_lists_and_the_others_map(folder, file):
    done = making(folder, file, n_ranks=3)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    plain = unbraid.open_images(folder)
    assert lines == [f"8 ant/0.png {fingerprint(plain, plain.targets)}"] * 3


def test_others_never_look_at_the_source(folder, file, monkeypatch):
    """Process 2 of two, whose first has written the list."""
    unbraid.open_images(folder, to_tensor, listed=file)
    identities = json.dumps([Mapped(file).identity])

    class Second:
        first = False

        def lead(self, _):
            return identities

    monkeypatch.setattr(kept, "join_team", Second)
    monkeypatch.setattr(kept, "walk_folder", None)
    (listing,) = kept.keep([file], lambda: pytest.fail("it listed"))
    assert listing.ids == unbraid.open_images(folder).ids


def test_a_writer_at_work_keeps_its_file(folder, file):
    file.parent.mkdir()
    with temporary_for(file) as (temporary, _):
        unbraid.open_images(folder, listed=file)
        assert Path(temporary).exists()


def test_scanning_with_it_needs_no_labels_list_in_memory(listed, tmp_path):
    made = unbraid.scan(build("3x3"), "layer", listed, tmp_path / "scan", batch_size=3)
    assert torch.equal(next(made.columns("label")), torch.tensor([0] * 5 + [1] * 3))


def mistaken(folder, file, begun, end=DataError):
    with kept.tentative(file.parent, file.name):
        unbraid.open_images(folder, listed=file)
        if begun:
            (file.parent / "manifest.json").touch()
        raise end("a mistake")


ENDS = pytest.mark.parametrize("end", [DataError, KeyboardInterrupt, OSError, SystemExit])


@ENDS
def test_a_list_that_no_scan_came_of_is_taken_back(end, folder, tmp_path):
    (tmp_path / "there").mkdir()
    for begun in (False, True):
        for place in ("new/deep", "there"):
            file = tmp_path / place / kept.LISTED
            with pytest.raises(end, match="a mistake"):
                mistaken(folder, file, begun, end)
            assert file.exists() == begun
        assert (tmp_path / "new").exists() == begun
        assert (tmp_path / "there").exists()


@ENDS
def test_the_list_of_before_is_put_back_however_it_ends(end, folder, file, monkeypatch):
    unbraid.open_images(folder, listed=file)
    before = file.read_bytes()
    (folder / "bee" / "new.png").write_bytes((folder / "bee" / "0.png").read_bytes())
    with pytest.raises(end):
        mistaken(folder, file, False, end)
    assert [(path.name, path.read_bytes()) for path in file.parent.iterdir()] == [
        (file.name, before)
    ]
    # Also where it ends before another is there.
    monkeypatch.setattr(kept, "_hold", Mock(side_effect=end("at once")))
    with pytest.raises(end, match="at once"):
        mistaken(folder, file, False, end)
    assert file.read_bytes() == before


@pytest.mark.parametrize("divided", [False, True])
def test_ctrl_c_while_a_list_is_written_leaves_nothing(divided, tmp_path, monkeypatch):
    folder = write(tmp_path / "images", {"ant": 30, "bee": 20})
    file = tmp_path / "new" / "deep" / kept.LISTED
    monkeypatch.setattr(kept._Columns, "put", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), kept.tentative(file.parent, file.name):
        unbraid.open_images(folder / "val" if divided else folder, listed=file)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize("begun", [False, True])
def test_the_next_start_puts_back_what_a_killed_one_replaced(begun, folder, file):
    unbraid.open_images(folder, listed=file)
    before = file.read_bytes()
    new = folder / "bee" / "new.png"
    new.write_bytes((folder / "bee" / "0.png").read_bytes())
    script = file.parent.parent / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, script, folder, file, str(begun)]
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    after = file.read_bytes()
    assert after != before
    new.unlink()
    with pytest.raises(DataError):
        mistaken(folder, file, False)
    assert file.read_bytes() == (after if begun else before)
    assert not list(file.parent.glob("*.before"))


KILLED = """
import os, signal, sys
from pathlib import Path
import unbraid
from unbraid.images import kept
source, file, begun = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "True"
with kept.tentative(file.parent, file.name):
    unbraid.open_images(source, listed=file)
    if begun:
        (file.parent / "manifest.json").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_that_cannot_be_written_gets_no_list(folder, file, monkeypatch):
    file.parent.mkdir()
    monkeypatch.setattr(kept.os, "access", lambda path, _: Path(path) != file.parent)
    with kept.tentative(file.parent, file.name) as files:
        assert files == []
    with kept.tentative(file.parent / "in it", file.name) as files:
        assert files == [file.parent / "in it" / file.name]  # whose writing fails, and tells so
    assert list(file.parent.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_the_list_of_a_finished_scan_stays_when_another_is_refused(
    links, folder, tmp_path, monkeypatch
):
    def scan_into_it(source):
        with kept.tentative(file.parent, file.name):
            images = unbraid.open_images(source, to_tensor, listed=file)
            return scanned(images, file.parent)

    file = tmp_path / "scan" / kept.LISTED
    scan_into_it(folder)
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    next(path for path in sorted(other.rglob("*.png"))).unlink()
    if not links:
        monkeypatch.setattr(kept.os, "link", lambda *_: os.stat(tmp_path / "nowhere"))
    with pytest.raises(RunError, match="holds another scan"):
        scan_into_it(other)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before
    scan_into_it(folder)
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before
