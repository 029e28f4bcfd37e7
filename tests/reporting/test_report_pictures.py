"""The report's pictures: which images, what is laid over them, and that the file stays small."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_report import BROKEN, Blobs, Run, assert_harmless, read, run, sections, shots  # noqa: F401
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from unbraid.base.errors import UsageError
from unbraid.reporting import report as page_module
from unbraid.reporting.pictures import Album, Look, Spot, Where, encode, find_where, veil
from unbraid.visualizing.features import Feature, Features

# --- where a channel answers, and where its input comes from --------------------------------------


def assert_where(known: dict[Spot, Where], run: Run) -> None:  # noqa: F811
    """Every map is the layer's own output, and its input times the gradient, image by image."""
    layer = run.network[2]
    for spot, where in known.items():
        part = run.split[spot.channel]
        row = part.weight if spot.concept is None else part.rows[spot.concept]
        x = run.network[:2](run.images.x[[spot.index]]).detach().double().requires_grad_()
        kernel = row.double().view(1, *layer.weight.shape[1:])
        z = F.conv2d(x, kernel, None, stride=2, padding=1)
        (gradient,) = torch.autograd.grad(z.sum(), x)
        source = (x * gradient).sum(1)[0].detach()
        assert float(source.sum()) == pytest.approx(float(z.detach().sum()), rel=1e-9)
        expected = (z[0, 0].detach() + part.bias).clamp(min=0), source.clamp(min=0)
        assert where.source is not None
        for mine, theirs in zip((where.answer, where.source), expected, strict=True):
            scale = theirs.max() if theirs.max() > 0 else 1.0
            torch.testing.assert_close(mine, theirs / scale, rtol=1e-4, atol=1e-5)


def spots_of(run: Run) -> set[Spot]:  # noqa: F811
    return {
        Spot(part.channel, k, index)
        for part in run.split.channels
        for k in (None, *range(len(part.concepts)))
        for index in (0, 17, 149)
    }


def test_where_is_the_layers_own_answer(run: Run) -> None:  # noqa: F811
    known = find_where(run.scan, run.split.channels, spots_of(run))
    assert set(known) == spots_of(run)
    assert_where(known, run)


def test_the_checker_sees_another_images_map(run: Run) -> None:  # noqa: F811
    known = find_where(run.scan, run.split.channels, spots_of(run))
    first, second = (Spot(run.split.channels[0].channel, None, index) for index in (17, 149))
    with pytest.raises(AssertionError):
        assert_where({first: known[second]}, run)


def test_of_unknown_images_and_without_positions_nothing_is_known(run: Run) -> None:  # noqa: F811
    unknown = {Spot(run.split.channels[0].channel, None, BROKEN), Spot(10_000, None, 0)}
    assert find_where(run.scan, run.split.channels, unknown) == {}
    assert find_where(run.train_scan, run.split.channels, spots_of(run)) == {}


def test_a_pointwise_layer_has_no_map_of_its_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4))
    scan = unbraid.scan(network, "0", Subset(Blobs(12, 0), range(5)), tmp_path, positions=True)
    found = unbraid.find(scan, channels={0: [[0], [1]]})
    split = unbraid.split(scan, found, method="published", rho=0.5)
    (where,) = find_where(scan, split.channels, {Spot(0, 0, 1)}).values()
    assert where.source is None


def test_a_veil_hides_what_does_not_count() -> None:
    shade = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.25]])
    uri = veil(shade)
    image = Image.open(io.BytesIO(base64.b64decode(uri.split("base64,")[1])))
    opacity = np.asarray(image)[:, :, 1] / 255
    assert image.size == (3, 2)
    np.testing.assert_allclose(opacity, 0.72 * (1 - shade.numpy()), atol=0.003)
    assert len(veil(torch.rand(200, 300))) < 2500


# --- the page -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(run: Run) -> Features:  # noqa: F811
    """Of all channels but the last."""
    made = []
    for part in run.split.channels[:-1]:
        for k in (None, *range(len(part.concepts))):
            colour = (part.channel, 40 * (k or 0), 200, 128)
            picture = Image.new("RGBA", (64, 64), colour)
            made.append(Feature(part.channel, k, 0, picture, (0.0,) * (1 + len(part.concepts))))
    return Features("2", "any", tuple(made), {}, left_out=1)


def test_visualisations_stand_at_the_head_of_their_rows(
    run: Run,  # noqa: F811
    features: Features,
    tmp_path: Path,
) -> None:
    page = run.report(tmp_path / "r.html", features=features)
    assert_harmless(page)
    assert "Feature visualisations of 1 channel are left out" in read(page).all("aside")[0].text
    parts = sections(page)
    for part in run.split.channels:
        images = [
            f.all("img")[0] for f in parts[f"channel-{part.channel}"].all("figure", "feature")
        ]
        if part is run.split.channels[-1]:
            assert not images
            continue
        assert len(images) == 1 + len(part.concepts)
        for k, image in enumerate(images):
            data = base64.b64decode(image.attributes["src"].split("base64,")[1])
            pixel = Image.open(io.BytesIO(data)).convert("RGBA").getpixel((20, 20))
            assert isinstance(pixel, tuple)
            expected = (part.channel, 40 * max(0, k - 1), 200, 128)
            assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) < 8
            assert image.attributes["alt"].startswith("made to excite")


def test_veils_lie_over_their_pictures(run: Run, tmp_path: Path) -> None:  # noqa: F811
    page = run.report(tmp_path / "r.html")
    part = run.split.channels[0]
    rows = sections(page)[f"channel-{part.channel}"].all("ol", "shots")
    for k, row in zip((None, *range(len(part.concepts))), rows, strict=True):
        for frame in row.all("span", "frame"):
            index = int(re.findall(r"\d+", frame.all("img")[0].attributes["alt"])[-1])
            spot = Spot(part.channel, k, index)
            where = find_where(run.scan, [part], {spot})[spot]
            assert where.source is not None
            assert [image.attributes["src"] for image in frame.all("img")[1:]] == [
                veil(where.answer),
                veil(where.source),
            ]
    without = run.report(tmp_path / "w.html", scan=unpositioned(run, tmp_path))
    assert not read(without).all("img", "veil")
    assert "Where channels answer is left out" in read(without).all("aside")[0].text
    again = run.report(tmp_path / "m.html", scan=unpositioned(run, tmp_path), maps=run.scan)
    assert len(read(again).all("img", "veil")) == len(read(page).all("img", "veil")) > 0


def unpositioned(run: Run, folder: Path) -> unbraid.Scan:  # noqa: F811
    return unbraid.scan(run.network, "2", run.images, folder / "bare", skip_broken=True)


def test_strange_maps_and_visualisations_are_refused(
    run: Run,  # noqa: F811
    features: Features,
    tmp_path: Path,
) -> None:
    other_data = replace(run.scan, manifest=replace(run.scan.manifest, data="other"))
    for changed in (
        {"maps": run.train_scan},  # without positions
        {"maps": other_data},
        {"features": replace(features, layer="another")},
    ):
        with pytest.raises(UsageError):
            run.report(tmp_path / "r.html", **changed)


# --- size -----------------------------------------------------------------------------------------


class Photographs(Dataset[tuple[Tensor, int]]):
    """Pictures that do not compress well."""

    classes = tuple(f"class {n}" for n in range(4))

    def __init__(self, n: int) -> None:
        coarse = torch.rand(n, 3, 24, 24, generator=torch.Generator().manual_seed(0))
        self.x = F.interpolate(coarse, (128, 128), mode="bilinear")
        self.targets = [n % 4 for n in range(n)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return F.avg_pool2d(self.x[index], 8) - 0.5, self.targets[index]

    def picture(self, index: int) -> Image.Image:
        pixels = (255 * self.x[index]).byte().movedim(0, -1).numpy()
        return Image.fromarray(pixels)

    @staticmethod
    def transform(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0).float() / 255
        return F.avg_pool2d(F.interpolate(pixels[None], (128, 128), mode="area"), 8)[0] - 0.5


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A report's arguments, with 100 split channels."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 100, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(100, 4),
    )
    images = Photographs(240)
    folder = tmp_path_factory.mktemp("many")
    scan = unbraid.scan(network, "0", images, folder / "s", positions=True)
    found = unbraid.find(scan, channels={o: [[0, 1], [2, 3]] for o in range(100)})
    split = unbraid.split(scan, found, method="published", rho=0.5)
    made = tuple(
        Feature(o, k, 0, images.picture(o).convert("RGBA"), (0.0,) * 3)
        for o in range(100)
        for k in (None, 0, 1)
    )
    return {
        "scan": scan,
        "found": found,
        "split": split,
        "evaluation": unbraid.evaluate(split, scan),
        "train_scan": scan,
        "dataset": images,
        "features": Features("0", "any", made),
    }


def test_a_hundred_channels_fit_into_ten_megabytes(many: dict[str, Any], tmp_path: Path) -> None:
    file = unbraid.report(tmp_path / "r.html", **many)
    assert file.stat().st_size <= 10_000_000
    page = file.read_text(encoding="utf-8")
    assert_harmless(page)
    assert len(sections(page)) == 100
    shown = {len(row.all("li")) for row in read(page).all("ol", "shots")}
    left_out = "pictures are small too" in read(page).all("aside")[0].text
    assert left_out == (shown != {8})
    assert all(len(shots(row)) == len(row.all("li")) for row in read(page).all("ol", "shots"))


def test_what_does_not_fit_is_left_out_and_said(
    many: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "LIMIT", 2_000_000)
    monkeypatch.setattr(page_module, "LOOKS", page_module.LOOKS[::4])  # most and least room
    file = unbraid.report(tmp_path / "r.html", **many)
    assert file.stat().st_size <= 2_000_000
    page = file.read_text(encoding="utf-8")
    assert_harmless(page)
    n = len(sections(page))
    assert 1 <= n < 100
    notes = read(page).all("aside")[0].text
    assert f"only the {n} channels with the lowest cosines of 100 are shown in full" in notes
    assert "3 reference images of each channel are shown in place of 8" in notes
    assert len(read(page).all("table", "overview")[0].all("tr")) == 101
    assert {len(row.all("li")) for row in read(page).all("ol", "shots")} == {3}


def test_a_picture_that_cannot_be_read_is_none() -> None:
    album = Album(Blobs(20, 0), [BROKEN, 6], side=96)
    made = album.pictures(Look(8, 96, 75))
    assert made[BROKEN] is None
    assert made[6] is not None
    assert made[6].small


def test_tiny_pictures_keep_every_pixel() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    made = encode(Image.fromarray(pixels), 96, 40)
    back = Image.open(io.BytesIO(base64.b64decode(made.uri.split("base64,")[1])))
    assert np.array_equal(np.asarray(back), pixels)
