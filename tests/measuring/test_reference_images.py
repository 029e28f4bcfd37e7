"""Reference images: the strongest, none of which repeats a stronger one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from unbraid.demo.network import LAYER, load_images, load_network
from unbraid.measuring.reference_images import ALIKE, ReferenceImages, TopImages, reference_images
from unbraid.splitting.splits import Split

LIMITS = (0.95, 0.96, 0.97, 0.98, 0.99)


class Repeats(Dataset[tuple[Tensor, int]]):
    """Fifty images of four classes, each followed by two near-copies; perhaps known as groups."""

    def __init__(self, noise: float, grouped: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.targets = [n % 4 for n in range(50) for _ in range(3)]
        bases = torch.randn(4, 3, 8, 8, generator=generator)[[n % 4 for n in range(50)]]
        images = bases + 0.7 * torch.randn(50, 3, 8, 8, generator=generator)
        jitter = torch.randn(50, 3, 3, 8, 8, generator=generator)
        self.x = (images[:, None] + noise * jitter).flatten(0, 1)
        if grouped:
            self.groups = [f"photograph {n}" for n in range(50) for _ in range(3)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


@dataclass
class Run:
    network: nn.Module
    split: Split


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    scan = unbraid.scan(network, "2", Repeats(0.5), tmp_path_factory.mktemp("run"))
    found = unbraid.find(scan, channels={1: [[0], [1]], 4: [[2, 0], [3], [1]]})
    return Run(network, unbraid.split(scan, found))


def rows_of(top: ReferenceImages) -> tuple[TopImages, ...]:
    return (top.original, *top.concepts)


def row_pairs(
    one: dict[int, ReferenceImages], other: dict[int, ReferenceImages]
) -> Iterator[tuple[TopImages, TopImages]]:
    for channel, top in one.items():
        yield from zip(rows_of(top), rows_of(other[channel]), strict=True)


# --- images that the layer sees alike -------------------------------------------------------------


def chosen_one_by_one(strongest: list[int], centred: Tensor, n: int) -> list[int]:
    """The strongest that differ: by pairs, at the first limit that leaves n, else at the last."""
    for limit in LIMITS:
        chosen: list[int] = []
        for index in strongest:
            repeats = False
            for known in chosen:
                dot = float((centred[index] * centred[known]).sum())
                lengths = float(centred[index].norm() * centred[known].norm())
                repeats |= dot / lengths > limit
            if not repeats and len(chosen) < n:
                chosen.append(index)
        if len(chosen) == n:
            break
    return chosen


def assert_different(images: TopImages, strongest: TopImages, centred: Tensor, n: int) -> None:
    assert images.index.tolist() == chosen_one_by_one(strongest.index.tolist(), centred, n)
    place = {index: k for k, index in enumerate(strongest.index.tolist())}
    kept = torch.tensor([place[index] for index in images.index.tolist()])
    assert images.activation.tolist() == strongest.activation[kept].tolist()
    assert images.label.tolist() == strongest.label[kept].tolist()


def centred_inputs(scan: unbraid.Scan) -> Tensor:
    pooled = torch.cat([records.pooled.flatten(1) for records in scan.shards()]).double()
    return pooled - sum(pooled) / len(pooled)


def test_no_image_repeats_a_stronger_one(run: Run, tmp_path: Path) -> None:
    scan = unbraid.scan(run.network, "2", Repeats(0.01), tmp_path / "s")
    centred = centred_inputs(scan)
    strongest = reference_images(scan, run.split, n=24)
    repeated = 0
    for images, of_all in row_pairs(reference_images(scan, run.split, n=6, alike=ALIKE), strongest):
        assert_different(images, of_all, centred, 6)
        assert len({index // 3 for index in images.index.tolist()}) == len(images.index) == 6
        repeated += len({index // 3 for index in of_all.index[:6].tolist()}) < 6
        with pytest.raises(AssertionError):  # what is merely strongest is not different
            assert_different(of_all, of_all, centred, 6)
    assert repeated, "the fixture must have repeated images among the strongest"


@pytest.mark.parametrize("noise", [0.1, 0.15, 0.2, 0.3])
def test_where_too_few_differ_more_alike_ones_are_given(
    run: Run, tmp_path: Path, noise: float
) -> None:
    dataset = Subset(Repeats(noise), range(24))  # eight, each three times
    scan = unbraid.scan(run.network, "2", dataset, tmp_path / "s")
    centred = centred_inputs(scan)
    for n in range(6, 24):
        strongest = reference_images(scan, run.split, n=4 * n)
        found = reference_images(scan, run.split, n=n, alike=ALIKE)
        for images, of_all in row_pairs(found, strongest):
            assert_different(images, of_all, centred, n)


def test_of_copies_alone_few_are_given(run: Run, tmp_path: Path) -> None:
    """Four images, each 30 times: a row holds each once, not eight."""
    dataset = Repeats(0.0)
    dataset.x, dataset.targets = dataset.x[:12].repeat(10, 1, 1, 1), dataset.targets[:12] * 10
    scan = unbraid.scan(run.network, "2", dataset, tmp_path / "s")
    for top in reference_images(scan, run.split, n=8, alike=ALIKE).values():
        for images in rows_of(top):
            assert 1 <= len({i % 12 // 3 for i in images.index.tolist()}) == len(images.index) <= 4


# --- in the demo's network, with copies that were planted -----------------------------------------


class Copied(Dataset[tuple[Tensor, int]]):
    """Clothes, each followed by a copy that was changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        clothes = load_images("test")
        places = range(0, len(clothes), 4)
        low, high = (float(f(clothes[n][0])) for f, n in ((torch.min, 0), (torch.max, 0)))
        real = torch.stack([clothes[n][0] for n in places])
        changed = change((real - low) / (high - low)).clamp(0, 1) * (high - low) + low
        self.images = torch.stack([real, changed], 1).flatten(0, 1)
        self.targets = [clothes[n][1] for n in places for _ in range(2)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.targets[index]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda images: (
        images + 0.01 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ),
    "brightness": lambda images: 1.1 * images,
    "shift": lambda images: images.roll(1, -1),
}


@pytest.fixture(scope="module")
def demo_split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    folder = tmp_path_factory.mktemp("demo") / "scan"
    scan = unbraid.scan(load_network(), LAYER, load_images("train"), folder, batch_size=250)
    return unbraid.split(scan, unbraid.find(scan))


def assert_few_twice(found: dict[int, ReferenceImages]) -> None:
    """Hardly an image that is given is a copy of another in the same row."""
    shown = twice = 0
    for top in found.values():
        for images in rows_of(top):
            pairs = [index // 2 for index in images.index.tolist()]
            shown, twice = shown + len(pairs), twice + len(pairs) - len(set(pairs))
    assert twice / shown <= 0.05


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_left_out(demo_split: Split, tmp_path: Path, change: str) -> None:
    scan = unbraid.scan(load_network(), LAYER, Copied(CHANGES[change]), tmp_path, batch_size=250)
    different = reference_images(scan, demo_split, n=8, alike=ALIKE)
    assert_few_twice(different)
    strongest = reference_images(scan, demo_split, n=8)
    with pytest.raises(AssertionError):
        assert_few_twice(strongest)
    for images, of_all in row_pairs(different, strongest):  # and what is shown still is strong
        assert len(images.index) == 8
        assert float(images.activation.mean()) >= 0.75 * float(of_all.activation.mean())


# --- images that belong together ------------------------------------------------------------------


def test_of_a_group_only_the_strongest_is_given(run: Run, tmp_path: Path) -> None:
    dataset = Repeats(0.5, grouped=True)
    scan = unbraid.scan(run.network, "2", dataset, tmp_path / "s", positions=True)
    assert scan.manifest.n_shards > 1
    every = reference_images(scan, run.split, n=1000)
    for images, of_all in row_pairs(reference_images(scan, run.split, n=20, alike=1.1), every):
        best: dict[int, int] = {}
        for index in of_all.index.tolist():
            best.setdefault(index // 3, index)
        assert images.index.tolist() == list(best.values())[:20]
        assert list(best.values()) != of_all.index[: len(best)].tolist()
    for images, _ in row_pairs(reference_images(scan, run.split, n=6), every):
        assert images.group is None  # who asks for all gets all


def test_one_large_group_leaves_room_for_others(run: Run, tmp_path: Path) -> None:
    """However many images it has among the strongest, it is one."""
    dataset = Repeats(0.5, grouped=True)
    dataset.groups = ["the same" if target else n for n, target in enumerate(dataset.targets)]
    scan = unbraid.scan(run.network, "2", dataset, tmp_path / "s")
    n_alone = dataset.targets.count(0)
    for top in reference_images(scan, run.split, n=1000, alike=1.1).values():
        for images in rows_of(top):
            assert len(images.index) == 1 + n_alone
            assert sum(dataset.targets[index] != 0 for index in images.index.tolist()) == 1
