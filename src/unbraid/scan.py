"""One pass of a network over images: the only step that runs it over the data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import unbraid
from unbraid.data import (
    Readable,
    class_names_of,
    fingerprint,
    labels_of,
    preprocessing_of,
    size_of,
)
from unbraid.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.layers import (
    LayerSpec,
    bias_of,
    channels_first,
    describe,
    pooled_input,
    resolve_layer,
    weight_rows,
)
from unbraid.progress import image_progress
from unbraid.records import (
    Manifest,
    Records,
    Scan,
    open_scan,
    read_manifest,
    shard_path,
    write_shard,
    write_tensors,
    write_whole,
)
from unbraid.relevance import cut_at, output_relevance, shares, undisturbed
from unbraid.weights import hash_weights, refuse_broken_weights

_Item = tuple[int, Tensor, int] | tuple[int, str]  # as data.Readable gives them


def scan(
    model: nn.Module,
    layer: str | nn.Module,
    dataset: Dataset[Any],
    out: str | Path,
    *,
    classes: Sequence[int] | None = None,
    positions: bool = False,
    min_share: float = 0.005,
    batch_size: int = 64,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
    source: dict[str, Any] | None = None,
) -> Scan:
    """Run a network over images once and keep one small record per image.

    Started again with the same arguments it goes on where it stopped; a finished shard is not
    computed again. The network is used in eval mode, on the device that it is on, and left exactly
    as it was.

    Args:
        model: gives logits (N, T) for a batch of images.
        layer: a convolution or fully connected layer, by `named_modules()` name or itself.
        dataset: map-style, of (image tensor, label).
        out: folder for the records.
        classes: scan only images with these labels.
        positions: also keep the layer's input maps, which the published rho criterion and the
            rectified measures need.
        min_share: the smallest share kept; thresholds below it need a new scan.
        batch_size: images per forward pass.
        workers: processes that load images, 0 for none.
        skip_broken: leave out images that cannot be read instead of stopping at the first.
        progress: show a progress bar on standard error.
        source: how to find network and images again, kept in the manifest for later commands.

    Returns:
        The finished Scan.

    Raises:
        LayerError: the layer does not exist, cannot be split or does not reach the logits.
        DataError: an image cannot be read, or labels do not fit the network.
        ModelError: the network holds or computes NaN or infinite numbers, or cannot run.
        RunError: the folder belongs to another network, layer or data set, or the disk is full.
        UsageError: an argument is out of range.

    Source:
        METHOD.md sections 2 and 4.
    """
    if not 0 < min_share < 1:
        raise UsageError(f"min_share is {min_share}; it must lie between 0 and 1.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be 1 or more.")
    name, module = resolve_layer(model, layer)
    spec = describe(name, module)
    refuse_broken_weights(model)
    size_of(dataset)
    labels = labels_of(dataset)
    indices = _concerned(labels, classes)
    manifest = Manifest(
        weights=hash_weights(model),
        layer=spec,
        data=fingerprint(dataset, labels),
        n_images=len(indices),
        class_names=class_names_of(dataset),
        preprocessing=preprocessing_of(dataset),
        dtype=str(weight_rows(module).dtype).removeprefix("torch."),
        min_share=min_share,
        classes=None if classes is None else tuple(sorted(set(classes))),
        positions=positions,
        shard_size=128 if positions else 1024,  # input maps are large, pooled inputs are not
        batch_size=batch_size,
        skip_broken=skip_broken,
        source=source or {},
        versions={
            "unbraid": unbraid.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    )
    folder = _claim(Path(out), manifest, module)
    size = manifest.shard_size
    shards = {k: indices[k * size : (k + 1) * size] for k in range(manifest.n_shards)}
    todo = {k: part for k, part in shards.items() if not shard_path(folder, k).exists()}
    n_done = len(indices) - sum(map(len, todo.values()))
    batches = {
        k: [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        for k, part in todo.items()
    }
    loader = iter(
        DataLoader(
            Readable(dataset),
            batch_sampler=[batch for part in batches.values() for batch in part],
            num_workers=workers,
            collate_fn=list,
        )
    )
    title = f"Scanning {name}"
    with (
        image_progress(title, len(indices), n_done, show=progress) as advance,
        undisturbed(model),
    ):
        for k, part in batches.items():
            done = []
            for _ in part:  # a batch never crosses a shard
                items = next(loader)
                good = [item for item in items if len(item) == 3]
                broken = [item for item in items if len(item) == 2]
                if broken and not skip_broken:
                    raise DataError(f"{broken[0][1]} Mend or remove it, or pass skip_broken.")
                done.append(_scan_batch(model, module, spec, good, min_share, positions))
                done[-1].broken = torch.tensor([item[0] for item in broken], dtype=torch.int64)
                advance(len(items))
            write_shard(folder, k, _join(done))
    return open_scan(folder)


def _concerned(labels: Sequence[int], classes: Sequence[int] | None) -> list[int]:
    """Places in the data set of the images to scan."""
    if classes is None:
        return list(range(len(labels)))
    wanted = set(classes)
    empty = wanted - set(labels)
    if not wanted:
        raise UsageError("classes is empty; name the classes to scan, or None for all.")
    if empty:
        raise UsageError(f"classes names {sorted(empty)}, of which the data set has no image.")
    return [index for index, label in enumerate(labels) if label in wanted]


def _claim(folder: Path, manifest: Manifest, module: nn.Module) -> Path:
    """Make the folder this scan's, or check that it is."""
    before = read_manifest(folder)
    if before is not None:
        differences = manifest.differences(before)
        if differences:
            raise RunError(
                f"{folder} holds a scan of something else: {', '.join(differences)} differ. Name "
                "another folder, or delete this one."
            )
    for leftover in folder.glob("*.tmp"):  # of a scan that was killed while writing
        leftover.unlink()
    if before is None:
        layer = {"weight": weight_rows(module).cpu(), "bias": bias_of(module).cpu()}
        write_tensors(folder / "layer.safetensors", layer, {})
        write_whole(folder / "manifest.json", manifest.to_json().encode())
    return folder


def _scan_batch(
    model: nn.Module,
    module: nn.Module,
    spec: LayerSpec,
    items: Sequence[tuple[int, Tensor, int]],
    min_share: float,
    positions: bool,
) -> Records:
    """Run the network on some images and keep their records."""
    if not items:
        return _no_records(spec, positions)
    device = next(module.parameters()).device
    index = torch.tensor([item[0] for item in items])
    label = torch.tensor([item[2] for item in items])
    images = _stack([item[1] for item in items], index).to(device)
    with cut_at(module) as cut:
        logits = _run(model, images)
    if cut.output is None or cut.input is None:
        raise LayerError(f"Layer {spec.name!r} does not run when the network does.")
    _check_labels(label, index, logits)
    relevance = output_relevance(cut.output, logits, label.to(device))
    x = channels_first(spec, cut.input)
    z = channels_first(spec, cut.output.detach()).flatten(2)
    pooled = pooled_input(spec, x)
    for values in (pooled, logits):
        _refuse_broken_values(values, index)
    _check_linear(spec, module, pooled, z)
    share = shares(channels_first(spec, relevance).flatten(2).sum(2, dtype=pooled.dtype))
    kept = share >= min_share
    return Records(
        index=index,
        label=label,
        prediction=logits.argmax(1).cpu(),
        n_positions=torch.full_like(index, z.shape[2]),
        pooled=pooled.cpu(),
        share_start=torch.cat([torch.zeros(1), kept.sum(1).cumsum(0).cpu()]).long(),
        share_channel=kept.nonzero()[:, 1].to(torch.int32).cpu(),
        share_value=share[kept].cpu(),
        broken=torch.zeros(0, dtype=torch.int64),
        input_map=x.cpu() if positions else None,
    )


def _stack(images: Sequence[Tensor], index: Tensor) -> Tensor:
    for image, place in zip(images, index.tolist(), strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"Image {place} is {tuple(image.shape)} where image {int(index[0])} is "
                f"{tuple(images[0].shape)}; bring all to one size in the data set's transform."
            )
    return torch.stack(list(images))


def _run(model: nn.Module, images: Tensor) -> Tensor:
    try:
        logits = model(images)
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
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


def _check_labels(label: Tensor, index: Tensor, logits: Tensor) -> None:
    wrong = (label < 0) | (label >= logits.shape[1])
    if wrong.any():
        raise DataError(
            f"Image {int(index[wrong][0])} has label {int(label[wrong][0])}, but the network has "
            f"{logits.shape[1]} outputs; labels must name outputs."
        )


def _refuse_broken_values(values: Tensor, index: Tensor) -> None:
    wrong = ~values.flatten(1).isfinite().all(1).cpu()
    if wrong.any():
        raise ModelError(
            f"Image {int(index[wrong][0])} drives the network to NaN or infinite values; check "
            "the image, its preprocessing and the weights."
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


def _no_records(spec: LayerSpec, positions: bool) -> Records:
    """Records of no image: what remains of a batch in which every image was broken."""
    none = torch.zeros(0, dtype=torch.int64)
    return Records(
        index=none,
        label=none,
        prediction=none,
        n_positions=none,
        pooled=torch.zeros(0, spec.groups, spec.n_taps),
        share_start=torch.zeros(1, dtype=torch.int64),
        share_channel=none.to(torch.int32),
        share_value=torch.zeros(0),
        broken=none,
        input_map=torch.zeros(0, spec.n_in, *(0 for _ in spec.kernel)) if positions else None,
    )


def _join(parts: Sequence[Records]) -> Records:
    """Put the records of a shard's batches into one."""
    some = [part for part in parts if len(part)] or list(parts[:1])
    starts = [0]
    for part in some:
        starts += (part.share_start[1:] + starts[-1]).tolist()
    maps = [part.input_map for part in some if part.input_map is not None]

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in some])

    try:
        input_map = torch.cat(maps) if maps else None
    except RuntimeError:
        raise DataError(
            "Images of different sizes give input maps of different sizes, which positions=True "
            "cannot keep; bring all to one size in the data set's transform."
        ) from None
    return Records(
        index=cat("index"),
        label=cat("label"),
        prediction=cat("prediction"),
        n_positions=cat("n_positions"),
        pooled=cat("pooled"),
        share_start=torch.tensor(starts),
        share_channel=cat("share_channel"),
        share_value=cat("share_value"),
        broken=torch.cat([part.broken for part in parts]),
        input_map=input_map,
    )
