"""Verify what scans and runs left on disk; set damaged files aside, to be made anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from unbraid.errors import RunError, UnbraidError
from unbraid.evaluation import read_output
from unbraid.manifest import read_manifest
from unbraid.records import shard_path, shards_there, sound_layer, sound_shard
from unbraid.settings import read_settings
from unbraid.splits import Split
from unbraid.tables import count
from unbraid.temporary import remove_leftovers

ASIDE = ".damaged"  # added to a damaged file's name


@dataclass
class Checkup:
    """What was found in a folder."""

    n_sound: int = 0  # files
    damaged: list[str] = field(default_factory=list)  # files set aside, and what is wrong
    missing: list[str] = field(default_factory=list)  # what a scan lacks
    lost: list[str] = field(default_factory=list)  # what cannot be repaired

    @property
    def whole(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.damaged or self.missing or self.lost)

    def __str__(self) -> str:
        """Say what was found, and what to do."""
        lines = [f"{count(self.n_sound, 'file')} sound."]
        lines += [f"Set aside as *{ASIDE}: {text}" for text in self.damaged]
        lines += [f"Missing: {text}" for text in self.missing]
        lines += [f"Cannot be repaired: {text}" for text in self.lost]
        if self.damaged or self.missing:
            lines.append("Start the command that made the folder again; it makes what is missing.")
        return "\n".join(lines)


def check(folder: str | Path) -> Checkup:
    """Read everything that scans and runs left in a folder, and repair what can be repaired.

    Every shard's checksums and number of images are verified. A damaged file is renamed, so that
    the next start of the same command makes it anew; what a killed process left half-written goes.

    Args:
        folder: of a scan, of a run, or of several of either.

    Returns:
        What was found.

    Raises:
        RunError: there is no scan and no run.
    """
    folder = Path(folder)
    found = Checkup()
    scans = [path for path in _folders(folder) if _holds_scan(path)]
    runs = [path for path in _folders(folder) if (path / "settings.json").exists()]
    if not scans and not runs:
        raise RunError(f"{folder} holds no scan and no run; name a folder that does.")
    for path in scans:
        _check_scan(path, found)
    for path in runs:
        _check_run(path, found)
    return found


def _folders(folder: Path) -> Iterator[Path]:
    """The folder, and those in it down to the scans of a run over several layers."""
    yield folder
    for pattern in ("*/", "*/*/"):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_dir())


def _holds_scan(folder: Path) -> bool:
    names = ("manifest.json", "shard-*.safetensors")
    return any(next(folder.glob(name), None) for name in names)


def _check_scan(folder: Path, found: Checkup) -> None:
    remove_leftovers(folder)
    try:
        manifest = read_manifest(folder)
    except RunError as error:
        found.lost.append(str(error))
        return
    if manifest is None:
        found.lost.append(f"{folder} holds shards without a manifest; scan anew.")
        return
    found.n_sound += 1
    layer = folder / "layer.safetensors"
    _check_file(layer, found, partial(sound_layer, folder, manifest))
    there = shards_there(folder, manifest)
    n_missing = manifest.n_shards - len(there)
    if n_missing:
        found.missing.append(f"{count(n_missing, 'shard')} of {manifest.n_shards} in {folder}")
    for shard in there:
        read = partial(sound_shard, folder, manifest, shard)
        _check_file(shard_path(folder, shard), found, read)


def _check_run(folder: Path, found: Checkup) -> None:
    _check_file(folder / "settings.json", found, partial(read_settings, folder))
    for name in ("split.safetensors", "split-published.safetensors"):
        _check_file(folder / name, found, partial(Split.load, folder / name))
    evaluation = folder / "evaluation.json"
    _check_file(evaluation, found, partial(read_output, evaluation))


def _check_file(path: Path, found: Checkup, read: Callable[[], object]) -> None:
    """Read a file if it is there, and set it aside if it cannot be read."""
    if not path.exists():
        return
    try:
        read()
    except UnbraidError as error:
        path.replace(path.with_name(path.name + ASIDE))
        found.damaged.append(str(error))
    else:
        found.n_sound += 1
