"""Which concept channels to look at: those that do harm, or matter where they have no part.

Nothing is run: all of it is in the figures of an ablation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from unbraid.base.arguments import as_kind, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.tables import Table, Tabular
from unbraid.measuring.results import Ablation, ChannelAblation, ClassDrops, ClassOutput

_LEVEL = 0.05  # of being wrong about any one of all that is looked at
_LEGEND = (
    "change: how far accuracy moves with the concept channel off, in points; the 95 % intervals "
    "hold all at once. helps: on images of all classes; elsewhere: on images of a class that is "
    "not in the concept. A star marks a change that may be chance."
)

Kind = Literal["helps", "elsewhere"]


@dataclass(frozen=True)
class Suggestion:
    """One concept channel, or the rest of a channel, and what comes of switching it off."""

    name: str  # "900.1", or "900.rest"
    concept: str  # its classes
    kind: Kind
    of: str  # the class that loses, or "all"
    n_images: int
    change: float  # of accuracy, a fraction; what is lost is negative
    low: float  # simultaneous 95 % interval
    high: float

    @property
    def sure(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Suggestions(Tabular):
    """What helps first, then what matters elsewhere; in each what is sure and large first.

    Attributes:
        layer: name of the split layer.
        rows: concept channels, each with the change of accuracy (a fraction, 0 to 1) that its
            removal makes, and the 95 % interval of that.
    """

    layer: str
    rows: tuple[Suggestion, ...]

    def table(self) -> Table:
        """Show a row for each."""
        lines: list[tuple[str, ...]] = [
            ("off", "concept", "why", "on", "images", "change", "interval")
        ]
        for row in self.rows:
            bounds = f"{100 * row.low:+.2f} to {100 * row.high:+.2f}{'' if row.sure else ' *'}"
            figures = (f"{row.n_images:,}", f"{100 * row.change:+.2f}", bounds)
            lines.append((row.name, row.concept, row.kind, row.of, *figures))
        if not self.rows:
            return Table(
                [], note="No concept channel does harm, or matters for a class outside its concept."
            )
        return Table(lines, note=_LEGEND, caption=f"Concept channels of {self.layer} to look at")


def suggest(ablation: Ablation, n: int = 20) -> Suggestions:
    """Rank concept channels whose removal helps, or that matter for classes of other concepts.

    A shortcut, such as a mark that images of one class have, shows as a concept channel of this
    class whose removal helps on images where the mark stands with other classes. The accuracy of
    a class that depends on a concept in which it has no part may be spurious, or tell of a part
    that the concept's name does not.

    Args:
        ablation: of images that the network was not trained on, best with their true labels.
        n: of each kind, at most.

    Returns:
        Suggestions: changes of accuracy, as fractions between -1 and 1, with 95 % intervals.

    Raises:
        UsageError: the ablation is of an older version, without standard errors, or n is below 1.
    """
    as_kind("ablation", ablation, Ablation)
    n = whole_number("n", n, 1)
    if ablation.target != "label":
        raise UsageError(
            f"Suggestions go by accuracy, and with the target {ablation.target!r} there is none; "
            "look at the target's losses, which the ablation tells."
        )
    tried = [*_tried(ablation)]
    if any(len(off.accuracy_error) != len(ablation.classes) for _, _, _, off in tried):
        raise UsageError(
            "The ablation has no standard errors, as those of older versions; make it again."
        )
    helps, elsewhere = [], []
    n_tests = len(tried) * (1 + len(ablation.classes))
    z = NormalDist().inv_cdf(1 - _LEVEL / (2 * max(1, n_tests)))
    for name, concept, own, off in tried:
        overall = _over_all(ablation.classes, off)
        if overall[0] > 0:
            total = sum(one.n_images for one in ablation.classes)
            helps.append(_row(name, concept, "helps", "all", total, overall, z))
        for place, output in enumerate(ablation.classes):
            change, error = -off.accuracy[place], _error(off.accuracy_error[place], output)
            if own is not None and output.label not in own and change < 0:
                figures = (change, error)
                elsewhere.append(
                    _row(name, concept, "elsewhere", output.name, output.n_images, figures, z)
                )
    return Suggestions(ablation.layer, (*_ranked(helps)[:n], *_ranked(elsewhere)[:n]))


def _tried(
    ablation: Ablation,
) -> Iterator[tuple[str, str, Sequence[int] | None, ClassDrops]]:
    """Each concept channel and rest: name, concept, its classes (None: not told), what is lost."""
    labels = {output.label for output in ablation.classes}
    for channel in ablation.channels:
        for k, concept in enumerate(channel.concepts):
            # Clusters have numbers beyond the classes.
            classes = concept.classes if set(concept.classes) <= labels else None
            yield f"{channel.channel}.{k}", concept.name, classes, concept.by_class
        yield from _rest(channel)


def _rest(channel: ChannelAblation) -> Iterator[tuple[str, str, None, ClassDrops]]:
    if channel.rest_channel is not None:
        yield f"{channel.channel}.rest", "the rest", None, channel.rest_channel.by_class


def _over_all(classes: Sequence[ClassOutput], off: ClassDrops) -> tuple[float, float]:
    """Change of accuracy over all images, and its standard error."""
    total = sum(one.n_images for one in classes)
    parts = list(zip(classes, off.accuracy, off.accuracy_error, strict=True))
    change = -sum(one.n_images * lost for one, lost, _ in parts) / total
    return change, math.hypot(*(one.n_images * _error(e, one) for one, _, e in parts)) / total


def _error(error: float, output: ClassOutput) -> float:
    """A standard error that is not zero because all of a few images came out alike."""
    least = 1 / output.n_images
    return least if math.isnan(error) else max(error, least)


def _row(
    name: str,
    concept: str,
    kind: Kind,
    of: str,
    n_images: int,
    figures: tuple[float, float],
    z: float,
) -> Suggestion:
    change, error = figures
    bounds = change - z * error, change + z * error
    return Suggestion(name, concept, kind, of, n_images, change, *bounds)


def _ranked(rows: list[Suggestion]) -> list[Suggestion]:
    """The sure first; then by how many images change at least, or, of the unsure, on average."""

    def worth(row: Suggestion) -> tuple[bool, float, str]:
        least = min(abs(row.low), abs(row.high)) if row.sure else abs(row.change)
        return not row.sure, -least * row.n_images, row.name

    return sorted(rows, key=worth)
