"""Charts show their data, and say it in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from pages import Element, Run, read, sections
from unbraid.measuring.results import Responses
from unbraid.reporting.channel import (
    Scatter,
    by_class,
    concept_views,
    densities,
    ridges,
    scatter,
)
from unbraid.reporting.charts import (
    draw_densities,
    draw_ridges,
    draw_scatter,
)
from unbraid.reporting.words import isolate, significant


def points_of(line: str) -> list[tuple[float, float]]:
    """The points of a line, or of single dots."""
    figures = [float(v) for v in re.findall(r"-?\d+\.?\d*", line)]
    return list(zip(figures[::2], figures[1::2], strict=True))


@pytest.mark.parametrize("values", [[0.0] * 4, [7.0] * 4, [1e-30, 0, 0, 0], [-1e12, 0, 1, 1e12]])
def test_any_responses_can_be_drawn(values: list[float], run: Run) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    views = concept_views(run.found, [[0], [1], [2], [3]])
    each = torch.arange(4)
    responses = Responses(each, each, z, z, torch.stack([z, -z, 0 * z, z], 1), z, None)
    classes = by_class(run.found, views, responses)
    curves = draw_densities(densities(responses), views, 7)
    assert len(read(curves).all("path", "curve")) == 20
    for drawn in (
        curves,
        draw_scatter(scatter(classes, responses), views, 7),
        draw_ridges(ridges(classes, responses), views, 7),
    ):
        read(drawn)
        assert not re.search(r"\b(nan|inf)\b", drawn)


def test_draw_densities_and_ridges_follow_their_curves(run: Run) -> None:
    part = run.split.channels[0]
    responses, views = (
        run.evaluation.responses[part.channel],
        concept_views(run.found, part.concepts),
    )
    curves = densities(responses)
    drawn = read(draw_densities(curves, views, 7)).all("path", "curve")
    assert len(drawn) == curves.heights.shape[0] * curves.heights.shape[1]
    for element in drawn:
        ys = [y for _, y in points_of(element.attributes["d"])]
        assert max(ys) - min(ys) == pytest.approx(46, abs=0.11)
        assert len(ys) <= len(curves.grid) + 2
    data = ridges(by_class(run.found, views, responses), responses)
    chart = read(draw_ridges(data, views, 7))
    assert len(chart.all("path", "outline")) == len(data.classes)
    assert len(chart.all("path", "curve")) == len(data.classes) * len(views)


def assert_scatter(drawn: Element, data: Scatter) -> None:
    """Every point lies where its image's responses are, on one scale for both axes."""
    clouds, n = drawn.all("path", "dots"), len(data.classes)
    all_axes = list(combinations(range(data.points[0].shape[1]), 2))
    assert len(clouds) == len(all_axes) * n
    for a, axes in enumerate(all_axes):
        paths = [one.attributes["d"].replace("h0", " ") for one in clouds[a * n : (a + 1) * n]]
        for points, path_ in zip(data.points, paths, strict=True):
            assert len(points_of(path_)) == len(points)
        x, y = np.array([point for one in paths for point in points_of(one)]).T
        z1, z2 = np.concatenate(data.points)[:, axes].T
        (slope, offset), (slope2, offset2) = np.polyfit(z1, x, 1), np.polyfit(z2, y, 1)
        assert slope > 0
        assert slope2 == pytest.approx(-slope, rel=0.02)
        assert np.abs(slope * z1 + offset - x).max() < 0.11
        assert np.abs(slope2 * z2 + offset2 - y).max() < 0.11


@pytest.mark.parametrize(
    "harm",
    [
        lambda points: points[::-1],
        lambda points: [p[:, ::-1] for p in points],
        lambda points: [p * [1, 1.1, 1, 1][: p.shape[1]] for p in points],
    ],
)
def test_draw_scatter_places_points_where_responses_are(
    run: Run, harm: Callable[[Sequence[np.ndarray]], Sequence[np.ndarray]]
) -> None:
    part = run.split.channels[0]
    responses, views = (
        run.evaluation.responses[part.channel],
        concept_views(run.found, part.concepts),
    )
    data = scatter(by_class(run.found, views, responses), responses)
    drawn = read(draw_scatter(data, views, 7))
    assert_scatter(drawn, data)
    with pytest.raises((AssertionError, ValueError)):
        assert_scatter(drawn, data._replace(points=harm(data.points)))


def test_axes_have_units(page: str) -> None:
    for section in sections(page).values():
        charts = section.all("svg", "chart")
        assert len(charts) >= 4
        for chart in charts:
            labels = " ".join(text.text for text in chart.all("text", "label"))
            assert "summed pre-activation" in labels
        for plot in section.all("div", "plots")[0].all("svg", "chart"):
            labels = " ".join(text.text for text in plot.all("text", "label"))
            assert labels.count("summed pre-activation") == 2


# --- alternative texts ----------------------------------------------------------------------------


def assert_spoken(page: str, run: Run) -> None:
    """Every chart names its channel and concepts and has its main numbers."""
    (records,) = run.train_scan.shards()
    for part in run.split.channels:
        told: dict[str, str] = {}
        for figure in sections(page)[part.channel].all("figure"):
            for chart in figure.all("svg", "chart"):
                heading = figure.all("h3")[0].text
                told[heading] = told.get(heading, "") + chart.attributes["aria-label"]
        assert len(told) == 4
        responses = run.evaluation.responses[part.channel]
        columns = [z.double() for z in (responses.original, *responses.concepts.T)]
        for words in told.values():
            assert re.match(rf"Channel {part.channel}[:,]", words)
        for label in (label for concept in part.concepts for label in concept):
            name = isolate(run.found.name(label)[:40])
            assert sum(name in words for words in told.values()) == 4
        for column in columns:
            means = [column[responses.concept == k].mean() for k in range(len(part.concepts))]
            numbers = " and ".join(significant(float(mean)) for mean in means)
            assert numbers in told["How it answers to each concept"]
        for label in set(responses.label.tolist()):
            means = [column[responses.label == label].mean() for column in columns]
            numbers = " and ".join(significant(float(mean)) for mean in means)
            assert numbers in told["Class by class"]
        for k, concept in enumerate(part.concepts):
            pooled = records.pooled[np.isin(records.label.numpy(), concept), 0].double()
            rows = (part.weight, part.rows[k])
            full, kept = ((pooled * row).mean(0).view(8, 9).sum(1) for row in rows)
            first = int(full.abs().argmax())
            assert (
                f"{first} with {significant(float(full[first]), 2)}, of which "
                f"{significant(float(kept[first]), 2)} kept"
            ) in told["Where each concept comes from"]


def test_charts_say_what_they_show(page: str, run: Run) -> None:
    assert_spoken(page, run)
    labels = [svg.attributes["aria-label"] for svg in read(page).all("svg", "chart")]
    assert len(set(labels)) == len(labels)
    first, second = (part.channel for part in run.split.channels[:2])
    swapped = page.replace(f"Channel {first}: densities", f"Channel {second}: densities")
    with pytest.raises(AssertionError):
        assert_spoken(swapped, run)
    known = run.evaluation.responses[first]
    shifted = {first: replace(known, concepts=known.concepts + 100)}
    everything = {**run.evaluation.responses, **shifted}
    with pytest.raises(AssertionError):
        assert_spoken(page, replace(run, evaluation=replace(run.evaluation, responses=everything)))
