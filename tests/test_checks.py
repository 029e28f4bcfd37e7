"""The checks check: each passes on sound data and fails on every corruption of it.

A check that compares and forgets to say so would let everything through; here it is found out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks
import unbraid
from checks import Truth
from tiny_networks import SyntheticImages, build, layer_input
from unbraid.finding.arv import averaged_relevance, class_sums, concept_mean, uses
from unbraid.finding.membership import Cluster
from unbraid.networks.layers import bias_of, describe, weight_rows
from unbraid.networks.relevance import input_relevance
from unbraid.networks.spec import pooled_input, respond
from unbraid.splitting.splits import ChannelSplit

TAU, P = 0.1, 0.5
Arguments = dict[str, Any]
Change = Callable[[Any], Any]


@dataclass
class World:
    """One network of groups with a scan, findings, a split and its measures, all sound."""

    folder: Path
    network: nn.Module
    truth: Truth
    scan: unbraid.Scan
    found: unbraid.Findings
    split: unbraid.Split
    evaluation: unbraid.Evaluation
    grid: unbraid.Sensitivity
    pooled: Tensor


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    network, dataset = build("groups"), SyntheticImages(13)
    scan = unbraid.scan(network, "layer", dataset, folder / "scan", positions=True, min_share=0.05)
    own = unbraid.find(scan, tau=TAU, channels={1: [[0], [1]], 6: [[2, 0], [3]]})
    split = unbraid.split(scan, own, method="published")
    return World(
        folder,
        network,
        checks.truth_of(network, dataset),
        scan,
        unbraid.find(scan, tau=TAU, p=P, gamma=1.0),
        split,
        unbraid.evaluate(split, scan, tau=TAU),
        unbraid.sensitivity(scan, [0.05, TAU, 0.3], [P, 0.75], [0.0, 0.5, 1.0]),
        pooled_input(describe("layer", network.layer), layer_input(network, dataset.images)),
    )


# --- sound arguments for every check --------------------------------------------------------------


def responses_of(world: World) -> Arguments:
    layer, channels = world.network.layer, [6, 1]
    rows = weight_rows(layer)[[2, 5]]
    x = layer_input(world.network, SyntheticImages(13).images)
    found = respond(describe("layer", layer), x, rows, bias_of(layer)[channels], channels)
    return {"responses": found.flatten(2), "channels": channels, "rows": rows}


def two_folders(world: World) -> Arguments:
    folders = [world.folder / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for path in (world.folder / "scan").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return {"folder1": folders[0], "folder2": folders[1]}


def two_snapshots(world: World) -> Arguments:
    network = copy.deepcopy(world.network)
    network(SyntheticImages(2).images).sum().backward()
    return {"before": checks.snapshot(network), "after": checks.snapshot(network)}


def two_networks(world: World) -> Arguments:
    networks = {name: copy.deepcopy(world.network) for name in ("network", "other")}
    return {**networks, "images": SyntheticImages(3).images}


def two_splits(world: World) -> Arguments:
    centres = torch.eye(3).double()[:2]
    clusters = {4 + k: Cluster(1, k, centres, 0.1) for k in range(2)}
    split = replace(world.split, clusters=clusters)
    return {"split1": split, "split2": copy.deepcopy(split)}


def csv_of(world: World) -> Arguments:
    world.found.to_csv(world.folder / "findings.csv")
    return {"path": world.folder / "findings.csv", "found": world.found}


def grouped(_world: World) -> Arguments:
    pairs = itertools.combinations((1, 4, 5, 7, 9), 2)
    return {
        "concepts": [(1, 4), (5, 7), (9,)],
        "classes": [1, 4, 5, 7, 9],
        "cosines": {pair: 0.9 if pair in {(1, 4), (5, 7)} else 0.1 for pair in pairs},
        "gamma": 0.5,
    }


ARVS = [torch.tensor(v) for v in ([4.0, 1.0, 0.0], [1.0, 1.0, 3.0], [0.0, 0.5, 4.0])]
MASKS = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]

SOUND: dict[str, Callable[[World], Arguments]] = {  # beside the truth
    "close": lambda _: {
        "actual": torch.tensor([1.0, 2.0, math.nan]).double(),
        "expected": [1, 2.0, math.nan],
    },
    "pooled_inputs": lambda w: {"pooled": w.pooled},
    "rows_explain_output": lambda w: {
        "pooled": w.pooled,
        "rows": weight_rows(w.network.layer).detach(),
        "bias": bias_of(w.network.layer).detach(),
        "n_positions": torch.tensor([z.shape[1] for z in w.truth.z]),
    },
    "responses": responses_of,
    "relevance": lambda w: {"relevance": w.truth.relevance},
    "shares": lambda w: {"shares": w.truth.shares},
    "input_relevance": lambda w: {
        "input_relevance": input_relevance(
            weight_rows(w.network.layer), w.pooled.repeat_interleave(4, 1), 9
        )
    },
    "records": lambda w: {
        "shards": list(w.scan.shards()),
        "min_share": 0.05,
        "images": range(13),
    },
    "input_maps": lambda w: {"shards": list(w.scan.shards())},
    "same_files": two_folders,
    "same_tensors": two_folders,
    "untouched": two_snapshots,
    "uses": lambda w: {"uses": uses(class_sums(w.scan, [TAU]), P)[0], "tau": TAU, "p": P},
    "arv": lambda w: {
        "arv": averaged_relevance(w.scan, 6, concept_mean(class_sums(w.scan, []), (0, 2))),
        "concept": (0, 2),
        "channel": 6,
    },
    "pairs": lambda w: {"pairs": w.found.pairs, "tau": TAU, "p": P, "gamma": 1.0},
    "grouped": grouped,
    "csv": csv_of,
    "tau_chosen": lambda w: {
        "tau": unbraid.find(w.scan, tau="auto").tau,
        "shares": w.truth.shares,
        "labels": w.truth.labels,
        "n_matter": 2,  # a quarter of eight channels
        "min_share": 0.05,
    },
    "sensitivity": lambda w: {"counted": w.grid},
    "agrees_with_find": lambda w: {"counted": w.grid, "scan": w.scan},
    "published_rows": lambda w: {
        "part": w.split.channels[1],
        "rho": w.split.channels[1].info["rho"],
    },
    "published_rho": lambda w: {"part": w.split.channels[0]},
    "extended_masks": lambda _: {
        "masks": torch.tensor(MASKS).double(),
        "arvs": ARVS,
        "rho": 0.5,
        "taps": 2,
    },
    "adds_up": lambda w: {"part": w.split.channels[1]},
    "same_split": two_splits,
    "bit_equal": lambda _: {
        "actual": torch.tensor([1.0, 0.0, 3.0]),
        "expected": torch.tensor([1.0, 0.0, 3.0]),
    },
    "same_outputs": two_networks,
    "same_input_gradients": two_networks,
    "evaluation": lambda w: {"result": w.evaluation, "split": w.split},
    "published_table": lambda w: {
        "ratios": w.evaluation.channels[1].concepts[0].ratios,
        "part": w.split.channels[1],
        "k": 0,
        "tau": TAU,
    },
}

CHECKS = {
    name.removeprefix("assert_"): check
    for name, check in inspect.getmembers(checks, inspect.isfunction)
    if name.startswith("assert_") and check.__module__ == checks.__name__
}


def sound(name: str, world: World) -> Arguments:
    arguments = SOUND[name](world)
    if "truth" in inspect.signature(CHECKS[name]).parameters:
        arguments["truth"] = world.truth
    return arguments


# --- one corruptor: nudge, drop, swap, NaN, or another value --------------------------------------


def nudge(n: int = 0, by: float = 1e-6) -> Change:
    """Change one number a little: far above the tolerances, far below what meets the eye."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value + (1 if isinstance(value, int) else by)
        old = value.reshape(-1)[n]
        return at(n, old + (by * max(1.0, abs(float(old))) if old.is_floating_point() else 1))(
            value
        )

    return change


def last_bit(n: int = 0) -> Change:
    return lambda value: (
        at(n, torch.nextafter(value.reshape(-1)[n], value.new_tensor(9.0)))(value)
        if isinstance(value, Tensor)
        else math.nextafter(value, 9)
    )


def at(n: int, element: Any) -> Change:
    """Put another number into a tensor."""

    def change(value: Tensor) -> Tensor:
        changed = value.detach().clone()
        changed.view(-1)[n] = element
        return changed

    return change


def drop(value: Any) -> Any:
    """Leave out the last member."""
    return dict(list(value.items())[:-1]) if isinstance(value, dict) else value[:-1]


def swap(one: int = 0, other: int = 1, dim: int = 0) -> Change:
    def change(value: Any) -> Any:
        order = list(range(value.shape[dim] if isinstance(value, Tensor) else len(value)))
        order[one], order[other] = order[other], order[one]
        if isinstance(value, Tensor):
            return value.index_select(dim, torch.tensor(order))
        return type(value)(value[n] for n in order)

    return change


def nan(value: Any) -> Any:
    return at(0, math.nan)(value) if isinstance(value, Tensor) else math.nan


def to(other: Any) -> Change:
    return lambda _: other


def corrupted(value: Any, path: list[str], change: Change) -> Any:
    """A copy of arguments in which what lies at a path is changed."""
    if not path:
        return change(value)
    first, rest = path[0], path[1:]
    if isinstance(value, dict):
        key: Any = int(first) if first.isdecimal() else first
        return {**value, key: corrupted(value[key], rest, change)}
    if isinstance(value, (list, tuple)):
        parts = list(value)
        parts[int(first)] = corrupted(parts[int(first)], rest, change)
        return type(value)(parts)
    return replace(value, **{first: corrupted(getattr(value, first), rest, change)})


class OffBy(ChannelSplit):
    """A part whose residual is a little off."""

    @property
    def residual_row(self) -> Tensor:
        return super().residual_row + 1e-9


class WrongResidualBias(ChannelSplit):
    """A part whose residual carries every concept's bias."""

    @property
    def residual_bias(self) -> float:
        return len(self.concepts) * self.bias


class WrongSummary(unbraid.Evaluation):
    """A summary that forgets a channel."""

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        return replace(unbraid.Evaluation(**vars(self)), channels=self.channels[:1]).summary


def lose_share(shard: Any) -> Any:
    return replace(
        shard,
        share_value=drop(shard.share_value),
        share_channel=drop(shard.share_channel),
        share_start=nudge_down(shard.share_start),
    )


def nudge_down(values: Tensor) -> Tensor:
    return at(-1, values[-1] - 1)(values)


def keep_a_tap(masks: Tensor) -> Tensor:
    return at(int((masks == 0).flatten().nonzero()[0]), 1.0)(masks)


def swap_taus(cells: tuple[Any, ...]) -> tuple[Any, ...]:
    first, last = cells[2], cells[-1]
    first, last = replace(first, tau=last.tau), replace(last, tau=first.tau)
    return (*cells[:2], first, *cells[3:-1], last)


def in_file(name: str, change: Callable[[bytes], bytes | None]) -> Change:
    """Change a file's content, or delete it where None is made of it."""

    def corrupt(path: Path) -> Path:
        file = path / name if name else path
        content = change(file.read_bytes() if file.exists() else b"")
        if content is None:
            file.unlink()
        else:
            assert not file.exists() or content != file.read_bytes()
            file.write_bytes(content)
        return path

    return corrupt


def other_digits(name: str) -> Callable[[Arguments], Arguments]:
    """Round a figure of the first pair in the file."""

    def corrupt(a: Arguments) -> Arguments:
        figure = str(getattr(a["found"].pairs[0], name)).encode()
        in_file("", lambda content: content.replace(figure, figure[:-2], 1))(a["path"])
        return a

    return corrupt


def hooked(hook: Any, *networks: str, module: str = "") -> Callable[[Arguments], Arguments]:
    def corrupt(a: Arguments) -> Arguments:
        for network in networks:
            a[network].get_submodule(module).register_forward_hook(hook)
        return a

    return corrupt


def change_a_bias(network: nn.Module) -> nn.Module:
    with torch.no_grad():
        network.head.bias.copy_(last_bit(3)(network.head.bias))
    return network


SHARD, BIT = "shard-000000.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])
LINES: Any = lambda content: b"".join(content.splitlines(keepends=True)[:-1])  # noqa: E731
MORE: Any = lambda content: b"left"  # noqa: E731
CERTAIN: Any = lambda content: (  # noqa: E731
    content.replace(b"True\n", b"?").replace(b"False\n", b"True\n").replace(b"?", b"False\n")
)
NO_FILE: Any = lambda content: None  # noqa: E731
MEASURES = ("retention", "leakage", "mimic_error", "silence_error", "auroc")

# What is corrupted (a path through the arguments, all of them if empty) and how, per check.
CORRUPTIONS: dict[str, list[tuple[str, Change]]] = {
    "close": [
        ("actual", nudge(1)),
        ("actual", at(2, 0.0)),
        ("actual", nan),
        ("actual", lambda v: v[None]),
    ],
    "pooled_inputs": [
        ("pooled", swap(0, 2, dim=2)),
        ("pooled", swap(dim=1)),
        ("pooled", nudge(-1)),
        ("pooled", drop),
    ],
    "rows_explain_output": [
        ("bias", nudge(3)),
        ("rows", nudge(-1)),
        ("n_positions", nudge(4)),
        ("pooled", swap(dim=1)),
    ],
    "responses": [
        ("responses", swap(dim=1)),
        ("responses", lambda v: v.flip(2)),
        ("channels", to([5, 1])),
    ],
    "relevance": [("relevance", nudge(-1)), ("relevance", swap(dim=1))],
    "shares": [
        ("shares", nudge(5)),
        ("", lambda a: {**a, "shares": (r := a["truth"].relevance) / r.sum(1, keepdim=True)}),
    ],
    "input_relevance": [("input_relevance", swap(dim=2)), ("input_relevance", nudge(-1))],
    "records": [
        ("shards/0/pooled", swap(dim=2)),
        ("shards/0/share_start", nudge(1)),
        ("shards/0/share_value", nudge(-1)),
        ("shards/0/share_channel", nudge(0)),
        ("shards/0", lose_share),
        ("min_share", to(0.08)),
        ("shards/0/label", nudge(7)),
        ("shards/0/prediction", lambda v: at(0, (v[0] + 1) % 4)(v)),
        ("shards/0/n_positions", nudge(12)),
        ("shards/0/index", swap(3, 4)),
        ("images", to(range(14))),
        ("shards/0/pooled", swap(0, 4)),  # both of class 0
    ],
    "input_maps": [("shards/0/input_map", nudge(-1)), ("shards/0/input_map", to(None))],
    "same_files": [
        ("folder2", in_file(SHARD, BIT)),
        ("folder1", in_file("left.tmp", MORE)),
        ("folder1", in_file("manifest.json", NO_FILE)),
    ],
    "same_tensors": [("folder2", in_file(SHARD, BIT)), ("folder1", in_file(SHARD, NO_FILE))],
    "untouched": [
        ("after/state/head.weight", last_bit()),
        ("after/state/stem_norm.running_mean", nudge()),
        ("after/modes/stem_norm", to(True)),
        ("after/wants/stem.weight", to(False)),
        ("after/gradients/stem.weight", nudge()),
        ("before/gradients/stem.weight", to(None)),
        ("after/hooks", lambda hooks: {**hooks, ("layer", "_forward_hooks"): [17]}),
    ],
    "uses": [
        ("uses", lambda v: at(19, not v.flatten()[19])(v)),
        ("tau", to(0.2)),
        ("p", to(1.0)),
    ],
    "arv": [("arv", nudge(2)), ("concept", to((0,))), ("channel", to(5))],
    "pairs": [
        ("pairs/0/cosine", nudge(by=-1e-6)),
        ("pairs/0/use2", nudge(by=-1e-6)),
        ("pairs", drop),
        ("pairs", lambda v: (v[0], *v)),
        ("pairs", lambda v: v[::-1]),
        ("pairs/0", lambda pair: replace(pair, class1=pair.class2, class2=pair.class1)),
        ("", lambda a: {**a, "gamma": a["pairs"][-1].cosine - 1e-6}),
    ],
    "tau_chosen": [
        ("tau", nudge(by=-0.001)),
        ("tau", nudge(by=0.001)),
        ("tau", nudge()),  # more digits
        ("n_matter", to(3)),
        ("min_share", to(0.9)),
    ],
    "sensitivity": [("counted/cells", drop)],
    "agrees_with_find": [("counted/cells", to(()))],
    "grouped": [
        ("concepts", to([(1, 4), (5,), (7, 9)])),
        ("concepts", to([(1,), (4,), (5, 7), (9,)])),
        ("concepts", drop),
        ("concepts", to([(1, 4), (5, 7), (9, 1)])),
        ("cosines", lambda v: {**v, (1, 4): 0.49}),
    ],
    "csv": [
        ("path", in_file("", LINES)),
        ("", other_digits("cosine")),
        ("", other_digits("low")),
        ("path", in_file("", CERTAIN)),
        ("path", in_file("", lambda content: content.replace(b"class 0", b"class O", 1))),
    ],
    "published_rows": [
        ("part/masks", keep_a_tap),
        ("part/masks", lambda v: v.flip(0)),
        ("rho", to(0.05)),
        ("part/weight", nudge()),
        ("part/bias", nudge()),
    ],
    "published_rho": [
        ("part/info/rho", lambda rho: rho - 0.05 if rho > 0.5 else rho + 0.05),
        ("part", lambda v: replace(v, concepts=((2,), (3,)), info={"rho": 0.05})),
    ],
    "extended_masks": [
        ("masks", at(6, 1.0)),
        ("masks", at(3, 0.0)),
        ("rho", to(0.9)),  # then the last input channel belongs to the third concept
        ("masks", lambda v: v.reshape(3, 3, 2).transpose(1, 2).reshape(3, 6)),
    ],
    "adds_up": [
        ("part", lambda v: OffBy(**vars(v))),
        ("part", lambda v: WrongResidualBias(**vars(v))),
    ],
    "same_split": [
        ("split2/channels/0/masks", lambda v: v * (1 + 1e-15)),
        ("split2/channels/0/masks", lambda v: v.float()),
        ("split2/channels/0/concepts", to(((1,), (0,)))),
        ("split2/channels/0/bias", last_bit()),
        ("split2/channels/0/info", to({})),
        ("split2/channels", drop),
        ("split2/settings/tau", to(0.031)),
        ("split2/class_names", to(())),
        ("split2/layer/stride", to((2, 1))),
        ("split2/clusters/5/channel", to(2)),
        ("split2/clusters/5/place", to(0)),
        ("split2/clusters/5/least", last_bit()),
        ("split2/clusters/5/centres", to(torch.eye(3).double()[1:])),
        ("split2/clusters", drop),
    ],
    "bit_equal": [
        ("actual", last_bit(2)),
        ("actual", at(1, -0.0)),
        ("actual", lambda v: v.double()),
        ("actual", lambda v: v[:, None]),
    ],
    "same_outputs": [
        ("other", change_a_bias),
        ("", hooked(lambda _m, _a, z: z if torch.is_grad_enabled() else z * 2, "other")),
    ],
    "same_input_gradients": [
        ("", hooked(lambda _m, _a, z: z + 1e-6 * (z - z.detach()), "other", module="layer")),
        (
            "",
            hooked(lambda _m, a, z: z.detach() + 0 * a[0].sum(), "network", "other", module="stem"),
        ),
    ],
    "evaluation": [
        *((f"result/channels/0/concepts/0/{name}", nudge()) for name in MEASURES),
        *((f"result/channels/0/concepts/0/{name}", nan) for name in MEASURES),
        ("result/channels/0/concepts", lambda v: v[::-1]),
        ("result/channels/0/concepts", drop),
        ("result/channels", drop),
        ("result/channels/0/concepts/0/n_images", nudge()),
        ("result/channels/0/separation_error", nudge()),
        ("result/channels/0/separation_error_rectified", to(None)),
        (
            "result/channels/0",
            lambda v: replace(v, separation_error_rectified=v.separation_error),
        ),
        ("result", lambda v: WrongSummary(**vars(v))),
    ],
    "published_table": [
        ("ratios/0/mean", nudge()),
        ("ratios/-1/median", nudge(by=-1e-6)),
        ("ratios", swap()),
        ("ratios", drop),
        ("ratios", to(())),
        ("k", to(1)),
        ("tau", to(0.999)),  # where no image counts
    ],
}
for name in ("sensitivity", "agrees_with_find"):
    CORRUPTIONS[name] += [
        ("counted/cells/2/n_channels", nudge()),
        ("counted/cells/-1/n_pairs", lambda n: n - 1),
        ("counted/cells", swap_taus),
    ]
CASES = [(name, *case) for name, cases in CORRUPTIONS.items() for case in cases]


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_sound_data(name, world):
    CHECKS[name](**sound(name, world))


@pytest.mark.parametrize(
    ("name", "path", "change"), CASES, ids=[f"{name}-{path}" for name, path, _ in CASES]
)
def test_a_check_fails_on_corrupted_data(name, path, change, world):
    arguments = corrupted(sound(name, world), path.split("/") if path else [], change)
    with pytest.raises((AssertionError, ValueError)) as caught:
        CHECKS[name](**arguments)
    if caught.type is ValueError:  # zip(strict=True) in a check
        assert "zip()" in str(caught.value)


def test_every_check_has_sound_data_and_a_corruption():
    assert set(SOUND) == set(CHECKS) == set(CORRUPTIONS)


def test_corruptions_change_something_in_data_that_can_tell(world):
    used = uses(class_sums(world.scan, [TAU]), P)[0]
    assert used.any()
    assert not used.all()
    assert len(world.found.pairs) >= 3
    assert len(world.evaluation.channels[1].concepts[0].ratios) == 3
    assert world.split.channels[1].info["rho"] != 0.05
