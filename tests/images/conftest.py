"""A folder of eight images, and caches of libraries that no other test sees."""

from contextlib import suppress

import pytest
from sources import MEMBERS, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "images", MEMBERS)


@pytest.fixture
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with suppress(ImportError):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def datasets(_caches):
    return pytest.importorskip("datasets", reason="needs .[datasets]")
