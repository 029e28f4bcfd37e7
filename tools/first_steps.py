"""Take the steps of a new user with an unbraid that is installed, outside of its source.

    python tools/first_steps.py BIN FOLDER

BIN is the `bin` folder of the environment. FOLDER gets the demo, a network and pictures as of one's
own, their run and what comes after it. Exit code 0 if each step ends and says what it should, else
1, with what a step said in its place.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

OWN = """
import numpy as np
from unbraid.demo.network import CLASSES, load_network, normalise

def preprocess(picture):
    return normalise(np.asarray(picture.convert("L").resize((28, 28))))

def build():
    return load_network(), preprocess, CLASSES
"""
# Pictures of the demo in class folders, and one more.
PICTURES = """
from pathlib import Path
from unbraid.demo.network import CLASSES, load_images
for split, part, n in (("train", "train", 40), ("test", "val", 10)):
    images, seen = load_images(split), [0] * len(CLASSES)
    for k, label in enumerate(images.targets):
        if seen[label] < n:
            seen[label] += 1
            file = Path("pictures") / part / CLASSES[label] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            images.picture(k).save(file)
load_images("test").picture(0).save("picture.png")
"""
LOAD = """
import torch, unbraid
from own import build
model, _, _ = build()
images = torch.randn(4, 1, 28, 28)
model2 = unbraid.load_split(model, "shared")
assert torch.equal(model(images), model2(images))
print("the same outputs")
"""


class Step(NamedTuple):
    """A command, its exit code and a pattern of what it says."""

    words: str
    says: str
    code: int = 0


LONGEST = 3600.0  # seconds that a step may take
PATIENCE = 120.0  # seconds until the app names its address, sends its page, or stops
EXPLORE = "unbraid explore run --model own.py:build"  # runs until it is stopped
STEPS = (
    Step("python pictures.py", ""),
    Step("unbraid --version", r"^\d+\.\d+"),
    Step("unbraid --help", "sensitivity"),
    Step("unbraid nothing", "nothing", 2),
    Step("unbraid find nowhere --tau 2", "nowhere", 1),
    Step("unbraid run --model own.py:build --layer mix --data nowhere --out x", "nowhere", 1),
    Step("unbraid demo --out demo-run", "Report: "),
    Step("unbraid check demo-run", "sound"),
    Step("unbraid layers own.py:build", "mix"),
    Step("unbraid run --model own.py:build --layer mix --data pictures --out run", "Report: "),
    Step("unbraid run --model own.py:build --layer mix --data pictures --out run", "Report: "),
    Step("unbraid report run", "Report: "),
    Step("unbraid figure run --channel 0 --out figure.png", "Figure: "),
    Step("unbraid explain run picture.png --model own.py:build", "concept channels"),
    Step("unbraid edit run --off 0.0 --model own.py:build --out edited", "Page: "),
    Step("unbraid share run --out shared", "Shared: "),
    Step("python load.py", "the same outputs"),
    Step(EXPLORE, ""),
)
_WRONG = re.compile(r"Traceback|FutureWarning|DeprecationWarning")  # what no step may say


def take(step: Step, folder: Path) -> str:
    """Take one step: "" or what is wrong with it."""
    asked: dict[str, Any] = {"cwd": folder, "capture_output": True, "text": True}
    try:
        done = subprocess.run(step.words.split(), check=False, timeout=LONGEST, **asked)
    except subprocess.TimeoutExpired:
        return f"no end after {LONGEST:g} seconds"
    said = done.stdout + done.stderr
    right = done.returncode == step.code and re.search(step.says, said) and not _WRONG.search(said)
    return "" if right else f"exit code {done.returncode}, not {step.code}:\n{said}"


def explore(folder: Path) -> str:
    """Open the app, fetch its page, stop it as ctrl-C does: "" or what is wrong."""
    words, log = [*EXPLORE.split(), "--no-open"], folder / "explore.log"
    with (
        log.open("w") as told,
        subprocess.Popen(words, cwd=folder, stdout=told, stderr=subprocess.STDOUT) as app,
    ):
        try:
            wrong = _fetch(app, log)
            app.send_signal(signal.SIGINT)
            app.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            wrong = f"it does not stop in {PATIENCE:g} seconds"
        finally:
            app.kill()
    said = log.read_text()
    if not wrong and app.returncode:
        wrong = f"exit code {app.returncode}, not 0"
    if not wrong and _WRONG.search(said):
        wrong = "it says what no step may say"
    return f"{wrong}:\n{said}" if wrong else ""


def _fetch(app: subprocess.Popen[bytes], log: Path) -> str:
    """Fetch the page of an app once it names its address: "" or what is wrong."""
    end = time.monotonic() + PATIENCE
    while (address := re.search(r"http://\S+(?=\s)", log.read_text())) is None:
        if app.poll() is not None or time.monotonic() > end:
            return "no address is named"
        time.sleep(0.1)
    try:
        with urlopen(address[0], timeout=PATIENCE) as page:
            is_page = b"<!DOCTYPE html>" in page.read()
    except OSError as error:
        return f"{address[0]} cannot be fetched ({error})"
    return "" if is_page else f"{address[0]} is no page"


def main(binaries: Path, folder: Path) -> int:
    """Take every step, and say how it went; how many went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.pop("PYTHONPATH", None)  # or it would not be the installed one
    for name, code in (("own.py", OWN), ("pictures.py", PICTURES), ("load.py", LOAD)):
        (folder / name).write_text(code)
    n_wrong = 0
    for step in STEPS:
        wrong = explore(folder) if step.words == EXPLORE else take(step, folder)
        n_wrong += bool(wrong)
        print(f"{'failed' if wrong else 'ok':6} {step.words}\n{wrong}".rstrip(), flush=True)
    return n_wrong


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()) > 0)
