"""Memory that is kept: that it is, by whom, and where nothing is done."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest

import unbraid
from unbraid.base import memory
from unbraid.cli import look, make, shared

# Page faults while blocks of 64 MiB come and go, as layers' outputs do.
COUNT = """
import ctypes, resource, sys
from unbraid.base.memory import keep_memory
print(keep_memory() if sys.argv[1] == "kept" else None)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def come_and_go():
    block = ctypes.c_void_p(libc.malloc(2**26))
    libc.memset(block, 1, ctypes.c_size_t(2**26))
    libc.free(block)
come_and_go()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    come_and_go()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(way, **told):
    """What `keep_memory` returned in a process of its own, and the page faults there."""
    env = {name: text for name, text in os.environ.items() if "MALLOC" not in name}
    env.pop("GLIBC_TUNABLES", None)
    done = subprocess.run(
        [sys.executable, "-c", COUNT, way],
        **{"env": {**env, **told}, "capture_output": True, "text": True, "check": True},
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(not memory._is_glibc(), reason="another C library")
def test_blocks_stay_with_the_process_and_do_not_without_or_where_the_user_says_so():
    kept, faults = count_faults("kept")
    assert (kept, faults < 32) == ("True", True)
    for way, told in (("not", {}), ("kept", {"MALLOC_MMAP_THRESHOLD_": "131072"})):
        kept, more = count_faults(way, **told)
        assert kept in ("None", "False")
        assert more >= 4 * 32  # pages of 2 MiB at most


class Library:
    """A C library that notes what it is told."""

    def __init__(self, largest=2**31 - 1, refused=()):
        self.told, self.largest, self.refused = [], largest, refused

    def mallopt(self, name, value):
        self.told.append((name, value))
        return int(name not in self.refused and (name != -3 or value <= self.largest))


@pytest.fixture
def library(monkeypatch):
    one = Library()
    for name in (*memory._VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: one)
    monkeypatch.setattr(memory.os, "confstr", lambda _: "glibc 2.36", raising=False)
    return one


TOLD = [
    ({}, [(-3, 2**30), (-1, 2**31 - 1)], True),
    ({"largest": 2**25}, [(-3, 2**30), (-4, 0), (-1, 2**31 - 1)], True),  # before glibc 2.35
    ({"refused": (-3, -4)}, [(-3, 2**30), (-4, 0)], False),
    ({"refused": (-1,)}, [(-3, 2**30), (-1, 2**31 - 1)], False),
]


@pytest.mark.parametrize(("kind", "told", "kept"), TOLD)
def test_the_c_library_is_told_and_its_answer_counts(kind, told, kept, library):
    vars(library).update(vars(Library(**kind)))
    assert (unbraid.keep_memory(), library.told) == (kept, told)


USERS = [
    {"MALLOC_MMAP_THRESHOLD_": "65536"},
    {"MALLOC_TRIM_THRESHOLD_": "0"},
    {"MALLOC_MMAP_MAX_": "100"},
    {"GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.mmap_threshold=65536"},
    {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"},
]


@pytest.mark.parametrize("variables", USERS)
def test_nothing_is_done_against_what_the_user_says(variables, library, monkeypatch):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert (unbraid.keep_memory(), library.told) == (False, [])
    for name in variables:  # of other tunables it does not matter
        monkeypatch.setenv(name, "glibc.malloc.tcache_count=3" if "GLIBC" in name else "")
    assert unbraid.keep_memory()


@pytest.mark.parametrize("answer", [None, ValueError, OSError, AttributeError])
def test_nothing_is_done_with_another_c_library(answer, library, monkeypatch):
    def confstr(_):
        if answer is not None:
            raise answer

    monkeypatch.setattr(memory.os, "confstr", confstr)
    assert (unbraid.keep_memory(), library.told) == (False, [])


def test_commands_that_run_a_network_keep_memory_before_they_load_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(unbraid, "keep_memory", lambda: asked.append(True), raising=False)
    monkeypatch.setattr("unbraid.networks.models.load_model", None)
    monkeypatch.setattr("unbraid.running.demo.load_network", None)
    monkeypatch.setattr("unbraid.running.network.load_again", None)
    monkeypatch.setattr("unbraid.running.finished.Run", Mock())
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    network = shared.Network(model="torchvision:resnet18")
    given = {"network": network, "layer": ["fc"], "out": tmp_path / "out"}
    commands = [
        lambda: make.run(**given, data=str(tmp_path)),
        lambda: make.scan(**given, data=str(tmp_path / "train")),
        lambda: make.layers("torchvision:resnet18"),
        lambda: make.reproduce(imagenet=tmp_path, out=tmp_path),
        lambda: make.demo(out=tmp_path),
        lambda: look.explain(tmp_path, [tmp_path]),
        lambda: look.edit(tmp_path, off=["1.0"], out=tmp_path / "edited"),
    ]
    for number, command in enumerate(commands):
        with pytest.raises(TypeError, match="'NoneType' object is not callable"):
            command()
        assert len(asked) == number + 1
