"""Gradient x activation at a layer, with the graph cut there.

Shapes: N images, C_out channels, T classes, G groups, J taps; see "One layer" in docs/method.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.checkpoint import CheckpointFunction

from unbraid.base.errors import LayerError
from unbraid.base.modes import (
    own_device,
    restored,
    same_random,
    without_autocast,
    without_inference,
)
from unbraid.networks.attention import APART, TOGETHER, opened
from unbraid.networks.by_weight import run_where_applied
from unbraid.networks.spec import widen

Kept = TypeVar("Kept")


@dataclass
class Cut(Generic[Kept]):
    """What passed through a layer in a forward pass, call by call."""

    inputs: list[Kept] = field(default_factory=list)  # what was kept of each input
    outputs: list[Tensor] = field(default_factory=list)  # the first is a leaf: the graph's start
    recording: bool = True  # False once the pass is over: a checkpointed block computes again


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the network in eval mode without parameter gradients; put everything back afterwards.

    With no parameter asking for a gradient, autograd records nothing until the cut layer. Compiled
    code may pass hooks by, so it runs as it is written; autocast is off. Layers that the network
    applies by their weights alone, as attentions do, run as modules where these get hooks.
    """
    with (
        without_inference(),
        restored(model),
        same_random(),
        opened(model),
        run_where_applied(model),
    ):
        # What was computed from weights, as in copies of scripted parts, cannot be told not to.
        wanted = {
            parameter: parameter.requires_grad
            for parameter in model.parameters()
            if parameter.is_leaf and not is_lazy(parameter)
        }
        try:
            with suppress(NotImplementedError):  # of torch.export's programs, which have no modes
                model.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            with _uncompiled(), without_autocast():
                yield
        finally:
            for parameter, flag in wanted.items():
                parameter.requires_grad_(flag)


def _uncompiled() -> AbstractContextManager[Any]:
    """Run compiled parts as they are written, if torch's compiler was ever loaded."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def cut_at(layer: nn.Module, keep: Callable[[Tensor], Kept]) -> Iterator[Cut[Kept]]:
    """Record a layer's input and output, and make its output the start of the graph.

    In-place operations behind the layer must not reach what is recorded: `keep` takes what it wants
    at once, and what follows gets a copy. Gradients are to be taken inside the `with` block.
    """
    cut: Cut[Kept] = Cut()

    def hook(
        _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor:
        with torch.enable_grad(), without_autocast(), own_device():
            if not output.requires_grad:  # else it runs again, behind its first run
                output = output.detach().requires_grad_()
            if cut.recording:
                cut.inputs.append(keep((args[0] if args else next(iter(named.values()))).detach()))
                cut.outputs.append(output)
            return output.clone()

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        with _no_reentrant_checkpoints():
            yield cut
    finally:
        handle.remove()


@contextmanager
def _no_reentrant_checkpoints() -> Iterator[None]:
    """Let torch's older kind of checkpointed block compute as any other, not by its own graph."""
    before = CheckpointFunction.apply
    CheckpointFunction.apply = staticmethod(lambda function, _preserve, *args: function(*args))
    try:
        yield
    finally:
        CheckpointFunction.apply = before


def never_ran(name: str) -> LayerError:
    """Say that a layer did not run, and why that may be."""
    path, _, part = name.rpartition(".")
    if part == TOGETHER:  # of nn.MultiheadAttention, as another layer of this name may be
        apart = ", ".join(f"{path}.{own}".lstrip(".") for own in APART)
        return LayerError(
            f"Layer {name!r} does not run when the network does. It runs only where query, key and "
            f"value of the attention are one; where they differ, choose from {apart}."
        )
    return LayerError(
        f"Layer {name!r} does not run when the network does (it has no part in this, or its "
        "weights are used without it); choose another, `unbraid layers` lists those that run."
    )


def output_relevance(
    name: str, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor]:
    """Gradient x activation of a layer's outputs at each call, in units of the logit.

    The gradients are of the summed logits of the images' own classes; LayerError if there are none.
    """
    if all(gradient is None for gradient in gradients):
        raise LayerError(
            f"The output of layer {name!r} does not reach the logits (a side branch, a quantised "
            "part, or a forward pass that detaches or is under no_grad); choose a layer on the way "
            "to the output."
        )
    wide = [widen(output.detach()) for output in outputs]
    return [
        torch.zeros_like(z) if gradient is None else z * gradient
        for z, gradient in zip(wide, gradients, strict=True)
    ]


def gradients_at(outputs: Sequence[Tensor], value: Tensor) -> list[Tensor | None]:
    """Gradients of a number by a layer's outputs, None where it does not depend on one."""
    if not value.requires_grad:
        return [None] * len(outputs)
    return list(torch.autograd.grad(value, outputs, allow_unused=True, retain_graph=True))


def shares(relevance: Tensor) -> Tensor:
    """Divide channels' relevance, (N, C_out), by the sum of the positive ones of each image.

    >>> shares(torch.tensor([[3.0, -1.0, 1.0], [0.0, -1.0, 0.0]]))
    tensor([[ 0.7500, -0.2500,  0.2500],
            [ 0.0000,  0.0000,  0.0000]])
    """
    total = relevance.clamp(min=0).sum(1, keepdim=True)
    return torch.where(total > 0, relevance / total, torch.zeros_like(relevance))


def input_relevance(weight: Tensor, pooled: Tensor, taps_per_input: int) -> Tensor:
    """How much each input channel contributed to channels' summed pre-activations, without bias.

    Rows and pooled inputs, (..., J), give (..., J / taps_per_input); linear in `pooled`, so a mean
    of it gives an averaged relevance vector (ARV). "One layer" in docs/method.md; arXiv:2504.12939.
    """
    by_input: Tensor = (weight * pooled).unflatten(-1, (-1, taps_per_input))
    return by_input.sum(-1)
