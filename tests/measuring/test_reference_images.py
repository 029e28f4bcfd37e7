"""Reference images: the strongest, none of which repeats a stronger one."""

import pytest
import torch
from torch.utils.data import Subset

import oracle
import unbraid
from pages import Blobs, make_network
from tiny_networks import SyntheticImages
from unbraid.demo import network as demo
from unbraid.measuring.reference_images import ALIKE, reference_images


class Repeats(Blobs):
    """Fifty images of four classes, each followed by two near-copies; perhaps known as groups."""

    broken = ()

    def __init__(self, noise, groups=None):
        super().__init__(50, 1)
        self.targets = [n % 4 for n in range(50) for _ in range(3)]
        jitter = torch.randn(50, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        self.x = (self.x[:, None] + noise * jitter).flatten(0, 1)
        if groups is not None:
            self.groups = groups


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return make_network()


@pytest.fixture(scope="module")
def split(network, tmp_path_factory):
    scan = unbraid.scan(network, "2", Repeats(0.5), tmp_path_factory.mktemp("run"))
    found = unbraid.find(scan, channels={1: [[0], [1]], 4: [[2, 0], [3], [1]]})
    return unbraid.split(scan, found)


def rows_of(found):
    return [row for top in found.values() for row in (top.original, *top.concepts)]


def chosen_one_by_one(strongest, centred, n):
    """The strongest that differ: by pairs, at the first limit that leaves n, else at the last."""
    for limit in (0.95, 0.96, 0.97, 0.98, 0.99):
        chosen = []
        for index in strongest:
            alike = [oracle.cosine(centred[index], centred[known]) for known in chosen]
            if len(chosen) < n and max(alike, default=0) <= limit:
                chosen.append(index)
        if len(chosen) == n:
            break
    return chosen


def assert_different(images, strongest, scan, n):
    pooled = torch.cat([records.pooled.flatten(1) for records in scan.shards()]).double()
    index = strongest.index.tolist()
    assert images.index.tolist() == chosen_one_by_one(index, pooled - pooled.mean(0), n)
    kept = [index.index(one) for one in images.index.tolist()]
    assert images.activation.tolist() == strongest.activation[kept].tolist()
    assert images.label.tolist() == strongest.label[kept].tolist()


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.1, 0.15, 0.3])
def test_reference_images_alike_gives_no_copies(noise, network, split, tmp_path):
    dataset = Subset(Repeats(noise), range(24))  # eight, each three times
    scan = unbraid.scan(network, "2", dataset, tmp_path)
    for n in range(6, 24, 4):
        found = reference_images(scan, split, n=n, alike=ALIKE)
        strongest = reference_images(scan, split, n=4 * n)
        for images, of_all in zip(rows_of(found), rows_of(strongest), strict=True):
            assert_different(images, of_all, scan, n)
            if noise <= 0.01:
                originals = {index // 3 for index in images.index.tolist()}
                assert len(originals) == len(images.index) == min(n, 8)
                with pytest.raises(AssertionError):  # what is merely strongest is not different
                    assert_different(of_all, of_all, scan, n)


@pytest.mark.parametrize(("n", "large"), [(20, False), (1000, True)])
def test_reference_images_alike_gives_the_strongest_of_a_group(n, large, network, split, tmp_path):
    groups = [("large" if k // 3 % 5 else k) if large else f"three {k // 3}" for k in range(150)]
    scan = unbraid.scan(network, "2", Repeats(0.5, groups), tmp_path, positions=True)
    found = reference_images(scan, split, n=n, alike=1.1)
    every = reference_images(scan, split, n=1000)
    for images, of_all in zip(rows_of(found), rows_of(every), strict=True):
        best = {}
        for index in of_all.index.tolist():
            best.setdefault(groups[index], index)
        assert images.index.tolist() == list(best.values())[:n]
        assert list(best.values()) != of_all.index[: len(best)].tolist()
        assert of_all.group is None  # who asks for all gets all


@pytest.fixture(scope="module")
def demo_split(tmp_path_factory):
    images, folder = demo.load_images("train"), tmp_path_factory.mktemp("demo")
    scan = unbraid.scan(demo.load_network(), demo.LAYER, images, folder, batch_size=250)
    return unbraid.split(scan, unbraid.find(scan))


def assert_few_twice(found):
    """Hardly an image that is given is a copy of another in the same row."""
    pairs = [[index // 2 for index in row.index.tolist()] for row in rows_of(found)]
    assert sum(len(row) - len(set(row)) for row in pairs) <= 0.05 * sum(map(len, pairs))


@pytest.mark.parametrize(
    "change",
    [
        lambda images: images + 0.01 * torch.randn(images.shape),
        lambda images: 1.1 * images,
        lambda images: images.roll(1, -1),
    ],
)
def test_reference_images_alike_leaves_out_planted_copies(change, demo_split, tmp_path):
    clothes, copied = demo.load_images("test"), SyntheticImages(0)
    real = torch.stack([clothes[n][0] for n in range(0, len(clothes), 4)])
    low, high = real.min(), real.max()
    changed = change((real - low) / (high - low)).clamp(0, 1) * (high - low) + low
    copied.images = torch.stack([real, changed], 1).flatten(0, 1)
    copied.targets = [clothes[n][1] for n in range(0, len(clothes), 4) for _ in range(2)]
    scan = unbraid.scan(demo.load_network(), demo.LAYER, copied, tmp_path, batch_size=250)
    different = reference_images(scan, demo_split, n=8, alike=ALIKE)
    strongest = reference_images(scan, demo_split, n=8)
    assert_few_twice(different)
    with pytest.raises(AssertionError):
        assert_few_twice(strongest)
    for images, of_all in zip(rows_of(different), rows_of(strongest), strict=True):
        assert len(images.index) == 8
        assert images.activation.mean() >= 0.75 * of_all.activation.mean()  # and still is strong
