"""A folder in which the commands of the documents run, as they stand but for their placeholders.

Weights that would be downloaded are random ones, put where torch keeps what it has downloaded.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torchvision import models

from documents import Command
from unbraid.__main__ import main
from unbraid.demo.network import CLASSES, load_images

PLACEHOLDERS = {  # what a command holds in place of something of the reader's own
    "demo --out DIR": "demo --out demo-run",
    "DIR": "photos",
    **{"imagenet/train": "photos/train", "DIR/train": "photos/train"},
    "RUN": "demo-run",
    "FOLDER": "demo-run",
    "SCAN": "demo-run/scan-train",
    "MODEL": "clothes.py:build",
    "N": "2",
    "torchrun --nproc-per-node 8": "torchrun --standalone --nproc-per-node 2",  # two cores
}
_SCAN = "unbraid scan --model clothes.py:build --layer mix --data clothes/train --out scans"
_RUN = "unbraid run --model clothes.py:build --layer mix --data clothes --out"
LEFT_OUT = {  # what the text leaves out of a command, or the command to which it names an option
    "unbraid run --layer look.8 --layer mix": "--model clothes.py:build --data clothes --out two",
    "unbraid run --layer all": "--model clothes.py:build --data clothes --out all --no-features",
    "--concepts clusters": f"{_RUN} clusters",
    "--concepts whole": f"{_RUN} whole",
    "unbraid run --quick": "--model clothes.py:build --layer mix --data clothes --out first-look",
    "--concepts classes": f"{_RUN} classes",
    "--data DIR/train": "unbraid scan --model clothes.py:build --layer mix --out divided",
    "--labels predicted": f"{_SCAN}/predicted",
    "--workers N": f"{_SCAN}/workers",
    "--autocast": f"{_SCAN}/autocast",
    "--channels-last": f"{_SCAN}/channels-last",
    "--no-channels-last": f"{_SCAN}/channels-first",
    "--no-features": f"{_RUN} plain",
    "--target multilabel": f"{_RUN} several-labels",
    "--target none": f"{_RUN} without-target",
    "unbraid run --target none": "--model clothes.py:build --layer mix --data clothes --out bare",
    "--labels none": f"{_SCAN}/without-labels --target none",
    "--batch-size 1": f"{_SCAN}/one-by-one",
    "--output scores": "unbraid layers clothes.py:build_scores",
    "--layer 'layer4.*.conv3'": (
        "unbraid scan --model torchvision:resnet50 --weights random --data photos/val --out pattern"
    ),
}
SAYS = {  # a command, and what it prints; one that says none of them only writes
    **dict.fromkeys(["demo", "run", "report"], "Report: "),
    **{"circuit": "Circuits: demo-run/circuits/0.json"},
    **{"explain": "Pictures and figures: demo-run/explained/photo.png", "layers": " Conv2d "},
    **{"edit": "Page: edited/before_after.html", "suggest": "elsewhere"},
    **{"share": "Shared: shared/README.md"},
    **{"scan": "Scanned ", "sensitivity": "gamma", "check": " sound."},
    "reproduce": "0 of 20 pairs agree.",  # with random weights, hence exit code 1
}
OWN = '''
"""The demo's network as anyone's own."""
import numpy as np
from unbraid.demo.network import CLASSES, DemoNet, load_network, normalise

class Scores(DemoNet):
    def forward(self, images):
        return {"images": images, "scores": super().forward(images)}

def preprocess(picture):
    return normalise(np.asarray(picture.convert("L").resize((28, 28))))

def build():
    return load_network(), preprocess, CLASSES

def build_scores():
    return Scores(), preprocess, CLASSES
'''

OF_TENSORS = '''
"""A network of tensors."""
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = nn.{kind}({n}, 8, 5), nn.ReLU(), nn.{kind}(8, 8, 5), nn.ReLU()
    pooled = nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    return nn.Sequential(*layers, *pooled, nn.Linear(8, 2))
'''


DINO = '''
"""An encoder with the names of layers and outputs that Hugging Face's DINOv2 has."""
import torch
from torch import nn

class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 32, 32)
        parts = {"fc1": (8, 16), "fc2": (16, 8)}
        layers = [
            nn.ModuleDict({"mlp": nn.ModuleDict({k: nn.Linear(*n) for k, n in parts.items()})})
            for _ in range(12)
        ]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).mT
        for layer in self.encoder["layer"]:
            x = x + layer["mlp"]["fc2"](layer["mlp"]["fc1"](x).relu())
        return {"last_hidden_state": x, "pooler_output": x.mean(1)}

def build():
    torch.manual_seed(0)
    return Encoder().eval()
'''


class Place:
    """A folder with what the commands ask for; what was run there is not run again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, tuple[int, str]] = {}
        (folder / "clothes.py").write_text(OWN)
        (folder / "dinov2.py").write_text(DINO)
        for split, part, n in (("train", "train", 20), ("test", "val", 10)):
            images = load_images(split)
            for label, kind in enumerate(CLASSES):
                own = [k for k, other in enumerate(images.targets) if other == label][:n]
                for name, first in (("clothes", n), ("photos", n // 5 if label < 2 else 0)):
                    for k in own[:first]:
                        file = folder / name / part / kind / f"{k}.png"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        images.picture(k).save(file)
        load_images("test").picture(0).save(folder / "photo.png")
        self._write_tensors("sounds", "Conv1d", (1, 2000), ("bell", "drum"))
        self._write_tensors("fields", "Conv2d", (6, 16, 16), ("maize", "wheat"))
        self._write_tensors("satellite", "Conv2d", (13, 16, 16), ("maize", "wheat"))
        for file in (folder / "satellite").rglob("*.npy"):  # bands last, as GDAL writes them
            bands = {"photometric": "minisblack", "planarconfig": "contig"}
            tifffile.imwrite(file.with_suffix(".tif"), np.load(file).transpose(1, 2, 0), **bands)
            file.unlink()
        hub = folder / "torch/hub/checkpoints"
        hub.mkdir(parents=True)
        torch.save(models.resnet50().state_dict(), hub / "random")
        for weights in models.ResNet50_Weights:
            os.link(hub / "random", hub / Path(weights.url).name)

    def _write_tensors(
        self, name: str, kind: str, shape: tuple[int, ...], classes: tuple[str, ...]
    ) -> None:
        (self.folder / f"{name}.py").write_text(OF_TENSORS.format(kind=kind, n=shape[0]))
        drawn = np.random.default_rng(0)
        for label, own in enumerate(classes):
            for part, n in (("train", 20), ("val", 10)):
                (self.folder / name / part / own).mkdir(parents=True)
                for k in range(n):
                    values = drawn.normal(label, 1 + label, shape).astype(np.float32)
                    np.save(self.folder / name / part / own / f"{k}.npy", values)

    def run(self, command: Command) -> None:
        """Run a command with its placeholders filled in, and look at what it leaves and says."""
        text = filled_in(command.text)
        if "demo-run" in text and not text.startswith("unbraid demo"):
            self.run(Command("unbraid demo --out demo-run"))
        words = shlex.split(text)
        if text not in self.done:
            self.done[text] = self.call(words)
        code, said = self.done[text]
        name = words[words.index("unbraid") + 1]
        assert code == int(name == "reproduce"), said
        assert SAYS.get(name, "") in said
        if "--out" in words:
            out = self.folder / words[words.index("--out") + 1]
            assert any(f.is_file() and f.stat().st_size for f in (out, *out.rglob("*")))
            assert name not in ("demo", "run") or list(out.rglob("report.html"))

    def call(self, words: list[str]) -> tuple[int, str]:
        """Run one command: exit code, and all that it said."""
        hub = {"TORCH_HOME": str(self.folder / "torch")}
        if words[0] == "torchrun":
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *words[1:]],
                **{"cwd": self.folder, "env": os.environ | hub, "check": False},
                **{"capture_output": True, "text": True},
            )
            return done.returncode, done.stdout + done.stderr
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
            patch.chdir(self.folder)
            patch.setattr(sys, "argv", words)
            patch.setenv("TORCH_HOME", hub["TORCH_HOME"])
            with redirect_stderr(said), pytest.raises(SystemExit) as stopped:
                main()
        return int(stopped.value.code or 0), said.getvalue()


def filled_in(text: str) -> str:
    """Add what the text leaves out, and put something in every placeholder's place."""
    rest = LEFT_OUT.get(text, "")
    text = f"{rest} {text}" if text.startswith("--") else f"{text} {rest}".strip()
    for name, something in PLACEHOLDERS.items():
        text = re.sub(rf"(?<!\S){re.escape(name)}(?!\S)", something, text)
    return text
