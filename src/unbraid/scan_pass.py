"""The pass itself: claim the folders, run the network shard by shard, write the records."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from unbraid.batch import Place, scan_batch
from unbraid.data import GoodItem, Readable, groups_of, sort_out
from unbraid.describe import bias_of, weight_rows
from unbraid.errors import DataError, RunError
from unbraid.files import write_tensors, write_whole
from unbraid.progress import image_progress
from unbraid.records import Manifest, join_records, read_manifest, shard_path, write_shard
from unbraid.relevance import undisturbed


@dataclass(frozen=True)
class Target:
    """A layer to scan, and the folder for its records."""

    module: nn.Module
    manifest: Manifest
    folder: Path

    @property
    def place(self) -> Place:
        """Where to look in the network."""
        return Place(self.module, self.manifest.layer)

    def lacks(self, shard: int) -> bool:
        """Whether a shard is still to be made."""
        return not shard_path(self.folder, shard).exists()


def library_versions() -> dict[str, str]:
    """Versions that a manifest tells."""
    return {
        "unbraid": version("unbraid"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def claim(target: Target) -> None:
    """Make the folder this scan's, or check that it is; without a shard, it is nobody's yet.

    Raises:
        RunError: it holds another scan.
    """
    folder, manifest = target.folder, target.manifest
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
        layer = {
            "weight": weight_rows(target.module).cpu(),
            "bias": bias_of(target.module).cpu(),
        }
        write_tensors(folder / "layer.safetensors", layer, {})
        write_whole(folder / "manifest.json", manifest.to_json().encode())


def scan_shards(
    model: nn.Module,
    targets: Sequence[Target],
    dataset: Dataset[Any],
    given: Sequence[int],
    places: Sequence[int],
    *,
    workers: int,
    progress: bool,
) -> None:
    """Make the shards that are not there yet, of all layers in one pass.

    Args:
        model: gives logits.
        targets: layers of it; they differ in layer and folder alone.
        dataset: the images.
        given: their labels.
        places: in the data set, of the images to scan.
        workers: processes that load images.
        progress: show a progress bar.
    """
    same = targets[0].manifest  # for every layer
    size, batch_size = same.shard_size, same.batch_size
    lacking = {k: [t for t in targets if t.lacks(k)] for k in range(same.n_shards)}
    batches = {
        k: [
            list(places[i : i + batch_size])
            for i in range(k * size, min((k + 1) * size, len(places)), batch_size)
        ]
        for k in lacking
        if lacking[k]
    }  # a batch never crosses a shard
    groups = groups_of(dataset)
    loader = DataLoader(
        Readable(dataset),
        batch_sampler=[batch for part in batches.values() for batch in part],
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # so that the caller's random numbers stay where they were
    )
    loaded = iter(loader)
    n_done = len(places) - sum(len(batch) for part in batches.values() for batch in part)
    title = f"Scanning {', '.join(t.manifest.layer.name for t in targets)}"
    with (
        image_progress(title, len(places), n_done, show=progress) as advance,
        undisturbed(model),
        torch.inference_mode(False),  # whatever mode the caller is in
        torch.enable_grad(),
    ):
        for k, part in batches.items():
            done = []
            n_good = 0
            for _ in part:
                items = next(loaded)
                good, broken = sort_out(items, same.skip_broken)
                _check_labels_agree(good, given)
                records = scan_batch(
                    model,
                    [t.place for t in lacking[k]],
                    good,
                    min_share=same.min_share,
                    positions=same.positions,
                    predicted=same.labels == "predicted",
                    check=n_good == 0,  # once a shard is enough, and costs next to nothing
                )
                for one in records:
                    one.broken = torch.tensor(broken, dtype=torch.int64)
                done.append(records)
                n_good += len(good)
                advance(len(items))
            for target, parts in zip(lacking[k], zip(*done, strict=True), strict=True):
                joined = join_records(parts)
                if groups is not None:
                    joined.group = torch.tensor([groups[i] for i in joined.index.tolist()])
                write_shard(target.folder, k, joined)


def _check_labels_agree(items: Sequence[GoodItem], labels: Sequence[int]) -> None:
    """Raise if an image comes with another label than the data set's list has for it."""
    for index, _, label in items:
        if label != labels[index]:
            raise DataError(
                f"Image {index} comes with label {label}, but the data set lists {labels[index]} "
                "for it; make the two agree."
            )
