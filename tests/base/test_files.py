"""Writing of files: whole or not at all, beside other writers, and on odd file systems."""

import errno
import os
import stat
import time
from contextlib import suppress

import pytest
import torch

from unbraid.base import files
from unbraid.base.errors import RunError
from unbraid.base.files import (
    forget,
    names_in,
    read_tensors,
    remove_leftovers,
    temporary_for,
    write_tensors,
    write_whole,
)


def at_fsync(monkeypatch, act):
    """Do something just before a file, or a folder, is synced."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: act(handle) or fsync(handle))


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def leave(path, *, host=files._HOST, age=0.0):
    """Leave a temporary file as a killed writer does."""
    with suppress(Killed), temporary_for(path) as (left, _):
        raise Killed
    left = left.rename(left.with_name(left.name.replace(f".{files._HOST}.", f".{host}.")))
    os.utime(left, (time.time() - age, time.time() - age))
    return left


def test_remove_leftovers_spares_a_living_writer(tmp_path, monkeypatch):
    seen = []

    def clean(_):
        seen.append(len(list(tmp_path.glob("*.tmp"))))
        remove_leftovers(tmp_path)

    at_fsync(monkeypatch, clean)
    write_whole(tmp_path / "a", b"whole")
    assert seen == [1, 0]  # the file's turn, then the folder's
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_write_whole_starts_again_if_its_file_went_before_it_was_locked(tmp_path, monkeypatch):
    lock, calls = files._lock, []

    def clean_and_lock(file):
        calls.append(file)
        if len(calls) == 1:
            remove_leftovers(tmp_path)
        return lock(file)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "_lock", clean_and_lock)
    write_whole(tmp_path / "a", b"whole")
    assert len(calls) == 3  # a writer's, the cleaner's, the writer's again
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_remove_leftovers_of_dead_writers_takes_nothing_else(tmp_path):
    leave(tmp_path / "dead")
    leave(tmp_path / "dead", host="elsewhere", age=4000)
    folder = tmp_path / f"dead.{files._HOST}.1.0123abcd.tmp"
    folder.mkdir()
    young = leave(tmp_path / "lives", host="elsewhere", age=100)
    mine = [tmp_path / "mine.tmp", tmp_path / "mine.1.tmp"]
    for path in mine:
        path.touch()
    remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {folder, young, *mine}


def test_remove_leftovers_where_files_cannot_be_locked_takes_old_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_lock", lambda _: None)
    leave(tmp_path / "old", age=4000)
    young = leave(tmp_path / "young", age=100)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]
    write_whole(tmp_path / "young", b"whole")
    assert (tmp_path / "young").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_write_whole_tells_a_folder_that_fails_when_synced(number, tmp_path, monkeypatch):
    def fail(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    at_fsync(monkeypatch, fail)
    if number == errno.EIO:
        with pytest.raises(
            RunError, match=r"cannot be written \(.*\); mend that, or name another place"
        ):
            write_whole(tmp_path / "a", b"whole")
    else:
        write_whole(tmp_path / "a", b"whole")
        assert (tmp_path / "a").read_bytes() == b"whole"


def count_checksums(monkeypatch):
    """Count how often checksums are computed."""
    checksum, calls = files._checksum, []
    monkeypatch.setattr(files, "_checksum", lambda tensor: calls.append(tensor) or checksum(tensor))
    return calls


def damage(path):
    """Change the last byte in place, and keep the times that a writer can keep."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_read_tensors_compares_checksums_once_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "shard"
    write_tensors(path, {"a": torch.zeros(3), "b": torch.zeros(2)}, {})
    monkeypatch.setattr(files, "_SETTLED", -1.0)
    calls = count_checksums(monkeypatch)
    assert names_in(path) == {"a", "b"}
    for names, n_compared in ((["a"], 1), (["a"], 1), (None, 2), (None, 2)):
        read_tensors(path, names)
        assert len(calls) == n_compared
    time.sleep(0.05)  # clocks of file systems tick some hundred times a second
    damage(path)
    with pytest.raises(RunError, match="'b' is not what was written"):
        read_tensors(path)
    write_tensors(path, {"c": torch.zeros(3)}, {})
    assert names_in(path) == read_tensors(path)[0].keys() == {"c"}


def test_read_tensors_of_a_file_that_is_still_new_compares_each_time(tmp_path):
    path = tmp_path / "shard"
    write_tensors(path, {"a": torch.zeros(3)}, {})
    read_tensors(path)
    damage(path)  # perhaps within a tick of the file system's clock
    with pytest.raises(RunError, match="not what was written"):
        read_tensors(path)


def test_what_is_forgotten_is_compared_again(tmp_path, monkeypatch):
    path = tmp_path / "shard"
    write_tensors(path, {"a": torch.zeros(3)}, {})
    monkeypatch.setattr(files, "_stamp", lambda path: (1,))  # a disk that changes bytes alone
    read_tensors(path)
    damage(path)
    read_tensors(path)
    forget()
    with pytest.raises(RunError, match="not what was written"):
        read_tensors(path)


def test_a_file_replaced_while_it_is_opened_is_compared(tmp_path, monkeypatch):
    path = tmp_path / "shard"
    write_tensors(path, {"a": torch.zeros(3)}, {})
    monkeypatch.setattr(files, "_stamp", lambda path: (1,))
    read_tensors(path)
    damage(path)
    stamps = iter([(1,), (2,)])
    monkeypatch.setattr(files, "_stamp", lambda path: next(stamps))
    with pytest.raises(RunError, match="not what was written"):
        read_tensors(path)


def test_of_very_many_files_the_oldest_is_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_stamp", lambda path: (1,))
    monkeypatch.setattr(files, "_MOST_KNOWN", 2)
    calls = count_checksums(monkeypatch)
    forget()
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        write_tensors(path, {"a": torch.zeros(3)}, {})
    n_written = len(calls)
    for path in (*paths, paths[2], paths[1], paths[0]):
        read_tensors(path)
    assert len(calls) - n_written == 4  # the first one twice


def test_write_tensors_refuses_more_text_than_the_format_holds(tmp_path):
    path = tmp_path / "split.safetensors"
    with pytest.raises(RunError, match=r"split\.safetensors cannot be written \(.*fewer channels"):
        write_tensors(path, {"w": torch.zeros(1)}, {"text": "x" * 100_000_001})
    assert not any(tmp_path.iterdir())
