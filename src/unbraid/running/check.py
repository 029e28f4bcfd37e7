"""Verify what scans and runs left on disk; set damaged files aside, to be made anew."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from unbraid.base.errors import RunError, UnbraidError, UnreadableError, brief
from unbraid.base.files import remove_leftovers, set_aside
from unbraid.base.tables import count
from unbraid.finding.findings import COLUMNS as FINDINGS
from unbraid.finding.thresholds import COLUMNS as SENSITIVITY
from unbraid.measuring.results import read_ablation, read_channels, read_output, read_semantics
from unbraid.running.folders import (
    FEATURES,
    SCANS,
    SETTINGS,
    home_of,
    is_numbered,
    read_settings,
    tell_settings,
)
from unbraid.scanning.manifest import Manifest, read_manifest
from unbraid.scanning.records import read_shard, shard_path, shards_there, sound_layer
from unbraid.splitting.splits import Split
from unbraid.visualizing.features import Features

# What a folder holds, in plain words: each scan and each run, and how far it has come.


_PARTS = {
    "split.safetensors": "split",
    "evaluation.json": "evaluation",
    f"{FEATURES}/features.json": "features",
    "report.html": "report",
}


def describe_scans(folders: Iterable[Path]) -> list[str]:
    """Name each scan: its layer, its images, and whether it is finished."""
    return [f"{folder}: {_scan_in_words(folder)}." for folder in folders]


def describe_runs(folders: Iterable[Path]) -> list[str]:
    """Name each run: its settings, what it found, and what of it is there."""
    return [f"{folder}: {_run_in_words(folder)}." for folder in folders]


def _scan_in_words(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
    except RunError:
        manifest = None
    if manifest is None:
        return "a scan whose manifest cannot be read"
    n_there, n_shards = len(shards_there(folder, manifest)), manifest.n_shards
    done = "finished" if n_there == n_shards else f"{n_there} of {count(n_shards, 'shard')} there"
    return f"a scan of layer {manifest.layer.name}, {_images_in_words(manifest)}, {done}"


def _images_in_words(manifest: Manifest) -> str:
    images = count(manifest.n_images, "image")
    if manifest.classes is not None:
        images += f" of {count(len(manifest.classes), 'class', 'classes')}"
    return f"{images}, with positions" if manifest.positions else images


def _run_in_words(folder: Path) -> str:
    try:
        settings = read_settings(folder)
    except RunError:
        settings = None
    known = "with unknown settings" if settings is None else f"with {tell_settings(settings)}"
    parts = [word for name, word in _PARTS.items() if (folder / name).exists()]
    return f"a run {known}; {_findings_in_words(folder)}; {', '.join(parts) or 'no results'}"


def _findings_in_words(folder: Path) -> str:
    try:
        with (folder / "findings.csv").open(encoding="utf-8", newline="") as file:
            channels = [row["channel"] for row in csv.DictReader(file, strict=True)]
    except (OSError, ValueError, KeyError, csv.Error):
        return "findings not there"
    if not channels:
        return "nothing found"
    return f"{count(len(channels), 'pair')} in {count(len(set(channels)), 'channel')}"


# Verify what scans and runs left on disk; set damaged files aside, to be made anew.


ASIDE = ".damaged"  # added to a damaged file's name
_TEXTS = ("name1", "name2", "uncertain")  # columns that are not of numbers
_IF_FOUND = ("split.safetensors", "split-published.safetensors", "evaluation.json")


@dataclass
class Checkup:
    """What was found in a folder."""

    n_sound: int = 0  # files
    damaged: list[str] = field(default_factory=list)  # files set aside, and what is wrong
    missing: list[str] = field(default_factory=list)  # what a scan or run lacks
    unreadable: list[str] = field(default_factory=list)  # what could not be looked at, left alone
    lost: list[str] = field(default_factory=list)  # what cannot be repaired
    holds: list[str] = field(default_factory=list)  # each scan and run, and how far it has come

    @property
    def whole(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.damaged or self.missing or self.unreadable or self.lost)

    def __str__(self) -> str:
        """Say what was found, and what to do."""
        lines = [f"{count(self.n_sound, 'file')} sound."]
        lines += [f"Set aside as *{ASIDE}: {text}" for text in self.damaged]
        lines += [f"Missing: {text}" for text in self.missing]
        lines += [f"Not read, and left as it is: {text}" for text in self.unreadable]
        lines += [f"Cannot be repaired: {text}" for text in self.lost]
        if self.damaged or self.missing:
            lines.append("Start the command that made the folder again; it makes what is missing.")
        return "\n".join(lines)


def check(folder: str | Path) -> Checkup:
    """Say what scans and runs left in a folder, and repair what can be repaired.

    Every tensor's checksum, every shard's records, and the form of all JSON, CSV and PNG files are
    verified; of a report.html only that it is there. What proves damaged is renamed, so that the
    next start of the same command makes it anew; what cannot be read, for want of permission or
    because another version wrote it, is told and left. What a killed process left half-written
    goes.

    Args:
        folder: of a scan, of a run, or of several of either.

    Returns:
        What was found.

    Raises:
        RunError: there is no scan and no run.
    """
    folder = Path(folder)
    found = Checkup()
    there = list(_folders(folder, found))
    scans = [path for path in there if _holds_scan(path)]
    runs = [path for path in there if _holds_run(path)]
    if not (scans or runs or found.unreadable):
        raise RunError(f"{folder} holds no scan and no run; name a folder that does.")
    for path in scans:
        _check_scan(path, found)
    for path in runs:
        _check_run(path, found)
    found.holds = describe_runs(runs) + describe_scans(scans)
    return found


def _folders(folder: Path, found: Checkup, depth: int = 3) -> Iterator[Path]:
    """The folder, and those in it down to the scans of several runs over several layers."""
    try:
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except FileNotFoundError:
        return
    except OSError as error:
        found.unreadable.append(f"{folder} cannot be read ({_reason(error)}).")
        return
    yield folder
    if depth:
        for path in inside:
            between = is_numbered(path) and not is_numbered(folder)  # other settings of one run
            yield from _folders(path, found, depth if between else depth - 1)


def _holds_scan(folder: Path) -> bool:
    names = ("manifest.json", "shard-*.safetensors")
    return any(next(folder.glob(name), None) for name in names)


def _holds_run(folder: Path) -> bool:
    return any(next(folder.glob(name), None) for name in (SETTINGS, f"{SETTINGS}*{ASIDE}"))


def _check_scan(folder: Path, found: Checkup) -> None:
    remove_leftovers(folder)
    try:
        manifest = read_manifest(folder)
    except UnreadableError as error:
        found.unreadable.append(str(error))
        return
    except RunError as error:
        found.lost.append(str(error))
        return
    if manifest is None:
        found.lost.append(f"{folder} holds shards without a manifest; scan anew.")
        return
    found.n_sound += 1
    layer = folder / "layer.safetensors"
    _check_file(layer, found, partial(sound_layer, folder, manifest), needed=True)
    there = shards_there(folder, manifest)
    n_missing = manifest.n_shards - len(there)
    if n_missing:
        found.missing.append(f"{count(n_missing, 'shard')} of {manifest.n_shards} in {folder}")
    for shard in there:
        read = partial(read_shard, folder, shard, manifest)
        _check_file(shard_path(folder, shard), found, read)


def _check_run(folder: Path, found: Checkup) -> None:
    for inside in (folder, folder / "features"):
        remove_leftovers(inside)
    home = home_of(folder)
    for name in SCANS:
        text = f"the scan in {home / name}"
        if not _holds_scan(home / name) and text not in found.missing:
            found.missing.append(text)
    read: dict[str, Callable[[Path], object]] = {
        "settings.json": lambda _: read_settings(folder),
        "findings.csv": partial(_read_table, columns=FINDINGS),
        "sensitivity.csv": partial(_read_table, columns=SENSITIVITY),
        "split.safetensors": Split.load,
        "split-published.safetensors": Split.load,
        "evaluation.json": _read_evaluation,
    }
    needed = ["settings.json", "findings.csv"]
    if _has_rows(folder / "findings.csv"):
        needed += _IF_FOUND
    for name, reader in read.items():
        _check_file(folder / name, found, partial(reader, folder / name), needed=name in needed)
    features = folder / "features" / "features.json"
    _check_file(features, found, partial(Features.load, features.parent))
    if not (folder / "report.html").exists():
        found.missing.append(str(folder / "report.html"))


def _read_evaluation(path: Path) -> None:
    for reader in (read_channels, read_output, read_ablation, read_semantics):
        reader(path)


def _has_rows(path: Path) -> bool:
    """Whether a table has rows below its head, as far as it can be read."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            return sum(1 for _ in islice(file, 2)) == 2
    except OSError:
        return False


def _read_table(path: Path, columns: Sequence[str]) -> None:
    """Read a table of ours, of numbers but for some columns of text.

    Raises:
        UnreadableError: it has other columns than this version's.
        RunError: it is damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            head = next(rows, [])
            for row in rows:
                for name, cell in zip(head, row, strict=True):
                    if cell and name not in _TEXTS:
                        float(cell)
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({brief(error)}); start the run again.") from None
    if not head:
        raise RunError(f"{path} is empty; start the run again.")
    if tuple(head) != tuple(columns):
        raise UnreadableError(f"{path} has other columns than those of this version.")


def _check_file(
    path: Path, found: Checkup, read: Callable[[], object], *, needed: bool = False
) -> None:
    """Read a file if it is there, and set it aside if it proves damaged."""
    try:
        _read_through(path)
        read()
    except FileNotFoundError:
        if needed:
            found.missing.append(str(path))
    except OSError as error:
        found.unreadable.append(f"{path} cannot be read ({_reason(error)}).")
    except RunError as error:
        if isinstance(error, UnreadableError):
            found.unreadable.append(str(error))
        else:
            _set_aside(path, str(error), found)
    except UnbraidError as error:
        found.unreadable.append(str(error))
    else:
        found.n_sound += 1


def _read_through(path: Path) -> None:
    """Raise OSError if a disk fails, which kills those that map the file into memory."""
    if path.exists() and not path.is_file():
        return  # a reader tells; a pipe might never end
    with path.open("rb") as file:
        while file.read(2**20):
            pass


def _set_aside(path: Path, damage: str, found: Checkup) -> None:
    try:
        set_aside(path, ASIDE)
    except OSError as error:
        found.lost.append(f"{damage} It could not be set aside ({_reason(error)}).")
    else:
        found.damaged.append(damage)


def _reason(error: OSError) -> str:
    return error.strerror or brief(error)
