"""Measures from responses: hand-made cases with known values, and plain loops of METHOD.md."""

import math

import pytest
import torch

import oracle
from checks import assert_close
from unbraid.measuring import formulas

YES, NO = True, False


@pytest.mark.parametrize(
    ("score", "own", "expected"),
    [
        ([4, 3, 2, 1], [YES, YES, NO, NO], 1.0),
        ([4, 3, 2, 1], [NO, NO, YES, YES], 0.0),
        ([4, 3, 2, 1], [YES, NO, YES, NO], 0.5),
        ([0, 0, 0, 0], [YES, NO, NO, NO], 0.25),  # silent: by chance, wherever its images lie
        ([0, 0, 0, 0], [NO, NO, NO, YES], 0.25),
        ([5, 1, 1, 1], [NO, YES, YES, NO], 1 / 3),  # one place left for three, two of them own
        ([1, 2], [NO, NO], math.nan),
        ([math.nan, 2, 1], [NO, YES, NO], math.nan),
        ([math.nan, math.nan], [NO, YES], math.nan),
    ],
)
def test_r_precision_is_known(score, own, expected):
    found = formulas.r_precision(torch.tensor(score).double(), torch.tensor(own))
    assert found == pytest.approx(expected, nan_ok=True)


def test_scores_that_are_no_numbers_have_no_auroc():
    own = torch.tensor([YES, NO])
    assert formulas.auroc(torch.tensor([2.0, 1.0]), own) == 1
    for score in ([math.nan, 1.0], [2.0, math.nan]):
        assert math.isnan(formulas.auroc(torch.tensor(score), own))


@pytest.mark.parametrize(
    ("n", "n_top", "named", "expected"),
    [(7, 1, [6], 1.0), (7, 1, [0, 5], 0.0), (199, 1, [198], 1.0), (400, 4, [399, 397, 0], 0.5)],
)
def test_top_coverage_looks_at_one_in_a_hundred_and_at_least_one(n, n_top, named, expected):
    is_named = torch.zeros(n, dtype=torch.bool)
    is_named[named] = True
    z = torch.arange(n).double()
    assert formulas.top_coverage(z, is_named) == expected
    assert formulas.top_coverage(z, is_named) == oracle.top_part(z, named, n_top)


@pytest.mark.parametrize(
    ("z", "new", "covered", "explained"),
    [  # the first two images are of a concept
        ([3, 1, 0, 0], [[3, 0], [0, 1], [0, 0], [0, 0]], 1.0, 1.0),
        ([3, 1, 4, -9], [[3, 0], [0, 1], [0, 0], [9, 9]], 0.5, 0.5),
        ([2, 2, 2, 2], [[9, 0], [1, 0], [-1, 0], [1, -3]], 0.5, 3 / 8),  # more than whole is whole
        ([-1, -1, -1, -1], [[1, 1]] * 4, math.nan, math.nan),
    ],
)
def test_coverage_and_explained_share_are_known(z, new, covered, explained):
    z, new = torch.tensor(z).double(), torch.tensor(new).double()
    named = torch.tensor([YES, YES, NO, NO])
    assert formulas.coverage(z, named) == pytest.approx(covered, nan_ok=True)
    assert formulas.explained_share(z, new) == pytest.approx(explained, nan_ok=True)
    assert formulas.off_concept(z, named) == pytest.approx(1 - covered, nan_ok=True)


@pytest.mark.parametrize("step", [1e-9, 0.5])
def test_figures_are_the_oracles_and_no_others(step):
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(230, 3, generator=generator).double()
    new = (new / step).round() * step  # ties
    z, concept = new.sum(1) / 2 + 0.1, torch.arange(230) % 5 - 2
    named = [n for n in range(230) if concept[n] >= 0]
    for k in range(3):
        own = (concept == k).nonzero().flatten().tolist()
        others = [n for n in range(230) if n not in own]
        found = [
            formulas.r_precision(new[:, k], concept == k),
            formulas.auroc(new[:, k], concept == k),
            formulas.off_concept(new[:, k], concept == k),
        ]
        expected = [
            oracle.top_part(new[:, k], own, len(own)),
            oracle.auroc(new[:, k], own, others),
            oracle.positive_part(new[:, k], others),
        ]
        assert_close(found, expected)
        with pytest.raises(AssertionError):  # of the next concept
            assert_close(found, [oracle.top_part(new[:, k - 1], own, len(own)), *expected[1:]])
    is_named = concept >= 0
    assert_close(formulas.coverage(z, is_named), oracle.positive_part(z, named))
    assert_close(formulas.top_coverage(z, is_named), oracle.top_part(z, named, 2))
    assert_close(formulas.explained_share(z, new), oracle.explained_share(z, new.T))
    with pytest.raises(AssertionError):
        assert_close(formulas.explained_share(z, new), oracle.explained_share(z, new[:, :2].T))
