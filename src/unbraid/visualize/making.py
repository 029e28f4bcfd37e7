"""Images optimised to excite channels: many side by side, each for its own."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from unbraid.errors import LayerError, ModelError, UsageError
from unbraid.networks import device_of, unwrap
from unbraid.progress import image_progress
from unbraid.relevance import undisturbed
from unbraid.visualize.canvas import blank_canvas, shake
from unbraid.visualize.features import Feature, Features
from unbraid.visualize.pixels import Pixels
from unbraid.visualize.responses import Score, Target, Watched, targets_of, watch
from unbraid.weights import hash_weights

_RATE = 0.1  # of Adam, in units of the coefficients' spread
_RATE_OF_PHASES = 0.2  # radians
# Pixels side by side: few keep memory, and the time to the next look at the clock, within bounds;
# accelerators ask for more.
_PIXELS, _PIXELS_OF_ACCELERATORS = 3 * 224 * 224, 32 * 224 * 224
_FULL = 0.5  # quantile of the accumulated gradients from which on a picture is opaque


@dataclass(frozen=True)
class Recipe:
    """How images are made; the arguments of `unbraid.visualize`."""

    n: int
    steps: int
    objective: Literal["contrast", "plain"]
    spectrum: bool
    seed: int

    def __post_init__(self) -> None:
        """Refuse what no image can be made by."""
        if self.objective not in ("contrast", "plain"):
            raise UsageError(
                f"There is no objective {self.objective!r}; use 'contrast' or 'plain'."
            )


def make_features(
    model: nn.Module,
    layer: str | nn.Module,
    pixels: Pixels,
    channels: Sequence[int] | None,
    recipe: Recipe,
    seconds: float | None = None,
    progress: bool = False,
) -> Features:
    """Make images for channels and their concept channels; see `unbraid.visualize`."""
    watched = watch(unwrap(model), layer)
    targets = targets_of(watched, channels)
    device = device_of(watched.layer)
    pixels = _on(device, pixels)
    at_once = _PIXELS if device.type == "cpu" else _PIXELS_OF_ACCELERATORS
    most = max(1, at_once // math.prod(pixels.size))
    features: list[Feature] = []
    begun = time.monotonic()
    done = 0
    n_images = recipe.n * sum(map(len, targets.values()))
    with (
        image_progress("Visualising", n_images, show=progress) as count,
        undisturbed(watched.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for block in _blocks(targets, recipe.n, most):
            if done and seconds is not None and time.monotonic() - begun > seconds:
                break
            wanted = [(t, i) for o in block for t in targets[o] for i in range(recipe.n)]
            made: list[tuple[float, Feature]] = []
            for start in range(0, len(wanted), most):
                part = wanted[start : start + most]
                made += _optimise(watched, pixels, part, recipe)
                count(len(part))
            for start in range(0, len(wanted), recipe.n):
                best = sorted(made[start : start + recipe.n], key=lambda m: m[0], reverse=True)
                features += [replace(f, place=place) for place, (_, f) in enumerate(best)]
            done += len(block)
    settings = {**asdict(recipe), "size": list(pixels.size)}
    return Features(
        layer=watched.spec.name,
        weights=hash_weights(watched.model),
        features=tuple(features),
        settings=settings,
        left_out=len(targets) - done,
    )


def _blocks(targets: dict[int, list[Target]], n: int, most: int) -> list[list[int]]:
    """Part channels into blocks of as many as fit side by side, at least one."""
    blocks: list[list[int]] = []
    room = 0
    for channel, own in targets.items():
        needed = n * len(own)
        if needed > room:
            blocks.append([])
            room = most
        blocks[-1].append(channel)
        room -= needed
    return blocks


def _optimise(
    watched: Watched, pixels: Pixels, wanted: Sequence[tuple[Target, int]], recipe: Recipe
) -> list[tuple[float, Feature]]:
    """Optimise images side by side and score them; Adam treats each number by itself."""
    device = pixels.low.device
    targets = [target for target, _ in wanted]
    canvas = blank_canvas(pixels, [recipe.seed + i for _, i in wanted], recipe.spectrum)
    rate = _RATE_OF_PHASES if recipe.spectrum else _RATE
    optimiser = torch.optim.Adam([canvas.numbers], lr=rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    score = Score(watched, targets, recipe.objective == "contrast").to(device)
    drawn_on = torch.zeros(len(wanted), *pixels.size, dtype=torch.float32, device=device)
    for _ in range(recipe.steps):
        images = canvas.images()
        images.retain_grad()
        scores = score(watched.respond(_as_input(watched, pixels, shake(images, generator))))
        if not scores.requires_grad:
            raise LayerError(
                f"Layer {watched.spec.name!r} does not depend on the image in a way that has a "
                "gradient; choose another layer."
            )
        optimiser.zero_grad()
        _differentiate(-scores.sum())
        optimiser.step()
        assert images.grad is not None
        drawn_on += images.grad.abs().sum(1)
    with torch.no_grad():
        images = canvas.images()
        responses = watched.respond(_as_input(watched, pixels, images))
        scores = score(responses)
    if not bool(scores.isfinite().all()):
        raise ModelError(
            "The network answers with NaN or infinite numbers to images made for it; load sound "
            "weights, or take fewer steps."
        )
    made = []
    for n, (channel, concept) in enumerate(targets):
        means = [responses.whole[n, channel].float().mean()]
        if responses.concepts is not None:
            rows = [watched.rows[channel, k] for k in watched.concepts_of(channel)]
            means += list(responses.concepts[n, rows].float().mean(-1))
        picture = _picture(images[n], _opacity(drawn_on[n]))
        answers = tuple(float(mean) for mean in means)
        made.append((float(scores[n]), Feature(channel, concept, 0, picture, answers)))
    return made


def _differentiate(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:  # of a network of anyone's own; also for want of memory
        raise ModelError(
            f"The network gives no gradient of its image ({str(error).splitlines()[0]}); choose "
            "another layer, or a smaller size if memory is short."
        ) from error


def _as_input(watched: Watched, pixels: Pixels, images: Tensor) -> Tensor:
    """From a scale of 0 to 1 to what the network takes."""
    low, high = pixels.low[:, None, None], pixels.high[:, None, None]
    return (low + (high - low) * images).to(next(watched.layer.parameters()).dtype)


def _opacity(drawn_on: Tensor) -> Tensor:
    """From accumulated gradients (H, W) to opacity, 0 to 1, smoothed a little."""
    reach = round(max(drawn_on.shape) / 64)
    smooth = F.avg_pool2d(drawn_on[None, None], 2 * reach + 1, 1, reach, count_include_pad=False)[
        0, 0
    ]
    full = smooth.flatten().quantile(_FULL)
    return (smooth / full).clamp(0, 1) if full > 0 else torch.ones_like(smooth)


def _picture(image: Tensor, opacity: Tensor) -> Image.Image:
    """From (C, H, W) and (H, W), 0 to 1, to RGBA; colours other than three are shown as grey."""
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    values = (255 * torch.cat([image, opacity[None]])).round().to(torch.uint8)
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())


def _on(device: torch.device, pixels: Pixels) -> Pixels:
    moved: dict[str, Any] = {
        name: value.to(device) for name, value in vars(pixels).items() if isinstance(value, Tensor)
    }
    return replace(pixels, **moved)
