"""Which layers of a network can be scanned: seen by running it once."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.data import first_readable, size_of
from unbraid.describe import splittable_layers
from unbraid.doors import in_plain_modes
from unbraid.errors import DataError, ModelError
from unbraid.layers import LayerSpec
from unbraid.networks import device_of, unwrap
from unbraid.relevance import cut_at, gradients_at, undisturbed
from unbraid.running import run_network


@in_plain_modes
def usable_layers(model: nn.Module, images: Tensor) -> list[LayerSpec]:
    """List the layers that can be split, see these images, and reach the logits.

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
        specs = _seeing(model, specs, images)  # if this fails, it is not for a gradient
    try:
        return _reaching(model, specs, images)
    except (RuntimeError, ModelError):  # what is written in place leaves no whole graph
        return [spec for spec in specs if _reaches(model, spec, images)]


def _seeing(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> list[LayerSpec]:
    """Leave out layers that meet the same whatever the image, such as for codes of positions."""
    noise = torch.randn(
        images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(images)
    met, met_too = _inputs(model, specs, images), _inputs(model, specs, noise)
    return [spec for spec in specs if not _same(met[spec.name], met_too[spec.name])]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.equal(*pair) for pair in pairs)


def _inputs(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> dict[str, list[Tensor]]:
    """What each layer meets, run by run."""
    met: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        met[name].append((args[0] if args else next(iter(named.values()))).clone())

    with ExitStack() as stack:
        for name in met:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
            stack.callback(hook.remove)
        run_network(model, images)
    return met


def usable_in(model: nn.Module, dataset: Dataset[Any]) -> list[LayerSpec]:
    """List the layers that can be scanned, by the first image of a data set that can be read.

    Raises:
        DataError: none of the first images can be read.
        ModelError: the network cannot run on it, or gives no logits.
    """
    image = first_readable(dataset, range(size_of(dataset)))
    if image is None:
        raise DataError("None of the first images can be read; mend the data set.")
    # Of two, as some networks lose the dimension of a single one, or take no single one.
    return usable_layers(model, torch.stack([image] * 2).to(device_of(model)))


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
