"""How many polysemantic channels and pairs of classes each choice of thresholds finds.

Shapes: C_out channels, T classes, c of them sharing a channel, S settings of tau and p.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unbraid.arvs import ClassSums, class_cosines, class_sums, shared_channels, uses
from unbraid.doors import in_plain_modes
from unbraid.errors import UsageError
from unbraid.files import write_whole
from unbraid.given import as_kind, as_path, real_numbers
from unbraid.records import Scan
from unbraid.tables import align, count, csv_text, data_frame
from unbraid.thresholds import check_thresholds

if TYPE_CHECKING:
    import pandas as pd

    from unbraid.findings import Findings

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
class Sensitivity:
    """How many channels and pairs `find` gives for every combination of thresholds."""

    layer: str
    weights: str  # hash of the network's weights
    n_out: int  # channels of the layer
    taus: tuple[float, ...]
    ps: tuple[float, ...]
    gammas: tuple[float, ...]
    cells: tuple[Cell, ...]  # tau by tau, then p, then gamma

    def at(self, tau: float, p: float, gamma: float) -> Cell:
        """Return what one choice of the grid's thresholds finds.

        Raises:
            KeyError: it is not in the grid.
        """
        return self._by_choice[tau, p, gamma]

    @cached_property
    def _by_choice(self) -> dict[tuple[float, float, float], Cell]:
        return {(cell.tau, cell.p, cell.gamma): cell for cell in self.cells}

    def __str__(self) -> str:
        """Show a table per p, taus down and gammas across: channels and, in brackets, pairs."""
        head = (
            f"Polysemantic channels, and pairs of classes in brackets, of the "
            f"{count(self.n_out, 'channel')} of layer {self.layer}"
        )
        return "\n\n".join([head, *map(self._table, self.ps)])

    def _table(self, p: float) -> str:
        rows = [(f"p {p:g}", *(f"gamma {gamma:g}" for gamma in self.gammas))]
        for tau in self.taus:
            cells = [self.at(tau, p, gamma) for gamma in self.gammas]
            rows.append(
                (f"tau {tau:g}", *(f"{cell.n_channels:,} ({cell.n_pairs:,})" for cell in cells))
            )
        return align(rows)

    def rows(self) -> Iterator[tuple[float | int, ...]]:
        """Give one row per choice, in the order of the CSV columns."""
        for cell in self.cells:
            yield tuple(vars(cell).values())

    def to_csv(self, path: str | Path) -> None:
        """Write one line per choice: tau, p, gamma, n_channels, n_pairs."""
        write_whole(as_path("path", path), csv_text(COLUMNS, self.rows()).encode())

    def to_pandas(self) -> pd.DataFrame:
        """Return the choices as a DataFrame with the columns of the CSV file.

        Raises:
            UnbraidError: pandas is not installed.
        """
        return data_frame(COLUMNS, self.rows())


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

    The default grid holds tau 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05 and 0.1, the smallest
    share that the scan kept in place of those below it; p 0.5, 0.75 and 0.9; gamma 0.3 to 0.7 in
    steps of 0.1. Memory grows with the number of taus, by 16 MB each for 1000 classes and 2048
    channels.

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
            that the scan kept.

    Source:
        METHOD.md section 3.
    """
    least = as_kind("scan", scan, Scan).manifest.min_share
    own = (None, None, None) if found is None else (found.tau, found.p, found.gamma)
    taus = _grid("taus", taus, [max(tau, least) for tau in TAUS], own[0])
    ps = _grid("ps", ps, PS, own[1])
    gammas = _grid("gammas", gammas, GAMMAS, own[2])
    for tau, p, gamma in product(taus, ps, gammas):
        check_thresholds(tau, p, gamma, least)
    counts = _count(scan, taus, ps, gammas).flatten(0, 1).tolist()
    choices = product(taus, ps, gammas)
    return Sensitivity(
        layer=scan.layer.name,
        weights=scan.manifest.weights,
        n_out=scan.layer.n_out,
        taus=taus,
        ps=ps,
        gammas=gammas,
        cells=tuple(
            Cell(*choice, *numbers) for choice, numbers in zip(choices, counts, strict=True)
        ),
    )


def _grid(
    name: str, given: Sequence[float] | None, default: Iterable[float], own: float | None
) -> tuple[float, ...]:
    """Sort the values of one threshold.

    Raises:
        UsageError: there is none, or one is no number.
    """
    if given is None:
        given = [*default, *([] if own is None else [own])]
    values = sorted(set(real_numbers(name, given)))
    if not values:
        raise UsageError(f"{name} is empty; give a value or more, or None for the default grid.")
    return tuple(values)


def _count(
    scan: Scan, taus: Sequence[float], ps: Sequence[float], gammas: Sequence[float]
) -> Tensor:
    """Count channels and pairs, (S, gammas, 2); all thresholds in rising order."""
    sums = class_sums(scan, taus)
    counts = torch.zeros(len(taus) * len(ps), len(gammas), 2, dtype=torch.int64)
    # Who uses a channel at higher thresholds uses it at the lowest too.
    (most,) = uses(replace(sums, n_matters=sums.n_matters[:1]), ps[0])
    for channel, classes in shared_channels(most):
        use = sums.n_matters[:, classes, channel] / sums.n_images[classes].double()  # (taus, c)
        users = (use[:, None] >= torch.tensor(ps, dtype=torch.float64)[:, None]).flatten(0, 1)
        n_pairs = _pairs_below(scan, sums, channel, classes, users, gammas)
        counts[..., 0] += n_pairs > 0
        counts[..., 1] += n_pairs
    return counts


def _pairs_below(
    scan: Scan,
    sums: ClassSums,
    channel: int,
    classes: Sequence[int],
    users: Tensor,
    gammas: Sequence[float],
) -> Tensor:
    """Count the pairs of users of a channel that have different reasons, (S, gammas).

    Args:
        scan: whose layer it is.
        sums: of all classes.
        channel: an output channel.
        classes: c classes.
        users: (S, c), which of them use the channel.
        gammas: cosines.
    """
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
