"""What is known of the outputs of a network for which images are opened in Python."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

from torch import Tensor, nn

from unbraid.data import Readable, first_readable
from unbraid.errors import DataError, ModelError, UsageError, brief
from unbraid.imagenet import output_names
from unbraid.labels import Outputs
from unbraid.networks import unwrap
from unbraid.running import count_outputs

GivenOutputs = Sequence[str] | int | nn.Module


def outputs_of(given: GivenOutputs | None, images: Callable[[], Any]) -> Outputs:
    """Settle what a caller says of a network's outputs.

    Args:
        given: their names, their number, or the network.
        images: gives the images; a network is run on the first one to count its outputs.

    Raises:
        UsageError: it is none of these, or the images have no transform.
        DataError: the first images cannot be read.
        ModelError: the network cannot run on the image.
    """
    if given is None:
        return Outputs()
    if isinstance(given, nn.Module):
        names, n = output_names(unwrap(given)), _count(given, _first(images()))
        return Outputs(names if len(names) == n else (), n)
    if isinstance(given, Iterable) and not isinstance(given, (str, dict, Set)):
        names = tuple(given)
        if names and all(isinstance(name, str) for name in names):
            return Outputs(tuple(map(str, names)), len(names))
    n = _index(given)
    if n < 1:
        raise UsageError(
            f"outputs is {brief(ValueError(repr(given)))}; give the names of a network's outputs, "
            "their number, or the network."
        )
    return Outputs((), n)


def _first(images: Any) -> Tensor:
    if images.transform is None:
        raise UsageError(
            "outputs is a network, which is run on an image to count its outputs; give transform "
            "too, or outputs as a number."
        )
    image = first_readable(images, range(len(images)))
    if image is None:
        raise DataError(
            "None of the first images can be read, so the network's outputs cannot be counted "
            f"({_reason(images)}); mend them, or give outputs as a number."
        )
    return image


def _reason(images: Any) -> str:
    *_, reason = Readable(images)[0]
    return str(reason).rstrip(".")


def _index(given: Any) -> int:
    try:
        return 0 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        return 0


def _count(model: nn.Module, image: Tensor) -> int:
    try:
        return count_outputs(model, image)
    except Exception as error:  # of a network of anyone's own
        raise ModelError(
            f"The network cannot run on the first image ({brief(error)}), so its outputs cannot be "
            "counted; give the transform that it needs, or outputs as a number."
        ) from error
