"""Torch files that lie about their sizes, or are packed: refused, whatever they say."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unbraid.base.errors import ModelError
from unbraid.networks.checkpoints import load_weights

resource = pytest.importorskip("resource")  # of Unix

PLAIN = (11, 7)  # inputs and outputs
TALL = b"K\x07K\x0b\x86"  # (7, 11), in a pickle
NUMEL = b"(?<=cpuq.)KM"  # 77, behind a storage's device
MOST = 2**30  # bytes of memory


class Large:
    """Of few bytes, and no code for torch."""

    def __init__(self, make: Any, *arguments: Any) -> None:
        self.made = make, arguments

    def __reduce__(self) -> Any:
        return self.made


def rewrite(path: Path, old: bytes, new: bytes, how: int = zipfile.ZIP_STORED) -> None:
    """Change what fits a pattern in the description in a torch file, of either format."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(re.sub(old, lambda _: new, path.read_bytes(), flags=re.DOTALL))
        return
    with zipfile.ZipFile(path) as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            changed = re.sub(old, lambda _: new, content, flags=re.DOTALL)
            target.writestr(name, changed if name.endswith("/data.pkl") else content, how)


def assert_refused(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"cannot be read \(.*\); give a sound file"):
        load_weights(nn.Linear(*PLAIN, bias=False), path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NUMEL, b"J\xff\xff\xff\x7f"),
        (TALL, b"K\x07J\xff\xff\xff\xff\x86"),
        (TALL, b"K\x07K\x0bK\x01\x87"),
    ],
)
def test_load_weights_of_sizes_that_lie_is_refused(
    old_format: bool, old: bytes, new: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "lies.pt"
    state = nn.Linear(*PLAIN, bias=False).state_dict()
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    load_weights(nn.Linear(*PLAIN, bias=False), path)
    rewrite(path, old, new)
    assert_refused(path)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("large", [Large(bytearray, 2**40), Large(torch.Tensor, 10**13)])
def test_load_weights_beside_what_takes_memory_is_refused(
    old_format: bool, large: Large, tmp_path: Path
) -> None:
    path = tmp_path / "large.pt"
    state = {"weight": torch.zeros(2, 2), "large": large}
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    assert_refused(path)


def test_load_weights_of_packed_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "packed.pt"
    torch.save({"weight": torch.zeros(1000, 1000)}, path)
    rewrite(path, b"", b"", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert_refused(path)


def test_load_weights_with_a_second_description_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.pt"
    torch.save(nn.Linear(*PLAIN, bias=False).state_dict(), path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("two/DATA.PKL", b"")
    assert_refused(path)
