"""Image encoders: any callable, timm's networks, a network's own features; what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from checks import assert_close, assert_untouched, snapshot
from tiny_networks import KINDS, N_CLASSES, SyntheticImages, build
from unbraid.base.errors import ModelError, UsageError
from unbraid.images.batches import in_batches
from unbraid.measuring.encoders import (
    Encoder,
    Penultimate,
    TimmEncoder,
    load_batches,
    load_encoder,
    ready,
)

IMAGES = SyntheticImages(11)


def embed(encoder: Encoder, dataset: Any = IMAGES, batch_size: int = 4) -> Tensor:
    """Embeddings of all images, (N, D)."""
    batches = in_batches(range(len(dataset)), batch_size)
    with ready(encoder) as encode:
        return torch.cat([encode(batch) for batch in load_batches(encoder, dataset, batches, 0)])


def assert_embeddings(embeddings: Tensor, encoder: Callable[..., Tensor]) -> None:
    """One row an image, in order, as the encoder gives for each alone."""
    with torch.no_grad():
        assert_close(embeddings, torch.cat([encoder(image[None]) for image in IMAGES.images]))


def mean_colour(images: Tensor) -> Tensor:
    with torch.enable_grad():  # of which nothing may stay
        return images.requires_grad_().mean((2, 3))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_ready_embeds_every_image_in_order(batch_size):
    found = embed(mean_colour, batch_size=batch_size)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    assert_embeddings(found, mean_colour)
    for wrong in (found.roll(1, 0), found[:-1], found + 1e-7):
        with pytest.raises(AssertionError):
            assert_embeddings(wrong, mean_colour)


def test_ready_uses_a_module_in_eval_mode_and_leaves_it_as_it_was():
    network = build("batch norm behind")
    expected = embed(network)
    network.train()
    network.layer.eval()
    network.layer.weight.requires_grad_(False)
    before = snapshot(network)
    for encoder in (network, network.forward):
        assert torch.equal(embed(encoder), expected)
        assert_untouched(before, snapshot(network))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x: mean_colour(x) / (x != x[1]).sum((2, 3)), "NaN or infinite numbers for image 5"),
        (lambda x: mean_colour(x)[:-1], r"gives \(3, 3\) for 4 images"),
        (lambda x: mean_colour(x)[:, :0], r"gives \(4, 0\) for 4 images"),
        (lambda x: mean_colour(x)[:, :2], r"gives \(4, 2\) for 4 images from image 4 on"),
        (lambda x: mean_colour(x).long(), "not a tensor of floating point numbers"),
        (lambda x: 1 / 0, r"shape \(3, 7, 6\) \(division by zero\)"),
    ],
)
def test_ready_tells_in_a_sentence_what_is_no_embedding(wrong, told):
    network = nn.Dropout(0.5)  # gives something wrong from the second batch on
    answers = iter([mean_colour, wrong])
    network.forward = lambda images: next(answers)(images)
    with pytest.raises(ModelError, match=told) as caught:
        embed(network)
    assert "\n" not in str(caught.value)
    assert network.training


# --- a network's own features ---------------------------------------------------------------------


class OnlyLogits(nn.Module):
    """Logits of a head that may be a convolution, called before a branch that nobody uses."""

    def __init__(self, behind: Callable[[Tensor], Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), head or nn.Linear(6, N_CLASSES)
        self.other, self.scale = nn.Linear(6, N_CLASSES), nn.Linear(2, 6)
        self.behind = behind
        self.double().eval()

    def features(self, x: Tensor) -> Tensor:
        scale = self.scale(x.new_ones(2))  # of what is no batch
        return self.stem(x).relu().mean((2, 3)) * scale

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.features(x)
        conv = isinstance(self.head, nn.Conv2d)
        logits = self.head(pooled[..., None, None] if conv else pooled)
        self.other(pooled * 2)
        pooled.zero_()  # in place, after the head
        return self.behind(logits.flatten(1))


def take_away(z: Tensor) -> Tensor:
    """Logits that are no longer where the head put them."""
    logits = z.clone()
    z.zero_()
    return logits


@pytest.mark.parametrize("kind", KINDS)
def test_penultimate_gives_what_enters_the_classifier(kind):
    network = build(kind)
    before = snapshot(network)
    assert_embeddings(embed(Penultimate(network)), network[:-1])
    assert_untouched(before, snapshot(network))


@pytest.mark.parametrize("head", [None, nn.Conv2d(6, N_CLASSES, 1)])
@pytest.mark.parametrize("behind", [lambda z: z, lambda z: z.float(), take_away])
def test_penultimate_finds_the_classifier_by_its_output_not_by_its_place(head, behind):
    network = OnlyLogits(behind, head)
    assert_embeddings(embed(Penultimate(network)), network.features)


def test_penultimate_of_a_network_without_one_is_told_and_leaves_it():
    network = OnlyLogits(lambda z: 2 * z).train()
    before = snapshot(network)
    with pytest.raises(ModelError, match="no penultimate layer"):
        embed(Penultimate(network))
    assert_untouched(before, snapshot(network))


# --- timm's networks ------------------------------------------------------------------------------

NAME = "timm:test_resnet"


class Photographs(Dataset[tuple[Tensor, int]]):
    """Pictures, and tensors that show something else."""

    targets = (0, 1, 0)

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 8, 8), float(index)), self.targets[index]

    def picture(self, index: int) -> Image.Image:
        noise = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (40, 60, 3), generator=noise, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()).convert("RGBA")


@pytest.fixture(scope="module")
def timm_encoder() -> TimmEncoder:
    torch.manual_seed(0)
    return load_encoder(NAME, pretrained=False, device="cpu")


def test_timm_encoder_puts_pictures_through_its_own_preprocessing(timm_encoder):
    photographs = Photographs()
    pictures = [photographs.picture(n).convert("RGB") for n in range(3)]
    with torch.no_grad():
        expected = timm_encoder.network(torch.stack(list(map(timm_encoder.transform, pictures))))
    assert_close(embed(timm_encoder, photographs), expected, 1e-5)
    subset = Subset(Subset(photographs, [2, 0, 1]), [1, 2])
    assert_close(embed(timm_encoder, subset, batch_size=1), expected[:2], 1e-4)


@pytest.mark.parametrize(("channels", "size"), [(1, (20, 30)), (3, (20, 30)), (5, (160, 160))])
def test_timm_encoder_brings_images_without_pictures_to_its_size(timm_encoder, channels, size):
    images = SyntheticImages(2, size=(channels, *size), dtype=torch.float32)
    fitted = images.images if channels == 3 else images.images.mean(1)[:, None].repeat(1, 3, 1, 1)
    if size != timm_encoder.size[1:]:
        fitted = nn.functional.interpolate(fitted, (160, 160), mode="bilinear", antialias=True)
    with torch.no_grad():
        assert_close(embed(timm_encoder, images), timm_encoder.network(fitted), 1e-4)


def test_load_encoder_tells_in_a_sentence_what_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"test_resnet cannot be had .*penultimate"):
        load_encoder(NAME)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        load_encoder(NAME)
