"""Charts show their data, and say it in words."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

import unbraid
from pages import read, sections
from unbraid.measuring.results import Responses
from unbraid.reporting.channel import (
    Bars,
    ConceptView,
    by_class,
    concept_views,
    densities,
    ridges,
    scatter,
)
from unbraid.reporting.charts import (
    draw_bars,
    draw_densities,
    draw_masks,
    draw_ridges,
    draw_scatter,
)
from unbraid.reporting.words import isolate, significant

VIEWS = [ConceptView(name, k, (name,), (name,), "") for k, name in enumerate("ABC")]


def points_of(line):
    """The points of a line, each written from the one before, or of single dots."""
    figures = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", line.replace("h0", " "))
    points = np.array(figures, dtype=float).reshape(-1, 2)
    return points.cumsum(0) if "l" in line else points


@pytest.mark.parametrize("values", [[0.0] * 4, [1e-30, 0, 0, 0], [-1e12, 0, 1, 1e12]])
def test_any_responses_can_be_drawn(values, run):
    z = torch.tensor(values, dtype=torch.float64)
    views = concept_views(run.found, [[0], [1], [2], [3]])
    each = torch.arange(4)
    responses = Responses(each, each, z, z, torch.stack([z, -z, 0 * z, z], 1), z, None)
    classes = by_class(run.found, views, responses)
    curves = draw_densities(densities(responses), views, 7)
    assert len(read(curves).all("path", "curve")) == 20
    points = draw_scatter(scatter(classes, responses), views, 7)
    for drawn in (curves, points, draw_ridges(ridges(classes, responses), views, 7)):
        read(drawn)
        assert not re.search(r"\b(nan|inf)\b", drawn)


def assert_scatter(drawn, data):
    """Every point lies where its image's responses are, on one scale for both axes."""
    clouds, n = drawn.all("path", "dots"), len(data.classes)
    all_axes = list(combinations(range(data.points[0].shape[1]), 2))
    assert len(clouds) == len(all_axes) * n
    for a, axes in enumerate(all_axes):
        spots = [points_of(one.attributes["d"]) for one in clouds[a * n : (a + 1) * n]]
        assert list(map(len, spots)) == list(map(len, data.points))
        x, y = np.concatenate(spots).T
        z1, z2 = np.concatenate(data.points)[:, axes].T
        (slope, offset), (slope2, offset2) = np.polyfit(z1, x, 1), np.polyfit(z2, y, 1)
        assert slope > 0
        assert slope2 == pytest.approx(-slope, rel=0.02)
        assert np.abs(slope * z1 + offset - x).max() < 0.11
        assert np.abs(slope2 * z2 + offset2 - y).max() < 0.11


def test_charts_follow_their_data(run):
    part = run.split.channels[0]
    responses = run.evaluation.responses[part.channel]
    views = concept_views(run.found, part.concepts)
    classes = by_class(run.found, views, responses)
    curves, rows = densities(responses), ridges(classes, responses)
    drawn = read(draw_densities(curves, views, 7)).all("path", "curve")
    assert len(drawn) == curves.heights[..., 0].size
    for element in drawn:
        xs, ys = points_of(element.attributes["d"]).T
        assert np.ptp(ys) == pytest.approx(46, abs=0.11)
        assert (np.diff(xs)[1:-1] > 0).all()
        assert ys[0] == pytest.approx(ys[-1], abs=0.11)
    chart = read(draw_ridges(rows, views, 7))
    assert len(chart.all("path", "outline")) == len(rows.classes)
    assert len(chart.all("path", "curve")) == len(rows.classes) * len(views)
    data = scatter(classes, responses)
    dots = read(draw_scatter(data, views, 7))
    assert_scatter(dots, data)
    for wrong in (data.points[::-1], [points[:, ::-1] for points in data.points]):
        with pytest.raises((AssertionError, ValueError)):
            assert_scatter(dots, data._replace(points=wrong))


def assert_masks(drawn, kept):
    """Steps are as high as what is kept of each input channel."""
    heights = []
    for element in drawn.all("path", "kept"):
        base, *steps = re.findall(r"[,V](-?[\d.]+)", element.attributes["d"])[:-1]
        heights.append([(float(base) - float(step)) / 30 for step in steps])
    np.testing.assert_allclose(heights, kept, atol=0.002)


def by_owner(kept):
    """Put input channels in the order of the concept that keeps most, and of how much."""
    return kept[
        :, sorted(range(kept.shape[1]), key=lambda i: (kept[:, i].argmax(), -max(kept[:, i])))
    ]


def test_masks_are_drawn_as_they_are_and_many_input_channels_averaged():
    kept, wide = (np.random.default_rng(0).random((3, n)) for n in (8, 880))  # four to a step
    drawn = read(draw_masks(kept, VIEWS, 7))
    assert_masks(drawn, by_owner(kept))
    with pytest.raises(AssertionError):
        assert_masks(drawn, by_owner(1 - kept))
    drawn = read(draw_masks(wide, VIEWS, 7))
    assert_masks(drawn, by_owner(wide).reshape(3, 220, 4).mean(2))
    averages = re.findall(r"\) (\d+%)", drawn.all("svg")[0].attributes["aria-label"])
    assert averages == [f"{share:.0%}" for share in wide.mean(1)]


@pytest.mark.parametrize("n", [2, 3])
def test_bars_are_as_long_as_relevances_mirrored_or_below_each_other(n):
    relevance = np.random.default_rng(n).normal(size=(n, 5))
    relevance[0, 0] = 0.0  # no bar
    kept = relevance / 2
    drawn = read(draw_bars(Bars(range(5), relevance, kept), VIEWS[:n], 7))
    signs = [-1, 1] if n == 2 else [1] * n
    starts = {
        float(re.match(r"M([\d.]+)", a.attributes["d"])[1]) for a in drawn.all("path", "axis")
    }
    assert len(starts) == len(set(signs))
    longest = max(float(bar.attributes["width"]) for bar in drawn.all("rect"))
    scale = longest / abs(relevance).max()
    for k, sign in enumerate(signs):
        start = min(starts) if sign < 0 or n > 2 else max(starts)
        for kind, values in (("full", relevance), ("kept", kept)):
            bars = [
                b for b in drawn.all("rect", kind) if b.attributes["class"].split()[1] == f"k{k}"
            ]
            x, width = (np.array([float(b.attributes[a]) for b in bars]) for a in ("x", "width"))
            shown = values[k][values[k] != 0]
            np.testing.assert_allclose(width, abs(shown) * scale, atol=0.11)
            np.testing.assert_allclose(x + width * (sign < 0), start, atol=0.11)
            hollow = ["against" in bar.attributes["class"] for bar in bars]
            assert hollow == (shown < 0).tolist()


def numbers_in(root):
    """What the tiles of thresholds tell a pointer and show, the one outlined, and the table."""
    tiles = [tile for tile in root.all("g") if tile.all("rect", "tile")]
    pattern = r"tau (\S+), p (\S+), gamma (\S+): ([\d,]+) channels?, ([\d,]+) pairs?"
    words = [re.fullmatch(pattern, tile.all("title")[0].text).groups() for tile in tiles]
    numbers = [tuple(float(n.replace(",", "")) for n in one) for one in words]
    for tile, (*_, n, n_pairs) in zip(tiles, numbers, strict=True):
        assert [t.text for t in tile.all("text")] == [
            f"{n:.0f}",
            *([f"{n_pairs:.0f}"] if n_pairs else []),
        ]
    outlined = [n for n, tile in zip(numbers, tiles, strict=True) if tile.all("rect", "chosen")]
    table = root.all("details", "aside")[0].all("td", "figure")
    return numbers, outlined, [cell.text for cell in table]


@pytest.mark.parametrize("p", [0.5, 0.33])
def test_other_thresholds_are_tiles_shaded_by_their_channels_and_a_table(run, write, p):
    found = unbraid.find(run.train_scan, p=p, gamma=0.9)
    counted = unbraid.sensitivity(run.train_scan, gammas=[0.5, 0.8, 0.9, 0.99])
    page = write(found=found, split=None, evaluation=None, sensitivity=counted)
    (section,) = (s for s in read(page).all("section") if s.all("div", "maps"))
    numbers, outlined, table = numbers_in(section)
    assert sorted(numbers) == sorted(map(tuple, counted.rows()))
    assert outlined == [n for n in numbers if n[:3] == (found.tau, p, 0.9)]
    assert len(outlined) == (p in counted.ps) == ("outlined" in section.text)
    told = [
        f"{n:.0f} channel{'s' * (n != 1)}, {m:.0f} pair{'s' * (m != 1)}" for *_, n, m in numbers
    ]
    assert table == told
    shades = {}
    for (*_, n, _), rect in zip(numbers, section.all("rect", "tile"), strict=True):
        assert ("some" in rect.attributes["class"]) == (n > 0)
        shades.setdefault(n, set()).add(float(rect.attributes["fill-opacity"]))
    ordered = [shades[n] for n in sorted(shades) if n]
    assert len(ordered) > 1
    assert ordered == [{shade} for shade in sorted(set.union(*ordered))]


def assert_spoken(page, run):
    """Every chart names its channel and concepts and has its main numbers."""

    def in_words(values):
        return " and ".join(significant(float(value)) for value in values)

    (records,) = run.train_scan.shards()
    for part in run.split.channels:
        section = sections(page)[part.channel]
        told = {}
        for figure in section.all("figure"):
            for chart in figure.all("svg", "chart"):
                heading = figure.all("h3")[0].text
                told[heading] = told.get(heading, "") + chart.attributes["aria-label"]
        assert len(told) == 5
        names = [run.found.name(label) for concept in part.concepts for label in concept]
        for words in told.values():
            assert re.match(rf"Channel {part.channel}[:,]", words)
            assert all(isolate(name[:40]) in words for name in names)
        responses = run.evaluation.responses[part.channel]
        columns = [z.double() for z in (responses.original, *responses.concepts.T)]
        for z in columns:
            means = [z[responses.concept == k].mean() for k in range(len(part.concepts))]
            assert in_words(means) in told["How it answers to each concept"]
        for label in set(responses.label.tolist()):
            means = [z[responses.label == label].mean() for z in columns]
            assert in_words(means) in told["Class by class"]
        kept = part.masks.double().mean(1).tolist()
        shares = re.findall(r"\) (\d+%)", told["What each concept channel keeps"])
        assert shares == [f"{share:.0%}" for share in kept]
        titles = {title.text for title in section.all("title")}
        for name, row, concept in zip("ABCD", part.rows, part.concepts, strict=False):
            pooled = records.pooled[np.isin(records.label.numpy(), concept), 0].double()
            full, kept = ((pooled * r).mean(0).view(8, 9).sum(1) for r in (part.weight, row))
            assert titles >= {
                f"input channel {i}, concept {name}: {significant(float(full[i]))} in the original "
                f"channel, {significant(float(kept[i]))} in concept channel {name}"
                for i in range(8)
            }


def test_charts_say_what_they_show(page, run):
    assert_spoken(page, run)
    first, second = (part.channel for part in run.split.channels[:2])
    known = run.evaluation.responses[first]
    shifted = {**run.evaluation.responses, first: replace(known, concepts=known.concepts + 100)}
    wrong = replace(run, evaluation=replace(run.evaluation, responses=shifted))
    swapped = page.replace(f"Channel {first}: densities", f"Channel {second}: densities")
    for text, other in ((page, wrong), (swapped, run)):
        with pytest.raises(AssertionError):
            assert_spoken(text, other)
