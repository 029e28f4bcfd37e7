"""Semantic measures of split channels, against double loops over images run one by one."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import oracle
import unbraid
from checks import assert_close
from tiny_networks import PooledFeatures, SyntheticImages, WithBroken, build, stack
from unbraid import Semantics
from unbraid.base.errors import DataError, UsageError
from unbraid.measuring import semantics

N_TOP = 5


def encode(images):
    """Embeddings that know colours and, roughly, places."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def measure(case, **changed):
    arguments = {"split": case.split, "scan": case.scan, "dataset": case.images, "encoder": encode}
    return unbraid.measure_semantics(**{"n_top": N_TOP, **arguments, **changed})


def box_by_hand(answer):
    """The smallest box with every position of half the strongest answer, one position wider."""
    strongest = float(answer.max())
    if strongest <= 0:
        return semantics.WHOLE
    sides = []
    for axis, n in enumerate(answer.shape):
        strong = [i for i in range(n) if float(answer.select(axis, i).max()) >= strongest / 2]
        sides += [max(min(strong) - 1, 0) / n, min(max(strong) + 2, n) / n]
    return semantics.Box(*sides)


def crop_embedding(case, channel, row, image):
    shown, layer, x = case.images.images[image], case.truth.layer, case.truth.x[image]
    if case.scan.positions and isinstance(layer, nn.Conv2d):
        answer = oracle.channel_map(layer, channel, row, x)
        shown = semantics.cut_out(shown, box_by_hand(answer.reshape(layer(x[None]).shape[2:])))
    return encode(shown[None])[0]


def assert_semantics(result, case, n_top=N_TOP):
    truth, positions = case.truth, case.scan.positions
    embeddings = torch.stack([encode(x[None])[0] for x in case.images.images])
    assert list(result.channels) == [part.channel for part in case.split.channels]
    for part in case.split.channels:
        measured = result.channels[part.channel]
        assert measured.n_images == len(truth.x)
        assert measured.n_top == min(n_top, len(truth.x))
        assert measured.crops == (positions and isinstance(truth.layer, nn.Conv2d))
        assert (measured.positions, measured.encoder) == (positions, "encode")
        cut, owner = [], []
        likes = (measured.original, *measured.concepts)
        for k, (like, row) in enumerate(zip(likes, (part.weight, *part.rows), strict=True)):
            pooled = truth.pooled_response(part.channel, row)
            rectified = truth.pooled_response(part.channel, row, rectified=True)
            answer = rectified if positions else pooled.clamp(min=0)
            assert_close(like.monosemanticity, oracle.monosemanticity(answer, embeddings))
            top = sorted(range(len(pooled)), key=lambda n: (-float(pooled[n]), n))[:n_top]
            assert_close(like.clarity, oracle.clarity(embeddings[top]))
            if k:
                cut += [crop_embedding(case, part.channel, row, n) for n in top]
                owner += [k] * len(top)
        within, between = oracle.pure_distances(torch.stack(cut), owner)
        assert_close(measured.within, within, 1e-6)  # crops are resized in single precision
        assert_close(measured.between, between, 1e-6)


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    "kind", ["1x1", "3x3", "uneven", "groups", "one dimension", "tokens", "pooled features"]
)
def test_measure_semantics_any_layer_is_the_oracles(kind, positions, case_of):
    case = case_of(kind, positions=positions)
    assert_semantics(measure(case, batch_size=4), case)


def test_measure_semantics_over_several_shards_of_few_images_and_silent_channels(case, case_of):
    many = case_of("1x1", n_images=140)
    assert_semantics(measure(many, batch_size=50), many)
    assert_semantics(measure(case, n_top=100), case, 100)
    parts = [replace(p, masks=torch.zeros_like(p.masks), bias=-1e-6) for p in case.split.channels]
    result = measure(case, split=replace(case.split, channels=tuple(parts)))
    for one in result.channels.values():
        assert math.isfinite(one.original.monosemanticity)
        assert all(math.isnan(like.monosemanticity) for like in one.concepts)
        assert all(math.isfinite(like.clarity) for like in one.concepts)


def test_assert_semantics_fails_on_every_corruption(case):
    sound = measure(case)
    first = sound.channels[6]
    corrupted = [
        {"original": replace(first.original, monosemanticity=first.original.clarity)},
        {"concepts": (first.concepts[0], replace(first.concepts[1], clarity=0.1))},
        {"concepts": first.concepts[::-1]},
        {"within": first.between},
        {"n_images": 12, "n_top": 6},
        {"between": math.nan},
        *({"positions": False}, {"crops": False}, {"encoder": "another"}),
    ]
    wrongs = [Semantics({**sound.channels, 6: replace(first, **wrong)}) for wrong in corrupted]
    for wrong in (*wrongs, Semantics({6: first})):
        with pytest.raises(AssertionError):
            assert_semantics(wrong, case)
    rolled = SyntheticImages(13, seed=1)
    rolled.images = rolled.images.roll(1, 0)
    with pytest.raises(AssertionError):
        assert_semantics(measure(case, dataset=rolled), case)


def test_measure_semantics_tells_concept_channels_of_one_thing_each(tmp_path):
    """Of a channel that adds up what two inputs say, one each for red and for green images."""
    layer = nn.Conv2d(3, 2, 1, bias=False)
    parts = {"layer": layer, "act": nn.ReLU(), "pool": PooledFeatures(), "head": nn.Linear(2, 3)}
    network = stack(*parts.items()).double()
    network.layer.weight.data[..., 0, 0] = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    network.head.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    images = SyntheticImages(30, n_classes=3)
    images.images = torch.zeros(30, 3, 4, 4).double()
    images.images[range(30), images.targets] = 1 + 0.1 * torch.rand(30, 4, 4).double()
    scan = unbraid.scan(network, "layer", images, tmp_path)
    split = unbraid.split(scan, unbraid.find(scan, channels={0: [[0], [1]]}))
    (part,) = split.channels
    split = replace(split, channels=(replace(part, masks=torch.eye(2, 3).double()),))
    colours = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    one = unbraid.measure_semantics(split, scan, images, colours, n_top=8).channels[0]
    assert one.original.monosemanticity == pytest.approx(9 / 19, abs=0.01)  # pairs of one colour
    for like in one.concepts:
        assert [like.monosemanticity, like.clarity] == pytest.approx([1, 1], abs=1e-6)
    assert one.within < 0.1 < 1.3 < one.between


def test_measure_semantics_leaves_out_images_that_could_not_be_read(tmp_path, case_of, capsys):
    images = WithBroken(150, seed=1)
    images.broken = range(130)  # all of the first shard
    split, network, measured = case_of("1x1").split, case_of("1x1").network, []
    for dataset in (images, Subset(images, range(130, 150))):
        folder, options = tmp_path / str(len(dataset)), {"positions": True, "skip_broken": True}
        scan = unbraid.scan(network, "layer", dataset, folder, **options)
        options = {"n_top": N_TOP, "progress": True}
        measured.append(unbraid.measure_semantics(split, scan, dataset, encode, **options))
        assert "20 of 20" in capsys.readouterr().err
    assert {one.n_images for one in measured[0].channels.values()} == {20}
    assert repr(measured[0]) == repr(measured[1])


def test_measure_semantics_of_predicted_labels_needs_no_others(case_of, tmp_path):
    case, network = case_of("1x1"), build("1x1")
    with torch.no_grad():  # so that more than one class is predicted
        network.head.bias -= network(case.images.images).mean(0)
    scan = unbraid.scan(network, "layer", case.images, tmp_path, labels="predicted")
    seen = sorted(scan.labels_seen())
    split = unbraid.split(scan, unbraid.find(scan, channels={1: [seen[:1], seen[1:]]}))
    assert measure(case, scan=scan, split=split).channels[1].n_images == 13
    some = unbraid.scan(case.network, "layer", case.images, tmp_path / "some", classes=[0, 2])
    assert {one.n_images for one in measure(case, scan=some).channels.values()} == {7}


def some_images(n=23):
    """Activations (N, 4) and embeddings (N, 5) that lean to one side, as real ones do."""
    a = torch.randn(n, 4, dtype=torch.float64)
    return a, torch.randn(n, 5, dtype=torch.float64) + 0.5


def scores_of(activations, embeddings, sizes=1000):
    sums = semantics.MonosemanticitySums()
    for a, e in zip(activations.split(sizes), embeddings.split(sizes), strict=True):
        sums.add(a, e)
    return sums.scores()


def test_scores_of_images_in_any_parts_are_those_of_the_double_loop():
    for change in (
        lambda a: a,
        lambda a: a.clamp(min=0),
        lambda a: (a - 1.2).clamp(min=0),
        lambda a: a - 10,
        lambda a: 1e6 + 1e-3 * a,
        lambda a: a + 1e5 * (torch.arange(23) == 3)[:, None],
        lambda a: a - 1e5 * (torch.arange(23) == 0)[:, None],
        lambda a: a.float(),
    ):
        a, e = some_images()
        a = change(a)
        for sizes in ([23], [1] * 23, [7, 3, 13]):
            found = scores_of(a, e, sizes)
            assert found.dtype == torch.float64
            assert_close(found, [oracle.monosemanticity(one, e) for one in a.T])
            assert_close(
                scores_of(7 * a - 3, e * (0.1 + torch.rand(23, 1))), found, 1e-5
            )  # in any unit
            e[[2, 7, 8, 9]] = 0  # without a direction, also all of a part


@pytest.mark.parametrize("level", [0.0, 0.1, -300.0])
def test_scores_of_channels_without_a_pair_of_images_are_nan(level):
    """All the same, one above, rounded differently, and both."""
    same = torch.full((50,), level, dtype=torch.float64)
    rounded = same.clone()
    rounded[::2] = torch.nextafter(same[0], 2 * same[0])
    alone = 1.3 * (torch.arange(50) == 11)
    some, e = some_images(50)
    a = torch.stack([same, same + alone, rounded, rounded + 5 * alone], 1)
    assert scores_of(torch.cat([some, a], 1), e).isnan().tolist() == [False] * 4 + [True] * 4
    assert scores_of(some, torch.zeros_like(e)).isnan().all()
    assert scores_of(some[:1], e[:1]).isnan().all()


def test_clarity_leaves_out_images_without_direction_and_is_nan_of_one():
    for n in (2, 3, 20):
        e = some_images(n + 1)[1].float()
        e[-1] = 0
        assert_close(semantics.clarity(e), oracle.clarity(e))
        assert_close(semantics.clarity(e[:-1].double()), semantics.clarity(e))
    for few in (e[:1], e[-2:], e[:0]):
        assert math.isnan(semantics.clarity(few))


@pytest.mark.parametrize("concept", [[0, 0, 1, 1, 0, 2], [0, 1, 2, 3, 4, 5], [1] * 6])
def test_pure_distances_are_those_of_the_double_loop_and_nan_without_pairs(concept):
    e, concept = some_images(6)[1], torch.tensor(concept)
    found = semantics.pure_distances(e, concept)
    assert_close(found, oracle.pure_distances(e, concept))
    n_concepts = len(concept.unique())
    assert [math.isnan(one) for one in found] == [n_concepts == 6, n_concepts == 1]
    same = e[[0] * 40]  # more than cdist would take without rounding
    assert semantics.pure_distances(same, torch.arange(40) % 2) == (0.0, 0.0)


def test_answering_box_is_that_of_the_slow_way_and_cut_out_gives_it_in_the_images_size():
    for answer in torch.randn(30, 6, 5):
        assert semantics.answering_box(answer) == box_by_hand(answer)
    for answer in (torch.ones(1, 1), -torch.ones(3, 4), -torch.eye(5), torch.eye(5) - 1):
        assert semantics.answering_box(answer) == semantics.WHOLE  # no answer above zero, or one
    image = torch.zeros(3, 8, 6)
    image[:, 2:4, 3:6] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    crop = semantics.cut_out(image, semantics.Box(0.25, 0.5, 0.5, 1.0))
    assert_close(crop, torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 8, 6), 1e-6)
    assert_close(semantics.cut_out(image, semantics.WHOLE), image, 1e-6)
    one_pixel = semantics.Box(0.5, 0.5, 0.99, 1.0)
    assert semantics.cut_out(image, one_pixel).shape == image.shape
    assert semantics.cut_out(image.byte(), semantics.WHOLE).dtype == torch.uint8


def test_measure_semantics_what_does_not_fit_is_refused(case, case_of):
    for changed, error, told in (
        ({"encoder": "clip"}, UsageError, "'clip' names no encoder"),
        ({"dataset": WithBroken(13, seed=1)}, DataError, r"picture-3\.jpg"),
        ({"dataset": SyntheticImages(13, n_classes=3)}, UsageError, "not the one that was"),
    ):
        with pytest.raises(error, match=told):
            measure(case, **changed)
        with pytest.raises(UsageError, match="another network or layer"):
            measure(case_of("1x1"), split=case.split)
