"""Settings shared by the tests of the core."""

import os
import shutil
import signal

import pytest
import torch

pytest.register_assert_rewrite("checks", "pairs")
torch.set_num_threads(1)  # networks this small only lose by more
# Sums differ in their last bits with the number of threads, so what the tests start has one too.
os.environ["OMP_NUM_THREADS"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has its background jobs ignore ctrl-C, and what the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    # Even kernels with padding="same" are tested on purpose, because they pad unevenly.
    config.addinivalue_line("filterwarnings", "ignore:Using padding='same'")


@pytest.fixture(autouse=True)
def _same_random_numbers():
    """Every test starts from the same random numbers, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def pair():
    from pairs import Pair

    return Pair("3x3")


@pytest.fixture(scope="session")
def calls(tmp_path_factory):
    from public_calls import sound_calls

    return sound_calls(tmp_path_factory.mktemp("calls"))


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed ({', '.join(BROWSERS)})")
    # Chromium refuses its sandbox to root, as containers have it; the pages are our own.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=flags)
