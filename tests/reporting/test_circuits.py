"""Circuits drawn: on the page beside their channel, and as a figure whose text is text."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

import unbraid
from pages import HOSTILE, notes, read, sections, shots
from unbraid.base.errors import UsageError
from unbraid.measuring.circuit_graph import CircuitGraph, Node, NodeImage
from unbraid.reporting.circuits import edges_from
from unbraid.reporting.words import percent


def graph_of(run, channel, **options):
    part = run.split[channel]
    circuits = [
        unbraid.circuit(run.split, run.train_scan, channel, k, n=100)
        for k in range(len(part.concepts))
    ]
    return unbraid.circuit_graph(circuits, [(run.split, run.scan)], **options)


def deeper(graph):
    """A graph with a column more, all of whose names are hostile."""
    image = NodeImage(0, 0, HOSTILE[1], HOSTILE[0], 1.0)
    more = Node("3.0", HOSTILE[0], "output", 3, 0, HOSTILE[0], 2, (image,))
    last = len(graph.nodes)
    edge = replace(graph.edges[0], source=last, target=last - 1, share=-0.5)
    return replace(graph, nodes=(*graph.nodes, more), edges=(*graph.edges, edge))


def test_the_page_shows_sources_and_lines_of_every_channel(run, page):
    for channel, section in sections(page).items():
        (figure,) = section.all("figure", "circuit")
        sources, ends = figure.all("ul")
        graph = graph_of(run, channel, n=4, n_images=1)
        n_ends = len(run.split[channel].concepts)
        assert len(ends.all("li")) == n_ends
        names = [graph.nodes[place].name for place in graph.columns()[1]]
        assert [item.all("b")[0].text for item in sources.all("li")] == names
        for item, place in zip(sources.all("li"), graph.columns()[1], strict=True):
            assert len(shots(item)) == 1
            for edge in edges_from(graph, place)[:2]:
                assert percent(edge.share, 1) in item.text
        drawn = figure.all("path", "edge")
        assert len(drawn) == sum(len(edges_from(graph, p)) for p in graph.columns()[1])
        (svg,) = figure.all("svg")
        assert "is fed most by input" in svg.attributes["aria-label"]


def test_a_circuit_through_an_earlier_layer_is_shown_whatever_its_names(run, write):
    channel = run.split.channels[0].channel
    graph = deeper(graph_of(run, channel, n=2))
    text = write(circuits=[graph])
    _, through = sections(text)[channel].all("figure", "circuit")
    assert len(through.all("ul")) == 3
    assert HOSTILE[0] in through.text
    (line,) = through.all("path", "against")
    assert "-50.0%" in line.text.replace("\N{MINUS SIGN}", "-")
    told = f"Circuits through an earlier layer are shown of 1 of {len(run.split.channels)} channels"
    assert told in notes(text)
    without = write()
    assert "Circuits through" not in notes(without)
    assert len(sections(without)[channel].all("figure", "circuit")) == 1


@pytest.mark.parametrize("change", [{"channel": 99}, {"layer": "elsewhere"}])
def test_a_circuit_of_something_else_is_refused(run, write, change):
    graph = graph_of(run, run.split.channels[0].channel)
    with pytest.raises(UsageError, match="A circuit is not of this split"):
        write(circuits=[replace(graph, **change)])
    root = replace(graph.nodes[0], part=50)
    with pytest.raises(UsageError, match="A circuit is not of this split"):
        write(circuits=[replace(graph, nodes=(root, *graph.nodes[1:]))])


def test_without_training_scan_and_images_there_is_no_graph_or_no_picture(run, write):
    bare = write(train_scan=None, evaluation=None)
    assert not read(bare).all("figure", "circuit")
    figure = read(write(dataset=None)).all("figure", "circuit")[0]
    assert not figure.all("img")
    assert figure.all("path", "edge")


@pytest.mark.parametrize("with_pictures", [True, False])
def test_the_figure_holds_its_text_as_text(run, tmp_path, with_pictures):
    graph = deeper(graph_of(run, run.split.channels[0].channel, n=2))
    dataset = run.images if with_pictures else None
    drawn = unbraid.circuit_figure(graph, dataset=dataset)
    for ending in ("svg", "png", "pdf"):
        unbraid.save_figure(drawn, tmp_path / f"a.{ending}")
    first = (tmp_path / "a.svg").read_bytes()
    unbraid.save_figure(unbraid.circuit_figure(graph, dataset=dataset), tmp_path / "a.svg")
    assert first == (tmp_path / "a.svg").read_bytes()
    root = ET.fromstring(first)
    words = " ".join("".join(one.itertext()) for one in root.iter() if one.tag.endswith("}text"))
    for node in graph.nodes:
        assert node.name in words
    assert "<script>" in words
    assert not [one for one in root.iter() if one.tag.endswith("script")]
    n_pictures = sum(len(node.images) for node in graph.nodes) if with_pictures else 0
    images = [one for one in root.iter() if one.tag.endswith("}image")]
    broken = re.findall(r"\bunreadable\b", first.decode())
    assert len(images) + len(broken) == n_pictures


def test_a_figure_that_does_not_fit_is_refused(run):
    graph = deeper(graph_of(run, run.split.channels[0].channel))
    with pytest.raises(UsageError, match="does not fit"):
        unbraid.circuit_figure(graph, dataset=run.images, width=3.25)
    with pytest.raises(UsageError, match="graph is 3"):
        unbraid.circuit_figure(3)
    assert isinstance(graph, CircuitGraph)
