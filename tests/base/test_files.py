"""Writing of files: whole or not at all, beside other writers, and on odd file systems."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from unbraid.base import files as temporary
from unbraid.base.errors import RunError
from unbraid.base.files import remove_leftovers, temporary_for, write_whole


def at_fsync(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Do something just before a file, or a folder, is synced."""
    fsync = os.fsync

    def act_and_sync(handle: int) -> None:
        act(handle)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", act_and_sync)


def leave(path: Path, *, host: str = "", age: float = 0.0) -> Path:
    """Leave a temporary file as a killed writer does."""
    with suppress(KeyboardInterrupt), temporary_for(path) as (left, file):
        file.write(b"half")
        raise KeyboardInterrupt
    if host:
        left = left.rename(left.with_name(left.name.replace(f".{temporary._HOST}.", f".{host}.")))
    os.utime(left, (time.time() - age, time.time() - age))
    return left


def test_the_temporary_file_of_a_living_writer_is_left_alone(tmp_path, monkeypatch):
    seen: list[int] = []

    def clean(_: int) -> None:
        seen.append(len(list(tmp_path.glob("*.tmp"))))
        remove_leftovers(tmp_path)

    at_fsync(monkeypatch, clean)
    write_whole(tmp_path / "a", b"whole")
    assert seen == [1, 0]  # the file's turn, then the folder's
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_file_taken_for_a_leftover_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, calls = temporary._lock, []

    def clean_and_lock(file: object) -> bool | None:
        calls.append(file)
        if len(calls) == 1:
            remove_leftovers(tmp_path)
        return lock(file)  # type: ignore[arg-type]

    monkeypatch.setattr(temporary, "_lock", clean_and_lock)
    write_whole(tmp_path / "a", b"whole")
    assert len(calls) == 3  # a writer's, the cleaner's, the writer's again
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_dead_writers_go_and_nothing_else(tmp_path):
    leave(tmp_path / "dead")
    leave(tmp_path / "dead", host="elsewhere", age=4000)
    kept = [
        leave(tmp_path / "lives", host="elsewhere", age=100),
        tmp_path / "mine.tmp",
        tmp_path / "mine.1.tmp",
    ]
    for path in kept:
        path.touch()
    (tmp_path / f"dead.{temporary._HOST}.1.0123abcd.tmp").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == sorted(
        path.name for path in kept
    )


def test_where_files_cannot_be_locked_only_old_ones_are_leftovers(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_lock", lambda _: None)
    leave(tmp_path / "old", age=4000)
    young = leave(tmp_path / "young", age=100)
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]
    write_whole(tmp_path / "young", b"whole")
    assert (tmp_path / "young").read_bytes() == b"whole"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_written_to_all_the_same(number, tmp_path, monkeypatch):
    fail_on_folders(monkeypatch, number)
    write_whole(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"


def test_a_folder_that_fails_to_be_synced_is_told(tmp_path, monkeypatch):
    fail_on_folders(monkeypatch, errno.EIO)
    with pytest.raises(RunError, match="cannot be written"):
        write_whole(tmp_path / "a", b"whole")


def fail_on_folders(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))

    at_fsync(monkeypatch, fail)
