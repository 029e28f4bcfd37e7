"""What a run was asked for, kept in its folder so that it can be told from another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbraid.findings import ConceptKind
from unbraid.sight import Sight
from unbraid.strict import build, in_range, read_json, unread
from unbraid.thresholds import Tau


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


@dataclass(frozen=True)
class Loading:
    """How images go through the network."""

    batch_size: int | None = None  # None: as many as memory holds
    workers: int = 0
    skip_broken: bool = False


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
