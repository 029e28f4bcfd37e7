"""Circuits as one graph: concept channels, what feeds them, and the images that excite each.

Shapes: N images, M channels whose images are wanted, C_in input channels.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unbraid.base.arguments import as_kind, as_path, whole_number
from unbraid.base.errors import UsageError
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.base.schema import build, check_schema, in_range, read_json, unread
from unbraid.base.tables import Table, Tabular, percent
from unbraid.finding.arv import ClassSums
from unbraid.measuring.circuit import Circuit, Part, Source, circuit_of
from unbraid.measuring.reference_images import TopImages, strongest
from unbraid.measuring.results import join
from unbraid.scanning.fields import Records
from unbraid.scanning.manifest import MAX_CLASSES
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

N_DRAWN, N_NODES = 8, 10  # concepts in a circuit, and input channels that feed them
N_FOLLOWED = 64  # input channels of a concept that may have a line to it
SCHEMA = 1
_MOST_NODES = 10_000
_LARGEST = 1e12
_POOL = 4  # images of a shard among which to look for each that is shown, where some are grouped
_NOTE = (
    "share: part of all positive relevance for the concept channel\n"
    "kept: part of the source's relevance for the whole channel\n"
    "classes: of the images that excite the source most"
)


@dataclass(frozen=True)
class NodeImage:
    """An image that excites a channel."""

    index: int  # in the data set
    label: int
    name: str  # of its class
    image: str  # what the image itself is called
    activation: float  # pooled: of an input channel its input, else the pre-activation


@dataclass(frozen=True)
class Node:
    """A channel in a circuit: an input of a layer, an output, or a part of one that is split."""

    name: str  # such as "input 17", "10" or "10.1"
    layer: str
    kind: Literal["input", "output"]
    channel: int
    part: Part | None
    concept: str  # that a concept channel is of, by its classes; else empty
    column: int  # 0 for what is explained, 1 for its sources, 2 for theirs
    images: tuple[NodeImage, ...]  # strongest first
    # Whether they are those with the lowest input: it feeds what it feeds by being below zero.
    lowest: bool = False


@dataclass(frozen=True)
class Edge:
    """What a source gives a concept channel; see `Source`."""

    source: int  # its place among the nodes
    target: int
    rank: int  # among all sources of the target, from 1
    relevance: float
    share: float
    kept: float


@dataclass(frozen=True)
class CircuitGraph(Tabular):
    """Concept channels of a channel, what feeds them and, perhaps, what feeds that.

    Attributes:
        layer: name of the last layer, which the channel belongs to.
        channel: the channel whose concepts the graph ends in.
        n: sources that were asked for of each concept channel.
        nodes: channels and concept channels, with the images that excite them, by column.
        edges: from source to what it feeds, each with its relevance and share.
    """

    layer: str
    channel: int
    n: int  # sources that were asked for of each concept channel
    nodes: tuple[Node, ...]  # by column
    edges: tuple[Edge, ...]

    def columns(self) -> list[list[int]]:
        """Places of the nodes, column by column."""
        last = max((node.column for node in self.nodes), default=-1)
        return [
            [place for place, node in enumerate(self.nodes) if node.column == column]
            for column in range(last + 1)
        ]

    @property
    def indices(self) -> set[int]:
        """Of all images that it shows."""
        return {image.index for node in self.nodes for image in node.images}

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, texts and numbers."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON (docs/format.md); RunError if it cannot be written."""
        write_whole(as_path("path", path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    def table(self) -> Table:
        """Show of each concept channel its strongest sources."""
        rows: list[tuple[str, ...]] = [("concept channel", "source", "share", "kept", "classes")]
        by_target = sorted(self.edges, key=lambda edge: (edge.target, edge.rank))
        for edge in by_target:
            if edge.rank > self.n:
                continue
            source, target = self.nodes[edge.source], self.nodes[edge.target]
            seen = ", ".join(dict.fromkeys(image.name for image in source.images))
            about = source.concept or seen + (" (lowest)" if source.lowest and seen else "")
            shown = (percent(edge.share, 1), percent(edge.kept, 1))
            rows.append((f"{target.name} {target.concept}", _in_full(source, self), *shown, about))
        return Table(rows, f"What feeds channel {self.channel} of {self.layer}", _NOTE)


def _in_full(source: Node, graph: CircuitGraph) -> str:
    """A source's name, with its layer where that is another one."""
    return source.name if source.layer == graph.layer else f"{source.name} of {source.layer}"


class _Key(NamedTuple):
    """What tells a node from others."""

    layer: str
    kind: Literal["input", "output"]
    channel: int
    part: Part | None


Columns = dict[_Key, int]


@in_plain_modes
def circuit_graph(
    circuits: Sequence[Circuit],
    shown: Sequence[tuple[Split, Scan]],
    *,
    n: int = 4,
    n_images: int = 3,
) -> CircuitGraph:
    """Put circuits together into a graph, with the images that excite each node most.

    A source of one circuit that is the concept channel of another is one node, so circuits through
    several layers join.

    Args:
        circuits: from `unbraid.circuit` and `unbraid.circuit_from`, of concepts of one channel, and
            perhaps of what feeds them. Sources beyond the n strongest are taken for the edges of
            sources that feed several concept channels.
        shown: of each layer in the circuits its split, and a scan to choose images from; nothing is
            run.
        n: sources of each concept channel.
        n_images: of each node, at most.

    Returns:
        Nodes and edges as plain data, to print, save as JSON or draw by `unbraid.circuit_figure`.

    Raises:
        UsageError: a layer's split is not there, there is no circuit, circuits lead round in a
            circle, or a scan is of another network or layer.
    """
    n, n_images = whole_number("n", n, 1), whole_number("n_images", n_images, 1)
    if isinstance(circuits, Circuit) or not circuits:
        raise UsageError("circuits is no list of circuits; give one or more, as [circuit].")
    for circuit in circuits:
        as_kind("a circuit", circuit, Circuit)
    for split, scan in shown:
        split.require(scan)
    (graph,) = circuit_graphs([(circuits, n)], shown, n_images=n_images)
    for _, scan in shown:
        if scan.manifest.places_of:
            graph = _in_images(graph, scan)
    return graph


def _in_images(graph: CircuitGraph, places: Scan) -> CircuitGraph:
    """Name the images that places of a layer lie in, as a data set has images."""
    image = torch.cat(list(places.columns("image"))).tolist()

    def of(node: Node) -> Node:
        if node.layer != places.layer.name:
            return node
        return replace(node, images=tuple(replace(o, index=image[o.index]) for o in node.images))

    return replace(graph, nodes=tuple(map(of, graph.nodes)))


def circuit_graphs(
    several: Iterable[tuple[Sequence[Circuit], int]],
    shown: Sequence[tuple[Split, Scan]],
    *,
    n_images: int,
) -> list[CircuitGraph]:
    """Make several graphs as `circuit_graph`, each with its own n, in one reading of the scans."""
    by_layer = {split.layer.name: (split, scan) for split, scan in shown}
    drawn = [_connect(circuits, n) for circuits, n in several]
    wanted: dict[str, dict[tuple[_Key, bool], None]] = {}
    for graph in drawn:
        for key, lowest in graph.nodes.items():
            if key.layer not in by_layer:
                raise UsageError(f"shown lacks layer {key.layer!r}; give its split and a scan.")
            wanted.setdefault(key.layer, {})[key, lowest] = None
    images: dict[tuple[_Key, bool], tuple[NodeImage, ...]] = {}
    for layer, keys in wanted.items():
        images |= _find_images(*by_layer[layer], list(keys), n_images)
    splits = {name: split for name, (split, _) in by_layer.items()}
    return [graph.finish(splits, images) for graph in drawn]


def draw_circuits(
    split: Split, scan: Scan, sums: ClassSums, there: Collection[int]
) -> dict[int, CircuitGraph]:
    """Draw from which input channels the first concepts of each channel come.

    The sums are of training images, `there` the classes that these have; pictures are of `scan`.
    """
    circuits = {
        part.channel: [
            circuit_of(split, sums, part, k, N_FOLLOWED)
            for k in range(len(part.concepts[:N_DRAWN]))
        ]
        for part in split.channels
        if {label for concept in part.concepts for label in concept} <= set(there)
    }
    asked = [(own, n_sources(len(own))) for own in circuits.values()]
    graphs = circuit_graphs(asked, [(split, scan)], n_images=1)
    return dict(zip(circuits, graphs, strict=True))


def n_sources(n_concepts: int) -> int:
    """How many sources of each concept a circuit has room for."""
    return max(1, min(4, N_NODES // n_concepts))


@dataclass(frozen=True)
class _Graph:
    """A graph without names and images."""

    root: Circuit
    n: int
    columns: Columns
    nodes: dict[_Key, bool]  # whether it feeds by being below zero
    edges: list[tuple[_Key, _Key, int, Source]]

    def finish(
        self,
        splits: Mapping[str, Split],
        images: Mapping[tuple[_Key, bool], tuple[NodeImage, ...]],
    ) -> CircuitGraph:
        """Order the nodes, name them and show their images."""
        order = self._order()
        place = {key: k for k, key in enumerate(order)}
        nodes = []
        for key in order:
            concept, name = "", f"{'input ' * (key.kind == 'input')}{key.channel}"
            if key.part is not None:
                name += f".{key.part}"
                if isinstance(key.part, int):
                    split = splits[key.layer]
                    concept = split.name(split[key.channel].concepts[key.part])
            lowest = self.nodes[key]
            own = (self.columns[key], images[key, lowest], lowest)
            nodes.append(Node(name, key.layer, key.kind, key.channel, key.part, concept, *own))
        edges = [
            Edge(place[a], place[b], rank, source.relevance, source.share, source.kept)
            for a, b, rank, source in self.edges
        ]
        edges.sort(key=lambda edge: (edge.target, edge.rank))
        return CircuitGraph(self.root.layer, self.root.channel, self.n, tuple(nodes), tuple(edges))

    def _order(self) -> list[_Key]:
        """Nodes by column, then beside what they feed most, the strongest first."""
        keys = list(self.nodes)
        placed: list[_Key] = [key for key in keys if self.columns[key] == 0]
        for column in range(1, 1 + max(self.columns.values())):
            above = {key: k for k, key in enumerate(placed)}
            feeds: dict[_Key, tuple[int, float]] = {}
            for source, target, _, given in self.edges:
                own = (above[target], -abs(given.share)) if target in above else None
                if self.columns[source] == column and own is not None:
                    feeds[source] = min(feeds.get(source, own), own, key=lambda pair: pair[1])
            placed += sorted(feeds, key=feeds.__getitem__)
        return placed


def _connect(circuits: Sequence[Circuit], n: int) -> _Graph:
    """Choose nodes, beginning with concept channels that feed nothing, and connect them."""
    by_target: dict[_Key, list[Circuit]] = {}
    for circuit in circuits:
        by_target.setdefault(_target(circuit), []).append(circuit)
    fed = {_source(circuit, source) for circuit in circuits for source in circuit.sources}
    roots = [key for key in by_target if key not in fed]
    if not roots:
        raise UsageError("The circuits lead round in a circle; leave one out.")
    nodes = dict.fromkeys(roots, False)
    reached = roots
    while reached:
        here, reached = reached, []
        for circuit in (one for target in here for one in by_target.get(target, ())):
            for source in circuit.sources[:n]:
                key = _source(circuit, source)
                if key not in nodes:
                    nodes[key] = key.kind == "input" and source.mean < 0
                    reached.append(key)
    edges = [
        (_source(circuit, source), target, rank, source)
        for target in nodes
        for circuit in by_target.get(target, ())
        for rank, source in enumerate(circuit.sources, start=1)
        if _source(circuit, source) in nodes
    ]
    return _Graph(by_target[roots[0]][0], n, _columns(nodes, edges), nodes, edges)


def _columns(nodes: Iterable[_Key], edges: Sequence[tuple[_Key, _Key, int, Source]]) -> Columns:
    """Number the columns, so that each source lies beyond all that it feeds."""
    columns = dict.fromkeys(nodes, 0)
    for _ in range(len(columns)):
        before = dict(columns)
        for source, target, *_ in edges:
            columns[source] = max(columns[source], columns[target] + 1)
        if columns == before:
            return columns
    raise UsageError("The circuits lead round in a circle; leave one out.")


def _target(circuit: Circuit) -> _Key:
    return _Key(circuit.layer, "output", circuit.channel, circuit.concept)


def _source(circuit: Circuit, source: Source) -> _Key:
    if circuit.before:
        return _Key(circuit.before, "output", source.channel, source.part)
    return _Key(circuit.layer, "input", source.channel, None)


def _find_images(
    split: Split, scan: Scan, wanted: Sequence[tuple[_Key, bool]], n: int
) -> dict[tuple[_Key, bool], tuple[NodeImage, ...]]:
    """Find the images that excite channels of one layer most, in one reading of its scan."""
    best: list[list[TopImages]] = [[] for _ in wanted]
    for records in scan.light_shards():
        z = torch.stack([_pooled(split, scan, records, *one) for one in wanted], 1)  # (N, M)
        most = min(len(z), n if records.group is None else _POOL * n)
        # A stable sort, as everywhere: of equal ones the earlier image, however shards lie.
        top, rows = (part[:most] for part in z.sort(dim=0, descending=True, stable=True))
        for own, value, row in zip(best, top.T, rows.T, strict=True):
            group = None if records.group is None else records.group[row]
            label = records.label[row]
            own.append(TopImages(records.index[row], label, label, value, group))
    ids = scan.ids()
    found = {}
    for one, parts in zip(wanted, best, strict=True):
        top_images = strongest(join(parts), n)
        found[one] = tuple(
            NodeImage(index, label, split.name((label,)), ids.get(index, f"image {index}"), sign)
            for index, label, sign in zip(
                top_images.index.tolist(),
                top_images.label.tolist(),
                (top_images.activation * (-1 if one[1] else 1)).tolist(),
                strict=True,
            )
        )
    return found


def _pooled(split: Split, scan: Scan, records: Records, key: _Key, lowest: bool) -> Tensor:
    """What a channel does in each image, (N,): pooled input, with its sign turned, or output."""
    spec, positions = split.layer, records.n_positions
    if key.kind == "input":
        group, place = divmod(key.channel, spec.n_in_per_group)
        taps = slice(place * spec.taps_per_input, (place + 1) * spec.taps_per_input)
        pooled = records.pooled[:, group, taps].double().mean(1)
        return -pooled if lowest else pooled
    pooled = records.pooled[:, spec.group_of(key.channel)].double()
    if key.part is None:
        row, bias = scan.weight[key.channel].double(), scan.bias[key.channel].double()
        return pooled @ row + positions * bias
    responses = split[key.channel].pooled_responses(pooled, positions)
    if key.part == "residual":
        return -responses[:, -1]
    return responses[:, 1 + int(key.part)]


@dataclass(frozen=True)
class StoredGraphs:
    """Graphs in a file, and what they were made of."""

    schema: int
    split: str  # hashes of the split's file, and of those of earlier layers
    before: str
    graphs: tuple[CircuitGraph, ...]

    def write(self, path: Path) -> None:
        """Write a file; RunError if it cannot be written."""
        write_whole(path, (json.dumps(asdict(self)) + "\n").encode())


def read_graphs(path: Path) -> StoredGraphs:
    """Read a file of graphs; RunError if it is missing, damaged or of something else."""
    try:
        entries = read_json(path)
        check_schema(entries, SCHEMA)
        stored = build(StoredGraphs, entries, null_figures=True)
        for graph in stored.graphs:
            _check(graph)
    except (OSError, ValueError) as error:
        raise unread(error, f"{path} holds no circuits that can be read ({error}).") from None
    return stored


def _check(graph: CircuitGraph) -> None:
    """Raise ValueError for a graph that cannot be drawn."""
    n_nodes = len(graph.nodes)
    in_range("the number of nodes", n_nodes, 1, _MOST_NODES)
    for edge in graph.edges:
        in_range("an edge's source", edge.source, 0, n_nodes - 1)
        in_range("an edge's target", edge.target, 0, n_nodes - 1)
        in_range("a share", edge.share, -_LARGEST, _LARGEST)
    columns = {node.column for node in graph.nodes}
    if columns != set(range(len(columns))):
        raise ValueError("a column of nodes is missing")
    for node in graph.nodes:
        for image in node.images:
            in_range("an image", image.index, 0, 2**62)
            in_range("a label", image.label, 0, MAX_CLASSES - 1)
