"""Feature visualisation: what the images excite, and how long they take.

    python benchmarks/visualize.py                      # the demo's network
    python benchmarks/visualize.py --networks lite0     # EfficientNet-Lite0, ImageNet weights
    python benchmarks/visualize.py --sheets FOLDER      # also pictures of all images
    python benchmarks/visualize.py --ways contrast --sheets FOLDER  # those of the docs alone

Of every channel that is split, an image of the whole channel and one of each concept channel, by
both objectives and with a fixed spectrum. The network is shown its images; responses of a concept
channel are in standard deviations of its responses to the data set's images, from their mean.
The demo needs nothing but unbraid, `lite0` what `benchmarks/lite0.py` says. Prints Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from lite0 import LAYER as LITE0_LAYER
from lite0 import crop_photographs, load_lite0
from timing import peak_memory, print_head, print_row, seconds
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.visualizing.visualize import STEPS, Watched, watch

N_MEASURED = 200  # images of the data set that tell what a concept channel's responses are like
WAYS: dict[str, dict[str, Any]] = {
    "contrast": {},
    "plain": {"objective": "plain"},
    "fixed spectrum": {"spectrum": True},
}


def split_network(name: str) -> tuple[nn.Module, unbraid.Split, Dataset[Any]]:
    """Split the demo's network, or an ImageNet network by photographs; its images too."""
    if name == "demo":
        model, layer, images, tau = load_network(), LAYER, load_images("train"), 0.03
    else:
        model, layer, tau = load_lite0(), LITE0_LAYER, "auto"
        images = crop_photographs(model)
        images.groups = None
    with tempfile.TemporaryDirectory() as folder:
        scan = unbraid.scan(model, layer, images, folder, batch_size=24)
        split = unbraid.split(scan, unbraid.find(scan, tau=tau))
    return unbraid.apply(model, split), split, images


def usual_responses(watched: Watched, images: Dataset[Any]) -> tuple[Tensor, Tensor]:
    """Mean and spread over images of each channel's mean pre-activation, in rows of responses."""
    places = torch.linspace(0, len(images) - 1, N_MEASURED).long().tolist()
    some = torch.stack([image for image, _ in Subset(images, places)])
    with torch.no_grad():
        means = torch.cat([watched.respond(batch).mean(-1) for batch in some.split(20)])
    return means.mean(0), means.std(0)


def measure(
    features: unbraid.Features, watched: Watched, usual: tuple[Tensor, Tensor]
) -> list[str]:
    """Summarise what the images excite, as cells of a table."""
    own, other, least_of_whole = [], [], []
    for feature in features.features:
        rows = [watched.rows[target] for target in watched.targets_of(feature.channel)[1:]]
        answers = (torch.tensor(feature.responses[1:]) - usual[0][rows]) / usual[1][rows]
        if feature.concept is None:
            least_of_whole.append(float(answers.min()))
            continue
        own.append(float(answers[feature.concept]))
        other.append(max(float(a) for k, a in enumerate(answers) if k != feature.concept))
    right = sum(a > b for a, b in zip(own, other, strict=True))
    means = [sum(values) / len(values) for values in (own, other, least_of_whole)]
    return [
        f"{means[0]:.1f} (least {min(own):.1f})",
        f"{means[1]:.1f} (most {max(other):.1f})",
        f"{right} of {len(own)}",
        f"{means[2]:.1f} (least {min(least_of_whole):.1f})",
    ]


def sheet(features: unbraid.Features, split: unbraid.Split, path: Path) -> None:
    """Write all pictures as one, titled, two channels a row, at most eight channels."""
    side, gap, head = 128, 8, 28  # pixels: of a picture, between pictures, for a title
    channels = features.channels[:8]
    block = (1 + max(len(split[o].concepts) for o in channels)) * (side + gap) + 3 * gap
    size = 2 * block - 2 * gap, -(-len(channels) // 2) * (side + head + gap) + gap
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for place, channel in enumerate(channels):
        concepts = split[channel].concepts
        titles = [f"channel {channel}", *map(split.name, concepts)]
        for column, title in enumerate(titles):
            left = gap + place % 2 * block + column * (side + gap)
            top = gap + place // 2 * (side + head + gap)
            lines = [""]
            for word in title.split():
                longer = f"{lines[-1]} {word}".strip()
                fits = draw.textlength(longer, font) <= side
                lines[-1:] = [longer] if fits else [lines[-1], word]
            at = (left, top + head - 3)
            draw.multiline_text(at, "\n".join(lines), "black", font, anchor="ld", spacing=1)
            picture = features.image(channel, column - 1 if column else None)
            how = Image.Resampling.NEAREST if picture.width < side else Image.Resampling.LANCZOS
            page.paste(picture.convert("RGB").resize((side, side), how), (left, top + head))
    path.parent.mkdir(parents=True, exist_ok=True)
    page.quantize(256).save(path, optimize=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=("demo", "lite0"), default=["demo"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", nargs="+", type=int, default=[STEPS])
    parser.add_argument("--channels", type=int, default=None, help="only the first few")
    parser.add_argument("--sheets", type=Path, default=None)
    asked = parser.parse_args()
    columns = ("own concept, sd", "strongest other, sd", "own above other", "whole: weakest, sd")
    times = ("s an image", "processor s", "s a channel")
    print_head("network", "images", "steps", *columns, *times)
    for name in asked.networks:
        model2, split, images = split_network(name)
        watched = watch(model2, split.layer.name)
        usual = usual_responses(watched, images)
        channels = [part.channel for part in split.channels][: asked.channels]
        for steps, way in ((steps, way) for steps in asked.steps for way in asked.ways):
            made: list[unbraid.Features] = []
            job = (model2, split.layer.name, images, channels)
            wall, cpu = seconds(
                lambda j=job, n=steps, w=way, m=made: m.append(
                    unbraid.visualize(*j, steps=n, **WAYS[w])
                )
            )
            n = len(made[0].features)
            figures = (f"{wall / n:.2f}", f"{cpu / n:.2f}", f"{wall / len(channels):.1f}")
            print_row(name, way, steps, *measure(made[0], watched, usual), *figures)
            if asked.sheets is not None:
                sheet(made[0], split, asked.sheets / f"{name}-{way.replace(' ', '-')}-{steps}.png")
    print(f"\nPeak memory {peak_memory():.2f} GiB.")


if __name__ == "__main__":
    main()
