"""The pass itself: claim folders and shards, run the network shard by shard, write the records."""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, OutOfMemory, RunError, memory_full
from unbraid.base.files import remove_leftovers, write_tensors, write_whole
from unbraid.base.tables import count
from unbraid.images.batches import as_batch, deaths_told, image_progress, in_batches, load
from unbraid.images.broken import Loaded, sort_out
from unbraid.images.dataset import groups_of, listed_labels
from unbraid.images.identity import ids_of, pack_ids
from unbraid.networks.copying import device_of
from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.outputs import check_labels
from unbraid.networks.preflight import look_first
from unbraid.networks.relevance import kept_channels_last, undisturbed
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.manifest import Manifest, read_manifest
from unbraid.scanning.records import Records, join_records, shard_path, write_shard
from unbraid.scanning.scan_options import ScanOptions

_PATIENCE = 60.0  # seconds; NFS shows a folder anew after half of that
_PAUSE = 0.5
_MOST_NAMED = 3  # layers in a title
_LOOK = 0.05  # seconds between looks at what others have done


def images_per_shard(positions: bool) -> int:
    """Choose how many images a shard holds: pooled inputs are small, input maps are not."""
    return 128 if positions else 1024


class Team:
    """Processes that scan together, or one alone: they share a store, where shards are claimed.

    Nobody waits for anybody before the end, so no number of processes or shards makes them hang.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """Begin a work, in a store that holds nothing else."""
        self.first = rank == 0  # who speaks and prepares for all
        self._store, self._rank, self._size = store, rank, size
        self._counted = 0

    def lead(self, prepare: Callable[[], None], work: str) -> str:
        """Let the first prepare; the others wait for it. Return the first's text for the work."""
        if self.first:
            prepare()
            self._store.set("prepared", work)
        self._wait_for(["prepared"])
        return bytes(self._store.get("prepared")).decode()

    def claims(self, n_pieces: int) -> Iterator[int]:
        """Hand out the pieces of the work one by one, each to whoever asks next."""
        while (piece := self._store.add("claimed", 1) - 1) < n_pieces:
            yield piece

    def count(self, n: int) -> int:
        """Add to what all have counted; return by how much that has grown since the last call."""
        total = self._store.add("counted", n)
        grown, self._counted = total - self._counted, total
        return int(grown)

    def finish(self) -> None:
        """Wait until all have done what they claimed; torchrun ends us if one dies."""
        self._store.set(f"done {self._rank}", "")
        self._wait_for([f"done {rank}" for rank in range(self._size)])

    def _wait_for(self, keys: list[str]) -> None:
        while not self._store.check(keys):  # in short steps, so that a signal is heard
            time.sleep(_LOOK)


def join_team() -> Team:
    """The team for the next work; every process must ask for the same works in the same order."""
    if n_ranks() == 1:
        return Team(HashStore(), 0, 1)
    store, rank, size = _joined()
    # The store outlives processes that torchrun starts anew, and what they claimed does not count.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Team(PrefixStore(f"unbraid {attempt} {next(_works)}", store), rank, size)


def n_ranks() -> int:
    """How many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0" or n_ranks() == 1


_works = itertools.count()


@functools.cache
def _joined() -> tuple[Store, int, int]:
    joined: tuple[Any, int, int] = next(rendezvous("env://"))
    return joined


@dataclass(frozen=True)
class Target:
    """A layer to scan, and the folder for its records."""

    module: nn.Module
    manifest: Manifest
    folder: Path

    def lacks(self, shard: int) -> bool:
        """Whether a shard is still to be made."""
        return not shard_path(self.folder, shard).exists()


def claim(targets: Sequence[Target]) -> None:
    """Make folders this scan's; RunError if one holds a shard of another scan."""
    manifests = [read_manifest(target.folder) for target in targets]
    for target, before in zip(targets, manifests, strict=True):
        folder = target.folder
        if next(folder.glob("shard-*.safetensors"), None) is None:
            continue
        if before is None:
            raise RunError(
                f"{folder} holds shards of an unknown scan, its manifest is gone; name another "
                "folder, or delete this one."
            )
        if differences := target.manifest.differences(before):
            raise RunError(
                f"{folder} holds another scan, with a difference in {', '.join(differences)}; name "
                "another folder, or delete this one."
            )
    for target, before in zip(targets, manifests, strict=True):
        folder, manifest = target.folder, target.manifest
        remove_leftovers(folder)  # of a scan that was killed while writing
        there = (folder / "layer.safetensors").exists()
        if before is None or manifest.differences(before) or not there:
            weight, bias = weight_rows(target.module), bias_of(target.module)
            write_tensors(folder / "layer.safetensors", {"weight": weight, "bias": bias}, {})
            write_whole(folder / "manifest.json", manifest.to_json().encode())
        elif manifest.class_names and manifest.class_names != before.class_names:
            renamed = replace(before, class_names=manifest.class_names)  # for people, not records
            write_whole(folder / "manifest.json", renamed.to_json().encode())


def claim_together(targets: Sequence[Target], team: Team) -> None:
    """Let the first process of a team claim the folders; RunError if another makes other scans."""
    own = json.dumps([target.manifest.to_json() for target in targets])
    first = team.lead(partial(claim, targets), own)
    theirs = [Manifest.from_json(text) for text in json.loads(first)]
    if [target.manifest.scan_id for target in targets] == [other.scan_id for other in theirs]:
        return
    differing = {
        words
        for target, other in zip(targets, theirs, strict=False)
        for words in target.manifest.differences(other)
    }
    raise RunError(
        "This process does not scan what the first does, with a difference in "
        f"{', '.join(sorted(differing)) or 'the number of layers'}; give all the same weights, "
        "seed and images."
    )


def refuse_taken(target: Target) -> None:
    """Raise RunError if the folder was claimed by another scan since."""
    now = read_manifest(target.folder)
    if now is None or now.scan_id != target.manifest.scan_id:
        raise RunError(
            f"{target.folder} was taken by another scan meanwhile; let that one end, or name "
            "another folder."
        )


def _batches(targets: Sequence[Target], indices: Sequence[int], team: Team) -> Iterator[list[int]]:
    """The batches of the shards that this process claims, when the loader asks for more."""
    same = targets[0].manifest
    for number in team.claims(same.n_shards):
        if any(target.lacks(number) for target in targets):
            own = indices[number * same.shard_size : (number + 1) * same.shard_size]
            # A batch never crosses a shard, so that a record does not depend on who made it.
            yield from map(list, in_batches(own, same.batch_size))


def scan_shards(
    model: nn.Module,
    targets: Sequence[Target],
    dataset: Dataset[Any],
    labels: Sequence[int],
    indices: Sequence[int],
    team: Team,
    options: ScanOptions,
) -> None:
    """Make the shards that are missing, of all layers in one pass; labels are of all images."""
    same = targets[0].manifest  # but for the layer
    missing = [k for k in range(same.n_shards) if any(target.lacks(k) for target in targets)]
    sizes = [same.images_in(k) for k in missing]
    n_fewest = min(((n - 1) % same.batch_size + 1 for n in sizes), default=1)  # in a batch
    groups, ids = groups_of(dataset), ids_of(dataset)
    sampled = frozenset(indices[k] for k in same.sampled)
    pinned = device_of(model).type == "cuda"
    work = _batches(targets, indices, team)
    batches = load(dataset, work, workers=options.workers, pinned=pinned)
    names = [target.manifest.layer.name for target in targets]
    many = len(names) > _MOST_NAMED
    title = f"Scanning {count(len(names), 'layer') if many else ', '.join(names)}"
    n_done = len(indices) - sum(sizes)
    show = options.progress and team.first
    with ExitStack() as stack:
        advance = stack.enter_context(image_progress(title, len(indices), n_done, show=show))
        stack.enter_context(deaths_told())
        stack.enter_context(undisturbed(model))
        if options.channels_last:
            stack.enter_context(kept_channels_last(model))
        # Sums round otherwise with another number of threads.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(same.threads or torch.get_num_threads())
        looked = False
        shard_of = partial(_shard_of, indices, same.shard_size)
        for number, of_shard in itertools.groupby(batches, key=shard_of):
            lacking = [target for target in targets if target.lacks(number)] or targets
            at_once = same.batch_size
            parts: list[list[Records]] = []  # of the shard so far, layer by layer
            for items in of_shard:
                good, broken = sort_out(items, options.skip_broken)
                if options.labels == "given":
                    _check_labels_agree(good, labels)
                if good and not looked:
                    listed = listed_labels(dataset) if options.labels == "given" else None
                    _look(model, targets, good, n_fewest, listed, indices)
                    looked = True
                run = partial(
                    scan_batch,
                    model,
                    [Place(target.module, target.manifest.layer) for target in lacking],
                    sampled=sampled,
                    min_share=options.min_share,
                    positions=options.positions,
                    predicted=options.labels == "predicted",
                    autocast=options.autocast,
                    # Once a shard is enough, and costs next to nothing.
                    check=not any(len(records[0]) for records in parts),
                )
                own, at_once = _in_portions(run, good, at_once)
                for records in own[0]:
                    records.broken = torch.tensor(broken, dtype=torch.int64)
                parts += own
                advance(team.count(len(items)))
            for target, of_layer in zip(lacking, zip(*parts, strict=True), strict=True):
                _write(target, number, join_records(of_layer), groups, ids)
        team.finish()
        if n_ranks() > 1:
            await_shards(targets, _PATIENCE)
        advance(team.count(0))


def _shard_of(indices: Sequence[int], shard_size: int, items: Sequence[Loaded]) -> int:
    """Which shard a batch belongs to; indices are in order."""
    return bisect_left(indices, items[0].index) // shard_size


def await_shards(targets: Sequence[Target], seconds: float) -> None:
    """Wait a while for shards of others, which a network file system may show late."""
    until = time.monotonic() + seconds
    missing = [(target, k) for target in targets for k in range(target.manifest.n_shards)]
    while missing := [(target, k) for target, k in missing if target.lacks(k)]:
        if time.monotonic() > until:
            return
        time.sleep(_PAUSE)


def _in_portions(
    run: Callable[[Sequence[Loaded]], list[Records]], items: Sequence[Loaded], at_once: int
) -> tuple[list[list[Records]], int]:
    """Run images as many at a time as the device's memory holds: the records, and how many."""
    done: list[list[Records]] = []
    start = 0
    while start < len(items) or not done:
        try:
            done.append(run(items[start : start + at_once]))
            start += at_once
        except Exception as error:
            if not memory_full(error):
                raise
            if at_once == 1:
                raise OutOfMemory("The device's memory holds not even one image.") from None
            at_once = (at_once + 1) // 2
            warnings.warn(
                f"The device is out of memory; going on with {at_once} images at a time.",
                stacklevel=2,
            )
    return done, at_once


def _look(
    model: nn.Module,
    targets: Sequence[Target],
    good: Sequence[Loaded],
    n_fewest: int,
    listed: Sequence[int] | None,
    indices: Sequence[int],
) -> None:
    """Look at what the network computes of the first images, and check all labels of a list.

    Otherwise a wrong label would be told when its batch comes, perhaps after days.
    """
    index = torch.tensor([item.index for item in good], dtype=torch.int64)
    images = as_batch([item.image for item in good], index)
    layers = [(target.manifest.layer, target.module) for target in targets]
    with suppress(OutOfMemory):  # memory is a thing that the scan can deal with
        logits = look_first(model, images.to(device_of(model)), layers, n_fewest)
        if listed is not None:
            index = torch.tensor(indices, dtype=torch.int64)
            check_labels(torch.tensor(listed, dtype=torch.int64)[index], index, logits)


def _check_labels_agree(items: Sequence[Loaded], labels: Sequence[int]) -> None:
    """Raise if an image comes with another label than the data set's list has for it."""
    for item in items:
        if item.label != labels[item.index]:
            raise DataError(
                f"Image {item.index} comes with label {item.label}, but the data set lists "
                f"{labels[item.index]} for it; make the two agree."
            )


def _write(
    target: Target, shard: int, records: Records, groups: list[int] | None, ids: list[str] | None
) -> None:
    """Write a shard of a layer, with what the data set says of its images."""
    index = records.index.tolist()
    if groups is not None:
        records.group = torch.tensor([groups[i] for i in index], dtype=torch.int64)
    if ids is not None:
        records.id_start, records.id_bytes = pack_ids([ids[i] for i in index])
    refuse_taken(target)
    write_shard(target.folder, shard, records, target.manifest)
