"""Scans of networks that torch compiles for them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import unbraid
from checks import assert_records, assert_same_files, truth_of
from faults.test_faults import SCANNING, TORCHRUN
from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError, LayerError, ModelError, RunError
from unbraid.networks import compiling

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with it")


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def no_compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look at graphs, which takes no compiler, and run them as they are."""
    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **o: compile_with(m, backend="eager", **o))
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A part that a network has several times, so that its code is compiled once for all."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, dtype=torch.float64)
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            x = x * 1  # seen by the compiler alone
        else:
            seen_as_written.append((self.n, len(x)))
        return x + self.layer(x).relu()


seen_as_written: list[tuple[int, int]] = []  # blocks, and how many images


def of_blocks(n: int) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4, dtype=torch.float64))
    return nn.Sequential(*(Block(k) for k in range(n)), *head).eval()


@needs_compiler
def test_records_are_the_truth_and_the_network_is_left_as_it_was(tmp_path):
    network, images = of_blocks(3), SyntheticImages(11)
    before = {name: (w.data_ptr(), w.requires_grad) for name, w in network.named_parameters()}
    scan = unbraid.scan(network, "1.layer", images, tmp_path, batch_size=4, compiled=True)
    truth = truth_of(of_blocks(3), images, "1.layer")
    assert_records(list(scan.shards()), truth, 0.005, range(11))
    assert scan.manifest.compiled
    after = {name: (w.data_ptr(), w.requires_grad) for name, w in network.named_parameters()}
    assert after == before
    assert not any("_compiled_call_impl" in vars(module) for module in network.modules())
    with pytest.raises(RunError, match="whether it runs compiled differ"):
        unbraid.scan(network, "1.layer", images, tmp_path)


def test_full_batches_run_compiled_but_for_what_holds_the_layer(no_compiling, tmp_path):
    seen_as_written.clear()
    options = {"batch_size": 4, "compiled": True}
    unbraid.scan(of_blocks(3), "1.layer", SyntheticImages(11), tmp_path, **options)
    # Behind what a first look at the network runs as it is written.
    assert seen_as_written[-5:] == [(1, 4), (1, 4), (0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("n_blocks", [3, 20])
def test_any_number_of_parts_of_a_kind(n_blocks, no_compiling, tmp_path):
    """Torch would give up after eight, and run the others as written."""
    images, layers = SyntheticImages(6), [f"{n_blocks - 1}.layer", "1.layer"]
    seen_as_written.clear()
    scans = unbraid.scan(of_blocks(n_blocks), layers, images, tmp_path, batch_size=3, compiled=True)
    assert seen_as_written[-4:] == [(1, 3), (n_blocks - 1, 3)] * 2  # behind a first look
    for name, scan in scans.items():
        truth = truth_of(of_blocks(n_blocks), images, name)
        assert_records(list(scan.shards()), truth, 0.005, range(6))


@needs_compiler
def test_a_record_does_not_depend_on_what_ran_before_it(tmp_path):
    """The same images in the first, second and third batch of a process, and in a portion."""
    images = SyntheticImages(4)
    images.images = torch.cat([images.images[:3]] * 3 + [images.images[:1]])
    images.targets = [*images.targets[:3] * 3, images.targets[0]]
    images.classes = images.classes[:4]
    for layer in ("1.layer", "3.layer"):
        scan = unbraid.scan(
            of_blocks(5), layer, images, tmp_path / layer, batch_size=3, compiled=True
        )
        (records,) = scan.shards()
        first, second, third = records.pooled[:9].split(3)
        assert torch.equal(first, second)
        assert torch.equal(first, third)
        plain = unbraid.scan(of_blocks(5), layer, images, tmp_path / f"{layer} plain", batch_size=3)
        (written,) = plain.shards()
        assert torch.equal(records.pooled[9:], written.pooled[9:])


def test_a_layer_inside_of_what_is_compiled_would_be_passed_by_and_is_noticed(
    no_compiling, tmp_path, monkeypatch
):
    everything = compiling._parts
    monkeypatch.setattr(compiling, "_parts", lambda model, _: everything(model, set()))
    options = {"batch_size": 3, "compiled": True}
    with pytest.raises(LayerError, match=r"'2\.layer' does not run when the network does"):
        unbraid.scan(of_blocks(3), "2.layer", SyntheticImages(6), tmp_path, **options)
    assert not list(tmp_path.glob("shard-*"))


def test_a_network_compiled_before_is_compiled_anew_and_works_on(no_compiling, tmp_path):
    network, images = of_blocks(3), SyntheticImages(6)
    before = torch.compile(network, dynamic=False)
    expected = before(images.images)
    scan = unbraid.scan(before, "2.layer", images, tmp_path, batch_size=3, compiled=True)
    assert_records(list(scan.shards()), truth_of(of_blocks(3), images, "2.layer"), 0.005, range(6))
    assert torch.equal(before(images.images), expected)


def test_a_label_that_is_no_output_is_told_with_the_first_batch(no_compiling, tmp_path):
    images = SyntheticImages(9)
    images.targets[8] = 4
    options = {"batch_size": 3, "compiled": True}
    with pytest.raises(DataError, match="Image 8 has label 4, but the network has 4 outputs"):
        unbraid.scan(of_blocks(3), "2.layer", images, tmp_path, **options)


class ScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inside = nn.Sequential(nn.Conv2d(3, 3, 1, dtype=torch.float64), nn.ReLU())
        self.scripted = torch.jit.script(inside)
        self.blocks = nn.ModuleDict({"a": Block(0), "b": Block(1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks["b"](self.blocks["a"](self.scripted(x))).mean((2, 3))


class DenseBlock(nn.ModuleDict):
    """As torchvision's dense blocks are: a dictionary of parts that runs as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        for part in self.values():
            x = part(x)
        return x


def test_scripted_parts_run_as_they_are_and_dictionaries_of_parts_one_by_one(tmp_path):
    network = ScriptedPart().eval()
    assert list(compiling._parts(network, {network.blocks["b"].layer})) == [network.blocks["a"]]
    whole = nn.Sequential(DenseBlock({"a": Block(0), "b": Block(1)}))
    assert list(compiling._parts(whole, set())) == [whole[0]]
    images = SyntheticImages(6, n_classes=3)
    options = {"batch_size": 7, "compiled": True}  # no batch is full
    scan = unbraid.scan(network, "blocks.b.layer", images, tmp_path, **options)
    assert scan.manifest.compiled


def test_parts_that_torch_compile_made_are_told(tmp_path):
    network = of_blocks(3)
    network[0] = torch.compile(network[0], backend="eager")
    with pytest.raises(ModelError, match=r"'0' is compiled already; pass the network as it was"):
        unbraid.scan(network, "2.layer", SyntheticImages(4), tmp_path, compiled=True)
    assert unbraid.scan(network, "2.layer", SyntheticImages(4), tmp_path / "plain")


def test_what_compiles_itself_is_compiled_for_the_scan_and_as_before_afterwards(
    no_compiling, tmp_path
):
    network = of_blocks(3)
    network[2].compile()
    own = network[2]._compiled_call_impl
    scan = unbraid.scan(network, "2.layer", SyntheticImages(4), tmp_path, compiled=True)
    truth = truth_of(of_blocks(3), SyntheticImages(4), "2.layer")
    assert_records(list(scan.shards()), truth, 0.005, range(4))
    assert network[2]._compiled_call_impl is own


@pytest.mark.parametrize("suppressed", [False, True])
def test_what_cannot_be_compiled_is_told_in_a_sentence(suppressed, tmp_path):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        torch._dynamo.config.patch(suppress_errors=suppressed),
        pytest.raises(ModelError, match=r"cannot be compiled here \(.*\); scan it without compil"),
    ):
        unbraid.scan(
            of_blocks(2), "1.layer", SyntheticImages(4), tmp_path, batch_size=2, compiled=True
        )
    assert not list(tmp_path.glob("shard-*"))


@needs_compiler
def test_processes_that_compile_each_for_itself_leave_the_same_bytes(tmp_path):
    for name, command in {
        "alone": [],
        "two": [*TORCHRUN, "--nproc-per-node", "2"],
    }.items():
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{name}"),
        }
        done = subprocess.run(
            [sys.executable, *command, str(SCANNING), str(tmp_path / name), "compiled"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    for layer in ("1", "3"):
        assert_same_files(tmp_path / "alone" / layer, tmp_path / "two" / layer)
