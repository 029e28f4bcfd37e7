"""Image encoders: any callable, timm's networks, a network's own features; what is refused."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from checks import assert_bit_equal, assert_close
from tiny_networks import KINDS, N_CLASSES, PooledFeatures, SyntheticImages, build, stack
from unbraid.base.errors import DataError, ModelError, UsageError
from unbraid.images.batches import in_batches
from unbraid.measuring.encoders import (
    Encoder,
    Penultimate,
    TimmEncoder,
    load_batches,
    load_encoder,
    name_of_encoder,
    ready,
)
from unbraid.networks.models import load_model

IMAGES = SyntheticImages(11)


def embed(encoder: Encoder, dataset: Any, batch_size: int = 64) -> Tensor:
    """Embeddings of all images, (N, D)."""
    batches = in_batches(range(len(dataset)), batch_size)
    with ready(encoder) as encode:
        return torch.cat([encode(batch) for batch in load_batches(encoder, dataset, batches, 0)])


def state_of(network: nn.Module) -> list[Any]:
    """All that an encoder may disturb in a network."""
    hooks = [
        len(getattr(module, kind))
        for module in network.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    ]
    modes = [module.training for module in network.modules()]
    wanted = [parameter.requires_grad for parameter in network.parameters()]
    return [hooks, modes, wanted, [value.clone() for value in network.state_dict().values()]]


def assert_undisturbed(network: nn.Module, before: list[Any]) -> None:
    """Hooks, modes, wishes for gradients and all numbers are as they were."""
    *flags, values = state_of(network)
    assert flags == before[:-1]
    for actual, expected in zip(values, before[-1], strict=True):
        assert_bit_equal(actual, expected)


def assert_embeddings(embeddings: Tensor, encoder: Callable[..., Tensor], dataset: Any) -> None:
    """One row an image, in order, as the encoder gives for each alone."""
    assert len(embeddings) == len(dataset)
    with torch.no_grad():
        for n, row in enumerate(embeddings):
            assert_close(row, encoder(dataset[n][0][None])[0])


def mean_colour(images: Tensor) -> Tensor:
    return images.mean((2, 3))


# --- any callable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
def test_every_image_is_embedded_in_order(batch_size):
    embeddings = embed(mean_colour, IMAGES, batch_size=batch_size)
    assert embeddings.dtype == torch.float64
    assert_embeddings(embeddings, mean_colour, IMAGES)


def test_the_check_of_embeddings_fails_on_others():
    sound = embed(mean_colour, IMAGES)
    for wrong in (sound.roll(1, 0), sound[:-1], sound + 1e-7, sound[:, :2], sound * math.nan):
        with pytest.raises((AssertionError, ValueError)):
            assert_embeddings(wrong, mean_colour, IMAGES)


class Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(PooledFeatures(), nn.Dropout(0.5)).double()

    def encode_image(self, images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.visual(images)


def test_a_module_is_used_in_eval_mode_and_left_as_it_was():
    network = build("batch norm behind")
    expected = embed(network, IMAGES)
    network.train()
    network.layer.eval()
    network.layer.weight.requires_grad_(False)
    clip = Clip()  # so is the module that a method belongs to
    for module, encoder, embeddings in (
        (network, network, expected),
        (clip, clip.encode_image, embed(mean_colour, IMAGES)),
    ):
        before = state_of(module)
        assert_close(embed(encoder, IMAGES), embeddings, 0 if module is network else 1e-9)
        assert_undisturbed(module, before)


def test_the_check_of_disturbance_fails_on_a_disturbed_network():
    network = build("batch norm behind")
    disturbances: list[Callable[[], Any]] = [
        lambda: network.behind.train(),
        lambda: network.head.register_forward_hook(lambda *_: None),
        lambda: network.head.weight.requires_grad_(False),
        lambda: network.head.bias.data.add_(1e-12),
    ]
    for disturb in disturbances:
        before = state_of(network)
        assert_undisturbed(network, before)
        disturb()
        with pytest.raises(AssertionError):
            assert_undisturbed(network, before)


class Failing(nn.Module):
    """Gives something wrong from the second batch on."""

    def __init__(self, wrong: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.dropout, self.wrong, self.calls = nn.Dropout(0.5), wrong, 0

    def forward(self, images: Tensor) -> Any:
        self.calls += 1
        return self.wrong(images) if self.calls > 1 else mean_colour(images)


def _with(embeddings: Tensor, value: float) -> Tensor:
    embeddings[1, 2] = value
    return embeddings


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x: _with(mean_colour(x), math.nan), "NaN or infinite numbers for image 5"),
        (lambda x: _with(mean_colour(x), -math.inf), "NaN or infinite numbers for image 5"),
        (lambda x: mean_colour(x)[:-1], r"gives \(3, 3\) for 4 images"),
        (lambda x: mean_colour(x).mean(0, keepdim=True), r"gives \(1, 3\) for 4 images"),
        (lambda x: x, r"gives \(4, 3, 7, 6\) for 4 images"),
        (lambda x: mean_colour(x).mean(1), r"gives \(4,\) for 4 images"),
        (lambda x: mean_colour(x)[:, :0], r"gives \(4, 0\) for 4 images"),
        (lambda x: mean_colour(x)[:, :2], "2 dimensions from image 4 on, but of 3 before"),
        (lambda x: mean_colour(x).long(), "not a tensor of floating point numbers"),
        (lambda x: {"features": mean_colour(x)}, "gives dict, not a tensor"),
        (lambda x: nn.functional.conv2d(x, torch.zeros(1, 9, 1, 1).double()), "cannot run on"),
        (lambda x: 1 / 0, r"shape \(3, 7, 6\) \(division by zero\)"),
    ],
)
def test_what_is_no_embedding_is_told_in_a_sentence(wrong, told):
    encoder = Failing(wrong)
    before = state_of(encoder)
    with pytest.raises(ModelError, match=told) as caught:
        embed(encoder, IMAGES, batch_size=4)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert_undisturbed(encoder, before)


def test_a_broken_image_is_told():
    class Broken(SyntheticImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index == 6:
                raise OSError("truncated")
            return super().__getitem__(index)

    with pytest.raises(DataError, match=r"Image 6 .*truncated"):
        embed(mean_colour, Broken(11), batch_size=4)


def test_an_encoder_that_asks_for_gradients_gets_none_into_the_embeddings():
    def with_gradients(images: Tensor) -> Tensor:
        with torch.enable_grad():
            return mean_colour(images.requires_grad_())

    assert not embed(with_gradients, IMAGES).requires_grad


# --- a network's own features ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_what_enters_the_classifier(kind):
    network = build(kind)
    before = state_of(network)
    embeddings = embed(Penultimate(network), IMAGES, batch_size=4)
    assert_undisturbed(network, before)
    assert_embeddings(embeddings, network[:-1], IMAGES)
    with torch.no_grad():
        assert_close(network[-1](embeddings), network(IMAGES.images))


class OnlyLogits(nn.Module):
    """Logits of a head that is a convolution, called before a branch that nobody uses."""

    def __init__(self, head: nn.Module, behind: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.head, self.behind = nn.Conv2d(3, 6, 3), head, behind
        self.other = nn.Linear(6, N_CLASSES)
        self.double().eval()

    def features(self, x: Tensor) -> Tensor:
        return self.stem(x).relu().mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x).relu_().mean((2, 3), keepdim=True)
        pooled = features.flatten(1)
        logits = self.head(features if isinstance(self.head, nn.Conv2d) else pooled)
        self.other(pooled * 2)
        features.zero_()  # in place, after the head
        return self.behind(logits.flatten(1))


def take_away(z: Tensor) -> Tensor:
    """Logits that are no longer where the head put them."""
    logits = z.clone()
    z.zero_()
    return logits


@pytest.mark.parametrize("head", [nn.Linear(6, N_CLASSES), nn.Conv2d(6, N_CLASSES, 1)])
@pytest.mark.parametrize(
    "behind", [lambda z: z, lambda z: z.clone(), lambda z: z.float(), take_away]
)
def test_the_classifier_is_found_by_its_output_not_by_its_place(head, behind):
    network = OnlyLogits(head, behind)
    assert_embeddings(embed(Penultimate(network), IMAGES), network.features, IMAGES)


def test_of_two_layers_that_give_the_logits_the_last_counts():
    first, last = nn.Linear(6, N_CLASSES), nn.Linear(N_CLASSES, N_CLASSES, bias=False)
    last.weight.data = torch.eye(N_CLASSES)
    network = stack(("pool", PooledFeatures()), ("first", first), ("last", last)).double()
    images = SyntheticImages(4, size=(6, 2, 2))
    embeddings = embed(Penultimate(network), images)
    assert_embeddings(embeddings, network, images)
    assert embeddings.shape == (4, N_CLASSES)


def test_layers_may_be_used_on_what_is_no_batch():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Linear(2, 3), nn.Linear(3, N_CLASSES)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(mean_colour(x) * self.scale(torch.ones(2).double()))

    network = Scaled()
    embeddings = embed(Penultimate(network), IMAGES)
    with torch.no_grad():
        assert_close(network.head(embeddings), network(IMAGES.images))


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (OnlyLogits(nn.Linear(6, N_CLASSES), lambda z: z.log_softmax(1)), "no penultimate layer"),
        (OnlyLogits(nn.Linear(6, N_CLASSES), lambda z: 2 * z), "no penultimate layer"),
        (stack(("stem", nn.Linear(6, 4)), ("head", nn.Linear(5, 4))).double(), "cannot run on"),
    ],
)
def test_a_network_without_a_penultimate_layer_is_told_and_left_as_it_was(network, told):
    before = state_of(network.train())
    with pytest.raises(ModelError, match=told) as caught:
        embed(Penultimate(network), IMAGES)
    assert "\n" not in str(caught.value)
    assert_undisturbed(network, before)


@pytest.mark.parametrize(
    ("spec", "head"),
    [
        ("torchvision:resnet18", "fc"),
        ("torchvision:mobilenet_v3_small", "classifier.3"),
        ("timm:vit_tiny_patch16_224", "head"),
        ("timm:mobilenetv3_small_050", "classifier"),
    ],
)
def test_it_works_for_networks_that_people_use(spec, head):
    model = load_model(spec, "random", "cpu").model
    image = torch.randn(3, 64, 64) if "vit" not in spec else torch.randn(3, 224, 224)
    embeddings = embed(Penultimate(model), [(image, 0)])
    with torch.no_grad():
        assert_close(model.get_submodule(head)(embeddings), model(image[None]), 1e-5)


# --- timm's networks ------------------------------------------------------------------------------

NAME = "timm:resnet10t"


class Photographs(Dataset[tuple[Tensor, int]]):
    """Pictures, and tensors that show something else."""

    targets = (0, 1, 0)

    def __init__(self, mode: str = "RGB") -> None:
        self.mode = mode

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((3, 8, 8), float(index)), self.targets[index]

    def picture(self, index: int) -> Image.Image:
        noise = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (40, 60, 3), generator=noise, dtype=torch.uint8)
        return Image.fromarray(pixels.numpy()).convert(self.mode)


@pytest.fixture(scope="module")
def timm_encoder() -> TimmEncoder:
    torch.manual_seed(0)
    return load_encoder(NAME, pretrained=False, device="cpu")


def by_hand(encoder: TimmEncoder, pictures: list[Image.Image]) -> Tensor:
    with torch.no_grad():
        return encoder.network(torch.stack([encoder.transform(p) for p in pictures]))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_pictures_go_through_the_encoders_own_preprocessing(timm_encoder, mode):
    photographs = Photographs(mode)
    expected = by_hand(timm_encoder, [photographs.picture(n).convert("RGB") for n in range(3)])
    assert expected.shape == (3, 512)
    assert_close(embed(timm_encoder, photographs), expected, 1e-5)
    subset = Subset(Subset(photographs, [2, 0, 1]), [1, 2])
    assert_close(embed(timm_encoder, subset, batch_size=1), expected[:2], 1e-4)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("size", [(20, 30), (176, 176)])
def test_images_without_pictures_are_brought_to_its_size(timm_encoder, channels, size):
    images = SyntheticImages(2, size=(channels, *size), dtype=torch.float32)
    fitted = images.images if channels == 3 else images.images.mean(1)[:, None].repeat(1, 3, 1, 1)
    if size != (176, 176):
        fitted = nn.functional.interpolate(fitted, (176, 176), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = timm_encoder.network(fitted)
    assert_close(embed(timm_encoder, images), expected, 1e-4)


def test_an_encoder_of_ones_own_gets_the_images_not_the_pictures():
    encoder = PooledFeatures()
    encoder.transform = None
    assert embed(encoder, Photographs()).tolist() == [[float(n)] * 3 for n in range(3)]


def test_a_picture_that_cannot_be_read_is_told(timm_encoder):
    class Broken(Photographs):
        def picture(self, index: int) -> Image.Image:
            raise DataError("Image a.png cannot be read (truncated).")

    with pytest.raises(DataError, match=r"a\.png"):
        embed(timm_encoder, Broken())


def test_encoders_that_cannot_be_had_are_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec, error, told in (
        ("timm:resnet17", UsageError, "Did you mean .*resnet18"),
        ("resnet18", UsageError, "'resnet18' names no encoder; write timm:NAME"),
        ("torchvision:resnet18", UsageError, "names no encoder"),
        (NAME, ModelError, "resnet10t cannot be had .*penultimate"),
    ):
        with pytest.raises(error, match=told) as caught:
            load_encoder(spec)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="pip install timm"):
        load_encoder(NAME)


def test_encoders_have_names(timm_encoder):
    assert name_of_encoder(timm_encoder) == NAME
    assert name_of_encoder(Penultimate(nn.Identity())) == "the network's own penultimate layer"
    assert name_of_encoder(mean_colour) == "mean_colour"
    assert name_of_encoder(nn.Flatten()) == "Flatten"
