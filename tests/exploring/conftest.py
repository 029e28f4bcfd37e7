"""A small run whose names mean harm, and the app over it."""

import shutil

import pytest

from explored import make_run, open_own, serve
from unbraid.exploring.explorer import open_explorer


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("explore"))


@pytest.fixture(scope="session")
def opened(folder):
    found = open_own(folder)
    assert found.missing == ()
    return found


@pytest.fixture
def explorer(opened, tmp_path):
    return open_explorer(opened, tmp_path / "splits")


@pytest.fixture
def bare(folder, tmp_path):
    """A copy of the run, from which things may be taken away."""
    shutil.copytree(folder, tmp_path / "run")
    shutil.copy(folder.parent / "own.py", tmp_path / "own.py")
    return tmp_path / "run"


@pytest.fixture
def served(explorer):
    """The app, listening."""
    yield from serve(explorer)
