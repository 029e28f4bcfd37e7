"""The pass itself: claim folders and shards, run the network shard by shard, write the records."""

from __future__ import annotations

import itertools
import json
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from unbraid.base.errors import CannotRun, DataError, OutOfMemory, RunError, memory_full
from unbraid.base.files import remove_leftovers, write_tensors, write_whole
from unbraid.base.tables import count
from unbraid.base.team import Team, n_ranks
from unbraid.images.batches import (
    as_batch,
    deaths_told,
    image_progress,
    in_batches,
    load,
    of_one_size,
)
from unbraid.images.broken import Loaded, sort_out
from unbraid.images.dataset import groups_of, labels_of, listed_labels
from unbraid.images.identity import fingerprint, ids_of, pack_ids
from unbraid.images.mapped import Numbers
from unbraid.images.several_labels import repeats
from unbraid.images.which import images_named
from unbraid.networks.copying import device_of
from unbraid.networks.formats import kept_channels_last
from unbraid.networks.layers import bias_of, weight_rows
from unbraid.networks.outputs import check_labels
from unbraid.networks.preflight import look_first, needs_company
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.fields import Records, join_records
from unbraid.scanning.manifest import Manifest, read_manifest
from unbraid.scanning.place_shards import (
    lacks_part,
    learn_parts,
    merge_parts,
    remove_strange_parts,
    write_part,
)
from unbraid.scanning.places import PlaceKeeper, tokens_of
from unbraid.scanning.records import read_shard, shard_path, shards_there, write_shard
from unbraid.scanning.scan_options import ScanOptions

_PATIENCE = 60.0  # seconds; NFS shows a folder again after half of that
_PAUSE = 0.5
_MOST_NAMED = 3  # layers in a title


def images_per_shard(positions: bool) -> int:
    """Choose how many images a shard holds: pooled inputs are small, input maps are not."""
    return 128 if positions else 1024


@dataclass(frozen=True)
class Target:
    """A layer to scan, and the folder for its records."""

    module: nn.Module
    manifest: Manifest
    folder: Path

    def lacks(self, shard: int) -> bool:
        """Whether a shard, or what it says of places, is still to be made."""
        there = shard_path(self.folder, shard).exists()
        return not there or lacks_part(self.folder, shard, self.manifest)


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
        remove_strange_parts(folder, manifest)
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

    def prepare() -> str:
        claim(targets)
        return json.dumps([target.manifest.to_json() for target in targets])

    first = team.lead(prepare)
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
    repeated = repeats(dataset, indices) if same.places else frozenset()
    pinned = device_of(model).type == "cuda"
    work = _batches(targets, indices, team)
    batches = load(dataset, work, workers=options.workers, pinned=pinned)
    keepers = _keepers(model, targets)
    names = [target.manifest.layer.name for target in targets]
    many = len(names) > _MOST_NAMED
    title = f"Scanning {count(len(names), 'layer') if many else ', '.join(names)}"
    n_done = len(indices) - sum(sizes)
    show = options.progress and team.first
    with ExitStack() as stack:
        advance = stack.enter_context(image_progress(title, len(indices), n_done, show=show))
        stack.enter_context(images_named(dataset))
        stack.enter_context(deaths_told())
        stack.enter_context(undisturbed(model))
        if same.channels_last:
            stack.enter_context(kept_channels_last(model))
        # Sums round otherwise with another number of threads.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(same.threads or torch.get_num_threads())
        looked = False
        shard_of = partial(_shard_of, indices, same)
        for number, of_shard in itertools.groupby(batches, key=shard_of):
            lacking = [target for target in targets if target.lacks(number)] or targets
            at_once = same.batch_size
            parts: list[list[Records]] = []  # of the shard so far, layer by layer
            for items in of_shard:
                good, broken = sort_out(items, options.skip_broken)
                if options.labels == "given":
                    _check_labels_agree(good, labels)
                if good and not looked:
                    named = options.labels == "given" and options.target.of_class
                    listed = listed_labels(dataset) if named else None
                    _look(model, targets, good, n_fewest, listed, indices)
                    looked = True
                run = partial(
                    scan_batch,
                    model,
                    [
                        Place(target.module, target.manifest.layer, keepers.get(target.folder))
                        for target in lacking
                    ],
                    number_of=partial(_number_of, indices, same),
                    sampled=sampled,
                    repeated=repeated,
                    min_share=options.min_share,
                    positions=options.positions,
                    labels=options.labels,
                    target=options.target,
                    autocast=options.autocast,
                    # Once a shard is enough, and costs next to nothing.
                    check=not any(len(records[0]) for records in parts),
                )
                own: list[list[Records]] = []
                for some in list(of_one_size(good)) or [good]:  # of none, records of no image
                    done, at_once = _in_portions(run, some, at_once)
                    own += done
                for records in own[0]:
                    records.broken = torch.tensor(broken, dtype=torch.int64)
                parts += own
                advance(team.count(len(items)))
            for target, of_layer in zip(lacking, zip(*parts, strict=True), strict=True):
                keeper = keepers.get(target.folder)
                _write(target, number, join_records(of_layer), groups, ids, keeper)
        team.finish()
        if n_ranks() > 1:
            await_shards(targets, _PATIENCE)
        if same.places:
            team.lead(partial(_merge_places, targets, groups, ids), "places")
        advance(team.count(0))


def _shard_of(indices: Sequence[int], manifest: Manifest, items: Sequence[Loaded]) -> int:
    """Which shard a batch belongs to."""
    return _number_of(indices, manifest, items[0].index) // manifest.shard_size


def _number_of(indices: Sequence[int], manifest: Manifest, index: int) -> int:
    """An image's number among those concerned; they are in order, and so are those that come first.

    It is the same with a first look or without.
    """
    n_first = manifest.n_first
    number = bisect_left(indices, index, 0, n_first)
    if number == n_first or indices[number] != index:
        number = bisect_left(indices, index, n_first)
    return number


def _keepers(model: nn.Module, targets: Sequence[Target]) -> dict[Path, PlaceKeeper]:
    """What keeps the places of each layer, by folder, if any are to be kept."""
    same = targets[0].manifest
    if not same.places:
        return {}
    tokens = tokens_of(model, same.prefix_tokens)
    keepers = {}
    for target in targets:
        keeper = PlaceKeeper(target.manifest.layer, same.places, tokens)
        learn_parts(target.folder, target.manifest, keeper)
        keepers[target.folder] = keeper
    return keepers


def _merge_places(
    targets: Sequence[Target], groups: Sequence[int] | None, ids: Sequence[str] | None
) -> str:
    for target in targets:
        merge_parts(target.folder, target.manifest, groups, ids)
    return ""


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
        except CannotRun as error:
            # Seen only now where the images before were of another size.
            alone = items[start : start + at_once]
            if len(alone) == 1 and _runs(run, [*alone, *alone]):
                raise needs_company(error) from None
            raise
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


def _runs(run: Callable[[Sequence[Loaded]], list[Records]], items: Sequence[Loaded]) -> bool:
    try:
        run(items)
    except Exception:  # of a network of anyone's own
        return False
    return True


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
    first, *others = of_one_size(good)
    images = as_batch([item.image for item in first])
    n_fewest = 1 if others else n_fewest  # those of another size may stand alone
    layers = [(target.manifest.layer, target.module) for target in targets]
    with suppress(OutOfMemory):  # memory is a thing that the scan can deal with
        logits = look_first(model, images.to(device_of(model)), layers, n_fewest)
        if listed is not None:
            # Of a list in a file one image of each class will do.
            mapped = isinstance(listed, Numbers) and len(indices) == len(listed)
            chosen = sorted(listed.first().values()) if mapped else list(indices)  # type: ignore[attr-defined]
            label = torch.tensor([listed[k] for k in chosen], dtype=torch.int64)
            check_labels(label, torch.tensor(chosen, dtype=torch.int64), logits)


def _check_labels_agree(items: Sequence[Loaded], labels: Sequence[int]) -> None:
    """Raise if an image comes with another label than the data set's list has for it."""
    for item in items:
        if item.label != labels[item.index]:
            told = f"comes with label {item.label}, but the data set lists {labels[item.index]}"
            raise DataError.of_image("", item.index, f"{told} for it; make the two agree.")


def take_over(
    targets: Sequence[Target],
    looks: Mapping[str, Path],
    dataset: Dataset[Any],
    first: Sequence[int],
    options: ScanOptions,
) -> None:
    """Write the shards of the images that come first, where a first look made the same records.

    What another network, image or option made, or cannot be read, is left to be scanned; a warning
    names what is another.
    """
    lacking = [t for t in targets if any(map(t.lacks, range(len(first) // t.manifest.shard_size)))]
    if not (first and lacking) or lacking[0].manifest.places:  # whose parts a look has merged
        return
    alone = Subset(dataset, first)
    data = fingerprint(alone, labels_of(alone, needed=options.labels == "given"))
    groups, ids = groups_of(dataset), ids_of(dataset)
    places = torch.tensor(first, dtype=torch.int64)
    others: set[str] = set()
    for target in lacking:
        own = target.manifest
        wanted = replace(own, data=data, n_images=len(first), first="", n_first=0)
        folder = looks[own.layer.name]
        with suppress(RunError):
            look = read_manifest(folder)
            if look is None:
                continue
            if differences := _differences(wanted, look):
                others.update(differences)
                continue
            for number in filter(target.lacks, shards_there(folder, look)):
                records = read_shard(folder, number, look)
                if len(records.broken) and not options.skip_broken:
                    break  # the scan tells of them
                records.index, records.broken = places[records.index], places[records.broken]
                _write(target, number, records, groups, ids)
    if others:
        warnings.warn(
            f"The records of the first look are made again, with a difference in "
            f"{', '.join(sorted(others))}.",
            stacklevel=4,
        )


def _differences(wanted: Manifest, look: Manifest) -> list[str]:
    """Name, in words, why records of a first look would not be the same to the last bit."""
    batches = [] if look.batch_size == wanted.batch_size else ["the batch size"]
    return batches + wanted.differences(look)


def _write(
    target: Target,
    shard: int,
    records: Records,
    groups: Sequence[int] | None,
    ids: Sequence[str] | None,
    keeper: PlaceKeeper | None = None,
) -> None:
    """Write a shard of a layer, with what the data set says of its images, and its places."""
    index = records.index.tolist()
    if groups is not None:
        records.group = torch.tensor([groups[i] for i in index], dtype=torch.int64)
    if ids is not None:
        records.id_start, records.id_bytes = pack_ids([ids[i] for i in index])
    refuse_taken(target)
    if keeper is not None:  # before the shard, so that where that is, these are
        write_part(target.folder, shard, keeper.close(), target.manifest)
    write_shard(target.folder, shard, records, target.manifest)
