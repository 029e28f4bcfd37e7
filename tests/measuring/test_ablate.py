"""Causal effect: all drops against an oracle that edits weights; nothing left behind."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import unbraid
from checks import assert_close, assert_untouched, snapshot, truth_of
from tiny_networks import (
    KINDS,
    CallsByKeyword,
    OverwritesInput,
    SyntheticImages,
    WithBroken,
    build,
)
from unbraid import Ablation, Split
from unbraid.base.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.finding.membership import Cluster
from unbraid.measuring.ablate import replaying
from unbraid.measuring.results import Drop, read_ablation

CHANNELS = {1: [[0], [1]], 0: [[2, 0], [3]], 3: [[3], [1], [0, 2]]}


def make_split(network: nn.Module, folder: Path, layer: str = "layer") -> Split:
    """A split with masks of all sizes between 0 and 1, as least squares gives."""
    dtype = next(network.parameters()).dtype
    scan = unbraid.scan(network, layer, SyntheticImages(8, dtype=dtype), folder)
    found = unbraid.find(scan, channels=CHANNELS)
    split = unbraid.split(scan, found, method="published", rho=0.7)
    generator = torch.Generator().manual_seed(3)
    masks = [
        torch.rand(part.masks.shape, generator=generator).to(part.masks) for part in split.channels
    ]
    parts = zip(split.channels, masks, strict=True)
    return replace(split, channels=tuple(replace(part, masks=m) for part, m in parts))


@dataclass
class Case:
    network: nn.Module
    split: Split
    layer: str
    images: SyntheticImages

    def ablate(self, **options: Any) -> Ablation:
        return unbraid.ablate(unbraid.apply(self.network, self.split), self.images, **options)


def make_case(network: nn.Module, folder: Path, layer: str = "layer") -> Case:
    return Case(network, make_split(network, folder, layer), layer, SyntheticImages(11, seed=5))


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    return make_case(build("3x3"), tmp_path_factory.mktemp("case"))


# --- against the oracle ---------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def assert_ablation(
    result: Ablation,
    case: Case,
    channels: Sequence[int] | None = None,
    members: Sequence[list[int]] | None = None,
) -> None:
    """Every figure is that of networks whose weights were edited, run image by image.

    Images belong to concepts by their labels, or else `members` lists those of each concept.
    """
    images = [case.images[n] for n in range(len(case.images))]
    with torch.no_grad():
        network = copy.deepcopy(case.network).double().eval()
        intact = [network(image.double()[None])[0] for image, _ in images]

    def outcome(logits: Sequence[Tensor], chosen: Sequence[int]) -> tuple[float, float]:
        """Mean target logit and accuracy over some images."""
        targets = [float(logits[n][images[n][1]]) for n in chosen]
        hits = [float(int(logits[n].argmax()) == images[n][1]) for n in chosen]
        return mean(targets), mean(hits)

    def lost(o: int, row: Tensor | None, chosen: Sequence[int]) -> tuple[float, float]:
        key = (o, None if row is None else tuple(row.tolist()))
        if key not in known:
            known[key] = [
                oracle.ablated_logits(case.network, case.layer, image, o, row)
                for image, _ in images
            ]
        before, after = outcome(intact, chosen), outcome(known[key], chosen)
        return before[0] - after[0], before[1] - after[1]

    known: dict[Any, list[Tensor]] = {}
    labels = [label for _, label in images]
    assert [entry.label for entry in result.classes] == sorted(set(labels))
    by_class = [[n for n, label in enumerate(labels) if label == t] for t in sorted(set(labels))]
    for entry, chosen in zip(result.classes, by_class, strict=True):
        assert entry.n_images == len(chosen)
        assert entry.name == f"class {entry.label}"
        assert_close((entry.logit, entry.accuracy), outcome(intact, chosen))
    parts = {part.channel: part for part in case.split.channels}
    assert [c.channel for c in result.channels] == list(parts if channels is None else channels)
    for channel in result.channels:
        o, part = channel.channel, parts[channel.channel]
        drops = [lost(o, None, chosen) for chosen in by_class]
        assert_close((channel.whole.logit, channel.whole.accuracy), list(zip(*drops, strict=True)))
        by_label = [[n for n, t in enumerate(labels) if t in concept] for concept in part.concepts]
        own = by_label if members is None else members
        assert [c.classes for c in channel.concepts] == list(part.concepts)
        for k, concept in enumerate(channel.concepts):
            row = part.rows[k]
            drops = [lost(o, row, chosen) for chosen in by_class]
            measured = (concept.by_class.logit, concept.by_class.accuracy)
            assert_close(measured, list(zip(*drops, strict=True)))
            if members is None:
                assert concept.name == ", ".join(f"class {t}" for t in part.concepts[k])
            others = [n for other, theirs in enumerate(own) if other != k for n in theirs]
            rest = [n for n in range(len(images)) if n not in own[k] and n not in others]
            groups = ((concept.own, own[k]), (concept.others, others), (concept.rest, rest))
            for drop, chosen in groups:
                assert drop.n_images == len(chosen)
                alone, whole = lost(o, row, chosen), lost(o, None, chosen)
                assert_close((drop.logit, drop.accuracy), alone)
                assert_close((drop.whole_logit, drop.whole_accuracy), whole)
                assert_close(drop.part, alone[0] / whole[0] if whole[0] else math.nan)


@pytest.mark.parametrize("kind", KINDS)
def test_all_drops_are_the_oracles(kind, tmp_path):
    case = make_case(build(kind), tmp_path)
    assert_ablation(case.ablate(batch_size=4), case)


def test_images_of_no_concept_are_the_rest_and_something_is_lost_and_gained(case):
    """Else the oracle would be right of anything."""
    result = case.ablate()
    assert_ablation(result, case)
    assert {c.rest.n_images for c in result.channels[0].concepts} != {0}
    drops = [c.own for channel in result.channels for c in channel.concepts]
    assert max(drop.logit for drop in drops) > 0.01
    assert min(drop.logit for drop in drops) < -0.001
    assert any(drop.accuracy != 0 for drop in drops) or any(d.whole_accuracy for d in drops)


def nudged(values: Any) -> Any:
    """One figure of several, or the only one, a little larger."""
    return (*values[:-1], values[-1] + 1e-3) if isinstance(values, tuple) else values + 1e-3


def corrupted(result: Ablation, *path: str) -> Ablation:
    """One wrong figure, in the first channel, concept or class that a path leads to."""

    def change(part: Any, name: str, *rest: str) -> Any:
        value = getattr(part, name)
        if not rest:
            return replace(part, **{name: nudged(value)})
        if isinstance(value, tuple):
            return replace(part, **{name: (change(value[0], *rest), *value[1:])})
        return replace(part, **{name: change(value, *rest)})

    return change(result, *path)


CONCEPT = ("channels", "concepts")
PATHS = [
    *((*CONCEPT, *pair) for pair in product(("own", "others", "rest"), Drop.__annotations__)),
    *((*CONCEPT, "by_class", figure) for figure in ("logit", "accuracy")),
    *(("channels", "whole", figure) for figure in ("logit", "accuracy")),
    *(("classes", figure) for figure in ("logit", "accuracy")),
]


def swapped(result: Ablation) -> Ablation:
    channels = tuple(replace(c, concepts=c.concepts[::-1]) for c in result.channels)
    return replace(result, channels=channels)


def first_changed(result: Ablation, **fields: Callable[[Any], Any]) -> Ablation:
    first, *rest = result.channels
    concept = first.concepts[0]
    changed = replace(concept, **{name: make(concept) for name, make in fields.items()})
    channel = replace(first, concepts=(changed, *first.concepts[1:]))
    return replace(result, channels=(channel, *rest))


CORRUPTIONS: list[Callable[[Ablation], Ablation]] = [
    *(partial(lambda path, result: corrupted(result, *path), path) for path in PATHS),
    swapped,
    lambda result: first_changed(result, name=lambda _: "other"),
    lambda result: first_changed(result, own=lambda c: c.others, others=lambda c: c.own),
    lambda result: replace(result, channels=result.channels[1:]),
    lambda result: replace(result, classes=result.classes[1:]),
]


def test_the_check_sees_a_wrong_figure(case):
    sound = case.ablate()
    assert_ablation(sound, case)
    for corrupt in CORRUPTIONS:
        with pytest.raises((AssertionError, ValueError)):
            assert_ablation(corrupt(sound), case)


# --- by gates, and in other ways the same ---------------------------------------------------------


def test_a_concept_channel_off_is_its_gate_at_zero(case):
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


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_of_all_sizes_give_the_same(batch_size, case):
    assert_ablation(case.ablate(batch_size=batch_size), case)


def test_networks_of_single_precision_are_close_to_the_oracle(tmp_path):
    network = build("3x3", torch.float32)
    image = SyntheticImages(1, seed=5, dtype=torch.float32)
    case = Case(network, make_split(network, tmp_path), "layer", image)
    single = case.ablate(channels=[1]).channels[0].concepts[0]
    logits = oracle.ablated_logits(network, "layer", image[0][0], 1, case.split[1].rows[0])
    before = copy.deepcopy(network).double()(image[0][0].double()[None])[0]
    lost = (before - logits)[image[0][1]]
    assert_close(single.own.logit, lost, 1e-5)


def test_only_the_channels_asked_for_are_switched_off_in_that_order(case):
    result = case.ablate(channels=[3, 1, 3])
    assert_ablation(result, case, channels=[3, 1])
    whole = {channel.channel: channel for channel in case.ablate().channels}
    assert result.channels == (whole[3], whole[1])


def test_gates_that_are_moved_count_as_one_and_stay_moved(case):
    changed = unbraid.apply(case.network, case.split)
    expected = unbraid.ablate(changed, case.images)
    with changed.gate("layer", 1, 0, 0.3), changed.gate("layer", 0, 1, -2.0):
        moved = list(changed.layer.moves)
        logits = changed(case.images.images)
        assert unbraid.ablate(changed, case.images) == expected
        assert changed.layer.moves == moved
        assert torch.equal(changed(case.images.images), logits)


def test_what_a_hook_makes_of_a_concept_channel_is_what_is_switched_off(case):
    changed = unbraid.apply(case.network, case.split)
    row = changed.layer.names.index("1.0")
    changed.layer.concepts.register_forward_hook(
        lambda _module, _args, output: output.index_fill(1, torch.tensor([row]), 0.0)
    )
    entry = {c.channel: c for c in unbraid.ablate(changed, case.images).channels}[1]
    assert entry.concepts[0].own.logit == pytest.approx(0.0, abs=1e-12)
    assert abs(entry.concepts[1].own.logit) > 1e-6


def test_it_works_in_inference_mode_and_leaves_random_numbers_alone(case):
    changed = unbraid.apply(case.network, case.split)
    state = torch.get_rng_state()
    with torch.inference_mode():
        result = unbraid.ablate(changed, case.images)
    assert torch.equal(torch.get_rng_state(), state)
    assert result == case.ablate()


# --- concepts that are clusters of images ---------------------------------------------------------


@dataclass
class Clustered:
    case: Case
    scan: unbraid.Scan  # of the images that channels are switched off for
    members: list[list[int]]  # of each concept of channel 1


@pytest.fixture(scope="module")
def clustered(case, tmp_path_factory) -> Clustered:
    """The images that channel 1 answers to, by the nearer of two centres; others are no one's."""
    scan = unbraid.scan(case.network, "layer", case.images, tmp_path_factory.mktemp("clustered"))
    truth = truth_of(case.network, case.images)
    answers = torch.stack([z[1].mean() for z in truth.z])
    least = float(answers.sort().values[3])
    relevance = truth.input_relevance[:, 1]
    centres = torch.nn.functional.normalize(relevance[[0, 1]], dim=1)
    members: list[list[int]] = [[], []]
    for n in range(len(answers)):
        if answers[n] >= least - 1e-9:
            near = [float(relevance[n] @ centre) for centre in centres]
            members[near.index(max(near))].append(n)
    part = replace(case.split[1], concepts=((4,), (5,)))
    clusters = {4 + k: Cluster(1, k, centres, least - 1e-9) for k in range(2)}
    split = replace(case.split, channels=(part,), clusters=clusters)
    return Clustered(replace(case, split=split), scan, members)


def test_the_images_of_clusters_are_those_that_the_scan_tells(clustered):
    assert all(clustered.members)
    assert sum(map(len, clustered.members)) == len(clustered.case.images) - 3
    result = clustered.case.ablate(scan=clustered.scan, batch_size=4)
    assert_ablation(result, clustered.case, members=clustered.members)
    with pytest.raises(AssertionError):
        assert_ablation(result, clustered.case, members=clustered.members[::-1])


def test_a_scan_tells_the_images_of_classes_as_labels_do(case, clustered):
    assert case.ablate(scan=clustered.scan) == case.ablate()


def test_scans_that_do_not_fit_are_refused(clustered, tmp_path):
    case = clustered.case
    fewer = unbraid.scan(case.network, "layer", SyntheticImages(5), tmp_path / "fewer")
    stem = unbraid.scan(case.network, "stem", case.images, tmp_path / "stem")
    with pytest.raises(UsageError, match="clusters of images"):
        case.ablate()
    for scan in (fewer, stem):
        with pytest.raises(UsageError, match="other images or another layer"):
            case.ablate(scan=scan)


# --- networks of every kind of code ---------------------------------------------------------------


class Counting(nn.Module):
    """Counts how often it runs, and gives what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.n_runs = 0

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


class Pushes(nn.Module):
    def __init__(self, shelf: list[Tensor]) -> None:
        super().__init__()
        self.shelf = shelf

    def forward(self, x: Tensor) -> Tensor:
        self.shelf.append(x)
        return x


class TakesFromShelf(Body):
    """Skip connections by way of a list that modules fill and the code behind empties."""

    def __init__(self) -> None:
        super().__init__()
        self.push = Pushes([])

    def forward(self, x: Tensor) -> Tensor:
        x = self.push(self.before(x))
        return self.behind(self.layer(x) + self.push.shelf.pop())


class Pieces:
    """A kind of output that nobody knows and that cannot be copied."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __deepcopy__(self, _: Any) -> Pieces:
        raise TypeError("no copies")


class Wraps(nn.Module):
    def forward(self, x: Tensor, kind: str) -> Any:
        return {"pieces": Pieces, "dict": lambda x: {"x": (x, [None, 3])}}[kind](x)


class HandsOnObjects(Body):
    """Modules before the layer give dictionaries, and objects of the network's own."""

    def __init__(self) -> None:
        super().__init__()
        self.wrap = Wraps()

    def forward(self, x: Tensor) -> Tensor:
        x = self.wrap(self.before(x), kind="pieces").x
        x = self.wrap(x, kind="dict")["x"][0]
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


class RunsInside(Body):
    """The layer runs inside a module that does not own it."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = Runner()
        self.runner.owners.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.runner(self.stem(self.count(x))))


class Runner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.owners: list[Body] = []

    def forward(self, x: Tensor) -> Tensor:
        (owner,) = self.owners
        return owner.layer(owner.act(x.clone()))


SHORTENED = {
    Body: True,
    AddsInPlace: True,
    DropsReturn: False,
    TakesFromShelf: False,
    HandsOnObjects: True,
    WritesWhenOff: False,
    SharesParts: True,
    RunsInside: True,
    OverwritesInput: True,
}


@pytest.mark.parametrize("kind", SHORTENED)
def test_networks_of_any_code_are_ablated_rightly(kind, tmp_path):
    case = make_case(kind(), tmp_path)
    # One image a batch, as the oracle has it; WritesWhenOff looks at the whole batch.
    assert_ablation(case.ablate(batch_size=1), case)


class Encoder(nn.Module):
    """torch's own transformer, which in eval mode reads the weights of its layers past them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 2, stride=2)
        block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


def test_a_layer_by_keyword_and_torchs_own_transformer(tmp_path):
    case = make_case(CallsByKeyword(build("1x1")), tmp_path / "a")
    assert_ablation(case.ablate(), case)
    case = make_case(Encoder().double().eval(), tmp_path / "b", "blocks.layers.1.linear1")
    # Of its paths, the oracle's is the other one: it differs from the split network's in rounding.
    assert_ablation(case.ablate(), case)


@pytest.mark.parametrize(("kind", "shortened"), SHORTENED.items())
def test_passes_are_shortened_where_that_changes_nothing(kind, shortened):
    network, images = kind().eval(), SyntheticImages(3, seed=5).images
    with torch.no_grad():
        expected = network(images)
        with replaying(network, network.layer) as replay:
            logits, output = replay.first(images)
            assert torch.equal(logits, expected)
            assert replay.shortened is (shortened or kind is WritesWhenOff)
            for channel in (1, 0, 1, 2):
                given = output.clone()
                given[:, channel] = 0
                found = replay.again(images, given)
                plain = copy.deepcopy(network)
                assert torch.equal(found, hooked(plain, images, channel))
            assert replay.shortened is shortened
        assert torch.equal(network(images), expected)


def hooked(network: nn.Module, images: Tensor, channel: int) -> Tensor:
    """Logits with a channel of the layer at zero, by a hook of torch's own."""
    for module in network.modules():
        module.__dict__.pop("forward", None)
    network.layer.register_forward_hook(
        lambda _module, _args, output: output.index_fill(1, torch.tensor([channel]), 0.0)
    )
    return network(images)


@pytest.mark.parametrize("inference", [False, True])
def test_what_lies_before_the_layer_runs_once_a_batch(inference, tmp_path):
    case = make_case(SharesParts(), tmp_path)
    changed = unbraid.apply(case.network, case.split)
    changed.count.n_runs = 0
    with torch.inference_mode(inference):
        result = unbraid.ablate(changed, case.images, batch_size=4)
    assert sum(1 + len(channel.concepts) for channel in result.channels) == 10
    assert changed.count.n_runs == 3  # batches


def test_a_forward_of_an_instances_own_is_used_and_put_back(case):
    changed = unbraid.apply(case.network, case.split)
    plain = changed.stem.forward

    def doubled(x: Tensor) -> Tensor:
        return 2 * plain(x)

    changed.stem.forward = doubled
    result = unbraid.ablate(changed, case.images)
    assert changed.stem.forward is doubled
    assert result != case.ablate()
    with torch.no_grad():
        logits = changed(case.images.images)
    own = [float(logits[n, 0]) for n, label in enumerate(case.images.targets) if label == 0]
    assert_close(result.classes[0].logit, mean(own))


class RunsTwice(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.layer(self.layer(self.before(x))))


class NeverRuns(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.before(x))


@pytest.mark.parametrize(("kind", "n_times"), [(RunsTwice, 2), (NeverRuns, 0)])
def test_a_layer_that_does_not_run_once_is_refused(kind, n_times, tmp_path):
    body, network = Body(), kind()
    network.load_state_dict(body.state_dict())
    changed = unbraid.apply(network, make_split(body, tmp_path))
    with pytest.raises(LayerError, match=f"runs {n_times} times"):
        unbraid.ablate(changed, SyntheticImages(3))


# --- nothing is left behind -----------------------------------------------------------------------


def everything(network: nn.Module) -> dict[str, Any]:
    return {
        **snapshot(network),
        "moves": list(network.layer.moves),
        "own": {name: dict(module.__dict__) for name, module in network.named_modules()},
    }


def assert_left_alone(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_untouched(before, after)
    assert after["moves"] == before["moves"]
    assert {k: sorted(v) for k, v in after["own"].items()} == {
        k: sorted(v) for k, v in before["own"].items()
    }


def _nan_image() -> SyntheticImages:
    dataset = SyntheticImages(5)
    dataset.images[4, 0, 0, 0] = math.nan
    return dataset


def _wrong_label(label: int) -> SyntheticImages:
    dataset = SyntheticImages(5)
    dataset.targets[4] = label
    return dataset


FAILING: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "broken": (lambda: WithBroken(5), DataError, r"Image 3 .*picture-3\.jpg"),
    "nan": (_nan_image, ModelError, "Image 4 .*NaN"),
    "label": (
        lambda: _wrong_label(4),
        DataError,
        "Image 4 has label 4, but the network has 4 outputs; labels must name outputs",
    ),
    "negative label": (lambda: _wrong_label(-1), DataError, "Image 4 has label -1"),
    "size": (lambda: SyntheticImages(4, size=(1, 7, 6)), ModelError, r"shape \(1, 7, 6\)"),
    "empty": (lambda: SyntheticImages(0), UsageError, "holds no image"),
}


@pytest.mark.parametrize("name", [None, *FAILING])
def test_the_network_is_left_as_it_was(name, tmp_path):
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    changed = unbraid.apply(network, make_split(network, tmp_path))
    changed.gate("layer", 1, 0, 0.5)
    changed.stem_norm.forward = changed.stem_norm.forward
    before = everything(changed)
    if name is None:
        unbraid.ablate(changed, SyntheticImages(5), batch_size=2)
    else:
        make, kind, message = FAILING[name]
        with pytest.raises(kind, match=message):
            unbraid.ablate(changed, make(), batch_size=2)
    assert_left_alone(before, everything(changed))
    for disturb in (
        lambda: changed.gate("layer", 1, 0, 0.5),
        lambda: vars(changed.stem).update(forward=changed.stem.forward),
    ):
        disturb()
        with pytest.raises(AssertionError):
            assert_left_alone(before, everything(changed))
        changed.layer.moves[:] = before["moves"]


# --- bad input ------------------------------------------------------------------------------------


def test_broken_images_are_left_out_when_asked(case):
    result = replace(case, images=WithBroken(11, seed=5)).ablate(skip_broken=True)
    rest = SyntheticImages(11, seed=5)
    keep = [n for n in range(11) if n != 3]
    rest.images, rest.targets = rest.images[keep], [rest.targets[n] for n in keep]
    assert_ablation(result, replace(case, images=rest))
    nothing = WithBroken(2)
    nothing.broken = (0, 1)
    with pytest.raises(DataError, match="No image could be read"):
        replace(case, images=nothing).ablate(skip_broken=True, batch_size=1)


def test_networks_and_arguments_that_do_not_fit_are_refused(case):
    plain = unbraid.apply(case.network, case.split, form="plain")
    both = nn.ModuleList([unbraid.apply(case.network, case.split) for _ in range(2)])
    changed = unbraid.apply(case.network, case.split)
    for network, options, message in (
        (case.network, {}, "no concept channels"),
        (plain, {}, "no concept channels"),
        (both, {}, r"Several .* name one of '0.layer', '1.layer'"),
        (both, {"layer": "1.stem"}, r"'1.stem' is not split; name one of '0.layer', '1.layer'"),
        (changed, {"channels": [1, 5]}, "names 5, which is not split; .* are 0, 1, 3"),
        (changed, {"channels": []}, "channels is empty"),
        (changed, {"batch_size": 0}, "batch_size is 0"),
        (changed, {"workers": -1}, "workers is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            unbraid.ablate(network, case.images, **options)


# --- printed, kept and read back ------------------------------------------------------------------


@pytest.fixture(scope="module")
def val_scan(case, tmp_path_factory) -> unbraid.Scan:
    return unbraid.scan(case.network, "layer", case.images, tmp_path_factory.mktemp("val"))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("channels", [None, [3]])
def test_an_evaluation_keeps_it_and_it_can_be_read_back(few, channels, case, val_scan, tmp_path):
    # Of two images, only of classes 0 and 1, some groups have none.
    images = SyntheticImages(2, seed=5) if few else case.images
    ablation = replace(case, images=images).ablate(channels=channels)
    assert "nan" not in str(ablation)
    result = unbraid.evaluate(case.split, val_scan, ablation=ablation)
    assert result.ablation is ablation
    result.save(tmp_path / "evaluation.json")
    read = read_ablation(tmp_path / "evaluation.json")
    assert repr(read) == repr(ablation)  # in which NaN is like NaN
    content = json.loads((tmp_path / "evaluation.json").read_text())
    for entry in content["channels"]:
        measured = {channel.channel: channel for channel in ablation.channels}
        if entry["channel"] not in measured:
            assert entry["ablation"] is None
            continue
        concepts = measured[entry["channel"]].concepts
        for concept, values in zip(concepts, entry["ablation"]["concepts"], strict=True):
            for name in ("own", "others", "rest"):
                part = getattr(concept, name).part
                assert values[name]["part"] == (None if math.isnan(part) else part)


def test_an_ablation_of_another_split_is_refused(case, val_scan):
    ablation = case.ablate()
    first, *rest = ablation.channels
    for other in (
        replace(ablation, channels=(replace(first, channel=7), *rest)),
        replace(ablation, channels=(replace(first, concepts=first.concepts[:-1]), *rest)),
        replace(ablation, layer="stem"),
    ):
        with pytest.raises(UsageError, match="ablation is of another split"):
            unbraid.evaluate(case.split, val_scan, ablation=other)


def first_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["channels"][0]["ablation"]


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no own": lambda content: first_of(content)["concepts"][0].pop("own"),
    "text": lambda content: first_of(content)["whole"].update(logit=["much"]),
    "unknown": lambda content: content["ablation"]["classes"][0].update(colour=1),
    "a class less": lambda content: content["ablation"]["classes"].pop(),
    "a list": lambda content: content["channels"][0].update(ablation=[1]),
}


def test_a_damaged_or_missing_file_is_named(case, val_scan, tmp_path):
    path = tmp_path / "evaluation.json"
    unbraid.evaluate(case.split, val_scan, ablation=case.ablate()).save(path)
    sound = path.read_text()
    for damage in DAMAGES.values():
        content = json.loads(sound)
        damage(content)
        path.write_text(json.dumps(content))
        with pytest.raises(RunError, match=r"evaluation\.json cannot be read"):
            read_ablation(path)
    path.unlink()
    with pytest.raises(RunError, match=r"evaluation\.json cannot be read"):
        read_ablation(path)
