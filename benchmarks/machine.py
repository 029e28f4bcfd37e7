"""Name the machine that a figure was measured on, without naming its owner.

Needs nothing but unbraid.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def describe_machine() -> str:
    """Return processor, cores, memory and the versions that matter, on one line."""
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
