"""What concept channels do in an image, against autograd through the original network."""

import copy
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import oracle
import unbraid
from checks import assert_close, assert_untouched, snapshot
from tiny_networks import SyntheticImages, WithBroken, build
from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.heatmap import heatmap
from unbraid.splitting.quantiles import percentile

KINDS = ["3x3", "groups", "reflect", "uneven", "pads by size", "one dimension"]
KINDS += ["three dimensions", "tokens", "grid of tokens", "pooled features", "head"]
ASKED = [0, "class 3"]


def assert_explained(found, network, split, image, tolerance=1e-9):
    """Responses, relevances and shares are those of each row in the channel's place."""
    layer, x, z, logits = oracle._run_cut(network, split.layer.name, image)
    x = x[0] if len(x) == 1 else x
    assert found.classes[0] == int(logits.argmax())
    assert_close(found.logits, logits[list(found.classes)], tolerance)
    slopes = []
    for t in found.classes:
        (gradient,) = torch.autograd.grad(logits[t], z, retain_graph=True)
        slopes.append(oracle._by_channel(layer, gradient[0]))
    totals = [
        sum(max(float(r), 0.0) for r in oracle.relevance(network, split.layer.name, image, t))
        for t in found.classes
    ]
    assert [own.whole.channel for own in found.channels] == [p.channel for p in split.channels]
    for own, part in zip(found.channels, split.channels, strict=True):
        rest_bias = len(part.rows) * part.bias  # too much in a map of the rest's row
        rows = [(part.weight, 0.0), *((row, 0.0) for row in part.rows)]
        rows.append((part.weight - part.rows.sum(0), rest_bias))
        ones = (own.whole, *own.concepts, own.rest)
        assert [one.part for one in ones] == [None, *range(len(part.rows)), "rest"]
        for one, (row, less) in zip(ones, rows, strict=True):
            values = oracle.channel_map(layer, part.channel, row, x) - less  # (P,)
            assert_close(one.response, values.mean(), tolerance)
            for t, slope in enumerate(slopes):
                relevance = (values * slope[part.channel]).sum()
                assert_close(one.relevance[t], relevance, tolerance)
                share = relevance / totals[t] if totals[t] else 0.0
                assert_close(one.share[t], share, tolerance)
            if one.map is not None:
                assert_close(one.map.flatten(), values[-one.map.numel() :], tolerance)


def assert_adds_up(found, tolerance=1e-5):
    """Shares of concept channels and rest sum to the channel's own."""
    for own in found.channels:
        parts = [*own.concepts, own.rest]
        for t, whole in enumerate(own.whole.share):
            total = math.fsum(part.share[t] for part in parts)
            assert abs(total - whole) <= tolerance * abs(whole), own.whole.name


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_that_of_its_row_in_the_original_network(kind, case_of):
    case = case_of(kind)
    model2 = unbraid.apply(case.network, case.split)
    before = snapshot(model2)
    found = unbraid.explain(model2, case.images.images[:3], classes=ASKED)
    assert_untouched(before, snapshot(model2))
    for one, image in zip(found.images, case.images.images, strict=False):
        assert {0, 3} <= set(one.classes)
        assert_explained(one, case.network, case.split, image)
        assert_adds_up(one)
    sizes = {"tokens": (6, 5), "grid of tokens": (6, 5)}
    no_picture = ("one dimension", "three dimensions", "pooled features", "head")
    where = found[0].channels[0].whole.map
    if kind in no_picture:
        assert where is None
    else:
        assert where.shape == sizes.get(kind, case.truth.layer(case.truth.x[0][None]).shape[2:])


class Registers(VisionTransformer):
    def __init__(self, n_registers):
        torch.manual_seed(0)
        super().__init__(
            **{"img_size": (48, 32), "patch_size": 8, "embed_dim": 24, "depth": 2},
            **{"num_heads": 2, "num_classes": 4, "reg_tokens": n_registers},
        )


def split_of(network, layer, images, folder, n=4):
    scan = unbraid.scan(network, layer, images, folder)
    chosen = {o: [[0], [1]] for o in range(n)}
    return unbraid.split(scan, unbraid.find(scan, channels=chosen))


@pytest.mark.parametrize("n_registers", [0, 4])
def test_a_vision_transformer_s_tokens_lie_as_its_patches_do(n_registers, tmp_path):
    network = Registers(n_registers).eval()
    images = SyntheticImages(12, size=(3, 48, 32), dtype=torch.float32)
    split = split_of(network, "blocks.1.mlp.fc1", images, tmp_path)
    (found,) = unbraid.explain(unbraid.apply(network, split), images[5][0]).images
    assert_explained(found, network, split, images[5][0], 1e-4)
    assert_adds_up(found)
    assert found.channels[0].whole.map.shape == (6, 4)
    assert found.strongest[0][0].heatmap.shape == (48, 32)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's network, a split of it, and responses of its rows in the images of the scan."""
    network, images = load_network(), load_images("train")
    folder = tmp_path_factory.mktemp("demo")
    scan = unbraid.scan(network, LAYER, images, folder, batch_size=250)
    found = unbraid.find(scan)
    few = dict(list(found.concepts.items())[:2])
    split = unbraid.split(scan, replace(found, concepts=few), method="published", rho=0.7)
    return network, split, images


def test_the_demo_s_shares_add_up_and_its_percentiles_count_images(demo):
    network, split, images = demo
    model2 = unbraid.apply(network, split)
    found = unbraid.explain(model2, torch.stack([images[n][0] for n in range(0, 5000, 1000)]))
    x = torch.stack([images[n][0] for n in range(len(images))])
    seen = []
    with torch.no_grad(), network.mix.register_forward_pre_hook(lambda _, a: seen.append(a[0])):
        network(x)
    pooled = seen[0].double().mean((2, 3))  # (N, J), as the layer is of kernel 1
    for own, index in zip(found.images, range(0, 5000, 1000), strict=True):
        assert_explained(own, network, split, images[index][0], 1e-5)
        assert_adds_up(own)
        for channel, part in zip(own.channels, split.channels, strict=True):
            for one, row in zip(
                (channel.whole, *channel.concepts), (part.weight, *part.rows), strict=True
            ):
                every = pooled @ row.double() + part.bias
                below = 100 * float((every < every[index]).double().mean())
                assert abs(one.percentile - below) < 0.6, one.name
            assert math.isnan(channel.rest.percentile)


WRONG = {  # what a wrong explanation could be like
    "a share": lambda own: replace(own, rest=_more(own.rest, "share")),
    "a relevance": lambda own: replace(own, whole=_more(own.whole, "relevance")),
    "a response": lambda own: replace(own, whole=replace(own.whole, response=7.0)),
    "concepts swapped": lambda own: replace(own, concepts=_swapped(own.concepts)),
    "a map": lambda own: replace(own, whole=replace(own.whole, map=own.whole.map * 1.01)),
}


def _more(one, name):
    return replace(one, **{name: tuple(1.01 * value + 1e-4 for value in getattr(one, name))})


def _swapped(concepts):
    parts = [one.part for one in concepts]
    return tuple(replace(one, part=p) for one, p in zip(reversed(concepts), parts, strict=True))


@pytest.mark.parametrize("change", WRONG)
def test_the_checks_fail_on_a_wrong_explanation(change, case_of):
    case = case_of("3x3")
    image = case.images.images[2]
    (found,) = unbraid.explain(unbraid.apply(case.network, case.split), image).images
    assert_explained(found, case.network, case.split, image)
    wrong = replace(found, channels=(WRONG[change](found.channels[0]), *found.channels[1:]))
    with pytest.raises(AssertionError):
        assert_explained(wrong, case.network, case.split, image)
    if change == "a share":
        with pytest.raises(AssertionError):
            assert_adds_up(wrong)


def slow_heatmap(case, image, channel, row):
    """Input x gradient of half the summed squares of the positive responses, then a blur."""
    network = copy.deepcopy(case.network)
    with torch.no_grad():
        network.layer.weight[channel] = row.reshape(network.layer.weight[channel].shape)
    seen = []
    network.layer.register_forward_hook(lambda *args: seen.append(args[-1].clone()))
    x = image[None].clone().requires_grad_()
    network(x)
    (seen[0].select(-1 if case.split.layer.channels_last else 1, channel).relu() ** 2).sum().div(
        2
    ).backward()
    heat = (x * x.grad)[0].sum(0).detach()
    height, width = heat.shape
    spread = min(height, width) / 28
    reach = math.ceil(3 * spread)
    kernel = [math.exp(-(d**2) / (2 * spread**2)) for d in range(-reach, reach + 1)]
    kernel = [value / sum(kernel) for value in kernel]

    def mirrored(at, size):
        return -at if at < 0 else 2 * (size - 1) - at if at >= size else at

    smooth = torch.zeros_like(heat)
    for y in range(height):
        for x0 in range(width):
            for dy, one in zip(range(-reach, reach + 1), kernel, strict=True):
                for dx, other in zip(range(-reach, reach + 1), kernel, strict=True):
                    at = mirrored(y + dy, height), mirrored(x0 + dx, width)
                    smooth[y, x0] += one * other * heat[at]
    return smooth


@pytest.mark.parametrize("kind", ["3x3", "groups", "tokens", "pooled features"])
def test_heatmaps_are_those_of_plain_loops(kind, case_of):
    case = case_of(kind)
    image = case.images.images[4]
    model2 = unbraid.apply(case.network, case.split)
    (found,) = unbraid.explain(model2, image, n=5).images
    made = [
        concept for own in found.channels for concept in own.concepts if concept.heatmap is not None
    ]
    assert sorted(c.name for c in made) == sorted(c.name for c, _ in found.strongest)
    assert len(made) == 5
    for concept in made:
        row = case.split[concept.channel].rows[concept.part]
        expected = slow_heatmap(case, image, concept.channel, row)
        assert_close(concept.heatmap, expected, 1e-6)
    assert any(concept.heatmap.any() for concept in made)
    (without,) = unbraid.explain(model2, image, heatmaps=False).images
    assert all(concept.heatmap is None for concept, _ in without.strongest)


def test_gates_in_force_count_and_an_image_does_not_depend_on_others(case_of):
    case = case_of("3x3")
    model2, images = unbraid.apply(case.network, case.split), case.images.images
    together, alone = unbraid.explain(model2, images[:4]), unbraid.explain(model2, images[3])
    assert replace(together[3], image="").to_dict() == replace(alone[0], image="").to_dict()
    own = alone[0][1]
    with model2.gate("layer", 1, 0, 0.0):
        gated = unbraid.explain(model2, images[3])[0][1]
        logits = model2(images[3:4])
    assert gated.concepts[0].response == gated.concepts[0].share[0] == 0
    assert_close(gated.whole.response, own.whole.response - own.concepts[0].response)
    assert_close(gated.rest.response, own.rest.response)
    assert int(logits.argmax()) == int(case.network(images[3:4]).argmax())
    again = unbraid.explain(model2, images[3])
    assert again[0].to_dict() == alone[0].to_dict()


def test_an_old_split_says_that_percentiles_are_unknown(case_of):
    case = case_of("3x3")
    parts = [replace(part, quantiles=None) for part in case.split.channels]
    old = unbraid.apply(case.network, replace(case.split, channels=tuple(parts)))
    found = unbraid.explain(old, case.images.images[0])
    assert "percentiles are unknown, as the split was made from places or by an earlier" in str(
        found
    )
    assert found[0].to_dict()["channels"][0]["whole"]["percentile"] is None
    new = unbraid.explain(unbraid.apply(case.network, case.split), case.images.images[0])
    assert "unknown" not in str(new)
    assert 0 <= new[0].to_dict()["channels"][0]["whole"]["percentile"] <= 100


class NoGradient(nn.Module):
    """A network whose first part is out of reach of gradients."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        for name, part in self.network.named_children():
            x = part(x).detach() if name == "stem" else part(x)
        return x


def test_without_a_gradient_at_the_image_figures_are_there_and_why_is_told(tmp_path, case_of):
    network = NoGradient(case_of("3x3").network)
    split = split_of(network, "network.layer", SyntheticImages(12), tmp_path)
    found = unbraid.explain(unbraid.apply(network, split), SyntheticImages(1)[0][0])
    assert found[0].strongest[0][0].heatmap is None
    assert found[0].strongest[0][0].map is not None
    assert "there are no heatmaps, as no gradient reaches the image" in str(found)


class Named(SyntheticImages):
    def __init__(self):
        super().__init__(2)
        self.ids = ["<b>\x1b[31m0", "<b>\x1b[31m1"]


def test_data_sets_name_their_images_and_classes(case_of):
    case = case_of("3x3")
    model2 = unbraid.apply(case.network, case.split)
    found = unbraid.explain(model2, Named(), classes=["class 1"])
    assert [one.image for one in found.images] == Named().ids
    assert "class 1" in found[0].class_names
    assert "\x1b" not in str(found)


def test_a_broken_image_is_told(case_of):
    case = case_of("3x3")
    with pytest.raises(DataError, match=r"picture-3.jpg\)\. Mend it, or leave it out\.$"):
        unbraid.explain(unbraid.apply(case.network, case.split), WithBroken(5))


MISTAKES = [
    (lambda c, m: unbraid.explain(c.network, c.images), "no concept channels to explain"),
    (lambda c, m: unbraid.explain(m, c.images, layer="head"), "'head' is not split; name one of"),
    (lambda c, m: unbraid.explain(m, c.images, classes=["clas 3"]), "Did you mean class 3"),
    (lambda c, m: unbraid.explain(m, c.images, classes=[4]), "whole number from 0 to 3"),
    (lambda c, m: unbraid.explain(m, c.images, classes=["4"]), "whole number from 0 to 3"),
    (lambda c, m: unbraid.explain(m, c.images, classes="class 3"), "give a list of names"),
    (lambda c, m: unbraid.explain(m, c.images, n=0), "n is 0; give a whole number, 1 or more"),
    (lambda c, m: unbraid.explain(m, c.images, heatmaps="no"), "give True or False"),
    (lambda c, m: unbraid.explain(m, torch.zeros(3, 4)), r"shape \(3, 4\); give one of shape"),
    (lambda c, m: unbraid.explain(m, torch.zeros(1, 0, 6, 5)), r"shape \(1, 0, 6, 5\); give one"),
    (lambda c, m: unbraid.explain(m, [c.images.images[0]][:0]), "holds no image"),
]


@pytest.mark.parametrize(("wrong", "told"), MISTAKES)
def test_what_makes_no_sense_is_refused(wrong, told, case_of):
    case = case_of("3x3")
    with pytest.raises(UsageError, match=told):
        wrong(case, unbraid.apply(case.network, case.split))


def test_images_that_the_network_cannot_take_are_told_as_such(case_of):
    case = case_of("3x3")
    model2 = unbraid.apply(case.network, case.split)
    image = case.images.images[0]
    for wrong in (
        *(image.to(dtype) for dtype in (torch.uint8, torch.int64, torch.bool)),
        *(image.permute(1, 2, 0), image[:2], image[None, None]),
    ):
        shape = tuple(wrong.shape[-4:] if wrong.dim() == 5 else wrong.shape)
        told = re.escape(f"cannot run on images of shape {shape} and {wrong.dtype} (")
        with pytest.raises(ModelError, match=told):
            unbraid.explain(model2, wrong)


def test_quantiles_are_those_of_all_images_and_survive_a_file(case_of, tmp_path):
    case = case_of("groups")
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path / "scan")
    found = unbraid.find(scan, channels={1: [[0], [1]], 6: [[2, 0], [3]]})
    for made in (
        unbraid.split(scan, found),
        unbraid.split(scan, found, method="published", rho=0.7),
    ):
        made.save(tmp_path / "split.safetensors")
        kept = unbraid.Split.load(tmp_path / "split.safetensors")
        for part, again in zip(made.channels, kept.channels, strict=True):
            assert torch.equal(part.quantiles, again.quantiles)
            assert part.quantiles.shape == (3, 201)
            for row, quantiles in zip((part.weight, *part.rows), part.quantiles, strict=True):
                sums = case.truth.pooled_response(part.channel, row)
                n_positions = case.truth.z[0].shape[1]
                expected = np.quantile(sums.numpy() / n_positions, np.linspace(0, 1, 201))
                assert_close(quantiles, expected, 1e-9)


def test_a_split_from_places_keeps_no_quantiles(tmp_path):
    network, dataset = build("3x3"), SyntheticImages(20)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, places=8)
    groups = {0: [[0, 1], [2, 5, 6]]}
    for one, known in ((scan.places, False), (scan, True)):
        split = unbraid.split(one, unbraid.find(one, images=groups))
        assert [part.quantiles is not None for part in split.channels] == [known]
        found = unbraid.explain(unbraid.apply(network, split), dataset[0][0])
        assert ("unknown, as the split was made from places" in str(found)) == (not known)


def test_refitting_a_split_of_an_earlier_version_adds_quantiles(case_of, tmp_path):
    case = case_of("groups")
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path / "scan")
    found = unbraid.find(scan, channels={1: [[0], [1]]})
    made = unbraid.split(scan, found)
    old = replace(made, channels=tuple(replace(part, quantiles=None) for part in made.channels))
    again = unbraid.split(scan, found, refit=old)
    assert torch.equal(again[1].quantiles, made[1].quantiles)


def test_percentiles_of_what_lies_between_outside_and_again():
    steps = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0])
    for response, expected in (
        (-1, 0),
        (0, 0),
        (0.5, 12.5),
        (1, 50),
        (1.5, 87.5),
        (2, 100),
        (3, 100),
    ):
        assert percentile(steps, response) == expected


@pytest.mark.parametrize("sizes", [(84,), (56, 60, 57)])
def test_heatmaps_of_signals_and_volumes_are_smoothed_dimension_by_dimension(sizes):
    """By a plain sum over mirrored neighbours, at some positions."""
    torch.manual_seed(0)
    image = torch.randn(1, 2, *sizes).requires_grad_()
    weight = torch.randn(1, 2, *sizes)
    answer = (weight * image).sum()
    found = heatmap([answer.abs()[None]], image)  # half its square, so times its slope
    raw = (answer * weight * image).detach().sum(1)[0]
    width = min(sizes) / 28
    reach = math.ceil(3 * width)
    curve = [math.exp(-0.5 * (k / width) ** 2) for k in range(-reach, reach + 1)]
    for place in ([0] * len(sizes), [n // 2 for n in sizes], [n - 2 for n in sizes]):
        total = 0.0
        for steps in itertools.product(range(-reach, reach + 1), repeat=len(sizes)):
            at = [abs(p + s) for p, s in zip(place, steps, strict=True)]
            at = [2 * (n - 1) - p if p >= n else p for p, n in zip(at, sizes, strict=True)]
            share = math.prod(curve[s + reach] / sum(curve) for s in steps)
            total += share * float(raw[tuple(at)])
        assert_close(float(found[tuple(place)]), total, 1e-3)
