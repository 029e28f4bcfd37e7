"""Files that appear whole or not at all: temporary name, sync, rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unbraid.errors import RunError, UsageError


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    whole = {k: v.contiguous() for k, v in tensors.items()}
    write_whole(path, safetensors.torch.save(whole, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _opened(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors file, and no more of the file than that.

    Raises:
        RunError: the file is missing or damaged, or has no such tensor.
    """
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); start again the command that makes it, without the "
            "file if it is there."
        ) from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it.

    Raises:
        RunError: the disk is full or may not be written.
        UsageError: the folder is in fact a file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (FileExistsError, NotADirectoryError):
        in_the_way = next((p for p in path.parents if p.is_file()), path.parent)
        raise UsageError(f"{in_the_way} is a file, not a folder; name another folder.") from None
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(
                f"The disk is full, {path.name} was not written; what is finished is kept: make "
                "room and start the same command again."
            ) from None
        raise RunError(f"{path} cannot be written ({error.strerror}).") from None
