"""When an image counts as broken and may be left out, and when a fault stops the work."""

from __future__ import annotations

import errno
import http.client
import io
import os
import socket
import struct
import threading
from collections import namedtuple
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from sources import scanned
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset, Subset
from torchvision import tv_tensors

from tiny_networks import SyntheticImages
from unbraid.base.errors import DataError, OutOfReach, out_of_reach
from unbraid.images.batches import as_batch, load
from unbraid.images.broken import UNLABELLED, sort_out
from unbraid.images.dataset import labels_of
from unbraid.images.identity import fingerprint

# --- images and rows of every kind ----------------------------------------------------------------


class Made(SyntheticImages):
    """Gives whatever is made of an image, its label and its index."""

    def __init__(self, make: Callable[[Tensor, int, int], Any]) -> None:
        super().__init__(9, dtype=torch.float32)
        self.make = make

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return self.make(image.clone(), label, index)


def made(change: Callable[[Tensor], Any]) -> Made:
    return Made(lambda image, label, _: (change(image), label))


def in_inference(image: Tensor) -> Tensor:
    with torch.inference_mode():
        return image * 1


Pair = namedtuple("Pair", "picture number")
SOUND: dict[str, Made] = {
    "parameter": made(torch.nn.Parameter),
    "of torchvision": made(tv_tensors.Image),
    "inference": made(in_inference),
    "negative view": made(lambda x: torch.complex(x, -x).conj().imag),
    "turned": made(lambda x: x.mT.contiguous().mT),
    "list": Made(lambda x, y, _: [x, y]),
    "named": Made(lambda x, y, _: Pair(x, y)),
    "label with a gradient": Made(lambda x, y, _: (x, torch.tensor(float(y), requires_grad=True))),
    "label in a row": Made(lambda x, y, _: (x, torch.tensor([y]))),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", SOUND)
def test_readable_image_of_any_kind_is_a_plain_tensor(kind, workers):
    (items,) = load(SOUND[kind], [[3, 1, 4]], workers=workers)
    batch = as_batch([item.image for item in items], torch.tensor([3, 1, 4]))
    assert type(batch) is Tensor
    assert not any((batch.requires_grad, batch.is_inference(), batch.is_conj(), batch.is_neg()))
    assert torch.equal(batch, SOUND[kind].images[[3, 1, 4]])
    assert [item.label for item in items] == [3, 1, 0]


class LocalError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("torn")
        self.lock = threading.Lock()


class Speechless(ValueError):
    def __str__(self) -> str:
        raise ZeroDivisionError


def failing(error: Any) -> Made:
    def fail(image: Tensor, label: int, index: int) -> Any:
        if index == 3:
            raise error
        return image, label

    return Made(fail)


# What is told, and whether the image is at fault, so that it may be left out.
UNSOUND: dict[str, tuple[Made, str, bool]] = {
    "meta": (made(lambda x: x.to("meta")), "of float32 on device meta; let", False),
    "fake": (made(lambda x: FakeTensorMode().from_tensor(x)), "FakeTensor", False),
    "sparse": (made(Tensor.to_sparse), "is a sparse_coo Tensor", False),
    "complex": (made(lambda x: torch.complex(x, x)), "is a strided Tensor of complex64", False),
    "picture": (made(lambda _: Image.new("RGB", (3, 3))), "is a Image, .* transform", False),
    "swapped": (Made(lambda x, y, _: (y, x)), r"is a int, .*\(image, label\)", False),
    "row": (Made(lambda x, y, _: {"pixels": x, "n": y, "of": 1}), "'pixels', 'n', 'of'", False),
    "triple": (Made(lambda x, y, n: (x, y, f"{n}.png")), "a tuple of 3", False),
    "image alone": (Made(lambda x, *_: x), "a Tensor for image", False),
    "text": (Made(lambda *_: "ab"), "a str for image", False),
    "batch": (
        Made(lambda x, y, _: (x[None], torch.tensor([y, y]))),
        r"of shape \(2,\); give one image and one",
        False,
    ),
    "error of its own": (failing(LocalError), r"cannot be reached \(torn\)", False),
    "end of a stream": (failing(StopIteration), "StopIteration", False),
    "none": (Made(lambda x, y, n: None if n == 3 else (x, y)), "is None", True),
    "no image": (Made(lambda x, y, n: (None if n == 3 else x, y)), "is None", True),
    "odd": (failing(ValueError("odd")), "odd", True),
    "error without words": (failing(Speechless), "ZeroDivisionError|Speechless", True),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", UNSOUND)
def test_sort_out_what_is_no_image_is_told_in_a_sentence(kind, workers):
    dataset, sentence, is_image = UNSOUND[kind]
    (items,) = load(dataset, [[3, 2]], workers=workers)
    with pytest.raises(DataError, match=sentence):
        sort_out(items, skip_broken=False)
    if is_image:
        good, broken = sort_out(items, skip_broken=True)
        assert ([item.index for item in good], broken) == ([2], [3])
    else:
        with pytest.raises(DataError, match=sentence):
            sort_out(items, skip_broken=True)


# --- data sets without a list of labels -----------------------------------------------------------


class Listless(Dataset[Any]):
    """Labels come with the images only, of which the third is broken."""

    def __init__(self) -> None:
        self.inner, self.read = SyntheticImages(9), []

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        if index == 2:
            raise OSError("truncated")
        return self.inner[index]


def test_labels_of_a_broken_image_does_not_stop_the_search(tmp_path):
    assert labels_of(Listless()) == [0, 1, UNLABELLED, 3, 0, 1, 2, 3, 0]
    scan = scanned(Listless(), tmp_path / "skipped", skip_broken=True)
    assert scan.broken() == [2]
    assert torch.cat(list(scan.columns("label"))).tolist() == [0, 1, 3, 0, 1, 2, 3, 0]
    with pytest.raises(DataError, match=r"Image 2 of the data set cannot be read \(truncated\)"):
        scanned(Listless(), tmp_path / "stopped")
    with pytest.raises(DataError, match=r"No image can be read: .*truncated"):
        scanned(Subset(Listless(), [2, 2]), tmp_path / "none", skip_broken=True)


def test_labels_of_images_that_the_network_labels_are_not_read(tmp_path):
    dataset = Listless()
    assert labels_of(dataset, needed=False) == [UNLABELLED] * 9
    assert dataset.read == []
    scan = scanned(dataset, tmp_path, skip_broken=True, labels="predicted", classes=[3])
    assert torch.cat(list(scan.columns("index"))).tolist() == [3, 7]


# --- broken, or out of reach ----------------------------------------------------------------------


class Reasoned(Exception):
    """As of urllib3: no OSError, and it keeps what happened under `reason`."""

    def __init__(self, reason: Any) -> None:
        super().__init__("given up")
        self.reason = reason


class Refused(Exception):
    """As of httpx and requests where a server refuses."""


def linked(**links: Any) -> Exception:
    error = ValueError("cannot be fetched")
    for name, value in links.items():
        setattr(error, name, value)
    return error


# How an error may lie behind another.
CONTEXT: dict[str, Callable[[Exception], Exception]] = {
    "plainly": lambda error: error,
    "context": lambda error: linked(__context__=error),
    "hidden context": lambda error: linked(__context__=error, __suppress_context__=True),
    "group": lambda error: ExceptionGroup("all failed", [KeyError("a"), error]),
}
WAYS = CONTEXT | {
    "cause": lambda error: linked(__cause__=error),
    "argument": lambda error: OSError("aborted", error),
    "reason": lambda error: OSError(Reasoned(error)),
}
NO_FOLDER = FileNotFoundError(errno.ENOENT, "No such file", "/no/such/folder/a.png")
OF_SYSTEM = (
    *(OSError(n, "it fails") for n in (errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES)),
    *(OSError(n, "it fails") for n in (errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNREFUSED)),
    ConnectionResetError("by peer"),
    http.client.RemoteDisconnected("no answer"),
    TimeoutError(),
    PermissionError("Access Denied"),
    socket.gaierror(errno.ENOENT, "no such host"),  # some systems number these from 1 on
    URLError(OSError("tunnel failed")),
    HTTPError("http://a", 503, "away", http.client.HTTPMessage(), None),
    http.client.IncompleteRead(b"a", 2),
    Refused("status 503"),
    NO_FOLDER,
    MemoryError(),
    RuntimeError("read_file, read_write_file.cpp:78, [Errno 5] Input/output error: 'a.png'"),
    Exception(f"/data/lmdb: {os.strerror(errno.EMFILE)}"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("can't start new thread"),
    OutOfReach("Image a cannot be reached (it fails)."),
)
OF_IMAGE = (
    OSError("image file is truncated (3 bytes not processed)"),
    OSError(errno.EINVAL, "Invalid argument"),
    OSError(-2, "decoder error -2"),
    UnidentifiedImageError("cannot identify image file"),
    SyntaxError("broken PNG file (chunk b'IDAT')"),
    ValueError("odd"),
    struct.error("unpack requires a buffer of 4 bytes"),
    EOFError("no more images"),
    FileNotFoundError(errno.ENOENT, "No such file", f"{__file__}.png"),
    IsADirectoryError(errno.EISDIR, "Is a directory", "/"),
    DataError("Image a cannot be read (truncated)."),
)


@pytest.mark.parametrize("error", OF_SYSTEM, ids=repr)
def test_out_of_reach_whatever_else_than_decoding_failed(error):
    for way in WAYS.values():
        away = out_of_reach("It", way(error))
        assert away is not None
        assert "\n" not in str(away)


@pytest.mark.parametrize("error", OF_IMAGE, ids=repr)
def test_out_of_reach_is_not_what_decoding_rejects(error):
    for way in CONTEXT.values():
        assert out_of_reach("It", way(error)) is None


class Failing(SyntheticImages):
    """From the sixth image on, reading fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__(9)
        self.error = error
        self.ids, self.sizes = [*range(9)], [1] * 9  # so that none is read for a fingerprint

    def __getitem__(self, index: int) -> Any:
        if index >= 5:
            raise self.error
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_stops_at_what_cannot_be_reached_and_skips_what_is_damaged(workers, tmp_path):
    options, away = {"skip_broken": True, "workers": workers}, ConnectionRefusedError("no")
    with pytest.raises(DataError, match=r"^Image 5 of .* cannot be reached \(.*\); mend [^\n]*$"):
        scanned(Failing(away), tmp_path, **options)
    assert not list(tmp_path.glob("shard-*"))
    try:
        raise away
    except ConnectionError:  # which is no cause, as where a program scans anew after that
        scan = scanned(Failing(OSError("truncated")), tmp_path, **options)
    assert scan.broken() == [5, 6, 7, 8]


def test_fingerprint_is_not_made_of_what_could_be_reached():
    dataset = Failing(OSError(errno.EMFILE, "Too many open files"))
    dataset.ids = None
    with pytest.raises(OutOfReach, match="Too many open files"):
        fingerprint(dataset, dataset.targets)


def test_out_of_reach_has_an_end_where_causes_go_round_in_circles_or_on_and_on():
    first, last = ValueError("first"), ValueError("last")
    first.__cause__, last.__cause__ = last, first
    assert out_of_reach("It", first) is None
    last.args = (first, OSError(errno.EIO, "it fails"))
    assert out_of_reach("It", first) is not None
    error: Exception = OSError(errno.EIO, "too far away to be looked for")
    for _ in range(100):
        error = linked(__cause__=error)
    assert out_of_reach("It", error) is None


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_out_of_reach_is_no_picture_that_is_cut_off_or_damaged(kind):
    """As Pillow itself fails, outside of this library's reader."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    whole = file.getvalue()
    n_broken = n_away = 0
    for cut in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        for content in (whole[:cut], whole[:cut] + b"\xff\0\x7f" + whole[cut + 3 :]):
            try:
                Image.open(io.BytesIO(content)).load()
            except Exception as error:
                n_broken += out_of_reach("It", error) is None
                n_away += out_of_reach("It", error) is not None
    assert n_broken > 20
    assert n_away == 0
