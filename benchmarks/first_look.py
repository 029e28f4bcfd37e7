"""Time a first look as a user has it: `unbraid run --quick` on a folder of pictures, to its page.

    python benchmarks/first_look.py PICTURES MODEL LAYER

PICTURES is a folder of class folders, MODEL a FILE.py:FUNCTION or torchvision:NAME. The time is
that of the whole command, wall and processor, with torch's own threads; the load says how much of
the machine it had. It ends with what was found.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Print a line for the machine, and one for each time."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pictures", "model", "layer"):
        parser.add_argument(name)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "unbraid", "run", "--quick", "--model", asked.model]
        command += ["--layer", asked.layer, "--data", asked.pictures, "--out", str(out)]
        load, start = os.getloadavg()[0], time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = time.monotonic() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        page = out / "quick/report.html"
        assert page.exists()
        print(f"{os.cpu_count()} cores, load {load:.1f} before, {os.getloadavg()[0]:.1f} after")
        print(f"wall {wall:.0f} s, processor {used.ru_utime + used.ru_stime:.0f} s")
        print(f"page of {page.stat().st_size / 1e6:.1f} MB")
        print(next(line for line in done.stdout.splitlines() if line.startswith("First look")))


if __name__ == "__main__":
    main()
