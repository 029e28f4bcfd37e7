"""How batches come from worker processes, and what is said when these die."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch.distributed import DistNetworkError
from torch.utils.data import Dataset, get_worker_info

import unbraid
from checks import assert_same_files
from networks import SyntheticImages, build
from unbraid.errors import DataError, RunError
from unbraid.loading import as_batch, deaths_told, load


class Mixed(Dataset):
    """Images of two sizes and a broken one."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        if index == 2:
            raise ValueError("torn")
        return torch.full((1, 2 + (index == 5), 2), float(index)), index + 10


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_as_they_were_read_one_size_or_several(workers):
    found = list(load(Mixed(), [[0, 2, 1], [2], [4, 5]], workers=workers, pinned=False))
    assert [[item[0] for item in items] for items in found] == [[0, 2, 1], [2], [4, 5]]
    for item in (item for items in found for item in items):
        if item[0] == 2:
            assert "torn" in item[1]
        else:
            assert item[2] == item[0] + 10
            assert torch.equal(item[1], Mixed()[item[0]][0])


def test_a_batch_takes_a_file_and_not_one_for_each_image(tmp_path: Path):
    """Else some hundred images are more than the files that a process may usually open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 60
    images, options = SyntheticImages(240), {"batch_size": 120, "threads": 1}
    unbraid.scan(build("1x1"), "layer", images, tmp_path / "alone", **options)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 60, before[1]))
    try:
        unbraid.scan(build("1x1"), "layer", images, tmp_path / "two", workers=2, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_same_files(tmp_path / "alone", tmp_path / "two")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_lies_in_a_row_makes_a_batch_without_a_copy(workers):
    (items,) = load(SyntheticImages(9), [[3, 1, 4, 0, 5]], workers=workers, pinned=False)
    images = [item[1] for item in items]
    for some in (images, images[2:], images[1:3], images[:1]):
        batch = as_batch(some, torch.arange(len(some)))
        assert torch.equal(batch, torch.stack(some))
        assert batch.data_ptr() == some[0].data_ptr()


def test_what_does_not_lie_in_a_row_is_copied_into_one():
    (items,) = load(SyntheticImages(9), [[0, 1, 2, 3]], workers=0, pinned=False)
    one, two, three, _ = (item[1] for item in items)
    for some in ([one, three], [two, one], [one, one], [one, two.clone()], [one.clone()]):
        batch = as_batch(some, torch.arange(len(some)))
        assert torch.equal(batch, torch.stack(some))
        assert batch.data_ptr() != some[0].data_ptr()
    (mixed,) = load(Mixed(), [[4, 5]], workers=0, pinned=False)
    with pytest.raises(DataError, match=r"Image 5 is \(1, 3, 2\) where image 4 is \(1, 2, 2\)"):
        as_batch([item[1] for item in mixed], torch.tensor([4, 5]))


def test_images_of_the_data_set_itself_are_never_handed_to_the_network(tmp_path: Path):
    """Which may write into what it is given."""
    images, kept = SyntheticImages(8), SyntheticImages(8)
    assert images[0][0]._base is images.images
    changing = torch.nn.Sequential(torch.nn.ReLU(inplace=True), build("1x1"))
    unbraid.scan(changing, "1.layer", images, tmp_path, batch_size=4)
    assert torch.equal(images.images, kept.images)
    images.images = [images.images[0], *images.images[1:, :, 1:]]
    (mixed,) = load(images, [[0, 1, 2]], workers=0, pinned=False)
    own = as_batch([item[1] for item in mixed[1:]], torch.arange(2))
    assert own.data_ptr() != images.images[1].data_ptr()


class Deadly(SyntheticImages):
    def __getitem__(self, index: int):
        if index == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_told_in_a_sentence_and_the_next_start_goes_on(tmp_path: Path):
    network, options = build("1x1"), {"batch_size": 4, "threads": 1}
    with pytest.raises(RunError, match=r"loads images died .* with fewer workers"):
        unbraid.scan(network, "layer", Deadly(9), tmp_path, workers=1, **options)
    assert len(list(unbraid.scan(network, "layer", Deadly(9), tmp_path, **options).shards())) == 1


def test_a_team_that_is_gone_is_told_and_other_errors_are_left_alone():
    with pytest.raises(RunError, match=r"other processes are gone .*goes on"), deaths_told():
        raise DistNetworkError("connection reset by peer")
    with pytest.raises(RuntimeError, match="of the network"), deaths_told():
        raise RuntimeError("of the network")
