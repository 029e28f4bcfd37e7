"""Which images a first look is at, by a plain loop."""

import pytest
import torch
from sources import fraction
from torch.utils.data import Dataset

from unbraid.images.broken import UNLABELLED
from unbraid.images.sample import choose, sample_of


class Named(Dataset):
    """A data set that is never read."""

    def __init__(self, ids, targets):
        self.ids, self.targets = ids, targets

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        raise AssertionError


def plain(ids, labels, n, hash_of):
    """The lowest hash of each class in turn, then the next, at first only of 128 classes."""
    turns = sorted(set(labels), key=lambda label: hash_of(str(label)))
    of_class = {
        c: sorted((hash_of(i), i) for i, own in zip(ids, labels, strict=True) if own == c)
        for c in turns
    }
    chosen = []
    for some in (turns[:128], turns[128:]):
        for rank in range(len(ids)):
            chosen += [of_class[c][rank][1] for c in some if rank < len(of_class[c])]
    return sorted(ids.index(one) for one in chosen[:n])


@pytest.mark.parametrize(
    ("n", "labels"),
    [
        (40, [k % 7 for k in range(200)]),
        (40, [0] * 190 + list(range(1, 11))),  # of single images
        (20, [UNLABELLED] * 60),
        (300, [k % 200 for k in range(900)]),  # of more classes than there may be
        (900, [k % 200 for k in range(901)]),
    ],
)
def test_choose_is_what_a_plain_loop_chooses(n, labels):
    ids = [f"{k}.png" for k in range(len(labels))]
    known = {}

    def hash_of(one):
        return known.setdefault(one, fraction(one))

    chosen = choose(ids, labels, n)
    assert chosen == plain(ids, labels, n, hash_of)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    again = choose([ids[k] for k in order], [labels[k] for k in order], n)
    assert sorted(order[k] for k in again) == chosen


def test_choose_keeps_classes_in_balance():
    labels = [k % 100 for k in range(5000)] + [100] + [UNLABELLED] * 3
    chosen = choose(map(str, range(len(labels))), labels, 2048)
    own = [labels[k] for k in chosen]
    assert (own.count(100), own.count(UNLABELLED)) == (1, 3)
    assert {own.count(label) for label in range(100)} == {20, 21}


def test_sample_of_takes_all_where_there_are_no_more():
    images = Named(list("abc"), [0, 0, 1])
    assert sample_of(images, 3, by_class=True) == [0, 1, 2]
    assert labels_in(images, 2, True) == [0, 1]
    assert len(sample_of(images, 2, by_class=False)) == 2


def labels_in(images, n, by_class):
    return [images.targets[k] for k in sample_of(images, n, by_class=by_class)]
