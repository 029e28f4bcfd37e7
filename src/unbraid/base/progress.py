"""How far a long step is: a bar on a terminal, a line every half minute in a log file."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import rich.progress as bars
from rich.console import Console
from rich.text import Text

SECONDS_OF_LINES = 30.0  # between two lines, where there is no terminal
PATIENCE = 2.0  # seconds that a step of `Progress` takes before anything is shown

Advance = Callable[[int], None]


def uncounted(_: int) -> None:
    """Advance nothing, where nobody asks how far it is."""


@dataclass(frozen=True)
class Progress:
    """What the steps of one piece of work tell of themselves, on standard error or not at all."""

    show: bool = False

    @contextmanager
    def of(self, title: str, total: int, unit: str) -> Iterator[Advance]:
        """Count units while a block runs; of a step that is soon done nothing is told."""
        with counted(title, total, unit=unit, show=self.show, patience=PATIENCE) as advance:
            yield advance


QUIET = Progress()


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Tell that a block of unknown length still runs, once it takes long."""
    with counted(title, None, show=True, patience=PATIENCE):
        yield


@contextmanager
def counted(
    title: str,
    total: int | None,
    done: int = 0,
    *,
    unit: str = "images",
    show: bool,
    patience: float = 0.0,
) -> Iterator[Advance]:
    """Count while a block runs; the function handed out adds to the count.

    On a terminal that is a bar, with the time left. Elsewhere, as in a log file, it is a line every
    half minute, also where a single unit takes longer. Nothing is shown before so many seconds of
    patience are over. Of a total that nobody knows (None) only the time is told.
    """
    console = Console(stderr=True)
    if show and not console.is_terminal:
        lines = _Lines(title, total, done, unit)
        with lines.by_the_clock():
            yield lines.advance
        lines.end(patience)
        return
    counts = (bars.MofNCompleteColumn(), _Rate(unit), bars.TimeRemainingColumn())
    columns = (
        *(bars.TextColumn("{task.description}"), bars.BarColumn()),
        *(counts if total is not None else (bars.TimeElapsedColumn(),)),
    )
    bar = bars.Progress(*columns, console=console, disable=not show)
    task, start = bar.add_task(title, total=total, completed=done), time.monotonic()

    def advance(n: int) -> None:
        bar.advance(task, n)
        if not bar.live.is_started and time.monotonic() - start >= patience:
            bar.start()

    late = threading.Timer(patience, bar.start)  # where nothing is counted meanwhile
    late.daemon = True
    if not patience:
        bar.start()
    elif show:
        late.start()
    try:
        yield advance
    finally:
        late.cancel()
        if late.is_alive():
            late.join()
        if bar.live.is_started:  # of one that is not, older versions of rich write an empty line
            bar.stop()


class _Rate(bars.ProgressColumn):
    """Units per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: bars.Task) -> Text:
        """Show the rate, once there is one."""
        speed = task.finished_speed or task.speed
        text = "" if speed is None else f"{_rate(speed)} {self._unit}/s"
        return Text(text, style="progress.data.speed")


class _Lines:
    """Progress where nothing can be written over: a line now and then, and one at the end."""

    def __init__(self, title: str, total: int | None, done: int, unit: str) -> None:
        self._title, self._total, self._begun, self._done = title, total, done, done
        self._start = self._told = time.monotonic()
        self._unit, self._lock = unit, threading.Lock()

    @contextmanager
    def by_the_clock(self) -> Iterator[None]:
        """Look at the clock meanwhile, as a unit may take longer than a line should wait."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(self.until_next()):
                self.advance(0)

        looker = threading.Thread(target=look, daemon=True)
        looker.start()
        try:
            yield
        finally:
            over.set()
            looker.join()

    def until_next(self) -> float:
        """Seconds until a line is due, counted from the last one."""
        return max(0.0, self._told + SECONDS_OF_LINES - time.monotonic())

    def advance(self, n: int) -> None:
        with self._lock:
            self._done += n
            now = time.monotonic()
            if now - self._told < SECONDS_OF_LINES:
                return
            self._told = now
            if self._done == self._total:  # which the last line tells
                return
            if self._total is None or self._done == self._begun:
                counts = "" if self._total is None else f"{self._done:,} of {self._total:,}, "
                so_far = f"{self._title}: {counts}{_clock(now - self._start)} so far"
                print(so_far, file=sys.stderr, flush=True)
            else:
                left = (self._total - self._done) / self._speed(now)
                self._tell(now, f", {_clock(left)} left")

    def end(self, patience: float) -> None:
        now = time.monotonic()
        if self._total is None:
            return
        if self._begun == self._total:
            text = f"{self._title}: {self._total:,} of {self._total:,} were there already"
            print(text, file=sys.stderr, flush=True)
        elif now - self._start >= patience:
            self._tell(now, f", {_clock(now - self._start)} in all")

    def _speed(self, now: float) -> float:
        return (self._done - self._begun) / max(now - self._start, 1e-9)

    def _tell(self, now: float, more: str) -> None:
        text = f"{self._title}: {self._done:,} of {self._total or 0:,}"
        speed = f"{_rate(self._speed(now))} {self._unit}/s"
        print(f"{text}, {speed}{more}", file=sys.stderr, flush=True)


def _rate(speed: float) -> str:
    """Write a number per second, so that a slow one is no zero.

    >>> _rate(312.4), _rate(0.83)
    ('312', '0.8')
    """
    return f"{speed:.0f}" if round(speed) >= 2 else f"{speed:.1f}"


def _clock(seconds: float) -> str:
    """Write a time as a clock does.

    >>> _clock(75.4), _clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
