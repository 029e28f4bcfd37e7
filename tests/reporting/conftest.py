"""A run whose report the tests read."""

from functools import partial

import pytest

from pages import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def page(run, tmp_path_factory):
    return run.report(tmp_path_factory.mktemp("page") / "new" / "report.html")


@pytest.fixture
def write(run, tmp_path):
    """Write the run's report with other arguments."""
    return partial(run.report, tmp_path / "r.html")
