"""A run whose report the tests read."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import launch, load
from pages import Run, assert_harmless, crowded, hostile, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def page(run, tmp_path_factory) -> str:
    return run.report(tmp_path_factory.mktemp("page") / "new" / "report.html")


@pytest.fixture
def write(run, tmp_path) -> Callable[..., str]:
    """Write the run's report with other arguments; whatever they are, it is harmless."""

    def write_one(**changed: Any) -> str:
        text = run.report(tmp_path / "r.html", **changed)
        assert_harmless(text)
        return text

    return write_one


@pytest.fixture(scope="session")
def reports(run, tmp_path_factory) -> list[Path]:
    """One with a channel that is only listed and hostile names, one with many concepts."""
    home = tmp_path_factory.mktemp("browser") / "a <b> & 'c'"
    hostile(run, home / "hostile.html")
    crowded(run, home / "crowded.html")
    return [home / "hostile.html", home / "crowded.html"]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with launch() as started:
        yield started


@pytest.fixture
def open_page(browser, reports) -> Iterator[Callable[..., Any]]:
    """Open a report, by default the hostile one, and see that it stays silent."""
    opened = []

    def open_one(path: Path = reports[0], anchor: str = "", width: int = 1100, **how: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 800}, **how)
        page, said, asked = load(context, path, anchor)
        opened.append((context, said, asked))
        return page

    yield open_one
    for context, said, asked in opened:
        assert (said, asked) == ([], [])
        context.close()
