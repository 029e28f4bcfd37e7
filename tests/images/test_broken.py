"""When an image counts as broken and may be left out, and when a fault stops the work."""

import errno
import gzip
import http.client
import io
import json
import os
import pickle
import socket
import threading
from urllib.error import HTTPError

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
from unbraid.images.broken import UNLABELLED, largest_readable, sort_out
from unbraid.images.dataset import labels_of
from unbraid.images.identity import fingerprint


class Made(Dataset):
    def __init__(self, make, **told):
        self.images, self.make, self.read = SyntheticImages(9).images, make, []
        vars(self).update(told)

    def __len__(self):
        return 9

    def __getitem__(self, index):
        self.read.append(index)
        return self.make(self.images[index].clone(), index % 4, index)


def made(change):
    return Made(lambda image, label, _: (change(image), label))


def failing(error, first=3, **told):
    def fail(image, label, index):
        if index >= first:
            raise error
        return image, label

    return Made(fail, **told)


class Speechless(ValueError):
    def __str__(self):
        raise ZeroDivisionError


UNSENT = Exception("torn")
UNSENT.lock = threading.Lock()  # which cannot be pickled
SOUND = {
    "parameter": made(torch.nn.Parameter),
    "of torchvision": made(tv_tensors.Image),
    "inference": made(torch.inference_mode()(lambda x: x * 1)),
    "negative view": made(lambda x: torch.complex(x, -x).conj().imag),
    "turned": made(lambda x: x.mT.contiguous().mT),
    "label with a gradient": Made(lambda x, y, _: (x, torch.tensor(float(y), requires_grad=True))),
    "list, label in a row": Made(lambda x, y, _: [x, torch.tensor([y])]),
}
# What is told, and whether the image is at fault, so that it may be left out.
UNSOUND = {
    "meta": (made(lambda x: x.to("meta")), "of float64 on device meta; let", False),
    "fake": (made(lambda x: FakeTensorMode().from_tensor(x)), "FakeTensor", False),
    "sparse": (made(Tensor.to_sparse), "is a sparse_coo Tensor", False),
    "picture": (made(lambda _: Image.new("RGB", (3, 3))), "is an Image, .* transform", False),
    "swapped": (Made(lambda x, y, _: (y, x)), r"is an int, .*\(image, label\)", False),
    "row": (Made(lambda x, y, _: {"pixels": x, "n": y, "of": 1}), "'pixels', 'n', 'of'", False),
    "triple": (Made(lambda x, y, n: (x, y, f"{n}.png")), "a tuple of 3", False),
    "labels": (Made(lambda x, y, _: (x, torch.tensor([y, y]))), r"of shape \(2,\); give", False),
    "complex": (made(lambda x: torch.complex(x, x)), "complex", False),
    "text": (Made(lambda *_: "ab"), "a str for image", False),
    "error of its own": (failing(UNSENT), r"cannot be reached \(torn\)", False),
    "end of a stream": (failing(StopIteration), "StopIteration", False),
    "no image": (Made(lambda x, y, n: (None if n == 3 else x, y)), "is None", True),
    "none": (Made(lambda x, y, n: None if n == 3 else (x, y)), "Image 3 is None", True),
    "odd": (failing(ValueError("odd")), "odd", True),
    "error without words": (failing(Speechless()), "ZeroDivisionError|Speechless", True),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", SOUND)
def test_readable_image_of_any_kind_is_a_plain_tensor(kind, workers):
    (items,) = load(SOUND[kind], [[3, 1, 4]], workers=workers)
    batch = as_batch([item.image for item in items])
    assert type(batch) is Tensor
    assert not any((batch.requires_grad, batch.is_inference(), batch.is_conj(), batch.is_neg()))
    assert torch.equal(batch, SOUND[kind].images[[3, 1, 4]])
    assert [item.label for item in items] == [3, 1, 0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", UNSOUND)
def test_sort_out_what_is_no_image_is_told_in_a_sentence(kind, workers):
    dataset, sentence, is_image = UNSOUND[kind]
    (items,) = load(dataset, [[3, 2]], workers=workers)
    for skip_broken in (False, True)[: 2 - is_image]:
        with pytest.raises(DataError, match=sentence):
            sort_out(items, skip_broken)
    if is_image:
        good, broken = sort_out(items, skip_broken=True)
        assert ([item.index for item in good], broken) == ([2], [3])


def test_labels_of_a_broken_image_does_not_stop_the_search(tmp_path):
    dataset = failing(OSError("truncated"), 7)
    assert labels_of(dataset, needed=False) == [UNLABELLED] * 9
    assert dataset.read == []
    scan = scanned(dataset, tmp_path / "own", skip_broken=True, labels="predicted", classes=[3])
    assert torch.cat(list(scan.columns("index"))).tolist() == [3]
    assert labels_of(dataset) == [0, 1, 2, 3, 0, 1, 2, UNLABELLED, UNLABELLED]
    scan = scanned(dataset, tmp_path / "skipped", skip_broken=True)
    assert scan.broken() == [7, 8]
    assert torch.cat(list(scan.columns("label"))).tolist() == [0, 1, 2, 3, 0, 1, 2]
    with pytest.raises(DataError, match=r"Image 7 cannot be read \(truncated\)"):
        scanned(dataset, tmp_path / "stopped")
    with pytest.raises(DataError, match=r"No image can be read: .*truncated"):
        scanned(Subset(dataset, [8, 8]), tmp_path / "none", skip_broken=True)


def linked(**links):
    error = ValueError("cannot be fetched")
    for name, value in links.items():
        setattr(error, name, value)
    return error


CONTEXT = (  # how an error may lie behind another
    lambda error: error,
    lambda error: linked(__context__=error),
    lambda error: linked(__context__=error, __suppress_context__=True),
    lambda error: ExceptionGroup("all failed", [KeyError("a"), error]),
)
OTHERS = (
    lambda error: linked(__cause__=error),
    lambda error: OSError("aborted", error),
    lambda error: OSError(linked(reason=error)),  # as of urllib3
)
NO_FOLDER = FileNotFoundError(errno.ENOENT, "No such file", "/no/such/folder/a.png")
OF_SYSTEM = (
    *(OSError(n, "it fails") for n in (errno.EIO, errno.EMFILE, errno.ESTALE, errno.EACCES)),
    *(ConnectionResetError("by peer"), TimeoutError(), socket.gaierror(errno.ENOENT, "no host")),
    HTTPError("http://a", 503, "away", http.client.HTTPMessage(), None),
    *(http.client.IncompleteRead(b"a", 2), Exception("status 503"), NO_FOLDER, MemoryError()),
    RuntimeError("read_file, read_write_file.cpp:78, [Errno 5] Input/output error: 'a.png'"),
    Exception(f"/data/lmdb: {os.strerror(errno.EMFILE)}"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    *(RuntimeError("can't start new thread"), OutOfReach("Image a cannot be reached (it fails).")),
)
with pytest.raises(ValueError, match="Expecting value") as OF_JSON:
    json.loads("[")  # behind which lies a StopIteration
OF_IMAGE = (
    *(OSError("image file is truncated"), OSError(errno.EINVAL, "Invalid argument")),
    *(OSError(-2, "decoder error -2"), UnidentifiedImageError("cannot identify image file")),
    *(SyntaxError("broken PNG file (chunk b'IDAT')"), ValueError("odd"), EOFError("no more")),
    FileNotFoundError(errno.ENOENT, "No such file", f"{__file__}.png"),
    IsADirectoryError(errno.EISDIR, "Is a directory", "/"),
    DataError("Image a cannot be read (truncated)."),
    *(gzip.BadGzipFile("Not a gzipped file"), pickle.UnpicklingError("truncated")),
    OF_JSON.value,
)


@pytest.mark.parametrize("error", [*OF_SYSTEM, *OF_IMAGE], ids=repr)
def test_out_of_reach_is_whatever_else_than_decoding_failed(error):
    if error in OF_IMAGE:
        assert [out_of_reach("It", way(error)) for way in CONTEXT] == [None] * 4
    else:
        told = [out_of_reach("It", way(error)) for way in (*CONTEXT, *OTHERS)]
        assert all(away is not None and "\n" not in str(away) for away in told)


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_stops_at_what_cannot_be_reached_and_skips_what_is_damaged(workers, tmp_path):
    options, away = {"skip_broken": True, "workers": workers}, ConnectionRefusedError("no")
    told = {"targets": [0, 1, 2, 3, 0, 1, 2, 3, 0], "ids": [*range(9)], "sizes": [1] * 9}
    with pytest.raises(DataError, match=r"^Image 3 cannot be reached \(.*\); mend [^\n]*$"):
        scanned(failing(away, **told), tmp_path, **options)
    assert not list(tmp_path.glob("shard-*"))
    try:
        raise away
    except ConnectionError:  # which is no cause, as where a program scans again after that
        scan = scanned(failing(OSError("truncated"), **told), tmp_path, **options)
    assert scan.broken() == [3, 4, 5, 6, 7, 8]
    with pytest.raises(OutOfReach, match="Too many open files"):  # not of what could be reached
        fingerprint(failing(OSError(errno.EMFILE, "Too many open files")), [0] * 9)


def test_out_of_reach_has_an_end_where_causes_go_round_in_circles_or_on_and_on():
    first, last = ValueError("first"), ValueError("last")
    first.__cause__, last.__cause__ = last, first
    assert out_of_reach("It", first) is None
    last.args = (first, OSError(errno.EIO, "it fails"))
    assert out_of_reach("It", first) is not None
    error = OSError(errno.EIO, "too far away to be looked for")
    for _ in range(100):
        error = linked(__cause__=error)
    assert out_of_reach("It", error) is None


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
def test_out_of_reach_is_no_picture_that_is_cut_off_or_damaged(kind):
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    whole, away = file.getvalue(), []
    for cut in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        for content in (whole[:cut], whole[:cut] + b"\xff\0\x7f" + whole[cut + 3 :]):
            try:
                Image.open(io.BytesIO(content)).load()
            except Exception as error:
                away.append(out_of_reach("It", error))
    assert len(away) > 20
    assert set(away) == {None}


@pytest.mark.parametrize("n", [1, 7, 8, 9, 15, 17, 100])
def test_the_largest_is_looked_for_in_eight_images_at_most(n):
    read = []

    class Growing(Dataset):
        def __len__(self):
            return n

        def __getitem__(self, index):
            read.append(index)
            return torch.zeros(3, 4, 1 + index), 0

    assert largest_readable(Growing(), range(n)).shape == (3, 4, 1 + max(read))
    assert len(read) <= 8
    assert n - max(read) <= -(-n // 8)
