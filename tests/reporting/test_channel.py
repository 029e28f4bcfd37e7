"""What is shown of a channel is what the responses, relevances and masks say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde

import unbraid
from pages import BROKEN, sections, shots
from unbraid.measuring.reference_images import reference_images
from unbraid.reporting import channel as channel_module
from unbraid.reporting.words import ordinal, significant


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
