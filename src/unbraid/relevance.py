"""Gradient x activation at a layer, with the graph cut there.

Shapes: N images, C_out channels, T classes, G groups, J taps; see METHOD.md section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from unbraid.errors import LayerError

Kept = TypeVar("Kept")


@dataclass
class Cut(Generic[Kept]):
    """What passed through a layer in the latest forward pass."""

    input: Kept | None = None  # what was kept of the input
    output: Tensor | None = None  # a leaf: the graph behind the layer starts here


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the network in eval mode without parameter gradients; put everything back afterwards.

    With no parameter asking for a gradient, autograd records nothing until the cut layer.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextmanager
def cut_at(layer: nn.Module, keep: Callable[[Tensor], Kept]) -> Iterator[Cut[Kept]]:
    """Record a layer's input and output, and make its output the start of the graph.

    In-place operations behind the layer must not reach what is recorded. So `keep` takes what it
    wants of the input at once, and what follows gets a copy of the output, not the leaf itself.

    Args:
        layer: the layer.
        keep: from the layer's input to what to keep of it.
    """
    cut: Cut[Kept] = Cut()

    def hook(
        _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        if cut.output is not None:
            raise LayerError(
                "The layer runs more than once in a forward pass, so its output is not one thing; "
                "choose a layer that runs once."
            )
        cut.input = keep((args[0] if args else named["input"]).detach())
        with torch.enable_grad():
            cut.output = output.detach().requires_grad_()
            return cut.output.clone()

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield cut
    finally:
        handle.remove()


def output_relevance(output: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient x activation of a layer's output for each image's own class, before pooling.

    Args:
        output: the layer's output as a leaf of the graph, any shape with N first.
        logits: (N, T), computed from it.
        labels: (N,), class indices.

    Returns:
        The shape of `output`, in units of the logit.

    Raises:
        LayerError: the output does not reach the logits.
    """
    chosen = logits.gather(1, labels[:, None]).sum()
    gradient = (
        torch.autograd.grad(chosen, output, allow_unused=True)[0] if chosen.requires_grad else None
    )
    if gradient is None:
        raise LayerError(
            "The layer's output does not reach the logits (a side branch, or a forward pass under "
            "no_grad); choose a layer on the way to the output."
        )
    return output.detach() * gradient


def shares(relevance: Tensor) -> Tensor:
    """Divide each channel's relevance by the sum of the positive ones of its image.

    Args:
        relevance: (N, C_out).

    Returns:
        (N, C_out); zero throughout for an image without positive relevance.

    >>> shares(torch.tensor([[3.0, -1.0, 1.0], [0.0, -1.0, 0.0]]))
    tensor([[ 0.7500, -0.2500,  0.2500],
            [ 0.0000,  0.0000,  0.0000]])
    """
    total = relevance.clamp(min=0).sum(1, keepdim=True)
    return torch.where(total > 0, relevance / total, torch.zeros_like(relevance))


def input_relevance(weight: Tensor, pooled: Tensor, taps_per_input: int) -> Tensor:
    """How much each input channel contributed to channels' summed pre-activations.

    Linear in `pooled`, so a mean of pooled inputs gives an averaged relevance vector (ARV).

    Args:
        weight: (..., J), rows of the layer.
        pooled: (..., J), pooled inputs of their groups, broadcast against the rows.
        taps_per_input: kernel offsets of one input channel.

    Returns:
        (..., J / taps_per_input), in units of the summed pre-activation, without bias.

    Source:
        METHOD.md section 2; Hesse et al. 2025, arXiv:2504.12939.
    """
    by_input: Tensor = (weight * pooled).unflatten(-1, (-1, taps_per_input))
    return by_input.sum(-1)
