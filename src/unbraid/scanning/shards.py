"""The pass itself: run the network shard by shard, write the records."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler

from unbraid.base.errors import DataError, OutOfMemory, RunError, memory_full
from unbraid.base.files import remove_leftovers, write_tensors, write_whole
from unbraid.base.progress import image_progress
from unbraid.images.batches import as_batch, deaths_told, load
from unbraid.images.dataset import GoodItem, groups_of, listed_labels, sort_out
from unbraid.images.identity import ids_of, pack_ids
from unbraid.networks.copying import device_of
from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.outputs import as_logits, check_labels
from unbraid.networks.preflight import look_first
from unbraid.networks.relevance import kept_channels_last, uncompiled, undisturbed
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.manifest import Manifest, read_manifest
from unbraid.scanning.records import Records, join_records, shard_path, write_shard
from unbraid.scanning.team import Team, n_ranks

# Whose folder it is: a scan claims folders for its records, or finds that they are another's.


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


def claim(targets: Sequence[Target]) -> None:
    """Make folders this scan's, or check that they are; without a shard, a folder is nobody's yet.

    Raises:
        RunError: one holds another scan.
    """
    for target in targets:
        _refuse_stranger(target)
    for target in targets:
        folder, manifest = target.folder, target.manifest
        remove_leftovers(folder)  # of a scan that was killed while writing
        before = read_manifest(folder)
        there = (folder / "layer.safetensors").exists()
        if before is None or manifest.differences(before) or not there:
            weight, bias = weight_rows(target.module), bias_of(target.module)
            write_tensors(folder / "layer.safetensors", {"weight": weight, "bias": bias}, {})
            write_whole(folder / "manifest.json", manifest.to_json().encode())
        elif manifest.class_names and manifest.class_names != before.class_names:
            renamed = replace(before, class_names=manifest.class_names)  # for people, not records
            write_whole(folder / "manifest.json", renamed.to_json().encode())


def _refuse_stranger(target: Target) -> None:
    folder = target.folder
    before = read_manifest(folder)
    if next(folder.glob("shard-*.safetensors"), None) is None:
        return
    if before is None:
        raise RunError(
            f"{folder} holds shards of an unknown scan, its manifest is gone; name another folder, "
            "or delete this one."
        )
    differences = target.manifest.differences(before)
    if differences:
        raise RunError(
            f"{folder} holds a scan of something else: {', '.join(differences)} differ. Name "
            "another folder, or delete this one."
        )


def claim_together(targets: Sequence[Target], team: Team) -> None:
    """Let the first process of a team claim the folders; the others are to do the very same.

    Raises:
        RunError: a folder holds another scan, or this process is about to make another one than
            the first.
    """
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
        "The processes do not scan the same thing: "
        f"{', '.join(sorted(differing)) or 'the number of layers'} of this one and the first "
        "differ. Give all the same weights, seed and images."
    )


def refuse_taken(target: Target) -> None:
    """Raise if the folder was claimed by another scan since.

    Raises:
        RunError: it was.
    """
    now = read_manifest(target.folder)
    if now is None or now.scan_id != target.manifest.scan_id:
        raise RunError(
            f"{target.folder} was taken by another scan meanwhile; let that one end, or name "
            "another folder."
        )


# The pass itself: run the network shard by shard, write the records.


_PATIENCE = 60.0  # seconds; NFS shows a folder anew after half of that
_PAUSE = 0.5


def library_versions() -> dict[str, str]:
    """Versions that a manifest tells."""
    return {
        "unbraid": version("unbraid"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


@contextmanager
def threads_fixed(n: int) -> Iterator[None]:
    """Compute with a number of threads, since sums round otherwise with more; 0 for any."""
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def scan_shards(
    model: nn.Module,
    targets: Sequence[Target],
    dataset: Dataset[Any],
    given: Sequence[int],
    places: Sequence[int],
    *,
    team: Team,
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
        team: those who do it together, shard by shard.
        workers: processes that load images.
        progress: show a progress bar.
    """
    same = targets[0].manifest  # for every layer
    work = _Work(targets, places, team)
    groups, ids = groups_of(dataset), ids_of(dataset)
    pinned = device_of(model).type == "cuda"
    batches = load(dataset, work, workers=workers, pinned=pinned)
    title = f"Scanning {', '.join(t.manifest.layer.name for t in targets)}"
    n_done = len(places) - sum(len(work.places_of(k)) for k in work.lacking())
    with (
        image_progress(title, len(places), n_done, show=progress and team.first) as advance,
        deaths_told(),
        undisturbed(model),
        kept_channels_last(model) if same.channels_last else nullcontext(),
        threads_fixed(same.threads),
        torch.inference_mode(False),  # whatever mode the caller is in
        torch.enable_grad(),
        ExitStack() as stack,
    ):
        at_once = same.batch_size
        done: list[list[Records]] = []  # of the shard so far
        n_loaded = 0
        n_fewest = work.fewest()
        looked = False
        for items in batches:
            shard = work.begun[0]
            good, broken = sort_out(items, same.skip_broken)
            if same.labels == "given":
                _check_labels_agree(good, given)
            if good and not looked:
                _look(model, targets, good, n_fewest)
                looked = True
                if same.labels == "given":
                    stack.enter_context(_labels_checked(model, dataset, places))
            run = partial(
                scan_batch,
                model,
                [t.place for t in shard.targets],
                min_share=same.min_share,
                positions=same.positions,
                predicted=same.labels == "predicted",
                autocast=same.autocast,
                # Once a shard is enough, and costs next to nothing.
                check=not any(len(records[0]) for records in done),
            )
            parts, at_once = in_portions(run, good, at_once)
            for one in parts[0]:
                one.broken = torch.tensor(broken, dtype=torch.int64)
            done += parts
            n_loaded += 1
            advance(team.count(len(items)))
            if n_loaded == shard.n_batches:
                _write(shard, done, groups, ids)
                work.begun.popleft()
                done, n_loaded = [], 0
                at_once = same.batch_size  # so that a shard does not depend on the one before
        team.finish()
        if n_ranks() > 1:
            await_shards(targets, _PATIENCE)
        advance(team.count(0))


def await_shards(targets: Sequence[Target], seconds: float) -> None:
    """Wait for shards that others wrote, which a network file system may show late, but not longer.

    What is then still not there, the reader tells.
    """
    until = time.monotonic() + seconds
    missing = [(target, k) for target in targets for k in range(target.manifest.n_shards)]
    while missing := [(target, k) for target, k in missing if target.lacks(k)]:
        if time.monotonic() > until:
            return
        time.sleep(_PAUSE)


def in_portions(
    run: Callable[[Sequence[GoodItem]], list[Records]], items: Sequence[GoodItem], at_once: int
) -> tuple[list[list[Records]], int]:
    """Run images as many at a time as the device's memory holds.

    Args:
        run: from images to their records, layer by layer.
        items: the images.
        at_once: how many to try first; halved as long as memory is too small.

    Returns:
        The records of each portion, at least one, and how many images fitted at once.

    Raises:
        OutOfMemory: there is no room for a single image.
    """
    done: list[list[Records]] = []
    start = 0
    while start < len(items) or not done:
        try:
            done.append(run(items[start : start + at_once]))
            start += at_once
        except Exception as error:
            if not (isinstance(error, OutOfMemory) or memory_full(error)):
                raise
            if at_once == 1:
                raise OutOfMemory("The device's memory holds not even one image.") from None
            at_once = (at_once + 1) // 2
            warnings.warn(
                f"The device is out of memory; going on with {at_once} images at a time.",
                stacklevel=2,
            )
    return done, at_once


@dataclass(frozen=True)
class _Shard:
    """A shard being made, and the layers that lack it."""

    number: int
    targets: list[Target]
    n_batches: int


class _Work(Sampler[list[int]]):
    """The batches of the shards that this process claims, one shard after the other.

    Shards are claimed as the loader asks for more, with workers somewhat ahead of the network.
    """

    def __init__(self, targets: Sequence[Target], places: Sequence[int], team: Team) -> None:
        self.begun: deque[_Shard] = deque()
        self._targets, self._places, self._team = targets, places, team
        self._same = targets[0].manifest

    def lacking(self) -> list[int]:
        """Shards that some layer lacks."""
        return [k for k in range(self._same.n_shards) if any(t.lacks(k) for t in self._targets)]

    def fewest(self) -> int:
        """How many images the smallest batch holds, of shards that some layer lacks."""
        sizes = [len(self.places_of(k)) for k in self.lacking()]
        return min(((size - 1) % self._same.batch_size + 1 for size in sizes), default=1)

    def places_of(self, shard: int) -> Sequence[int]:
        size = self._same.shard_size
        return self._places[shard * size : (shard + 1) * size]

    def __iter__(self) -> Iterator[list[int]]:
        size = self._same.batch_size
        for number in self._team.claims(self._same.n_shards):
            targets = [target for target in self._targets if target.lacks(number)]
            if not targets:
                continue
            places = self.places_of(number)
            # A batch never crosses a shard, so that a record does not depend on who made it.
            batches = [list(places[i : i + size]) for i in range(0, len(places), size)]
            self.begun.append(_Shard(number, targets, len(batches)))
            yield from batches


def _look(
    model: nn.Module, targets: Sequence[Target], good: Sequence[GoodItem], n_fewest: int
) -> None:
    """Look at what the network computes of the first images, before the work begins."""
    index = torch.tensor([item[0] for item in good], dtype=torch.int64)
    images = as_batch([item[1] for item in good], index)
    layers = [(target.manifest.layer, target.module) for target in targets]
    with suppress(OutOfMemory), uncompiled():  # memory is a thing that the scan can deal with
        look_first(model, images.to(device_of(model)), layers, n_fewest)


def _write(
    shard: _Shard,
    done: Sequence[Sequence[Records]],
    groups: list[int] | None,
    ids: list[str] | None,
) -> None:
    """Write a shard of every layer that lacks it, from the records of its batches."""
    for target, parts in zip(shard.targets, zip(*done, strict=True), strict=True):
        joined = join_records(parts)
        if groups is not None:
            own = [groups[i] for i in joined.index.tolist()]
            joined.group = torch.tensor(own, dtype=torch.int64)
        if ids is not None:
            joined.id_start, joined.id_bytes = pack_ids([ids[i] for i in joined.index.tolist()])
        refuse_taken(target)
        write_shard(target.folder, shard.number, joined, target.manifest)


@contextmanager
def _labels_checked(
    model: nn.Module, dataset: Dataset[Any], places: Sequence[int]
) -> Iterator[None]:
    """Check all labels that a list gives as soon as the network tells how many outputs it has.

    Otherwise a wrong one would be told when its batch comes, perhaps after days.
    """
    listed = listed_labels(dataset)
    if listed is None:
        yield
        return
    index = torch.tensor(places, dtype=torch.int64)
    labels = torch.tensor(listed, dtype=torch.int64)[index]

    def hook(_model: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        check_labels(labels, index, as_logits(output, len(args[0])))

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _check_labels_agree(items: Sequence[GoodItem], labels: Sequence[int]) -> None:
    """Raise if an image comes with another label than the data set's list has for it."""
    for index, _, label in items:
        if label != labels[index]:
            raise DataError(
                f"Image {index} comes with label {label}, but the data set lists {labels[index]} "
                "for it; make the two agree."
            )
