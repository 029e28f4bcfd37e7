"""A run whose report the tests read."""

import pytest

from pages import assert_harmless, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def page(run, tmp_path_factory):
    return run.report(tmp_path_factory.mktemp("page") / "new" / "report.html")


@pytest.fixture
def write(run, tmp_path):
    """Write the run's report with other arguments; whatever they are, it is harmless."""

    def write_one(**changed):
        text = run.report(tmp_path / "r.html", **changed)
        assert_harmless(text)
        return text

    return write_one
