"""What benchmarks/purity.py measures, against cases worked out by hand and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import interpretability
import unbraid
from even_share import fit_even_share
from purity_measures import average, averaged, bootstrap, bootstrap_mean, less
from purity_ways import permuted, shuffled
from rivals import (
    Autoencoder,
    Images,
    Pure,
    best_units,
    cluster_references,
    fit_probe,
    match_units,
    of_masks,
    ranks,
)
from unbraid.measuring.formulas import auroc


def test_intervals_are_paired_over_channels_with_all_their_concepts():
    base = {o: [float(o)] * 2 for o in range(20)}
    better = {o: [v + 1 for v in own] for o, own in base.items()}
    assert bootstrap(better, base) == (1, 1, 1)
    mean, low, high = bootstrap(base)
    assert mean == 9.5
    assert low < 8 < 11 < high
    assert average({0: [1.0, 5, 9], 1: [1.0]}, "median") == 3
    assert bootstrap({0: [1.0, 5, 9], 1: [1.0]})[0] == average({0: [1.0, 5, 9], 1: [1.0]}) == 4
    assert bootstrap(better, base, "median") == (1, 1, 1)
    nothing = {o: [math.nan] * 2 for o in base}
    assert all(map(math.isnan, bootstrap(better, nothing)))
    noise = {o: [v + (-1) ** o for v in own] for o, own in base.items()}
    _, low, high = bootstrap(noise, base)  # the twin: no difference
    assert low < 0 < high


def test_mean_over_networks_counts_each_network_once_and_draws_in_each():
    small = {0: [1.0], 1: [3.0, 2.0]}
    large = {o: [0.0] for o in range(50)}
    nothing = [{o: [0.0] * len(own) for o, own in n.items()} for n in (small, large)]
    mean, low, high = bootstrap_mean(list(zip((small, large), nothing, strict=True)))
    assert (mean, low, high) == (1, 0.5, 1.25)  # as only channels of the small one differ


def embedded(n_images: int = 200, n_patches: int = 4) -> interpretability.Embedded:
    """Two kinds of images, of which the first show another thing in their first patch."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(n_images, 16, n_patches, generator=draw)
    features[:20, :, 0] += 8 * torch.ones(16)
    return interpretability.embedded_by("hand", features.unflatten(2, (2, 2)))


def test_consistency_is_that_of_plain_loops_and_sees_places():
    images = embedded()
    response = torch.cat([torch.linspace(9, 5, 20), torch.rand(180)])
    maps = torch.zeros(200, 4)
    maps[:, 0] = 1
    score = interpretability.c2_score(response, maps, images)

    def consistency(maps: torch.Tensor) -> float:
        total = weights = 0.0
        rows = []
        for n in range(10):  # 5 % of 200
            patches = images.patches[n] - images.whole.mean(0)[:, None]
            rows.append((patches * maps[n]).sum(1) / maps[n].sum())
        for i in range(10):
            for j in range(10):
                if i != j:
                    weight = float(response[i] * response[j])
                    total += weight * float(torch.cosine_similarity(rows[i], rows[j], 0))
                    weights += weight
        return total / weights

    noise = torch.rand(10, 4, generator=torch.Generator().manual_seed(0))
    assert score == pytest.approx(consistency(maps) - consistency(noise), abs=1e-4)
    assert score > 0.05
    elsewhere = maps.roll(1, 1)  # the twin: where there is nothing
    assert interpretability.c2_score(response, elsewhere, images) < 0


def test_tasks_are_solved_by_what_is_alike_and_only_by_that():
    images = embedded()
    response = torch.cat([torch.linspace(9, 5, 20), torch.rand(180)])
    probability, solved = interpretability.mis(response, images.whole)
    assert solved == 1
    assert 0.5 < probability < 1 / (1 + math.exp(-2 * interpretability.ALPHA))
    mixed = torch.rand(30, 200, generator=torch.Generator().manual_seed(1))
    by_chance = [interpretability.mis(unit, images.whole)[1] for unit in mixed]
    assert 0.3 < sum(by_chance) / 30 < 0.7
    assert interpretability.mis(-response, images.whole)[1] == 1  # told from the other side


def test_units_are_matched_by_the_ranks_that_auroc_is_made_of():
    scores = torch.rand(30, 5, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    concept = torch.arange(30) % 4 - 1
    rank = ranks(scores)
    by_ranks = [int(rank[concept == k].mean(0).argmax()) for k in range(3)]
    assert best_units(scores, concept, 3) == by_ranks


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    from unbraid.demo.network import LAYER, load_images, load_network

    folder = tmp_path_factory.mktemp("demo")
    scan = unbraid.scan(
        load_network(), LAYER, load_images("test"), folder / "scan", positions=True, batch_size=250
    )
    found = unbraid.find(scan)
    first = min(found.concepts)
    return scan, unbraid.find(scan, channels={first: found.concepts[first]}), first


def test_units_of_masks_answer_as_a_split_does_and_permuting_keeps_their_weights(demo):
    scan, found, channel = demo
    images = Images.of(scan)
    split = unbraid.split(scan, found, method="published", rho=0.7)
    fitted = of_masks(scan, {channel: split[channel].masks}, 0)
    expected = split[channel].pooled_responses(images.pooled, images.n_positions)
    torch.testing.assert_close(images.response(channel), expected[:, 0])
    torch.testing.assert_close(fitted.pooled(channel, images), expected[:, 1:-1])
    summed = fitted.maps(channel, images).sum(2).double()
    torch.testing.assert_close(summed, expected[:, 1:-1], rtol=1e-3, atol=1e-2)
    other = permuted(fitted, images).rows[channel] / scan.weight[channel]
    kept = split[channel].masks.double()
    torch.testing.assert_close(other.sort(1).values, kept.sort(1).values, rtol=0, atol=1e-5)
    assert not torch.allclose(other, kept)


def test_the_first_version_shares_evenly_what_no_concept_names(demo):
    scan, found, channel = demo
    masks, penalty = fit_even_share(scan, found)
    assert fit_even_share(scan, found, penalty)[0][channel].equal(masks[channel])
    images = Images.of(scan)
    fitted = of_masks(scan, masks, 0)
    z, new = images.response(channel), fitted.pooled(channel, images)
    rest = images.concept(found.concepts[channel]) < 0
    share = (new[rest].sum(0) / z[rest].sum()).tolist()
    assert share == pytest.approx([1 / len(share)] * len(share), abs=0.25)
    for k, own in enumerate(new.T):  # on its own images it is the channel
        assert own[images.concept(found.concepts[channel]) == k].mean() > 0.7 * (
            z[images.concept(found.concepts[channel]) == k].mean()
        )


def test_concepts_are_shuffled_in_the_same_sizes(demo):
    _, found, channel = demo
    one, other = (shuffled(found, list(range(10)), seed).concepts[channel] for seed in (0, 1))
    assert [len(c) for c in one] == [len(c) for c in found.concepts[channel]]
    assert one != other
    assert averaged([{0: [1.0, 2.0]}, {0: [3.0, 4.0]}]) == {0: [2.0, 3.0]}
    assert less({0: [3.0]}, {0: [1.0]}) == {0: [2.0]}


def test_virtual_channels_share_images_out_among_them(demo):
    pytest.importorskip("sklearn")
    scan, found, channel = demo
    images = Images.of(scan)
    centres = cluster_references(images, found)
    every = Pure(centres, {channel: list(range(len(centres[channel])))}, 0)
    pooled = every.pooled(channel, images)
    torch.testing.assert_close(pooled.sum(1), images.response(channel))
    assert ((pooled != 0).sum(1) <= 1).all()
    summed = every.maps(channel, images).sum(2).double()
    torch.testing.assert_close(summed, pooled, rtol=1e-3, atol=1e-2)
    twice = Pure(centres, {channel: [0] * len(centres[channel])}, 0)  # the twin
    assert not torch.allclose(twice.pooled(channel, images).sum(1), images.response(channel))


def test_a_probe_tells_concepts_better_than_the_channel_and_answers_at_positions(demo):
    pytest.importorskip("sklearn")
    scan, found, channel = demo
    images = Images.of(scan)
    probe, concept = fit_probe(images, found), images.concept(found.concepts[channel])
    pooled = probe.pooled(channel, images)
    summed = probe.maps(channel, images).sum(2).double()
    torch.testing.assert_close(summed, pooled, rtol=1e-3, atol=1e-3)
    for k, score in enumerate(pooled.T):
        assert auroc(score, concept == k) > max(0.9, auroc(images.response(channel), concept == k))


class Coder(nn.Module):
    """Stands in for an autoencoder of the layer's outputs: its units are some of them."""

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        strongest = x.relu().topk(3)
        return x, torch.zeros_like(x).scatter(1, strongest.indices, strongest.values)


def test_codes_are_those_of_the_layers_outputs_at_positions(demo):
    scan, found, channel = demo
    images = Images.of(scan)
    coder = Autoencoder(Coder(), 2.0, scan.layer.n_out, 3)
    outputs = images.outputs(slice(None)) / 2
    dense = Coder().encode(outputs.movedim(1, 2).flatten(0, 1))[1]
    dense = dense.unflatten(0, (len(outputs), -1)).movedim(1, 2)  # (N, U, P)
    torch.testing.assert_close(coder.pooled_codes(images), dense.sum(2))
    sparse = match_units(images, found, coder)
    chosen = sparse.chosen[channel]
    torch.testing.assert_close(sparse.maps(channel, images), dense[:, chosen])
    scores = dense.sum(2).double()
    concepts = found.concepts[channel]
    assert chosen == best_units(scores, images.concept(concepts), len(concepts))
    z = outputs[:, channel].sum(1).double() * 2
    torch.testing.assert_close(z, images.response(channel), rtol=1e-3, atol=1e-2)
