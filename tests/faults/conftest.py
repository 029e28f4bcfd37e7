"""One undisturbed scan for all tests of faults."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from faults.test_faults import N_FILES, ready, start


@pytest.fixture(scope="session")
def timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    ready(process)
    begun = time.perf_counter()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len([p for p in folder.rglob("*") if p.is_file()]) == N_FILES
    return folder, time.perf_counter() - begun


@pytest.fixture(scope="session")
def undisturbed(timed: tuple[Path, float]) -> Path:
    """A scan that nothing happened to."""
    return timed[0]


@pytest.fixture(scope="session")
def seconds(timed: tuple[Path, float]) -> float:
    """How long a scan takes once it has begun."""
    return timed[1]
