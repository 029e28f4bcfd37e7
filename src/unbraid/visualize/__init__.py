"""What a channel looks at, in images: feature visualisation, and reference images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from unbraid.doors import in_plain_modes

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from unbraid.visualize.features import Features

STEPS = 128  # of the optimiser; docs/visualisation.md shows what fewer and more make


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
    channel l of the same channel (objective "contrast"). Images of one seed start from the same
    noise, are optimised side by side, and do not depend on one another. The network stays as it
    was and computes in eval mode, with the gates and clamps that are in force; torch's own random
    numbers are left alone.

    Args:
        model: from `unbraid.apply` in the exact form; of any other network only whole channels are
            visualised.
        layer: the layer, by name or itself.
        dataset: of (image tensor (C, H, W), label), as the network takes them. A sample of 128 of
            its images tells size, range and colours of images, and their spectrum.
        channels: which ones; by default those that were split.
        n: images of each, from different starts.
        steps: of the optimiser.
        size: height and width in pixels; by default that of the images.
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
        DataError: the data set gives no images of one size, or all of one colour.
        ModelError: the network fails on such images.

    Source:
        Olah et al. 2017, Feature Visualization, doi:10.23915/distill.00007 (Fourier basis,
        decorrelated colours, transformations); Fel et al. 2023, arXiv:2306.06805 (fixed spectrum,
        transparency).
    """
    from unbraid.errors import UsageError
    from unbraid.given import flag, real_number, whole_number
    from unbraid.visualize.making import Recipe, make_features
    from unbraid.visualize.pixels import pixels_of

    recipe = Recipe(
        whole_number("n", n, 1),
        whole_number("steps", steps, 1),
        objective,
        flag("spectrum", spectrum),
        whole_number("seed", seed),
    )
    if seconds is not None:
        seconds = real_number("seconds", seconds)
        if not seconds >= 0:
            raise UsageError(f"seconds is {seconds:g}; it must be 0 or more.")
    pixels = pixels_of(dataset, size)
    return make_features(model, layer, pixels, channels, recipe, seconds, progress)
