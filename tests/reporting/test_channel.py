"""What is shown of a channel is what the responses, relevances and masks say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde

import unbraid
from pages import BROKEN, Run, assert_harmless, read, sections, shots
from unbraid import Split
from unbraid.measuring.reference_images import reference_images
from unbraid.measuring.results import Responses
from unbraid.reporting import channel as channel_module
from unbraid.reporting.channel import (
    N_POINTS,
    ConceptView,
    by_class,
    concept_views,
    densities,
    density,
    first_images,
    ridges,
    scatter,
    shared_grid,
)
from unbraid.reporting.words import significant


@pytest.fixture(scope="module")
def responses(run: Run) -> Responses:
    return run.evaluation.responses[run.split.channels[0].channel]


@pytest.fixture(scope="module")
def views(run: Run) -> tuple[ConceptView, ...]:
    return concept_views(run.found, run.split.channels[0].concepts)


# --- reference images -----------------------------------------------------------------------------


def responses_to_all(run: Run, channel: int) -> torch.Tensor:
    """The original channel's summed pre-activation on every image; the broken one last."""
    with torch.no_grad():
        z = run.network[:3](run.images.x)[:, channel].double().sum((1, 2))
    z[BROKEN] = -torch.inf
    return z


def best_of(run: Run, z: torch.Tensor, labels: Sequence[int]) -> tuple[int, int]:
    """The strongest image of some classes, and its rank among all."""
    own = [i for i, t in enumerate(run.images.targets) if t in labels and i != BROKEN]
    best = max(own, key=lambda i: float(z[i]))
    return best, 1 + sum(float(other) > float(z[best]) for other in z)


@pytest.fixture(scope="module")
def lopsided(run: Run) -> tuple[Split, int]:
    """A split channel that one concept fills the eight top images of: each class is a concept."""
    for channel in range(6):
        z = responses_to_all(run, channel)
        labels = [run.images.targets[i] for i in z.argsort(descending=True)[:8]]
        if len(set(labels)) == 1:
            concepts = [[labels[0]], [(labels[0] + 1) % 4]]
            found = unbraid.find(run.train_scan, channels={channel: concepts})
            return unbraid.split(run.train_scan, found, method="published", rho=0.7), channel
    raise AssertionError("the fixture must have a channel that one class fills the top of")


def assert_first(page: str, run: Run, split: Split, channel: int) -> None:
    """The row ends with the missing concept's first image; hint and caption tell its rank."""
    z = responses_to_all(run, channel)
    best, rank = best_of(run, z, split[channel].concepts[1])
    section = sections(page)[channel]
    row = section.all("ol", "shots")[0]
    assert len(row.all("li")) == 8
    (last,) = row.all("li", "first")
    assert last is row.all("li")[-1]
    assert re.search(r"image (\d+)", shots(last)[0].attributes["alt"])[1] == str(best)
    told = f"B comes first at rank {rank:,} of {len(run.images) - 1} images"
    assert told in section.all("div", "row")[0].text
    caption = last.all("span", "activation")[0].text
    assert caption == f"{significant(float(z[best]))}, rank {rank:,}"
    assert "7 of A" in section.all("span", "tally")[0].text


def test_reference_rows_end_with_the_first_image_of_a_missing_concept(
    run: Run, lopsided: tuple[Split, int], tmp_path: Path
) -> None:
    split, channel = lopsided
    concepts = [list(classes) for classes in split[channel].concepts]
    found = unbraid.find(run.train_scan, channels={channel: concepts})
    page = run.report(tmp_path / "r.html", found=found, split=split, evaluation=None)
    assert_harmless(page)
    assert_first(page, run, split, channel)
    rank = re.search(r"comes first at rank ([\d,]+)", read(page).text)
    assert rank
    with pytest.raises(AssertionError):
        assert_first(page.replace(f"at rank {rank[1]}", "at rank 2"), run, split, channel)


def test_reference_rows_with_all_concepts_have_no_more(page: str) -> None:
    for section in sections(page).values():
        original = section.all("div", "row")[0]
        told = re.findall(r" (\d+) of [A-Z]", original.all("h4")[0].text)
        missing = len(section.all("div", "row")) - 1 - len(told)
        assert len(original.all("li", "first")) == missing
        assert ("comes first at" in original.text) == bool(missing)


def test_first_images_have_ranks_among_all_images(run: Run) -> None:
    wanted = {part.channel: set(range(len(part.concepts))) for part in run.split.channels}
    first = first_images(run.scan, run.split, wanted)
    assert set(first) == {(channel, k) for channel, ks in wanted.items() for k in ks}
    for (channel, k), one in first.items():
        z = responses_to_all(run, channel)
        best, rank = best_of(run, z, run.split[channel].concepts[k])
        assert (one.index, one.label, one.rank) == (best, run.images.targets[best], rank)
        assert one.activation == pytest.approx(float(z[best]), rel=1e-4, abs=1e-4)
    assert first_images(run.scan, run.split, {}) == {}


def test_reference_images_are_those_of_brute_force(run: Run) -> None:
    kept = [n for n in range(len(run.images)) if n != BROKEN]
    layer = run.network[2]
    with torch.no_grad():
        x = run.network[:2](run.images.x[kept])
        for channel, top in reference_images(run.scan, run.split, n=7).items():
            part = run.split[channel]
            rows = [(part.weight, top.original), *zip(part.rows, top.concepts, strict=True)]
            for row, images in rows:
                weight = row.view(1, *layer.weight.shape[1:])
                z = F.conv2d(x, weight, layer.bias[[channel]], stride=2, padding=1).sum((1, 2, 3))
                best = z.argsort(descending=True)[:7]
                assert images.index.tolist() == [kept[n] for n in best]
                assert images.label.tolist() == [run.images.targets[kept[n]] for n in best]
                torch.testing.assert_close(images.activation.float(), z[best], rtol=1e-4, atol=1e-4)


def test_reference_images_do_not_depend_on_shards(run: Run, tmp_path: Path) -> None:
    one = unbraid.scan(run.network, "2", run.images, tmp_path / "one", skip_broken=True)
    assert one.manifest.n_shards == 1
    assert run.scan.manifest.n_shards > 1
    for n in (1, 60, 1000):
        here, there = (reference_images(scan, run.split, n=n) for scan in (one, run.scan))
        for channel in here:
            pair = [(r[channel].original, *r[channel].concepts) for r in (here, there)]
            for a, b in zip(*pair, strict=True):
                assert len(a.index) == min(n, 149)
                assert a.index.tolist() == b.index.tolist()


# --- densities ------------------------------------------------------------------------------------


def assert_ends_at_zero(curves: Sequence[np.ndarray]) -> None:
    assert len(curves)
    for heights in curves:
        assert heights.max() == 1
        assert max(heights[0], heights[-1]) < 0.004  # a fifth of a unit in the page's charts


@pytest.mark.parametrize("n", [81, 121, 241])
def test_shared_grid_of_any_groups_ends_at_zero(n: int) -> None:
    rng = np.random.default_rng(n)
    for _ in range(50):
        sizes = rng.integers(1, 6, size=4)
        groups = [rng.normal(rng.normal(0, 9), rng.exponential(5), size) for size in sizes]
        groups.append(np.full(4, rng.normal()))  # a spike
        grid = shared_grid(groups, n)
        assert len(grid) == n
        assert_ends_at_zero([density(values, grid) for values in groups])


def assert_kernel_density(heights: np.ndarray, values: np.ndarray, grid: np.ndarray) -> None:
    """A curve is scipy's, but where that is too narrow to be seen."""
    if values.std(ddof=1) * len(values) ** -0.2 >= grid[1] - grid[0]:
        expected = gaussian_kde(values)(grid)
        np.testing.assert_allclose(heights, expected / expected.max(), atol=1e-12)


def test_densities_and_ridges_are_scipys(
    run: Run, views: tuple[ConceptView, ...], responses: Responses
) -> None:
    columns = [z.double().numpy() for z in (responses.original, *responses.concepts.T)]
    curves = densities(responses)
    for row, z in enumerate(columns):
        for k in range(len(views)):
            own = z[responses.concept.numpy() == k]
            assert_kernel_density(curves.heights[row, k], own, curves.grid)
            assert curves.means[row, k] == own.mean()
    classes = by_class(run.found, views, responses)
    data = ridges(classes, responses)
    assert len(data.classes) == len(classes)
    for one, heights in zip(data.classes, data.curves.heights, strict=True):
        for curve, z in zip(heights, columns, strict=True):
            assert_kernel_density(curve, z[one.images], data.curves.grid)


# --- single classes -------------------------------------------------------------------------------


def test_by_class_sorts_all_images_by_concept_and_class(
    run: Run, views: tuple[ConceptView, ...], responses: Responses
) -> None:
    classes = by_class(run.found, views, responses)
    assert sorted(np.concatenate([c.images for c in classes]).tolist()) == list(
        range(len(responses.label))
    )
    keys = []
    for one in classes:
        images = one.images.tolist()
        (key,) = {(int(responses.concept[i]), int(responses.label[i])) for i in images}
        assert (one.concept, one.name) == (views[key[0]], run.found.name(key[1]))
        keys.append(key)
    assert len(set(keys)) == len(keys)
    assert [concept for concept, _ in keys] == sorted(concept for concept, _ in keys)


def test_ridges_have_only_a_few_classes_of_each_concept(
    run: Run,
    views: tuple[ConceptView, ...],
    responses: Responses,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "N_CLASSES", len(views))
    mixed = replace(responses, label=torch.arange(len(responses.label)) % 5)
    data = ridges(by_class(run.found, views, mixed), mixed)
    assert [one.concept for one in data.classes] == list(views)


def test_scatter_has_points_of_images(
    run: Run, views: tuple[ConceptView, ...], responses: Responses
) -> None:
    data = scatter(by_class(run.found, views, responses), responses)
    assert sum(map(len, data.points)) <= N_POINTS + len(data.classes)
    known = responses.concepts.double().numpy()
    for one, points in zip(data.classes, data.points, strict=True):
        own = {tuple(row) for row in known[one.images].tolist()}
        assert {tuple(point) for point in points.tolist()} <= own


# --- relevance and effects ------------------------------------------------------------------------


def test_bars_are_relevances_of_training_images(page: str, run: Run) -> None:
    (records,) = run.train_scan.shards()
    for part in run.split.channels:
        titles = {title.text for title in sections(page)[part.channel].all("title")}
        for k, (row, concept) in enumerate(zip(part.rows, part.concepts, strict=True)):
            pooled = records.pooled[torch.isin(records.label, torch.tensor(concept)), 0].double()
            full, kept = ((pooled * r).mean(0).view(8, 9).sum(1) for r in (part.weight, row))
            expected = {
                f"input channel {i}, concept {'ABCD'[k]}: {significant(float(full[i]))} in the "
                f"original channel, {significant(float(kept[i]))} in concept channel {'ABCD'[k]}"
                for i in range(8)
            }
            assert expected <= titles
