"""Outputs of two networks compared."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import unbraid
from checks import assert_close, assert_untouched, snapshot
from tiny_networks import SyntheticImages, WithBroken
from unbraid.base.errors import DataError, ModelError, OutputChangedError, UsageError
from unbraid.measuring.before_after import compare_before_after


def nudged(network, name, by):
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.state_dict()[name].flatten()[0].add_(by)
    return changed


def accuracy(network, dataset):
    pairs = zip(dataset.images, dataset.targets, strict=True)
    return sum(network(x[None]).argmax().item() == label for x, label in pairs) / len(dataset)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_compare_outputs_counts_over_all_images(batch_size, pair):
    dataset, network = SyntheticImages(9, seed=2), pair.network
    other = nudged(network, "head.bias", 0.3)
    result = unbraid.compare_outputs(network, other, dataset, tolerance=1.0, batch_size=batch_size)
    with torch.no_grad():
        before, after = network(dataset.images), other(dataset.images)
    same = before.argmax(1) == after.argmax(1)
    assert 0 < same.double().mean() < 1  # else the test could not tell
    assert_close(result.max_abs_logit_diff, 0.3)
    assert_close(result.top1_agreement, same.double().mean())
    assert result.top1_before == accuracy(network, dataset)
    assert result.top1_after == accuracy(other, dataset)


@pytest.mark.parametrize("asked", [True, False])
def test_passes_over_images_tell_how_far_they_are_only_if_asked(asked, pair, capsys):
    dataset, told = SyntheticImages(5), {}
    for title, work in {
        "Comparing outputs": lambda: unbraid.compare_outputs(
            pair.network, pair.changed, dataset, progress=asked
        ),
        "Switching channels off": lambda: unbraid.ablate(pair.changed, dataset, progress=asked),
        "Before and after": lambda: compare_before_after(
            pair.network, pair.changed, dataset, progress=asked
        ),
    }.items():
        work()
        told[title] = capsys.readouterr().err
    assert all((f"{title}: 5 of 5" in own) == asked for title, own in told.items())
    assert asked or set(told.values()) == {""}


def test_compare_outputs_passes_the_plain_form_and_an_unused_part(pair):
    network = copy.deepcopy(pair.network)
    network.stem.spare = nn.Sequential(nn.ReLU())
    network.stem.spare.names = ["spare"]
    result = unbraid.compare_outputs(network, network, SyntheticImages(3))
    assert result.max_abs_logit_diff == 0
    result = unbraid.compare_outputs(pair.network, pair.plain, SyntheticImages(9))
    assert 0 < result.max_abs_logit_diff < 1e-12


@pytest.mark.parametrize("name", ["layer.original.weight", "stem.weight", "head.bias"])
def test_compare_outputs_notices_a_small_change_and_leaves_networks_as_they_were(name, pair):
    other = nudged(pair.changed, name, 1e-3).train()
    before = snapshot(pair.network), snapshot(other)
    with pytest.raises(OutputChangedError, match="more than the tolerance 0"):
        unbraid.compare_outputs(pair.network, other, SyntheticImages(9), tolerance=0.0)
    with pytest.raises(UsageError, match="must be 0 or more"):
        unbraid.compare_outputs(pair.network, other, SyntheticImages(9), tolerance=-1.0)
    unbraid.compare_outputs(pair.network, other, SyntheticImages(9), tolerance=1.0)
    assert_untouched(before[0], snapshot(pair.network))
    assert_untouched(before[1], snapshot(other))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_compare_outputs_refuses_what_are_no_numbers_whatever_the_tolerance(value, pair):
    class LastIsBroken(nn.Module):
        def forward(self, x):
            logits = pair.changed(x).clone()
            logits[x[:, 0, 0, 0] == 77.0] = value
            return logits

    dataset = SyntheticImages(9)
    dataset.images[8, 0, 0, 0] = 77.0  # in the last batch
    broken = nudged(pair.network, "head.weight", float("nan"))
    for one, other in ((pair.network, LastIsBroken()), (broken, broken)):
        with pytest.raises(OutputChangedError):
            unbraid.compare_outputs(one, other, dataset, tolerance=1e9, batch_size=4)


def test_compare_outputs_leaves_out_a_broken_image_and_refuses_what_cannot_be_compared(pair):
    networks, options = (pair.network, pair.changed), {"batch_size": 1, "skip_broken": True}
    result = unbraid.compare_outputs(*networks, WithBroken(5), **options)
    rest = SyntheticImages(5)
    rest.images, rest.targets = rest.images[[0, 1, 2, 4]], [0, 1, 2, 0]
    assert result.top1_before == accuracy(pair.network, rest)
    for dataset, skip, error, sentence in (
        (WithBroken(5), False, DataError, r"Image 3 .*picture-3\.jpg"),
        (Subset(WithBroken(5), [3]), True, DataError, "No image could be read"),
        (SyntheticImages(4, size=(1, 7, 6)), True, ModelError, r"shape \(1, 7, 6\)"),
    ):
        with pytest.raises(error, match=sentence):
            unbraid.compare_outputs(pair.network, pair.changed, dataset, skip_broken=skip)


def test_an_output_that_is_no_logits_is_neither_right_nor_wrong():
    maps, images = nn.Conv2d(3, 5, 1).eval(), SyntheticImages(4, size=(3, 6, 6))
    same = unbraid.compare_outputs(maps.double(), maps, images, tolerance=0.0)
    assert (same.max_abs_logit_diff, same.n_images) == (0.0, 4)
    assert (same.top1_agreement, same.top1_before, same.top1_after) == (None, None, None)
