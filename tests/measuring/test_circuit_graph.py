"""Circuits as graphs: nodes and edges are those of the circuits, images those of brute force."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import unbraid
from checks import assert_close
from public_calls import call
from tiny_networks import layer_input
from unbraid.base.errors import RunError, UsageError
from unbraid.measuring.circuit import Circuit, Source
from unbraid.measuring.circuit_graph import SCHEMA, StoredGraphs, read_graphs

KINDS = ("1x1", "3x3", "groups", "tokens", "pooled features")


def circuits_of(case, channel, n=100):
    part = case.split[channel]
    return [
        unbraid.circuit(case.split, case.scan, channel, k, n=n) for k in range(len(part.concepts))
    ]


def graph_of(case, channel, **options):
    return unbraid.circuit_graph(circuits_of(case, channel), [(case.split, case.scan)], **options)


def pooled(case, row, channel):
    """A row's response without bias, in a channel's place, summed over positions, per image."""
    layer, last = copy.deepcopy(case.network.layer), case.split.layer.channels_last
    with torch.no_grad():
        layer.weight[channel] = row.reshape(layer.weight[channel].shape)
        if layer.bias is not None:
            layer.bias[channel] = 0
        z = layer(layer_input(case.network, case.images.images))
    own = z.select(-1 if last else 1, channel)
    return own.reshape(len(own), -1).sum(1).double()


def expected_response(case, node, channel):
    spec = case.split.layer
    if node.kind == "output":
        return pooled(case, case.split[channel].rows[node.part], channel)
    row = torch.zeros(spec.n_in_per_group, spec.taps_per_input).double()
    row[node.channel % spec.n_in_per_group] = 1 / spec.taps_per_input
    return pooled(case, row.flatten(), channel)


def assert_graph(graph, case, channel, n, n_images):
    circuits = circuits_of(case, channel)
    roots, sources = graph.columns()
    assert [graph.nodes[r].part for r in roots] == list(range(len(circuits)))
    chosen = {source.channel for own in circuits for source in own.sources[:n]}
    assert {graph.nodes[s].channel for s in sources} == chosen
    edges = {(e.source, e.target): (e.rank, e.relevance, e.share, e.kept) for e in graph.edges}
    place = {graph.nodes[s].channel: s for s in sources}
    expected = {
        (place[s.channel], root): (rank, s.relevance, s.share, s.kept)
        for root, own in zip(roots, circuits, strict=True)
        for rank, s in enumerate(own.sources, start=1)
        if s.channel in chosen
    }
    assert edges == expected
    for node in graph.nodes:
        z = expected_response(case, node, channel)
        bias = case.split[channel].bias if node.kind == "output" else 0.0
        best = sorted(range(len(z)), key=lambda i: z[i] if node.lowest else -z[i])[:n_images]
        assert len(node.images) == min(n_images, len(z))
        n_positions = next(iter(case.scan.shards())).n_positions[0]
        for image, index in zip(node.images, best, strict=True):
            assert_close(image.activation, float(z[index]) + bias * float(n_positions))
            assert_close(z[image.index], z[index])  # of equal ones any
            assert image.label == case.images.targets[image.index]


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_edges_and_images_are_those_of_circuits_and_brute_force(kind, case_of):
    case = case_of(kind)
    for part in case.split.channels:
        for n, n_images in ((1, 1), (3, 2)):
            graph = graph_of(case, part.channel, n=n, n_images=n_images)
            assert_graph(graph, case, part.channel, n, n_images)


def test_assert_graph_fails_on_a_wrong_graph(case):
    graph = graph_of(case, 1, n=2, n_images=2)
    assert_graph(graph, case, 1, 2, 2)
    node, edge = graph.nodes[-1], graph.edges[0]
    swapped = replace(node, images=node.images[::-1])
    for wrong in (
        replace(graph, edges=(replace(edge, share=edge.share * 1.01), *graph.edges[1:])),
        replace(graph, edges=graph.edges[1:]),
        replace(graph, nodes=(*graph.nodes[:-1], swapped)),
        replace(graph, nodes=(*graph.nodes[:-1], replace(node, lowest=not node.lowest))),
    ):
        with pytest.raises(AssertionError):
            assert_graph(wrong, case, 1, 2, 2)


def test_an_input_that_feeds_by_being_below_zero_shows_where_it_is_lowest(case):
    circuits = [
        replace(own, sources=tuple(replace(s, mean=s.channel % 2 - 0.5) for s in own.sources))
        for own in circuits_of(case, 1)
    ]
    graph = unbraid.circuit_graph(circuits, [(case.split, case.scan)], n=100, n_images=2)
    assert {node.lowest for node in graph.nodes if node.kind == "input"} == {False, True}
    assert not any(node.lowest for node in graph.nodes if node.kind == "output")
    assert_graph(graph, case, 1, 100, 2)
    mean = [s.mean for own in circuits_of(case, 1) for s in own.sources]
    assert min(mean) >= 0  # behind a ReLU


def test_a_circuit_is_followed_on_no_more_images_than_asked_and_tells_how_far_it_is(calls, capsys):
    every = call(calls["circuit_from"], progress=True)
    n_images = int(capsys.readouterr().err.split(" of ")[1].split(",")[0])
    assert n_images > 2
    few = call(calls["circuit_from"], n_images=2, progress=True)
    n_few = int(capsys.readouterr().err.removeprefix("Following the circuit: ").split(" of ")[0])
    assert 0 < n_few <= 2
    assert few.sources != every.sources


def test_circuits_through_layers_join(calls):
    _, arguments = calls["circuit_from"]
    before, split, scan = (arguments[name] for name in ("before", "split", "scan"))
    stem = unbraid.open_scan(scan.path.parent / "stem")
    found = [call(calls["circuit_from"], concept=k, n=100) for k in range(2)]
    deeper = [
        unbraid.circuit(before, stem, part.channel, k)
        for part in before.channels
        for k in range(len(part.concepts))
    ]
    graph = unbraid.circuit_graph([*found, *deeper], [(split, scan), (before, stem)], n=100)
    columns = graph.columns()
    assert [{graph.nodes[k].layer for k in own} for own in columns] == [
        {"layer"},
        {"stem"},
        {"stem"},
    ]
    assert [{graph.nodes[k].kind for k in own} for own in columns] == [
        {"output"},
        {"output"},
        {"input"},
    ]
    names = {graph.nodes[k].name for k in columns[1]}
    assert names == {source.name for own in found for source in own.sources}
    assert {f"{part.channel}.residual" for part in before.channels} <= names
    for edge in graph.edges:
        assert graph.nodes[edge.source].column == graph.nodes[edge.target].column + 1
    n_edges = sum(len(own.sources) for own in (*found, *deeper))
    assert len(graph.edges) == n_edges
    assert "of stem" in str(graph)


def test_a_graph_prints_saves_and_is_read_again(case, tmp_path):
    graph = graph_of(case, 1, n=2)
    text = str(graph)
    assert text.startswith(f"What feeds channel 1 of {graph.layer}\n")
    rows = [line for line in text.splitlines() if line.startswith("1.")]
    assert len(rows) == sum(edge.rank <= 2 for edge in graph.edges)
    graph.save(tmp_path / "g.json")
    assert json.loads((tmp_path / "g.json").read_text()) == json.loads(json.dumps(graph.to_dict()))
    stored = StoredGraphs(SCHEMA, "a", "b", (graph,))
    stored.write(tmp_path / "s.json")
    assert read_graphs(tmp_path / "s.json") == stored


def test_a_damaged_file_of_graphs_is_refused(case, tmp_path):
    graph, path = graph_of(case, 1, n=2), tmp_path / "s.json"
    StoredGraphs(SCHEMA, "a", "b", (graph,)).write(path)
    sound = path.read_text()
    for old, new in (
        ('"source": 2', '"source": 200'),
        ('"target": 0', '"target": -1'),
        ('"column": 1', '"column": 7'),
        ('"index": ', '"index": -'),
        ('"rank"', '"rang"'),
        ('"schema": 1', '"schema": 99'),
        ("}", ""),
    ):
        assert old in sound
        path.write_text(sound.replace(old, new))
        with pytest.raises(RunError, match="holds no circuits that can be read"):
            read_graphs(path)


def circle():
    sources = Source(1, 1.0, 1.0, 1.0, part=0), Source(2, 1.0, 1.0, 1.0, part=0)
    first = Circuit("a", 2, 0, (0,), "x", sources[:1], before="b")
    return [first, Circuit("b", 1, 0, (0,), "x", sources[1:], before="a")]


def test_what_makes_no_graph_is_refused(case, other_weights):
    circuits, shown = circuits_of(case, 1), [(case.split, case.scan)]
    for told, arguments in (
        ("no list of circuits", ([], shown)),
        ("no list of circuits", (circuits[0], shown)),
        ("a circuit is 'x'", (["x"], shown)),
        ("shown lacks layer 'layer'", (circuits, [])),
        ("round in a circle", (circle(), shown)),
        ("another network or layer", (circuits, [(case.split, other_weights.scan)])),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.circuit_graph(*arguments)
    with pytest.raises(UsageError, match="n is 0"):
        unbraid.circuit_graph(circuits, shown, n=0)
