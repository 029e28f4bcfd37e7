"""What an image excites: the pre-activations of whole channels and of concept channels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.as_found import callers_device
from unbraid.describe import describe, resolve_layer
from unbraid.errors import LayerError, ModelError, UsageError
from unbraid.given import whole_numbers
from unbraid.layers import LayerSpec, channels_first
from unbraid.split_layer import SplitLayer

Target = tuple[int, int | None]  # a channel and a concept, None for the whole channel


@dataclass(frozen=True, eq=False)
class Responses:
    """Pre-activations that images bring about, P positions."""

    whole: Tensor  # (N, C_out, P)
    concepts: Tensor | None  # (N, R, P), in the order of the layer's names; None if not split


@dataclass(frozen=True, eq=False)
class Watched:
    """A network and the layer in it that is watched."""

    model: nn.Module
    layer: nn.Module
    spec: LayerSpec
    rows: dict[Target, int]  # where each concept channel stands

    def concepts_of(self, channel: int) -> list[int]:
        """Concepts of a channel, in order; none if it is not split."""
        return sorted(k for o, k in self.rows if o == channel and k is not None)

    def respond(self, images: Tensor) -> Responses:
        """Show images, (N, C, H, W), to the network.

        Raises:
            LayerError: the layer does not run.
            ModelError: the network fails on them.
        """
        whole: list[Tensor] = []
        concepts: list[Tensor] = []
        with ExitStack() as hooks:
            points = [(self.layer, whole)]
            if isinstance(self.layer, SplitLayer):
                points.append((self.layer.concepts, concepts))
            for module, kept in points:
                hook = partial(_keep, kept, self.spec, len(images))
                hooks.callback(module.register_forward_hook(hook).remove)
            try:
                with callers_device():
                    self.model(images)
            except Exception as error:  # of a network of anyone's own
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise ModelError(
                    f"The network cannot run on images of shape {tuple(images.shape[1:])} "
                    f"({reason}); pass images, and a size, that it takes."
                ) from error
        if not whole:
            raise LayerError(f"Layer {self.spec.name!r} does not run when the network does.")
        return Responses(torch.cat(whole, -1), torch.cat(concepts, -1) if concepts else None)


def watch(model: nn.Module, layer: str | nn.Module) -> Watched:
    """Find a layer, split or not, in a network.

    Raises:
        LayerError: there is none, or it has no channels.
    """
    name, module = resolve_layer(model, layer)
    if not isinstance(module, SplitLayer):
        return Watched(model, module, describe(name, module), {})
    pairs = [row.split(".") for row in module.names]
    rows: dict[Target, int] = {(int(o), int(k)): row for row, (o, k) in enumerate(pairs)}
    return Watched(model, module, module.spec, rows)


def targets_of(watched: Watched, channels: Sequence[int] | None) -> dict[int, list[Target]]:
    """List by channel what to visualise: the whole channel, then each concept channel.

    Raises:
        UsageError: a channel does not exist, or none is given where none was split.
    """
    if channels is None:
        channels = sorted({channel for channel, _ in watched.rows})
    channels = whole_numbers("channels", channels)
    n_out = watched.spec.n_out
    unknown = [channel for channel in channels if channel not in range(n_out)]
    if unknown:
        raise UsageError(
            f"Layer {watched.spec.name!r} has no channel {unknown[0]}; give numbers from 0 to "
            f"{n_out - 1}."
        )
    if not channels:
        raise UsageError("No channel of this network was split; say which channels to visualise.")
    return {o: [(o, None), *((o, k) for k in watched.concepts_of(o))] for o in channels}


class Score(nn.Module):
    """How well each image of a batch does what it is made for.

    Args:
        watched: network and layer.
        targets: what each image is made for.
        contrast: images of concept channels are to leave the others of their channel silent.
    """

    def __init__(self, watched: Watched, targets: Sequence[Target], contrast: bool) -> None:
        """Prepare who wants what, as matrices of zeros and ones."""
        super().__init__()
        n_images, n_rows = len(targets), len(watched.rows)
        whole = torch.zeros(n_images, watched.spec.n_out, dtype=torch.float32)
        own, others = (
            torch.zeros(n_images, n_rows, dtype=torch.float32),
            torch.zeros(n_images, n_rows, dtype=torch.float32),
        )
        for image, (channel, concept) in enumerate(targets):
            if concept is None:
                whole[image, channel] = 1
                continue
            siblings = [watched.rows[channel, k] for k in watched.concepts_of(channel)]
            others[image, siblings] = float(contrast)
            row = watched.rows[channel, concept]
            own[image, row], others[image, row] = 1, 0
        for name, matrix in (("whole", whole), ("own", own), ("others", others)):
            self.register_buffer(name, matrix)

    def forward(self, responses: Responses) -> Tensor:
        """Compute scores, (N,), in units of the mean pre-activation."""
        wanted: dict[str, Any] = dict(self.named_buffers())
        score: Tensor = (responses.whole.float().mean(-1) * wanted["whole"]).sum(1)
        if responses.concepts is not None:
            z = responses.concepts.float()
            score = score + (z.mean(-1) * wanted["own"]).sum(1)
            score = score - (z.clamp(min=0).mean(-1) * wanted["others"]).sum(1)
        return score


def _keep(
    kept: list[Tensor], spec: LayerSpec, n_images: int, _: nn.Module, __: Any, output: Tensor
) -> None:
    """Keep (N, channels, positions); parts of an image, such as windows, are more positions.

    Of a copy, since the next module may write into the output.
    """
    maps = channels_first(spec, output.clone()).flatten(2).unflatten(0, (n_images, -1))
    kept.append(maps.movedim(1, 2).flatten(2))
