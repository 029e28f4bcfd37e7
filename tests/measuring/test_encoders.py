"""Image encoders: any callable, timm's networks, a network's own features; what is refused."""

import sys

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from checks import assert_close, assert_untouched, snapshot
from tiny_networks import KINDS, N_CLASSES, PooledFeatures, SyntheticImages, build, stack
from unbraid.base.errors import ModelError, UsageError
from unbraid.images.batches import in_batches
from unbraid.measuring.encoders import Penultimate, load_batches, load_encoder, ready

IMAGES, NAME = SyntheticImages(11), "timm:test_resnet"


def embed(encoder, dataset=IMAGES, batch_size=4):
    """Embeddings of all images, (N, D)."""
    batches = in_batches(range(len(dataset)), batch_size)
    with ready(encoder) as encode:
        return torch.cat([encode(batch) for batch in load_batches(encoder, dataset, batches, 0)])


def assert_embeddings(embeddings, encoder):
    with torch.no_grad():
        assert_close(embeddings, torch.cat([encoder(image[None]) for image in IMAGES.images]))


def mean_colour(images):
    with torch.enable_grad():  # of which nothing may stay
        return images.requires_grad_().mean((2, 3))


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_ready_embeds_every_image_in_order(batch_size):
    found = embed(mean_colour, batch_size=batch_size)
    assert not found.requires_grad
    assert found.dtype == torch.float64
    assert_embeddings(found, mean_colour)
    for wrong in (found.roll(1, 0), found + 1e-7):
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


def test_ready_tells_what_is_no_embedding():
    for wrong, told in (
        (lambda x: mean_colour(x) / (x != x[1]).sum((2, 3)), "NaN or infinite numbers for image 5"),
        (lambda x: mean_colour(x)[:-1], r"gives \(3, 3\) for 4 images"),
        (lambda x: mean_colour(x)[:, :2], r"gives \(4, 2\) for 4 images from image 4 on"),
        (lambda x: mean_colour(x).long(), "not a tensor of floating point numbers"),
        (lambda x: 1 / 0, r"shape \(3, 7, 6\) \(division by zero\)"),
    ):
        network = nn.Dropout(0.5)  # gives something wrong from the second batch on
        answers = iter([mean_colour, wrong])
        network.forward = lambda images, answers=answers: next(answers)(images)
        with pytest.raises(ModelError, match=told):
            embed(network)
        assert network.training


class OnlyLogits(nn.Module):
    """Logits of a head that may be a convolution, called before a branch that nobody uses."""

    def __init__(self, behind, head=None):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), head or nn.Linear(6, N_CLASSES)
        self.other, self.behind = nn.Linear(6, N_CLASSES), behind
        self.double().eval()

    def features(self, x):
        return self.stem(x).relu().mean((2, 3))

    def forward(self, x):
        pooled = self.features(x)
        conv = isinstance(self.head, nn.Conv2d)
        logits = self.head(pooled[..., None, None] if conv else pooled)
        self.other(pooled * 2)
        pooled.zero_()  # in place, after the head
        return self.behind(logits.flatten(1))


def take_away(z):
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


def test_penultimate_of_no_classifier_is_told_and_of_two_is_before_the_last():
    network = OnlyLogits(lambda z: 2 * z).train()
    before = snapshot(network)
    with pytest.raises(ModelError, match="no penultimate layer"):
        embed(Penultimate(network))
    assert_untouched(before, snapshot(network))
    same = nn.Linear(N_CLASSES, N_CLASSES, bias=False)
    same.weight.data = torch.eye(N_CLASSES)
    parts = {"pool": PooledFeatures(), "first": nn.Linear(3, N_CLASSES), "last": same}
    network = stack(*parts.items()).double()
    assert_embeddings(embed(Penultimate(network)), network)


@pytest.fixture(scope="module")
def timm_encoder():
    torch.manual_seed(0)
    return load_encoder(NAME, pretrained=False, device="cpu")


def test_timm_encoder_puts_pictures_through_its_own_preprocessing(timm_encoder):
    photographs = SyntheticImages(3)  # whose tensors show something else
    photographs.picture = lambda n: Image.linear_gradient("L").rotate(90 * n).convert("RGBA")
    pictures = [photographs.picture(n).convert("RGB") for n in range(3)]
    with torch.no_grad():
        expected = timm_encoder.network(torch.stack(list(map(timm_encoder.transform, pictures))))
    assert_close(embed(timm_encoder, photographs), expected, 1e-5)
    subset = Subset(Subset(photographs, [2, 0, 1]), [1, 2])
    assert_close(embed(timm_encoder, subset, batch_size=1), expected[:2], 1e-4)
    own = PooledFeatures()
    own.transform = None  # which does not make it one of timm's: it gets the images
    assert_close(embed(own, photographs), mean_colour(photographs.images))


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
