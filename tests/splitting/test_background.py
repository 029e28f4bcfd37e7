"""What least squares asks of images that belong to no concept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import unbraid
from checks import Truth, assert_close, truth_of
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError
from unbraid.finding.membership import Members
from unbraid.scanning.records import Scan
from unbraid.splitting import least_squares as background
from unbraid.splitting.least_squares import (
    BACKGROUND_WEIGHT,
    Term,
    background_terms,
    sample_images,
)

CONCEPTS = ((0,), (2,))  # of the four classes


@pytest.fixture(scope="module", params=["3x3", "groups", "tokens"])
def case(request, tmp_path_factory) -> tuple[Scan, Truth]:
    network, images = build(request.param), SyntheticImages(40)
    scan = unbraid.scan(network, "layer", images, tmp_path_factory.mktemp("scan"), batch_size=8)
    return scan, truth_of(network, images)


def expected(truth: Truth, channel: int, mask: Tensor, weight: Tensor) -> float:
    """The term of one mask, image by image: squared distance from an even share."""
    responses = truth.pooled_response(channel, weight)
    masked = truth.pooled_response(channel, mask * weight)
    error = power = 0.0
    for n, label in enumerate(truth.labels):
        if label not in (0, 2):
            error += float(masked[n] - responses[n] / 2) ** 2
            power += float(responses[n]) ** 2
    return BACKGROUND_WEIGHT * error / power


def assert_term(term: Term, truth: Truth, channel: int, weight: Tensor) -> None:
    generator = torch.Generator().manual_seed(channel)
    for _ in range(3):
        mask = torch.rand(len(weight), generator=generator, dtype=torch.float64)
        value = (term.rows @ mask).square().sum() - 2 * term.linear @ mask + term.constant
        assert_close(value, expected(truth, channel, mask, weight), 1e-9)


def term_of(scan: Scan, channel: int) -> Term:
    (term,) = background_terms(Members(scan), sample_images(scan), channel, CONCEPTS)
    return term


@pytest.mark.parametrize("channel", [0, 3])
def test_the_term_is_the_distance_from_an_even_share(case, channel):
    scan, truth = case
    assert_term(term_of(scan, channel), truth, channel, scan.weight[channel].double())


def test_a_wrong_term_is_noticed(case):
    scan, truth = case
    term = term_of(scan, 0)
    for wrong in (
        Term(term.rows[1:], term.linear, term.constant),
        Term(term.rows, -term.linear, term.constant),
        Term(term.rows, term.linear, 2 * term.constant),
    ):
        with pytest.raises(AssertionError):
            assert_term(wrong, truth, 0, scan.weight[0].double())


def test_without_other_images_or_answers_nothing_is_asked(case):
    scan, _ = case
    sample = sample_images(scan)
    assert background_terms(Members(scan), sample, 0, ((0, 1), (2, 3))) == []
    silent = replace(scan, weight=0 * scan.weight, bias=0 * scan.bias)
    assert background_terms(Members(silent), sample, 0, CONCEPTS) == []


def test_a_sample_is_spread_over_all_shards(tmp_path):
    images = SyntheticImages(1300)
    scan = unbraid.scan(build("3x3"), "layer", images, tmp_path, batch_size=64, positions=True)
    assert scan.manifest.n_shards > 4
    assert sample_images(scan).index.tolist() == list(range(0, 1300, 3))


def test_a_sample_may_pass_over_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(background, "_N_BACKGROUND_IMAGES", 3)
    scan = unbraid.scan(build("3x3"), "layer", SyntheticImages(600), tmp_path, positions=True)
    assert sample_images(scan).index.tolist() == [0, 200, 400]  # of shards of 128


def test_a_scan_of_everything_stands_for_the_rest(tmp_path):
    network, images = build("3x3"), SyntheticImages(60)
    full = unbraid.scan(network, "layer", images, tmp_path / "full", positions=True)
    some = unbraid.scan(network, "layer", images, tmp_path / "some", positions=True, classes=[0, 2])
    found = unbraid.find(full, channels={1: [[0], [2]]})
    whole = unbraid.split(full, found)[1].masks
    torch.testing.assert_close(unbraid.split(some, found, everything=full)[1].masks, whole)
    assert not torch.allclose(unbraid.split(some, found)[1].masks, whole, atol=1e-4)


def test_a_scan_of_everything_must_be_of_the_same_layer(tmp_path):
    images = SyntheticImages(16)
    scan = unbraid.scan(build("3x3"), "layer", images, tmp_path / "one")
    other = unbraid.scan(build("tokens"), "layer", images, tmp_path / "other")
    found = unbraid.find(scan, channels={1: [[0], [2]]})
    with pytest.raises(UsageError, match="same network and layer"):
        unbraid.split(scan, found, everything=other)
