"""Run two commits side by side on one machine, and compare every result they leave.

    python benchmarks/same_results.py OLD NEW [--work DIR]

Made are: a demo run, a run on clusters, a run over two layers, a scan by two processes, and a scan
that is killed and started again. Shards, splits, tables and JSON must be equal byte by byte (but
for the versions that a manifest tells), the page in all it says, and what commands print line by
line. No hashes are stored, since other processors round otherwise. Exit code 0 if all is equal.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from unbraid.demo.network import load_images

ROOT = Path(__file__).parent.parent
MODEL = '''
import torch
from torchvision.transforms import v2
from unbraid.demo.network import MEAN, SPREAD, load_network

class Brightest(torch.nn.Module):
    """The demo's network without its last layer's names, so that paths are those of a user."""
    def __init__(self):
        super().__init__()
        self.net = load_network()
    def forward(self, x):
        return self.net(x)

def build():
    steps = [v2.Grayscale(), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    return Brightest(), v2.Compose([*steps, v2.Normalize([MEAN], [SPREAD])])
'''
COMMON = ("--model", "own.py:build", "--batch-size", "100")
RUN = ("run", *COMMON, "--data", "data", "--tau", "0.02", "--p", "0.5")
SCAN = ("scan", *COMMON, "--layer", "net.mix", "--data", "data/train")


def main() -> None:
    """Make all results of both commits, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--work", type=Path, default=None, help="where to work; by default gone")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (asked.work or Path(temporary)).resolve()
        results = {name: results_of(name, work) for name in (asked.old, asked.new)}
    old, new = results[asked.old], results[asked.new]
    names = sorted({*old, *new})
    differing = [name for name in names if old.get(name) != new.get(name)]
    for name in names:
        mark = "DIFFERS" if name in differing else "equal"
        print(f"{mark:8}{old.get(name, '-')[:12]:14}{new.get(name, '-')[:12]:14}{name}")
    print(f"{len(names) - len(differing)} of {len(names)} results are equal.")
    sys.exit(1 if differing else 0)


def results_of(commit: str, work: Path) -> dict[str, str]:
    """Make all results of a commit, and hash them."""
    here = work / re.sub(r"\W", "_", commit)
    source = here / "source"
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "x", "-C", source], input=archive.stdout, check=True)
    place = here / "place"
    place.mkdir()
    write_data(place / "data")
    (place / "own.py").write_text(MODEL)
    printed = {
        "demo": unbraid(place, source, "demo", "--out", "demo"),
        "classes": unbraid(place, source, *RUN, "--layer", "net.mix", "--out", "classes"),
        "clusters": unbraid(
            place, source, *RUN, "--layer", "net.mix", "--concepts", "clusters", "--out", "clusters"
        ),
        "layers": unbraid(
            place, source, *RUN, "--layer", "net.mix", "--layer", "net.look.4", "--out", "layers"
        ),
        "two": together(place, source, *SCAN, "--out", "two"),
        "killed": killed(place, source, *SCAN, "--positions", "--out", "killed"),
    }
    found = {f"{name}: printed": digest(text.encode()) for name, text in printed.items()}
    for path in sorted(place.rglob("*")):
        if path.is_file() and path.relative_to(place).parts[0] in printed:
            told = content(path).replace(str(place).encode(), b"PLACE")
            found[str(path.relative_to(place))] = digest(told)
    return found


def write_data(folder: Path) -> None:
    """Write some of the demo's images as class folders."""
    for part, split, n in (("train", "train", 1500), ("val", "test", 500)):
        images = load_images(split)
        for k in range(0, len(images), max(1, len(images) // n)):
            target = folder / part / images.classes[images.targets[k]].replace("/", "-")
            target.mkdir(parents=True, exist_ok=True)
            images.picture(k).save(target / f"{k:05d}.png")


def environment(source: Path) -> dict[str, str]:
    """Let a command use a commit's source."""
    fixed = {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return {**os.environ, **fixed, "PYTHONHASHSEED": "0"}


def unbraid(place: Path, source: Path, *arguments: str) -> str:
    """Run a command to its end; return what it prints."""
    command = [sys.executable, "-m", "unbraid", *arguments]
    done = subprocess.run(
        command, cwd=place, env=environment(source), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed: {done.stderr[-2000:]}")
    return done.stdout


def together(place: Path, source: Path, *arguments: str) -> str:
    """Run a command by two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "unbraid", *arguments]
    subprocess.run(command, cwd=place, env=environment(source), capture_output=True, check=True)
    return ""


def killed(place: Path, source: Path, *arguments: str) -> str:
    """Kill a scan once it has left a shard, and start it again."""
    command = [sys.executable, "-m", "unbraid", *arguments]
    folder = place / arguments[-1]
    started = subprocess.Popen(
        command,
        cwd=place,
        env=environment(source),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while started.poll() is None and not list(folder.glob("shard-*.safetensors")):
        time.sleep(0.01)
    if started.poll() is not None:
        raise SystemExit("The scan ended before it could be killed.")
    started.send_signal(signal.SIGKILL)
    started.wait()
    return unbraid(place, source, *arguments)


def content(path: Path) -> bytes:
    """Return what counts of a file."""
    if path.name == "manifest.json":
        told = json.loads(path.read_text())
        return json.dumps({key: value for key, value in told.items() if key != "versions"}).encode()
    if path.suffix == ".html":  # what it says, whatever the spaces and the order of attributes
        text = re.sub(r"<(style|script).*?</\1>", " ", path.read_text(), flags=re.DOTALL)
        words = re.findall(r'(?:alt|href|d|points|title)="[^"]*"', text)
        plain = html.unescape(re.sub(r"<[^>]*>", " ", text))
        return " ".join([*plain.split(), *words]).encode()
    return path.read_bytes()


def digest(what: bytes) -> str:
    """Hash some bytes."""
    return hashlib.sha256(what).hexdigest()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
