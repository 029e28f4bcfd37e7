"""Verify what scans and runs left on disk; set damaged files aside, to be made again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from unbraid.base.errors import RunError, UnbraidError, UnreadableError, brief
from unbraid.base.files import forget, remove_leftovers, set_aside
from unbraid.base.tables import count
from unbraid.finding.findings import COLUMNS as FINDINGS
from unbraid.finding.sensitivity import COLUMNS as SENSITIVITY
from unbraid.images.kept import LISTED, LISTED_PARTS
from unbraid.images.mapped import Mapped
from unbraid.measuring.circuit_graph import read_graphs
from unbraid.measuring.results import read_ablation, read_channels, read_output, read_semantics
from unbraid.reporting.layers import DATA, read_layers
from unbraid.running.folders import (
    CIRCUITS,
    FEATURES,
    NO_POSITIONS,
    SCANS,
    SETTINGS,
    home_of,
    is_numbered,
    read_settings,
)
from unbraid.scanning.manifest import read_manifest
from unbraid.scanning.records import (
    PEAKS,
    has_peaks,
    read_shard,
    shard_path,
    shards_there,
    sound_layer,
    sound_peaks,
)
from unbraid.splitting.splits import Split
from unbraid.visualizing.features import Features

T = TypeVar("T")

ASIDE = ".damaged"  # added to a damaged file's name
_TEXTS = ("name1", "name2", "uncertain")  # columns that are not of numbers
_PARTS = {  # of a run, in plain words
    "split.safetensors": "split",
    "evaluation.json": "evaluation",
    f"{FEATURES}/features.json": "features",
    "report.html": "report",
}


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

    def look(
        self, path: Path, read: Callable[[], T], *, needed: bool = False, mend: bool = True
    ) -> T | None:
        """Read a file, note what comes up, and set it aside if it is damaged and `mend`."""
        try:
            if path.is_file() or not path.exists():  # a pipe might never end
                _read_through(path)
            value = read()
        except FileNotFoundError:
            if needed:
                self.missing.append(str(path))
        except OSError as error:
            self.unreadable.append(f"{path} cannot be read ({_reason(error)}).")
        except UnbraidError as error:
            if not isinstance(error, RunError) or isinstance(error, UnreadableError):
                self.unreadable.append(str(error))
            elif mend:
                self._set_aside(path, str(error))
            else:
                self.lost.append(str(error))
        else:
            self.n_sound += 1
            return value
        return None

    def _set_aside(self, path: Path, damage: str) -> None:
        try:
            set_aside(path, ASIDE)
            self.damaged.append(damage)
        except OSError as error:
            self.lost.append(f"{damage} It could not be set aside ({_reason(error)}).")


def check(folder: str | Path) -> Checkup:
    """Say what scans and runs left in a folder, and repair what can be repaired.

    Every tensor's checksum, every shard's records, and the form of all JSON, CSV and PNG files are
    verified; of a report.html only that it is there. What proves damaged is renamed, so that the
    next start of the same command makes it again; what cannot be read, for want of permission or
    because another version wrote it, is told and left. What a killed process left half-written
    goes.

    Args:
        folder: of a scan, of a run, or of several of either.

    Raises:
        RunError: there is no scan and no run.
    """
    folder, found = Path(folder), Checkup()
    forget()  # a disk that fails changes no time by which a file read before would be told
    there = list(_folders(folder, found))
    scans = [path for path in there if _holds_scan(path)]
    runs = [path for path in there if _holds_any(path, SETTINGS, f"{SETTINGS}*{ASIDE}")]
    if not (scans or runs or found.unreadable):
        raise RunError(f"{folder} holds no scan and no run; name a folder that does.")
    for path in there:
        if (path / DATA).exists():
            found.look(path / DATA, partial(read_layers, path))
    of_scans = [f"{path}: {_check_scan(path, found)}." for path in scans]
    for path in (path / name for path in there for name in (LISTED, *LISTED_PARTS.values())):
        if path.exists():
            found.look(path, partial(_check_list, path))
    found.holds = [f"{path}: {_check_run(path, found)}." for path in runs] + of_scans
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
    for path in inside if depth else ():
        between = is_numbered(path) and not is_numbered(folder)  # other settings of one run
        yield from _folders(path, found, depth if between else depth - 1)


def _holds_scan(folder: Path) -> bool:
    return _holds_any(folder, "manifest.json", "shard-*.safetensors")


def _holds_any(folder: Path, *patterns: str) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _check_scan(folder: Path, found: Checkup) -> str:
    """Verify a scan; say in words what it is and how far it has come."""
    remove_leftovers(folder)
    path = folder / "manifest.json"
    manifest = found.look(path, partial(read_manifest, folder), mend=False)
    if not path.exists():
        found.lost.append(f"{folder} holds shards without a manifest; scan again.")
    if manifest is None:
        return "a scan whose manifest cannot be read"
    layer = partial(sound_layer, folder, manifest)
    found.look(folder / "layer.safetensors", layer, needed=True)
    if has_peaks(folder, manifest):
        peaks = folder / PEAKS
        if peaks.exists():
            found.look(peaks, partial(sound_peaks, folder, manifest))
        else:
            found.missing.append(str(peaks))
    n_shards, there = manifest.n_shards, shards_there(folder, manifest)
    if len(there) < n_shards:
        missing = count(n_shards - len(there), "shard")
        found.missing.append(f"{missing} of {n_shards} in {folder}")
    for shard in there:
        found.look(shard_path(folder, shard), partial(read_shard, folder, shard, manifest))
    n_there = len(shards_there(folder, manifest))
    told = [f"a scan of layer {manifest.layer.name}", count(manifest.n_images, "image")]
    if manifest.classes is not None:
        told[-1] += f" of {count(len(manifest.classes), 'class', 'classes')}"
    if manifest.positions:
        told.append("with positions")
    done = "finished" if n_there == n_shards else f"{n_there} of {count(n_shards, 'shard')} there"
    return ", ".join([*told, done])


def _check_list(path: Path) -> None:
    Mapped(path).check()


def _check_run(folder: Path, found: Checkup) -> str:
    """Verify a run; say in words what it is, what it found and what of it is there."""
    for inside in (folder, folder / FEATURES):
        remove_leftovers(inside)
    for name in SCANS:
        text = f"the scan in {home_of(folder) / name}"
        if not _holds_scan(home_of(folder) / name) and text not in found.missing:
            found.missing.append(text)
    settings = found.look(folder / SETTINGS, partial(read_settings, folder), needed=True)
    path = folder / "findings.csv"
    rows = found.look(path, partial(_read_table, FINDINGS, path), needed=True)
    without = (settings is not None and settings.places) or (folder / NO_POSITIONS).exists()
    for name, (read, if_found) in _READERS.items():
        path = folder / name
        needed = if_found and bool(rows) and not (without and name == "split-published.safetensors")
        found.look(path, partial(read, path), needed=needed)
    if not (folder / "report.html").exists():
        found.missing.append(str(folder / "report.html"))
    told = "findings not there" if rows is None else "nothing found"
    if rows:
        channels = {row[FINDINGS.index("channel")] for row in rows}
        told = f"{count(len(rows), 'pair')} in {count(len(channels), 'channel')}"
    parts = ", ".join(word for name, word in _PARTS.items() if (folder / name).exists())
    return f"a run with {settings or 'unknown settings'}; {told}; {parts or 'no results'}"


def _read_evaluation(path: Path) -> None:
    for reader in (read_channels, read_output, read_ablation, read_semantics):
        reader(path)


def _read_table(columns: Sequence[str], path: Path) -> list[list[str]]:
    """Raise unless a file is a table of ours, of numbers but for some columns of text."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            head, *rows = list(csv.reader(file, strict=True)) or [[]]
        if not head:
            raise ValueError("it is empty")
        if head != list(columns):
            raise UnreadableError(f"{path} has other columns than those of this version.")
        for row in rows:
            for name, cell in zip(head, row, strict=True):
                if cell and name not in _TEXTS:
                    float(cell)
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path} cannot be read ({brief(error)}); start the run again.") from None
    return rows


def _read_through(path: Path) -> None:
    """Raise OSError if a disk fails, which kills those that map the file into memory."""
    with path.open("rb") as file:
        while file.read(2**20):
            pass


def _reason(error: OSError) -> str:
    return error.strerror or brief(error)


# Of a run's other files: what reads them, and whether they must be there if it found something.
_READERS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "sensitivity.csv": (partial(_read_table, SENSITIVITY), False),
    "split.safetensors": (Split.load, True),
    "split-published.safetensors": (Split.load, True),
    "evaluation.json": (_read_evaluation, True),
    f"{FEATURES}/features.json": (lambda path: Features.load(path.parent), False),
    CIRCUITS: (read_graphs, False),
}
