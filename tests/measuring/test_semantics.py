"""Semantic measures of split channels, against double loops over images run one by one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

import oracle
import unbraid
from checks import Truth, assert_close, truth_of
from tiny_networks import SyntheticImages, build
from unbraid import Scan, Semantics, Split
from unbraid.base.errors import DataError, ModelError, RunError, UsageError
from unbraid.measuring.results import Likeness, read_semantics
from unbraid.measuring.semantics import (
    WHOLE,
    Box,
    Crops,
    MonosemanticitySums,
    answering_box,
    clarity,
    cut_out,
    pure_distances,
)

KINDS = ["1x1", "3x3", "uneven", "groups", "one dimension", "tokens", "pooled features"]
OWN = {1: [[0], [1]], 5: [[2, 0], [3]], 6: [[3], [0, 1], [2]]}
N_TOP = 5


def encode(images: Tensor) -> Tensor:
    """Embeddings that know colours and, roughly, places."""
    return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


@dataclass
class Case:
    split: Split
    scan: Scan
    images: SyntheticImages
    truth: Truth


def make_case(kind: str, folder: Path, n_images: int = 14, positions: bool = True) -> Case:
    network = build(kind)
    train = unbraid.scan(network, "layer", SyntheticImages(12), folder / "train")
    split = unbraid.split(train, unbraid.find(train, channels=OWN), method="published", rho=0.8)
    images = SyntheticImages(n_images, seed=1)
    scan = unbraid.scan(network, "layer", images, folder / "val", positions=positions, batch_size=6)
    return Case(split, scan, images, truth_of(network, images))


@pytest.fixture(scope="module", params=[(kind, p) for kind in KINDS for p in (True, False)])
def case(request, tmp_path_factory) -> Case:
    kind, positions = request.param
    return make_case(kind, tmp_path_factory.mktemp("case"), positions=positions)


@pytest.fixture(scope="module")
def one_case(tmp_path_factory) -> Case:
    return make_case("3x3", tmp_path_factory.mktemp("one"))


# --- the slow way ---------------------------------------------------------------------------------


def box_by_hand(answer: Tensor) -> Box:
    """The smallest box with every position of half the strongest answer, one position wider."""
    rows, columns = answer.shape
    strongest = max(float(value) for value in answer.flatten())
    if strongest <= 0:
        return WHOLE
    strong = [(y, x) for y in range(rows) for x in range(columns) if answer[y, x] >= strongest / 2]
    ys, xs = [y for y, _ in strong], [x for _, x in strong]
    return Box(
        max(min(ys) - 1, 0) / rows,
        min(max(ys) + 2, rows) / rows,
        max(min(xs) - 1, 0) / columns,
        min(max(xs) + 2, columns) / columns,
    )


def top_by_hand(pooled: Tensor, n: int) -> list[int]:
    return sorted(range(len(pooled)), key=lambda image: (-float(pooled[image]), image))[:n]


def crop_embedding(case: Case, channel: int, row: Tensor, image: int) -> Tensor:
    """Embedding of where the row answers; of the whole image where that is not known."""
    shown, layer, x = case.images.images[image], case.truth.layer, case.truth.x[image]
    if case.scan.positions and isinstance(layer, nn.Conv2d):
        answer = oracle.channel_map(layer, channel, row, x)
        shown = cut_out(shown, box_by_hand(answer.reshape(layer(x[None]).shape[2:])))
    return encode(shown[None])[0]


def assert_semantics(result: Semantics, case: Case, n_top: int) -> None:
    """Every figure is that of double loops over the network's own responses."""
    truth, positions = case.truth, case.scan.positions
    embeddings = torch.stack([encode(x[None])[0] for x in case.images.images])
    assert list(result.channels) == [part.channel for part in case.split.channels]
    for part in case.split.channels:
        measured = result.channels[part.channel]
        assert measured.n_images == len(truth.x)
        assert measured.n_top == min(n_top, len(truth.x))
        assert measured.positions == positions
        assert measured.crops == (positions and isinstance(truth.layer, nn.Conv2d))
        assert measured.encoder == "encode"
        cut, owner = [], []
        likes = (measured.original, *measured.concepts)
        for k, (like, row) in enumerate(zip(likes, (part.weight, *part.rows), strict=True)):
            pooled = truth.pooled_response(part.channel, row)
            rectified = truth.rectified_response(part.channel, row)
            answer = rectified if positions else pooled.clamp(min=0)
            assert_close(like.monosemanticity, oracle.monosemanticity(answer, embeddings))
            top = top_by_hand(pooled, n_top)
            assert_close(like.clarity, oracle.clarity(embeddings[top]))
            if k:
                cut += [crop_embedding(case, part.channel, row, n) for n in top]
                owner += [k] * len(top)
        within, between = oracle.pure_distances(torch.stack(cut), owner)
        assert_close(measured.within, within, 1e-6)  # crops are resized in single precision
        assert_close(measured.between, between, 1e-6)


def measure(case: Case, **changed: object) -> Semantics:
    arguments = {"split": case.split, "scan": case.scan, "dataset": case.images, "encoder": encode}
    return unbraid.measure_semantics(**{"n_top": N_TOP, **arguments, **changed})


# --- against the oracle ---------------------------------------------------------------------------


def test_all_measures_are_the_oracles(case):
    assert_semantics(measure(case, batch_size=4), case, N_TOP)


def test_a_data_set_smaller_than_the_number_of_top_images_is_all_top(one_case):
    result = measure(one_case, n_top=100)
    assert_semantics(result, one_case, 100)
    for one in result.channels.values():
        assert one.n_top == 14
        assert_close(
            [like.clarity for like in one.concepts], [one.original.clarity] * len(one.concepts)
        )


def test_measures_are_the_same_over_several_shards(tmp_path):
    case = make_case("1x1", tmp_path, n_images=140)
    assert case.scan.manifest.n_shards == 2
    assert_semantics(measure(case, batch_size=50), case, N_TOP)


def test_the_check_of_semantics_fails_on_every_corruption(one_case):
    sound = measure(one_case)
    assert_semantics(sound, one_case, N_TOP)
    first = sound.channels[5]

    def with_first(**changed: object) -> Semantics:
        return Semantics({**sound.channels, 5: replace(first, **changed)})

    other = replace(first.original, monosemanticity=first.original.monosemanticity + 1e-6)
    clearer = replace(first.concepts[1], clarity=first.concepts[1].clarity + 1e-6)
    corrupted = [
        with_first(original=other),
        with_first(concepts=(first.concepts[0], clearer)),
        with_first(concepts=first.concepts[::-1]),
        with_first(concepts=first.concepts[:1]),
        with_first(within=first.between, between=first.within),
        with_first(between=math.nan),
        with_first(n_images=13),
        with_first(n_top=6),
        with_first(positions=False),
        with_first(crops=False),
        with_first(encoder="another"),
        Semantics({5: first}),
        Semantics({**sound.channels, 5: sound.channels[1]}),
    ]
    for wrong in corrupted:
        with pytest.raises((AssertionError, ValueError)):
            assert_semantics(wrong, one_case, N_TOP)
    rolled = SyntheticImages(14, seed=1)
    rolled.images = rolled.images.roll(1, 0)
    with pytest.raises(AssertionError):
        assert_semantics(measure(one_case, dataset=rolled), one_case, N_TOP)


# --- what they tell -------------------------------------------------------------------------------


class TwoThings(nn.Module):
    """A layer whose one channel adds up what two inputs say: one each for two things."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])[..., None, None]
        self.head = nn.Linear(2, 3)
        self.head.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).relu().mean((2, 3)))


class Coloured(SyntheticImages):
    """Red, green and blue images."""

    def __init__(self) -> None:
        super().__init__(30, n_classes=3)
        self.images = torch.zeros(30, 3, 4, 4).double()
        self.images[range(30), self.targets] = 1 + 0.1 * torch.rand(30, 4, 4).double()


def test_concept_channels_of_a_channel_of_two_things_are_of_one_thing_each(tmp_path):
    network, images = TwoThings(), Coloured()
    scan = unbraid.scan(network, "layer", images, tmp_path)
    split = unbraid.split(scan, unbraid.find(scan, channels={0: [[0], [1]]}))
    measured = unbraid.measure_semantics(split, scan, images, lambda x: x.mean((2, 3)), n_top=8)
    one = measured.channels[0]
    assert one.original.monosemanticity == pytest.approx(9 / 19, abs=0.01)  # pairs of one colour
    for like in one.concepts:
        assert like.monosemanticity == pytest.approx(1, abs=1e-6)
        assert like.clarity == pytest.approx(1, abs=1e-6)
    assert one.within < 0.1 < 1.3 < one.between
    own = unbraid.measure_semantics(split, scan, images, unbraid.Penultimate(network))
    assert own.channels[0].encoder == "the network's own penultimate layer"
    assert network.training


def test_a_concept_channel_that_is_never_above_zero_has_no_score(one_case):
    parts = [
        replace(part, masks=torch.zeros_like(part.masks), bias=-1e-6)
        for part in one_case.split.channels
    ]
    result = measure(one_case, split=replace(one_case.split, channels=tuple(parts)))
    for one in result.channels.values():
        assert math.isfinite(one.original.monosemanticity)
        assert all(math.isnan(like.monosemanticity) for like in one.concepts)
        assert all(math.isfinite(like.clarity) for like in one.concepts)


class Broken(SyntheticImages):
    """Images of which those before a place cannot be read."""

    def __init__(self, n_images: int, place: int) -> None:
        super().__init__(n_images, seed=1)
        self.place = place

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index < self.place:
            raise OSError("truncated")
        return super().__getitem__(index)


@pytest.mark.parametrize(("n_images", "place"), [(14, 3), (150, 130)])
def test_images_that_could_not_be_read_take_no_part(tmp_path, n_images, place):
    """Not even where a whole shard has none that could."""
    images, kept = Broken(n_images, place), range(place, n_images)
    network, options = build("1x1"), {"positions": True, "skip_broken": True}
    scan = unbraid.scan(network, "layer", images, tmp_path / "a", **options)
    assert (len(next(iter(scan.shards()))) == 0) == (place > 128)
    split = make_case("1x1", tmp_path).split
    measured = unbraid.measure_semantics(split, scan, images, encode, n_top=N_TOP)
    readable = Subset(images, kept)
    whole = unbraid.scan(network, "layer", readable, tmp_path / "b", **options)
    expected = unbraid.measure_semantics(split, whole, readable, encode, n_top=N_TOP)
    assert {one.n_images for one in measured.channels.values()} == {n_images - place}
    assert repr(measured) == repr(expected)


def test_a_scan_of_some_classes_needs_only_their_images(tmp_path):
    case = make_case("1x1", tmp_path)
    some = unbraid.scan(build("1x1"), "layer", case.images, tmp_path / "some", classes=[0, 2])
    assert {one.n_images for one in measure(case, scan=some).channels.values()} == {7}


# --- kept with the measures -----------------------------------------------------------------------


def test_semantics_are_kept_in_evaluation_json_and_read_back(one_case, tmp_path):
    semantics = measure(one_case)
    unknown = replace(semantics.channels[5], between=math.nan, original=Likeness(math.nan, 0.5))
    semantics = Semantics({**semantics.channels, 5: unknown})
    evaluation = unbraid.evaluate(one_case.split, one_case.scan, semantics=semantics)
    path = tmp_path / "evaluation.json"
    evaluation.save(path)
    entries = {entry["channel"]: entry for entry in json.loads(path.read_text())["channels"]}
    assert set(entries[1]["semantics"]) == {
        *("encoder", "n_images", "n_top", "positions", "crops"),
        *("original", "concepts", "within", "between"),
    }
    assert entries[1]["semantics"]["concepts"][0]["monosemanticity"] == (
        semantics.channels[1].concepts[0].monosemanticity
    )
    assert entries[5]["semantics"]["between"] is None
    assert entries[5]["semantics"]["original"] == {"monosemanticity": None, "clarity": 0.5}
    read = read_semantics(path)
    assert str(read) == str(semantics)
    assert repr(read) == repr(semantics)  # figures that are not known differ from themselves
    assert read.channels[1] == semantics.channels[1]


def test_a_file_without_semantics_has_none_and_a_damaged_one_is_told(one_case, tmp_path):
    path = tmp_path / "evaluation.json"
    unbraid.evaluate(one_case.split, one_case.scan).save(path)
    assert {entry["semantics"] for entry in json.loads(path.read_text())["channels"]} == {None}
    assert read_semantics(path) is None
    damaged = '{"channels": [{"channel": 1, "semantics": {"within": 1}}]}'
    for text in ("", "{", "{}", damaged, "[]"):
        path.write_text(text)
        with pytest.raises(RunError, match="start the run again"):
            read_semantics(path)


def test_some_channels_will_do_but_not_those_of_another_split(one_case):
    semantics = measure(one_case)
    some = Semantics({5: semantics.channels[5]})
    content = unbraid.evaluate(one_case.split, one_case.scan, semantics=some).to_dict()
    known = [entry["channel"] for entry in content["channels"] if entry["semantics"]]
    assert known == [5]
    swapped = Semantics({6: semantics.channels[5]})  # two concepts, not three
    elsewhere = Semantics({2: semantics.channels[5]})
    for other in (swapped, elsewhere):
        with pytest.raises(UsageError, match="of another split"):
            unbraid.evaluate(one_case.split, one_case.scan, semantics=other)


def test_predicted_labels_need_not_be_the_data_sets(tmp_path):
    network, images = build("1x1"), SyntheticImages(14, seed=1)
    with torch.no_grad():  # so that more than one class is predicted
        network.head.bias -= network(images.images).mean(0)
    scan = unbraid.scan(network, "layer", images, tmp_path, labels="predicted")
    seen = sorted(scan.labels_seen())
    assert len(seen) >= 2
    split = unbraid.split(scan, unbraid.find(scan, channels={1: [seen[:1], seen[1:]]}))
    result = unbraid.measure_semantics(split, scan, images, encode)
    assert result.channels[1].n_images == 14
    with pytest.raises(UsageError, match="not the one that was scanned"):
        unbraid.measure_semantics(split, scan, SyntheticImages(13), encode)


ACTIVATIONS = {
    "any sign": lambda a: a,
    "rectified": lambda a: a.clamp(min=0),
    "sparse": lambda a: (a - 1.2).clamp(min=0),
    "all negative": lambda a: a - 10,
    "large and alike": lambda a: 1e6 + 1e-3 * a,
    "an outlier": lambda a: a + 1e5 * (torch.arange(len(a)) == 3)[:, None],
    "first is the outlier": lambda a: a - 1e5 * (torch.arange(len(a)) == 0)[:, None],
    "single precision": lambda a: a.float(),
}


def some_images(n: int = 23, channels: int = 4, dimensions: int = 5) -> tuple[Tensor, Tensor]:
    """Activations (N, C) and embeddings (N, D) that lean to one side, as real ones do."""
    a = torch.randn(n, channels, dtype=torch.float64)
    return a, torch.randn(n, dimensions, dtype=torch.float64) + 0.5


def scores_of(activations: Tensor, embeddings: Tensor, sizes: Sequence[int] = ()) -> Tensor:
    """Scores of images that come in parts of some sizes."""
    sums = MonosemanticitySums()
    sizes = sizes or [len(activations)]
    for a, e in zip(activations.split(sizes), embeddings.split(sizes), strict=True):
        sums.add(a, e)
    return sums.scores()


def assert_scores(scores: Tensor, activations: Tensor, embeddings: Tensor) -> None:
    """Each channel's score is the double loop's."""
    assert scores.shape == activations.shape[1:]
    assert scores.dtype == torch.float64
    for actual, activation in zip(scores, activations.T, strict=True):
        assert_close(actual, oracle.monosemanticity(activation, embeddings))


def assert_clarity(actual: float, embeddings: Tensor) -> None:
    assert_close(actual, oracle.clarity(embeddings))


def assert_distances(actual: tuple[float, float], embeddings: Tensor, concept: Tensor) -> None:
    """Distances within and between, in this order."""
    for one, expected in zip(actual, oracle.pure_distances(embeddings, concept), strict=True):
        assert_close(one, expected)


# --- monosemanticity, clarity and PURE's distances ------------------------------------------------


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_scores_in_one_pass_are_those_of_the_double_loop(kind):
    a, e = some_images()
    a = ACTIVATIONS[kind](a)
    assert_scores(scores_of(a, e), a, e)


@pytest.mark.parametrize("sizes", [[23], [1] * 23, [1, 22], [7, 3, 13]])
def test_it_does_not_matter_how_images_are_divided_among_shards(sizes):
    a, e = some_images()
    assert_scores(scores_of(a, e, sizes), a, e)
    e[[0, 7, 8, 9]] = 0  # without a direction, also all of a shard
    assert_scores(scores_of(a, e, sizes), a, e)


def without_pairs() -> dict[str, Tensor]:
    """Activations of one channel in which no two images share anything."""
    rounded = torch.full((50, 1), 0.1, dtype=torch.float64)
    rounded[::2] = torch.nextafter(rounded[0], 2 * rounded[0])
    one_differs = rounded.clone()
    one_differs[4] = 7.0
    alone = torch.zeros(50, 1, dtype=torch.float64)
    alone[11] = 1.3
    return {
        **{f"always {x}": torch.full_like(alone, x) for x in (0.0, 3.0, -1e8, 0.1)},
        **{f"one above {x}": alone + x for x in (0.0, 0.7, -300.0)},
        "rounding": rounded,
        "rounding but in one image": one_differs,
        "one image": alone[:1],
    }


@pytest.mark.parametrize("a", without_pairs().values(), ids=without_pairs())
def test_scores_of_channels_without_a_pair_of_images_are_nan(a):
    e = some_images(len(a))[1]
    assert scores_of(a, e).isnan().all()
    some = some_images(len(a))[0]
    if len(a) > 1:
        assert scores_of(torch.cat([some, a], 1), e).isnan().tolist() == [False] * 4 + [True]
    assert scores_of(some, torch.zeros_like(e)).isnan().all()


def test_neither_the_unit_of_activations_nor_that_of_embeddings_matters():
    a, e = some_images()
    same = scores_of(7 * a - 3, e * torch.rand(23, 1).double().add(0.1))
    assert_close(same, scores_of(a, e))


def test_a_channel_of_one_thing_scores_one_and_of_two_things_half():
    e = torch.eye(2).double().repeat_interleave(500, 0)  # two things, as unlike as can be
    one, two = torch.zeros(1000).double(), torch.zeros(1000).double()
    one[:400] = 1
    two[:400] = two[500:900] = 1
    assert_close(scores_of(torch.stack([one, two], 1), e)[0], 1.0)
    assert_close(scores_of(torch.stack([one, two], 1), e)[1], 399 / 799)


def test_the_check_of_scores_fails_on_other_images():
    a, e = some_images()
    scores = scores_of(a, e)
    assert_scores(scores, a, e)
    corrupted = [
        (scores, a, e.roll(1, 0)),
        (scores, a, e[:, :-1]),
        (scores, a.roll(1, 1), e),
        (scores, a[:-1], e[:-1]),
        (scores, a.clamp(min=0), e),
        (scores + 1e-7, a, e),
        (scores.where(torch.arange(4) != 2, torch.nan), a, e),
        (scores[:3], a, e),
        (scores.float(), a, e),
    ]
    for wrong in corrupted:
        with pytest.raises(AssertionError):
            assert_scores(*wrong)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_clarity_is_that_of_the_double_loop(n):
    e = some_images(n)[1]
    assert_clarity(clarity(e), e)
    assert_clarity(clarity(e.float()), e.float())
    with_zero = torch.cat([e, torch.zeros_like(e[:1])])  # which has no direction
    assert_clarity(clarity(with_zero), with_zero)
    assert_close(clarity(with_zero), clarity(e))
    for wrong in (e[:-1], e.clamp(min=0), -e + 1):
        with pytest.raises(AssertionError):
            assert_clarity(clarity(e), wrong)


def test_clarity_of_less_than_two_images_is_not_known():
    e = some_images(1)[1]
    for few in (e, torch.cat([e, torch.zeros_like(e)]), e[:0]):
        assert math.isnan(clarity(few))


@pytest.mark.parametrize("concept", [[0, 0, 1, 1, 0, 2], [0, 1, 2, 3, 4, 5], [1] * 6])
def test_distances_are_those_of_the_double_loop(concept):
    e, concept = some_images(6)[1], torch.tensor(concept)
    for embeddings in (e, e.float()):
        assert_distances(pure_distances(embeddings, concept), embeddings, concept)
    within, between = pure_distances(e, concept)
    assert math.isnan(within) == (len(concept.unique()) == 6)
    assert math.isnan(between) == (len(concept.unique()) == 1)
    for wrong in ((between, within), (within + 1e-7, between + 1e-7), (within, 0.0)):
        with pytest.raises(AssertionError):
            assert_distances(wrong, e, concept)
    with pytest.raises(AssertionError):
        assert_distances((within, between), e.roll(1, 1) * 2, concept)


def test_the_same_image_in_two_concepts_has_no_distance():
    e = some_images(40)[1][[0] * 40]  # more than cdist would take without rounding
    assert pure_distances(e, torch.arange(40) % 2) == (0.0, 0.0)


# --- crops ----------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_slow_way():
    for seed in range(30):
        answer = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed))
        assert answering_box(answer) == box_by_hand(answer)
    assert answering_box(-torch.ones(3, 4)) == WHOLE
    assert answering_box(torch.ones(1, 1)) == WHOLE
    assert answering_box(-torch.eye(5)) == WHOLE
    assert answering_box(torch.eye(5) - 1) == WHOLE  # the strongest is zero, no answer at all
    assert answering_box(-torch.ones(9, 9).index_fill(0, torch.tensor([0]), 0.0)) == WHOLE


def test_a_crop_is_that_part_of_the_image():
    image = torch.zeros(3, 8, 6)
    image[:, 2:4, 3:6] = torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    crop = cut_out(image, Box(0.25, 0.5, 0.5, 1.0))
    assert crop.shape == image.shape
    assert_close(crop, torch.tensor([1.0, 2.0, 3.0])[:, None, None].expand(3, 8, 6), 1e-6)
    assert cut_out(image, Box(0.5, 0.5, 0.99, 1.0)).shape == image.shape  # a pixel at least
    assert cut_out(image, Box(0.0, 1.0, 0.5, 0.5)).shape == image.shape
    assert cut_out(image.int(), WHOLE).dtype == torch.int32
    assert cut_out((9 * image).byte(), WHOLE).dtype == torch.uint8


def test_the_whole_image_stays_as_it_is():
    images = SyntheticImages(3)
    crops = Crops(images, [(2, WHOLE), (0, WHOLE)])
    assert len(crops) == 2
    assert_close(crops[0][0], images[2][0], 1e-6)
    assert crops[1][1] == images[0][1]


# --- what is refused ------------------------------------------------------------------------------


def failing(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing")


@pytest.mark.parametrize(
    ("changed", "error", "told"),
    [
        ({"n_top": 1}, UsageError, "n_top is 1"),
        ({"batch_size": 0}, UsageError, "batch_size is 0"),
        ({"encoder": "clip"}, UsageError, "'clip' names no encoder"),
        ({"encoder": failing}, ModelError, "no such thing"),
        ({"encoder": lambda x: encode(x) * math.nan}, ModelError, "NaN or infinite"),
        ({"encoder": lambda x: encode(x)[1:]}, ModelError, "not one embedding each"),
        ({"dataset": SyntheticImages(13, seed=1)}, UsageError, "not the one that was scanned"),
        ({"dataset": SyntheticImages(14, n_classes=3)}, UsageError, "not the one that was"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(one_case, changed, error, told):
    with pytest.raises(error, match=told) as caught:
        measure(one_case, **changed)
    assert "\n" not in str(caught.value)


def test_a_scan_of_another_network_is_refused(one_case, tmp_path):
    with pytest.raises(UsageError, match="another network or layer"):
        measure(make_case("1x1", tmp_path), split=one_case.split)


def test_an_image_that_is_gone_is_told(one_case):
    class Gone(SyntheticImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            raise DataError("Image a.png cannot be read.")

    with pytest.raises(DataError, match=r"a\.png"):
        measure(one_case, dataset=Gone(14, seed=1))
