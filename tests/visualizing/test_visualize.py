"""Feature visualisation: what the images excite, what they are made of, and what is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_apply import THREE, Pair, Splits, concept_maps, images, layer_output
from torch import Tensor, nn
from torch.utils.data import Dataset

import unbraid
from checks import assert_bit_equal, assert_close, assert_untouched, snapshot
from tiny_networks import KINDS, SyntheticImages, build
from unbraid.base.errors import DataError, LayerError, ModelError, UsageError
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.splitting.splits import Split
from unbraid.visualizing import visualize as making
from unbraid.visualizing.features import Features
from unbraid.visualizing.visualize import Score, watch


def visualize(
    network: nn.Module, channels: Sequence[int] | None = None, **options: Any
) -> Features:
    """A few steps on small images."""
    return unbraid.visualize(
        network, "layer", SyntheticImages(8), channels, **{"steps": 3, **options}
    )


@pytest.fixture(scope="module")
def split_of(tmp_path_factory) -> Splits:
    return Splits(tmp_path_factory.mktemp)


@pytest.fixture
def one_pair(split_of) -> Pair:
    return Pair("3x3", split_of("3x3"))


def pixels_shown(features: Features) -> list[Tensor]:
    """All that can be seen of pictures, so also whether two are the same."""
    return [torch.from_numpy(np.asarray(f.picture).copy()) for f in features.features]


def assert_same_pictures(one: Features, other: Features, levels: int = 0) -> None:
    """The same images of the same channels, up to some of 255 levels of brightness."""
    keys = [[(f.channel, f.concept, f.place) for f in made.features] for made in (one, other)]
    assert keys[0] == keys[1]
    for a, b in zip(pixels_shown(one), pixels_shown(other), strict=True):
        assert int((a[..., :3].int() - b[..., :3].int()).abs().max()) <= levels


# --- what the images excite, in a trained network -------------------------------------------------


@pytest.fixture(scope="module")
def demo_split(tmp_path_factory) -> Split:
    folder = tmp_path_factory.mktemp("demo") / "scan"
    scan = unbraid.scan(load_network(), LAYER, load_images("train"), folder, batch_size=250)
    return unbraid.split(scan, unbraid.find(scan))


@pytest.fixture(scope="module")
def demo_features(demo_split) -> Features:
    model = unbraid.apply(load_network(), demo_split)
    return unbraid.visualize(model, LAYER, load_images("train"))


def concept_responses(split: Split, channel: int, pictures: Tensor) -> Tensor:
    """Mean over positions of each concept channel's pre-activation, straight from its row, (N, K).

    Args:
        pictures: (N, 1, 28, 28), as the network takes them.
    """
    network = load_network()
    with torch.no_grad():
        x = network.look(pictures).flatten(2).mean(2)  # (N, C_in): the layer has kernel 1
    part = split[channel]
    return torch.stack([x @ row + part.bias for row in part.rows.float()], 1)


def shown(picture: Image.Image) -> Tensor:
    """A grey picture as the demo's network takes it, (1, 28, 28)."""
    low, high = -0.2860 / 0.3530, (1 - 0.2860) / 0.3530
    grey = torch.from_numpy(np.asarray(picture.convert("RGB")).copy())[..., 0] / 255
    return (low + (high - low) * grey)[None]


def assert_excites_its_own(features: Features, split: Split) -> None:
    """The image of concept k excites z_k far more than the others, in spreads over real images.

    Own responses are at least 2 standard deviations above those to real images on average, the
    others' at most 1.5, and own ones lie at least 2 above the others'.
    """
    unseen = load_images("test")
    real = torch.stack([unseen[n][0] for n in range(0, len(unseen), 10)])
    for channel in features.channels:
        usual = concept_responses(split, channel, real)
        concepts = range(len(split[channel].concepts))
        pictures = torch.stack([shown(features.image(channel, k)) for k in concepts])
        answers = (concept_responses(split, channel, pictures) - usual.mean(0)) / usual.std(0)
        for k in concepts:
            others = max(float(answers[k, other]) for other in concepts if other != k)
            assert float(answers[k, k]) >= 2, (channel, k)
            assert others <= 1.5, (channel, k)
            assert float(answers[k, k]) - others >= 2, (channel, k)


def test_the_image_of_a_concept_channel_excites_it_and_not_the_others(demo_features, demo_split):
    assert len(demo_features.channels) >= 6
    assert demo_features.channels == tuple(sorted(p.channel for p in demo_split.channels))
    assert_excites_its_own(demo_features, demo_split)


def test_the_check_fails_on_other_concepts_other_masks_and_noise(demo_features, demo_split):
    turned = {f: {None: None, 0: 1, 1: 0}[f.concept] for f in demo_features.features}
    swapped = tuple(replace(f, concept=k) for f, k in turned.items())
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 28, 4), dtype=np.uint8))
    noisy = tuple(replace(f, picture=noise) for f in demo_features.features)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    parts = tuple(replace(p, masks=p.masks[:, order]) for p in demo_split.channels)
    for features, split in (
        (replace(demo_features, features=swapped), demo_split),
        (replace(demo_features, features=noisy), demo_split),
        (demo_features, replace(demo_split, channels=parts)),
    ):
        with pytest.raises(AssertionError):
            assert_excites_its_own(features, split)


def test_the_whole_channels_image_excites_it_beyond_all_real_images(demo_features, demo_split):
    network, real = load_network(), load_images("train")
    usual = layer_output(network, torch.stack([real[n][0] for n in range(500)]), LAYER).mean((2, 3))
    for channel in demo_features.channels:
        answer = layer_output(network, shown(demo_features.image(channel))[None], LAYER)
        assert float(answer.mean((2, 3))[0, channel]) > float(usual[:, channel].max())


def test_responses_are_those_of_the_pictures(demo_features, demo_split):
    for feature in demo_features.features:
        picture = shown(feature.picture)[None]
        expected = concept_responses(demo_split, feature.channel, picture)[0]
        whole = layer_output(load_network(), picture, LAYER).mean((2, 3))[0, feature.channel]
        told = torch.tensor(feature.responses)
        # A picture has 256 levels, so the image that was measured is not quite the picture.
        assert_close(told, torch.cat([whole[None], expected]), tolerance=0.02 * float(told.max()))


def test_the_plain_objective_excites_others_too(demo_split, demo_features):
    model = unbraid.apply(load_network(), demo_split)
    plain = unbraid.visualize(model, LAYER, load_images("train"), objective="plain")

    def strongest_other(features: Features) -> list[float]:
        return [
            max(r for k, r in enumerate(f.responses[1:]) if k != f.concept)
            for f in features.features
            if f.concept is not None
        ]

    contrast = sum(max(r, 0) for r in strongest_other(demo_features))
    assert sum(max(r, 0) for r in strongest_other(plain)) > 3 * contrast


@pytest.mark.parametrize("spectrum", [False, True])
def test_more_steps_reach_more(one_pair, spectrum):
    few, many = (
        visualize(one_pair.changed, [1], steps=steps, spectrum=spectrum) for steps in (1, 60)
    )
    assert many.of(1)[0].responses[0] > few.of(1)[0].responses[0] + 0.1


# --- a truth that is known ------------------------------------------------------------------------


class Colours(nn.Module):
    """A layer whose channel 0 answers to red in the left half, and not to green and blue."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1, bias=False)
        self.layer.weight.data = torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]])[
            ..., None, None
        ]
        self.head = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x[..., : x.shape[-1] // 2]).mean((2, 3)))


class Uniform(Dataset[tuple[Tensor, int]]):
    """Noise of independent colours between -1 and 3, so that every colour may be made."""

    def __init__(self, shape: tuple[int, ...] = (3, 12, 12), n_images: int = 6) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = 4 * torch.rand(n_images, *shape, generator=generator) - 1
        self.targets = [n % 4 for n in range(n_images)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


def test_an_image_has_the_colour_and_the_place_that_the_channel_wants():
    made = unbraid.visualize(Colours(), "layer", Uniform(), [0, 1], steps=200)
    red, cyan = (np.asarray(made.image(channel)).astype(float) / 255 for channel in (0, 1))
    left = np.s_[2:-2, 1:4]
    assert red[left][..., 0].mean() > 0.85
    assert red[left][..., 1:3].mean() < 0.15
    assert cyan[left][..., 0].mean() < 0.15
    assert cyan[left][..., 1:3].mean() > 0.85
    opacity = red[..., 3]
    assert opacity[:, :5].mean() > 0.9
    assert opacity[:, 8:].mean() < 0.3


def test_responses_are_bounded_by_the_range_of_real_images():
    made = unbraid.visualize(Colours(), "layer", Uniform(), [0], steps=200)
    low, high = Uniform().images.min(), Uniform().images.max()
    assert 0.8 * (high - 2 * low) < made.of(0)[0].responses[0] <= high - 2 * low


# --- responses and scores -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_the_oracles_in_layers_of_every_kind(kind, split_of):
    pair = Pair(kind, split_of(kind))
    watched = watch(pair.changed, "layer")
    with torch.no_grad():
        responses = watched.respond(images())
    for channel, concept in ((1, 0), (1, 1), (0, 0), (3, 1)):
        expected = concept_maps(pair, channel, concept, images())
        assert_close(responses[:, watched.rows[channel, concept]], expected)
    whole = layer_output(pair.network, images())
    if isinstance(pair.network.layer, nn.Linear):
        whole = whole.movedim(-1, 1)
    found = responses[:, : pair.split.layer.n_out]
    assert_close(found, whole.reshape(found.shape))


def test_responses_over_several_calls_and_windows_count_all_positions():
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:  # (N, 3, 4, 4), in four windows, twice
            parts = x.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, 3, 2, 2, 2, 2)
            windows = parts.movedim(1, -1).flatten(1, 2).flatten(0, 1)  # (N * 4, 2, 2, 3)
            once = self.layer(windows)
            return (once + self.layer(2 * windows)).flatten(1, 2).mean(1)

    network, x = Windows().double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        found = watch(network, "layer").respond(x).mean(-1)
        expected = network.layer(1.5 * x.flatten(2).mean(2))
    assert_close(found, expected)


@pytest.mark.parametrize("contrast", [False, True])
def test_scores_are_what_a_loop_says(contrast, split_of):
    pair = Pair("1x1", split_of("1x1", THREE))
    watched = watch(pair.changed, "layer")
    targets = [(2, None), (2, 0), (2, 2), (0, 1), (5, None)]
    with torch.no_grad():
        responses = watched.respond(images())
        found = Score(watched, targets, contrast)(responses)
    for n, (channel, concept) in enumerate(targets):
        expected = float(responses[n, watched.rows[channel, concept]].mean())
        for other in range(3 if channel == 2 else 2) if contrast and concept is not None else ():
            z = responses[n, watched.rows[channel, other]]
            if other != concept:
                expected -= sum(max(float(v), 0.0) for v in z) / len(z)
        assert_close(float(found[n]), expected, tolerance=1e-5)


def test_gradients_of_an_image_are_its_own(one_pair):
    """Of several images each gets the gradient of its own score alone."""
    watched = watch(one_pair.changed, "layer")
    targets = [(1, 0), (3, 1)]
    together = images(2).requires_grad_()
    Score(watched, targets, True)(watched.respond(together)).sum().backward()
    for n, target in enumerate(targets):
        alone = images(2)[n : n + 1].requires_grad_()
        Score(watched, [target], True)(watched.respond(alone)).sum().backward()
        assert_close(together.grad[n], alone.grad[0], tolerance=1e-6)


def test_the_next_module_does_not_write_into_responses(one_pair):
    assert one_pair.network.behind.inplace
    with torch.no_grad():
        responses = watch(one_pair.changed, "layer").respond(images())
    assert float(responses[:, : one_pair.split.layer.n_out].min()) < 0


# --- reproducible, and nothing left behind --------------------------------------------------------


@pytest.mark.parametrize("spectrum", [False, True])
def test_the_same_seed_gives_the_same_pictures(one_pair, spectrum):
    def make(seed: int) -> Features:
        return visualize(one_pair.changed, seed=seed, spectrum=spectrum)

    first = make(1)
    torch.rand(3)
    assert_same_pictures(first, make(1))
    with pytest.raises(AssertionError):
        assert_same_pictures(first, make(2))


def test_an_image_does_not_depend_on_the_others(one_pair, monkeypatch):
    everything = visualize(one_pair.changed, n=2)
    some = visualize(one_pair.changed, [3], n=2)
    only = replace(everything, features=tuple(f for f in everything.features if f.channel == 3))
    assert_same_pictures(some, only, levels=1)
    monkeypatch.setattr(making, "_PIXELS", 4 * 42)  # four images at once, of 7 x 6 pixels
    portions = visualize(one_pair.changed, n=2)
    assert_same_pictures(everything, portions, levels=1)


def test_several_images_differ_and_the_best_comes_first(one_pair):
    made = visualize(one_pair.changed, [1], n=3, steps=20)
    first, second, third = made.of(1)
    assert (first.place, second.place, third.place) == (0, 1, 2)
    assert first.responses[0] >= second.responses[0] >= third.responses[0]
    assert made.image(1) is first.picture
    assert len({f.picture.tobytes() for f in (first, second, third)}) == 3


@pytest.mark.parametrize("training", [False, True])
def test_the_network_is_left_as_it_was(one_pair, training):
    one_pair.changed.train(training)
    before = snapshot(one_pair.changed)
    state = torch.get_rng_state()
    visualize(one_pair.changed, [1], n=2)
    assert_bit_equal(torch.get_rng_state(), state)
    assert_untouched(before, snapshot(one_pair.changed))
    with pytest.raises(ModelError):
        unbraid.visualize(one_pair.changed, "layer", Uniform((2, 7, 6)), [1])
    assert_untouched(before, snapshot(one_pair.changed))


def test_it_works_where_gradients_are_off(one_pair):
    expected = visualize(one_pair.changed, [1])
    with torch.no_grad():
        without = visualize(one_pair.changed, [1])
    with torch.inference_mode():
        inference = visualize(one_pair.changed, [1])
    assert_same_pictures(expected, without)
    assert_same_pictures(expected, inference)


def test_a_gate_in_force_counts(one_pair):
    with one_pair.changed.gate("layer", 1, 0, 0.0):
        made = visualize(one_pair.changed, [1])
    usual = visualize(one_pair.changed, [1])
    assert made.of(1)[0].responses[0] != usual.of(1)[0].responses[0]


# --- what may be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["groups", "tokens", "grid of tokens", "one dimension", "head"])
def test_layers_of_every_kind_are_visualised(kind, split_of):
    pair = Pair(kind, split_of(kind))
    made = visualize(pair.changed)
    assert made.channels == (0, 1, 3)
    assert [f.concept for f in made.features] == 3 * [None, 0, 1]
    assert all(len(f.responses) == 3 and f.picture.size == (6, 7) for f in made.features)
    assert (made.layer, made.left_out) == ("layer", 0)


def test_a_network_that_was_not_split_has_whole_channels_only(one_pair):
    made = visualize(one_pair.network, [2, 5])
    assert [(f.channel, f.concept) for f in made.features] == [(2, None), (5, None)]
    assert all(len(f.responses) == 1 for f in made.features)
    with pytest.raises(UsageError, match="say which channels"):
        visualize(one_pair.network)


def test_half_precision_networks_are_visualised(split_of):
    network = build("1x1", torch.float32)
    split = split_of("1x1", dtype=torch.float32)
    changed = unbraid.apply(network, split).bfloat16()
    dataset = SyntheticImages(8, dtype=torch.bfloat16)
    assert unbraid.visualize(changed, "layer", dataset, [1]).channels == (1,)


def test_the_size_may_be_another(one_pair):
    made = visualize(one_pair.changed, [1], size=(15, 11))
    assert made.image(1).size == (11, 15)
    assert made.settings["size"] == [15, 11]


def test_time_is_kept_and_what_is_left_out_is_told(one_pair, monkeypatch):
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    made = visualize(one_pair.changed, [3, 0, 1], seconds=0.0)
    assert (made.channels, made.left_out) == ((3,), 2)
    made = visualize(one_pair.changed, seconds=600.0)
    assert (made.channels, made.left_out) == ((0, 1, 3), 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"objective": "best"}, "no objective 'best'"),
        ({"channels": [8]}, "no channel 8"),
        ({"channels": [-1]}, "no channel -1"),
        ({"size": (0, 5)}, "size is"),
        ({"seconds": -1.0}, "seconds is -1"),
        ({"size": (5000, 5000)}, "size is"),
    ],
)
def test_arguments_out_of_range_are_told(one_pair, wrong, message):
    with pytest.raises(UsageError, match=message):
        visualize(one_pair.changed, **wrong)


class Unused(nn.Module):
    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.layer, self.detach = nn.Conv2d(3, 2, 1), detach

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.detach()).mean((2, 3)) if self.detach else x.mean((2, 3))


class OneWay(torch.autograd.Function):
    """An operation that nobody wrote a gradient for."""

    @staticmethod
    def forward(_context: object, x: Tensor) -> Tensor:
        return 2 * x


class Forwards(Colours):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(OneWay.apply(x))


def with_nan() -> Colours:
    network = Colours()
    network.layer.weight.data[0] = float("nan")
    return network


def flat() -> Uniform:
    images = Uniform()
    images.images[:] = 0.5
    return images


@pytest.mark.parametrize(
    ("network", "layer", "images", "error", "message"),
    [
        (Colours(), "lair", Uniform(), LayerError, "no layer 'lair'"),
        (Unused(False), "layer", Uniform(), LayerError, "does not run"),
        (Unused(True), "layer", Uniform(), LayerError, "gradient"),
        (Forwards(), "layer", Uniform(), ModelError, "no gradient of its image"),
        (with_nan(), "layer", Uniform(), ModelError, "NaN"),
        (Colours(), "layer", Uniform((2, 7, 6)), ModelError, r"run on images of shape \(2, 7, 6\)"),
        (Colours(), "layer", flat(), DataError, "one colour"),
        (Colours(), "layer", Uniform((3, 12)), DataError, "channels, height, width"),
    ],
)
def test_what_cannot_be_visualised_is_told(network, layer, images, error, message):
    with pytest.raises(error, match=message):
        unbraid.visualize(network, layer, images, [0])
