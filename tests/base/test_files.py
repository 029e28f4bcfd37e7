"""Writing of files: whole or not at all, beside other writers, and on odd file systems."""

import errno
import os
import stat
import time
from contextlib import suppress

import pytest

from unbraid.base import files
from unbraid.base.errors import RunError
from unbraid.base.files import remove_leftovers, temporary_for, write_whole


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
