"""The checks check: each passes on sound data and fails on every corruption of it.

A check that compares and forgets to say so would let everything through; here it is found out.
"""

import copy
import functools
import inspect
import itertools
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import checks
import unbraid
from tiny_networks import SyntheticImages, build, layer_input
from unbraid.finding.arv import class_sums, uses
from unbraid.finding.membership import Cluster
from unbraid.networks.layers import bias_of, describe, weight_rows
from unbraid.networks.spec import pooled_input, respond

TAU, P = 0.1, 0.5
SHARD, NETWORKS = "shard-000000.safetensors", ("network", "other")
CHECKS = {
    name.removeprefix("assert_"): check
    for name, check in inspect.getmembers(checks, inspect.isfunction)
    if name.startswith("assert_") and check.__module__ == checks.__name__
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One network of groups with a scan, findings, a split and its measures, all sound."""
    folder = tmp_path_factory.mktemp("world")
    network, dataset = build("groups"), SyntheticImages(13)
    scan = unbraid.scan(network, "layer", dataset, folder / "scan", positions=True, min_share=0.05)
    own = unbraid.find(scan, tau=TAU, channels={1: [[0], [1]], 6: [[2, 0], [3]]})
    split = unbraid.split(scan, own, method="published")
    found = unbraid.find(scan, tau=TAU, p=P, gamma=1.0)
    evaluation = unbraid.evaluate(split, scan, tau=TAU)
    used = uses(class_sums(scan, [TAU]), P)[0]
    assert 0 < int(used.sum()) < used.numel()  # or corruptions could not be told
    assert len(found.pairs) >= 3
    assert len(evaluation.channels[1].concepts[0].ratios) == 3
    assert split.channels[1].info["rho"] != 0.05
    return SimpleNamespace(
        **{"folder": folder, "network": network, "images": dataset.images, "scan": scan},
        **{"found": found, "split": split, "evaluation": evaluation},
        truth=checks.truth_of(network, dataset),
        grid=unbraid.sensitivity(scan, [0.05, TAU, 0.3], [P, 0.75], [0.0, 0.5, 1.0]),
        pooled=pooled_input(describe("layer", network.layer), layer_input(network, dataset.images)),
    )


def two_folders(world):
    folders = {name: world.folder / name for name in ("folder1", "folder2")}
    for folder in folders.values():
        shutil.copytree(world.folder / "scan", folder, dirs_exist_ok=True)
    return folders


def two_snapshots(world):
    network = copy.deepcopy(world.network)
    network(world.images[:2]).sum().backward()
    return {"before": checks.snapshot(network), "after": checks.snapshot(network)}


def two_networks(world):
    networks = {name: copy.deepcopy(world.network) for name in NETWORKS}
    return {**networks, "images": world.images[:3]}


def two_splits(world):
    centres = torch.eye(3).double()[:2]
    clusters = {4 + k: Cluster(1, k, centres, 0.1) for k in range(2)}
    split = replace(world.split, clusters=clusters)
    return {"split1": split, "split2": copy.deepcopy(split)}


def csv_of(world):
    path = world.folder / "findings.csv"
    world.found.to_csv(path)
    return {"path": path, "found": world.found}


def responses_of(world):
    layer, channels = world.network.layer, [6, 1]
    rows = weight_rows(layer)[[2, 5]]
    x = layer_input(world.network, world.images)
    found = respond(describe("layer", layer), x, rows, bias_of(layer)[channels], channels)
    return {"responses": found.flatten(2), "channels": channels, "rows": rows}


def rows_of(world):
    layer, positions = world.network.layer, [z.shape[1] for z in world.truth.z]
    own = {"rows": weight_rows(layer).detach(), "bias": bias_of(layer).detach()}
    return {**own, "pooled": world.pooled, "n_positions": torch.tensor(positions)}


def tau_of(world):
    own = {"shares": world.truth.shares, "labels": world.truth.labels, "min_share": 0.05}
    tau = unbraid.find(world.scan, tau="auto").tau
    return {**own, "tau": tau, "n_matter": 2}  # a quarter of eight channels


def grouped(_):
    classes = [1, 4, 5, 7, 9]
    cosines = dict.fromkeys(itertools.combinations(classes, 2), 0.1) | {(1, 4): 0.9, (5, 7): 0.9}
    return {
        "concepts": [(1, 4), (5, 7), (9,)],
        "classes": classes,
        "cosines": cosines,
        "gamma": 0.5,
    }


def extended_masks(_):
    arvs = [torch.tensor(v) for v in ([4.0, 1.0, 0.0], [1.0, 1.0, 3.0], [0.0, 0.5, 4.0])]
    masks = torch.ones(3, 6).double()
    masks[1:, :2] = 0
    return {"masks": masks, "arvs": arvs, "rho": 0.5, "taps": 2}


def plain(value, names):
    """The attributes that a check reads, computed ones too, so that each can be corrupted."""
    return SimpleNamespace(**{name: getattr(value, name) for name in names.split()})


SOUND = {  # beside the truth
    "close": lambda _: dict.fromkeys(("actual", "expected"), torch.tensor([1, math.nan, 2])),
    "rows_explain_output": rows_of,
    "responses": responses_of,
    "records": lambda w: {"shards": [*w.scan.shards()], "min_share": 0.05, "images": [*range(13)]},
    "same_files": two_folders,
    "same_tensors": two_folders,
    "untouched": two_snapshots,
    "pairs": lambda w: {"pairs": w.found.pairs, "tau": TAU, "p": P, "gamma": 1.0},
    "grouped": grouped,
    "csv": csv_of,
    "tau_chosen": tau_of,
    "sensitivity": lambda w: {"counted": w.grid},
    "agrees_with_find": lambda w: {"counted": w.grid, "scan": w.scan},
    "published_rows": lambda w: {"part": w.split[6], "rho": w.split[6].info["rho"]},
    "published_rho": lambda w: {"part": w.split[1]},
    "extended_masks": extended_masks,
    "adds_up": lambda w: {
        "part": plain(w.split[1], "concepts weight bias rows residual_row residual_bias")
    },
    "same_split": two_splits,
    "bit_equal": lambda _: dict.fromkeys(("actual", "expected"), torch.tensor([1.0, 0.0, 3.0])),
    "same_outputs": two_networks,
    "same_input_gradients": two_networks,
    "evaluation": lambda w: {"result": plain(w.evaluation, "channels summary"), "split": w.split},
    "over_all": lambda w: {"result": plain(w.evaluation, "channels summary"), "split": w.split},
    "published_table": lambda w: {
        **{"ratios": w.evaluation.channels[1].concepts[0].ratios, "part": w.split.channels[1]},
        **{"k": 0, "tau": TAU},
    },
}


def sound(name, world):
    arguments = SOUND[name](world)
    if "truth" in inspect.signature(CHECKS[name]).parameters:
        arguments["truth"] = world.truth
    return arguments


def at(n, element):
    """Put another number into a tensor."""

    def change(value):
        changed = value.detach().clone()
        changed.view(-1)[n] = element
        return changed

    return change


def nudge(value):
    """Change the last number a little: far above the tolerances, far below what meets the eye."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return at(-1, not value.flatten()[-1])(value)
        by = 1e-6 * max(1.0, float(value.flatten()[-1].abs())) if value.is_floating_point() else 1
        return at(-1, value.flatten()[-1] + by)(value)
    return value + (1 if isinstance(value, int) else 1e-6)


def last_bit(value):
    if isinstance(value, Tensor):
        return at(-1, torch.nextafter(value.flatten()[-1], value.new_tensor(9.0)))(value)
    return math.nextafter(value, 9)


def drop(value):
    """Leave out the last member."""
    return dict(list(value.items())[:-1]) if isinstance(value, dict) else value[:-1]


def swap(value):
    """Exchange the first member and the last."""
    if isinstance(value, Tensor):
        order = [len(value) - 1, *range(1, len(value) - 1), 0]
        return value[order]
    return type(value)([value[-1], *value[1:-1], value[0]])


def nan(value):
    return at(0, math.nan)(value) if isinstance(value, Tensor) else math.nan


def to(other):
    return lambda _: other


def all_of(value):
    """The corruptions that change a value."""
    if isinstance(value, (int, float)):
        yield from (nudge, nan)[: 2 - isinstance(value, int)]
    elif isinstance(value, Tensor):
        yield from (nudge, drop)
        if value.is_floating_point():
            yield nan
        if len(value) > 1 and not torch.equal(value[0], value[-1]):
            yield swap
    else:
        yield from (drop, swap)[: 1 + (not isinstance(value, dict) and len(value) > 1)]


def member(value, name):
    if isinstance(value, dict):
        return value[int(name) if name.isdecimal() else name]
    return value[int(name)] if isinstance(value, (list, tuple)) else getattr(value, name)


def corrupted(value, path, change):
    """A copy of arguments in which what lies at a path is changed."""
    if not path:
        return change(value)
    name, *rest = path
    new = corrupted(member(value, name), rest, change)
    if isinstance(value, dict):
        return {**value, int(name) if name.isdecimal() else name: new}
    if isinstance(value, (list, tuple)):
        parts = list(value)
        parts[int(name)] = new
        return type(value)(parts)
    other = copy.copy(value)
    object.__setattr__(other, name, new)  # perhaps a frozen one
    return other


def lose_share(shard):
    kept = {name: drop(getattr(shard, name)) for name in ("share_value", "share_channel")}
    return replace(shard, **kept, share_start=at(-1, len(kept["share_value"]))(shard.share_start))


def in_file(name, change):
    """Change a file's content, or delete it where None is made of it."""

    def corrupt(path):
        file = path / name
        before = file.read_bytes()
        content = change(before)
        assert content != before
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        return path

    return corrupt


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


def turn_certain(content):
    return content.replace(b"True\n", b"?").replace(b"False\n", b"True\n").replace(b"?", b"False\n")


def hooked(hook, *networks, module=""):
    def corrupt(a):
        for network in networks:
            a[network].get_submodule(module).register_forward_hook(hook)
        return a

    return corrupt


def under(place, names):
    return "".join(f" {place}/{name}" for name in names.split())


# What is nudged, dropped, swapped and made NaN, whichever changes it: paths through the arguments.
SENSITIVE = {
    "close": "actual",
    "rows_explain_output": "rows bias pooled n_positions",
    "responses": "responses channels rows",
    "records": "images"
    + under("shards/0", "index label prediction n_positions pooled share_start")
    + under("shards/0", "share_channel share_value input_map"),
    "untouched": under("after", "state gradients modes wants gradients/stem.weight")
    + " after/state/stem_norm.running_mean",
    "pairs": "pairs" + under("pairs/0", "channel class1 class2 cosine use1 use2"),
    "tau_chosen": "tau",
    "sensitivity": under("counted/cells", "2/tau 2/n_channels -1/n_pairs") + " counted/cells",
    "agrees_with_find": under("counted/cells", "2/n_channels -1/n_pairs"),
    "csv": "found/pairs found/class_names" + under("found/pairs/0", "class1 cosine use1 low half2"),
    "published_rows": under("part", "masks weight bias"),
    "published_rho": "part/info/rho",
    "extended_masks": "masks",
    "same_split": under("split2", "channels class_names settings/tau clusters")
    + under("split2/channels/0", "masks bias concepts info")
    + under("split2/clusters/5", "channel place least centres"),
    "bit_equal": "actual",
    "evaluation": under("result", "channels channels/0/concepts summary/published/separation_error")
    + under("result/channels/0", "separation_error separation_error_rectified")
    + under("result/channels/0/concepts/0", " ".join(("n_images", *checks.MEASURES))),
    "over_all": "result/channels result/channels/0/concepts"
    + under("result/channels/0", " ".join(checks.OF_CHANNEL))
    + under("result/channels/0/concepts/0", " ".join(checks.OVER_ALL))
    + under("result/summary/published", " ".join((*checks.OVER_ALL[:3], *checks.OF_CHANNEL))),
    "published_table": "ratios ratios/0/mean ratios/-1/median",
}
# What these do not reach. An empty path leads to all arguments.
FURTHER = {
    "close": [("actual", at(1, 0.0)), ("actual", lambda v: v[None])],
    "records": [("shards/0", lose_share), ("min_share", to(0.08))],
    "same_files": [("folder2", in_file(SHARD, flip)), ("folder1", in_file(SHARD, to(None)))],
    "same_tensors": [("folder2", in_file(SHARD, flip)), ("folder1", in_file(SHARD, to(None)))],
    "untouched": [
        ("after/state/head.weight", last_bit),
        ("before/gradients/stem.weight", to(None)),
        ("after/hooks", lambda hooks: {**hooks, ("layer", "_forward_hooks"): [17]}),
    ],
    "pairs": [("pairs", lambda v: (v[0], *v)), ("tau", to(0.2)), ("gamma", to(0.0))],
    "tau_chosen": [("tau", lambda t: t - 0.001), ("n_matter", to(3)), ("min_share", to(0.9))],
    "agrees_with_find": [("counted/cells", to(())), ("counted/cells/2/tau", to(0.3))],
    "grouped": [
        *(("concepts", drop), ("classes", drop), ("cosines", lambda v: {**v, (1, 4): 0.49})),
        ("concepts", to([(1,), (4,), (5, 7), (9,)])),
    ],
    "csv": [("found/pairs/0/cosine", last_bit), ("path", in_file("", turn_certain))],
    "published_rows": [("rho", to(0.05))],
    "published_rho": [("part", lambda v: replace(v, concepts=((2,), (3,)), info={"rho": 0.05}))],
    "extended_masks": [("rho", to(0.9))],  # then an input belongs to the third concept
    "adds_up": [(f"part/{name}", nudge) for name in ("weight", "bias", "rows", "residual_row")],
    "same_split": [("split2/channels/0/bias", last_bit), ("split2/layer/stride", to((2, 1)))],
    "bit_equal": [("actual", change) for change in (last_bit, at(1, -0.0), Tensor.double)],
    "same_outputs": [
        ("", hooked(lambda _m, _a, z: last_bit(z), "other")),
        ("", hooked(lambda _m, _a, z: z if torch.is_grad_enabled() else z * 2, "other")),
    ],
    "same_input_gradients": [
        ("", hooked(lambda _m, _a, z: z + 1e-6 * (z - z.detach()), "other", module="layer")),
        ("", hooked(lambda _m, a, z: z.detach() + 0 * a[0].sum(), *NETWORKS, module="stem")),
    ],
    "evaluation": [
        ("result/channels/0/separation_error_rectified", to(None)),
        ("result/channels/0", lambda c: replace(c, separation_error_rectified=c.separation_error)),
    ],
    "published_table": [("ratios", to(())), ("k", to(1)), ("tau", to(0.999))],  # no image counts
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_sound_data_and_fails_on_every_corruption(name, world):
    check, cases = CHECKS[name], list(FURTHER.get(name, []))
    check(**sound(name, world))
    for path in SENSITIVE.get(name, "").split():
        value = functools.reduce(member, path.split("/"), sound(name, world))
        cases += [(path, change) for change in all_of(value)]
    assert cases
    passed = []
    for path, change in cases:
        arguments = corrupted(sound(name, world), path.split("/") if path else [], change)
        try:
            check(**arguments)
        except (AssertionError, ValueError, IndexError):
            continue
        passed.append((path, inspect.getsource(change)))
    assert passed == []
