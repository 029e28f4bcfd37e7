"""Places beside whole images on the tokens of a small transformer: which find planted concepts.

    python benchmarks/place_tokens.py [--images 3000] [--planted 12] [--places 1000] [--steps 700]

A vision transformer with CLS and four registers (timm's vit_small_patch14_reg4_dinov2, with patches
of 4 pixels, 3 blocks, 64 wide) is trained on Fashion-MNIST. To a layer that works on tokens,
channels are added, each the sum of two of its own, brought to one strength, which nothing behind
sees. Pictures as they are, and pasted: the left 16 columns of one beside the right 12 of another.
The rest is as in places.py, `compare`. Needs timm, and Fashion-MNIST as IDX files (Debian:
`dataset-fashion-mnist`).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from places import compare, plant
from timing import print_row
from train_demo import read_split
from unbraid.demo.network import normalise

FOLDER = Path("/usr/share/datasets/fashion-mnist")
LAYERS = ("blocks.1.mlp.fc1", "blocks.2.mlp.fc1", "blocks.2.mlp.fc2")
CUT = 16  # columns of the picture on the left: whole patches


class Clothes(Dataset[tuple[Tensor, int]]):
    """The first pictures of a split, perhaps pasted."""

    def __init__(self, split: str, n: int, *, pasted: bool) -> None:
        """Read them; a pasted one has the label of its left half."""
        pictures, labels = read_split(FOLDER, split)
        self.images, self.targets = normalise(pictures[:n]), labels[:n].tolist()
        if pasted:
            other = list(range(len(self.images)))
            random.Random(0).shuffle(other)
            halves = (self.images[..., :CUT], self.images[other][..., CUT:])
            self.images = torch.cat(halves, 3)

    def __len__(self) -> int:
        """Number of pictures."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return a picture (1, 28, 28) and a label."""
        return self.images[index], self.targets[index]


def trained(steps: int, weights: Path | None) -> nn.Module:
    """Train the transformer, or read it where it was kept."""
    import timm

    torch.manual_seed(0)
    shape = {"img_size": 28, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 3}
    shape |= {"num_heads": 4, "num_classes": 10, "init_values": 1e-2}
    model: nn.Module = timm.create_model("vit_small_patch14_reg4_dinov2", **shape)
    if weights is not None and weights.exists():
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()
    pictures, labels = read_split(FOLDER, "train")
    images, known = normalise(pictures), torch.tensor(labels.tolist())
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(0, len(images), (128,))
        batch = images[chosen].flip(3) if step % 2 else images[chosen]
        loss = nn.functional.cross_entropy(model(batch), known[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    if weights is not None:
        torch.save(model.state_dict(), weights)
    return model.eval()


def accuracy(model: nn.Module, images: Clothes) -> float:
    """Part of the pictures that the network names right."""
    with torch.no_grad():
        top = torch.cat([model(batch).argmax(1) for batch in images.images.split(500)])
    return float((top == torch.tensor(images.targets)).double().mean())


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--planted", type=int, default=12)
    parser.add_argument("--places", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--no-split", action="store_true", help="only find, which is fast")
    parser.add_argument("--weights", type=Path, help="file of the trained network, made or read")
    asked = parser.parse_args()
    unbraid.keep_memory()
    model = trained(asked.steps, asked.weights)
    seen = Clothes("train", asked.images, pasted=False)
    held_out = Clothes("test", asked.images // 2, pasted=False)
    print(f"Accuracy on {len(held_out)} pictures: {accuracy(model, held_out):.3f}")
    pairs = {f"{name}.layer": plant(model, name, seen, asked.planted) for name in asked.layers}
    for kind in ("whole", "pasted"):
        scans = []
        with tempfile.TemporaryDirectory() as out:
            for split, n in (("train", asked.images), ("test", asked.images // 2)):
                images = Clothes(split, n, pasted=kind == "pasted")
                where = Path(out) / split
                options = {"labels": "predicted", "places": asked.places, "batch_size": 250}
                scans.append(unbraid.scan(model, list(pairs), images, where, **options))
            for name, own in pairs.items():
                both = scans[0][name], scans[1][name]
                for row in compare(*both, own, recover=not asked.no_split):
                    print_row(kind, name, *row)


if __name__ == "__main__":
    main()
