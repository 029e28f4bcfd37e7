"""Scans: what the records hold, going on after a stop, what is refused, a network left alone."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, Subset

import unbraid
from checks import (
    Truth,
    assert_bit_equal,
    assert_input_maps,
    assert_records,
    assert_same_files,
    assert_same_tensors,
    assert_untouched,
    snapshot,
    truth_of,
)
from tiny_networks import (
    KINDS,
    CallsByKeyword,
    CountingNetwork,
    OverwritesInput,
    SyntheticImages,
    build,
)
from unbraid.base.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.networks.relevance import kept_channels_last
from unbraid.scanning import records as records_module

SHARD = 128  # images in a shard with positions


class BrokenImages(SyntheticImages):
    """Some images cannot be read."""

    def __init__(self, n_images: int, broken: set[int], **settings: Any) -> None:
        super().__init__(n_images, **settings)
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"cannot identify picture-{index}.jpg")
        return super().__getitem__(index)


# --- what the records hold ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_records_hold_what_the_oracle_says(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(9)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, min_share=0.06, batch_size=4)
    truth = truth_of(network, dataset)
    assert_records(list(scan.shards()), truth, 0.06, range(9))
    kept = sum(len(records.share_channel) for records in scan.shards())
    assert 0 < kept < truth.shares.numel()  # the threshold kept some and dropped some


@pytest.mark.parametrize("kind", KINDS)
def test_positions_keep_the_layers_input_besides(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(5)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, positions=True, batch_size=3)
    truth = truth_of(network, dataset)
    assert scan.positions
    assert_records(list(scan.shards()), truth, 0.005, range(5))
    assert_input_maps(list(scan.shards()), truth)


def test_a_scan_knows_the_layers_weights_and_the_class_names(tmp_path):
    network = build("3x3")
    scan = unbraid.scan(network, network.layer, SyntheticImages(4), tmp_path)
    assert_bit_equal(scan.weight, network.layer.weight.flatten(1))
    assert_bit_equal(scan.bias, network.layer.bias)
    assert scan.layer.name == "layer"
    assert scan.class_names == ("class 0", "class 1", "class 2", "class 3")
    assert not scan.positions


def test_only_images_of_the_chosen_classes_are_scanned(tmp_path):
    network, dataset = CountingNetwork(build("3x3")), SyntheticImages(11)
    options = {"classes": [3, 1], "batch_size": 4}
    scan = unbraid.scan(network, "network.layer", dataset, tmp_path, **options)
    chosen = [n for n, label in enumerate(dataset.targets) if label in (1, 3)]
    assert network.n_images == len(chosen)
    assert_records(list(scan.shards()), truth_of(network, dataset, "network.layer"), 0.005, chosen)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_records_do_not_depend_on_the_batch_size(batch_size, tmp_path):
    network, dataset = build("batch norm behind"), SyntheticImages(10)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=batch_size)
    assert_records(list(scan.shards()), truth_of(network, dataset), 0.005, range(10))


def test_a_network_in_training_mode_is_scanned_in_eval_mode(tmp_path):
    network, dataset = build("batch norm behind"), SyntheticImages(6)
    truth = truth_of(network, dataset)
    scan = unbraid.scan(network.train(), "layer", dataset, tmp_path)
    assert_records(list(scan.shards()), truth, 0.005, range(6))


def test_images_of_several_sizes_can_be_scanned_one_by_one(tmp_path):
    dataset = SyntheticImages(4)
    dataset.images = [image[:, :, : 6 - n % 2] for n, image in enumerate(dataset.images)]
    network = build("3x3")
    scan = unbraid.scan(network, "layer", dataset, tmp_path, batch_size=1)
    assert_records(list(scan.shards()), truth_of(network, dataset), 0.005, range(4))


def test_worker_processes_give_the_same_records(tmp_path):
    for workers in (0, 1):
        out = tmp_path / str(workers)
        unbraid.scan(build("1x1"), "layer", SyntheticImages(20), out, batch_size=3, workers=workers)
    assert_same_files(tmp_path / "0", tmp_path / "1")


@pytest.mark.parametrize("positions", [False, True])
def test_two_scans_of_the_same_are_the_same_bytes(positions, tmp_path):
    for name in ("one", "two"):
        unbraid.scan(
            build("groups"), "layer", SyntheticImages(150), tmp_path / name, positions=positions
        )
    assert_same_files(tmp_path / "one", tmp_path / "two")


def test_a_network_may_write_into_the_layers_input_behind_it(tmp_path):
    network, dataset = OverwritesInput(), SyntheticImages(5)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, positions=True)
    truth = truth_of(network, dataset)
    assert_records(list(scan.shards()), truth, 0.005, range(5))
    assert_input_maps(list(scan.shards()), truth)


def test_images_may_want_a_gradient(tmp_path):
    network, dataset = build("3x3"), SyntheticImages(5)
    dataset.images.requires_grad_()
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    assert_records(list(scan.shards()), truth_of(network, SyntheticImages(5)), 0.005, range(5))


@pytest.mark.parametrize("kind", ["3x3", "tokens"])
def test_a_layer_may_be_handed_its_input_by_keyword(kind, tmp_path):
    network, dataset = build(kind), SyntheticImages(5)
    scan = unbraid.scan(CallsByKeyword(network), "layer", dataset, tmp_path)
    assert_records(list(scan.shards()), truth_of(network, dataset), 0.005, range(5))


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_a_scan_works_where_gradients_are_switched_off(without_gradients, tmp_path):
    network, dataset = build("3x3"), SyntheticImages(4)
    with without_gradients():
        scan = unbraid.scan(network, "layer", dataset, tmp_path)
    assert_records(list(scan.shards()), truth_of(network, dataset), 0.005, range(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_networks_of_every_floating_point_kind_can_be_scanned(dtype, tmp_path):
    network, dataset = build("1x1", dtype), SyntheticImages(4, dtype=dtype)
    scan = unbraid.scan(network, "layer", dataset, tmp_path)
    (records,) = scan.shards()
    assert scan.manifest.dtype == str(dtype).removeprefix("torch.")
    assert records.pooled.dtype == torch.float32
    truth = truth_of(network, dataset)
    expected = torch.stack([truth.pooled(n) for n in range(4)]).float()
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        records.pooled, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


# --- going on after a stop ------------------------------------------------------------------------


def long_scan(network: nn.Module, out: Path, **settings: Any) -> unbraid.Scan:
    """Three shards, the last of 9 images."""
    dataset = settings.pop("dataset", SyntheticImages(2 * SHARD + 9))
    layer = settings.pop("layer", "network.layer")
    settings = {"positions": True, "batch_size": 64, **settings}
    return unbraid.scan(network, layer, dataset, out, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished scan, not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "scan"
    long_scan(CountingNetwork(build("1x1")), out)
    return out


@pytest.fixture(scope="module")
def long_truth() -> Truth:
    return truth_of(build("1x1"), SyntheticImages(2 * SHARD + 9))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy of a finished scan, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "scan"))


def test_records_of_many_shards_are_in_order_and_whole(finished, long_truth):
    shards = list(unbraid.open_scan(finished).shards())
    assert [len(records) for records in shards] == [SHARD, SHARD, 9]
    assert_records(shards, long_truth, 0.005, range(2 * SHARD + 9))


def test_a_batch_does_not_cross_a_shard(finished, long_truth, tmp_path):
    network = CountingNetwork(build("1x1"))
    scan = long_scan(network, tmp_path / "scan", batch_size=50)  # 128 is no multiple
    assert network.n_images == 2 * SHARD + 9
    shards = list(scan.shards())
    assert [len(records) for records in shards] == [SHARD, SHARD, 9]
    assert_records(shards, long_truth, 0.005, range(2 * SHARD + 9))


def test_a_finished_scan_runs_the_network_on_nothing(finished, folder):
    network = CountingNetwork(build("1x1"))
    long_scan(network, folder)
    assert network.n_images == 0
    assert_same_files(folder, finished)


@pytest.mark.parametrize(("shard", "n_images"), [(0, SHARD), (1, SHARD), (2, 9)])
def test_only_the_images_of_a_missing_shard_are_run_again(shard, n_images, finished, folder):
    (folder / f"shard-{shard:06d}.safetensors").unlink()
    network = CountingNetwork(build("1x1"))
    long_scan(network, folder)
    assert network.n_images == n_images
    assert_same_files(folder, finished)


def test_a_scan_can_go_on_with_another_batch_size_and_number_of_workers(folder, long_truth):
    (folder / "shard-000002.safetensors").unlink()
    network = CountingNetwork(build("1x1"))
    scan = long_scan(network, folder, batch_size=5, workers=1)
    assert network.n_images == 9
    last = list(scan.shards())[2:]
    assert_records(last, long_truth, 0.005, range(2 * SHARD, 2 * SHARD + 9))


def stop_at(write: int, error: BaseException) -> Callable[..., Any]:
    """Path.replace, but one call fails; the manifest's and the layer's come before the shards'."""
    replace, calls = Path.replace, []

    def replace_or_fail(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == write:
            raise error
        return replace(self, target)

    return replace_or_fail


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_a_full_disk_stops_with_a_sentence_and_the_next_scan_goes_on(
    write, finished, tmp_path, monkeypatch
):
    out = tmp_path / "scan"
    full = OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at(write, full))
        with pytest.raises(RunError, match=r"disk is full.*make room and start the same"):
            long_scan(CountingNetwork(build("1x1")), out)
    assert not list(out.glob("*.tmp"))
    network = CountingNetwork(build("1x1"))
    long_scan(network, out)
    n_kept = SHARD * max(0, write - 3)  # the shards that were whole before the stop
    assert network.n_images == 2 * SHARD + 9 - n_kept
    assert_same_files(out, finished)


@pytest.mark.parametrize("write", [1, 2, 3, 4, 5])
def test_a_scan_killed_while_writing_is_completed_by_the_next(
    write, finished, tmp_path, monkeypatch
):
    out = tmp_path / "scan"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stop_at(write, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            long_scan(CountingNetwork(build("1x1")), out)
    assert len(list(out.glob("*.tmp"))) == 1
    long_scan(CountingNetwork(build("1x1")), out)
    assert_same_files(out, finished)


def test_a_disk_that_may_not_be_written_stops_with_a_sentence(tmp_path, monkeypatch):
    refused = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(Path, "replace", stop_at(1, refused))
    with pytest.raises(RunError, match=r"cannot be written .*Read-only"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path)


def test_a_stopped_scan_cannot_be_opened_until_it_is_finished(folder):
    (folder / "shard-000001.safetensors").unlink()
    with pytest.raises(RunError, match=r"not finished \(1 of 3 shards"):
        unbraid.open_scan(folder)


def test_a_reopened_scan_is_the_scan(finished, folder):
    scan, reopened = long_scan(CountingNetwork(build("1x1")), folder), unbraid.open_scan(folder)
    assert reopened.manifest == scan.manifest
    assert_bit_equal(reopened.weight, scan.weight)
    assert_bit_equal(reopened.bias, scan.bias)


def test_a_damaged_shard_is_named_and_can_be_made_again(finished, folder):
    shard = folder / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"shard-000001\.safetensors cannot be read"):
        list(unbraid.open_scan(folder).shards())
    shard.unlink()
    long_scan(CountingNetwork(build("1x1")), folder)
    assert_same_files(folder, finished)


def test_another_scans_shard_and_a_shard_under_another_number_are_told(finished, tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    shutil.copytree(finished, own)
    long_scan(CountingNetwork(build("1x1", seed=1)), other)
    names = ["shard-000000.safetensors", "shard-000001.safetensors"]
    assert len(list(unbraid.open_scan(own).shards())) == 3
    shutil.copy(other / names[0], own / names[0])
    for read in (lambda s: list(s.shards()), lambda s: s.labels_seen(), lambda s: s.broken()):
        with pytest.raises(RunError, match=r"000000\.safetensors is of another scan; delete it"):
            read(unbraid.open_scan(own))
    shutil.copy(finished / names[0], own / names[0])
    shutil.copy(finished / names[0], own / names[1])
    for read in (lambda s: list(s.shards()), lambda s: s.labels_seen(), lambda s: s.broken()):
        with pytest.raises(RunError, match=r"000001\.safetensors is another shard; delete it"):
            read(unbraid.open_scan(own))


def test_old_shards_that_say_nothing_are_told_by_the_places_of_their_images(finished, tmp_path):
    folder = tmp_path / "scan"
    shutil.copytree(finished, folder)
    for shard in range(3):
        records_module.write_shard(folder, shard, records_module.read_shard(finished, shard))
    assert sum(len(records) for records in unbraid.open_scan(folder).shards()) == 2 * SHARD + 9
    records_module.write_shard(folder, 1, records_module.read_shard(finished, 0))
    with pytest.raises(RunError, match="holds images of another shard"):
        list(unbraid.open_scan(folder).shards())


def test_a_folder_that_another_scan_takes_before_the_first_shard_is_not_written_to(tmp_path):
    class Thief(SyntheticImages):
        """While its first images are read, another scan starts in the folder."""

        def __getitem__(self, index: int):
            if (tmp_path / "manifest.json").exists() and not stolen:
                stolen.append(None)
                long_scan(CountingNetwork(build("1x1", seed=1)), tmp_path)
            return super().__getitem__(index)

    stolen: list[None] = []
    with pytest.raises(RunError, match="was taken by another scan meanwhile"):
        long_scan(CountingNetwork(build("1x1")), tmp_path, dataset=Thief(2 * SHARD + 9))
    fresh = long_scan(CountingNetwork(build("1x1", seed=1)), tmp_path)
    assert sum(len(records) for records in fresh.shards()) == 2 * SHARD + 9


def test_shards_are_read_one_at_a_time_and_let_go(finished, monkeypatch):
    read = records_module.read_shard
    calls: list[int] = []

    def counted(folder, shard, manifest):
        calls.append(shard)
        return read(folder, shard, manifest)

    monkeypatch.setattr(records_module, "read_shard", counted)
    shards = unbraid.open_scan(finished).shards()
    assert calls == []
    alive = weakref.ref(next(shards))
    assert calls == [0]
    assert alive() is None  # the generator keeps nothing that its reader has dropped


def test_images_are_let_go_batch_by_batch(tmp_path):
    class Watched(SyntheticImages):
        alive: list[weakref.ref] = []  # noqa: RUF012
        most = 0

        def __getitem__(self, index):
            image = self.images[index].clone()
            self.alive.append(weakref.ref(image))
            self.most = max(self.most, sum(1 for one in self.alive if one() is not None))
            return image, self.targets[index]

    dataset = Watched(200)
    unbraid.scan(build("1x1"), "layer", dataset, tmp_path, batch_size=5)
    assert dataset.most <= 2 * 5 + 1  # a batch, the one before, and one image for the fingerprint


# --- a folder that belongs to something else ------------------------------------------------------


def _other_image() -> SyntheticImages:
    dataset = SyntheticImages(2 * SHARD + 9)
    dataset.images[0, 0, 0, 0] += 1e-6
    return dataset


def _other_label() -> SyntheticImages:
    dataset = SyntheticImages(2 * SHARD + 9)
    dataset.targets[201] = 0
    return dataset


def _other_preprocessing() -> SyntheticImages:
    dataset = SyntheticImages(2 * SHARD + 9)
    dataset.transform = nn.AvgPool2d(2)  # not used, but told by the data set
    return dataset


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        pytest.param({"layer": "network.stem"}, "the layer", id="layer"),
        pytest.param({"dataset": _other_image()}, "the images or labels", id="image"),
        pytest.param({"dataset": _other_label()}, "the images or labels", id="label"),
        pytest.param({"dataset": _other_preprocessing()}, "the preprocessing", id="preprocessing"),
        pytest.param({"dataset": SyntheticImages(5)}, "the images or labels", id="fewer images"),
        pytest.param({"classes": [1, 2]}, "the classes", id="classes"),
        pytest.param({"min_share": 0.01}, "the smallest share kept", id="min_share"),
    ],
)
def test_a_folder_of_another_scan_is_refused_naming_what_differs(
    settings, difference, finished, folder
):
    network = CountingNetwork(build("1x1"))
    with pytest.raises(RunError, match=rf"scan of something else: [^.]*{difference}[^.]* differ"):
        long_scan(network, folder, **settings)
    assert network.n_images == 0
    assert_same_files(folder, finished)


def test_a_folder_of_a_scan_without_positions_is_refused(finished, folder):
    with pytest.raises(RunError, match="whether positions are kept"):
        long_scan(CountingNetwork(build("1x1")), folder, positions=False)
    assert_same_files(folder, finished)


@pytest.mark.parametrize("changed", ["stem.bias", "layer.weight", "stem_norm.running_mean"])
def test_a_folder_of_other_weights_is_refused(changed, finished, folder):
    network = CountingNetwork(build("1x1"))
    with torch.no_grad():
        network.network.state_dict()[changed].flatten()[0].mul_(1 + 1e-12)
    with pytest.raises(RunError, match=r"something else: the network's weights differ\."):
        long_scan(network, folder)
    assert_same_files(folder, finished)


def test_shards_without_a_manifest_are_not_taken_for_the_new_scans(finished, folder):
    (folder / "manifest.json").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match="manifest is gone"):
        long_scan(CountingNetwork(build("1x1", seed=1)), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("notes")
    with pytest.raises(UsageError, match="is a file, not a folder"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path / "out")


def test_a_folder_without_a_scan_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="holds no scan"):
        unbraid.open_scan(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[:50], id="cut off"),
        pytest.param(lambda text: text.replace('"schema": 1', '"schema": 99'), id="schema"),
        pytest.param(lambda text: text.replace('"weights"', '"wts"'), id="key"),
        pytest.param(lambda _: "[]", id="no object"),
    ],
)
def test_a_damaged_manifest_is_named(damage, folder):
    path = folder / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=r"manifest\.json is not a manifest"):
        unbraid.open_scan(folder)


def test_the_manifest_is_json_and_names_what_the_scan_was_made_of(finished):
    content = json.loads((finished / "manifest.json").read_text())
    assert content["layer"]["name"] == "network.layer"
    assert content["n_images"] == 2 * SHARD + 9
    assert content["classes"] is None
    assert set(content["versions"]) == {"unbraid", "torch", "python"}


# --- data and networks that cannot be scanned -----------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["head.weight", "stem_norm.running_var"])
def test_broken_weights_are_named_before_anything_is_run(value, where, tmp_path):
    network = CountingNetwork(build("3x3"))
    network.network.state_dict()[where].flatten()[1] = value
    with pytest.raises(ModelError, match=rf"'network\.{where}' holds NaN"):
        unbraid.scan(network, "network.layer", SyntheticImages(4), tmp_path)
    assert network.n_images == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_an_image_that_drives_the_network_to_nan_is_named(value, tmp_path):
    dataset = SyntheticImages(8)
    dataset.images[5, 0] = value
    with pytest.raises(ModelError, match="Image 5 drives the network to NaN"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path, batch_size=4)


def test_nan_behind_the_layer_is_named_too(tmp_path):
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()  # NaN below zero

    network = build("1x1")
    network.pool = nn.Sequential(network.pool, Root())
    network.behind = nn.Identity()
    with pytest.raises(ModelError, match="Image 0 drives the network to NaN"):
        unbraid.scan(network, "layer", SyntheticImages(4), tmp_path)


@pytest.mark.parametrize("label", [4, 1000, -1])
def test_a_label_that_is_no_output_is_named(label, tmp_path):
    dataset = SyntheticImages(8)
    dataset.targets[3] = label
    with pytest.raises(DataError, match=rf"Image 3 has label {label}, but the network has 4 out"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path)


def test_images_that_the_network_cannot_take_are_told_with_their_shape(tmp_path):
    with pytest.raises(ModelError, match=r"cannot run on images of shape \(1, 7, 6\)"):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4, size=(1, 7, 6)), tmp_path)


def test_images_of_different_sizes_are_named(tmp_path):
    dataset = SyntheticImages(4)
    dataset.images = [image[:, :, : 6 - n // 2] for n, image in enumerate(dataset.images)]
    with pytest.raises(DataError, match=r"Image 2 is \(3, 7, 5\) where image 0 is \(3, 7, 6\)"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path)


def test_positions_of_images_of_different_sizes_are_refused(tmp_path):
    dataset = SyntheticImages(4)
    dataset.images = [image[:, :, : 6 - n // 2] for n, image in enumerate(dataset.images)]
    with pytest.raises(DataError, match="input maps of different sizes"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path, batch_size=1, positions=True)


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        pytest.param(
            lambda logits: {"out": logits}, r"a dict \('out': a tensor \(1, 4\)\)", id="dict"
        ),
        pytest.param(lambda logits: logits[:, :, None], r"a tensor \(1, 4, 1\)", id="map"),
        pytest.param(lambda logits: (logits, None), r"a tuple \(.*\)", id="tuple"),
    ],
)
def test_a_network_without_logits_is_refused(wrap, kind, tmp_path):
    class Wrapped(CountingNetwork):
        def forward(self, x):
            return wrap(super().forward(x))

    with pytest.raises(ModelError, match=f"output is {kind}, not logits"):
        unbraid.scan(Wrapped(build("3x3")), "network.layer", SyntheticImages(4), tmp_path)


def test_a_layer_that_does_not_run_is_refused(tmp_path):
    network = CountingNetwork(build("3x3"))
    network.spare = nn.Linear(4, 4)
    with pytest.raises(LayerError, match="'spare' does not run when the network does"):
        unbraid.scan(network, "spare", SyntheticImages(4), tmp_path)


def test_a_layer_whose_output_a_hook_changes_is_refused(tmp_path):
    network = build("3x3")
    network.layer.register_forward_hook(lambda _module, _args, output: 2 * output)
    with pytest.raises(LayerError, match="does not compute"):
        unbraid.scan(network, "layer", SyntheticImages(4), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_share": 0.0}, "min_share is 0.0"),
        ({"min_share": 1.0}, "min_share is 1.0"),
        ({"min_share": float("nan")}, "min_share is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"classes": []}, "classes is empty"),
        ({"classes": [1, 77]}, r"classes names \[77\]"),
        ({"dataset": SyntheticImages(0)}, "holds no image"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message, tmp_path):
    arguments = {"dataset": SyntheticImages(4), "out": tmp_path, **settings}
    with pytest.raises(UsageError, match=message):
        unbraid.scan(build("3x3"), "layer", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number, 1 or more."),
        ({"batch_size": True}, "batch_size is True; give a whole number, 1 or more."),
        ({"batch_size": "8"}, "batch_size is '8'; give a whole number, 1 or more."),
        ({"batch_size": math.nan}, "batch_size is nan; give a whole number, 1 or more."),
        ({"batch_size": 2**70}, f"batch_size is {2**70}; give a whole number, 1 or more."),
        ({"workers": None}, "workers is None; give a whole number from 0 to 4096."),
        ({"workers": 1.5}, "workers is 1.5; give a whole number from 0 to 4096."),
        ({"workers": -1}, "workers is -1; give a whole number from 0 to 4096."),
        ({"workers": 10**9}, "workers is 1000000000; give a whole number from 0 to 4096."),
        ({"threads": 1.5}, "threads is 1.5; give a whole number from 1 to 4096."),
        ({"threads": "2"}, "threads is '2'; give a whole number from 1 to 4096."),
        ({"threads": 0}, "threads is 0; give a whole number from 1 to 4096."),
        ({"min_share": "x"}, "min_share is 'x'; give a number."),
        ({"min_share": None}, "min_share is None; give a number."),
        ({"indices": 3}, "indices is 3; give a list of whole numbers."),
        ({"indices": "12"}, "indices is '12'; give a list of whole numbers."),
        ({"indices": ["a"]}, "indices holds 'a'; give a list of whole numbers."),
        ({"indices": [1.5]}, "indices holds 1.5; give a list of whole numbers."),
        ({"indices": torch.tensor([1.0])}, "indices holds 1.0; give a list of whole numbers."),
        ({"indices": np.array([False, True])}, "indices holds False; give a list of whole"),
        ({"classes": [0.0]}, "classes holds 0.0; give a list of whole numbers."),
        ({"classes": ["a"]}, "classes holds 'a'; give a list of whole numbers."),
        ({"classes": "ab"}, "classes is 'ab'; give a list of whole numbers."),
        ({"classes": [True]}, "classes holds True; give a list of whole numbers."),
        ({"positions": "no"}, "positions is 'no'; give True or False."),
        ({"skip_broken": 1}, "skip_broken is 1; give True or False."),
        ({"source": "ab"}, "source is a str; give a dictionary, or None."),
        ({"source": {"a": {1}}}, "source cannot be written as JSON (Object of type set is"),
        ({"source": {"a": math.nan}}, "source cannot be written as JSON (Out of range float"),
        ({"out": None}, "out is None; give a path."),
        ({"model": "resnet50"}, "The network is a str; pass a torch.nn.Module."),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_type_are_told_in_a_sentence(settings, sentence, tmp_path):
    arguments = {"model": build("3x3"), "dataset": SyntheticImages(4), "out": tmp_path, **settings}
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}"):
        unbraid.scan(layer="layer", **arguments)
    assert not list(tmp_path.iterdir())


def test_source_that_is_too_deep_for_the_manifests_reader_is_refused(tmp_path):
    source = {}
    for _ in range(32):
        source = {"a": source}
    with pytest.raises(UsageError, match="nested too deeply"):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4), tmp_path, source=source)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", [3, None, [3], [None]], ids=str)
def test_what_is_no_layer_is_told(layer, tmp_path):
    with pytest.raises(LayerError, match=r"^(3|None) is no layer; give a layer's name, or the mod"):
        unbraid.scan(build("3x3"), layer, SyntheticImages(4), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "0-d"]
)
def test_numbers_of_other_libraries_are_numbers(number, tmp_path):
    plain = {"batch_size": 3, "workers": 0, "threads": 1, "classes": [1, 0]}
    given = {"batch_size": number(3), "workers": number(0), "threads": number(1)}
    given |= {"classes": [number(1), number(0)], "positions": np.bool_(False)}
    for name, options in (("plain", plain), ("given", given)):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(9), tmp_path / name, **options)
    assert_same_files(tmp_path / "plain", tmp_path / "given")


def test_a_data_set_that_is_a_stream_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 7, 6), 0

    with pytest.raises(UsageError, match="must be map-style"):
        unbraid.scan(build("3x3"), "layer", Stream(), tmp_path)


# --- images that cannot be read -------------------------------------------------------------------


def test_an_image_that_cannot_be_read_stops_the_scan_and_is_named(tmp_path):
    with pytest.raises(DataError, match=r"Image 6 .*picture-6\.jpg.*skip_broken"):
        unbraid.scan(build("3x3"), "layer", BrokenImages(9, {6, 8}), tmp_path, batch_size=4)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({0}, id="the first"),
        pytest.param({1, 6, 8}, id="some"),
        pytest.param({4, 5, 6, 7}, id="a whole batch"),
    ],
)
def test_images_that_cannot_be_read_are_left_out_and_listed(broken, positions, tmp_path):
    network = build("3x3")
    scan = unbraid.scan(
        network,
        "layer",
        BrokenImages(9, broken),
        tmp_path,
        batch_size=4,
        skip_broken=True,
        positions=positions,
    )
    (records,) = scan.shards()
    assert records.broken.tolist() == scan.broken() == sorted(broken)
    rest = [n for n in range(9) if n not in broken]
    assert_records([records], truth_of(network, SyntheticImages(9)), 0.005, rest)


@pytest.mark.parametrize("positions", [False, True])
def test_a_shard_of_nothing_but_broken_images_is_empty(positions, tmp_path):
    dataset = BrokenImages(1024 + 8, set(range(1024)))
    network = build("1x1")
    scan = unbraid.scan(network, "layer", dataset, tmp_path, skip_broken=True, positions=positions)
    records = list(scan.shards())
    assert scan.broken() == list(range(1024))
    last = SyntheticImages(1024 + 8)
    truth = truth_of(network, Subset(last, range(1024, 1024 + 8)))
    whole = [one for one in records if len(one)]
    assert [int(n) for one in whole for n in one.index] == list(range(1024, 1024 + 8))
    for one in whole:
        one.index -= 1024
    assert_records(whole, truth, 0.005, range(8))
    assert unbraid.find(scan, gamma=1.0, tau=0.01, p=0.1).classes == (0, 1, 2, 3)


def test_a_picture_without_a_transform_is_told(tmp_path):
    dataset = SyntheticImages(4)
    dataset.images = [image.numpy() for image in dataset.images]
    with pytest.raises(DataError, match=r"Image 0 is a ndarray, not a tensor; .*transform"):
        unbraid.scan(build("3x3"), "layer", dataset, tmp_path)


# --- the network is left alone --------------------------------------------------------------------


def mixed_network() -> nn.Module:
    """Modes and wanted gradients differ from module to module, a gradient and a hook are there."""
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    network(SyntheticImages(4).images).sum().backward()
    network.layer.register_forward_hook(lambda *_: None)
    return network


def test_a_scan_leaves_the_network_as_it_was(tmp_path):
    network = mixed_network()
    before = snapshot(network)
    unbraid.scan(network, "layer", SyntheticImages(9), tmp_path, positions=True)
    assert_untouched(before, snapshot(network))
    assert not list(tmp_path.glob("*.tmp"))


def _nan_image() -> SyntheticImages:
    dataset = SyntheticImages(9)
    dataset.images[7] = float("nan")
    return dataset


@pytest.mark.parametrize(
    ("dataset", "error"),
    [
        pytest.param(BrokenImages(9, {7}), DataError, id="broken image"),
        pytest.param(_nan_image(), ModelError, id="nan image"),
        pytest.param(SyntheticImages(9, size=(2, 7, 6)), ModelError, id="wrong size"),
        pytest.param(SyntheticImages(9, n_classes=5), DataError, id="label beyond outputs"),
    ],
)
def test_a_scan_that_fails_leaves_the_network_as_it_was(dataset, error, tmp_path):
    network = mixed_network()
    before = snapshot(network)
    with pytest.raises(error):
        unbraid.scan(network, "layer", dataset, tmp_path, batch_size=3)
    assert_untouched(before, snapshot(network))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_scan_with_a_full_disk_leaves_the_network_as_it_was(tmp_path, monkeypatch):
    network = mixed_network()
    before = snapshot(network)
    monkeypatch.setattr(Path, "replace", stop_at(3, OSError(errno.ENOSPC, "full")))
    with pytest.raises(RunError, match="disk is full"):
        unbraid.scan(network, "layer", SyntheticImages(9), tmp_path)
    assert_untouched(before, snapshot(network))


def test_progress_goes_to_standard_error_only_when_asked(tmp_path, capsys):
    unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path / "loud", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Scanning layer" in err
    assert "4/4" in err


def test_files_are_synced_before_they_get_their_name(tmp_path, monkeypatch):
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("name"), replace(self, to))[1]
    )
    unbraid.scan(build("1x1"), "layer", SyntheticImages(4), tmp_path)
    # Layer, manifest, one shard: the content, the rename, and the folder that holds the name.
    assert order == ["sync", "name", "sync"] * 3


class NeedsRoom(nn.Module):
    """Has room for so many images, in the pass or in the gradient, and writes into what it gets."""

    def __init__(
        self,
        network: nn.Module,
        room: int,
        behind: bool,
        error: Callable[[], Any] = lambda: _raise(torch.OutOfMemoryError("CUDA out of memory.")),
    ) -> None:
        super().__init__()
        self.network, self.room, self.behind, self.error = network, room, behind, error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room and not self.behind:
            x.zero_()
            self.error()
        z = self.network(x)
        if z.requires_grad and len(x) > self.room:
            z.register_hook(self._fail)
        return z

    def _fail(self, _: Tensor) -> None:
        self.error()


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(real, behind, tmp_path):
    dataset = SyntheticImages(11)
    # More than any machine has, of the processor's own allocator.
    errors = {"error": lambda: torch.empty(2**48)} if real else {}
    network = NeedsRoom(build("1x1"), 3, behind, **errors)
    with pytest.warns(UserWarning, match="going on with 2 images at a time"):
        scan = unbraid.scan(network, "network.layer", dataset, tmp_path, batch_size=7)
    assert_records(list(scan.shards()), truth_of(build("1x1"), dataset), 0.005, range(11))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_device_without_room_for_one_image_is_told(batch_size, tmp_path):
    network, images = NeedsRoom(build("1x1"), 0, False), SyntheticImages(4)
    with pytest.raises(ModelError, match="not even one image"):
        unbraid.scan(network, "network.layer", images, tmp_path, batch_size=batch_size)


def test_under_autocast_the_network_runs_in_bfloat16_and_sums_are_of_float32(tmp_path):
    images = SyntheticImages(8)
    images.images = images.images.float()
    network = build("1x1", dtype=torch.float32)
    (plain,) = unbraid.scan(network, "layer", images, tmp_path / "plain").shards()
    scan = unbraid.scan(network, "layer", images, tmp_path / "autocast", autocast=True)
    (records,) = scan.shards()
    assert records.pooled.dtype == torch.float32
    assert not torch.equal(records.pooled, plain.pooled)
    torch.testing.assert_close(records.pooled, plain.pooled, rtol=0.02, atol=0.02)
    with pytest.raises(RunError, match="whether it runs in bfloat16 differ"):
        unbraid.scan(network, "layer", images, tmp_path / "autocast")


def test_channels_last_is_as_if_the_network_were_and_the_network_is_left_as_it_was(tmp_path):
    images = SyntheticImages(8)
    network, so_already = build("3x3"), build("3x3").to(memory_format=torch.channels_last)
    before = [(weight.data_ptr(), weight.stride()) for weight in network.parameters()]
    scan = unbraid.scan(network, "layer", images, tmp_path / "told", channels_last=True)
    assert [(weight.data_ptr(), weight.stride()) for weight in network.parameters()] == before
    unbraid.scan(so_already, "layer", images, tmp_path / "already")
    assert_same_tensors(tmp_path / "told", tmp_path / "already")
    assert_records(list(scan.shards()), truth_of(build("3x3"), images), 0.005, range(8))
    with pytest.raises(RunError, match="whether it runs channels last differ"):
        unbraid.scan(network, "layer", images, tmp_path / "told")


def test_while_it_is_kept_channels_last_it_is_and_not_after_an_error():
    network = build("3x3")

    def is_so() -> bool:
        return network.layer.weight.is_contiguous(memory_format=torch.channels_last)

    with suppress(KeyError), kept_channels_last(network):
        assert is_so()
        raise KeyError
    assert not is_so()


def test_threads_are_fixed_for_the_scan_and_given_back(tmp_path):
    seen = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = build("1x1")

        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.get_num_threads())
            return self.network(x)

    before = torch.get_num_threads()
    images = SyntheticImages(4)
    scan = unbraid.scan(Watching(), "network.layer", images, tmp_path, threads=3, batch_size=4)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before
    assert scan.manifest.threads == 3
    (tmp_path / "shard-000000.safetensors").unlink()
    seen.clear()
    unbraid.scan(Watching(), "network.layer", images, tmp_path)  # goes on with as many
    assert set(seen) == {3}
    with pytest.raises(RunError, match="the number of threads differ"):
        unbraid.scan(Watching(), "network.layer", images, tmp_path, threads=2)
    with pytest.raises(UsageError, match="threads is 0"):
        unbraid.scan(Watching(), "network.layer", images, tmp_path, threads=0)
