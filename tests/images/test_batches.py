"""How batches come from worker processes, and what is said when these die."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import DistNetworkError
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors

import unbraid
from checks import assert_same_files
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.images import batches as loading
from unbraid.images.batches import as_batch, deaths_told, load
from unbraid.images.broken import sort_out


class Mixed(Dataset):
    """Images of two sizes and a broken one."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        if index == 2:
            raise ValueError("torn")
        return torch.full((1, 2 + (index == 5), 2), float(index)), index + 10


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_as_they_were_read_one_size_or_several(workers):
    found = list(load(Mixed(), [[0, 2, 1], [2], [4, 5]], workers=workers, pinned=False))
    assert [[item[0] for item in items] for items in found] == [[0, 2, 1], [2], [4, 5]]
    for item in (item for items in found for item in items):
        if item[0] == 2:
            assert "torn" in str(item.fault)
        else:
            assert item[2] == item[0] + 10
            assert torch.equal(item[1], Mixed()[item[0]][0])


def test_a_batch_takes_a_file_and_not_one_for_each_image(tmp_path: Path):
    """Else some hundred images are more than the files that a process may usually open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 60
    images, options = SyntheticImages(240), {"batch_size": 120, "threads": 1}
    unbraid.scan(build("1x1"), "layer", images, tmp_path / "alone", **options)
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 60, before[1]))
    try:
        unbraid.scan(build("1x1"), "layer", images, tmp_path / "two", workers=2, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert_same_files(tmp_path / "alone", tmp_path / "two")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_lies_in_a_row_makes_a_batch_without_a_copy(workers):
    (items,) = load(SyntheticImages(9), [[3, 1, 4, 0, 5]], workers=workers, pinned=False)
    images = [item[1] for item in items]
    for some in (images, images[2:], images[1:3], images[:1]):
        batch = as_batch(some, torch.arange(len(some)))
        assert torch.equal(batch, torch.stack(some))
        assert batch.data_ptr() == some[0].data_ptr()


def test_what_does_not_lie_in_a_row_is_copied_into_one():
    (items,) = load(SyntheticImages(9), [[0, 1, 2, 3]], workers=0, pinned=False)
    one, two, three, _ = (item[1] for item in items)
    for some in ([one, three], [two, one], [one, one], [one, two.clone()], [one.clone()]):
        batch = as_batch(some, torch.arange(len(some)))
        assert torch.equal(batch, torch.stack(some))
        assert batch.data_ptr() != some[0].data_ptr()
    (mixed,) = load(Mixed(), [[4, 5]], workers=0, pinned=False)
    with pytest.raises(DataError, match=r"Image 5 is \(1, 3, 2\) where image 4 is \(1, 2, 2\)"):
        as_batch([item[1] for item in mixed], torch.tensor([4, 5]))


def test_images_of_the_data_set_itself_are_never_handed_to_the_network(tmp_path: Path):
    """Which may write into what it is given."""
    images, kept = SyntheticImages(8), SyntheticImages(8)
    assert images[0][0]._base is images.images
    changing = torch.nn.Sequential(torch.nn.ReLU(inplace=True), build("1x1"))
    unbraid.scan(changing, "1.layer", images, tmp_path, batch_size=4)
    assert torch.equal(images.images, kept.images)
    images.images = [images.images[0], *images.images[1:, :, 1:]]
    (mixed,) = load(images, [[0, 1, 2]], workers=0, pinned=False)
    own = as_batch([item[1] for item in mixed[1:]], torch.arange(2))
    assert own.data_ptr() != images.images[1].data_ptr()


class Deadly(SyntheticImages):
    def __getitem__(self, index: int):
        if index == 7 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_told_in_a_sentence_and_the_next_start_goes_on(tmp_path: Path):
    network, options = build("1x1"), {"batch_size": 4, "threads": 1}
    with pytest.raises(RunError, match=r"loads images died .* with fewer workers"):
        unbraid.scan(network, "layer", Deadly(9), tmp_path, workers=1, **options)
    assert len(list(unbraid.scan(network, "layer", Deadly(9), tmp_path, **options).shards())) == 1


def test_a_team_that_is_gone_is_told_and_other_errors_are_left_alone():
    with pytest.raises(RunError, match=r"other processes are gone .*goes on"), deaths_told():
        raise DistNetworkError("connection reset by peer")
    with pytest.raises(RuntimeError, match="of the network"), deaths_told():
        raise RuntimeError("of the network")


# --- images and rows of every kind ----------------------------------------------------------------


class Made(SyntheticImages):
    """Gives whatever is made of an image and its label."""

    def __init__(self, make: Callable[[Tensor, int, int], Any], n_images: int = 9) -> None:
        super().__init__(n_images, dtype=torch.float32)
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
    "wants a gradient": made(lambda x: x.requires_grad_()),
    "has a gradient": made(lambda x: x.requires_grad_() * 1),
    "parameter": made(torch.nn.Parameter),
    "of torchvision": made(tv_tensors.Image),
    "inference": made(in_inference),
    "conjugate": made(lambda x: torch.complex(x, x).conj().real),
    "negative view": made(lambda x: torch.complex(x, -x).conj().imag),
    "turned": made(lambda x: x.mT.contiguous().mT),
    "spread out": made(lambda x: torch.stack([x, x], -1)[..., 0]),
    "list": Made(lambda x, y, _: [x, y]),
    "named": Made(lambda x, y, _: Pair(x, y)),
    "label with a gradient": Made(lambda x, y, _: (x, torch.tensor(float(y), requires_grad=True))),
    "label of numpy": Made(lambda x, y, _: (x, np.array(y))),
    "label in a row": Made(lambda x, y, _: (x, torch.tensor([y]))),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", SOUND)
def test_an_image_of_any_kind_crosses_as_a_plain_tensor(kind, workers):
    (items,) = load(SOUND[kind], [[3, 1, 4]], workers=workers)
    batch = as_batch([item[1] for item in items], torch.tensor([3, 1, 4]))
    assert type(batch) is Tensor
    assert not any((batch.requires_grad, batch.is_inference(), batch.is_conj(), batch.is_neg()))
    assert torch.equal(batch, SOUND[kind].images[[3, 1, 4]])
    assert [item[2] for item in items] == [3, 1, 0]


class LocalError(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("torn")
        self.lock = threading.Lock()


class Speechless(Exception):
    def __str__(self) -> str:
        raise ZeroDivisionError


def failing(kind: type[BaseException]) -> Made:
    def fail(image: Tensor, label: int, index: int) -> Any:
        if index == 3:
            raise kind
        return image, label

    return Made(fail)


# What is told, and whether the image is at fault, so that it may be left out.
UNSOUND: dict[str, tuple[Made, str, bool]] = {
    "meta": (made(lambda x: x.to("meta")), r"no content \(device meta\)", False),
    "fake": (made(lambda x: FakeTensorMode().from_tensor(x)), "FakeTensor", False),
    "sparse": (made(Tensor.to_sparse), "sparse or nested", False),
    "nested": (
        made(lambda x: torch.nested.nested_tensor([x[0], x[1]])),
        "sparse or nested",
        False,
    ),
    "complex": (made(lambda x: torch.complex(x, x)), "type complex64", False),
    "quantised": (
        made(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
        "type qint8",
        False,
    ),
    "picture": (made(lambda _: Image.new("RGB", (3, 3))), "is a Image, .* transform", False),
    "swapped": (Made(lambda x, y, _: (y, x)), r"is a int, .*\(image, label\)", False),
    "row": (Made(lambda x, y, _: {"pixels": x, "n": y, "of": 1}), "'pixels', 'n', 'of'", False),
    "row of two": (Made(lambda x, y, _: {"image": x, "label": y}), "from_hugging_face", False),
    "empty row": (Made(lambda *_: {}), "an empty dictionary", False),
    "triple": (Made(lambda x, y, n: (x, y, f"{n}.png")), "a tuple of 3", False),
    "one": (Made(lambda x, y, _: (x,)), "a tuple of 1", False),
    "image alone": (Made(lambda x, *_: x), "a Tensor for image", False),
    "image of two alone": (Made(lambda x, *_: x[:2]), "a Tensor for image", False),
    "numbers": (Made(lambda *_: np.zeros(2)), "a ndarray for image", False),
    "text": (Made(lambda *_: "ab"), "a str for image", False),
    "generator": (Made(lambda x, y, _: (one for one in (x, y))), "a generator", False),
    "batch": (
        Made(lambda x, y, _: (x[None], torch.tensor([y, y]))),
        r"of shape \(2,\), .*one image at a time",
        False,
    ),
    "label without content": (
        Made(lambda x, y, _: (x, torch.tensor(y, device="meta"))),
        "is a Tensor, not a class's number",
        False,
    ),
    "none": (Made(lambda x, y, n: None if n == 3 else (x, y)), "is None, not an image", True),
    "no image": (Made(lambda x, y, n: (None if n == 3 else x, y)), "is None, with", True),
    "error of its own": (failing(LocalError), "torn", True),
    "error without words": (failing(Speechless), "ZeroDivisionError", True),
    "end of a stream": (failing(StopIteration), "StopIteration", True),
}


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", UNSOUND)
def test_what_is_no_image_is_told_in_a_sentence(kind, workers):
    dataset, sentence, is_image = UNSOUND[kind]
    (items,) = load(dataset, [[3, 2]], workers=workers)
    with pytest.raises(DataError, match=sentence):
        sort_out(items, skip_broken=False)
    if is_image:
        good, broken = sort_out(items, skip_broken=True)
        assert ([item[0] for item in good], broken) == ([2], [3])
    else:
        with pytest.raises(DataError, match=sentence):
            sort_out(items, skip_broken=True)


@pytest.mark.parametrize(
    "kind", [kind for kind, (_, _, is_image) in UNSOUND.items() if not is_image]
)
def test_a_data_set_of_something_else_is_told_before_anything_is_written(kind, tmp_path):
    dataset, sentence, _ = UNSOUND[kind]
    with pytest.raises(DataError, match=sentence):
        unbraid.scan(
            build("1x1"), "layer", dataset, tmp_path / "scan", batch_size=4, skip_broken=True
        )
    assert not (tmp_path / "scan").exists()


def test_every_loop_over_images_takes_those_that_want_a_gradient(tmp_path):
    network, images = build("1x1", torch.float32), SOUND["has a gradient"]
    scan = unbraid.scan(network, "layer", images, tmp_path, workers=1, positions=True)
    split = unbraid.split(scan, unbraid.find(scan, channels={1: [[0], [1]]}))
    model2 = unbraid.apply(network, split)
    assert unbraid.compare_outputs(network, model2, images, workers=1).max_abs_logit_diff == 0
    assert unbraid.ablate(model2, images, workers=1, scan=scan).channels
    encoder = unbraid.Penultimate(network)
    assert unbraid.measure_semantics(split, scan, images, encoder, workers=1, n_top=2)


# --- what goes wrong between processes ------------------------------------------------------------


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit])
def test_a_worker_that_leaves_is_told(kind):
    with pytest.raises(RunError, match="loads images died"):
        list(load(failing(kind), [[0, 3]], workers=1))


def test_images_that_cannot_be_handed_over_are_told_and_not_waited_for(monkeypatch):
    class Full:
        @staticmethod
        def dumps(_: Any) -> Any:
            raise RuntimeError("No space left on device")

    monkeypatch.setattr(loading, "ForkingPickler", Full)
    (items,) = load(SyntheticImages(4), [[0, 1]], workers=1)
    with pytest.raises(DataError, match=r"hand them over \(No space left on device\).*fewer"):
        sort_out(items, skip_broken=True)


def test_images_that_cannot_be_received_are_told():
    for content, sentence in ((b"torn", "hand them over"), (b"", "loads images died")):
        sealed = loading._Sealed(content)
        with pytest.raises(RunError, match=sentence):
            sealed.open()
        with pytest.raises(DataError, match=sentence):
            sort_out(list(loading._unpacked(iter([sealed.pin_memory()])))[0], skip_broken=True)


@pytest.mark.parametrize("what", [lambda: (k for k in ()), lambda: lambda: 0])
def test_a_data_set_that_cannot_be_sent_is_told(what):
    images = SyntheticImages(4)
    images.kept = what()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(UsageError, match=r"cannot be sent .* workers=0"):
            list(load(images, [[0]], workers=1))
    finally:
        torch.multiprocessing.set_start_method("fork", force=True)
