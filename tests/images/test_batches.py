"""How batches come from worker processes, and what is said when these die."""

import os
import resource
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from sources import scanned
from torch.distributed import DistNetworkError
from torch.utils.data import get_worker_info

import unbraid
from checks import assert_same_files
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.images import batches as loading
from unbraid.images.batches import as_batch, deaths_told, load, read_images
from unbraid.images.broken import sort_out


def test_load_batch_takes_a_file_and_not_one_for_each_image(tmp_path):
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
def test_as_batch_copies_only_what_does_not_lie_in_a_row(workers):
    (items,) = load(SyntheticImages(9), [[3, 1, 4, 0, 5]], workers=workers)
    images = [item.image for item in items]
    one, two, three, *_ = images
    in_a_row = (images, images[2:], images[1:3], images[:1])
    others = ([one, three], [two, one], [one, one], [one, two.clone()], [one.clone()])
    for some in (*in_a_row, *others):
        batch = as_batch(some)
        assert torch.equal(batch, torch.stack(some))
        assert (batch.data_ptr() == some[0].data_ptr()) == any(some is row for row in in_a_row)


def test_read_images_parts_a_batch_into_neighbours_of_one_size():
    images = SyntheticImages(7)
    images.images = [image[..., : 4 + (k in (2, 3))] for k, image in enumerate(images.images)]
    found = list(read_images(images, [range(5), range(5, 7)], workers=0))
    assert [index.tolist() for index, _, _ in found] == [[0, 1], [2, 3], [4], [5, 6]]
    for index, batch, labels in found:
        assert torch.equal(batch, torch.stack([images.images[k] for k in index.tolist()]))
        assert labels.tolist() == [images.targets[k] for k in index.tolist()]


def test_load_never_hands_over_images_of_the_data_set_itself(tmp_path):
    images, kept = SyntheticImages(8), SyntheticImages(8)
    assert images[0][0]._base is images.images
    changing = torch.nn.Sequential(torch.nn.ReLU(inplace=True), build("1x1"))
    unbraid.scan(changing, "1.layer", images, tmp_path, batch_size=4)
    assert torch.equal(images.images, kept.images)
    images.images = [images.images[0], *images.images[1:, :, 1:]]  # of two sizes
    (mixed,) = load(images, [[0, 1, 2]], workers=0)
    for item in mixed:
        assert torch.equal(item.image, images.images[item.index])
        assert item.image.data_ptr() != images.images[item.index].data_ptr()


class Deadly(SyntheticImages):
    def __getitem__(self, index):
        if index == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 8:
            raise GeneratorExit
        return super().__getitem__(index)


def test_processes_that_die_or_leave_are_told_and_the_next_start_goes_on(tmp_path):
    with pytest.raises(RunError, match=r"loads images died .* with fewer workers"):
        scanned(Deadly(8), tmp_path, workers=1)
    assert len(list(scanned(Deadly(8), tmp_path).shards())) == 1
    with pytest.raises(RunError, match="loads images died"):
        list(load(Deadly(9), [[0, 8]], workers=1))
    with pytest.raises(RunError, match=r"other processes are gone .*goes on"), deaths_told():
        raise DistNetworkError("connection reset by peer")
    with pytest.raises(RuntimeError, match="of the network"), deaths_told():
        raise RuntimeError("of the network")


def test_load_what_cannot_be_sent_or_handed_over_or_received_is_told(monkeypatch):
    images = SyntheticImages(4)
    images.kept = lambda: 0
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(UsageError, match=r"cannot be sent .* workers=0"):
            list(load(images, [[0]], workers=1))
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)
    for content, sentence in ((b"torn", "hand them over"), (b"", "loads images died")):
        sealed = iter([loading._Sealed(content).pin_memory()])
        with pytest.raises(DataError, match=sentence):
            sort_out(next(loading._unpacked(sealed)), skip_broken=True)
    full = Mock(side_effect=RuntimeError("No space left on device"))
    monkeypatch.setattr(loading, "ForkingPickler", Mock(dumps=full))
    (items,) = load(images, [[0, 1]], workers=1)
    with pytest.raises(DataError, match=r"hand them over \(No space left on device\).*fewer"):
        sort_out(items, skip_broken=True)
