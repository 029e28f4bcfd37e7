"""The published rule: which taps a concept channel keeps, and which rho is chosen."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import checks
import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.splitting.published import RHOS, published_masks

# In all of these an in-place ReLU or a smooth activation comes behind; two have no bias.
KINDS = ["1x1", "no bias", "3x3", "uneven", "stride", "same", "groups", "tokens"]
OWN = {1: [[0], [1]], 5: [[2, 0], [3]], 6: [[3, 1], [0, 2]]}


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    network, images = build(request.param), SyntheticImages(14)
    out = tmp_path_factory.mktemp("scan")
    scan = unbraid.scan(network, "layer", images, out, positions=True, batch_size=5)
    found, truth = unbraid.find(scan, channels=OWN), checks.truth_of(network, images)
    return SimpleNamespace(network=network, images=images, scan=scan, found=found, truth=truth)


@pytest.mark.parametrize("rho", [0.05, 0.5, 0.7, 1.0])
def test_rows_are_those_of_the_published_rule(case, rho):
    split = unbraid.split(case.scan, case.found, method="published", rho=rho)
    assert [part.channel for part in split.channels] == [1, 5, 6]
    for part in split.channels:
        assert (part.info["rho"], part.concepts) == (rho, case.found.concepts[part.channel])
        checks.assert_published_rows(part, rho, case.truth)
        checks.assert_adds_up(part)


def test_taps_are_divided_or_shared_and_rho_is_the_one_that_the_criterion_chooses(case):
    parts = [p for rho in (0.3, 0.9) for p in parts_of(case.scan, case.found, rho=rho).values()]
    kept = torch.cat([part.masks.sum(0) for part in parts])
    assert set(kept.tolist()) == {1.0, 2.0}  # no tap is lost, some belong to one, some to both
    split = unbraid.split(case.scan, case.found, method="published")
    for part in split.channels:
        checks.assert_published_rho(part, case.truth)
        checks.assert_published_rows(part, part.info["rho"], case.truth)
    assert len({part.info["rho"] for part in split.channels}) > 1  # each has its own


def test_a_scan_of_some_images_tells_rho_alone_and_says_where_it_cannot(tmp_path):
    network, images = build("3x3"), SyntheticImages(14)
    whole = unbraid.scan(network, "layer", images, tmp_path / "whole")
    found = unbraid.find(whole, channels=OWN)
    truth = checks.truth_of(network, images)
    some = [n for n, label in enumerate(images.targets) if label != 3]
    for indices, is_whole in ((range(14), True), (some, False)):
        own = {"indices": indices, "positions": True}
        maps = unbraid.scan(network, "layer", images, tmp_path / str(is_whole), **own)
        told = pytest.warns(UserWarning, match="lacks images of concepts of 1 channel")
        with nullcontext() if is_whole else told:
            split = unbraid.split(maps, found, method="published", everything=whole)
        for part in split.channels:
            checks.assert_published_rows(part, part.info["rho"], truth)  # ARVs are of all images
            if is_whole or part.channel == 1:
                checks.assert_published_rho(part, truth)
        if not is_whole:
            others = [split[o].info["rho"] for o in (1, 6)]
            assert split[5].info["rho"] == min(others)  # the lower one of two in the middle
    nothing = replace(found, concepts={5: OWN[5]})
    with pytest.raises(UsageError, match="no channel with images of all its concepts"):
        unbraid.split(maps, nothing, method="published", everything=whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["1x1", "3x3", "groups", "tokens"])
def test_the_lowest_of_equally_good_rhos_is_chosen(kind, dtype, tmp_path):
    network, dataset = build(kind, dtype), SyntheticImages(14, dtype=dtype)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, positions=True)
    found = unbraid.find(scan, channels={o: [[0, 1], [2, 3]] for o in range(scan.layer.n_out)})
    chosen = parts_of(scan, found)
    for o, part in chosen.items():  # in the number format of the network
        checks.assert_bit_equal(part.weight, network.layer.weight[o].flatten())
        assert part.rows.dtype == part.residual_row.dtype == dtype
    for lower in RHOS[:-1]:
        for o, part in parts_of(scan, found, rho=lower).items():
            if lower < chosen[o].info["rho"]:  # with the same masks it would have been as good
                assert not torch.equal(part.masks, chosen[o].masks), (o, lower, chosen[o].info)


def parts_of(scan, found, **settings):
    split = unbraid.split(scan, found, method="published", **settings)
    return {part.channel: part for part in split.channels}


def test_a_given_rho_needs_no_positions_and_any_the_concepts_classes_alone(case, tmp_path):
    pooled_only = unbraid.scan(case.network, "layer", case.images, tmp_path / "pooled")
    without = parts_of(pooled_only, case.found, rho=0.7)
    for o, part in parts_of(case.scan, case.found, rho=0.7).items():
        checks.assert_bit_equal(without[o].rows, part.rows)
    found = unbraid.find(case.scan, channels={1: [[0], [3]]})
    settings = {"classes": found.classes, "positions": True}
    some = unbraid.scan(case.network, "layer", case.images, tmp_path / "some", **settings)
    whole, part = (parts_of(scan, found)[1] for scan in (case.scan, some))
    assert part.info == whole.info
    checks.assert_bit_equal(part.rows, whole.rows)


@pytest.mark.parametrize("n_concepts", [2, 3, 4, 6])
@pytest.mark.parametrize("rho", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("taps", [1, 9])
def test_masks_of_any_number_of_concepts_keep_what_no_other_concept_owns(n_concepts, rho, taps):
    arvs = random_arvs(n_concepts)
    checks.assert_extended_masks(published_masks(arvs, rho, taps), arvs, rho, taps)


def random_arvs(n_concepts):
    generator = torch.Generator().manual_seed(n_concepts)
    return list(torch.randn(n_concepts, 40, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("rho", [0.3, 1.0])
def test_two_concepts_are_divided_as_published(rho):
    v1, v2 = random_arvs(2)
    nothing = torch.full_like(v1, -1e9)  # a concept without a claim changes nothing
    three = published_masks([v1, v2, nothing], rho, 2)
    assert torch.equal(three[:2], published_masks([v1, v2], rho, 2))
    swapped = published_masks([v2.abs(), v1.abs()], rho, 1)
    assert torch.equal(swapped, published_masks([v1.abs(), v2.abs()], rho, 1).flip(0))
    v1, v2 = torch.tensor([-1.0]), torch.tensor([-1.1])  # 0.5 * v > the other, both ways
    assert published_masks([v1, v2], 0.5, 1).tolist() == [[1.0], [0.0]]
    assert published_masks([v2, v1], 0.5, 1).tolist() == [[1.0], [0.0]]


def test_three_concepts_add_up_to_the_channel(case):
    channels = {o: [[0], [1, 3], [2]] for o in (0, 3)}
    split = unbraid.split(case.scan, unbraid.find(case.scan, channels=channels), method="published")
    for part in split.channels:
        assert part.rows.shape == (3, case.scan.layer.n_taps)
        assert part.info["rho"] in RHOS
        checks.assert_adds_up(part)
        arvs = [case.truth.arv(concept, part.channel) for concept in part.concepts]
        taps = case.scan.layer.taps_per_input
        checks.assert_extended_masks(part.masks, arvs, part.info["rho"], taps)
        checks.assert_close(part.residual_bias, 2 * part.bias)
