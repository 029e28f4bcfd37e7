"""Compare findings with the published ones, pair by pair."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from unbraid.base.tables import align
from unbraid.finding.pairs import Pair

MODEL = "torchvision:resnet50"
WEIGHTS = "IMAGENET1K_V1"
LAYER = "layer4.2.conv3"
TOLERANCE = 2e-3  # published cosines are reproducible to about 1e-3, and have four digits
REFERENCE = "resnet50_layer4.2.conv3_tau0.03.csv"

Key = tuple[int, int, int]  # channel and the two classes


@dataclass(frozen=True)
class Match:
    """One pair, published, found, or both."""

    key: Key
    published: float | None
    found: float | None

    @property
    def agrees(self) -> bool:
        """Whether both have it, with the same cosine."""
        if self.published is None or self.found is None:
            return False
        return abs(self.published - self.found) <= TOLERANCE


def published_pairs() -> dict[Key, float]:
    """Read the published list that comes with the package: cosine by channel and classes."""
    text = files("unbraid").joinpath("running", REFERENCE).read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {
        _key(int(row["channel"]), int(row["class1"]), int(row["class2"])): float(row["cosine"])
        for row in rows
    }


def match_pairs(found: Iterable[Pair], published: dict[Key, float]) -> list[Match]:
    """Put found and published pairs side by side, in the order of channels.

    Found pairs with a negative cosine count only if they were published too: the published script
    dropped them.
    """
    cosines = {_key(pair.channel, pair.class1, pair.class2): pair.cosine for pair in found}
    kept = {key: cosine for key, cosine in cosines.items() if cosine >= 0 or key in published}
    keys = sorted(kept.keys() | published.keys())
    return [Match(key, published.get(key), kept.get(key)) for key in keys]


def _key(channel: int, class1: int, class2: int) -> Key:
    return channel, min(class1, class2), max(class1, class2)


def show_matches(matches: Sequence[Match]) -> str:
    """Lay out the pairs in a table, and count those that agree."""
    rows: list[tuple[str, ...]] = [("channel", "class 1", "class 2", "published", "found", "")]
    for match in matches:
        cosines = ["-" if c is None else f"{c:.4f}" for c in (match.published, match.found)]
        verdict = "agrees" if match.agrees else "differs"
        rows.append((*map(str, match.key), *cosines, verdict))
    n_agree = sum(match.agrees for match in matches)
    return f"{align(rows)}\n{n_agree} of {len(matches)} pairs agree."
