"""One batch through the network: what is recorded of it, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.base.errors import (
    CannotRun,
    DataError,
    LayerError,
    ModelError,
    OutOfMemory,
    brief,
    memory_full,
)
from unbraid.images.batches import as_batch
from unbraid.images.broken import Loaded
from unbraid.networks.copying import device_of, tensors_in
from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.outputs import logits_of, refuse_broken_values, run_network, run_raw
from unbraid.networks.relevance import (
    Cut,
    cut_at,
    gradients_at,
    never_ran,
    output_relevance,
    shares,
    undisturbed,
)
from unbraid.networks.spec import LayerSpec, channels_first, pooled_input, spread_inputs
from unbraid.scanning.fields import Records, no_records
from unbraid.scanning.manifest import most_classes
from unbraid.scanning.places import PlaceKeeper
from unbraid.scanning.scan_options import Labels
from unbraid.scanning.targets import Scalar

_MEMORY = 2**31  # bytes; of an accelerator a quarter of what it has
_MOST = 32  # more brings a processor nothing but larger blocks
_MOST_ON_ACCELERATOR = 256
_AT_ONCE = 3  # times what goes into and comes out of a module: room for what runs beside it


def batch_size_for(model: nn.Module, layers: Sequence[nn.Module], image: Tensor | None) -> int:
    """Find how many images (C, H, W) like this one, if any, run at a time: a power of two."""
    if image is None:
        return _MOST
    device = device_of(model)
    memory = _MEMORY
    most = _MOST if device.type == "cpu" else _MOST_ON_ACCELERATOR
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 4
    told: list[Exception] = []
    for n in (1, 2):  # some networks run on two images or more, but not on one
        try:
            room = memory // (bytes_of_one(model, layers, image.to(device), n) // n)
            return min(most, 1 << max(room, 1).bit_length() - 1)
        except Exception as error:
            if memory_full(error):
                return 1  # which is tried again, and told
            if not isinstance(error, ModelError):
                raise
            told.append(error)
    raise told[0]


def bytes_of_one(model: nn.Module, layers: Sequence[nn.Module], image: Tensor, n: int = 1) -> int:
    """How much memory a scan takes for n images: at its widest, and kept for the gradient."""
    widest = kept = 0
    behind = False  # the first of the layers, where gradients begin

    def count(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal widest, kept, behind
        behind = behind or module in layers
        made = sum(tensor.nbytes for tensor in tensors_in(output))
        widest = max(widest, sum(tensor.nbytes for tensor in tensors_in(given)) + made)
        # Of several layers, all outputs and all gradients are there at once, and copies go on.
        kept += behind * made * (3 if module in layers and len(layers) > 1 else 1)

    # Projections of attention are no modules of the network before it is looked at.
    modules = dict.fromkeys([*model.modules(), *layers])
    with undisturbed(model), ExitStack() as stack:
        for module in modules:
            scripted = isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
            # A layer may have parts of its own, such as its padding.
            whole = next(module.children(), None) is None or module in layers
            if whole and not scripted:
                stack.callback(module.register_forward_hook(count).remove)
        with torch.no_grad():
            run_network(model, torch.stack([image] * n))
    return _AT_ONCE * max(widest, n * image.nbytes) + kept


@dataclass(frozen=True)
class Place:
    """A layer to keep records of."""

    module: nn.Module
    spec: LayerSpec
    keeper: PlaceKeeper | None = None  # of the places that excite its channels most


@dataclass(frozen=True)
class Kept:
    """What is kept of a layer's input at one call, for N images in parts, such as windows."""

    pooled: Tensor  # (N * parts, G, J)
    input_map: Tensor | None  # (N * parts, C_in, positions ...)
    sampled: Tensor  # the same of the sampled images alone
    whole: Tensor | None  # the same as `input_map`, on the network's device, for places


def scan_batch(
    model: nn.Module,
    layers: Sequence[Place],
    items: Sequence[Loaded],
    *,
    number_of: Callable[[int], int] = int,
    sampled: Container[int] = (),
    repeated: Container[int] = (),
    min_share: float,
    positions: bool,
    labels: Labels,
    target: Scalar,
    autocast: bool,
    check: bool,
) -> list[Records]:
    """Run the network on some images of one size once and keep their records, layer by layer.

    Of images whose index is in `sampled` tap inputs at some positions are kept, unless all
    positions are. With `check` it is made sure that the layers compute what is thought, image by
    image. Without a target there is no gradient, and no share. Keepers of places learn of the batch
    once all is done; `number_of` gives an image's number among those concerned, by its index. They
    keep nothing of images whose index is in `repeated`.
    """
    if not items:
        return [no_records(layer.spec, positions) for layer in layers]
    device = device_of(layers[0].module)
    index = torch.tensor([item.index for item in items], dtype=torch.int64)
    images = as_batch([item.image for item in items])
    # A copy in any case, as a network may write into it, and then have to begin again.
    images = images.to(device, non_blocking=True, copy=True)
    flags = [not positions and item.index in sampled for item in items]
    chosen = torch.tensor(flags, dtype=torch.bool)
    with ExitStack() as stack:
        cuts = [
            stack.enter_context(cut_at(layer.module, partial(_keep, layer, positions, chosen)))
            for layer in layers
        ]
        if target.value is None:
            stack.enter_context(torch.no_grad())
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = _run_cut(model, images)
        for layer, cut in zip(layers, cuts, strict=True):
            cut.recording = False
            if not cut.outputs:
                raise never_ran(layer.spec.name)
        most = most_classes(layers[0].spec)
        label, prediction = _labels(items, output, labels, target, most)
        calls = [cut.outputs for cut in cuts]
        gradients: Sequence[Sequence[Tensor | None] | None] = [None] * len(layers)
        if target.value is not None:
            value = target.of(output, label.to(device), index)
            target.refuse_detached(output, value)
            if check:
                _check_apart(layers, calls, value)
            gradients = _gradients_of_each(calls, value.sum())
    if target.value is None and check and len(items) > 1:
        _check_apart_by_another(model, layers, images, cuts, autocast)
    known = {"index": index, "label": label, "prediction": prediction}
    records = [
        _records_of(layer, cut, gradient, known, chosen, min_share, positions, check)
        for layer, cut, gradient in zip(layers, cuts, gradients, strict=True)
    ]
    flags = [item.index in repeated for item in items]
    _see_places(layers, cuts, known, number_of, torch.tensor(flags, dtype=torch.bool))
    return records


def _run_cut(model: nn.Module, images: Tensor) -> Any:
    """Run a network; ModelError if it runs without gradients alone."""
    try:
        return run_raw(model, images)
    except CannotRun as error:
        if not torch.is_grad_enabled():
            raise
        with torch.no_grad():  # which raises the error if it is not for the gradient
            run_raw(model, images)
        raise _no_gradient(error.__cause__ or error) from None


def _no_gradient(error: BaseException) -> ModelError:
    return ModelError(
        f"The network gives no gradient at the layer ({brief(error)}); choose a layer behind "
        "that place, one at a time, or scan with target='none', which needs none."
    )


def _labels(
    items: Sequence[Loaded], output: Any, labels: Labels, target: Scalar, most: int
) -> tuple[Tensor, Tensor]:
    """Classes of images and the network's top classes, (N,) each, 0 where there are none.

    Those that name no outputs must be fewer than `most`; DataError if one is not.
    """
    label = prediction = torch.zeros(len(items), dtype=torch.int64)
    if target.of_class or labels == "predicted":
        label = prediction = logits_of(output, len(items)).argmax(1).cpu()
    if labels != "predicted":
        given = [item.label if labels == "given" else 0 for item in items]
        label = torch.tensor(given, dtype=torch.int64)
    wrong = [] if target.of_class else ((label < 0) | (label >= most)).nonzero()[:, 0].tolist()
    if wrong:
        told = f"has label {int(label[wrong[0]])}; number classes from 0 on, fewer than {most:,}"
        about = items[wrong[0]].index, f"{told}, or scan with labels='none'."
        raise DataError.of_image("", *about)
    return label, prediction


def _keep(layer: Place, positions: bool, chosen: Tensor, x: Tensor) -> Kept:
    x = channels_first(layer.spec, x)
    rows = chosen.repeat_interleave(len(x) // len(chosen)).nonzero()[:, 0].to(x.device)
    return Kept(
        pooled_input(layer.spec, x),
        x.cpu().clone() if positions else None,
        x[rows],
        None if layer.keeper is None else x.clone(),  # before anything writes into it
    )


def _see_places(
    layers: Sequence[Place],
    cuts: Sequence[Cut[Kept]],
    known: dict[str, Tensor],
    number_of: Callable[[int], int],
    repeated: Tensor,
) -> None:
    """Show keepers of places a batch, all or, if memory is full, none."""
    numbers = [number_of(index) for index in known["index"].tolist()]
    order = torch.tensor(numbers, dtype=torch.int64)
    own = {"order": order, "image": known["index"]}
    own |= {name: known[name] for name in ("label", "prediction")}
    looked = [
        (layer.keeper, layer.keeper.look(cut.outputs, wholes, own, repeated))
        for layer, cut in zip(layers, cuts, strict=True)
        if layer.keeper is not None
        for wholes in [[call.whole for call in cut.inputs if call.whole is not None]]
    ]
    for keeper, places in looked:
        keeper.add(places)


def _gradients_of_each(
    calls: Sequence[Sequence[Tensor]], value: Tensor
) -> list[list[Tensor | None]]:
    """Gradients of a number by every layer's outputs, in one go back through the network."""
    try:
        flat = iter(gradients_at([output for outputs in calls for output in outputs], value))
    except RuntimeError as error:  # what is written in place behind a layer may leave no gradient
        if memory_full(error):
            raise OutOfMemory("The device is out of memory; lower batch_size.") from None
        raise _no_gradient(error) from None
    return [[next(flat) for _ in outputs] for outputs in calls]


def _records_of(
    layer: Place,
    cut: Cut[Kept],
    gradients: Sequence[Tensor | None] | None,
    known: dict[str, Tensor],
    chosen: Tensor,
    min_share: float,
    positions: bool,
    check: bool,
) -> Records:
    """Make the records of one layer; `known` are those that are the same for all, (N,) each.

    `chosen` (N,) says which images are sampled. Without gradients no share is kept.
    """
    spec, index = layer.spec, known["index"]
    n_images = len(index)
    pooled = _sum_calls(spec, n_images, [call.pooled for call in cut.inputs])
    z = [channels_first(spec, output.detach()).flatten(2) for output in cut.outputs]
    summed = pooled.new_zeros(n_images, spec.n_out)
    if gradients is not None:
        relevance = output_relevance(spec.name, cut.outputs, gradients)
        by_channel = (channels_first(spec, r).flatten(2) for r in relevance)
        summed = _sum_calls(spec, n_images, [r.sum(2, dtype=pooled.dtype) for r in by_channel])
    n_positions = sum(len(call) // n_images * call.shape[2] for call in z)
    for values in (pooled, summed):
        refuse_broken_values(values, index)
    if check:
        if spec.transposed:
            _check_sizes(spec, cut)
        _check_linear(spec, layer.module, pooled, z, n_positions)
    share = shares(summed)
    kept = share >= min_share
    extra: dict[str, Tensor] = {}
    if positions:
        extra["input_map"] = _input_map(spec, n_images, [call.input_map for call in cut.inputs])
    else:
        own = pooled[chosen.to(pooled.device)]
        spread = spread_inputs(spec, [call.sampled for call in cut.inputs], own)
        extra["spread"] = spread.flatten(0, 1)
        extra["spread_start"] = _starts(spread.shape[1] * chosen)
    return Records(
        **known,
        n_positions=torch.full_like(index, n_positions),
        pooled=pooled.cpu(),
        share_start=_starts(kept.sum(1).cpu()),
        share_channel=kept.nonzero()[:, 1].to(torch.int32).cpu(),
        share_value=share[kept].cpu(),
        broken=index[:0],
        **extra,
    )


def _starts(counts: Tensor) -> Tensor:
    """Where each image's own begin, and at last the end, (N + 1,)."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _sum_calls(spec: LayerSpec, n_images: int, calls: Sequence[Tensor]) -> Tensor:
    """Sum (N * parts, ...) over calls of a layer and the parts, such as windows, of an image."""
    for call in calls:
        if not len(call) or len(call) % n_images:
            raise LayerError(
                f"Layer {spec.name!r} has {len(call)} rows of numbers for {n_images} images, "
                "perhaps because a hook changes their order, or parts of images are not as many; "
                "remove that hook, use batch_size=1, or choose another layer."
            )
    return torch.stack([call.unflatten(0, (n_images, -1)).sum(1) for call in calls]).sum(0)


def _input_map(spec: LayerSpec, n_images: int, calls: Sequence[Tensor | None]) -> Tensor:
    """The layer's input of each image, (N, C_in, positions ...); parts are positions if tokens."""
    first = calls[0]
    assert first is not None
    if len(calls) > 1 or (len(first) != n_images and not spec.channels_last):
        raise LayerError(
            f"Layer {spec.name!r} runs more than once on each image, so there is no one input map "
            "to keep; choose another layer, or scan without positions."
        )
    parts = first.unflatten(0, (n_images, -1))  # (N, parts, C_in, ...)
    return parts.movedim(1, 2).flatten(2, 3) if len(first) != n_images else first


def _check_apart(layers: Sequence[Place], calls: Sequence[Sequence[Tensor]], value: Tensor) -> None:
    """Raise if parts of an image, such as windows, do not lie together, in the images' order.

    No part of another image has a gradient of the first image's target; `value` is (N,).
    """
    n_images = len(value)
    own = _gradients_of_each(calls, value[0])
    for layer, outputs, gradients in zip(layers, calls, own, strict=True):
        for output, gradient in zip(outputs, gradients, strict=True):
            n_parts, rest = divmod(len(output), n_images)
            others = gradient[n_parts:] if gradient is not None else output.new_zeros(0)
            if rest or (others.abs() > 0).any():
                raise _scattered(layer, output, n_images)


def _check_apart_by_another(
    model: nn.Module,
    layers: Sequence[Place],
    images: Tensor,
    cuts: Sequence[Cut[Kept]],
    autocast: bool,
) -> None:
    """Raise likewise without a gradient: with another first image all others stay as they are."""
    beside = images.clone()
    beside[0] = images[-1].flip(-1)
    with ExitStack() as stack, torch.no_grad():
        again = [
            stack.enter_context(cut_at(layer.module, partial(_pooled_only, layer.spec)))
            for layer in layers
        ]
        with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
            run_raw(model, beside)
    for layer, cut, other in zip(layers, cuts, again, strict=True):
        for kept, pooled, output in zip(cut.inputs, other.inputs, cut.outputs, strict=False):
            n_parts, rest = divmod(len(kept.pooled), len(images))
            if rest or len(pooled) != len(kept.pooled):
                raise _scattered(layer, output, len(images))
            before, after = kept.pooled[n_parts:], pooled[n_parts:]
            scale = float(before.abs().max()) if before.numel() else 0.0
            if float((before - after).abs().max()) > torch.finfo(output.dtype).eps ** 0.5 * scale:
                raise _scattered(layer, output, len(images))


def _pooled_only(spec: LayerSpec, x: Tensor) -> Tensor:
    return pooled_input(spec, channels_first(spec, x))


def _scattered(layer: Place, output: Tensor, n_images: int) -> LayerError:
    return LayerError(
        f"Layer {layer.spec.name!r} puts out {tuple(output.shape)} for {n_images} images, where "
        "what belongs to one image does not lie together; use batch_size=1."
    )


def _check_sizes(spec: LayerSpec, cut: Cut[Kept]) -> None:
    """Raise if a transposed convolution puts out another size than its own padding gives."""
    for call, output in zip(cut.inputs, cut.outputs, strict=True):
        own = spec.size_behind(call.sampled.shape[2:])
        if own != tuple(output.shape[2:]):
            raise LayerError(
                f"Layer {spec.name!r} is called with an output_size, {tuple(output.shape[2:])}, of "
                f"another size than its own padding gives, {own}; set its output_padding instead, "
                "or choose another layer."
            )


def _check_linear(
    spec: LayerSpec, module: nn.Module, pooled: Tensor, z: Sequence[Tensor], n_positions: int
) -> None:
    """Raise if the layer does not compute what its weights say, as a hook may change its output."""
    n_images = len(pooled)
    weight = weight_rows(module)
    rows = weight.to(pooled.dtype).unflatten(0, (spec.groups, -1))
    expected = torch.einsum("ngj,goj->ngo", pooled, rows).flatten(1)
    expected += n_positions * bias_of(module).to(pooled.dtype)
    wide = [call.to(pooled.dtype) for call in z]
    actual = _sum_calls(spec, n_images, [call.sum(2) for call in wide])
    scale = _sum_calls(spec, n_images, [call.abs().sum(2) for call in wide]).max()
    # Rounding is far below, errors above; under autocast the layer's output is the coarser.
    coarsest: float = max(torch.finfo(values.dtype).eps for values in (weight, *z))
    if (actual - expected).abs().max() > coarsest**0.5 * scale + 1e-12:
        raise LayerError(
            f"Layer {spec.name!r} ({spec.kind}) does not compute what its weights say, perhaps "
            "because a hook changes its output; remove that hook, or choose another layer."
        )
