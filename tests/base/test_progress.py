"""What is told of long steps while they run."""

import threading
import time

import pytest

from unbraid.base import progress
from unbraid.base.errors import DataError
from unbraid.base.progress import Progress, counted, waiting


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when they are told to."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def work(advance, clock, n_steps, seconds, n):
    for _ in range(n_steps):
        clock[0] += seconds
        advance(n)


def test_in_a_log_file_there_is_a_line_every_half_minute(clock, capsys):
    with counted("Scanning x", 4000, 1000, show=True) as advance:
        work(advance, clock, 90, 1.0, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "Scanning x: 1,300 of 4,000, 10 images/s, 4:30 left",
        "Scanning x: 1,600 of 4,000, 10 images/s, 4:00 left",
        "Scanning x: 1,900 of 4,000, 10 images/s, 3:30 left",
        "Scanning x: 1,900 of 4,000, 10 images/s, 1:30 in all",
    ]
    with counted("Scanning x", 4000, show=False) as advance:
        work(advance, clock, 1, 100.0, 10)
    n_threads = threading.active_count()
    with pytest.raises(DataError), counted("Scanning x", 10, show=True):
        raise DataError("It ends here.")
    assert threading.active_count() == n_threads
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("show", "seconds", "told"),
    [
        (True, 1.0, []),
        (True, 8.0, ["Fitting: 1 of 1, 0.1 channels/s, 0:08 in all"]),
        (False, 8.0, []),
    ],
)
def test_of_a_step_that_is_soon_done_nothing_is_told(clock, capsys, show, seconds, told):
    with Progress(show).of("Fitting", 1, "channels") as advance:
        work(advance, clock, 1, seconds, 1)
    assert capsys.readouterr().err.splitlines() == told


def told_until(capsys, text):
    """What is told until there is a text in it; a minute is enough on any machine."""
    told = ""
    for _ in range(600):
        told += capsys.readouterr().err
        if text in told:
            return told
        time.sleep(0.1)
    raise AssertionError(f"only {told[:200]!r} was told")


@pytest.mark.parametrize(
    ("n_done", "told"), [(0, "0 of 4,000, 0:00 so far"), (40, "40 of 4,000, ")]
)
def test_a_unit_that_takes_long_is_told_of_by_the_clock(n_done, told, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_OF_LINES", 0.01)
    n_threads = threading.active_count()
    with counted("Scanning x", 4000, show=True) as advance:
        advance(n_done)
        capsys.readouterr()
        told_until(capsys, f"Scanning x: {told}")
    assert threading.active_count() == n_threads


def test_the_next_line_is_waited_for_from_the_last_one_on(clock, capsys):
    lines = progress._Lines("Scanning x", 40, 0, "images")
    assert lines.until_next() == 30
    work(lines.advance, clock, 1, 31.0, 10)
    clock[0] += 29.0
    assert lines.until_next() == 1
    work(lines.advance, clock, 1, 1.0, 30)  # all are done, but not what comes after the last
    assert lines.until_next() == 30
    assert capsys.readouterr().err == "Scanning x: 10 of 40, 0.3 images/s, 1:33 left\n"


def test_of_a_block_of_unknown_length_the_time_is_told(clock, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_OF_LINES", 0.01)
    with waiting("Listing images"):
        clock[0] += 75.0
        told_until(capsys, "Listing images: 1:15 so far\n")
    with waiting("Soon done"):
        pass
    assert "Soon done" not in capsys.readouterr().err


def test_on_a_terminal_a_bar_comes_though_nothing_is_counted(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with waiting("Soon done"), Progress(True).of("Soon done", 2, "channels"):
        pass
    assert "Soon done" not in capsys.readouterr().err
    monkeypatch.setattr(progress, "PATIENCE", 0.01)
    with waiting("Listing images"):
        told_until(capsys, "Listing images")
    with Progress(True).of("Fitting", 2, "channels"):
        told_until(capsys, "Fitting")


@pytest.mark.parametrize(("seconds", "shown"), [(0.5, False), (8.0, True)])
def test_on_a_terminal_there_is_a_bar_once_a_step_takes_long(
    clock, capsys, monkeypatch, seconds, shown
):
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich a terminal
    with Progress(True).of("Fitting", 2, "channels") as advance:
        work(advance, clock, 2, seconds, 1)
    told = capsys.readouterr().err
    assert ("Fitting" in told) == shown
    assert ("0:00:00" in told) == shown  # left, once all is done
