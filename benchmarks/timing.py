"""Time ways of doing something in turn, so that a drift of the machine's speed hits all of them.

Needs nothing but unbraid.
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

Seconds = tuple[float, float]  # of wall time, and of processors, those of workers included


def describe_machine() -> str:
    """Name processor, cores, memory and the versions that matter, but not the owner."""
    cpu = platform.processor() or "unknown processor"
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no accelerator"
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {accelerator}; "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def seconds(way: Callable[[], object]) -> Seconds:
    """Time one way once."""
    start, start_cpu = time.perf_counter(), _processor_time()
    way()
    return time.perf_counter() - start, _processor_time() - start_cpu


def _processor_time() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def in_turn(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True, aloud: bool = True
) -> dict[str, list[Seconds]]:
    """Time all ways round by round, every second round backwards, after one untimed to warm up."""
    taken: dict[str, list[Seconds]] = {name: [] for name in ways}
    for way in ways.values() if warm else ():
        way()
    for number in range(rounds):
        for name in ways if number % 2 == 0 else reversed(ways):
            taken[name].append(seconds(ways[name]))
        if aloud:
            line = ", ".join(f"{name} {own[-1][0]:.2f} s" for name, own in taken.items())
            print(f"round {number + 1}: {line}", flush=True)
    return taken


def median(taken: Sequence[Seconds], kind: int) -> float:
    """Median of wall time (kind 0) or processor time (1)."""
    return statistics.median(own[kind] for own in taken)


def ratios(taken: Sequence[Seconds], base: Sequence[Seconds], kind: int) -> list[float]:
    """Ratios within each round, of wall time (kind 0) or processor time (1)."""
    return [own[kind] / other[kind] for own, other in zip(taken, base, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Median, and from least to most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def peak_memory() -> float:
    """Most memory that this process held so far, GiB (Linux; getrusage counts the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def alone(script: str, *arguments: object) -> str:
    """Run a script in a process of its own; return the last line that it prints."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.splitlines()[-1]


def print_head(*columns: str) -> None:
    """Print the machine and the head of a table in Markdown."""
    print(f"\nMachine: {describe_machine()}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))


def print_row(*cells: object) -> None:
    """Print a row of a table in Markdown."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
