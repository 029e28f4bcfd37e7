"""What is shown of a channel is what the responses, relevances and masks say."""

import re
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde

import unbraid
from pages import BROKEN, read, sections, shots
from unbraid.measuring.reference_images import reference_images
from unbraid.measuring.results import Responses
from unbraid.reporting import channel as channel_module
from unbraid.reporting import charts
from unbraid.reporting.channel import Bars, ConceptView, by_class, concept_views
from unbraid.reporting.words import isolate, ordinal, significant

VIEWS = [ConceptView(name, k, (name,), (name,), "") for k, name in enumerate("ABC")]


def test_rows_end_with_the_first_image_of_a_concept_that_is_missing(run, write):
    targets = run.images.targets
    z = run.network[:3](run.images.x).detach().double().sum((2, 3))
    z[BROKEN] = -torch.inf
    for channel in range(6):
        order = z[:, channel].argsort(descending=True).tolist()
        label, *others = {targets[i] for i in order[:8]}
        if not others:  # one class fills the row
            break
    found = unbraid.find(run.train_scan, channels={channel: [[label], [(label + 1) % 4]]})
    split = unbraid.split(run.train_scan, found, method="published", rho=0.7)
    best = next(i for i in order if targets[i] in split[channel].concepts[1])
    rank, value = 1 + order.index(best), float(z[best, channel])
    section = sections(write(found=found, split=split, evaluation=None))[channel]
    (last,) = section.all("li", "first")
    assert section.all("ol", "shots")[0].all("li")[7:] == [last]
    assert shots(last)[0].attributes["alt"].endswith(f"image {best}\u2069")
    assert last.all("span", "activation")[0].text == f"{significant(value)}, {ordinal(rank)}"
    row = section.all("div", "row")[0].text
    assert f"B comes first at {ordinal(rank)} of {len(run.images) - 1} images" in row
    (first,) = channel_module.first_images(run.scan, split, {channel: {1}})[channel].values()
    assert first == pytest.approx((best, targets[best], value, rank), rel=1e-4)


def test_reference_images_are_those_of_brute_force_however_sharded(run, tmp_path):
    one = unbraid.scan(run.network, "2", run.images, tmp_path / "one", skip_broken=True)
    assert one.manifest.n_shards == 1 < run.scan.manifest.n_shards
    layer = run.network[2]
    x = run.network[:2](run.images.x)
    for n in (1, 7, 1000):
        here, there = (reference_images(scan, run.split, n=n) for scan in (one, run.scan))
        for part in run.split.channels:
            tops = [(t[part.channel].original, *t[part.channel].concepts) for t in (here, there)]
            for row, mine, others in zip((part.weight, *part.rows), *tops, strict=True):
                weight = row.view(1, *layer.weight.shape[1:])
                z = F.conv2d(x, weight, layer.bias[[part.channel]], 2, 1).sum((1, 2, 3)).detach()
                z[BROKEN] = -torch.inf
                best = z.argsort(descending=True)[: min(n, 149)].tolist()
                assert mine.index.tolist() == others.index.tolist() == best
                assert mine.label.tolist() == [run.images.targets[i] for i in best]
                torch.testing.assert_close(mine.activation.float(), z[best], rtol=1e-4, atol=1e-4)


def test_curves_and_points_are_those_of_all_images_by_concept_and_class(run, monkeypatch):
    part, found = run.split.channels[0], run.found
    responses = run.evaluation.responses[part.channel]
    views = channel_module.concept_views(found, part.concepts)
    columns = [z.double().numpy() for z in (responses.original, *responses.concepts.T)]
    classes = channel_module.by_class(found, views, responses)
    every = np.concatenate([one.images for one in classes])
    assert sorted(every.tolist()) == list(range(len(responses.label)))
    for one in classes:
        assert {found.name(label) for label in responses.label[one.images].tolist()} == {one.name}
        assert {views[k] for k in responses.concept[one.images].tolist()} == {one.concept}
    data = channel_module.ridges(classes, responses)
    assert len(data.classes) == len(classes)
    for one, heights in zip(data.classes, data.curves.heights, strict=True):
        for curve, z in zip(heights, columns, strict=True):
            expected = gaussian_kde(z[one.images])(data.curves.grid)
            np.testing.assert_allclose(curve, expected / expected.max(), atol=1e-12)
    points = channel_module.scatter(classes, responses).points
    assert sum(map(len, points)) <= channel_module.N_POINTS + len(classes)
    for one, some in zip(classes, points, strict=True):
        own = responses.concepts.double()[one.images].tolist()
        assert all(point in own for point in some.tolist())
    monkeypatch.setattr(channel_module, "N_CLASSES", len(views))
    mixed = replace(responses, label=torch.arange(len(responses.label)) % 5)
    few = channel_module.ridges(channel_module.by_class(found, views, mixed), mixed)
    assert [one.concept for one in few.classes] == list(views)


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
    curves = charts.draw_densities(channel_module.densities(responses), views, 7)
    assert len(read(curves).all("path", "curve")) == 20
    points = charts.draw_scatter(channel_module.scatter(classes, responses), views, 7)
    rows = charts.draw_ridges(channel_module.ridges(classes, responses), views, 7)
    for drawn in (curves, points, rows):
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
    curves, rows = channel_module.densities(responses), channel_module.ridges(classes, responses)
    drawn = read(charts.draw_densities(curves, views, 7)).all("path", "curve")
    assert len(drawn) == curves.heights[..., 0].size
    with_rest = channel_module.densities(responses, rest=True)
    left = (responses.original - responses.concepts.sum(1)).double().numpy()  # by the concepts
    means = [left[responses.concept.numpy() == k].mean() for k in range(len(views))]
    np.testing.assert_allclose(with_rest.means[-1], means, atol=1e-4)
    assert np.abs(with_rest.means[-1]).min() > 1e-2
    chart = read(charts.draw_densities(with_rest, views, 7))
    assert len(chart.all("path", "curve")) == len(drawn) + len(views)
    assert [one.text for one in chart.all("text", "title")][-1].startswith("The rest")
    said = "; the rest " + " and ".join(map(significant, with_rest.means[-1]))
    assert said in chart.all("svg")[0].attributes["aria-label"]
    for element in drawn:
        xs, ys = points_of(element.attributes["d"]).T
        assert np.ptp(ys) == pytest.approx(46, abs=0.11)
        assert (np.diff(xs)[1:-1] > 0).all()
        assert ys[0] == pytest.approx(ys[-1], abs=0.11)
    chart = read(charts.draw_ridges(rows, views, 7))
    assert len(chart.all("path", "outline")) == len(rows.classes)
    assert len(chart.all("path", "curve")) == len(rows.classes) * len(views)
    data = channel_module.scatter(classes, responses)
    dots = read(charts.draw_scatter(data, views, 7))
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
    drawn = read(charts.draw_masks(kept, VIEWS, 7))
    assert_masks(drawn, by_owner(kept))
    with pytest.raises(AssertionError):
        assert_masks(drawn, by_owner(1 - kept))
    drawn = read(charts.draw_masks(wide, VIEWS, 7))
    assert_masks(drawn, by_owner(wide).reshape(3, 220, 4).mean(2))
    averages = re.findall(r"\) (\d+%)", drawn.all("svg")[0].attributes["aria-label"])
    assert averages == [f"{share:.0%}" for share in wide.mean(1)]


@pytest.mark.parametrize("n", [2, 3])
def test_bars_are_as_long_as_relevances_mirrored_or_below_each_other(n):
    relevance = np.random.default_rng(n).normal(size=(n, 5))
    relevance[0, 0] = 0.0  # no bar
    kept = relevance / 2
    drawn = read(charts.draw_bars(Bars(range(5), relevance, kept), VIEWS[:n], 7))
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


def test_densities_are_of_no_more_values_than_the_bound(run, monkeypatch):
    part, estimate, sizes = run.split.channels[0], channel_module.density, []
    monkeypatch.setattr(channel_module, "_MAX_VALUES", 10)
    monkeypatch.setattr(
        channel_module, "density", lambda x, grid: sizes.append(len(x)) or estimate(x, grid)
    )
    channel_module.densities(run.evaluation.responses[part.channel])
    assert 10 <= max(sizes) < 2 * 10
