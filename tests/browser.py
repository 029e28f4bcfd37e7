"""A real browser for the tests of the report, where the machine has one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def launch() -> Iterator[Any]:
    """Start the browser, or skip the tests that need it."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(NAMES)})")
    # Chromium refuses its sandbox to root, as containers have it; the pages are our own.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=flags)


def load(context: Any, file: Path, anchor: str = "") -> tuple[Any, list[str], list[str]]:
    """Open a file, and note what it says on the console or asks of a network: it should not."""
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def watch(route: Any) -> None:
        if route.request.url.startswith(file.as_uri()):
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    page.route("**/*", watch)
    page.goto(file.as_uri() + anchor)
    return page, said, asked


def lay_out(page: Any) -> None:
    """Have all laid out, also what is off the screen."""
    page.evaluate(
        "document.querySelectorAll('article').forEach(a => {a.style.contentVisibility = 'visible'})"
    )
