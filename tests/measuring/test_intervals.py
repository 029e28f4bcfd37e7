"""Bootstrap intervals of the measures: those of images drawn again and again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pages import Run, make_run
from unbraid.measuring import evaluate
from unbraid.measuring.evaluate import (
    auroc,
    intervals,
    mimic_error,
    resampled,
    separation_error,
    silence_errors,
)
from unbraid.measuring.results import Responses


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def answers(run: Run) -> Responses:
    return run.evaluation.responses[run.split.channels[0].channel]


def slow_measures(answers: Responses, images: list[int]) -> list[list[float]]:
    """The measures of METHOD.md section 6 on some images, each perhaps several times."""
    z, new = answers.original[images].double(), answers.concepts[images].double()
    concept = answers.concept[images]
    rows = []
    for k in range(new.shape[1]):
        own = concept == k
        others = [concept == other for other in range(new.shape[1]) if other != k]
        silences = silence_errors(z, new, concept, k)
        rows.append(
            [
                float(new[own, k].mean() / z[own].mean()),
                sum(float(new[o, k].mean() / z[o].mean()) for o in others) / len(others),
                mimic_error(z, new[:, k], own),
                sum(silences) / len(silences),
                auroc(new[:, k], own),
            ]
        )
    return rows


def members(answers: Responses) -> list[np.ndarray]:
    return [np.flatnonzero(answers.concept == k) for k in range(answers.concepts.shape[1])]


def drawn_counts(answers: Responses, n: int) -> tuple[np.ndarray, list[list[int]]]:
    rng = np.random.default_rng(5)
    chosen = [
        [int(i) for images in members(answers) for i in rng.choice(images, len(images))]
        for _ in range(n)
    ]
    counts = np.array([np.bincount(images, minlength=len(answers.label)) for images in chosen])
    return counts.astype(float), chosen


def test_resampled_measures_are_those_of_the_repeated_images(answers: Responses) -> None:
    tied = replace(answers, concepts=(answers.concepts / 20).round() * 20)
    for given in (answers, tied):
        counts, chosen = drawn_counts(given, 6)
        z, new = given.original.double().numpy(), given.concepts.double().numpy()
        fast = resampled(counts, z, new, members(given))
        slow = [slow_measures(given, images) for images in chosen]
        np.testing.assert_allclose(fast, slow, rtol=1e-9)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(fast, [slow_measures(given, c) for c in chosen[::-1]])


def test_intervals_are_percentiles_of_many_draws(answers: Responses) -> None:
    known = intervals(answers)
    assert known is not None
    assert known == intervals(answers)
    _, chosen = drawn_counts(answers, 300)
    slow = np.array([slow_measures(answers, images) for images in chosen])
    low, high = np.quantile(slow, [0.025, 0.975], axis=0)
    for k, concept in enumerate(known.concepts):
        mine = np.array([list(pair) for pair in vars(concept).values()])
        width = (high[k] - low[k]).clip(min=1e-9)
        assert (np.abs(mine[:, 0] - low[k]) < 0.35 * width).all()
        assert (np.abs(mine[:, 1] - high[k]) < 0.35 * width).all()
    errors = []
    for images in chosen:
        z, new = answers.original[images].double(), answers.concepts[images].double()
        errors.append(separation_error(z, new, answers.concept[images]))
    low, high = np.quantile(errors, [0.025, 0.975])
    assert abs(known.separation_error[0] - low) < 0.35 * (high - low)
    assert abs(known.separation_error[1] - high) < 0.35 * (high - low)


def test_few_cells_at_a_time_give_as_many_draws(
    answers: Responses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "_MAX_CELLS", 7 * len(answers.label))
    known = intervals(answers)
    assert known is not None
    assert known.separation_error[0] < known.separation_error[1]


def test_a_single_image_tells_nothing_of_others(answers: Responses) -> None:
    concept = torch.zeros_like(answers.concept)
    concept[0] = 1
    alone = replace(answers, concept=concept, concepts=answers.concepts[:, :2])
    assert intervals(alone) is None


def test_means_are_those_of_repeated_images(run: Run) -> None:
    answers = run.evaluation.responses[run.split.channels[0].channel]
    known = intervals(answers)
    assert known is not None
    generator = torch.Generator().manual_seed(3)
    for k, (low, high) in enumerate(known.means):
        z = answers.original[answers.concept == k].double()
        draws = torch.randint(len(z), (2000, len(z)), generator=generator)
        expected = z[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        width = float(expected[1] - expected[0])
        assert abs(low - float(expected[0])) < 0.2 * width
        assert abs(high - float(expected[1])) < 0.2 * width
