"""Accuracy, confusions and flipped images of two networks, counted once more from their logits."""

import copy
from collections import Counter

import pytest
import torch

from tiny_networks import SyntheticImages, WithBroken
from unbraid.base.errors import DataError, UsageError
from unbraid.measuring.before_after import compare_before_after


def changed(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.head.bias[0] += 0.3
    return other


@pytest.mark.parametrize("indices", [None, [1, 4, 5, 7, 9, 10]])
def test_figures_are_those_of_the_logits(pair, indices):
    data, network = SyntheticImages(14, seed=2), pair.network
    other = changed(network)
    found = compare_before_after(network, other, data, indices=indices, batch_size=4)
    chosen = list(range(14)) if indices is None else indices
    with torch.no_grad():
        logits = [model(data.images[chosen]) for model in (network, other)]
    before, after = (one.argmax(1).tolist() for one in logits)
    labels = [data.targets[index] for index in chosen]
    right = [sum(map(int.__eq__, labels, own)) for own in (before, after)]
    assert (found.n_images, found.n_labelled) == (len(chosen), len(chosen))
    assert [found.right_before, found.right_after] == right
    flips = {i for i, a, b in zip(chosen, before, after, strict=True) if a != b}
    assert flips
    assert {flip.index for flip in found.flips} == flips
    for flip in found.flips:
        place = chosen.index(flip.index)
        assert (flip.before, flip.after) == (f"class {before[place]}", f"class {after[place]}")
        own = logits[1][place]
        assert flip.margin == float(own[after[place]] - own[before[place]]) >= 0
    counts = [Counter(pair for pair in zip(labels, own, strict=True)) for own in (before, after)]
    for one in found.confusions:
        key = int(one.name[-1]), int(one.taken_for[-1])
        assert key[0] != key[1]
        assert [one.before, one.after] == [own[key] for own in counts]
        assert one.before != one.after
    assert sum(one.n_images for one in found.classes) == len(chosen)
    assert sum(one.after for one in found.classes) == right[1]
    assert f"{len(flips)} of {len(chosen)} images are taken for another class" in str(found)


def test_the_same_network_changes_nothing(pair):
    found = compare_before_after(pair.network, pair.network, SyntheticImages(8))
    assert found.flips == found.confusions == ()
    assert found.right_before == found.right_after
    assert [row[0] for row in found.table().rows] == ["class", "all"]


def test_images_without_labels_flip_all_the_same(pair):
    data = SyntheticImages(14, seed=2)
    labelled = compare_before_after(pair.network, changed(pair.network), data)
    data.targets = [-1] * len(data)
    found = compare_before_after(pair.network, changed(pair.network), data)
    assert (found.n_labelled, found.classes, found.confusions) == (0, (), ())
    assert [flip.index for flip in found.flips] == [flip.index for flip in labelled.flips]
    assert {flip.name for flip in found.flips} == {""}


def test_broken_images_wrong_labels_and_indices_are_told(pair):
    network, data = pair.network, WithBroken(8)
    found = compare_before_after(network, network, data, skip_broken=True)
    assert found.n_images == 7
    with pytest.raises(DataError, match="skip_broken"):
        compare_before_after(network, network, data)
    with pytest.raises(UsageError, match="some of 0 to 7"):
        compare_before_after(network, network, data, indices=[8])
    wrong = SyntheticImages(8)
    wrong.targets[3] = 9
    with pytest.raises(DataError, match="Image 3 has label 9"):
        compare_before_after(network, network, wrong)
