"""Circuits drawn: the edges of the page's graphs as SVG, and a figure of one by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from unbraid.base.arguments import as_kind, real_number
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.measuring.circuit_graph import CircuitGraph, Edge, Node
from unbraid.reporting.channel import ConceptView
from unbraid.reporting.figures import need_matplotlib, one_name, square
from unbraid.reporting.pictures import read_pictures
from unbraid.reporting.words import isolate, letter, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.data import Dataset

    from unbraid.reporting.matplotlib_style import PaperFigure

_LEAST = 0.002  # share of an edge that is drawn
_THIN, _THICK = 0.75, 16.0  # pixels of a line without any share, and how many a share of 1 adds
_MOST = 9.0
_N_TOLD = 3  # sources of each concept channel that words tell of

# Lengths are in inches.
_MARGIN, _TILE, _BETWEEN, _WORDS, _BELOW = 0.05, 0.46, 0.04, 0.125, 0.14
_TEXT_BESIDE = 0.3  # that words may be wider than the tiles
_ALONE = 1.3  # a node's width without pictures
_LINES = 0.5  # least room between columns
_USUAL = 5.5


def share_of(edge: Edge) -> str:
    """Write how much of a concept channel's relevance comes by an edge."""
    return percent(edge.share, 1)


def edges_from(graph: CircuitGraph, source: int) -> list[Edge]:
    """What a node feeds, most first, but for what is next to nothing."""
    own = [edge for edge in graph.edges if edge.source == source and abs(edge.share) >= _LEAST]
    return sorted(own, key=lambda edge: -abs(edge.share))


def draw_edges(graph: CircuitGraph, column: int, concepts: Sequence[ConceptView]) -> Markup:
    """Draw the lines from a column to the one that it feeds, over the whole height between them.

    Nodes of a column are evenly apart, so lines fit whatever its height is.
    """
    columns = graph.columns()
    heights = [
        {node: 100 * (k + 0.5) / len(own) for k, node in enumerate(own)}
        for own in (columns[column], columns[column - 1])
    ]
    paths = []
    for edge in graph.edges:
        if edge.source not in heights[0] or edge.target not in heights[1]:
            continue
        if abs(edge.share) < _LEAST:
            continue
        y1, y2 = heights[0][edge.source], heights[1][edge.target]
        paths.append(
            Markup(
                '<path class="{}" d="M0 {:.2f}C50 {:.2f} 50 {:.2f} 100 {:.2f}" '
                'stroke-width="{:.2f}"><title>{}</title></path>'
            ).format(
                f"edge {_tone(graph.nodes[edge.target], concepts)}{' against' * (edge.share < 0)}",
                *(y1, y1, y2, y2),
                min(_MOST, _THIN + _THICK * abs(edge.share)),
                _describe(graph, edge, concepts),
            )
        )
    return Markup(
        '<svg class="edges" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        'aria-label="{}">{}</svg>'
    ).format(describe_edges(graph, column, concepts), Markup("").join(paths))


def describe_edges(graph: CircuitGraph, column: int, concepts: Sequence[ConceptView]) -> str:
    """Say what the lines show, for those who do not see them."""
    sources, told = set(graph.columns()[column]), []
    for target in graph.columns()[column - 1]:
        own = [e for e in graph.edges if e.target == target and e.source in sources]
        shown = ", ".join(
            f"{graph.nodes[edge.source].name} ({share_of(edge)})" for edge in own[:_N_TOLD]
        )
        if shown:
            told.append(f"{_called(graph.nodes[target], concepts)} is fed most by {shown}")
    return f"Lines from sources to what they feed: {'; '.join(told)}."


def _describe(graph: CircuitGraph, edge: Edge, concepts: Sequence[ConceptView]) -> str:
    source, target = graph.nodes[edge.source], _called(graph.nodes[edge.target], concepts)
    return f"{source.name} to {target}: share {share_of(edge)}, kept {percent(edge.kept, 1)}"


def _called(node: Node, concepts: Sequence[ConceptView]) -> str:
    """What a node is called: a letter if it is one of the channel's concepts."""
    view = _view(node, concepts)
    return f"concept channel {view.letter}" if view else isolate(node.name)


def _view(node: Node, concepts: Sequence[ConceptView]) -> ConceptView | None:
    if node.column or not isinstance(node.part, int):
        return None
    return concepts[node.part] if node.part < len(concepts) else None


def _tone(node: Node, concepts: Sequence[ConceptView]) -> str:
    view = _view(node, concepts)
    return f"k{view.tone}" if view else "further"


@in_plain_modes
def circuit_figure(
    graph: CircuitGraph, *, dataset: Dataset[Any] | None = None, width: float | None = None
) -> Figure:
    """Draw a circuit: sources on the left, what they feed on the right, each with its images.

    Lines are as thick as the source's share of the concept channel's positive relevance, dashed
    where it is below zero.

    Args:
        graph: from `unbraid.circuit_graph`.
        dataset: the images that it was chosen from; without it there are no pictures.
        width: of the figure, in inches; by default 5.5, or more where columns ask for it.

    Returns:
        A matplotlib Figure; in SVG its text is text.

    Raises:
        UsageError: the width is too small, or the data set is another one.
        UnbraidError: matplotlib is not installed.
    """
    as_kind("graph", graph, CircuitGraph)
    need_matplotlib()
    labels = {image.index: image.label for node in graph.nodes for image in node.images}
    pictures = {} if dataset is None else read_pictures(dataset, labels, square)
    most = max((len(node.images) for node in graph.nodes), default=0) if pictures else 0
    columns = graph.columns()
    strip = most * (_TILE + _BETWEEN) - _BETWEEN if most else _ALONE
    least = 2 * _MARGIN + len(columns) * strip + (len(columns) - 1) * _LINES
    width = max(_USUAL, least) if width is None else real_number("width", width)
    if width < least:
        raise UsageError(f"A circuit of {len(columns)} columns does not fit; ask for more width.")
    step = (width - 2 * _MARGIN - strip) / max(1, len(columns) - 1)
    tall = (_TILE if most else 0.0) + 2 * _WORDS
    height = max(map(len, columns)) * (tall + _BELOW) + 2 * _MARGIN
    return _draw(graph, pictures, (width, height), (strip, step, tall))


def _draw(
    graph: CircuitGraph,
    pictures: dict[int, Image.Image | None],
    size: tuple[float, float],
    lengths: tuple[float, float, float],
) -> PaperFigure:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    from unbraid.reporting import matplotlib_style as style

    (strip, step, tall), columns = lengths, graph.columns()
    with style.own_style(text_as_text=True):
        figure = style.PaperFigure(*size, text_as_text=True)
        places: dict[int, tuple[float, float]] = {}  # left, and the middle of a node
        for column, own in enumerate(reversed(columns)):
            pitch = (size[1] - 2 * _MARGIN) / len(own)
            for k, place in enumerate(own):
                places[place] = (_MARGIN + column * step, size[1] - _MARGIN - (k + 0.5) * pitch)
        for edge in graph.edges:
            if abs(edge.share) < _LEAST:
                continue
            (x1, y1), (x2, y2) = places[edge.source], places[edge.target]
            x1, x2, middle = x1 + strip + 0.05, x2 - 0.05, (x1 + strip + x2) / 2
            line = Path([(x1, y1), (middle, y1), (middle, y2), (x2, y2)], [1, 4, 4, 4])
            target = graph.nodes[edge.target]
            figure.add_artist(
                PathPatch(
                    line,
                    fill=False,
                    transform=figure.dpi_scale_trans,
                    linewidth=min(6.0, 0.5 + 10 * abs(edge.share)),
                    linestyle="--" if edge.share < 0 else "-",
                    color=_ink(target),
                    alpha=0.55,
                    zorder=0.5,
                    label=f"{graph.nodes[edge.source].name} to {target.name}",
                )
            )
        for place, (x, y) in places.items():
            node, top = graph.nodes[place], y + tall / 2
            _write_node(figure, graph, place, (x, top), strip + _TEXT_BESIDE)
            for k, image in enumerate(node.images if pictures else ()):
                at = (x + k * (_TILE + _BETWEEN), top - 2 * _WORDS - _TILE - 0.02)
                axes = figure.axes_at(*at, _TILE, _TILE)
                frame = _ink(node) if node.part is not None else style.PALE
                style.draw_tile(axes, pictures[image.index], frame)
    return figure


def _write_node(
    figure: PaperFigure, graph: CircuitGraph, place: int, at: tuple[float, float], width: float
) -> None:
    """Write a node's name and what it feeds, and below it its concept or its images' classes."""
    from unbraid.reporting import matplotlib_style as style

    node, (x, top) = graph.nodes[place], at
    is_root = node.column == 0 and isinstance(node.part, int)
    title = f"{letter(int(node.part or 0))}  {node.name}" if is_root else node.name
    if node.layer != graph.layer:
        title += f" of {one_name(node.layer)}"
    ink, y = _ink(node) if is_root else style.BLACK, top - _WORDS + 0.03
    end = figure.write(x, y, title, width, weight="bold", color=ink)
    for edge in edges_from(graph, place)[:2]:
        target = graph.nodes[edge.target]
        name = letter(int(target.part or 0)) if target.column == 0 else target.name
        words, room = f"  {share_of(edge)} of {name}", x + width - end
        if room > 0.4:
            end = figure.write(end, y, words, room, fontsize=style.SMALL, color=_ink(target))
    below = one_name(node.concept) if node.concept else _seen(node)
    figure.write(x, y - _WORDS, below, width, fontsize=style.SMALL, color=style.SOFT)


def _seen(node: Node) -> str:
    """Name the classes of a node's images."""
    names = ", ".join(dict.fromkeys(one_name(image.name) for image in node.images))
    return f"{names} (lowest)" if node.lowest and names else names


def _ink(node: Node) -> str:
    from unbraid.reporting import matplotlib_style as style

    if node.column == 0 and isinstance(node.part, int):
        return style.colour(node.part)
    return style.SOFT


def layer_before(graph: CircuitGraph) -> str:
    """Name the layer that a circuit leads through."""
    return next((node.layer for node in graph.nodes if node.layer != graph.layer), "")
