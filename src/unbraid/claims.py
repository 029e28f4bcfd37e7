"""Whose folder it is: a scan claims folders for its records, or finds that they are another's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from unbraid.batch import Place
from unbraid.describe import bias_of, weight_rows
from unbraid.errors import RunError
from unbraid.files import write_tensors, write_whole
from unbraid.manifest import Manifest, read_manifest
from unbraid.records import shard_path
from unbraid.team import Team
from unbraid.temporary import remove_leftovers


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
