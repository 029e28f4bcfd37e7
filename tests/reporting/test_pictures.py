"""The report's pictures: which images, what is laid over them, and that the file stays small."""

import base64
import io
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

import unbraid
from pages import BROKEN, Blobs, assert_harmless, notes, read, sections, shots
from unbraid.networks.models import imagenet_transform
from unbraid.reporting import pictures
from unbraid.reporting.pictures import Sight, Spot
from unbraid.visualizing.features import Feature, Features


def image_in(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split("base64,")[1])))


@pytest.mark.parametrize(("shape", "mode"), [((3, 9, 7), "RGB"), ((9, 7), "L"), ((5, 9, 7), "L")])
def test_to_picture_of_any_shape_has_full_range(shape, mode):
    picture = pictures.to_picture(torch.randn(shape) * 100)
    assert (picture.size, picture.mode) == ((7, 9), mode)
    assert picture.convert("L").getextrema()[1] > 0


def test_encode_keeps_tiny_pictures_and_veil_hides_what_does_not_count():
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    tiny = pictures.encode(Image.fromarray(pixels), 96, 40)
    large = pictures.encode(Image.new("RGB", (640, 480), (9, 0, 0)), 96, 75)
    assert (tiny.small, large.small) == (True, False)
    assert np.array_equal(np.asarray(image_in(tiny.uri)), pixels)
    assert image_in(large.uri).size == (96, 72)
    shade = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]])
    *colours, opacity = np.moveaxis(np.asarray(image_in(pictures.veil(shade))).astype(float), 2, 0)
    np.testing.assert_allclose(opacity / 255, 0.72 - 0.44 * shade.numpy(), atol=0.003)
    for band, cold, warm in zip(colours, (38, 44, 92), (255, 170, 0), strict=True):
        np.testing.assert_allclose(band, cold + (warm - cold) * shade.numpy(), atol=0.51)
    assert len(pictures.veil(torch.rand(200, 300))) < 2500


TENSOR, FLOAT = v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)
NORMAL = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
TIMM = {**NORMAL, "input_size": (3, 40, 40), "crop_pct": 0.8, "interpolation": "bilinear"}
DECLARED = {
    "a wide part": v2.Compose([TENSOR, v2.Resize(100), v2.CenterCrop((60, 90)), FLOAT]),
    "squeezed": v2.Compose([TENSOR, v2.Resize((48, 96)), v2.CenterCrop((48, 96)), FLOAT]),
    "as it is": v2.Compose([TENSOR, FLOAT]),
    "torchvision's": ImageClassification(crop_size=40, resize_size=50, **NORMAL),
    "timm's": timm.data.create_transform(**TIMM),
}
UNKNOWN = {
    "random": v2.Compose([TENSOR, v2.RandomResizedCrop(64)]),
    "cut twice": v2.Compose([v2.CenterCrop(90), TENSOR, v2.Resize(64), v2.CenterCrop(40)]),
    "of one's own": lambda picture: picture.crop((0, 0, 100, 100)),
}


@pytest.mark.parametrize("name", [*DECLARED, *UNKNOWN])
@pytest.mark.parametrize("size", [(320, 200), (210, 300)])
def test_declared_sight_is_what_the_transform_shows(name, size):
    sight = pictures.declared_sight((DECLARED | UNKNOWN)[name])
    assert (sight is None) == (name in UNKNOWN)
    if sight is None:
        return
    x, y = np.meshgrid(*((np.arange(n) + 0.5) / n for n in size))  # pixels tell where they are
    picture = Image.fromarray((255 * np.stack([x, y, 0 * x], 2)).round().astype(np.uint8))
    values = DECLARED[name](picture).movedim(0, -1).numpy()
    height, width = values.shape[:2]
    seen = sight(picture)
    assert seen.width / seen.height == pytest.approx(width / height, rel=0.03)
    mine = np.asarray(seen.resize((width, height)), dtype=np.float64) / 255
    assert np.abs(values - mine)[2:-2, 2:-2].max() < 0.03


class Photographs(Blobs):
    """Pictures that do not compress well, and what a transform makes of them."""

    def __init__(self, n, transform=None):
        super().__init__(n, 0)
        coarse = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        self.x = F.interpolate(coarse, (128, 160), mode="bilinear")
        self.transform = transform

    def __getitem__(self, index):
        transform = self.transform if callable(self.transform) else v2.Resize((8, 8))
        return transform(v2.functional.to_image(self.picture(index))), self.targets[index]

    def picture(self, index):
        return Image.fromarray((255 * self.x[index]).byte().movedim(0, -1).numpy())


def test_pictures_are_from_before_the_transform_and_cut_as_it_says():
    made = Photographs(5)
    assert pictures.open_picture(Subset(made, [3, 4]), 1).tobytes() == made.picture(4).tobytes()
    assert pictures.open_picture(Subset(Blobs(20, 0), [3, 4]), 1).size == (8, 8)
    known = Sight(0.875, 0.875, 1.0)
    both = [Photographs(2, imagenet_transform()), Photographs(2, v2.Resize(9))]
    for dataset, sight in (
        (Blobs(8, 0), Sight()),  # what is shown is what the network is given
        (Photographs(2), None),
        (Subset(Photographs(2, known), [1]), known),
        (both[0], known),
        (ConcatDataset(both), None),
    ):
        assert pictures.sight_of(dataset) == sight


def test_find_where_is_the_layers_own_output_image_by_image(run):
    layer, parts = run.network[2], run.split.channels
    rows = {(part.channel, k): row for part in parts for k, row in enumerate(part.rows)}
    rows |= {(part.channel, None): part.weight for part in parts}
    spots = {Spot(*key, index) for key in rows for index in (0, 17, 149)}
    known = pictures.find_where(run.scan, parts, spots)
    assert set(known) == spots
    for spot, where in known.items():
        x = run.network[:2](run.images.x[[spot.image]]).detach().double().requires_grad_()
        kernel = rows[spot.channel, spot.concept].double().view(1, *layer.weight.shape[1:])
        z = F.conv2d(x, kernel, None, stride=2, padding=1)
        (gradient,) = torch.autograd.grad(z.sum(), x)
        source = (x * gradient).sum(1)[0].detach()
        assert float(source.sum()) == pytest.approx(z.sum().item(), rel=1e-9)
        response = z[0, 0].detach() + run.split[spot.channel].bias
        for mine, values in zip(where, (response, source), strict=True):
            expected = values.clamp(min=0) / values.max().clamp(min=1e-30)
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert pictures.find_where(run.scan, parts, {Spot(parts[0].channel, None, BROKEN)}) == {}
    assert pictures.find_where(run.train_scan, parts, spots) == {}  # without positions


def test_find_where_of_a_layer_without_kernel_has_no_map_of_its_input(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    scan = unbraid.scan(network, "0", Subset(Blobs(12, 0), range(5)), tmp_path, positions=True)
    found = unbraid.find(scan, channels={0: [[0], [1]]})
    split = unbraid.split(scan, found, method="published", rho=0.5)
    (where,) = pictures.find_where(scan, split.channels, {Spot(0, 0, 1)}).values()
    assert where.source is None


def test_visualisations_stand_at_the_head_of_their_rows(run, write):
    *parts, last = run.split.channels
    made = []
    for part in parts:
        excites = (100.0, 9.0, 6.0, 3.0, 0.0)[: 1 + len(part.concepts)]
        for k in (None, *range(len(part.concepts))):
            picture = Image.new("RGBA", (64, 64), (part.channel, 40 * (k or 0), 200, 128))
            made += [Feature(part.channel, k, place, picture, excites) for place in (0, 1)]
    page = write(features=Features("2", "any", tuple(made), {}, 1))
    assert "Feature visualisations of 1 channel are left out" in notes(page)
    assert not sections(page)[last.channel].all("figure", "feature")
    for part in parts:
        figures = sections(page)[part.channel].all("figure", "feature")
        for k, figure in zip((0, *range(len(part.concepts))), figures, strict=True):
            shown = image_in(figure.all("img")[0].attributes["src"]).convert("RGBA")
            colour = (part.channel, 40 * k, 200, 128)
            assert shown.getpixel((20, 20)) == pytest.approx(colour, abs=7)
            told = " ".join(("A 9", "B 6", "C 3", "D 0")[: len(part.concepts)])
            assert figure.all("span", "excites")[0].text == told


def test_veils_lie_over_their_pictures(run, page, write, tmp_path):
    part = run.split.channels[0]
    rows = sections(page)[part.channel].all("ol", "shots")
    for k, row in zip((None, *range(len(part.concepts))), rows, strict=True):
        for frame in row.all("span", "frame"):
            index = int(re.findall(r"\d+", frame.all("img")[0].attributes["alt"])[-1])
            spot = Spot(part.channel, k, index)
            veils = [*map(pictures.veil, pictures.find_where(run.scan, [part], {spot})[spot])]
            assert [image.attributes["src"] for image in frame.all("img")[1:]] == veils
    bare = unbraid.scan(run.network, "2", run.images, tmp_path / "bare", skip_broken=True)
    without = write(scan=bare)
    assert not read(without).all("img", "veil")
    assert "Where channels answer is left out: no scan" in notes(without)
    again = write(scan=bare, maps=run.scan)
    assert len(read(again).all("img", "veil")) == len(read(page).all("img", "veil")) > 0


def test_a_hundred_channels_fit_and_veils_need_a_transform_that_says_how_it_cuts(tmp_path):
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(nn.Conv2d(3, 100, 3, padding=1), nn.ReLU(), *pool, nn.Linear(100, 4))
    images = Photographs(240, lambda picture: FLOAT(v2.functional.resize(picture, [16, 16])))
    scan = unbraid.scan(network, "0", images, tmp_path / "scan", positions=True)
    found = unbraid.find(scan, channels={o: [[0, 1], [2, 3]] for o in range(100)})
    split = unbraid.split(scan, found, method="published", rho=0.5)
    all_of_it = {"scan": scan, "train_scan": scan, "found": found, "split": split}
    all_of_it |= {"evaluation": unbraid.evaluate(split, scan), "dataset": images}
    page = unbraid.report(tmp_path / "r.html", **all_of_it).read_text("utf-8")
    assert len(page.encode()) <= 10_000_000
    assert_harmless(page)
    assert len(sections(page)) == 100
    rows = [shots(row) for row in read(page).all("ol", "shots")]
    assert {len(row) for row in rows} == {8}
    assert {image_in(image.attributes["src"]).size for image in rows[0]} == {(56, 45)}
    assert not read(page).all("img", "veil")
    assert "does not say which part" in notes(page)
