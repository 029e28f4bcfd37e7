"""Which layers of a network can be scanned: seen by running it once."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from unbraid.batch import run_network
from unbraid.describe import splittable_layers
from unbraid.errors import ModelError
from unbraid.layers import LayerSpec
from unbraid.networks import unwrap
from unbraid.relevance import cut_at, gradients_at, undisturbed


def usable_layers(model: nn.Module, images: Tensor) -> list[LayerSpec]:
    """List the layers that can be split, run on these images, and reach the logits.

    Args:
        model: as `unbraid.scan` takes it.
        images: (N, C, H, W), on the network's device; one will do.

    Returns:
        The layers in the network's order.

    Raises:
        ModelError: the network cannot run on such images, or gives no logits.
    """
    model = unwrap(model)
    specs = splittable_layers(model)
    with undisturbed(model), torch.no_grad():
        run_network(model, images)  # if this fails, it is not for a gradient
    try:
        return _reaching(model, specs, images)
    except (RuntimeError, ModelError):  # what is written in place leaves no whole graph
        return [spec for spec in specs if _reaches(model, spec, images)]


def _reaches(model: nn.Module, spec: LayerSpec, images: Tensor) -> bool:
    try:
        return bool(_reaching(model, [spec], images))
    except (RuntimeError, ModelError):
        return False


def _reaching(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> list[LayerSpec]:
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        stack.enter_context(undisturbed(model))
        cuts = [
            stack.enter_context(cut_at(model.get_submodule(spec.name), lambda _: None))
            for spec in specs
        ]
        logits = run_network(model, images)
        for cut in cuts:
            cut.recording = False
        outputs = [output for cut in cuts for output in cut.outputs]
        gradients = iter(gradients_at(outputs, logits.sum()) if outputs else ())
        reached = [any([next(gradients) is not None for _ in cut.outputs]) for cut in cuts]
    return [spec for spec, reaches in zip(specs, reached, strict=True) if reaches]
