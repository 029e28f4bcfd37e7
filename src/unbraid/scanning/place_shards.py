"""Places on disk: a part beside each shard while a scan runs, then one scan of places.

A part holds what of a shard's places nothing seen before by its process beats. Merged, in the order
of the images, parts give the same scan whoever made them and whatever each left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import names_in, read_tensors, remove_leftovers, write_tensors, write_whole
from unbraid.images.identity import pack_ids
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.fields import Records, choose_records, join_records, no_records
from unbraid.scanning.manifest import Manifest, read_manifest
from unbraid.scanning.places import (
    PlaceKeeper,
    Places,
    add_peaks,
    drawn,
    n_drawn,
    strongest,
)
from unbraid.scanning.records import PEAKS, PLACES, shards_there, sound_layer, write_shard

_SHARD_NUMBERS = 2**24  # inputs in a shard: 64 MiB in float32
_MOST_PLACES = 4096  # in a shard
_MOST_BYTES = 20 * 10**9  # of a scan of places
_LISTED = ("channel", "at", "response", "key", "peaks")
_SHOWN = ("image", "label", "prediction", "position", "rows", "columns", "inputs")


def most_place_bytes(layer: LayerSpec, places: int, number: int) -> int:
    """How much disk a layer's scan of places takes at most, of numbers of so many bytes."""
    return (places * layer.n_out + n_drawn(layer)) * (layer.groups * layer.n_taps * number + 128)


def refuse_too_many(layer: LayerSpec, places: int, number: int) -> None:
    """Raise a UsageError if so many places of each channel do not fit."""
    n_bytes = most_place_bytes(layer, places, number)
    if places and n_bytes > _MOST_BYTES:
        most = places * _MOST_BYTES // n_bytes
        instead = f"ask for {most} at most" if most else "choose another layer"
        raise UsageError(
            f"{places} places of each channel of layer {layer.name!r} may take "
            f"{n_bytes / 1e9:.0f} GB; {instead}."
        )


def part_path(folder: Path, shard: int) -> Path:
    """Return the file of the places of a shard."""
    return folder / PLACES / f"part-{shard:06d}.safetensors"


def write_part(folder: Path, shard: int, places: Places | None, manifest: Manifest) -> None:
    """Write the places of a shard; none of one without images."""
    if part_path(folder, shard).exists():  # as another start of the same scan made it
        return
    tensors = {} if places is None else vars(places)
    write_tensors(part_path(folder, shard), tensors, {"scan": manifest.scan_id})


def lacks_part(folder: Path, shard: int, manifest: Manifest) -> bool:
    """Whether the places of a shard are still needed, and not there."""
    if not manifest.places or part_path(folder, shard).exists():
        return False
    return not is_merged(folder, manifest)


def remove_strange_parts(folder: Path, manifest: Manifest) -> None:
    """Delete what another scan, or a writer that lives no more, left among the parts."""
    remove_leftovers(folder / PLACES)
    for path in (folder / PLACES).glob("part-*.safetensors"):
        _, about = read_tensors(path, [])
        if about.get("scan") != manifest.scan_id:
            path.unlink()


def learn_parts(folder: Path, manifest: Manifest, keeper: PlaceKeeper) -> None:
    """Tell a keeper what the parts that are there hold, so that it keeps no more than is needed."""
    for shard in range(manifest.n_shards):
        if part_path(folder, shard).exists():
            own, _ = _lists(part_path(folder, shard))
            if own:
                keeper.learn(own["channel"], own["response"], own["key"])


def is_merged(folder: Path, manifest: Manifest) -> bool:
    """Whether the scan of places is finished, and this scan's."""
    there = read_manifest(folder / PLACES)
    return (
        there is not None
        and there.data == _data_of(manifest)
        and (not there.n_prefix or (folder / PLACES / PEAKS).exists())
        and len(shards_there(folder / PLACES, there)) == there.n_shards
    )


def merge_parts(
    folder: Path, manifest: Manifest, groups: Sequence[int] | None, ids: Sequence[str] | None
) -> None:
    """Make the scan of places of all parts, unless it is there, and delete the parts."""
    try:
        if not is_merged(folder, manifest):
            _merge(folder, manifest, groups, ids)
    except RunError:
        # Another start of the same scan may have merged the parts meanwhile, and deleted them.
        if not is_merged(folder, manifest):
            raise
    weights = folder / PLACES / "layer.safetensors"
    if is_merged(folder, manifest) and not weights.exists():  # lost, or damaged and set aside
        write_tensors(weights, sound_layer(folder, manifest), {})
    for path in (folder / PLACES).glob("part-*.safetensors"):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Chosen:
    """What is kept of all parts: U places, in the order of shards, images and positions."""

    used: dict[int, Tensor]  # by shard, which of the part's places
    drawn: Tensor  # (U,), which are drawn evenly
    place: Tensor  # (M,), entries of lists, by place and channel
    channel: Tensor  # (M,)
    peaks: Tensor  # (C_out, prefix)


def _merge(
    folder: Path, manifest: Manifest, groups: Sequence[int] | None, ids: Sequence[str] | None
) -> None:
    chosen = _choose(folder, manifest)
    if chosen is None:
        return  # no image could be read, which the scan tells
    spec, out = manifest.layer, folder / PLACES
    own = replace(
        manifest,
        data=_data_of(manifest),
        places_of=manifest.data,
        n_images=len(chosen.drawn),
        shard_size=max(1, min(_MOST_PLACES, _SHARD_NUMBERS // (spec.groups * spec.n_taps))),
        positions=False,
        first="",
        n_first=0,
        n_prefix=chosen.peaks.shape[1],
    )
    there = read_manifest(out)
    if there is not None and there.data != own.data:  # of another scan; ours comes last
        (out / "manifest.json").unlink(missing_ok=True)
    write_tensors(out / "layer.safetensors", sound_layer(folder, manifest), {})
    if chosen.peaks.shape[1]:
        write_tensors(out / PEAKS, {"peaks": chosen.peaks}, {})
    parts = _records(folder, chosen, groups, ids, spec)
    for number, records in enumerate(_in_shards(parts, own.shard_size)):
        write_shard(out, number, records, own)
    write_whole(out / "manifest.json", own.to_json().encode())


def _data_of(manifest: Manifest) -> str:
    """What stands for the places of a scan as a data set's fingerprint does for images."""
    return hashlib.sha256(f"places of {manifest.scan_id}".encode()).hexdigest()


def _lists(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what a part says of lists, nothing if its shard has no image; and its description."""
    return read_tensors(path, sorted(names_in(path) & set(_LISTED)))


def _choose(folder: Path, manifest: Manifest) -> _Chosen | None:
    """Choose from all parts what is kept; None if there is nothing."""
    parts: dict[int, dict[str, Tensor]] = {}
    start = 0
    for shard in range(manifest.n_shards):
        path = part_path(folder, shard)
        own, about = _lists(path)
        if about.get("scan") != manifest.scan_id:
            raise RunError(f"{path} is of another scan; delete it and start the scan again.")
        if own:
            parts[shard] = own | {"at": own["at"] + start}
            start += len(own["key"])
    if not parts:
        return None
    channel, at, response, key = (
        torch.cat([own[name] for own in parts.values()])
        for name in ("channel", "at", "response", "key")
    )
    entries = strongest(channel, response, manifest.places)
    by_chance = drawn(key, n_drawn(manifest.layer))
    used = by_chance.clone()
    used[at[entries]] = True
    place = (used.cumsum(0) - 1)[at[entries]]
    order = place.argsort(stable=True)  # within a place channels rise, as they do in the entries
    sizes = [len(own["key"]) for own in parts.values()]
    return _Chosen(
        used=dict(zip(parts, used.split(sizes), strict=True)),
        drawn=by_chance[used],
        place=place[order],
        channel=channel[entries][order],
        peaks=add_peaks([own["peaks"] for own in parts.values()]),
    )


def _records(
    folder: Path,
    chosen: _Chosen,
    groups: Sequence[int] | None,
    ids: Sequence[str] | None,
    spec: LayerSpec,
) -> Iterator[Records]:
    """Records of the places kept of each part, numbered through."""
    start = 0
    for shard, used in chosen.used.items():
        whole, _ = read_tensors(part_path(folder, shard), _SHOWN)
        own = {name: column[used] for name, column in whole.items()}
        inputs = own.pop("inputs")
        images, n = own["image"].tolist(), len(inputs)
        none = torch.zeros(n + 1, dtype=torch.int64)
        here = (chosen.place >= start) & (chosen.place < start + n)
        n_kept = (chosen.place[here] - start).bincount(minlength=n)
        id_start, id_bytes = pack_ids(_ids(own, ids))
        yield Records(
            **vars(no_records(spec, positions=False))
            | own
            | {
                "index": torch.arange(start, start + n, dtype=torch.int64),
                "n_positions": torch.ones(n, dtype=torch.int64),
                "pooled": inputs,
                "share_start": none,
                "spread_start": none,
                "spread": inputs[:0],  # within a place nothing varies
                # What lies in one image is not to be judged by itself.
                "group": torch.tensor(
                    [groups[i] for i in images] if groups else images, dtype=torch.int64
                ),
                "id_start": id_start,
                "id_bytes": id_bytes,
                "drawn": chosen.drawn[start : start + n].to(torch.uint8),
                "kept_start": torch.cat([none[:1], n_kept.cumsum(0)]),
                "kept_channel": chosen.channel[here].to(torch.int32),
            }
        )
        start += n


def _ids(own: Mapping[str, Tensor], ids: Sequence[str] | None) -> list[str]:
    """Name places by their image, row and column."""
    at = (own[name].tolist() for name in ("image", "position", "columns"))
    return [
        f"{ids[image] if ids else f'image {image}'} @ {position // columns},{position % columns}"
        for image, position, columns in zip(*at, strict=True)
    ]


def _in_shards(parts: Iterable[Records], size: int) -> Iterator[Records]:
    """Put records together and part them again, so many at a time."""
    held: list[Records] = []
    for part in parts:
        held.append(part)
        while sum(map(len, held)) >= size:
            whole = join_records(held)
            first = torch.arange(len(whole), dtype=torch.int64) < size
            held = [choose_records(whole, ~first)]
            yield choose_records(whole, first)
    if sum(map(len, held)):
        yield join_records(held)
