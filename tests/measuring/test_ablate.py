"""Causal effect: all drops against an oracle that edits weights; nothing left behind."""

import copy
import functools
import json
import math
import operator
from dataclasses import replace

import pytest
import torch
from torch import nn

import unbraid
from checks import assert_close, assert_untouched, snapshot
from structures import Around
from tiny_networks import KINDS, CallsByKeyword, SyntheticImages, WithBroken, build
from unbraid import Ablation
from unbraid.base.errors import DataError, LayerError, ModelError, UsageError
from unbraid.finding.membership import Cluster
from unbraid.measuring import results
from unbraid.measuring.replay import Replay, replaying
from unbraid.networks.weights import hash_weights

SINGLE = torch.float32


def ablate(case, **options):
    return unbraid.ablate(unbraid.apply(case.network, case.split), case.images, **options)


def expected_ablation(case, channels, members):
    labels = case.images.targets
    by_class = {t: [n for n, label in enumerate(labels) if label == t] for t in range(4)}

    def outcomes(logits):
        """The logit of the own label, and whether it is the largest, (N, 2)."""
        pairs = zip(logits, labels, strict=True)
        return torch.stack([torch.stack([z[t], (z.argmax() == t).double()]) for z, t in pairs])

    def lost(o, k, chosen):
        return differences(o, k)[chosen].mean(0).tolist()

    def differences(o, k):
        return outcomes(case.logits) - outcomes(case.logits_without(o, k))

    def by_classes(o, k):
        chosen = by_class.values()
        errors = [(differences(o, k)[n].std(0) / len(n) ** 0.5).tolist() for n in chosen]
        drops = [[*lost(o, k, n), *own] for n, own in zip(chosen, errors, strict=True)]
        return results.ClassDrops(*zip(*drops, strict=True))

    def images_of(o):
        concepts = case.split[o].concepts
        own = members or [[n for t in classes for n in by_class[t]] for classes in concepts]
        together = [n for theirs in own for n in theirs]
        return own, together, [n for n in range(len(labels)) if n not in together]

    def drops(o, k, *groups):
        return [results.Drop(len(n), *lost(o, k, n), *lost(o, None, n)) for n in groups]

    def concept(o, k):
        classes, (own, _, rest) = case.split[o].concepts[k], images_of(o)
        others = [n for other, theirs in enumerate(own) if other != k for n in theirs]
        names = ", ".join(f"class {t}" if t < 4 else str(t) for t in classes)
        losses = drops(o, k, own[k], others, rest)
        return results.ConceptAblation(classes, names, *losses, by_classes(o, k))

    def rest_channel(o):
        losses = drops(o, "rest", *images_of(o)[1:])
        return results.RestAblation(*losses, by_classes(o, "rest"))

    intact = outcomes(case.logits)
    classes = [
        results.ClassOutput(t, f"class {t}", len(chosen), *intact[chosen].mean(0).tolist())
        for t, chosen in by_class.items()
    ]
    measured = []
    for o in channels:
        concepts = tuple(concept(o, k) for k in range(len(case.split[o].concepts)))
        whole = by_classes(o, None)
        measured.append(results.ChannelAblation(o, whole, concepts, rest_channel(o)))
    return Ablation(case.layer, tuple(classes), tuple(measured))


def leaves(content, *way):
    if not isinstance(content, (dict, list, tuple)):
        yield way, content
        return
    for key in content if isinstance(content, dict) else range(len(content)):
        yield from leaves(content[key], *way, key)


def assert_ablation(result, case, channels=None, members=None):
    """Every figure is the oracle's; `members` are the images of each concept, else by labels."""
    channels = channels or [part.channel for part in case.split.channels]
    found = dict(leaves(result.to_dict()))
    expected = dict(leaves(expected_ablation(case, channels, members).to_dict()))
    assert list(found) == list(expected)
    for way, value in expected.items():
        if isinstance(value, float):
            rough = way[-1] == "part" or "error" in str(way[-2])  # a quotient, a small difference
            assert_close(found[way], value, 1e-6 if rough else 1e-9)
        else:
            assert found[way] == value


@pytest.mark.parametrize("kind", KINDS)
def test_ablate_any_layer_is_the_oracles(kind, case_of):
    for batch_size in (1, 4, 64) if kind == "reflect" else (4,):
        assert_ablation(ablate(case_of(kind), batch_size=batch_size), case_of(kind))


def test_assert_ablation_fails_on_every_wrong_figure(case):
    sound = ablate(case, channels=[1])
    assert_ablation(sound, case, channels=[1])
    content = json.loads(json.dumps(sound.to_dict()))
    for way, value in leaves(content):
        wrong = copy.deepcopy(content)
        inner = functools.reduce(operator.getitem, way[:-1], wrong)
        inner[way[-1]] = value + {str: "x", int: 1, float: 1e-3}[type(value)]
        if way[-1] != "part":  # which follows from others
            with pytest.raises((AssertionError, IndexError)):
                assert_ablation(Ablation.from_dict(wrong), case, channels=[1])
    assert_ablation(ablate(case, channels=[7, 1, 7]), case, channels=[7, 1])


def test_ablate_takes_gates_as_one_and_leaves_them_and_random_numbers_alone(case):
    changed = unbraid.apply(case.network, case.split)
    expected, state = unbraid.ablate(changed, case.images), torch.get_rng_state()
    with changed.gate("layer", 1, 0, 0.0), changed.gate("layer", 6, 1, -2.0):
        moved = list(changed.layer.moves)
        with torch.inference_mode():
            logits = changed(case.images.images)
            assert unbraid.ablate(changed, case.images) == expected
            assert torch.equal(changed(case.images.images), logits)
        assert changed.layer.moves == moved
    assert torch.equal(torch.get_rng_state(), state)


def test_ablate_uses_a_users_hook_and_an_instances_own_forward_and_puts_it_back(case):
    changed = unbraid.apply(case.network, case.split)
    row, first = torch.tensor([changed.layer.names.index("1.0")]), torch.tensor([0])
    changed.layer.concepts.register_forward_hook(lambda _m, _a, z: z.index_fill(1, row, 0.0))
    changed.layer.residuals.register_forward_hook(lambda _m, _a, z: z.index_fill(1, first, 0.0))
    one, *others = unbraid.ablate(changed, case.images).channels
    silenced, other = one.concepts
    assert silenced.own.logit == pytest.approx(0.0, abs=1e-12)
    assert one.rest_channel.concepts.logit == pytest.approx(0.0, abs=1e-12)
    for drop in (other.own, *(channel.rest_channel.concepts for channel in others)):
        assert abs(drop.logit) > 1e-6
    changed = unbraid.apply(case.network, case.split)
    plain = changed.stem.forward
    changed.stem.forward = doubled = lambda x: 2 * plain(x)
    result = unbraid.ablate(changed, case.images)
    assert changed.stem.forward is doubled
    logits = changed(case.images.images)[torch.tensor(case.images.targets) == 0, 0]
    assert_close(result.classes[0].logit, logits.mean())
    assert result != ablate(case)


def test_ablate_in_single_precision_is_close_to_the_oracle(case):
    network, images = copy.deepcopy(case.network).float(), SyntheticImages(13, seed=1, dtype=SINGLE)
    split = replace(case.split, weights=hash_weights(network))
    single = dict(leaves(unbraid.ablate(unbraid.apply(network, split), images).to_dict()))
    for way, value in leaves(ablate(case).to_dict()):
        if way[-1] != "part":  # which follows from others
            assert single[way] == pytest.approx(value, abs=1e-5, nan_ok=True)


def test_ablate_leaves_out_broken_images_when_asked(case):
    rest = SyntheticImages(13, seed=1)
    keep = [n for n in range(13) if n != 3]
    rest.images, rest.targets = rest.images[keep], [rest.targets[n] for n in keep]
    broken = replace(case, images=WithBroken(13, seed=1))
    assert_ablation(ablate(broken, skip_broken=True), replace(case, images=rest))


def test_ablate_clusters_takes_the_images_that_the_scan_tells(case, case_of):
    """Those that channel 1 answers to, by the nearer of two centres; others are no one's."""
    answers = torch.stack([z[1].mean() for z in case.truth.z])
    least = float(answers.sort().values[3]) - 1e-9
    relevance = case.truth.input_relevance[:, 1]
    centres = torch.nn.functional.normalize(relevance[[0, 1]], dim=1)
    members = [[], []]
    for n in (answers >= least).nonzero()[:, 0].tolist():
        members[int((centres @ relevance[n]).argmax())].append(n)
    assert all(members)
    part = replace(case.split[1], concepts=((4,), (5,)))
    clusters = {4 + k: Cluster(1, k, centres, least) for k in range(2)}
    clustered = replace(case, split=replace(case.split, channels=(part,), clusters=clusters))
    result = ablate(clustered, scan=case.scan, batch_size=4)
    assert_ablation(result, clustered, members=members)
    with pytest.raises(AssertionError):
        assert_ablation(result, clustered, members=members[::-1])
    assert ablate(case, scan=case.scan) == ablate(case)  # classes are told as by labels
    with pytest.raises(UsageError, match="clusters of images"):
        ablate(clustered)
    with pytest.raises(UsageError, match="other images or another layer"):
        ablate(clustered, scan=case_of("reflect", n_images=14).scan)


class Counting(nn.Module):
    n_runs = 0

    def forward(self, x):
        self.n_runs += 1
        self.seen = x
        return x * 1.0


class Body(Around):
    def __init__(self):
        super().__init__()
        self.count, self.act = Counting(), nn.ReLU(inplace=True)
        self.double()

    def forward(self, x):
        return self.head(self.body(self.act(self.count(self.stem(x)))).flatten(2).mean(2))


class AddsInPlace(Body):
    def body(self, x):
        x += self.layer(x)
        return self.act(x)


class TakesFromShelf(Body):
    """A connection by way of what a module keeps, which is gone once it was taken."""

    def body(self, x):
        return self.layer(x) + self.count.__dict__.pop("seen").mean((1, 2, 3), keepdim=True)


class DropsReturn(Body):
    """A module's work is taken from its input, not from its output."""

    def body(self, x):
        x = x - 0.2
        self.act(x)
        return self.layer(x) + x


class Pieces:
    """A kind of output that nobody knows and that cannot be copied."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, _):
        raise TypeError("no copies")


class HandsOnObjects(Body):
    """Modules before the layer give dictionaries, and objects of the network's own."""

    def __init__(self):
        super().__init__()
        self.wrap = nn.Module()
        self.wrap.forward = lambda x: Pieces({"x": (x, [None, 3])})

    def body(self, x):
        x = self.wrap(x).x["x"][0]
        x += 0.5
        return self.layer(x) + x


class WritesWhenOff(Body):
    def body(self, x):
        z = self.layer(x)
        if not z[:, 1].any():
            x += 0.3
        return (z + x).relu_()


class RunsInside(Body):
    """The layer runs inside a module that does not own it."""

    def body(self, x):
        runner = nn.Module()
        runner.forward = lambda x: self.act(self.layer(x.clone()))
        return runner(x)


class SharesParts(Body):
    """One module runs within another before the layer, twice by itself, and behind it."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.act, self.act)

    def body(self, x):
        x = self.act(self.block(x - 0.2) - 0.2)
        return self.act(self.layer(x) + x)


IN_FULL = [TakesFromShelf, WritesWhenOff, DropsReturn]  # since they pass values past modules
SHORTENED = [Body, AddsInPlace, RunsInside, SharesParts, HandsOnObjects]


@pytest.mark.parametrize("kind", IN_FULL + SHORTENED)
def test_ablate_networks_of_any_code_runs_what_lies_before_once(kind, case_of, monkeypatch):
    case = case_of(kind())
    changed = unbraid.apply(case.network, case.split)
    changed.count.n_runs = 0
    # One image a batch, as the oracle has it; WritesWhenOff looks at the whole batch.
    result = unbraid.ablate(changed, case.images, batch_size=1)
    is_known = kind in SHORTENED
    at_most = len(case.images) + 1  # once more where it is found out what is written into
    assert (changed.count.n_runs <= at_most) == is_known
    assert_ablation(result, case)
    network, images = case.network, SyntheticImages(3, seed=5).images
    expected = network(images)
    with torch.no_grad(), replaying(network, network.layer) as replay:
        logits, output = replay.first(images)
        assert torch.equal(logits, expected)
        for channel in (1, 0, 1, 2):  # to the last bit what a hook of torch's own gives
            given = output.index_fill(1, torch.tensor([channel]), 0.0)
            hooked = kind()
            hooked.load_state_dict(network.state_dict())
            hooked.layer.register_forward_hook(lambda *_, given=given: given)
            assert torch.equal(replay.again(images, given.clone()), hooked(images))
    assert torch.equal(network(images), expected)
    monkeypatch.setattr(Replay, "_try", lambda replay, *_: setattr(replay, "_shortened", False))
    assert unbraid.ablate(changed, case.images, batch_size=1) == result
    assert changed.count.n_runs > 2 * at_most


class Encoder(nn.Module):
    """torch's own transformer, which in eval mode reads the weights of its layers past them."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, stride=2), nn.Linear(8, 4)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


def test_ablate_in_torchs_transformer_or_by_keyword_is_the_oracles_and_of_two_runs_refused(case_of):
    case = case_of(Encoder().double().eval(), layer="blocks.layers.1.linear1")
    assert_ablation(ablate(case), case)
    case = case_of(CallsByKeyword(build("1x1")))
    assert_ablation(ablate(case), case)
    case = case_of(Body())
    network = copy.deepcopy(case.network)
    network.body = lambda x: network.layer(network.layer(x)).relu_()
    with pytest.raises(LayerError, match="runs 2 times"):
        ablate(replace(case, network=network))


def spoilt(image=0.0, label=0):
    dataset = SyntheticImages(5)
    dataset.images[4, 0, 0, 0], dataset.targets[4] = image, label
    return dataset


def test_ablate_leaves_the_network_as_it_was_also_where_it_fails(case_of):
    for dataset, error, told in (
        (SyntheticImages(0), UsageError, "holds no image"),
        (spoilt(image=math.nan), ModelError, "Image 4 .*NaN"),
        (WithBroken(5), DataError, r"Image 3 .*picture-3\.jpg"),
        (spoilt(label=-1), DataError, "Image 4 has label -1"),
        (spoilt(label=4), DataError, "Image 4 has label 4, but the network has 4 outputs; labels"),
    ):
        network = copy.deepcopy(case_of("batch norm behind").network).train()
        network.stem_norm.eval()
        network.stem.weight.requires_grad_(False)
        changed = unbraid.apply(network, case_of("batch norm behind").split)
        changed.gate("layer", 1, 0, 0.5)
        changed.stem_norm.forward = changed.stem_norm.forward

        def everything(changed=changed):
            own = [sorted(vars(module)) for module in changed.modules()]
            snapped = snapshot(changed)
            return {**snapped, "hooks": [snapped["hooks"], list(changed.layer.moves), own]}

        before = everything()
        unbraid.ablate(changed, SyntheticImages(5), batch_size=2)
        assert_untouched(before, everything())
        with pytest.raises(error, match=told):
            unbraid.ablate(changed, dataset, batch_size=2)
        assert_untouched(before, everything())
        changed.gate("layer", 1, 0, 0.5)
        with pytest.raises(AssertionError):
            assert_untouched(before, everything())


def test_ablate_networks_and_channels_that_do_not_fit_are_refused(case):
    changed = unbraid.apply(case.network, case.split)
    plain = unbraid.apply(case.network, case.split, form="plain")
    for network, channels, told in (
        (plain, None, "no concept channels"),
        (changed, [1, 5], "names 5, which is not split; .* are 1, 6, 7"),
        (changed, [], "channels is empty"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.ablate(network, case.images, channels=channels)
    nothing = WithBroken(1)
    nothing.broken = [0]
    with pytest.raises(DataError, match="No image could be read"):
        unbraid.ablate(changed, nothing, skip_broken=True)
