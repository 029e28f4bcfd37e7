"""Sources of concept channels, against plain loops over images, taps and positions."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from pairs import TWO, make_split
from torch import Tensor, nn

import unbraid
from checks import assert_close
from tiny_networks import SyntheticImages, build, layer_input
from unbraid.base.errors import UsageError
from unbraid.measuring.circuit import Circuit

KINDS = ["1x1", "3x3", "groups", "uneven", "reflect", "tokens", "pooled features"]
IMAGES = SyntheticImages(11, seed=5)


class Case:
    def __init__(self, kind: str, tmp_path) -> None:
        self.network = build(kind)
        self.split = make_split(self.network)
        self.scan = unbraid.scan(self.network, "layer", IMAGES, tmp_path / "scan")


@pytest.fixture(params=KINDS)
def case(request, tmp_path) -> Case:
    return Case(request.param, tmp_path)


@pytest.fixture
def one(tmp_path) -> Case:
    return Case("3x3", tmp_path)


def relevances(
    case: Case, channel: int, row: torch.Tensor, classes: tuple[int, ...]
) -> list[float]:
    """Input x gradient of a row's summed response by autograd, image by image."""
    layer = build_like(case, channel, row)
    chosen = [n for n, label in enumerate(IMAGES.targets) if label in classes]
    last = case.split.layer.channels_last
    total = [0.0] * case.split.layer.n_in
    for n in chosen:
        x = layer_input(case.network, IMAGES.images[n : n + 1]).requires_grad_()
        z = layer(x)
        (z[..., channel] if last else z[:, channel]).sum().backward()
        product = (x * x.grad).detach()
        for i in range(len(total)):
            total[i] += float((product[..., i] if last else product[:, i]).sum()) / len(chosen)
    return total


def build_like(case: Case, channel: int, row: Tensor) -> nn.Module:
    """The layer with a channel's weights replaced by a row."""
    layer = copy.deepcopy(case.network.layer)
    with torch.no_grad():
        layer.weight[channel] = row.reshape(layer.weight[channel].shape)
    return layer


def assert_circuit(found: Circuit, case: Case, channel: int, concept: int) -> None:
    part = case.split[channel]
    own = relevances(case, channel, part.rows[concept], part.concepts[concept])
    whole = relevances(case, channel, part.weight, part.concepts[concept])
    positive = sum(a for a in own if a > 0)
    order = sorted((i for i in range(len(own)) if own[i] != 0), key=lambda i: -abs(own[i]))
    assert [s.channel for s in found.sources] == order[: len(found.sources)]
    for source in found.sources:
        assert_close(source.relevance, own[source.channel])
        assert_close(source.share, own[source.channel] / positive if positive else 0.0)
        assert_close(source.kept, own[source.channel] / whole[source.channel])


def test_sources_are_those_that_loops_find(case):
    for channel, concepts in TWO.items():
        for concept in range(len(concepts)):
            found = unbraid.circuit(case.split, case.scan, channel, concept, n=100)
            assert len(found.sources) > 1
            assert found.classes == case.split[channel].concepts[concept]
            assert_circuit(found, case, channel, concept)


def test_a_wrong_source_is_told(one):
    found = unbraid.circuit(one.split, one.scan, 1, 0)
    first = found.sources[0]
    for field in ("channel", "relevance", "share", "kept"):
        value = getattr(first, field)
        wrong = replace(first, **{field: type(value)(value * 1.01 + 1)})
        with pytest.raises(AssertionError):
            assert_circuit(replace(found, sources=(wrong, *found.sources[1:])), one, 1, 0)


def test_no_more_sources_than_asked_for_are_given(one):
    all_of_them = unbraid.circuit(one.split, one.scan, 1, 0, n=100).sources
    for n in (1, 3):
        assert unbraid.circuit(one.split, one.scan, 1, 0, n=n).sources == all_of_them[:n]


def test_a_source_of_which_nothing_is_kept_is_left_out(one):
    part = one.split[1]
    masks = part.masks.clone()
    masks[0, : one.split.layer.taps_per_input] = 0  # input channel 0
    split = replace(one.split, channels=(replace(part, masks=masks),))
    sources = unbraid.circuit(split, one.scan, 1, 0, n=100).sources
    assert 0 not in [source.channel for source in sources]
    assert len(sources) == one.split.layer.n_in - 1


def test_what_does_not_fit_is_refused(one, tmp_path):
    other = unbraid.scan(build("3x3", seed=1), "layer", IMAGES, tmp_path / "other")
    few = unbraid.scan(one.network, "layer", SyntheticImages(1), tmp_path / "few")
    assert unbraid.circuit(one.split, few, 1, 0).sources
    for scan, arguments, message in (
        (one.scan, (2, 0), "no concept 0 of channel 2; its channels and their concepts are"),
        (one.scan, (1, 2), "no concept 2 of channel 1"),
        (one.scan, (1, -1), "no concept -1 of channel 1"),
        (one.scan, (1, 0, 0), "n is 0"),
        (other, (1, 0), "of another network or layer"),
        (few, (1, 1), "no image of class 1, concept 1 of channel 1"),
    ):
        with pytest.raises(UsageError, match=message):
            unbraid.circuit(one.split, scan, *arguments)
