"""The report's charts and intervals say what the responses say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import gaussian_kde
from test_report import Element, Run, own_text, read, run, sections  # noqa: F401

from unbraid.measuring import evaluate as bootstrap
from unbraid.measuring.evaluate import (
    auroc,
    intervals,
    mimic_error,
    resampled,
    separation_error,
    silence_errors,
)
from unbraid.measuring.results import Responses
from unbraid.reporting import channel as spread
from unbraid.reporting import charts
from unbraid.reporting import charts as spread_charts
from unbraid.reporting.channel import (
    N_POINTS,
    Scatter,
    by_class,
    concept_views,
    densities,
    density,
    masks,
    ridges,
    scatter,
)
from unbraid.reporting.charts import draw_masks, path
from unbraid.reporting.words import number
from unbraid.splitting.splits import ChannelSplit


@pytest.fixture(scope="module")
def answers(run: Run) -> Responses:  # noqa: F811
    return run.evaluation.responses[run.split.channels[0].channel]


@pytest.fixture(scope="module")
def views(run: Run) -> Any:  # noqa: F811
    return concept_views(run.found, run.split.channels[0].concepts)


def points_of(line: str) -> list[tuple[float, float]]:
    """The points of a line with relative steps, or of single dots."""
    figures = [float(v) for v in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", line)]
    pairs = list(zip(figures[::2], figures[1::2], strict=True))
    if "l" not in line:
        return pairs
    return [tuple(p) for p in np.cumsum(pairs, axis=0).tolist()]


def test_a_line_is_the_same_line_in_few_characters() -> None:
    rng = np.random.default_rng(0)
    points = [(float(x), float(y)) for x, y in rng.normal(0, 30, (200, 2))]
    np.testing.assert_allclose(points_of(path(points)), points, atol=0.051)  # no errors add up
    assert len(path(points)) < 200 * 11


# --- by class -------------------------------------------------------------------------------------


def test_images_are_sorted_by_concept_and_class(answers: Responses) -> None:
    groups = by_class(answers)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(answers.label)))
    keys = []
    for images in groups:
        (key,) = {(int(answers.concept[i]), int(answers.label[i])) for i in images.tolist()}
        keys.append(key)
    assert len(set(keys)) == len(keys)
    assert [concept for concept, _ in keys] == sorted(concept for concept, _ in keys)


def test_ridges_are_scipys_densities(run: Run, views: Any, answers: Responses) -> None:  # noqa: F811
    groups = by_class(answers)
    data = ridges(run.found, views, answers, groups)
    assert data.n_left_out == 0
    for row, images in zip(data.rows, groups, strict=True):
        assert row.n_images == len(images)
        assert row.name == run.found.name(int(answers.label[images[0]]))
        columns = [answers.original, *answers.concepts.T]
        step = data.grid[1] - data.grid[0]
        for heights, column in zip((row.original, *row.concepts), columns, strict=True):
            values = column.double().numpy()[images]
            if values.std(ddof=1) * len(values) ** -0.2 < step:
                continue  # drawn wider, so that it can be seen
            expected = gaussian_kde(values)(data.grid)
            np.testing.assert_allclose(heights, expected / expected.max(), atol=1e-12)
    drawn = read(spread_charts.ridges(data, 7))
    assert len(drawn.all("path", "outline")) == len(groups)
    assert len(drawn.all("path", "curve")) == len(groups) * len(views)
    texts = " ".join(text.text for text in drawn.all("text"))
    assert "summed pre-activation" in texts


def test_only_a_few_classes_of_each_concept_have_ridges(
    run: Run,  # noqa: F811
    views: Any,
    answers: Responses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spread, "N_CLASSES", len(views))
    labels = torch.arange(len(answers.label)) % 5
    data = ridges(
        run.found, views, replace(answers, label=labels), by_class(replace(answers, label=labels))
    )
    assert [row.concept for row in data.rows] == list(views)
    assert data.n_left_out == 4 * len(views)


def assert_scatter(drawn: Element, data: Scatter, answers: Responses) -> None:
    """Every point lies where its image's responses are, on one scale for both axes."""
    clouds = drawn.all("path", "dots")
    n_axes = len(data.axes)
    assert len(clouds) == n_axes * len(data.clouds)
    known = {tuple(row) for row in answers.concepts.double().numpy().round(9).tolist()}
    for a, (across, up) in enumerate(data.axes):
        places, values = [], []
        for cloud, element in zip(
            data.clouds, clouds[a * len(data.clouds) : (a + 1) * len(data.clouds)], strict=True
        ):
            assert {tuple(point) for point in cloud.points.round(9).tolist()} <= known
            places += points_of(element.attributes["d"].replace("h0", " "))
            values += cloud.points[:, [across, up]].tolist()
        x, y = np.array(places).T
        z1, z2 = np.array(values).T
        (slope, offset), (slope2, offset2) = np.polyfit(z1, x, 1), np.polyfit(z2, y, 1)
        assert slope > 0
        assert slope2 == pytest.approx(-slope, rel=0.02)
        assert np.abs(slope * z1 + offset - x).max() < 0.11
        assert np.abs(slope2 * z2 + offset2 - y).max() < 0.11


def test_points_lie_where_responses_are(run: Run, views: Any, answers: Responses) -> None:  # noqa: F811
    data = scatter(run.found, views, answers, by_class(answers))
    assert sum(len(cloud.points) for cloud in data.clouds) <= N_POINTS + len(data.clouds)
    assert_scatter(read(spread_charts.scatter(data, 7)), data, answers)


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: replace(data, clouds=data.clouds[::-1]),
        lambda data: replace(data, axes=tuple((b, a) for a, b in data.axes)),
        lambda data: replace(
            data, clouds=tuple(replace(c, points=1.1 * c.points) for c in data.clouds)
        ),
    ],
)
def test_the_checker_sees_misplaced_points(
    run: Run,  # noqa: F811
    views: Any,
    answers: Responses,
    harm: Callable[[Scatter], Scatter],
) -> None:
    data = scatter(run.found, views, answers, by_class(answers))
    with pytest.raises((AssertionError, ValueError)):
        assert_scatter(read(spread_charts.scatter(data, 7)), harm(data), answers)


@pytest.mark.parametrize("values", [[0.0] * 4, [7.0] * 4, [1e-30, 0, 0, 0], [-1e12, 0, 1, 1e12]])
def test_any_responses_can_be_drawn(values: list[float], run: Run) -> None:  # noqa: F811
    z = torch.tensor(values, dtype=torch.float64)
    views = concept_views(run.found, [[0], [1], [2], [3]])
    concept = torch.tensor([0, 1, 2, 3])
    answers = Responses(concept, concept, z, z, torch.stack([z, -z, 0 * z, z], 1), z, None)
    groups = by_class(answers)
    for drawn in (
        spread_charts.scatter(scatter(run.found, views, answers, groups), 7),
        spread_charts.ridges(ridges(run.found, views, answers, groups), 7),
    ):
        read(drawn)
        assert not re.search(r"\b(nan|inf)\b", drawn)


# --- masks ----------------------------------------------------------------------------------------


def assert_masks(drawn: Element, part: ChannelSplit, taps: int) -> None:
    """Steps are as high as the mean mask of each input channel, in one order for all concepts."""
    kept = []
    for mask in part.masks.tolist():
        kept.append([sum(mask[i : i + taps]) / taps for i in range(0, len(mask), taps)])
    heights = []
    for element in drawn.all("path", "kept"):
        steps = re.findall(r"V(-?[\d.]+)H", element.attributes["d"])
        base = float(re.match(r"M[\d.]+,([\d.]+)", element.attributes["d"])[1])
        heights.append([(base - float(v)) / 30 for v in steps])
    columns = sorted(zip(*heights, strict=True))
    np.testing.assert_allclose(columns, sorted(zip(*kept, strict=True)), atol=0.002)


def test_masks_are_drawn_as_they_are(run: Run, views: Any) -> None:  # noqa: F811
    part = run.split.channels[0]
    # Tenths of the chart's height, so that rounding does not matter.
    tenths = torch.randint(11, (*part.masks.shape[:1], 8), generator=torch.Generator())
    part = replace(part, masks=(tenths / 10).repeat_interleave(9, dim=1))
    drawn = read(draw_masks(masks(views, part, 9), 7))
    assert_masks(drawn, part, 9)
    with pytest.raises(AssertionError):
        assert_masks(drawn, replace(part, masks=1 - part.masks), 9)


def test_many_input_channels_are_averaged(run: Run, views: Any) -> None:  # noqa: F811
    part = run.split.channels[0]
    wide = replace(part, masks=torch.rand(len(part.masks), 1000))
    drawn = draw_masks(masks(views, wide, 1), 7)
    assert drawn.count("V") == len(part.masks) * 221
    averages = re.findall(r"\) (\d+%)", read(drawn).all("svg")[0].attributes["aria-label"])
    assert averages == [f"{float(m):.0%}" for m in wide.masks.double().mean(1)]


# --- intervals ------------------------------------------------------------------------------------


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
    monkeypatch.setattr(bootstrap, "_MAX_CELLS", 7 * len(answers.label))
    known = intervals(answers)
    assert known is not None
    assert known.separation_error[0] < known.separation_error[1]


def test_a_single_image_tells_nothing_of_others(answers: Responses) -> None:
    concept = torch.zeros_like(answers.concept)
    concept[0] = 1
    alone = replace(answers, concept=concept, concepts=answers.concepts[:, :2])
    assert intervals(alone) is None


def test_intervals_stand_below_their_measures(run: Run, tmp_path: Path) -> None:  # noqa: F811
    page = run.report(tmp_path / "r.html")
    for channel in run.evaluation.channels:
        section = sections(page)[f"channel-{channel.channel}"]
        known = intervals(run.evaluation.responses[channel.channel])
        assert known is not None
        rows = section.all("table")[0].all("tbody")[0].all("tr")
        for sure, row in zip(known.concepts, rows, strict=True):
            shown = [small.text for small in row.all("small", "interval")]
            assert shown == [f"{number(a)} to {number(b)}" for a, b in vars(sure).values()]
            assert all(own_text(cell) for cell in row.all("td"))


def test_density_charts_still_follow_their_curves(run: Run, views: Any, answers: Responses) -> None:  # noqa: F811

    data = densities(views, answers)
    curves = read(charts.densities(data, 7)).all("path", "curve")
    flat = [curve for _, panel in data.panels for curve in panel]
    for element, curve in zip(curves, flat, strict=True):
        ys = [y for _, y in points_of(element.attributes["d"])]
        assert max(ys) - min(ys) == pytest.approx(46, abs=0.11)
        assert len(ys) <= len(curve.heights) + 2
    assert density(np.array([1.0, 2.0]), np.linspace(0, 3, 9)).max() == 1
