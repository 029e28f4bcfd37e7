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
from networks import SyntheticImages, build
from unbraid import compiling
from unbraid.errors import LayerError, ModelError, RunError

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

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).relu()


def of_blocks(n: int) -> nn.Module:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4, dtype=torch.float64))
    return nn.Sequential(*(Block() for _ in range(n)), *head).eval()


@needs_compiler
def test_records_are_the_truth_and_the_network_is_left_as_it_was(tmp_path):
    network, images = build("3x3"), SyntheticImages(11)
    before = {name: (w.data_ptr(), w.requires_grad) for name, w in network.named_parameters()}
    scan = unbraid.scan(network, "layer", images, tmp_path / "scan", batch_size=4, compiled=True)
    assert_records(list(scan.shards()), truth_of(build("3x3"), images), 0.005, range(11))
    assert scan.manifest.compiled
    after = {name: (w.data_ptr(), w.requires_grad) for name, w in network.named_parameters()}
    assert after == before
    assert not network.layer._forward_hooks
    with pytest.raises(RunError, match="whether it runs compiled differ"):
        unbraid.scan(network, "layer", images, tmp_path / "scan")


def test_full_batches_run_compiled_and_others_as_written(no_compiling, tmp_path):
    compiled_now = []

    class Telling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            compiled_now.append((len(x), torch.compiler.is_compiling()))
            return x

    network = nn.Sequential(Telling(), build("1x1"))
    unbraid.scan(network, "1.layer", SyntheticImages(11), tmp_path, batch_size=4, compiled=True)
    assert (4, True) in compiled_now
    assert (3, False) in compiled_now
    assert (3, True) not in compiled_now


@pytest.mark.parametrize("n_blocks", [3, 20])
def test_parts_that_are_alike_are_told_apart_by_their_hooks(n_blocks, no_compiling, tmp_path):
    """Torch would give up after eight parts of a kind, and take one without a hook for another."""
    network, images = of_blocks(n_blocks), SyntheticImages(6)
    layers = [f"{n_blocks - 1}.layer", "1.layer"]
    scans = unbraid.scan(network, layers, images, tmp_path, batch_size=3, compiled=True)
    for name, scan in scans.items():
        truth = truth_of(of_blocks(n_blocks), images, name)
        assert_records(list(scan.shards()), truth, 0.005, range(6))


def test_a_hook_passed_by_is_noticed(no_compiling, tmp_path, monkeypatch):
    monkeypatch.setitem(compiling._SETTINGS, "skip_nnmodule_hook_guards", True)
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


def test_what_cannot_be_compiled_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ModelError, match=r"cannot be compiled here .*without compiling\.$"):
        unbraid.scan(
            build("1x1"),
            "layer",
            SyntheticImages(4),
            tmp_path / "scan",
            batch_size=2,
            compiled=True,
        )
    assert not list((tmp_path / "scan").glob("shard-*"))


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
