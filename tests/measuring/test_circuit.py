"""Sources of concept channels, against autograd image by image."""

import copy
from dataclasses import replace

import pytest
import torch

import unbraid
from checks import assert_close
from tiny_networks import layer_input
from unbraid.base.errors import UsageError


def relevances(case, channel, row, classes):
    """Input x gradient of a row's summed response, mean over the images of some classes."""
    layer, last = copy.deepcopy(case.network.layer), case.split.layer.channels_last
    with torch.no_grad():
        layer.weight[channel] = row.reshape(layer.weight[channel].shape)
    chosen = [n for n, label in enumerate(case.images.targets) if label in classes]
    total = torch.zeros(case.split.layer.n_in).double()
    for n in chosen:
        x = layer_input(case.network, case.images.images[n : n + 1]).requires_grad_()
        layer(x).select(-1 if last else 1, channel).sum().backward()
        product = (x * x.grad).detach()
        total += (product if last else product.movedim(1, -1)).flatten(0, -2).sum(0)
    return (total / len(chosen)).tolist()


def assert_circuit(found, case, channel, concept):
    part = case.split[channel]
    assert found.classes == part.concepts[concept]
    own = relevances(case, channel, part.rows[concept], part.concepts[concept])
    whole = relevances(case, channel, part.weight, part.concepts[concept])
    positive = sum(a for a in own if a > 0)
    order = sorted((i for i in range(len(own)) if own[i] != 0), key=lambda i: -abs(own[i]))
    assert len(order) > 1
    assert [s.channel for s in found.sources] == order
    for source in found.sources:
        assert_close(source.relevance, own[source.channel])
        assert_close(source.share, own[source.channel] / positive if positive else 0.0)
        assert_close(source.kept, own[source.channel] / whole[source.channel])


def test_circuit_of_any_layer_has_the_sources_that_autograd_finds(case_of):
    for kind in ("1x1", "3x3", "groups", "uneven", "reflect", "tokens", "pooled features"):
        case = case_of(kind)
        for part in case.split.channels:
            for k in range(len(part.concepts)):
                found = unbraid.circuit(case.split, case.scan, part.channel, k, n=100)
                assert_circuit(found, case, part.channel, k)
                few = unbraid.circuit(case.split, case.scan, part.channel, k, n=3)
                assert few.sources == found.sources[:3]


def test_assert_circuit_fails_on_a_wrong_source(case):
    found = unbraid.circuit(case.split, case.scan, 1, 0)
    for field in ("channel", "relevance", "share", "kept"):
        value = getattr(found.sources[0], field)
        wrong = replace(found.sources[0], **{field: type(value)(value * 1.01 + 1)})
        with pytest.raises(AssertionError):
            assert_circuit(replace(found, sources=(wrong, *found.sources[1:])), case, 1, 0)


def test_circuit_leaves_out_a_source_of_which_nothing_is_kept(case):
    masks = case.split[1].masks.clone()
    masks[0, : case.split.layer.taps_per_input] = 0  # input channel 0
    split = replace(case.split, channels=(replace(case.split[1], masks=masks),))
    sources = unbraid.circuit(split, case.scan, 1, 0, n=100).sources
    assert sorted(source.channel for source in sources) == [1, 2, 3, 4, 5]


def test_circuit_what_does_not_fit_is_refused(case, other_weights, tmp_path):
    few = unbraid.scan(case.network, "layer", case.images, tmp_path, classes=[0])
    assert unbraid.circuit(case.split, few, 1, 0).sources
    for scan, arguments, told in (
        (case.scan, (2, 0), "no concept 0 of channel 2; its channels and their concepts are"),
        (other_weights.scan, (1, 0), "of another network or layer"),
        (few, (1, 1), "no image of class 1, concept 1 of channel 1"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.circuit(case.split, scan, *arguments)
