"""A network run on a stack of images: what goes in, what must come out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unbraid.as_found import callers_device
from unbraid.causes import memory_full
from unbraid.errors import DataError, ModelError, OutOfMemory, UnbraidError
from unbraid.networks import as_logits, device_of, number_format
from unbraid.relevance import undisturbed


def stack_images(images: Sequence[Tensor], index: Tensor) -> Tensor:
    """Make a batch of images; `index` says where they are in the data set.

    Raises:
        DataError: they differ in size.
    """
    for image, place in zip(images, index.tolist(), strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"Image {place} is {tuple(image.shape)} where image {int(index[0])} is "
                f"{tuple(images[0].shape)}; bring all to one size in the data set's transform."
            )
    return torch.stack(list(images))


def run_network(model: nn.Module, images: Tensor) -> Tensor:
    """Compute logits, (N, T).

    The network gets a copy of the images, since it may write into it, in the number format of its
    weights.

    Raises:
        ModelError: the network cannot run on such images, or gives something else.
    """
    try:
        with callers_device():
            output = model(images.to(number_format(model, images), copy=True))
    except UnbraidError:
        raise
    except Exception as error:  # of a network of anyone's own
        if memory_full(error):
            raise OutOfMemory("The device is out of memory; lower batch_size.") from None
        if "meta" in str(error) and (lacking := _without_numbers(model)):
            raise ModelError(
                f"The network's {lacking!r} is on the meta device, so holds no numbers; load the "
                "weights first."
            ) from None
        if "more than 1 value per channel" in str(error):
            raise ModelError(
                "The network normalises by the statistics of its batch, also in eval mode, and one "
                "image has none; let its norms use running statistics."
            ) from error
        if "functorch transform" in str(error):
            raise ModelError(
                "The network runs the layer inside of torch.vmap or another of torch.func's "
                "transforms, where it cannot be looked into; let it run the layer on all images at "
                "once, or choose a layer outside."
            ) from error
        advice = "check size and channels of the images"
        if not images.is_floating_point():
            kind = str(images.dtype).removeprefix("torch.")
            advice += f", and that the network takes {kind} where a transform usually makes floats"
        raise ModelError(
            f"The network cannot run on images of shape {tuple(images.shape[1:])} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); {advice}."
        ) from error
    logits = as_logits(output, len(images))
    if logits.is_meta:
        raise ModelError("The network's weights are on the meta device; load weights first.")
    if len(logits) != len(images):
        raise ModelError(
            f"The network gives {len(logits)} rows of logits for {len(images)} images; wrap it so "
            "that it gives one for each."
        )
    return logits


def count_outputs(model: nn.Module, image: Tensor) -> int:
    """Run a network on one image, (C, H, W), and count its logits, T.

    Raises:
        ModelError: it cannot run on it.
    """
    with undisturbed(model), torch.no_grad():
        return run_network(model, image[None].to(device_of(model))).shape[1]


def _without_numbers(model: nn.Module) -> str | None:
    return next((name for name, weight in model.named_parameters() if weight.is_meta), None)


def check_labels(label: Tensor, index: Tensor, logits: Tensor) -> None:
    """Raise if a label names no output of the network; `index` says whose it is.

    Raises:
        DataError: one does.
    """
    wrong = (label < 0) | (label >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Image {int(index[wrong][0])} has label {int(label[wrong][0])}, but the network has "
            f"{logits.shape[1]} outputs; labels must name outputs."
        )


def refuse_broken_values(values: Tensor, index: Tensor) -> None:
    """Raise if what was computed of an image is not finite, N first in `values`.

    Raises:
        ModelError: names the image.
    """
    wrong = ~values.flatten(1).isfinite().all(1).cpu()
    if wrong.any():
        raise ModelError(
            f"Image {int(index[wrong][0])} drives the network to NaN or infinite values or "
            "gradients; check the image, its preprocessing and the weights."
        )
