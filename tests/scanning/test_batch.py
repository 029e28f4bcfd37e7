"""One batch: how many images are run at a time, and what is done where they are too many."""

import shutil

import pytest
import torch
from torch import nn

import unbraid
from checks import assert_records, assert_same_files, assert_untouched, snapshot, truth_of
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import ModelError
from unbraid.scanning import batch


class Functional(nn.Module):
    """A network of which one module gives two tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1)
        self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        z = self.second(self.first(x)).flatten(2).movedim(1, 2)
        return self.head(self.lstm(z)[0].mean(1))


def test_bytes_are_those_of_the_widest_module_and_of_all_behind_the_layer():
    model, image = Functional(), torch.randn(3, 6, 6)
    before = snapshot(model)
    widest = (8 + 5) * 36 + 5 + 5  # the recurrent module, with its two states
    behind = 8 * 36 + (5 * 36 + 5 + 5) + 2  # the layer, sequence and two states, the head
    both = 2 * (8 + 4) * 36  # gradients and copies of both layers' outputs
    for layers, more in (([model.second], 0), ([model.second, model.first], 4 * 36 + both)):
        expected = 4 * (3 * widest + behind + more)
        assert batch.bytes_of_one(model, layers, image) == expected
    assert_untouched(before, snapshot(model))


def test_bytes_of_a_layer_with_parts_of_its_own_count():
    class Padded(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)
            self.pad = nn.ZeroPad2d(1)

        def forward(self, x):
            return super().forward(self.pad(x))

    model = nn.Sequential(Padded(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    behind = 4 * 36 + 4 + 4 + 2  # the layer, pooled, flattened, the head
    n_bytes = batch.bytes_of_one(model, [model[0]], torch.randn(3, 6, 6))
    assert n_bytes >= 4 * behind
    assert n_bytes > batch.bytes_of_one(model, [model[3]], torch.randn(3, 6, 6))


@pytest.mark.parametrize(("memory", "expected"), [(1, 1), (7.9, 4), (8.0, 8), (1e6, 32)])
def test_as_many_as_fit_rounded_down_to_a_power_of_two(memory, expected, monkeypatch):
    model, image = build("1x1"), SyntheticImages(1).images[0]
    n_bytes = memory * batch.bytes_of_one(model, [model.layer], image)
    monkeypatch.setattr(batch, "_MEMORY", int(n_bytes))
    assert batch.batch_size_for(model, [model.layer], image) == expected
    assert batch.batch_size_for(model, [model.layer], None) == 32  # where no image can be read


def test_a_scan_takes_it_keeps_it_and_goes_on_with_it(tmp_path, monkeypatch):
    network, images, out = build("1x1"), SyntheticImages(9), tmp_path / "scan"
    memory = 5 * batch.bytes_of_one(network, [network.layer], images[0][0])
    monkeypatch.setattr(batch, "_MEMORY", memory)
    assert unbraid.scan(network, "layer", images, out).manifest.batch_size == 4
    shutil.copytree(out, tmp_path / "before")
    (out / "shard-000000.safetensors").unlink()
    monkeypatch.setattr(batch, "_MEMORY", 1)
    unbraid.scan(network, "layer", images, out)
    assert_same_files(out, tmp_path / "before")


class NeedsRoom(nn.Module):
    """Has room for so many images, in the pass or in the gradient, and writes into what it gets."""

    def __init__(self, room, behind, real=False):
        super().__init__()
        self.network, self.room, self.behind, self.real = build("1x1"), room, behind, real

    def forward(self, x):
        if len(x) > self.room and not self.behind:
            x.zero_()
            self.fail()
        z = self.network(x)
        if z.requires_grad and len(x) > self.room:
            z.register_hook(self.fail)
        return z

    def fail(self, _=None):
        if self.real:
            torch.empty(2**48)  # more than any machine has, of the processor's own allocator
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize(("real", "behind"), [(False, True), (True, False)])
def test_a_batch_too_large_for_the_device_is_halved_until_it_fits(real, behind, tmp_path):
    dataset, network = SyntheticImages(11), NeedsRoom(3, behind, real)
    with pytest.warns(UserWarning, match="going on with 2 images at a time"):
        scan = unbraid.scan(network, "network.layer", dataset, tmp_path, batch_size=7)
    assert_records(list(scan.shards()), truth_of(build("1x1"), dataset), 0.005, range(11))


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_device_without_room_for_one_image_is_told(batch_size, tmp_path):
    options = {"dataset": SyntheticImages(4), "out": tmp_path, "batch_size": batch_size}
    with pytest.raises(ModelError, match="not even one image"):
        unbraid.scan(NeedsRoom(0, False), "network.layer", **options)


class WritesIntoParts(nn.Module):
    """Writes into parts of the layer's output, which torch allows without gradients alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        one, other = self.layer(x).chunk(2, 1)
        return self.head(torch.cat([one.relu_(), other], 1).mean((2, 3)))


def test_layer_that_is_written_into_so_that_no_gradient_is_left_says_so(tmp_path):
    network, images = WritesIntoParts(), SyntheticImages(4, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"gives no gradient at the layer.*target='none'"):
        unbraid.scan(network, "layer", images, tmp_path, batch_size=2)
    unbraid.scan(network, "layer", images, tmp_path / "none", batch_size=2, target=None)
    unbraid.scan(network, "head", images, tmp_path / "behind", batch_size=2)
    wide = SyntheticImages(4, dtype=torch.float32)
    wide.images = torch.cat([wide.images, wide.images], 1)
    with pytest.raises(ModelError, match="cannot run on images"):  # which is not for the gradient
        unbraid.scan(network, "layer", wide, tmp_path / "wide", batch_size=2)
