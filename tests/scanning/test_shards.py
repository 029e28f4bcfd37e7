"""The pass: going on after a stop, folders of something else, the network left alone."""

from __future__ import annotations

import errno
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import unbraid
from checks import (
    Truth,
    assert_records,
    assert_same_files,
    assert_same_tensors,
    assert_untouched,
    snapshot,
    truth_of,
)
from tiny_networks import CountingNetwork, SyntheticImages, WithBroken, build
from unbraid.base.errors import DataError, RunError
from unbraid.networks.relevance import kept_channels_last
from unbraid.scanning import records as records_module

SHARD = 128  # images in a shard with positions
N_IMAGES = 2 * SHARD + 9


def with_broken(n_images: int, *broken: int) -> WithBroken:
    dataset = WithBroken(n_images)
    dataset.broken = broken
    return dataset


def long_scan(out: Path, network: nn.Module | None = None, **settings: Any) -> unbraid.Scan:
    """Three shards, the last of 9 images."""
    dataset = settings.pop("dataset", SyntheticImages(N_IMAGES))
    layer = settings.pop("layer", "network.layer")
    network = network or CountingNetwork(build("1x1"))
    return unbraid.scan(
        network, layer, dataset, out, **{"positions": True, "batch_size": 50, **settings}
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished scan, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "scan"
    long_scan(out)
    return out


@pytest.fixture(scope="module")
def truth() -> Truth:
    return truth_of(build("1x1"), SyntheticImages(N_IMAGES))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished scan, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "scan"))


def test_records_of_many_shards_are_in_order_and_whole(finished, truth):
    shards = list(unbraid.open_scan(finished).shards())
    assert [len(records) for records in shards] == [SHARD, SHARD, 9]  # no multiple of a batch
    assert_records(shards, truth, 0.005, range(N_IMAGES))


@pytest.mark.parametrize(("shard", "n_images"), [(None, 0), (0, SHARD), (2, 9)])
def test_only_the_images_of_a_missing_shard_are_run_again(shard, n_images, finished, folder):
    if shard is not None:
        (folder / f"shard-{shard:06d}.safetensors").unlink()
        with pytest.raises(RunError, match=r"not finished \(1 of 3 shards"):
            unbraid.open_scan(folder)
    network = CountingNetwork(build("1x1"))
    long_scan(folder, network)
    assert network.n_images == n_images
    assert_same_files(folder, finished)


def test_a_scan_can_go_on_with_another_batch_size_and_number_of_workers(folder, truth):
    (folder / "shard-000002.safetensors").unlink()
    last = list(long_scan(folder, batch_size=5, workers=1).shards())[2:]
    assert_records(last, truth, 0.005, range(2 * SHARD, N_IMAGES))


def stop_at(write: int, error: BaseException) -> Callable[..., Any]:
    """Path.replace, but one call fails; the manifest's and the layer's come before the shards'."""
    replace, calls = Path.replace, []

    def replace_or_fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == write:
            raise error
        return replace(self, target)

    return replace_or_fail


FULL = OSError(errno.ENOSPC, "No space left on device")
REFUSED = OSError(errno.EROFS, "Read-only file system")
TOLD = {FULL: r"disk is full.*make room and start", REFUSED: r"cannot be written .*Read-only"}


@pytest.mark.parametrize(
    ("error", "write"),
    [(KeyboardInterrupt(), write) for write in range(1, 6)] + [(FULL, 2), (FULL, 4), (REFUSED, 1)],
    ids=range(8),
)
def test_scan_that_was_stopped_while_writing_is_completed_by_the_next(
    error, write, finished, tmp_path, monkeypatch
):
    out = tmp_path / "scan"
    told = TOLD.get(error)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at(write, error))
        with pytest.raises(RunError if told else KeyboardInterrupt, match=told):
            long_scan(out)
    assert len(list(out.glob("*.tmp"))) == (told is None)
    network = CountingNetwork(build("1x1"))
    long_scan(out, network)
    n_kept = SHARD * max(0, write - 3)  # the shards that were whole before the stop
    assert network.n_images == N_IMAGES - n_kept
    assert_same_files(out, finished)


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


def test_a_folder_that_another_scan_takes_before_the_first_shard_is_not_written_to(tmp_path):
    class Thief(SyntheticImages):
        """While its first images are read, another scan starts in the folder."""

        def __getitem__(self, index: int):
            if (tmp_path / "manifest.json").exists() and not stolen:
                stolen.append(None)
                long_scan(tmp_path, CountingNetwork(build("1x1", seed=1)))
            return super().__getitem__(index)

    stolen: list[None] = []
    with pytest.raises(RunError, match="was taken by another scan meanwhile"):
        long_scan(tmp_path, dataset=Thief(N_IMAGES))
    fresh = long_scan(tmp_path, CountingNetwork(build("1x1", seed=1)))
    assert sum(len(records) for records in fresh.shards()) == N_IMAGES


def test_images_are_let_go_batch_by_batch(tmp_path):
    alive, n_alive = weakref.WeakSet(), []

    class Watched(SyntheticImages):
        def __getitem__(self, index):
            image = self.images[index].clone()
            alive.add(image)
            n_alive.append(len(alive))
            return image, self.targets[index]

    unbraid.scan(build("1x1"), "layer", Watched(200), tmp_path, batch_size=5)
    assert max(n_alive) <= 2 * 5 + 1  # a batch, the one before, and one image for the fingerprint


def other(noise: float = 0.7, label: int = 1, transform: Any = None) -> SyntheticImages:
    dataset = SyntheticImages(N_IMAGES, noise=noise)
    dataset.targets[201], dataset.transform = label, transform
    return dataset


def other_network(name: str) -> nn.Module:
    network = CountingNetwork(build("1x1"))
    network.network.state_dict()[name].flatten()[0].mul_(1 + 1e-12)
    return network


DIFFERENT = [
    ({"layer": "network.stem"}, "the layer"),
    ({"dataset": other(noise=0.7 + 1e-7)}, "the images or labels"),
    ({"dataset": other(label=0)}, "the images or labels"),
    ({"dataset": other(transform=nn.AvgPool2d(2))}, "the preprocessing"),
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
def test_folder_of_another_scan_is_refused_naming_what_differs(
    settings, difference, finished, folder
):
    with pytest.raises(RunError, match=rf"scan of something else: [^.]*{difference}[^.]* differ"):
        long_scan(folder, **settings)
    assert_same_files(folder, finished)


def test_shards_without_a_manifest_are_not_taken_for_the_new_scans(finished, folder):
    (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="manifest is gone"):
        long_scan(folder)
    shutil.copy(finished / "manifest.json", folder)
    assert_same_files(folder, finished)


@pytest.mark.parametrize("broken", [(1, 6, 8), (4, 5, 6, 7)])
def test_images_that_cannot_be_read_are_left_out_and_listed(broken, tmp_path):
    network, dataset = build("3x3"), with_broken(9, *broken)
    options = {"batch_size": 4, "skip_broken": True, "positions": True}
    scan = unbraid.scan(network, "layer", dataset, tmp_path, **options)
    (records,) = scan.shards()
    assert records.broken.tolist() == scan.broken() == list(broken)
    rest = [n for n in range(9) if n not in broken]
    assert_records([records], truth_of(network, SyntheticImages(9)), 0.005, rest)


@pytest.mark.parametrize("positions", [False, True])
def test_a_shard_of_nothing_but_broken_images_is_empty(positions, tmp_path):
    n_broken = SHARD if positions else 1024
    network, dataset = build("1x1"), with_broken(n_broken + 8, *range(n_broken))
    scan = unbraid.scan(network, "layer", dataset, tmp_path, skip_broken=True, positions=positions)
    empty, last = scan.shards()
    assert (len(empty), scan.broken()) == (0, list(range(n_broken)))
    last.index -= n_broken
    sound = Subset(SyntheticImages(n_broken + 8), range(n_broken, n_broken + 8))
    assert_records([last], truth_of(network, sound), 0.005, range(8))
    assert unbraid.find(scan, gamma=1.0, tau=0.01, p=0.1).classes == (0, 1, 2, 3)


def mixed_network() -> nn.Module:
    """Modes and wanted gradients differ from module to module, a gradient and a hook are there."""
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    network(SyntheticImages(4).images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    return network


@pytest.mark.parametrize(
    ("dataset", "error"),
    [(SyntheticImages(9), None), (SyntheticImages(9), RunError), (with_broken(9, 7), DataError)],
    ids=range(3),
)
def test_scan_leaves_the_network_as_it_was(dataset, error, tmp_path, monkeypatch):
    network = mixed_network()
    before = snapshot(network)
    if error is RunError:  # the disk is full
        monkeypatch.setattr(Path, "replace", stop_at(3, FULL))
    with pytest.raises(error) if error else nullcontext():
        unbraid.scan(network, "layer", dataset, tmp_path, batch_size=3, positions=True)
    assert_untouched(before, snapshot(network))
    assert not list(tmp_path.glob("*.tmp"))


def test_progress_goes_to_standard_error_only_when_asked(tmp_path, capsys):
    for progress in (False, True):
        out = tmp_path / str(progress)
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), out, progress=progress)
        out, err = capsys.readouterr()
        assert (out, "Scanning layer" in err, "4/4" in err) == ("", progress, progress)


def test_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("sync") or fsync(fd))
    monkeypatch.setattr(Path, "replace", lambda *paths: order.append("name") or replace(*paths))
    unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path)
    # Layer, manifest, one shard: the content, the rename, and the folder that holds the name.
    assert order == ["sync", "name", "sync"] * 3


def test_under_autocast_the_network_runs_in_bfloat16_and_sums_are_of_float32(tmp_path):
    images, network = SyntheticImages(8, dtype=torch.float32), build("1x1", torch.float32)
    plain, pooled = (
        next(
            unbraid.scan(network, "layer", images, tmp_path / str(on), autocast=on).shards()
        ).pooled
        for on in (False, True)
    )
    assert pooled.dtype == torch.float32
    assert not torch.equal(pooled, plain)
    torch.testing.assert_close(pooled, plain, rtol=0.02, atol=0.02)


def test_channels_last_is_as_if_the_network_were_and_the_network_is_left_as_it_was(tmp_path):
    images = SyntheticImages(8)
    network, so_already = build("3x3"), build("3x3").to(memory_format=torch.channels_last)
    before = [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]
    scan = unbraid.scan(network, "layer", images, tmp_path / "told", channels_last=True)
    with suppress(KeyError), kept_channels_last(network):
        assert network.layer.weight.is_contiguous(memory_format=torch.channels_last)
        raise KeyError
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == before
    unbraid.scan(so_already, "layer", images, tmp_path / "already")
    assert_same_tensors(tmp_path / "told", tmp_path / "already")
    assert_records(list(scan.shards()), truth_of(build("3x3"), images), 0.005, range(8))


def test_threads_are_fixed_for_the_scan_and_given_back(tmp_path):
    seen = []
    network, images, before = build("1x1"), SyntheticImages(4), torch.get_num_threads()
    network.stem.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    unbraid.scan(network, "layer", images, tmp_path, threads=3, batch_size=4)
    (tmp_path / "shard-000000.safetensors").unlink()
    scan = unbraid.scan(network, "layer", images, tmp_path)  # goes on with as many
    assert set(seen) == {3}
    assert (torch.get_num_threads(), scan.manifest.threads) == (before, 3)
