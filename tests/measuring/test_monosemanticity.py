"""Monosemanticity score, clarity and PURE's distances, against double loops over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import oracle
from checks import assert_close
from unbraid.base.errors import UsageError
from unbraid.measuring.semantics import (
    add_images,
    clarity,
    monosemanticity_score,
    pure_distances,
    score,
)

ACTIVATIONS = {
    "any sign": lambda a: a,
    "rectified": lambda a: a.clamp(min=0),
    "sparse": lambda a: (a - 1.2).clamp(min=0),
    "all negative": lambda a: a - 10,
    "large and alike": lambda a: 1e6 + 1e-3 * a,
    "an outlier": lambda a: a + 1e5 * (torch.arange(len(a)) == 3)[:, None],
    "first is the outlier": lambda a: a - 1e5 * (torch.arange(len(a)) == 0)[:, None],
    "single precision": lambda a: a.float(),
}


def some_images(n: int = 23, channels: int = 4, dimensions: int = 5) -> tuple[Tensor, Tensor]:
    """Activations (N, C) and embeddings (N, D) that lean to one side, as real ones do."""
    a = torch.randn(n, channels, dtype=torch.float64)
    return a, torch.randn(n, dimensions, dtype=torch.float64) + 0.5


def assert_scores(scores: Tensor, activations: Tensor, embeddings: Tensor) -> None:
    """Each channel's score is the double loop's."""
    assert scores.shape == activations.shape[1:]
    assert scores.dtype == torch.float64
    for actual, activation in zip(scores, activations.T, strict=True):
        assert_close(actual, oracle.monosemanticity(activation, embeddings))


def assert_clarity(actual: float, embeddings: Tensor) -> None:
    assert_close(actual, oracle.clarity(embeddings))


def assert_distances(actual: tuple[float, float], embeddings: Tensor, concept: Tensor) -> None:
    """Distances within and between, in this order."""
    for one, expected in zip(actual, oracle.pure_distances(embeddings, concept), strict=True):
        assert_close(one, expected)


# --- the score ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_scores_in_one_pass_are_those_of_the_double_loop(kind):
    a, e = some_images()
    a = ACTIVATIONS[kind](a)
    assert_scores(monosemanticity_score(a, e), a, e)


def test_a_single_channel_may_come_alone():
    a, e = some_images()
    one = monosemanticity_score(a[:, 2], e)
    assert one.shape == ()
    assert one == monosemanticity_score(a, e)[2]


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [1, 22], [10, 10, 3]])
def test_it_does_not_matter_how_images_are_divided_among_shards(sizes):
    a, e = some_images()
    sums = None
    for part_a, part_e in zip(a.split(sizes), e.split(sizes), strict=True):
        sums = add_images(sums, part_a, part_e)
    assert_scores(score(sums), a, e)


def test_adding_images_leaves_the_sums_before_as_they_were():
    a, e = some_images()
    first = add_images(None, a[:10], e[:10])
    before = score(first)
    add_images(first, a[10:], e[10:])
    assert torch.equal(score(first), before)


def test_images_without_a_direction_are_left_out_also_where_all_of_a_shard_are():
    a, e = some_images()
    e[[0, 7, 8, 9]] = 0
    sums = add_images(None, a[:7], e[:7])
    sums = add_images(sums, a[7:10], e[7:10])
    sums = add_images(sums, a[10:], e[10:])
    assert sums.n_images == 19
    assert_scores(score(sums), a, e)
    assert_scores(monosemanticity_score(a, e), a, e)


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e8, 0.1])
def test_a_channel_that_never_changes_has_no_score(constant):
    a, e = some_images()
    a[:, 1] = constant
    scores = monosemanticity_score(a, e)
    assert scores.isnan().tolist() == [False, True, False, False]
    assert_scores(scores, a, e)


@pytest.mark.parametrize("others", [0.1, 7.0])
def test_rounding_is_not_taken_for_a_change(others):
    a = torch.full((9,), 0.1, dtype=torch.float64)
    a[::2] = torch.nextafter(a[0], 2 * a[0])
    a[4] = others  # at 7 the only one that differs by more than rounding
    assert monosemanticity_score(a, some_images(9)[1]).isnan()


@pytest.mark.parametrize("offset", [0.0, 0.7, -300.0])
def test_an_image_that_is_alone_above_the_lowest_has_no_pair(offset):
    a, e = torch.zeros(50, dtype=torch.float64), some_images(50)[1]
    a[11] = 1.3
    assert monosemanticity_score(a + offset, e).isnan()


def test_one_image_or_none_with_a_direction_has_no_score():
    a, e = some_images()
    assert monosemanticity_score(a[:1], e[:1]).isnan().all()
    assert monosemanticity_score(a, torch.zeros_like(e)).isnan().all()


def test_neither_the_unit_of_activations_nor_that_of_embeddings_matters():
    a, e = some_images()
    same = monosemanticity_score(7 * a - 3, e * torch.rand(23, 1).double().add(0.1))
    assert_close(same, monosemanticity_score(a, e))


def test_a_channel_of_one_thing_scores_one_and_of_two_things_half():
    e = torch.eye(2).double().repeat_interleave(500, 0)  # two things, as unlike as can be
    one, two = torch.zeros(1000).double(), torch.zeros(1000).double()
    one[:400] = 1
    two[:400] = two[500:900] = 1
    assert_close(monosemanticity_score(torch.stack([one, two], 1), e)[0], 1.0)
    assert_close(monosemanticity_score(torch.stack([one, two], 1), e)[1], 399 / 799)


def test_the_check_of_scores_fails_on_other_images():
    a, e = some_images()
    scores = monosemanticity_score(a, e)
    assert_scores(scores, a, e)
    corrupted = [
        (scores, a, e.roll(1, 0)),
        (scores, a, e[:, :-1]),
        (scores, a.roll(1, 1), e),
        (scores, a[:-1], e[:-1]),
        (scores, a.clamp(min=0), e),
        (scores + 1e-7, a, e),
        (scores.where(torch.arange(4) != 2, torch.nan), a, e),
        (scores[:3], a, e),
        (scores.float(), a, e),
    ]
    for wrong in corrupted:
        with pytest.raises(AssertionError):
            assert_scores(*wrong)


@pytest.mark.parametrize(
    ("n_activations", "n_embeddings", "match"), [(5, 6, "do not fit"), (0, 0, "no image")]
)
def test_images_of_another_number_are_refused(n_activations, n_embeddings, match):
    with pytest.raises(UsageError, match=match):
        monosemanticity_score(torch.zeros(n_activations), torch.zeros(n_embeddings, 3))


def test_embeddings_of_another_shape_are_refused():
    with pytest.raises(UsageError, match="do not fit"):
        monosemanticity_score(torch.zeros(4), torch.zeros(4, 3, 2))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    a, e = some_images()
    for values in (a, e):
        broken = values.clone()
        broken[3, 1] = value
        with pytest.raises(UsageError, match="NaN or infinite"):
            monosemanticity_score(*((broken, e) if values is a else (a, broken)))


# --- clarity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 20])
def test_clarity_is_that_of_the_double_loop(n):
    e = some_images(n)[1]
    assert_clarity(clarity(e), e)
    assert_clarity(clarity(e.float()), e.float())


def test_clarity_leaves_out_images_without_a_direction():
    e = some_images(6)[1]
    e[2] = 0
    assert_clarity(clarity(e), e)
    assert_close(clarity(e), clarity(e[[0, 1, 3, 4, 5]]))


def test_clarity_of_less_than_two_images_is_not_known():
    e = some_images(1)[1]
    assert math.isnan(clarity(e))
    assert math.isnan(clarity(torch.cat([e, torch.zeros_like(e)])))
    assert math.isnan(clarity(e[:0]))


def test_the_check_of_clarity_fails_on_other_images():
    e = some_images(6)[1]
    for wrong in (e[:5], e.clamp(min=0), -e + 1):
        with pytest.raises(AssertionError):
            assert_clarity(clarity(e), wrong)


# --- PURE's distances -----------------------------------------------------------------------------


@pytest.mark.parametrize("concept", [[0, 0, 1, 1, 0, 2], [0, 1, 2, 3, 4, 5], [1] * 6])
def test_distances_are_those_of_the_double_loop(concept):
    e = some_images(6)[1]
    for embeddings in (e, e.float()):
        distances = pure_distances(embeddings, torch.tensor(concept))
        assert_distances(distances, embeddings, torch.tensor(concept))


def test_distances_without_a_pair_are_not_known():
    e = some_images(3)[1]
    within, between = pure_distances(e, torch.tensor([0, 1, 2]))
    assert math.isnan(within)
    assert between > 0
    within, between = pure_distances(e, torch.tensor([1, 1, 1]))
    assert within > 0
    assert math.isnan(between)


def test_the_same_image_in_two_concepts_has_no_distance():
    e = some_images(40)[1][[0] * 40]  # more than cdist would take without rounding
    assert pure_distances(e, torch.arange(40) % 2) == (0.0, 0.0)


def test_the_check_of_distances_fails_on_other_images():
    e, concept = some_images(6)[1], torch.tensor([0, 0, 1, 1, 0, 2])
    within, between = pure_distances(e, concept)
    for wrong in ((between, within), (within + 1e-7, between), (within, math.nan)):
        with pytest.raises(AssertionError):
            assert_distances(wrong, e, concept)
    with pytest.raises(AssertionError):
        assert_distances((within, between), e, concept.roll(1))


def test_every_embedding_needs_a_concept():
    with pytest.raises(UsageError, match="6 embeddings but 5"):
        pure_distances(some_images(6)[1], torch.zeros(5))
