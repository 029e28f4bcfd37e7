"""One undisturbed scan for all tests of faults."""

import time

import pytest

from faults.test_faults import is_finished, ready, start


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """A scan that nothing happened to, and how long it takes once it has begun."""
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    ready(process)
    begun = time.perf_counter()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert is_finished(folder)
    return folder, time.perf_counter() - begun


@pytest.fixture(scope="session")
def undisturbed(timed):
    return timed[0]
