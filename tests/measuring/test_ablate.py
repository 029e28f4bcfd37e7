"""Causal effect: all drops against an oracle that edits weights; nothing left behind."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbraid
from checks import assert_close, assert_untouched, snapshot, truth_of
from tiny_networks import KINDS, CallsByKeyword, SyntheticImages, WithBroken, build
from unbraid import Ablation
from unbraid.base.errors import DataError, LayerError, ModelError, UsageError
from unbraid.finding.membership import Cluster


def ablate(case: Any, **options: Any) -> Ablation:
    return unbraid.ablate(unbraid.apply(case.network, case.split), case.images, **options)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def assert_ablation(
    result: Ablation,
    case: Any,
    channels: Sequence[int] | None = None,
    members: Sequence[list[int]] | None = None,
    skipped: Sequence[int] = (),
) -> None:
    """Every figure is that of networks whose weights were edited, run image by image.

    Images belong to concepts by their labels, or else `members` lists those of each concept.
    """
    images = [n for n in range(len(case.images)) if n not in skipped]
    labels = case.images.targets
    with torch.no_grad():
        network = copy.deepcopy(case.network).double().eval()
        intact = [network(image.double()[None])[0] for image in case.images.images]

    def outcome(logits: Sequence[Tensor], chosen: Sequence[int]) -> tuple[float, float]:
        """Mean logit of the own label, and accuracy, over some images."""
        return (
            mean([float(logits[n][labels[n]]) for n in chosen]),
            mean([float(int(logits[n].argmax()) == labels[n]) for n in chosen]),
        )

    def lost(o: int, k: int | None, chosen: Sequence[int]) -> tuple[float, float]:
        before, after = outcome(intact, chosen), outcome(case.logits_without(o, k), chosen)
        return before[0] - after[0], before[1] - after[1]

    assert result.layer == case.layer
    classes = sorted({labels[n] for n in images})
    assert [entry.label for entry in result.classes] == classes
    by_class = [[n for n in images if labels[n] == t] for t in classes]
    for entry, chosen in zip(result.classes, by_class, strict=True):
        assert (entry.n_images, entry.name) == (len(chosen), f"class {entry.label}")
        assert_close((entry.logit, entry.accuracy), outcome(intact, chosen))
    split_channels = [part.channel for part in case.split.channels]
    assert [c.channel for c in result.channels] == list(channels or split_channels)
    for channel in result.channels:
        o, part = channel.channel, case.split[channel.channel]

        def assert_classes(drops: Any, k: int | None, o: int = o) -> None:
            expected = [lost(o, k, chosen) for chosen in by_class]
            assert_close((drops.logit, drops.accuracy), list(zip(*expected, strict=True)))

        assert_classes(channel.whole, None)
        own = members or [[n for n in images if labels[n] in classes] for classes in part.concepts]
        assert [c.classes for c in channel.concepts] == list(part.concepts)
        for k, concept in enumerate(channel.concepts):
            if members is None:
                assert concept.name == ", ".join(f"class {t}" for t in part.concepts[k])
            assert_classes(concept.by_class, k)
            others = [n for other, theirs in enumerate(own) if other != k for n in theirs]
            rest = [n for n in images if n not in own[k] and n not in others]
            groups = ((concept.own, own[k]), (concept.others, others), (concept.rest, rest))
            for drop, chosen in groups:
                assert drop.n_images == len(chosen)
                alone, whole = lost(o, k, chosen), lost(o, None, chosen)
                assert_close((drop.logit, drop.accuracy), alone)
                assert_close((drop.whole_logit, drop.whole_accuracy), whole)
                assert_close(drop.part, alone[0] / whole[0] if whole[0] else math.nan)


@pytest.mark.parametrize(
    ("kind", "batch_size"), [*((kind, 4) for kind in KINDS), ("reflect", 1), ("reflect", 64)]
)
def test_ablate_any_layer_is_the_oracles(kind, batch_size, case_of):
    assert_ablation(ablate(case_of(kind), batch_size=batch_size), case_of(kind))


def leaves(content: Any, *way: Any) -> Iterator[tuple[Any, ...]]:
    """The ways to all figures and names of nested lists and dictionaries."""
    if isinstance(content, dict):
        content.pop("part", None)  # follows from the others
    elif not isinstance(content, list):
        yield way
        return
    for key in content if isinstance(content, dict) else range(len(content)):
        yield from leaves(content[key], *way, key)


def test_assert_ablation_fails_on_every_wrong_figure(case):
    sound = ablate(case, channels=[1])
    assert_ablation(sound, case, channels=[1])
    drops = [c.own for c in sound.channels[0].concepts]
    assert max(abs(drop.logit) for drop in drops) > 0.001
    assert all(c.rest.n_images for c in sound.channels[0].concepts)
    content = json.loads(json.dumps(sound.to_dict()))
    for way in leaves(content):
        wrong = copy.deepcopy(content)
        inner = functools.reduce(operator.getitem, way[:-1], wrong)
        value = inner[way[-1]]
        inner[way[-1]] = value + {str: "x", int: 1, float: 1e-3}[type(value)]
        with pytest.raises((AssertionError, ValueError)):
            assert_ablation(Ablation.from_dict(wrong), case, channels=[1])
    (channel,) = sound.channels
    for channels in ((), (replace(channel, concepts=channel.concepts[::-1]),)):
        with pytest.raises((AssertionError, ValueError)):
            assert_ablation(replace(sound, channels=channels), case, channels=[1])


def test_ablate_some_channels_gives_those_in_that_order(case):
    result = ablate(case, channels=[7, 1, 7])
    assert_ablation(result, case, channels=[7, 1])
    known = {channel.channel: channel for channel in ablate(case).channels}
    assert result.channels == (known[7], known[1])


def test_ablate_a_concept_channel_does_what_its_gate_at_zero_does(case):
    changed = unbraid.apply(case.network, case.split)
    labels = torch.tensor(case.images.targets)
    with torch.no_grad():
        before = changed(case.images.images).gather(1, labels[:, None])
        for channel in unbraid.ablate(changed, case.images).channels:
            for k, concept in enumerate(channel.concepts):
                with changed.gate("layer", channel.channel, k, 0.0):
                    after = changed(case.images.images).gather(1, labels[:, None])
                own = torch.isin(labels, torch.tensor(concept.classes))
                assert_close(concept.own.logit, (before - after)[own].mean())


def test_ablate_takes_gates_as_one_and_leaves_them_and_random_numbers_alone(case):
    changed = unbraid.apply(case.network, case.split)
    expected, state = unbraid.ablate(changed, case.images), torch.get_rng_state()
    with changed.gate("layer", 1, 0, 0.3), changed.gate("layer", 6, 1, -2.0):
        moved = list(changed.layer.moves)
        with torch.inference_mode():
            logits = changed(case.images.images)
            assert unbraid.ablate(changed, case.images) == expected
            assert torch.equal(changed(case.images.images), logits)
        assert changed.layer.moves == moved
    assert torch.equal(torch.get_rng_state(), state)


def test_ablate_switches_off_what_a_hook_makes_of_a_concept_channel(case):
    changed = unbraid.apply(case.network, case.split)
    row = torch.tensor([changed.layer.names.index("1.0")])
    changed.layer.concepts.register_forward_hook(lambda *args: args[-1].index_fill(1, row, 0.0))
    (entry,) = unbraid.ablate(changed, case.images, channels=[1]).channels
    assert entry.concepts[0].own.logit == pytest.approx(0.0, abs=1e-12)
    assert abs(entry.concepts[1].own.logit) > 1e-6


def test_ablate_uses_a_forward_of_an_instances_own_and_puts_it_back(case):
    changed = unbraid.apply(case.network, case.split)
    plain = changed.stem.forward
    changed.stem.forward = doubled = lambda x: 2 * plain(x)
    result = unbraid.ablate(changed, case.images)
    assert changed.stem.forward is doubled
    with torch.no_grad():
        logits = changed(case.images.images)
    own = [float(logits[n, 0]) for n, label in enumerate(case.images.targets) if label == 0]
    assert_close(result.classes[0].logit, mean(own))


# --- concepts that are clusters of images ---------------------------------------------------------


def test_ablate_clusters_takes_the_images_that_the_scan_tells(case, case_of):
    """Those that channel 1 answers to, by the nearer of two centres; others are no one's."""
    truth = truth_of(case.network, case.images)
    answers = torch.stack([z[1].mean() for z in truth.z])
    least = float(answers.sort().values[3]) - 1e-9
    relevance = truth.input_relevance[:, 1]
    centres = torch.nn.functional.normalize(relevance[[0, 1]], dim=1)
    members: list[list[int]] = [[], []]
    for n in (answers >= least).nonzero()[:, 0].tolist():
        members[int((centres @ relevance[n]).argmax())].append(n)
    assert all(members)
    assert sum(map(len, members)) == len(answers) - 3
    part = replace(case.split[1], concepts=((4,), (5,)))
    clusters = {4 + k: Cluster(1, k, centres, least) for k in range(2)}
    clustered = replace(case, split=replace(case.split, channels=(part,), clusters=clusters))
    result = ablate(clustered, scan=case.scan, batch_size=4)
    assert_ablation(result, clustered, members=members)
    with pytest.raises(AssertionError):
        assert_ablation(result, clustered, members=members[::-1])
    assert ablate(case, scan=case.scan) == ablate(case)  # classes are told as by labels
    for scan, told in (
        (None, "clusters of images"),
        (case_of("reflect", n_images=14).scan, "other images or another layer"),
        (case_of("1x1").scan, "other images or another layer"),
    ):
        with pytest.raises(UsageError, match=told):
            ablate(clustered, scan=scan)


# --- networks of every kind of code ---------------------------------------------------------------


class Counting(nn.Module):
    """Counts how often it runs, and gives what it gets."""

    n_runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_runs += 1
        return x * 1.0


class Body(nn.Module):
    """A stem that counts, a 1x1 layer, a head; the rest is for those made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.stem = Counting(), nn.Conv2d(3, 6, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.layer, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.double()

    def before(self, x: Tensor) -> Tensor:
        return self.act(self.stem(self.count(x)))

    def behind(self, x: Tensor) -> Tensor:
        return self.head(self.act(x).flatten(2).mean(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.before(x)))


class AddsInPlace(Body):
    """What a module before the layer put out is written into behind it."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x += self.layer(x)
        return self.behind(x)


class DropsReturn(Body):
    """A module's work is taken from its input, not from its output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.count(x))
        self.act(x)
        return self.behind(self.layer(x) + x)


class Keeps(nn.Module):
    """Puts what it gets on a shelf too."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shelf.append(x)
        return x


class TakesFromShelf(Body):
    """A skip connection by way of a list that a module fills and the code behind empties."""

    def __init__(self) -> None:
        super().__init__()
        self.keeps = Keeps()

    def forward(self, x: Tensor) -> Tensor:
        x = self.keeps(self.before(x))
        return self.behind(self.layer(x) + self.keeps.shelf.pop())


class HandsOnObjects(Body):
    """A module before the layer gives a dictionary, and its tensor is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = nn.Identity()
        self.wrap.forward = lambda x, *, name: {name: (x, [None, 3])}

    def forward(self, x: Tensor) -> Tensor:
        x = self.wrap(self.before(x), name="x")["x"][0]
        x += 0.5
        return self.behind(self.layer(x) + x)


class WritesWhenOff(Body):
    """Writes into what came before the layer, but only where channel 1 is zero."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        z = self.layer(x)
        if not z[:, 1].any():
            x += 0.3
        return self.behind(z + x)


class SharesParts(Body):
    """One module runs within another before the layer, twice by itself, and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.stem, self.act)

    def before(self, x: Tensor) -> Tensor:
        return self.act(self.act(self.block(self.count(x)) - 0.5) - 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.behind(self.layer(x) + x)


class Runner(nn.Module):
    def __init__(self, owner: Body) -> None:
        super().__init__()
        self.owner = [owner]  # in a list, so that it is no part of this module

    def forward(self, x: Tensor) -> Tensor:
        return self.owner[0].layer(self.owner[0].act(x.clone()))


class RunsInside(Body):
    """The layer runs inside a module that does not own it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = Runner(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.runner(self.stem(self.count(x))))


class Encoder(Body):
    """torch's own transformer, which in eval mode reads the weights of its layers past them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(self.count(x)).flatten(2).mT).mean(1))


class RunsTwice(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.layer(self.before(x))))


class NeverRuns(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.before(x))


@pytest.mark.parametrize(
    ("kind", "layer", "shortened"),
    [
        (Body, "layer", True),
        (AddsInPlace, "layer", True),
        (DropsReturn, "layer", False),
        (TakesFromShelf, "layer", False),
        (HandsOnObjects, "layer", True),
        (WritesWhenOff, "layer", False),
        (SharesParts, "layer", True),
        (RunsInside, "layer", True),
        (Encoder, "blocks.layers.1.linear1", True),
    ],
)
def test_ablate_networks_of_any_code_runs_what_lies_before_the_layer_once_a_batch(
    kind, layer, shortened, case_of
):
    case = case_of(kind(), layer=layer)
    changed = unbraid.apply(case.network, case.split)
    changed.count.n_runs = 0
    # One image a batch, as the oracle has it; WritesWhenOff looks at the whole batch.
    result = unbraid.ablate(changed, case.images, batch_size=1)
    assert (changed.count.n_runs == len(case.images)) == shortened
    assert_ablation(result, case)


def test_ablate_a_layer_called_by_keyword_is_the_oracles(case_of):
    case = case_of(CallsByKeyword(build("1x1")))
    assert_ablation(ablate(case), case)


@pytest.mark.parametrize(("kind", "n_times"), [(RunsTwice, 2), (NeverRuns, 0)])
def test_ablate_a_layer_that_does_not_run_once_is_refused(kind, n_times, case_of):
    case, network = case_of("1x1"), kind()
    case = case_of(Body())
    network.load_state_dict(case.network.state_dict())
    with pytest.raises(LayerError, match=f"runs {n_times} times"):
        ablate(replace(case, network=network))


# --- what is left behind, and what is refused -----------------------------------------------------


def everything(network: nn.Module) -> dict[str, Any]:
    own = [sorted(vars(module)) for module in network.modules()]
    snapped = snapshot(network)
    return {**snapped, "hooks": [snapped["hooks"], list(network.layer.moves), own]}


def spoilt(image: float = 0.0, label: int = 0, **options: Any) -> SyntheticImages:
    dataset = SyntheticImages(5, **options)
    dataset.images[4, 0, 0, 0], dataset.targets[4] = image, label
    return dataset


@pytest.mark.parametrize(
    ("dataset", "error", "told"),
    [
        (SyntheticImages(5), None, ""),
        (WithBroken(5), DataError, r"Image 3 .*picture-3\.jpg"),
        (spoilt(image=math.nan), ModelError, "Image 4 .*NaN"),
        (spoilt(label=4), DataError, "Image 4 has label 4, but the network has 4 outputs; labels"),
        (spoilt(label=-1), DataError, "Image 4 has label -1"),
        (spoilt(size=(1, 7, 6)), ModelError, r"shape \(1, 7, 6\)"),
    ],
)
def test_ablate_leaves_the_network_as_it_was(dataset, error, told, case_of):
    case = case_of("batch norm behind")
    network = copy.deepcopy(case.network).train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    changed = unbraid.apply(network, case.split)
    changed.gate("layer", 1, 0, 0.5)
    changed.stem_norm.forward = changed.stem_norm.forward
    before = everything(changed)
    if error is None:
        unbraid.ablate(changed, dataset, batch_size=2)
    else:
        with pytest.raises(error, match=told):
            unbraid.ablate(changed, dataset, batch_size=2)
    assert_untouched(before, everything(changed))
    disturbances: list[Callable[[], Any]] = [
        lambda: changed.gate("layer", 1, 0, 0.5),
        lambda: setattr(changed.stem, "forward", changed.stem.forward),
    ]
    for disturb in disturbances:
        before = everything(changed)
        disturb()
        with pytest.raises(AssertionError):
            assert_untouched(before, everything(changed))


def test_ablate_leaves_out_broken_images_when_asked(case):
    broken = WithBroken(13, seed=1)
    assert_ablation(ablate(replace(case, images=broken), skip_broken=True), case, skipped=[3])
    broken.broken = range(13)
    with pytest.raises(DataError, match="No image could be read"):
        ablate(replace(case, images=broken), skip_broken=True, batch_size=1)


def test_ablate_networks_and_channels_that_do_not_fit_are_refused(case):
    changed = unbraid.apply(case.network, case.split)
    plain = unbraid.apply(case.network, case.split, form="plain")
    both = nn.ModuleList([changed, copy.deepcopy(changed)])
    for network, options, told in (
        (case.network, {}, "no concept channels"),
        (plain, {}, "no concept channels"),
        (both, {}, r"Several .* name one of '0.layer', '1.layer'"),
        (both, {"layer": "1.stem"}, r"'1.stem' is not split; name one of '0.layer', '1.layer'"),
        (changed, {"channels": [1, 5]}, "names 5, which is not split; .* are 1, 6, 7"),
        (changed, {"channels": []}, "channels is empty"),
    ):
        with pytest.raises(UsageError, match=told):
            unbraid.ablate(network, case.images, **options)
