"""Layers beside each other: how polysemantic each is, as data, as a table, and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

from unbraid.base.files import write_whole
from unbraid.base.schema import build, check_schema, in_range, read_json, unread
from unbraid.base.tables import Exported, Table, Tabular, count, figure
from unbraid.finding.findings import Findings
from unbraid.measuring.results import Evaluation
from unbraid.networks.spec import LayerSpec
from unbraid.reporting.words import percent

SCHEMA = 1
DATA, TABLE = "layers.json", "layers.csv"
_MOST = 2**48  # of whatever is counted


@dataclass(frozen=True)
class LayerRow:
    """How polysemantic a layer is; measures are NaN where nothing was measured."""

    layer: str
    depth: int  # its number among all layers that can be split, from 1
    kind: str  # the class of module
    n_in: int
    n_channels: int
    tau: float  # NaN of clusters, which ask for none
    n_sure: int  # polysemantic channels
    n_uncertain: int  # which chance may have decided
    n_pairs: int
    lowest_cosine: float
    n_measured: int  # channels that the measures are of, those with the lowest cosines
    coverage: float  # means over these channels, of "Evaluate" in docs/method.md
    top_coverage: float
    r_precision: float  # of their concept channels
    whole_r_precision: float  # of the channels before
    page: str  # of the layer's own report, from the index; empty if it has none
    scans: tuple[str, ...]  # what identifies the two scans

    @property
    def part(self) -> float:
        """Part of the channels that are surely polysemantic."""
        return self.n_sure / self.n_channels

    @property
    def in_words(self) -> str:
        """Count the polysemantic channels; those that chance may have decided, apart."""
        more = f" and {self.n_uncertain:,} more unless by chance" if self.n_uncertain else ""
        return f"{self.n_sure:,} of {count(self.n_channels, 'channel')} surely polysemantic{more}"


def describe_layer(
    spec: LayerSpec,
    depth: int,
    found: Findings,
    evaluation: Evaluation | None,
    scans: tuple[str, ...],
    page: str = "",
) -> LayerRow:
    """Put together what was found in a layer, and what was measured of it."""
    channels = () if evaluation is None else evaluation.channels
    concepts = [concept for channel in channels for concept in channel.concepts]
    n_sure = len(found.sure_channels)
    return LayerRow(
        layer=spec.name,
        depth=depth,
        kind=spec.kind,
        n_in=spec.n_in,
        n_channels=spec.n_out,
        tau=found.tau if found.sides == "classes" else math.nan,
        n_sure=n_sure,
        n_uncertain=len(found.concepts) - n_sure,
        n_pairs=len(found.pairs),
        lowest_cosine=min((pair.cosine for pair in found.pairs), default=math.nan),
        n_measured=len(channels),
        coverage=_mean(channel.coverage for channel in channels),
        top_coverage=_mean(channel.top_coverage for channel in channels),
        r_precision=_mean(concept.r_precision for concept in concepts),
        whole_r_precision=_mean(concept.whole_r_precision for concept in concepts),
        page=page,
        scans=scans,
    )


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return mean(known) if known else math.nan


@dataclass(frozen=True)
class Layers(Tabular, Exported):
    """The layers of a network beside each other, first to last."""

    title: str
    settings: str  # what results depend on, in words
    n_layers: int  # that can be split
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...] = ()  # what is left out, and how to have it

    columns = tuple(field.name for field in fields(LayerRow))

    @property
    def worth_opening(self) -> list[LayerRow]:
        """Layers with channels that are surely polysemantic, those with most of them first."""
        found = [row for row in self.layers if row.n_sure]
        return sorted(found, key=lambda row: (-row.n_sure, -row.n_uncertain, -row.depth))

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Give one row per layer, in the order of the CSV columns."""
        for row in self.layers:
            yield (*tuple(vars(row).values())[:-1], " ".join(row.scans))

    def table(self) -> Table:
        """Show the layers, first to last."""
        heads = ("#", "layer", "channels", "sure", "uncertain", "part", "tau", "coverage")
        rows: list[tuple[str, ...]] = [(*heads, "R-precision", "before", "report")]
        for row in self.layers:
            numbers = (f"{row.n_channels:,}", f"{row.n_sure:,}", f"{row.n_uncertain:,}")
            part, tau = percent(row.part, 1), figure(row.tau, "g")
            measures = map(figure, (row.coverage, row.r_precision, row.whole_r_precision))
            cells = (str(row.depth), row.layer, *numbers, part, tau, *measures, row.page)
            rows.append(cells)
        return Table(rows, self.headline, "\n".join(f"Note: {note}" for note in self.notes))

    @property
    def headline(self) -> str:
        """How polysemantic the network is, in a sentence."""
        n_sure, n_uncertain = (
            sum(getattr(row, name) for row in self.layers) for name in ("n_sure", "n_uncertain")
        )
        n_channels = sum(row.n_channels for row in self.layers)
        text = (
            f"{n_sure:,} of {count(n_channels, 'channel')} in {count(len(self.layers), 'layer')} "
        )
        text += "is" if n_sure == 1 else "are"
        text += " surely polysemantic"
        return f"{text}, {n_uncertain:,} more unless by chance." if n_uncertain else f"{text}."

    def save(self, folder: Path) -> None:
        """Write the data, as JSON and as CSV."""
        own = {"schema": SCHEMA, **vars(self), "layers": [_plain(row) for row in self.layers]}
        text = json.dumps(own, indent=2, allow_nan=False) + "\n"
        write_whole(folder / DATA, text.encode())
        self.to_csv(folder / TABLE)


def _plain(row: LayerRow) -> dict[str, object]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in vars(row).items()
    }


@dataclass(frozen=True)
class _Content:
    schema: int
    title: str
    settings: str
    n_layers: int
    layers: tuple[LayerRow, ...]
    notes: tuple[str, ...]


def read_layers(folder: Path) -> Layers | None:
    """Read the data of an index page, None if there is none; RunError if it is damaged."""
    path = folder / DATA
    try:
        values = read_json(path)
        check_schema(values, SCHEMA)
        content = build(_Content, values, null_figures=True)
        for row in content.layers:
            for name in ("depth", "n_in", "n_channels"):
                in_range(name, getattr(row, name), 1, _MOST)
            in_range("n_sure and n_uncertain", row.n_sure, 0, row.n_channels)
            in_range("n_uncertain", row.n_uncertain, 0, row.n_channels - row.n_sure)
        in_range("n_layers", content.n_layers, 1, _MOST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        text = f"{path} is no list of layers that can be read ({error}); delete it and start again."
        raise unread(error, text) from None
    about = (content.title, content.settings, content.n_layers)
    return Layers(*about, content.layers, content.notes)
