"""What `find` would find at other thresholds.

Shapes: c classes sharing a channel, S settings of tau and p.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, real_numbers
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import Exported, Table, count
from unbraid.finding.arv import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.finding.findings import Findings
from unbraid.finding.thresholds import check_thresholds, refuse_no_classes, refuse_places
from unbraid.scanning.records import Scan

# The published thresholds, and on either side what other networks have needed.
TAUS = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1)
PS = (0.5, 0.75, 0.9)
GAMMAS = (0.3, 0.4, 0.5, 0.6, 0.7)

_ROUNDING = 1e-9  # far above that of a cosine, far below what tells two cosines apart


@dataclass(frozen=True)
class Cell:
    """What one choice of thresholds finds."""

    tau: float
    p: float
    gamma: float
    n_channels: int
    n_pairs: int


COLUMNS = tuple(Cell.__dataclass_fields__)


@dataclass(frozen=True)
class Sensitivity(Exported):
    """How many channels and pairs `find` gives for every combination of thresholds.

    Attributes:
        layer: name of the layer.
        weights: hash of the network's weights.
        n_out: channels of the layer.
        taus: smallest shares that matter.
        ps: fractions of a class's images.
        gammas: cosines below which two classes have different reasons.
        cells: the counts, tau by tau, then p, then gamma; `at` gives those of one choice.
    """

    layer: str
    weights: str  # hash of the network's weights
    n_out: int  # channels of the layer
    taus: tuple[float, ...]
    ps: tuple[float, ...]
    gammas: tuple[float, ...]
    cells: tuple[Cell, ...]  # tau by tau, then p, then gamma

    columns = COLUMNS

    def at(self, tau: float, p: float, gamma: float) -> Cell:
        """Return what one choice of the grid's thresholds finds; KeyError where it has none."""
        for cell in self.cells:
            if (cell.tau, cell.p, cell.gamma) == (tau, p, gamma):
                return cell
        raise KeyError(f"tau {tau:g}, p {p:g}, gamma {gamma:g} is not in the grid")

    def __str__(self) -> str:
        """Show all tables."""
        return "\n\n".join(map(str, self.tables()))

    def tables(self) -> list[Table]:
        """A title; per p taus down and gammas across: channels and, in brackets, pairs."""
        n_out = count(self.n_out, "channel")
        head = "Polysemantic channels, and pairs of classes in brackets, of the"
        parts = [Table((), f"{head} {n_out} of layer {self.layer}")]
        for p in self.ps:
            rows = [(f"p {p:g}", *(f"gamma {gamma:g}" for gamma in self.gammas))]
            for tau in self.taus:
                cells = (self.at(tau, p, gamma) for gamma in self.gammas)
                figures = (f"{cell.n_channels:,} ({cell.n_pairs:,})" for cell in cells)
                rows.append((f"tau {tau:g}", *figures))
            parts.append(Table(rows))
        return parts

    def rows(self) -> Iterator[tuple[float | int, ...]]:
        """Give one row per choice, in the order of the CSV columns."""
        for cell in self.cells:
            yield tuple(vars(cell).values())


@in_plain_modes
def sensitivity(
    scan: Scan,
    taus: Sequence[float] | None = None,
    ps: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    *,
    found: Findings | None = None,
) -> Sensitivity:
    """Count what `find` would find for every combination of thresholds, in one reading of the Scan.

    The default grid holds tau 0.005 to 0.1 (no less than the scan kept), p 0.5, 0.75 and 0.9, gamma
    0.3 to 0.7. Memory grows by 16 MB per tau for 1000 classes and 2048 channels.

    Args:
        scan: of the training images.
        taus: smallest shares that matter.
        ps: fractions of a class's images.
        gammas: cosines below which two classes have different reasons.
        found: findings whose thresholds a default grid is to contain too.

    Returns:
        The counts; those of a choice are exactly the numbers of channels and pairs of `find`.

    Raises:
        UsageError: a grid is empty, or a threshold is out of range or below the smallest share
            that the scan kept; or the scan is of places.

    Source:
        "Find" in docs/method.md.
    """
    least = as_kind("scan", scan, Scan).manifest.min_share
    refuse_places(scan)
    refuse_no_classes(scan)
    own = (None, None, None) if found is None else (found.tau, found.p, found.gamma)
    taus = _grid("taus", taus, [max(tau, least) for tau in TAUS], own[0])
    ps = _grid("ps", ps, PS, own[1])
    gammas = _grid("gammas", gammas, GAMMAS, own[2])
    choices = list(product(taus, ps, gammas))
    for choice in choices:
        check_thresholds(*choice, least)
    sums = class_sums(scan, taus)
    counts = torch.zeros(len(taus) * len(ps), len(gammas), 2, dtype=torch.int64)
    # Who uses a channel at higher thresholds uses it at the lowest too.
    (most,) = uses(replace(sums, n_matters=sums.n_matters[:1]), ps[0])
    for channel, classes in shared_channels(most):
        use = sums.n_matters[:, classes, channel] / sums.n_images[classes].double()  # (taus, c)
        users = (use[:, None] >= torch.tensor(ps, dtype=torch.float64)[:, None]).flatten(0, 1)
        n_pairs = _pairs_below(scan, sums, channel, classes, users, gammas)
        counts += torch.stack([n_pairs > 0, n_pairs], 2)
    numbers = counts.view(-1, 2).tolist()
    cells = tuple(Cell(*choice, *own) for choice, own in zip(choices, numbers, strict=True))
    layer, weights = scan.layer, scan.manifest.weights
    return Sensitivity(layer.name, weights, layer.n_out, taus, ps, gammas, cells)


def _grid(
    name: str, values: Sequence[float] | None, default: Iterable[float], own: float | None
) -> tuple[float, ...]:
    if values is None:
        values = [*default, *([] if own is None else [own])]
    if grid := sorted(set(real_numbers(name, values))):
        return tuple(grid)
    raise UsageError(f"{name} is empty; give a value or more, or None for the default grid.")


def _pairs_below(
    scan: Scan,
    sums: ClassSums,
    channel: int,
    classes: Sequence[int],
    users: Tensor,
    gammas: Sequence[float],
) -> Tensor:
    """Count the pairs of users (S, c) that have different reasons, (S, gammas)."""
    cosines = class_cosines(scan, sums, channel, classes)
    columns = []
    for gamma in gammas:
        if ((cosines - gamma).abs() < _ROUNDING).triu(1).any():
            # A product of other matrices may round otherwise, so ask exactly as `find` does.
            chosen = [torch.tensor(classes, dtype=torch.int64)[own].tolist() for own in users]
            blocks = [class_cosines(scan, sums, channel, own) for own in chosen]
            columns.append(torch.stack([(block < gamma).triu(1).sum() for block in blocks]))
        else:
            below, by = (cosines < gamma).triu(1).double(), users.double()
            columns.append(((by @ below) * by).sum(1).long())
    return torch.stack(columns, 1)
