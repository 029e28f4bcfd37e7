"""Densities end at zero, charts say in words what they show, and notes are bounded text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_report import Element, Run, assert_harmless, read, run, sections  # noqa: F401

import unbraid
from unbraid.measuring.results import Responses
from unbraid.reporting import channel as channels
from unbraid.reporting import channel as spread
from unbraid.reporting.channel import (
    by_class,
    concept_views,
    densities,
    density,
    ridges,
    shared_grid,
)
from unbraid.reporting.figures import gather
from unbraid.reporting.words import isolate, significant

# --- densities ------------------------------------------------------------------------------------


def old_grid(groups: Sequence[np.ndarray], n: int) -> np.ndarray:
    """5 % beyond the data, as it once was."""
    values = np.concatenate(groups)
    margin = 0.05 * (values.max() - values.min())
    return np.linspace(values.min() - margin, values.max() + margin, n)


def assert_ends_at_zero(curves: Sequence[np.ndarray]) -> None:
    assert curves
    for heights in curves:
        assert heights.max() == 1
        assert max(heights[0], heights[-1]) < 0.004  # a fifth of a unit in the page's charts


def few(run: Run) -> tuple[int, Responses]:  # noqa: F811
    """A channel's responses to three images of each of two concepts."""
    part = run.split.channels[0]
    answers = run.evaluation.responses[part.channel]
    kept = np.concatenate([np.flatnonzero(answers.concept == k)[:3] for k in range(2)])
    cut = replace(
        answers,
        concept=answers.concept[kept],
        label=answers.label[kept],
        original=answers.original[kept],
        concepts=answers.concepts[kept][:, :2],
    )
    return part.channel, cut


def curves_of(run: Run) -> list[np.ndarray]:  # noqa: F811
    channel, answers = few(run)
    views = concept_views(run.found, run.split[channel].concepts[:2])
    by_concept = densities(views, answers)
    rows = ridges(run.found, views, answers, by_class(answers)).rows
    return [
        *(curve.heights for _, curves in by_concept.panels for curve in curves),
        *(heights for row in rows for heights in (row.original, *row.concepts)),
    ]


def test_densities_of_few_images_end_at_zero(run: Run) -> None:  # noqa: F811
    assert_ends_at_zero(curves_of(run))


@pytest.mark.parametrize("module", [channels, spread])
def test_a_wall_at_the_end_is_seen(
    run: Run,  # noqa: F811
    module: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "shared_grid", old_grid)
    with pytest.raises(AssertionError):
        assert_ends_at_zero(curves_of(run))


def test_figures_end_at_zero_too(run: Run) -> None:  # noqa: F811
    for part in run.split.channels:
        content = gather(run.split, run.scan, part.channel)
        assert_ends_at_zero([curve.heights for row in content.rows for curve in row.curves])


@pytest.mark.parametrize("n", [81, 121, 241])
def test_any_groups_end_at_zero(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(50):
        sizes = rng.integers(1, 6, size=4)
        groups = [rng.normal(rng.normal(0, 9), rng.exponential(5), size) for size in sizes]
        groups.append(np.full(4, rng.normal()))  # a spike
        grid = shared_grid(groups, n)
        assert len(grid) == n
        assert_ends_at_zero([density(values, grid) for values in groups])


# --- alternative texts ----------------------------------------------------------------------------


def spoken(page: str, channel: int) -> dict[str, str]:
    """The alternative texts of a channel's charts, by heading."""
    figures = sections(page)[f"channel-{channel}"].all("figure")
    told = {}
    for figure in figures:
        for chart in figure.all("svg", "chart"):
            heading = figure.all("h3")[0].text
            told[heading] = told.get(heading, "") + chart.attributes["aria-label"]
    return told


def assert_spoken(page: str, run: Run) -> None:  # noqa: F811
    """Every chart names its channel and concepts and has its main numbers."""
    (records,) = run.train_scan.shards()
    for part in run.split.channels:
        told = spoken(page, part.channel)
        assert len(told) == 5
        answers = run.evaluation.responses[part.channel]
        columns = [z.double() for z in (answers.original, *answers.concepts.T)]
        letters = "ABCDEFGH"[: len(part.concepts)]
        for words in told.values():
            assert re.match(rf"Channel {part.channel}[:,]", words)
        for concept in part.concepts:
            for label in concept:
                name = isolate(run.found.name(label)[:40])
                assert sum(name in words for words in told.values()) == 5
        for column in columns:
            means = [column[answers.concept == k].mean() for k in range(len(letters))]
            numbers = " and ".join(significant(float(mean)) for mean in means)
            assert numbers in told["How it answers to each concept"]
        for label in set(answers.label.tolist()):
            means = [column[answers.label == label].mean() for column in columns]
            numbers = " and ".join(significant(float(mean)) for mean in means)
            assert numbers in told["Class by class"]
        for k, concept in enumerate(part.concepts):
            images = np.isin(records.label.numpy(), concept)
            pooled = records.pooled[images, 0].double()
            rows = (part.weight, part.rows[k])
            full, kept = ((pooled * row).mean(0).view(8, 9).sum(1) for row in rows)
            first = int(full.abs().argmax())
            assert (
                f"{first} with {significant(float(full[first]), 2)}, of which "
                f"{significant(float(kept[first]), 2)} kept"
            ) in told["Where each concept comes from"]
            share = float(part.masks[k].double().mean())
            assert f"{share:.0%}" in told["What each concept channel keeps"]


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    return run.report(tmp_path_factory.mktemp("words") / "report.html")


def test_charts_say_what_they_show(page: str, run: Run) -> None:  # noqa: F811
    assert_spoken(page, run)
    labels = [svg.attributes["aria-label"] for svg in read(page).all("svg", "chart")]
    assert len(set(labels)) == len(labels)


def test_the_checker_sees_words_of_another_channel(page: str, run: Run) -> None:  # noqa: F811
    first, second = (part.channel for part in run.split.channels[:2])
    swapped = page.replace(f"Channel {first}: densities", f"Channel {second}: densities")
    with pytest.raises(AssertionError):
        assert_spoken(swapped, run)
    answers = run.evaluation.responses[first]
    shifted = replace(answers, concepts=answers.concepts + 100)
    responses = {**run.evaluation.responses, first: shifted}
    with pytest.raises(AssertionError):
        assert_spoken(page, replace(run, evaluation=replace(run.evaluation, responses=responses)))


def test_axes_have_units(page: str) -> None:
    def labels(chart: Element) -> str:
        return " ".join(text.text for text in chart.all("text", "label"))

    for section in sections(page).values():
        charts = section.all("svg", "chart")
        assert len(charts) >= 5
        for chart in charts:
            kept = "weights kept" in chart.text
            assert "summed pre-activation" in labels(chart) or kept
        plots = section.all("div", "plots")[0].all("svg", "chart")
        assert all(labels(plot).count("summed pre-activation") == 2 for plot in plots)


# --- notes ----------------------------------------------------------------------------------------


def test_notes_and_hints_are_bounded_text(run: Run, tmp_path: Path) -> None:  # noqa: F811
    harm = "<script>x</script>\u2069\u202e" + 100_000 * "y"
    found = replace(run.found, note=harm)
    page = run.report(tmp_path / "note.html", found=found)
    none = replace(unbraid.find(run.train_scan, gamma=-1.0), hint=harm)
    empty = run.report(tmp_path / "hint.html", found=none, split=None, evaluation=None)
    for text in (page, empty):
        assert_harmless(text)
        assert 1900 * "y" in text
        assert 2001 * "y" not in text
        assert "\u2069\u202e" not in text
        shown = [bdi.text for bdi in read(text).all("bdi")]
        assert any(words.startswith("<script>x</script>\ufffd\u202e") for words in shown)


def test_how_well_it_was_solved_is_no_news_for_readers(run: Run, tmp_path: Path) -> None:  # noqa: F811
    parts = tuple(
        replace(part, info={"lambda": 0.031622, "kkt_residual": 1e-13, "<b>": 300 * "x"})
        for part in run.split.channels
    )
    page = run.report(tmp_path / "r.html", split=replace(run.split, channels=parts))
    assert_harmless(page)
    for section in sections(page).values():
        words = section.all("p", "info")[0].text
        assert "lambda 0.03162" in words
        assert "kkt" not in words
        assert f"<b> {199 * 'x'}…" in words


def test_what_a_grey_line_means_is_said_where_there_is_one(run: Run, tmp_path: Path) -> None:  # noqa: F811
    told = "A grey line marks a class of no concept"
    for channel, section in sections(run.report(tmp_path / "r.html")).items():
        grey = bool(section.all("li", "other"))
        assert (told in section.text) == grey, channel
        assert ("of classes of no concept" in section.text) == grey
    one = {run.split.channels[0].channel: [[0], [1]]}
    found = unbraid.find(run.train_scan, channels=one)
    split = unbraid.split(run.train_scan, found, method="published", rho=0.7)
    page = run.report(tmp_path / "s.html", found=found, split=split, evaluation=None)
    (section,) = sections(page).values()
    assert section.all("li", "other")
    assert told in section.text
