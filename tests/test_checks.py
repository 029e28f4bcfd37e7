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


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    network, dataset = build("groups"), SyntheticImages(13)
    scan = unbraid.scan(network, "layer", dataset, folder / "scan", positions=True, min_share=0.05)
    found = unbraid.find(scan, tau=TAU, p=P, gamma=1.0)
    own = unbraid.find(scan, tau=TAU, channels={1: [[0], [1]], 6: [[2, 0], [3]]})
    split = unbraid.split(scan, own, method="published")
    return World(
        folder,
        network,
        checks.truth_of(network, dataset),
        scan,
        found,
        split,
        unbraid.evaluate(split, scan, tau=TAU),
    )


# --- sound arguments for every check --------------------------------------------------------------

SOUND: dict[str, Callable[[World], Arguments]] = {}


def sound(function: Callable[[World], Arguments]) -> Callable[[World], Arguments]:
    """Register sound arguments for the check of the same name."""
    SOUND[f"assert_{function.__name__}"] = function
    return function


def pooled_of(world: World) -> Tensor:
    spec = describe("layer", world.network.layer)
    return pooled_input(spec, layer_input(world.network, SyntheticImages(13).images))


@sound
def close(_world: World) -> Arguments:
    return {"actual": torch.tensor([1.0, 2.0, math.nan]).double(), "expected": [1, 2.0, math.nan]}


@sound
def pooled_inputs(world: World) -> Arguments:
    return {"pooled": pooled_of(world), "truth": world.truth}


@sound
def rows_explain_output(world: World) -> Arguments:
    layer = world.network.layer
    return {
        "pooled": pooled_of(world),
        "rows": weight_rows(layer).clone(),
        "bias": bias_of(layer).clone(),
        "n_positions": torch.tensor([z.shape[1] for z in world.truth.z]),
        "truth": world.truth,
    }


@sound
def responses(world: World) -> Arguments:
    layer, channels = world.network.layer, [6, 1]
    found = respond(
        describe("layer", layer),
        layer_input(world.network, SyntheticImages(13).images),
        weight_rows(layer)[[2, 5]],
        bias_of(layer)[channels],
        channels,
    )
    return {
        "responses": found.flatten(2),
        "channels": channels,
        "rows": weight_rows(layer)[[2, 5]],
        "truth": world.truth,
    }


@sound
def relevance(world: World) -> Arguments:
    return {"relevance": world.truth.relevance.clone(), "truth": world.truth}


@sound
def shares(world: World) -> Arguments:
    return {"shares": world.truth.shares.clone(), "truth": world.truth}


@sound
def input_relevance_(world: World) -> Arguments:
    layer = world.network.layer
    by_channel = pooled_of(world).repeat_interleave(4, 1)
    found = input_relevance(weight_rows(layer), by_channel, 9)
    return {"input_relevance": found, "truth": world.truth}


SOUND["assert_input_relevance"] = SOUND.pop("assert_input_relevance_")


@sound
def records(world: World) -> Arguments:
    return {
        "shards": list(world.scan.shards()),
        "truth": world.truth,
        "min_share": 0.05,
        "images": range(13),
    }


@sound
def input_maps(world: World) -> Arguments:
    return {"shards": list(world.scan.shards()), "truth": world.truth}


@sound
def same_files(world: World) -> Arguments:
    folders = [world.folder / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for path in (world.folder / "scan").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    return {"folder1": folders[0], "folder2": folders[1]}


@sound
def same_tensors(world: World) -> Arguments:
    return same_files(world)


@sound
def untouched(world: World) -> Arguments:
    network = copy.deepcopy(world.network)
    network(SyntheticImages(2).images).sum().backward()
    return {"before": checks.snapshot(network), "after": checks.snapshot(network)}


@sound
def uses_(world: World) -> Arguments:
    return {
        "uses": uses(class_sums(world.scan, [TAU]), P)[0],
        "truth": world.truth,
        "tau": TAU,
        "p": P,
    }


SOUND["assert_uses"] = SOUND.pop("assert_uses_")


@sound
def arv(world: World) -> Arguments:
    mean = concept_mean(class_sums(world.scan, []), (0, 2))
    found = averaged_relevance(world.scan, 6, mean)
    return {"arv": found, "truth": world.truth, "concept": (0, 2), "channel": 6}


@sound
def pairs(world: World) -> Arguments:
    settings = {"tau": TAU, "p": P, "gamma": 1.0}
    return {"pairs": world.found.pairs, "truth": world.truth, **settings}


@sound
def grouped(_world: World) -> Arguments:
    alike = {(1, 4), (5, 7)}
    pairs = itertools.combinations((1, 4, 5, 7, 9), 2)
    return {
        "concepts": [(1, 4), (5, 7), (9,)],
        "classes": [1, 4, 5, 7, 9],
        "cosines": {pair: 0.9 if pair in alike else 0.1 for pair in pairs},
        "gamma": 0.5,
    }


@sound
def csv_(world: World) -> Arguments:
    world.found.to_csv(world.folder / "findings.csv")
    return {"path": world.folder / "findings.csv", "found": world.found}


SOUND["assert_csv"] = SOUND.pop("assert_csv_")


@sound
def tau_chosen(world: World) -> Arguments:
    shares = world.truth.shares
    tau = unbraid.find(world.scan, tau="auto").tau
    return {
        "tau": tau,
        "shares": shares,
        "labels": world.truth.labels,
        "n_matter": 2,  # a quarter of eight channels
        "min_share": 0.05,
    }


def grid_of(world: World) -> unbraid.Sensitivity:
    return unbraid.sensitivity(world.scan, [0.05, TAU, 0.3], [P, 0.75], [0.0, 0.5, 1.0])


@sound
def sensitivity(world: World) -> Arguments:
    return {"counted": grid_of(world), "truth": world.truth}


@sound
def agrees_with_find(world: World) -> Arguments:
    return {"counted": grid_of(world), "scan": world.scan}


@sound
def published_rows(world: World) -> Arguments:
    part = world.split.channels[1]
    return {"part": part, "rho": part.info["rho"], "truth": world.truth}


@sound
def published_rho(world: World) -> Arguments:
    return {"part": world.split.channels[0], "truth": world.truth}


@sound
def extended_masks(_world: World) -> Arguments:
    arvs = [torch.tensor(v) for v in ([4.0, 1.0, 0.0], [1.0, 1.0, 3.0], [0.0, 0.5, 4.0])]
    masks = [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    return {"masks": torch.tensor(masks).double(), "arvs": arvs, "rho": 0.5, "taps": 2}


@sound
def adds_up(world: World) -> Arguments:
    return {"part": world.split.channels[1]}


@sound
def same_split(world: World) -> Arguments:
    centres = torch.eye(3).double()[:2]
    clusters = {4 + k: Cluster(1, k, centres, 0.1) for k in range(2)}
    split = replace(world.split, clusters=clusters)
    return {"split1": split, "split2": copy.deepcopy(split)}


@sound
def bit_equal(_world: World) -> Arguments:
    return {"actual": torch.tensor([1.0, 0.0, 3.0]), "expected": torch.tensor([1.0, 0.0, 3.0])}


@sound
def same_outputs(world: World) -> Arguments:
    return {
        "network": world.network,
        "other": copy.deepcopy(world.network),
        "images": SyntheticImages(3).images,
    }


@sound
def same_input_gradients(world: World) -> Arguments:
    return same_outputs(world)


@sound
def evaluation(world: World) -> Arguments:
    return {"result": world.evaluation, "split": world.split, "truth": world.truth}


@sound
def published_table(world: World) -> Arguments:
    part = world.split.channels[1]
    return {
        "ratios": world.evaluation.channels[1].concepts[0].ratios,
        "part": part,
        "k": 0,
        "truth": world.truth,
        "tau": TAU,
    }


# --- corruptions: each changes the sound arguments in one way -------------------------------------

TWINS: list[Any] = []


def corruption(check: Callable[..., None]) -> Callable[..., Any]:
    """Register a function that corrupts the sound arguments of a check, in place."""

    def register(corrupt: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
        name = corrupt.__name__.strip("_").replace("_", " ")
        TWINS.append(pytest.param(check, corrupt, id=f"{check.__name__[7:]}: {name}"))
        return corrupt

    return register


def nudge(values: Tensor, place: int = 0, by: float = 1e-6) -> None:
    """Change one number by a little: far above the tolerances, far below what meets the eye."""
    values.view(-1)[place] += by * max(1.0, abs(float(values.view(-1)[place])))


def swap(values: Tensor, one: int, other: int, dim: int = 0) -> None:
    order = list(range(values.shape[dim]))
    order[one], order[other] = order[other], order[one]
    values.copy_(values.index_select(dim, torch.tensor(order)))


@corruption(checks.assert_close)
def _one_number(a: Arguments) -> None:
    nudge(a["actual"], 1)


@corruption(checks.assert_close)
def _a_number_for_nan(a: Arguments) -> None:
    a["actual"][2] = 0.0


@corruption(checks.assert_close)
def _nan_for_a_number(a: Arguments) -> None:
    a["actual"][0] = math.nan


@corruption(checks.assert_close)
def _another_shape(a: Arguments) -> None:
    a["actual"] = a["actual"][None]


@corruption(checks.assert_pooled_inputs)
def _flipped_taps(a: Arguments) -> None:
    swap(a["pooled"], 0, 2, dim=2)


@corruption(checks.assert_pooled_inputs)
def _swapped_groups(a: Arguments) -> None:
    swap(a["pooled"], 0, 1, dim=1)


@corruption(checks.assert_pooled_inputs)
def _last_image_off(a: Arguments) -> None:
    nudge(a["pooled"], -1)


@corruption(checks.assert_pooled_inputs)
def _an_image_short(a: Arguments) -> None:
    a["pooled"] = a["pooled"][:-1]


@corruption(checks.assert_rows_explain_output)
def _bias_off(a: Arguments) -> None:
    nudge(a["bias"], 3)


@corruption(checks.assert_rows_explain_output)
def _weight_off(a: Arguments) -> None:
    nudge(a["rows"], -1)


@corruption(checks.assert_rows_explain_output)
def _a_position_more(a: Arguments) -> None:
    a["n_positions"][4] += 1


@corruption(checks.assert_rows_explain_output)
def _pooled_groups_swapped(a: Arguments) -> None:
    swap(a["pooled"], 0, 1, dim=1)


@corruption(checks.assert_responses)
def _rows_swapped(a: Arguments) -> None:
    swap(a["responses"], 0, 1, dim=1)


@corruption(checks.assert_responses)
def _positions_flipped(a: Arguments) -> None:
    a["responses"] = a["responses"].flip(2)


@corruption(checks.assert_responses)
def _wrong_channel(a: Arguments) -> None:
    a["channels"] = [5, 1]


@corruption(checks.assert_relevance)
def _relevance_off(a: Arguments) -> None:
    nudge(a["relevance"], -1)


@corruption(checks.assert_relevance)
def _relevance_of_another_channel(a: Arguments) -> None:
    swap(a["relevance"], 0, 1, dim=1)


@corruption(checks.assert_shares)
def _share_off(a: Arguments) -> None:
    nudge(a["shares"], 5)


@corruption(checks.assert_shares)
def _shares_divided_by_all_relevance(a: Arguments) -> None:
    a["shares"] = a["truth"].relevance / a["truth"].relevance.sum(1, keepdim=True)


@corruption(checks.assert_input_relevance)
def _inputs_swapped(a: Arguments) -> None:
    swap(a["input_relevance"], 0, 1, dim=2)


@corruption(checks.assert_input_relevance)
def _one_input_off(a: Arguments) -> None:
    nudge(a["input_relevance"], -1)


@corruption(checks.assert_records)
def _flipped_tap(a: Arguments) -> None:
    swap(a["shards"][0].pooled, 0, 1, dim=2)


@corruption(checks.assert_records)
def _shifted_share(a: Arguments) -> None:
    a["shards"][0].share_start[1] += 1


@corruption(checks.assert_records)
def _share_of_another_size(a: Arguments) -> None:
    nudge(a["shards"][0].share_value, -1)


@corruption(checks.assert_records)
def _share_of_another_channel(a: Arguments) -> None:
    channels = a["shards"][0].share_channel
    channels[0] = channels[0] + 1


@corruption(checks.assert_records)
def _a_share_lost(a: Arguments) -> None:
    shard = a["shards"][0]
    shard.share_value, shard.share_channel = shard.share_value[:-1], shard.share_channel[:-1]
    shard.share_start[-1] -= 1


@corruption(checks.assert_records)
def _a_share_below_the_smallest(a: Arguments) -> None:
    a["min_share"] = 0.08


@corruption(checks.assert_records)
def _wrong_label(a: Arguments) -> None:
    a["shards"][0].label[7] += 1


@corruption(checks.assert_records)
def _wrong_prediction(a: Arguments) -> None:
    prediction = a["shards"][0].prediction
    prediction[0] = (prediction[0] + 1) % 4


@corruption(checks.assert_records)
def _wrong_number_of_positions(a: Arguments) -> None:
    a["shards"][0].n_positions[12] -= 1


@corruption(checks.assert_records)
def _images_in_another_order(a: Arguments) -> None:
    swap(a["shards"][0].index, 3, 4)


@corruption(checks.assert_records)
def _an_image_missing(a: Arguments) -> None:
    a["images"] = range(14)


@corruption(checks.assert_records)
def _two_images_records_swapped(a: Arguments) -> None:
    swap(a["shards"][0].pooled, 0, 4)  # both of class 0


@corruption(checks.assert_input_maps)
def _one_pixel_off(a: Arguments) -> None:
    nudge(a["shards"][0].input_map, -1)


@corruption(checks.assert_input_maps)
def _no_input_map(a: Arguments) -> None:
    a["shards"][0].input_map = None


@corruption(checks.assert_same_tensors)
@corruption(checks.assert_same_files)
def _one_bit(a: Arguments) -> None:
    path = a["folder2"] / "shard-000000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@corruption(checks.assert_same_files)
def _a_file_more(a: Arguments) -> None:
    (a["folder1"] / "left.tmp").touch()


@corruption(checks.assert_same_files)
def _a_file_less(a: Arguments) -> None:
    (a["folder1"] / "manifest.json").unlink()


@corruption(checks.assert_same_tensors)
def _a_shard_less(a: Arguments) -> None:
    (a["folder1"] / "shard-000000.safetensors").unlink()


@corruption(checks.assert_untouched)
def _last_bit_of_a_weight(a: Arguments) -> None:
    weight = a["after"]["state"]["head.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0).double())


@corruption(checks.assert_untouched)
def _a_running_mean(a: Arguments) -> None:
    nudge(a["after"]["state"]["stem_norm.running_mean"])


@corruption(checks.assert_untouched)
def _a_mode(a: Arguments) -> None:
    a["after"]["modes"]["stem_norm"] = True


@corruption(checks.assert_untouched)
def _a_wanted_gradient(a: Arguments) -> None:
    a["after"]["wants"]["stem.weight"] = False


@corruption(checks.assert_untouched)
def _a_gradient_off(a: Arguments) -> None:
    nudge(a["after"]["gradients"]["stem.weight"])


@corruption(checks.assert_untouched)
def _a_gradient_that_was_not_there(a: Arguments) -> None:
    a["before"]["gradients"]["stem.weight"] = None


@corruption(checks.assert_untouched)
def _a_hook_left(a: Arguments) -> None:
    a["after"]["hooks"]["layer", "_forward_hooks"] = [17]


@corruption(checks.assert_uses)
def _one_use(a: Arguments) -> None:
    a["uses"][2, 3] ^= True


@corruption(checks.assert_uses)
def _another_tau(a: Arguments) -> None:
    a["tau"] = 0.2


@corruption(checks.assert_uses)
def _another_p(a: Arguments) -> None:
    a["p"] = 1.0


@corruption(checks.assert_arv)
def _one_input_of_the_arv(a: Arguments) -> None:
    nudge(a["arv"], 2)


@corruption(checks.assert_arv)
def _the_arv_of_one_class(a: Arguments) -> None:
    a["concept"] = (0,)


@corruption(checks.assert_arv)
def _the_arv_of_another_channel(a: Arguments) -> None:
    a["channel"] = 5


@corruption(checks.assert_pairs)
def _a_cosine_off(a: Arguments) -> None:
    first, *rest = a["pairs"]
    a["pairs"] = (replace(first, cosine=first.cosine - 1e-6), *rest)


@corruption(checks.assert_pairs)
def _a_fraction_off(a: Arguments) -> None:
    first, *rest = a["pairs"]
    a["pairs"] = (replace(first, use2=first.use2 - 1e-6), *rest)


@corruption(checks.assert_pairs)
def _a_pair_lost(a: Arguments) -> None:
    a["pairs"] = a["pairs"][:-1]


@corruption(checks.assert_pairs)
def _a_pair_twice(a: Arguments) -> None:
    a["pairs"] = (a["pairs"][0], *a["pairs"])


@corruption(checks.assert_pairs)
def _pairs_out_of_order(a: Arguments) -> None:
    a["pairs"] = a["pairs"][::-1]


@corruption(checks.assert_pairs)
def _classes_swapped(a: Arguments) -> None:
    first, *rest = a["pairs"]
    swapped = replace(first, class1=first.class2, class2=first.class1)
    a["pairs"] = (swapped, *rest)


@corruption(checks.assert_pairs)
def _a_lower_gamma(a: Arguments) -> None:
    a["gamma"] = a["pairs"][-1].cosine - 1e-6


@corruption(checks.assert_tau_chosen)
def _tau_a_digit_too_low(a: Arguments) -> None:
    a["tau"] -= 0.001


@corruption(checks.assert_tau_chosen)
def _tau_a_digit_too_high(a: Arguments) -> None:
    a["tau"] += 0.001


@corruption(checks.assert_tau_chosen)
def _tau_with_more_digits(a: Arguments) -> None:
    a["tau"] += 1e-6


@corruption(checks.assert_tau_chosen)
def _the_tau_of_another_number_of_channels(a: Arguments) -> None:
    a["n_matter"] = 3


@corruption(checks.assert_tau_chosen)
def _tau_above_too_high_a_smallest_share(a: Arguments) -> None:
    a["min_share"] = 0.9


def with_cell(counted: unbraid.Sensitivity, place: int, **changes: int) -> unbraid.Sensitivity:
    cells = list(counted.cells)
    cells[place] = replace(cells[place], **changes)
    return replace(counted, cells=tuple(cells))


for one in (checks.assert_sensitivity, checks.assert_agrees_with_find):

    @corruption(one)
    def _a_channel_more(a: Arguments) -> None:
        a["counted"] = with_cell(a["counted"], 2, n_channels=a["counted"].cells[2].n_channels + 1)

    @corruption(one)
    def _a_pair_less_in_the_last_cell(a: Arguments) -> None:
        a["counted"] = with_cell(a["counted"], -1, n_pairs=a["counted"].cells[-1].n_pairs - 1)

    @corruption(one)
    def _cells_of_two_taus_swapped(a: Arguments) -> None:
        cells = list(a["counted"].cells)
        first, last = cells[2], cells[-1]
        cells[2], cells[-1] = replace(first, tau=last.tau), replace(last, tau=first.tau)
        a["counted"] = replace(a["counted"], cells=tuple(cells))


@corruption(checks.assert_sensitivity)
def _a_cell_lost(a: Arguments) -> None:
    a["counted"] = replace(a["counted"], cells=a["counted"].cells[:-1])


@corruption(checks.assert_agrees_with_find)
def _no_cell_at_all(a: Arguments) -> None:
    a["counted"] = replace(a["counted"], cells=())


@corruption(checks.assert_grouped)
def _a_class_in_the_wrong_concept(a: Arguments) -> None:
    a["concepts"] = [(1, 4), (5,), (7, 9)]


@corruption(checks.assert_grouped)
def _two_concepts_for_one_cause(a: Arguments) -> None:
    a["concepts"] = [(1,), (4,), (5, 7), (9,)]


@corruption(checks.assert_grouped)
def _a_class_in_no_concept(a: Arguments) -> None:
    a["concepts"] = [(1, 4), (5, 7)]


@corruption(checks.assert_grouped)
def _a_class_in_two_concepts(a: Arguments) -> None:
    a["concepts"] = [(1, 4), (5, 7), (9, 1)]


@corruption(checks.assert_grouped)
def _a_concept_of_two_causes(a: Arguments) -> None:
    a["cosines"][1, 4] = 0.49


@corruption(checks.assert_csv)
def _a_row_lost(a: Arguments) -> None:
    lines = a["path"].read_text().splitlines(keepends=True)
    a["path"].write_text("".join(lines[:-1]))


@corruption(checks.assert_csv)
def _a_rounded_cosine(a: Arguments) -> None:
    cosine = str(a["found"].pairs[0].cosine)
    a["path"].write_text(a["path"].read_text().replace(cosine, cosine[:-2], 1))


@corruption(checks.assert_csv)
def _a_rounded_interval(a: Arguments) -> None:
    low = str(a["found"].pairs[0].low)
    a["path"].write_text(a["path"].read_text().replace(low, low[:-2], 1))


@corruption(checks.assert_csv)
def _another_pair_that_is_uncertain(a: Arguments) -> None:
    text = a["path"].read_text()
    flipped = text.replace("True\n", "?").replace("False\n", "True\n").replace("?", "False\n")
    assert flipped != text
    a["path"].write_text(flipped)


@corruption(checks.assert_csv)
def _a_wrong_name(a: Arguments) -> None:
    a["path"].write_text(a["path"].read_text().replace("class 0", "class O", 1))


def _with_part(a: Arguments, **changes: Any) -> None:
    a["part"] = replace(a["part"], **changes)


@corruption(checks.assert_published_rows)
def _one_tap_more(a: Arguments) -> None:
    masks = a["part"].masks.clone()
    masks.view(-1)[int((masks == 0).flatten().nonzero()[0])] = 1.0
    _with_part(a, masks=masks)


@corruption(checks.assert_published_rows)
def _swapped_concepts(a: Arguments) -> None:
    _with_part(a, masks=a["part"].masks.flip(0))


@corruption(checks.assert_published_rows)
def _wrong_rho_for_the_rows(a: Arguments) -> None:
    a["rho"] = 0.05


@corruption(checks.assert_published_rows)
def _a_weight_off(a: Arguments) -> None:
    weight = a["part"].weight.clone()
    nudge(weight)
    _with_part(a, weight=weight)


@corruption(checks.assert_published_rows)
def _a_bias_off(a: Arguments) -> None:
    _with_part(a, bias=a["part"].bias + 1e-6)


@corruption(checks.assert_published_rho)
def _wrong_rho(a: Arguments) -> None:
    rho = a["part"].info["rho"]
    _with_part(a, info={"rho": rho - 0.05 if rho > 0.5 else rho + 0.05})


@corruption(checks.assert_published_rho)
def _rho_of_other_concepts(a: Arguments) -> None:
    a["part"] = replace(a["part"], concepts=((2,), (3,)), info={"rho": 0.05})


@corruption(checks.assert_extended_masks)
def _a_tap_kept_that_another_owns(a: Arguments) -> None:
    a["masks"][1, 0] = 1.0


@corruption(checks.assert_extended_masks)
def _a_shared_tap_dropped(a: Arguments) -> None:
    a["masks"][0, 3] = 0.0


@corruption(checks.assert_extended_masks)
def _another_rho(a: Arguments) -> None:
    a["rho"] = 0.9  # then the last input channel belongs to the third concept


@corruption(checks.assert_extended_masks)
def _taps_in_another_order(a: Arguments) -> None:
    a["masks"] = a["masks"].reshape(3, 3, 2).transpose(1, 2).reshape(3, 6)


class _OffBy(ChannelSplit):
    """A part whose residual is a little off."""

    @property
    def residual_row(self) -> Tensor:
        return super().residual_row + 1e-9


class _WrongResidualBias(ChannelSplit):
    """A part whose residual carries every concept's bias."""

    @property
    def residual_bias(self) -> float:
        return len(self.concepts) * self.bias


@corruption(checks.assert_adds_up)
def _a_residual_off(a: Arguments) -> None:
    a["part"] = _OffBy(**vars(a["part"]))


@corruption(checks.assert_adds_up)
def _a_bias_too_many(a: Arguments) -> None:
    a["part"] = _WrongResidualBias(**vars(a["part"]))


def _other_part(a: Arguments, **changes: Any) -> None:
    first, *rest = a["split2"].channels
    a["split2"] = replace(a["split2"], channels=(replace(first, **changes), *rest))


@corruption(checks.assert_same_split)
def _other_masks(a: Arguments) -> None:
    _other_part(a, masks=a["split2"].channels[0].masks * (1 + 1e-15))


@corruption(checks.assert_same_split)
def _masks_of_another_format(a: Arguments) -> None:
    _other_part(a, masks=a["split2"].channels[0].masks.float())


@corruption(checks.assert_same_split)
def _other_concepts(a: Arguments) -> None:
    _other_part(a, concepts=((1,), (0,)))


@corruption(checks.assert_same_split)
def _another_bias(a: Arguments) -> None:
    _other_part(a, bias=math.nextafter(a["split2"].channels[0].bias, 9))


@corruption(checks.assert_same_split)
def _other_info(a: Arguments) -> None:
    _other_part(a, info={})


@corruption(checks.assert_same_split)
def _a_channel_short(a: Arguments) -> None:
    a["split2"] = replace(a["split2"], channels=a["split2"].channels[:1])


@corruption(checks.assert_same_split)
def _other_settings(a: Arguments) -> None:
    a["split2"] = replace(a["split2"], settings={**a["split2"].settings, "tau": 0.031})


@corruption(checks.assert_same_split)
def _other_names(a: Arguments) -> None:
    a["split2"] = replace(a["split2"], class_names=())


@corruption(checks.assert_same_split)
def _another_layer(a: Arguments) -> None:
    a["split2"] = replace(a["split2"], layer=replace(a["split2"].layer, stride=(2, 1)))


def _other_cluster(a: Arguments, **changes: Any) -> None:
    clusters = a["split2"].clusters
    a["split2"] = replace(a["split2"], clusters={**clusters, 5: replace(clusters[5], **changes)})


@corruption(checks.assert_same_split)
def _a_cluster_of_another_channel(a: Arguments) -> None:
    _other_cluster(a, channel=2)


@corruption(checks.assert_same_split)
def _a_cluster_in_another_place(a: Arguments) -> None:
    _other_cluster(a, place=0)


@corruption(checks.assert_same_split)
def _a_cluster_with_another_smallest_answer(a: Arguments) -> None:
    _other_cluster(a, least=math.nextafter(0.1, 1))


@corruption(checks.assert_same_split)
def _a_cluster_with_other_centres(a: Arguments) -> None:
    _other_cluster(a, centres=torch.eye(3).double()[1:])


@corruption(checks.assert_same_split)
def _a_cluster_lost(a: Arguments) -> None:
    a["split2"] = replace(a["split2"], clusters={4: a["split2"].clusters[4]})


@corruption(checks.assert_bit_equal)
def _the_last_bit(a: Arguments) -> None:
    a["actual"][2] = torch.nextafter(a["actual"][2], torch.tensor(9.0))


@corruption(checks.assert_bit_equal)
def _the_sign_of_a_zero(a: Arguments) -> None:
    a["actual"][1] = -0.0


@corruption(checks.assert_bit_equal)
def _another_format(a: Arguments) -> None:
    a["actual"] = a["actual"].double()


@corruption(checks.assert_bit_equal)
def _another_shape_of_the_same_bits(a: Arguments) -> None:
    a["actual"] = a["actual"][:, None]


@corruption(checks.assert_same_outputs)
def _the_last_bit_of_a_weight(a: Arguments) -> None:
    bias = a["other"].head.bias
    with torch.no_grad():
        bias[3] = torch.nextafter(bias[3], torch.tensor(9.0).double())


@corruption(checks.assert_same_outputs)
def _only_without_a_graph(a: Arguments) -> None:
    def off(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output if torch.is_grad_enabled() else output * 2

    a["other"].register_forward_hook(off)


@corruption(checks.assert_same_input_gradients)
def _same_value_other_gradient(a: Arguments) -> None:
    def off(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output + 1e-6 * (output - output.detach())

    a["other"].layer.register_forward_hook(off)


@corruption(checks.assert_same_input_gradients)
def _no_gradient_at_all(a: Arguments) -> None:
    def cut(_module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach() + 0 * args[0].sum()

    for network in (a["network"], a["other"]):
        network.stem.register_forward_hook(cut)


def _with_channel(a: Arguments, **changes: Any) -> None:
    first, *rest = a["result"].channels
    a["result"] = replace(a["result"], channels=(replace(first, **changes), *rest))


def _with_concept(a: Arguments, **changes: Any) -> None:
    first, *rest = a["result"].channels[0].concepts
    _with_channel(a, concepts=(replace(first, **changes), *rest))


MEASURES = ("retention", "leakage", "mimic_error", "silence_error", "auroc")


def _measure_off(name: str) -> Callable[[Arguments], None]:
    def corrupt(a: Arguments) -> None:
        concept = a["result"].channels[0].concepts[0]
        _with_concept(a, **{name: getattr(concept, name) + 1e-6})

    corrupt.__name__ = f"{name}_off"
    return corrupt


def _measure_unknown(name: str) -> Callable[[Arguments], None]:
    def corrupt(a: Arguments) -> None:
        _with_concept(a, **{name: math.nan})

    corrupt.__name__ = f"{name}_unknown"
    return corrupt


for _name in MEASURES:
    corruption(checks.assert_evaluation)(_measure_off(_name))
    corruption(checks.assert_evaluation)(_measure_unknown(_name))


@corruption(checks.assert_evaluation)
def _swapped_concepts_measured(a: Arguments) -> None:
    _with_channel(a, concepts=a["result"].channels[0].concepts[::-1])


@corruption(checks.assert_evaluation)
def _a_concept_not_measured(a: Arguments) -> None:
    _with_channel(a, concepts=a["result"].channels[0].concepts[:1])


@corruption(checks.assert_evaluation)
def _a_channel_not_measured(a: Arguments) -> None:
    a["result"] = replace(a["result"], channels=a["result"].channels[:1])


@corruption(checks.assert_evaluation)
def _images_miscounted(a: Arguments) -> None:
    _with_concept(a, n_images=a["result"].channels[0].concepts[0].n_images + 1)


@corruption(checks.assert_evaluation)
def _separation_error_off(a: Arguments) -> None:
    _with_channel(a, separation_error=a["result"].channels[0].separation_error + 1e-6)


@corruption(checks.assert_evaluation)
def _rectified_error_not_computed(a: Arguments) -> None:
    _with_channel(a, separation_error_rectified=None)


@corruption(checks.assert_evaluation)
def _rectified_error_that_is_the_pooled_one(a: Arguments) -> None:
    _with_channel(a, separation_error_rectified=a["result"].channels[0].separation_error)


class _WrongSummary(unbraid.Evaluation):
    """A summary that forgets a channel."""

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        return replace(unbraid.Evaluation(**vars(self)), channels=self.channels[:1]).summary


@corruption(checks.assert_evaluation)
def _summary_of_some_channels(a: Arguments) -> None:
    a["result"] = _WrongSummary(**vars(a["result"]))


@corruption(checks.assert_published_table)
def _a_mean_off(a: Arguments) -> None:
    first, *rest = a["ratios"]
    a["ratios"] = (replace(first, mean=first.mean + 1e-6), *rest)


@corruption(checks.assert_published_table)
def _a_median_off(a: Arguments) -> None:
    *rest, last = a["ratios"]
    a["ratios"] = (*rest, replace(last, median=last.median - 1e-6))


@corruption(checks.assert_published_table)
def _new_channels_swapped(a: Arguments) -> None:
    first, second, residual = a["ratios"]
    a["ratios"] = (second, first, residual)


@corruption(checks.assert_published_table)
def _no_residual(a: Arguments) -> None:
    a["ratios"] = a["ratios"][:2]


@corruption(checks.assert_published_table)
def _an_empty_table(a: Arguments) -> None:
    a["ratios"] = ()


@corruption(checks.assert_published_table)
def _images_of_the_other_concept(a: Arguments) -> None:
    a["k"] = 1


@corruption(checks.assert_published_table)
def _a_table_where_no_image_counts(a: Arguments) -> None:
    a["tau"] = 0.999


# --- the tests ------------------------------------------------------------------------------------

CHECKS = {
    name: check
    for name, check in inspect.getmembers(checks, inspect.isfunction)
    if name.startswith("assert_") and check.__module__ == checks.__name__
}


def own(arguments: Arguments) -> Arguments:
    """A copy to corrupt; a truth is big and never changed."""
    return {k: v if isinstance(v, Truth) else copy.deepcopy(v) for k, v in arguments.items()}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_on_sound_data(name, world):
    CHECKS[name](**own(SOUND[name](world)))


@pytest.mark.parametrize(("check", "corrupt"), TWINS)
def test_a_check_fails_on_corrupted_data(check, corrupt, world):
    arguments = own(SOUND[check.__name__](world))
    corrupt(arguments)
    with pytest.raises((AssertionError, ValueError)) as caught:
        check(**arguments)
    if caught.type is ValueError:  # zip(strict=True) in a check
        assert "zip()" in str(caught.value)


def test_every_check_has_a_twin():
    assert set(SOUND) == set(CHECKS)
    assert {twin.values[0].__name__ for twin in TWINS} == set(CHECKS)


def test_corruptions_change_something_in_data_that_can_tell(world):
    used = uses(class_sums(world.scan, [TAU]), P)[0]
    assert used.any()
    assert not used.all()
    assert len(world.found.pairs) >= 3
    assert len(world.evaluation.channels[1].concepts[0].ratios) == 3
    assert world.split.channels[1].info["rho"] != 0.05
