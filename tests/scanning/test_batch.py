"""One batch: how many images are run at a time, and what is done where they are too many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import unbraid
from checks import assert_records, truth_of
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import ModelError
from unbraid.scanning import batch as batch_size
from unbraid.scanning.batch import batch_size_for, bytes_of_one


class Functional(nn.Module):
    """A network of which one module gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 8, 1)
        self.lstm = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        z = self.second(self.first(x)).flatten(2).movedim(1, 2)
        return self.head(self.lstm(z)[0].mean(1))


def test_bytes_are_those_of_the_widest_module_and_of_all_behind_the_layer() -> None:
    model, image = Functional().eval(), torch.randn(3, 6, 6)
    widest = (8 + 5) * 36 + 5 + 5  # the recurrent module, with its two states
    behind_second = 8 * 36 + (5 * 36 + 5 + 5) + 2  # the layer, sequence and two states, the head
    assert bytes_of_one(model, [model.second], image) == 4 * (3 * widest + behind_second)
    behind_first = behind_second + 4 * 36
    assert bytes_of_one(model, [model.second, model.first], image) == 4 * (
        3 * widest + behind_first
    )


def test_the_network_is_left_as_it_was() -> None:
    model = Functional().train()
    bytes_of_one(model, [model.first], torch.randn(3, 6, 6))
    assert all(not module._forward_hooks for module in model.modules())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("memory", "expected"), [(1, 1), (7.9, 4), (8.0, 8), (63.9, 32), (64, 64), (1e6, 64)]
)
def test_as_many_as_fit_rounded_down_to_a_power_of_two(memory, expected, monkeypatch) -> None:
    model, image = Functional().eval(), torch.randn(3, 6, 6)
    one = bytes_of_one(model, [model.first], image)
    monkeypatch.setattr(batch_size, "_MEMORY", int(memory * one))
    assert batch_size_for(model, [model.first], image) == expected


def test_a_scan_takes_it_keeps_it_and_goes_on_with_it(tmp_path: Path, monkeypatch) -> None:
    network, images = build("1x1"), SyntheticImages(9)
    module = network.get_submodule("layer")
    memory = 5 * bytes_of_one(network, [module], images[0][0])
    monkeypatch.setattr(batch_size, "_MEMORY", memory)
    unbraid.scan(network, "layer", images, tmp_path / "found")
    unbraid.scan(network, "layer", images, tmp_path / "given", batch_size=4)
    manifest = json.loads((tmp_path / "found/manifest.json").read_text())
    assert manifest["batch_size"] == 4
    shards = [tmp_path / name / "shard-000000.safetensors" for name in ("found", "given")]
    assert shards[0].read_bytes() == shards[1].read_bytes()
    shards[1].unlink()
    monkeypatch.setattr(batch_size, "_MEMORY", 1)
    unbraid.scan(network, "layer", images, tmp_path / "given")
    assert json.loads((tmp_path / "given/manifest.json").read_text())["batch_size"] == 4
    assert shards[0].read_bytes() == shards[1].read_bytes()


def test_a_network_that_cannot_run_on_the_images_leaves_nothing(tmp_path: Path) -> None:
    wrong = [(torch.randn(5, 6, 6), 0)] * 3
    with pytest.raises(ModelError, match="cannot run"):
        unbraid.scan(Functional(), "first", wrong, tmp_path / "scan")
    assert not (tmp_path / "scan").exists()


def test_a_device_without_room_for_one_image_is_left_to_the_scan_to_tell() -> None:
    class Full(Functional):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = Full()
    assert batch_size_for(model, [model.first], torch.randn(3, 6, 6)) == 1
    assert batch_size_for(model, [model.first], None) == 64  # where no image can be read


class NeedsRoom(nn.Module):
    """Has room for so many images, in the pass or in the gradient, and writes into what it gets."""

    def __init__(self, network: nn.Module, room: int, behind: bool, real: bool = False) -> None:
        super().__init__()
        self.network, self.room, self.behind, self.real = network, room, behind, real

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.room and not self.behind:
            x.zero_()
            self.fail()
        z = self.network(x)
        if z.requires_grad and len(x) > self.room:
            z.register_hook(self.fail)
        return z

    def fail(self, _: Any = None) -> None:
        if self.real:
            torch.empty(2**48)  # more than any machine has, of the processor's own allocator
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("real", "behind"), [(False, True), (True, False)])
def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(real, behind, tmp_path):
    dataset = SyntheticImages(11)
    network = NeedsRoom(build("1x1"), 3, behind, real)
    with pytest.warns(UserWarning, match="going on with 2 images at a time"):
        scan = unbraid.scan(network, "network.layer", dataset, tmp_path, batch_size=7)
    assert_records(list(scan.shards()), truth_of(build("1x1"), dataset), 0.005, range(11))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_device_without_room_for_one_image_is_told(batch_size, tmp_path):
    network, images = NeedsRoom(build("1x1"), 0, False), SyntheticImages(4)
    with pytest.raises(ModelError, match="not even one image"):
        unbraid.scan(network, "network.layer", images, tmp_path, batch_size=batch_size)
