"""Feature visualisation: images optimised to excite channels, many side by side."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import flag, real_number, whole_number, whole_numbers
from unbraid.base.errors import LayerError, ModelError, UsageError, brief
from unbraid.base.modes import callers_device, in_plain_modes
from unbraid.images.batches import image_progress
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.layers import describe, resolve_layer
from unbraid.networks.relevance import never_ran, undisturbed
from unbraid.networks.spec import LayerSpec, channels_first
from unbraid.networks.weights import hash_weights
from unbraid.surgery.split_layer import SplitLayer
from unbraid.visualizing.canvas import Pixels, blank_canvas, pixels_of, shake
from unbraid.visualizing.features import Feature, Features

STEPS = 128  # of the optimiser; fewer and more: docs/evidence-visualisation.md
_RATE = 0.1  # of Adam, in units of the coefficients' spread
_RATE_OF_PHASES = 0.2  # radians
# Pixels side by side: few keep memory, and the time to the next look at the clock, within bounds;
# accelerators ask for more.
_PIXELS, _PIXELS_OF_ACCELERATORS = 3 * 224 * 224, 32 * 224 * 224
_FULL = 0.5  # quantile of the accumulated gradients from which on a picture is opaque

Target = tuple[int, int | None]  # a channel and a concept, None for the whole channel


@dataclass(frozen=True)
class _Recipe:
    n: int
    steps: int
    objective: Literal["contrast", "plain"]
    spectrum: bool
    seed: int


@in_plain_modes
def visualize(
    model: nn.Module,
    layer: str | nn.Module,
    dataset: Dataset[Any],
    channels: Sequence[int] | None = None,
    *,
    n: int = 1,
    steps: int = STEPS,
    size: tuple[int, int] | None = None,
    objective: Literal["contrast", "plain"] = "contrast",
    spectrum: bool = False,
    seed: int = 0,
    seconds: float | None = None,
    progress: bool = False,
) -> Features:
    """Make images that excite channels, and each of their concept channels, most.

    Of each channel an image is optimised for the mean pre-activation z over positions; of each
    concept channel k one for the mean of z_k, less that of max(z_l, 0) of every other concept
    channel l of the same channel (objective "contrast"). Images do not depend on one another. The
    network stays as it was and computes in eval mode, with the gates and clamps that are in force.

    Args:
        model: from `unbraid.apply` in the exact form; of any other network only whole channels are
            visualised.
        layer: the layer, by name or itself.
        dataset: of (image tensor (C, H, W), label), as the network takes them. A sample of 128 of
            its images tells size, range and colours of images, and their spectrum.
        channels: which ones; by default those that were split.
        n: images of each, from different starts.
        steps: of the optimiser.
        size: height and width in pixels; by default that of the images, or of the middle one of
            images of several sizes.
        objective: "plain" maximises z_k alone, whatever else the image excites.
        spectrum: fix the magnitude of every spatial frequency to the mean of the sample's and
            optimise phases alone, for more natural looks and weaker responses.
        seed: the same seed gives the same images, on a CPU to the last bit.
        seconds: begin no more channels after that long, the first ones apart; `left_out` tells how
            many channels are missing.
        progress: show a progress bar.

    Returns:
        The images, as pictures, with the responses that they reach.

    Raises:
        UsageError: an argument is out of range, or no channel is given where none was split.
        LayerError: the network has no such layer, or the layer does not depend on the image.
        DataError: the data set gives no pictures, or all are of one colour.
        ModelError: the network fails on such images.

    Source:
        Olah et al. 2017, Feature Visualization, doi:10.23915/distill.00007 (Fourier basis,
        decorrelated colours, transformations); Fel et al. 2023, arXiv:2306.06805 (fixed spectrum,
        transparency).
    """
    recipe = _Recipe(
        whole_number("n", n, 1),
        whole_number("steps", steps, 1),
        objective,
        flag("spectrum", spectrum),
        whole_number("seed", seed),
    )
    if objective not in ("contrast", "plain"):
        raise UsageError(f"There is no objective {objective!r}; use 'contrast' or 'plain'.")
    seconds = math.inf if seconds is None else real_number("seconds", seconds)
    if not seconds >= 0:
        raise UsageError(f"seconds is {seconds:g}; it must be 0 or more.")
    pixels = pixels_of(dataset, size)
    watched = watch(unwrap(model), layer)
    targets = _targets_of(watched, channels)
    device = device_of(watched.layer)
    pixels = pixels.to(device)
    at_once = _PIXELS if device.type == "cpu" else _PIXELS_OF_ACCELERATORS
    most = max(1, at_once // math.prod(pixels.size))
    n_images = recipe.n * sum(map(len, targets.values()))
    features: list[Feature] = []
    begun = time.monotonic()
    with (
        image_progress("Visualising", n_images, show=progress) as advance,
        undisturbed(watched.model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for block in _blocks(targets, recipe.n, most):
            if features and time.monotonic() - begun > seconds:
                break
            wanted = [(t, i) for o in block for t in targets[o] for i in range(recipe.n)]
            made: list[tuple[float, Feature]] = []
            for start in range(0, len(wanted), most):
                part = wanted[start : start + most]
                made += _optimise(watched, pixels, part, recipe)
                advance(len(part))
            for start in range(0, len(wanted), recipe.n):
                best = sorted(made[start : start + recipe.n], key=lambda m: m[0], reverse=True)
                features += [replace(f, place=place) for place, (_, f) in enumerate(best)]
    settings = {**asdict(recipe), "size": list(pixels.size)}
    weights = hash_weights(watched.model)
    left_out = len(targets) - len({f.channel for f in features})
    return Features(watched.spec.name, weights, tuple(features), settings, left_out)


@dataclass(frozen=True, eq=False)
class Watched:
    """A network and the layer in it that is watched."""

    model: nn.Module
    layer: nn.Module
    spec: LayerSpec
    rows: dict[Target, int]  # where each channel and each concept channel stands in responses

    def targets_of(self, channel: int) -> list[Target]:
        """The whole channel, then each of its concept channels, in the order of the rows."""
        return [target for target in self.rows if target[0] == channel]

    def respond(self, images: Tensor) -> Tensor:
        """Show images to the network; return pre-activations, (N, rows, P positions)."""
        kept: dict[nn.Module, list[Tensor]] = {self.layer: []}
        if isinstance(self.layer, SplitLayer):
            kept[self.layer.concepts] = []

        def keep(module: nn.Module, _: Any, output: Tensor) -> None:
            # Of a copy, since the next module may write into the output. Parts of an image, such
            # as windows, are more positions.
            maps = channels_first(self.spec, output.clone()).flatten(2)
            by_image = maps.unflatten(0, (len(images), -1))
            kept[module].append(by_image.movedim(1, 2).flatten(2))

        with ExitStack() as hooks:
            for module in kept:
                hooks.enter_context(module.register_forward_hook(keep))
            try:
                with callers_device():
                    self.model(images)
            except Exception as error:  # of a network of anyone's own
                raise ModelError(
                    f"The network cannot run on images of shape {tuple(images.shape[1:])} "
                    f"({brief(error)}); pass images, and a size, that it takes."
                ) from error
        if not kept[self.layer]:
            raise never_ran(self.spec.name)
        return torch.cat([torch.cat(maps, -1) for maps in kept.values()], 1)


def watch(model: nn.Module, layer: str | nn.Module) -> Watched:
    """Find a layer, split or not, in a network."""
    name, module = resolve_layer(model, layer)
    spec: LayerSpec = module.spec if isinstance(module, SplitLayer) else describe(name, module)
    targets: list[Target] = [(o, None) for o in range(spec.n_out)]
    if isinstance(module, SplitLayer):
        targets += [(int(o), int(k)) for o, k in (own.split(".") for own in module.names)]
    return Watched(model, module, spec, {target: row for row, target in enumerate(targets)})


def _targets_of(watched: Watched, channels: Sequence[int] | None) -> dict[int, list[Target]]:
    """List by channel what to visualise."""
    if channels is None:
        channels = sorted({channel for channel, k in watched.rows if k is not None})
    channels = whole_numbers("channels", channels)
    for channel in channels:
        if (channel, None) not in watched.rows:
            raise UsageError(
                f"Layer {watched.spec.name!r} has no channel {channel}; give numbers from 0 to "
                f"{watched.spec.n_out - 1}."
            )
    if not channels:
        raise UsageError("No channel of this network was split; say which channels to visualise.")
    return {channel: watched.targets_of(channel) for channel in channels}


def _blocks(targets: dict[int, list[Target]], n: int, most: int) -> list[list[int]]:
    """Part channels into blocks of as many as fit side by side, at least one."""
    blocks: list[list[int]] = []
    n_free = 0
    for channel, own in targets.items():
        if n * len(own) > n_free:
            blocks.append([])
            n_free = most
        blocks[-1].append(channel)
        n_free -= n * len(own)
    return blocks


def _optimise(
    watched: Watched, pixels: Pixels, wanted: Sequence[tuple[Target, int]], recipe: _Recipe
) -> list[tuple[float, Feature]]:
    """Optimise images side by side and score them; Adam treats each number by itself."""
    targets = [target for target, _ in wanted]
    canvas = blank_canvas(pixels, [recipe.seed + i for _, i in wanted], recipe.spectrum)
    rate = _RATE_OF_PHASES if recipe.spectrum else _RATE
    optimiser = torch.optim.Adam([canvas.numbers], lr=rate)
    generator = torch.Generator().manual_seed(recipe.seed)
    score = Score(watched, targets, recipe.objective == "contrast")
    drawn_on = pixels.low.new_zeros(len(wanted), *pixels.size)
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
        try:
            (-scores.sum()).backward()
        except RuntimeError as error:  # of a network of anyone's own; also for want of memory
            raise ModelError(
                f"The network gives no gradient of its image ({brief(error)}); choose another "
                "layer, or a smaller size if memory is short."
            ) from error
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
    for image, (channel, concept) in enumerate(targets):
        rows = [watched.rows[target] for target in watched.targets_of(channel)]
        means = tuple(responses[image, rows].float().mean(-1).tolist())
        picture = _picture(images[image], _opacity(drawn_on[image]))
        made.append((float(scores[image]), Feature(channel, concept, 0, picture, means)))
    return made


class Score:
    """How well each image of a batch does what it is made for, its target.

    With contrast, images of concept channels are to leave the others of their channel silent.
    """

    def __init__(self, watched: Watched, targets: Sequence[Target], contrast: bool) -> None:
        """Prepare what counts for which image, as matrices of zeros and ones."""
        size, device = (len(targets), len(watched.rows)), device_of(watched.layer)
        self._own, self._others = torch.zeros(2, *size, dtype=torch.float32, device=device)
        for image, target in enumerate(targets):
            self._own[image, watched.rows[target]] = 1
            if contrast and target[1] is not None:
                _, *concepts = watched.targets_of(target[0])
                others = [watched.rows[other] for other in concepts if other != target]
                self._others[image, others] = 1

    def __call__(self, responses: Tensor) -> Tensor:
        """Compute scores, (N,), in units of the mean pre-activation."""
        z = responses.float()
        own, others = z.mean(-1) * self._own, z.clamp(min=0).mean(-1) * self._others
        score: Tensor = own.sum(1) - others.sum(1)
        return score


def _as_input(watched: Watched, pixels: Pixels, images: Tensor) -> Tensor:
    """From a scale of 0 to 1 to what the network takes."""
    low, high = pixels.low[:, None, None], pixels.high[:, None, None]
    return (low + (high - low) * images).to(next(watched.layer.parameters()).dtype)


def _opacity(drawn_on: Tensor) -> Tensor:
    """From accumulated gradients (H, W) to opacity, 0 to 1, smoothed a little."""
    reach = round(max(drawn_on.shape) / 64)
    maps = drawn_on[None, None]
    smooth = F.avg_pool2d(maps, 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
    full = smooth.flatten().quantile(_FULL)
    return (smooth / full).clamp(0, 1) if full > 0 else torch.ones_like(smooth)


def _picture(image: Tensor, opacity: Tensor) -> Image.Image:
    """From (C, H, W) and (H, W), 0 to 1, to RGBA; colours other than three are shown as grey."""
    if len(image) != 3:
        image = image.mean(0, keepdim=True).expand(3, -1, -1)
    values = (255 * torch.cat([image, opacity[None]])).round().to(torch.uint8)
    return Image.fromarray(values.movedim(0, -1).cpu().numpy())
