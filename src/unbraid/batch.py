"""One batch through the network: what is recorded of it, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unbraid.data import GoodItem
from unbraid.errors import DataError, LayerError, ModelError
from unbraid.layers import LayerSpec, bias_of, channels_first, pooled_input, weight_rows
from unbraid.records import Records, no_records
from unbraid.relevance import cut_at, output_relevance, shares


def scan_batch(
    model: nn.Module,
    module: nn.Module,
    spec: LayerSpec,
    items: Sequence[GoodItem],
    min_share: float,
    positions: bool,
    check: bool,
    predicted: bool,
) -> Records:
    """Run the network on some images and keep their records."""
    if not items:
        return no_records(spec, positions)
    device = next(module.parameters()).device
    index = torch.tensor([item[0] for item in items])
    images = stack_images([item[1] for item in items], index).to(device)

    def keep(x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = channels_first(spec, x)
        return pooled_input(spec, x), x.cpu().clone() if positions else None

    with cut_at(module, keep) as cut:
        logits = run_network(model, images)
    if cut.output is None or cut.input is None:
        raise LayerError(f"Layer {spec.name!r} does not run when the network does.")
    prediction = logits.argmax(1).cpu()
    label = prediction if predicted else torch.tensor([item[2] for item in items])
    check_labels(label, index, logits)
    relevance = output_relevance(cut.output, logits, label.to(device))
    z = channels_first(spec, cut.output.detach()).flatten(2)
    pooled, input_map = cut.input
    summed = channels_first(spec, relevance).flatten(2).sum(2, dtype=pooled.dtype)
    for values in (pooled, logits, summed):
        refuse_broken_values(values, index)
    if check:
        _check_linear(spec, module, pooled, z)
    share = shares(summed)
    kept = share >= min_share
    return Records(
        index=index,
        label=label,
        prediction=prediction,
        n_positions=torch.full_like(index, z.shape[2]),
        pooled=pooled.cpu(),
        share_start=torch.cat([index.new_zeros(1), kept.sum(1).cumsum(0).cpu()]),
        share_channel=kept.nonzero()[:, 1].to(torch.int32).cpu(),
        share_value=share[kept].cpu(),
        broken=torch.zeros(0, dtype=torch.int64),
        input_map=input_map,
    )


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

    Raises:
        ModelError: the network cannot run on such images, or gives something else.
    """
    try:
        logits = model(images)
    except Exception as error:  # of a network of anyone's own
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError("The device is out of memory; lower batch_size.") from None
        raise ModelError(
            f"The network cannot run on images of shape {tuple(images.shape[1:])} "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); check size "
            "and channels of the images."
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"The network's output is {kind}, not logits of shape (images, classes); wrap it so "
            "that it is."
        )
    return logits


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


def _check_linear(spec: LayerSpec, module: nn.Module, pooled: Tensor, z: Tensor) -> None:
    """Raise if the layer does not compute what its weights and settings say.

    A subclass may pad or scale on its own; all that follows would then be quietly wrong.
    """
    z = z.to(pooled.dtype)
    rows = weight_rows(module).to(pooled.dtype).unflatten(0, (spec.groups, -1))
    expected = torch.einsum("ngj,goj->ngo", pooled, rows).flatten(1)
    expected += z.shape[2] * bias_of(module).to(pooled.dtype)
    tolerance = (
        torch.finfo(weight_rows(module).dtype).eps ** 0.5
    )  # rounding is far below, errors above
    if (z.sum(2) - expected).abs().max() > tolerance * z.abs().sum(2).max() + 1e-12:
        raise LayerError(
            f"Layer {spec.name!r} ({spec.kind}) does not compute what its weights say, perhaps "
            "because it pads or normalises on its own or a hook changes it; it cannot be split."
        )
