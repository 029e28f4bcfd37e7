"""The pass: going on after a stop, folders of something else, the network left alone."""

import errno
import os
import shutil
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import checks
import unbraid
from tiny_networks import CountingNetwork, SyntheticImages, WithBroken, build
from unbraid.base.errors import DataError, RunError
from unbraid.networks.formats import kept_channels_last
from unbraid.scanning import records as records_module

SHARD = 128  # images in a shard with positions
N_IMAGES = 2 * SHARD + 9
FULL = OSError(errno.ENOSPC, "No space left on device")
REFUSED = OSError(errno.EROFS, "Read-only file system")
TOLD = {FULL: r"disk is full.*make room and start", REFUSED: r"cannot be written .*Read-only"}


def images(kind=SyntheticImages, **changes):
    dataset = kind(changes.pop("n_images", N_IMAGES))
    vars(dataset).update(changes)
    return dataset


def long_scan(out, network=None, **settings):
    """Three shards, the last of 9 images."""
    usual = {"dataset": images(), "layer": "network.layer", "positions": True}
    network = network or CountingNetwork(build("1x1"))
    return unbraid.scan(network, out=out, **{**usual, "batch_size": 50, **settings})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return long_scan(tmp_path_factory.mktemp("finished")).path


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "scan"))


def test_records_of_many_shards_are_in_order_and_whole(finished, folder):
    (folder / "shard-000002.safetensors").unlink()
    goes_on = long_scan(folder, batch_size=5, workers=1)  # other numbers than it began with
    for scan in (unbraid.open_scan(finished), goes_on):
        shards = list(scan.shards())
        assert [len(records) for records in shards] == [SHARD, SHARD, 9]  # no multiple of a batch
        truth = checks.truth_of(build("1x1"), SyntheticImages(N_IMAGES))
        checks.assert_records(shards, truth, 0.005, range(N_IMAGES))


@pytest.mark.parametrize(("shard", "n_images"), [(None, 0), (0, SHARD), (2, 9)])
def test_only_the_images_of_a_missing_shard_are_run_again(shard, n_images, finished, folder):
    if shard is not None:
        (folder / f"shard-{shard:06d}.safetensors").unlink()
        with pytest.raises(RunError, match=r"not finished \(1 of 3 shards"):
            unbraid.open_scan(folder)
    network = CountingNetwork(build("1x1"))
    long_scan(folder, network)
    assert network.n_images == n_images
    checks.assert_same_files(folder, finished)


def stop_at(write, error):
    """Path.replace, but one call fails; the manifest's and the layer's come before the shards'."""
    replace, calls = Path.replace, []

    def replace_or_fail(self, target):
        calls.append(target)
        if len(calls) == write:
            raise error
        return replace(self, target)

    return replace_or_fail


@pytest.mark.parametrize(
    ("error", "write"),
    [*((KeyboardInterrupt(), n) for n in range(1, 6)), *((error, 4) for error in TOLD)],
    ids=range(7),
)
def test_a_scan_stopped_while_writing_is_completed_by_the_next(error, write, finished, tmp_path):
    told = TOLD.get(error)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", stop_at(write, error))
        with pytest.raises(RunError if told else KeyboardInterrupt, match=told):
            long_scan(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    network = CountingNetwork(build("1x1"))
    long_scan(tmp_path, network)
    n_kept = SHARD * max(0, write - 3)  # the shards that were whole before the stop
    assert network.n_images == N_IMAGES - n_kept
    checks.assert_same_files(tmp_path, finished)


def test_another_scans_shard_and_a_shard_under_another_number_are_told(finished, folder, tmp_path):
    long_scan(tmp_path / "other", CountingNetwork(build("1x1", seed=1)))
    for strange, told in (
        (tmp_path / "other/shard-000001.safetensors", "of another scan"),
        (finished / "shard-000000.safetensors", "another shard"),
    ):
        shutil.copy(strange, folder / "shard-000001.safetensors")
        for read in (lambda s: list(s.shards()), lambda s: s.labels_seen(), lambda s: s.broken()):
            with pytest.raises(RunError, match=rf"000001\.safetensors is {told}; delete it"):
                read(unbraid.open_scan(folder))
    # Those of older versions say nothing of the kind; the places of their images tell.
    for shard in range(3):
        records_module.write_shard(folder, shard, records_module.read_shard(finished, shard))
    assert sum(len(records) for records in unbraid.open_scan(folder).shards()) == N_IMAGES
    records_module.write_shard(folder, 1, records_module.read_shard(finished, 0))
    with pytest.raises(RunError, match="holds images of another shard"):
        list(unbraid.open_scan(folder).shards())


class Watched(SyntheticImages):
    def __getitem__(self, index):
        image = self.images[index].clone()
        self.look(image)
        return image, self.targets[index]


def test_a_folder_that_another_scan_takes_before_the_first_shard_is_not_written_to(tmp_path):
    def steal(_):
        if (tmp_path / "manifest.json").exists() and not stolen:
            stolen.append(None)
            long_scan(tmp_path, CountingNetwork(build("1x1", seed=1)))

    stolen = []
    with pytest.raises(RunError, match="was taken by another scan meanwhile"):
        long_scan(tmp_path, dataset=images(Watched, look=steal))
    fresh = long_scan(tmp_path, CountingNetwork(build("1x1", seed=1)))
    assert sum(len(records) for records in fresh.shards()) == N_IMAGES


def test_shards_are_read_one_at_a_time_and_let_go(finished, monkeypatch):
    read, calls = records_module.read_shard, []
    counted = lambda *given: calls.append(given[1]) or read(*given)  # noqa: E731
    monkeypatch.setattr(records_module, "read_shard", counted)
    shards = unbraid.open_scan(finished).shards()
    assert calls == []
    alive = weakref.ref(next(shards))
    assert (calls, alive()) == ([0], None)


def test_images_are_let_go_batch_by_batch(tmp_path):
    alive, n_alive = weakref.WeakSet(), []

    def count(image):
        alive.add(image)
        n_alive.append(len(alive))

    unbraid.scan(build("1x1"), "layer", images(Watched, look=count), tmp_path, batch_size=5)
    assert max(n_alive) <= 2 * 5 + 1  # a batch, the one before, and one image for the fingerprint


def other_network(name):
    network = CountingNetwork(build("1x1"))
    network.network.state_dict()[name].flatten()[0].mul_(1 + 1e-12)
    return network


DIFFERENT = [
    ({"layer": "network.stem"}, "the layer"),
    ({"dataset": images(images=images().images + 1e-7)}, "the images or labels"),
    ({"dataset": images(targets=[n % 4 * (n != 201) for n in range(N_IMAGES)])}, "the images or"),
    ({"dataset": images(transform=nn.AvgPool2d(2))}, "the preprocessing"),
    ({"classes": [1, 2]}, "the classes"),
    ({"indices": [1, 2]}, "the places in the data set"),
    ({"labels": "predicted"}, "whether labels are given or predicted"),
    ({"min_share": 0.01}, "the smallest share kept"),
    ({"positions": False}, "whether positions are kept"),
    ({"autocast": True}, "whether it runs in bfloat16"),
    ({"channels_last": True}, "whether it runs channels last"),
    ({"threads": torch.get_num_threads() + 1}, "the number of threads"),
    ({"network": other_network("layer.weight")}, "the network's weights"),
    ({"network": other_network("stem_norm.running_mean")}, "the network's weights"),
]


@pytest.mark.parametrize(("settings", "difference"), DIFFERENT)
def test_a_folder_of_another_scan_is_refused(settings, difference, finished, folder):
    with pytest.raises(RunError, match=rf"another scan, with a difference in [^;]*{difference}"):
        long_scan(folder, **settings)
    checks.assert_same_files(folder, finished)


def test_shards_without_a_manifest_are_not_taken_for_the_new_scans(finished, folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="manifest is gone"):
        long_scan(folder)
    shutil.copy(finished / "manifest.json", folder)
    checks.assert_same_files(folder, finished)


def test_a_shard_of_nothing_but_broken_images_is_empty(tmp_path):
    n, broken = SHARD + 8, [*range(SHARD), SHARD + 1, SHARD + 6]
    dataset = images(WithBroken, n_images=n, broken=tuple(broken))
    scan = long_scan(tmp_path, dataset=dataset, skip_broken=True, batch_size=4)
    empty, last = scan.shards()
    assert (len(empty), scan.broken()) == (0, broken)
    sound = [k for k in range(n) if k not in broken]
    checks.assert_records([last], checks.truth_of(build("1x1"), SyntheticImages(n)), 0.005, sound)
    assert unbraid.find(scan, gamma=1.0, tau=0.01, p=0.1).classes == (0, 1, 2, 3)


@pytest.mark.parametrize("error", [None, RunError, DataError])
def test_scan_leaves_the_network_as_it_was(error, tmp_path, monkeypatch):
    network = build("batch norm behind").train()  # modes and wanted gradients differ by module
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    network(SyntheticImages(4).images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    before = checks.snapshot(network)
    if error is RunError:  # the disk is full
        monkeypatch.setattr(Path, "replace", stop_at(3, FULL))
    with pytest.raises(error) if error else nullcontext():
        dataset = WithBroken(9) if error is DataError else SyntheticImages(9)
        unbraid.scan(network, "layer", dataset, tmp_path, positions=True)
    checks.assert_untouched(before, checks.snapshot(network))
    assert not list(tmp_path.glob("*.tmp"))


def test_progress_goes_to_standard_error_only_when_asked(tmp_path, capsys):
    for progress in (False, True):
        out = tmp_path / str(progress)
        unbraid.scan(build("head"), "layer", SyntheticImages(1120), out, progress=progress)
        out, err = capsys.readouterr()
        assert (out, bool(err)) == ("", progress)
    for told in ("of 70 images (chance 2", ": not told by", "Scanning layer", "1,120 of 1,120"):
        assert told in err


def test_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("sync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda *paths: order.append("name") or replace(*paths))
    unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path)
    # Layer, manifest, one shard: the content, the rename, and the folder that holds the name.
    assert order == ["sync", "name", "sync"] * 3


def test_channels_last_is_as_if_the_network_were_and_the_network_is_left_as_it_was(tmp_path):
    images = SyntheticImages(8)
    network, so_already = build("3x3"), build("3x3").to(memory_format=torch.channels_last)
    before = [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]
    unbraid.scan(network, "layer", images, tmp_path / "told", channels_last=True)
    with suppress(KeyError), kept_channels_last(network):
        assert network.layer.weight.is_contiguous(memory_format=torch.channels_last)
        raise KeyError
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == before
    unbraid.scan(so_already, "layer", images, tmp_path / "already")
    checks.assert_same_tensors(tmp_path / "told", tmp_path / "already")


def test_threads_are_fixed_for_the_scan_and_given_back(tmp_path):
    seen = []
    network, images, before = build("1x1"), SyntheticImages(4), torch.get_num_threads()
    network.stem.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    unbraid.scan(network, "layer", images, tmp_path, threads=3, batch_size=4)
    (tmp_path / "shard-000000.safetensors").unlink()
    unbraid.scan(network, "layer", images, tmp_path)  # goes on with as many
    assert (set(seen), torch.get_num_threads()) == ({3}, before)
