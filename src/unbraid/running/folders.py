"""Where a run's results lie: in its folder, or in `settings-N` in it beside those of other runs.

Scans lie in the run's folder and are shared. No run ever writes over what another one found.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain, count
from pathlib import Path
from typing import Any

from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import remove_leftovers, write_new, write_whole
from unbraid.base.schema import build, in_range, read_json, unread
from unbraid.base.tables import csv_text
from unbraid.finding.findings import COLUMNS, ConceptKind, Findings
from unbraid.finding.thresholds import Tau
from unbraid.reporting.pictures import Sight
from unbraid.scanning.manifest import Manifest, hash_places, read_manifest
from unbraid.scanning.options import Loading as Loading
from unbraid.scanning.records import Scan

# What a run was asked for, kept in its folder so that it can be told from another.


@dataclass(frozen=True)
class Thresholds:
    """When a channel counts as polysemantic; METHOD.md section 3."""

    tau: Tau = 0.03
    p: float = 0.75
    gamma: float = 0.5
    rho: float | None = None  # of the published baseline; None: chosen per channel
    concepts: ConceptKind = "classes"  # or clusters of images

    @property
    def of_find(self) -> dict[str, Any]:
        """The arguments of `unbraid.find`."""
        return {name: value for name, value in vars(self).items() if name != "rho"}


def read_settings(out: Path) -> dict[str, Any] | None:
    """Read a run's settings, None if there is no run.

    Raises:
        RunError: settings.json is something else.
    """
    path = out / "settings.json"
    try:
        settings: dict[str, Any] = read_json(path)
        build(Thresholds, settings["thresholds"])
        source, title = settings["source"], settings["title"]
        if not isinstance(title, str) or not isinstance(source, dict):
            raise ValueError("title and source are not what they should be")
        if not isinstance(source.get("data", ""), str):
            raise ValueError("the folder of the data is no text")
        if settings.get("sight") is not None:
            for size in vars(build(Sight, settings["sight"])).values():
                in_range("a size in sight", 1.0 if size is None else size, 1e-6, 1e6)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = f"{path} is not that of a run ({error!r}); name another folder."
        raise unread(error, text) from None
    return settings


def same_settings(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs come to the same results, as far as their settings tell.

    Title, source and sight say how a page looks and where images are, and change no result. Runs of
    older versions do not name their scans.
    """
    scans = [settings.get("scans") for settings in (one, other)]
    if None not in scans and scans[0] != scans[1]:
        return False
    return _deciding(one) == _deciding(other)


def _deciding(settings: dict[str, Any]) -> tuple[Thresholds, str | None, str]:
    thresholds = Thresholds(**settings["thresholds"])
    return thresholds, settings.get("encoder"), settings.get("labels", "given")


def tell_settings(settings: dict[str, Any]) -> str:
    """Name a run's settings, for people.

    >>> tell_settings({"thresholds": {"rho": 0.5, "concepts": "clusters"}, "encoder": "timm:x"})
    'tau 0.03, p 0.75, gamma 0.5, rho 0.5, concepts clusters, encoder timm:x'
    """
    thresholds, encoder, labels = _deciding(settings)
    told = {name: value for name, value in vars(thresholds).items() if value is not None}
    told |= {"labels": labels, "encoder": encoder}
    usual = {"concepts": "classes", "labels": "given", "encoder": None}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in told.items()
        if name not in usual or value != usual[name]
    )


# Where a run's results lie: in its folder, or in `settings-N` in it beside those of other runs.


SCANS = ("scan-train", "scan-val")
SETTINGS = "settings.json"
FEATURES = "features"
_RESULTS = (
    "findings.csv",
    "sensitivity.csv",
    "split.safetensors",
    "split-published.safetensors",
    "evaluation.json",
    "report.html",
)
_SLOW = ("split.safetensors", "evaluation.json", FEATURES)  # what took time to make
_OWN = {  # files by what else lies in their folder
    SETTINGS: (SETTINGS, *_RESULTS),
    "manifest.json": ("manifest.json", "layer.safetensors", "shard-*.safetensors"),
    "features.json": ("features.json", "*.png"),
}
_NUMBERED = re.compile(r"settings-([2-9]|[1-9]\d+)")


def is_numbered(folder: Path) -> bool:
    """Whether a folder has the name of one for a run with other settings."""
    return _NUMBERED.fullmatch(os.path.basename(os.path.abspath(folder))) is not None


def home_of(folder: Path) -> Path:
    """Return the run's folder, where scans lie, of a folder with results; perhaps the same."""
    if not is_numbered(folder) or any((folder / name).exists() for name in SCANS):
        return folder
    here = os.path.basename(os.path.abspath(folder)) == folder.name
    home = folder.parent if here else Path(os.path.abspath(folder)).parent
    return home if any((home / name).exists() for name in SCANS) else folder


def results_in(home: Path) -> list[Path]:
    """Return the folders of a run's folder that may hold results: itself, then by number."""
    inside = [path for path in home.glob("settings-*") if is_numbered(path) and path.is_dir()]
    return [home, *sorted(inside, key=_number)]


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("settings-"))


def refuse_strange(out: Path) -> None:
    """Raise if settings of a run in a folder cannot be read, so that it is not known whose it is.

    Raises:
        RunError: some cannot be.
    """
    for folder in results_in(home_of(out)):
        read_settings(folder)


def take_folder(out: Path, settings: dict[str, Any], found: Findings) -> Path:
    """Find the folder for a run's results, and write its settings there before anything else.

    A folder is taken for good by whoever writes `settings.json` there first, so two runs that start
    at once never share one unless they are the same.

    Args:
        out: the folder that was asked for.
        settings: of the run.
        found: what it found; tells whether results without settings are this run's.
    """
    text = (json.dumps(settings, indent=2) + "\n").encode()
    while True:
        folder = _folder_for(out, settings, found)
        remove_leftovers(folder)
        if write_new(folder / SETTINGS, text):
            return folder
        before = read_settings(folder)
        if before is not None and same_settings(before, settings):
            if before != json.loads(text):  # such as where the images now are
                write_whole(folder / SETTINGS, text)
            return folder


def _folder_for(out: Path, settings: dict[str, Any], found: Findings) -> Path:
    """Return the folder that holds a run with these settings, else the first that holds none."""
    home = home_of(out)
    for folder in (out, *results_in(home)):
        before = read_settings(folder)
        if before is not None and same_settings(before, settings):
            return folder
    return next(folder for folder in chain([out], _all_in(home)) if _is_free(folder, found))


def tell_folder(out: Path, folder: Path, *, replaces: bool) -> str:
    """Say why results go into another folder than the one asked for.

    Args:
        out: the one asked for.
        folder: where they go.
        replaces: whether they are then put in the place of those in `out`.
    """
    if not holds_results(out):
        here = f"{folder} holds a run with these settings, which goes on there"
        return f"{here}, and then into {out}." if replaces else f"{here}."
    before = read_settings(out)
    what = f"a run with {tell_settings(before)}" if before else "results whose settings are gone"
    if replaces:
        return f"{out} holds {what}; this one, in {folder}, takes its place when it is finished."
    return f"{out} holds {what}; this one goes into {folder}."


def is_same(one: Path, other: Path) -> bool:
    """Whether two paths name one folder."""
    return os.path.abspath(one) == os.path.abspath(other)


def holds_results(folder: Path) -> bool:
    """Whether a run has begun to write its results into a folder."""
    return any(os.path.lexists(folder / name) for name in (SETTINGS, *_SLOW))


def refuse_result(file: Path | None) -> None:
    """Raise if a file to be written is part of a run or scan, which a single step must not change.

    Raises:
        UsageError: it is.
    """
    if file is None or not file.exists():
        return
    for mark, patterns in _OWN.items():
        own = any(fnmatchcase(file.name, pattern) for pattern in patterns)
        if own and (file.parent / mark).exists():
            raise UsageError(f"{file} belongs to what lies in {file.parent}; name another file.")


def _all_in(home: Path) -> Iterator[Path]:
    yield home
    for number in count(2):
        yield home / f"settings-{number}"


def _is_free(folder: Path, found: Findings) -> bool:
    """Whether no results would be lost; those whose settings are gone are told by the findings."""
    if os.path.lexists(folder / SETTINGS) or (folder.exists() and not folder.is_dir()):
        return False
    if not any((folder / name).exists() for name in _SLOW):
        return True
    table = folder / _RESULTS[0]
    try:
        return table.read_bytes() == csv_text(COLUMNS, found.rows()).encode()
    except OSError:
        return False


def replace_results(out: Path, by: Path) -> None:
    """Put the finished results of one folder in the place of those in another.

    The old ones go first and `settings.json` comes last, so that the folder never holds a mixture
    that looks like one run. Scans, those with positions too, and all other files stay.
    """
    for name in (SETTINGS, *_RESULTS):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    for path in sorted(by.glob("positions-*")):
        path.rename(_unused(out, path.name))
    for name in (*_RESULTS, FEATURES, SETTINGS):
        if (by / name).exists():
            (by / name).rename(out / name)
    with suppress(OSError):  # it holds something else
        by.rmdir()


def positions_folder(
    results: Path,
    kind: str,
    scan: Scan,
    *,
    classes: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
) -> Path:
    """Return the folder of a scan with positions of some images: one that is there, or a new one.

    Args:
        results: the folder with the run's results.
        kind: "train" or "val".
        scan: of all images.
        classes: whose images are asked for.
        indices: images that are asked for, by their place.
    """
    wanted = replace(
        scan.manifest,
        classes=None if classes is None else tuple(sorted(set(classes))),
        indices=hash_places(None if indices is None else sorted(set(indices))),
        positions=True,
    )
    others = [folder for folder in results_in(home_of(results)) if folder != results]
    for folder in (results, *others):
        for path in sorted(folder.glob(f"positions-{kind}*")):
            if _holds(path, wanted):
                return path
    return _unused(results, f"positions-{kind}")


def _holds(folder: Path, wanted: Manifest) -> bool:
    try:
        there = read_manifest(folder)
    except RunError:
        return False
    if there is None:
        return False
    # It keeps its own number of threads when it goes on.
    same = replace(wanted, threads=there.threads, shard_size=there.shard_size)
    return not same.differences(there)


def _unused(folder: Path, name: str) -> Path:
    """Return a place in a folder where no scan has begun: of this name, or numbered."""
    places = chain([folder / name], (folder / f"{name}-{number}" for number in count(2)))
    return next(path for path in places if next(path.glob("shard-*"), None) is None)
