"""One pass of a network over images: the only step that runs it over the data."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unbraid.batch import scan_batch
from unbraid.data import (
    UNLABELLED,
    GoodItem,
    Readable,
    check_loading,
    class_names_of,
    fingerprint,
    groups_of,
    labels_of,
    preprocessing_of,
    size_of,
    sort_out,
)
from unbraid.describe import bias_of, describe, resolve_layer, weight_rows
from unbraid.errors import DataError, RunError, UsageError
from unbraid.files import write_tensors, write_whole
from unbraid.networks import picked_by, unwrap
from unbraid.progress import image_progress
from unbraid.records import (
    Manifest,
    Records,
    Scan,
    hash_places,
    join_records,
    open_scan,
    read_manifest,
    shard_path,
    write_shard,
)
from unbraid.relevance import undisturbed
from unbraid.weights import hash_weights, refuse_broken_weights

Labels = Literal["given", "predicted"]

MIN_SHARE = 0.005  # with shares adding up to one, at most 200 an image; a few dozen in practice


def scan(
    model: nn.Module,
    layer: str | nn.Module,
    dataset: Dataset[Any],
    out: str | Path,
    *,
    labels: Labels = "given",
    classes: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    positions: bool = False,
    min_share: float = MIN_SHARE,
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
        model: gives logits (N, T) for a batch of images, or (N,) or (N, 1) to tell two classes
            apart; `unbraid.with_logits` picks them out of a larger output.
        layer: a convolution or fully connected layer, by `named_modules()` name or itself.
        dataset: map-style, of (image tensor, label). Its `groups`, one id for each image, may say
            which belong together, such as crops of one photograph; none is then judged by another.
        out: folder for the records.
        labels: "predicted" takes each image for what the network takes it for, whatever the data
            set's label, so data sets without labels will do (any number stands for a label).
        classes: scan only images with these given labels.
        indices: scan only the images at these places in the data set.
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
    check_loading(batch_size, workers)
    model = unwrap(model)
    name, module = resolve_layer(model, layer)
    spec = describe(name, module)
    refuse_broken_weights(model)
    size_of(dataset)
    given, groups = labels_of(dataset), groups_of(dataset)
    _check_labels_known(given, labels)
    places = _concerned(given, classes, indices)
    manifest = Manifest(
        weights=hash_weights(model),
        layer=spec,
        data=fingerprint(dataset, given),
        n_images=len(places),
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
        versions=_versions(),
        labels=labels,
        indices=hash_places(None if indices is None else places),
        output=picked_by(model),
    )
    folder = Path(out)
    _claim(folder, manifest, module)
    shards = _unfinished(folder, manifest, places)
    batches = {
        k: [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        for k, part in shards.items()
    }
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=[batch for part in batches.values() for batch in part],
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # so that the caller's random numbers stay where they were
    )
    loaded = iter(loader)
    n_done = len(places) - sum(map(len, shards.values()))
    title = f"Scanning {name}"
    with (
        image_progress(title, len(places), n_done, show=progress) as advance,
        undisturbed(model),
        torch.inference_mode(False),  # whatever mode the caller is in
        torch.enable_grad(),
    ):
        for k, part in batches.items():
            done: list[Records] = []
            for _ in part:  # a batch never crosses a shard
                items = next(loaded)
                good, broken = sort_out(items, skip_broken)
                _check_targets(good, given)
                check = not any(map(len, done))  # once a shard is enough, and costs next to nothing
                predicted = labels == "predicted"
                done.append(
                    scan_batch(model, module, spec, good, min_share, positions, check, predicted)
                )
                done[-1].broken = torch.tensor(broken, dtype=torch.int64)
                advance(len(items))
            records = join_records(done)
            if groups is not None:
                records.group = torch.tensor([groups[i] for i in records.index.tolist()])
            write_shard(folder, k, records)
    finished = open_scan(folder)
    if len(finished.broken()) == manifest.n_images:
        raise DataError(f"None of the {manifest.n_images} images could be read; mend the data set.")
    return finished


def _check_labels_known(given: Sequence[int], labels: Labels) -> None:
    if labels not in get_args(Labels):
        raise UsageError(f"labels is {labels!r}; use {' or '.join(map(repr, get_args(Labels)))}.")
    if labels == "given" and set(given) == {UNLABELLED}:
        raise UsageError("The data set has no labels; pass labels='predicted'.")


def _concerned(
    labels: Sequence[int], classes: Sequence[int] | None, indices: Sequence[int] | None
) -> list[int]:
    """Places in the data set of the images to scan, in order."""
    if indices is not None:
        if classes is not None:
            raise UsageError("classes and indices both say what to scan; pass one of them.")
        places = sorted({int(index) for index in indices})
        if not places or places[0] < 0 or places[-1] >= len(labels):
            raise UsageError(
                f"indices must name places in the data set, 0 to {len(labels) - 1}, one or more."
            )
        return places
    if classes is None:
        return list(range(len(labels)))
    wanted = set(classes)
    empty = wanted - set(labels)
    if not wanted:
        raise UsageError("classes is empty; name the classes to scan, or None for all.")
    if empty:
        raise UsageError(f"classes names {sorted(empty)}, of which the data set has no image.")
    return [index for index, label in enumerate(labels) if label in wanted]


def _check_targets(items: Sequence[GoodItem], labels: Sequence[int]) -> None:
    """Raise if an image comes with another label than the data set's list has for it."""
    for index, _, label in items:
        if label != labels[index]:
            raise DataError(
                f"Image {index} comes with label {label}, but the data set lists {labels[index]} "
                "for it; make the two agree."
            )


def _versions() -> dict[str, str]:
    return {
        "unbraid": version("unbraid"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _unfinished(folder: Path, manifest: Manifest, indices: list[int]) -> dict[int, list[int]]:
    """Images of each shard that is not there yet."""
    size = manifest.shard_size
    return {
        k: indices[k * size : (k + 1) * size]
        for k in range(manifest.n_shards)
        if not shard_path(folder, k).exists()
    }


def _claim(folder: Path, manifest: Manifest, module: nn.Module) -> None:
    """Make the folder this scan's, or check that it is; without a shard, it is nobody's yet."""
    before = read_manifest(folder)
    shards = list(folder.glob("shard-*.safetensors"))
    if before is None and shards:
        raise RunError(
            f"{folder} holds shards of an unknown scan, its manifest is gone; name another folder, "
            "or delete this one."
        )
    differences = manifest.differences(before) if before is not None else []
    if shards and differences:
        raise RunError(
            f"{folder} holds a scan of something else: {', '.join(differences)} differ. Name "
            "another folder, or delete this one."
        )
    for ours in ("shard-*.safetensors", "layer.safetensors", "manifest.json"):
        for leftover in folder.glob(f"{ours}.*.tmp"):  # of a scan that was killed while writing
            leftover.unlink()
    if before is None or differences or not (folder / "layer.safetensors").exists():
        layer = {"weight": weight_rows(module).cpu(), "bias": bias_of(module).cpu()}
        write_tensors(folder / "layer.safetensors", layer, {})
        write_whole(folder / "manifest.json", manifest.to_json().encode())
