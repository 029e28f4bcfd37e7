"""The parts of feature visualisation: pixels, canvas, pictures on disk, a run's step."""

from __future__ import annotations

import cmath
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_apply import Pair, Splits
from torch import Tensor
from torch.utils.data import Dataset

from checks import assert_close
from tiny_networks import SyntheticImages
from unbraid.base import schema as strict
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.running import run as step
from unbraid.visualizing import features
from unbraid.visualizing import visualize as making
from unbraid.visualizing.canvas import Canvas, Pixels, blank_canvas, pixels_of, shake
from unbraid.visualizing.features import Feature, Features

SIZES = [(6, 5), (5, 6), (4, 4), (7, 3)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    return Pair("3x3", Splits(tmp_path_factory.mktemp)("3x3"))


# --- pixels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n_colours", [1, 3])
def test_pixels_are_what_loops_say(size, n_colours):
    dataset = SyntheticImages(9, size=(n_colours, *size))
    found = pixels_of(dataset)
    values = [[dataset.images[:, c].min(), dataset.images[:, c].max()] for c in range(n_colours)]
    assert_close(found.low, torch.tensor([v[0] for v in values]), tolerance=1e-6)
    assert_close(found.high, torch.tensor([v[1] for v in values]), tolerance=1e-6)
    scaled = torch.stack(
        [(dataset.images[:, c] - low) / (high - low) for c, (low, high) in enumerate(values)], 1
    )
    assert found.size == size
    assert_close(found.mean, scaled.mean((0, 2, 3)), tolerance=1e-6)
    covariance = np.cov(scaled.movedim(1, 0).flatten(1).numpy()).reshape(n_colours, n_colours)
    square = found.colours @ found.colours.T
    assert_close(square, torch.from_numpy(covariance), tolerance=1e-6)
    uncorrelated = torch.linalg.inv(found.colours.double())
    for c in range(n_colours):
        expected = np.zeros((size[0], size[1] // 2 + 1))
        for image in scaled:
            plain = sum(
                uncorrelated[c, d] * (image[d] - found.mean[d].double()) for d in range(n_colours)
            )
            expected += np.abs(np.fft.rfft2(plain.numpy(), norm="ortho")) / len(scaled)
        assert_close(found.magnitude[c], torch.from_numpy(expected), tolerance=1e-5)


def test_pixels_of_another_size():
    assert pixels_of(SyntheticImages(4), (9, 8)).magnitude.shape == (3, 9, 5)
    with pytest.raises(UsageError, match="size is"):
        pixels_of(SyntheticImages(4), (9, 1))


def test_grey_pictures_stored_in_three_colours_have_pixels():
    dataset = SyntheticImages(6)
    dataset.images[:, 1:] = dataset.images[:, :1]
    found = pixels_of(dataset)
    assert bool(found.magnitude.isfinite().all())
    assert bool(found.colours.isfinite().all())


class Holes(Dataset[tuple[Tensor, int]]):
    """A data set of which only some images can be read."""

    def __init__(self, good: set[int]) -> None:
        self.inner, self.good = SyntheticImages(6), good

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index not in self.good:
            raise OSError("damaged")
        return self.inner[index]


def test_broken_images_are_left_out():
    found = pixels_of(Holes({1, 4}))
    assert_close(found.low, SyntheticImages(6).images[[1, 4]].amin((0, 2, 3)), tolerance=1e-6)
    with pytest.raises(DataError, match="None of 6 images"):
        pixels_of(Holes(set()))


def test_images_of_several_sizes_or_with_nan_are_told():
    class Sizes(SyntheticImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(3, 5 + index, 5), 0

    with pytest.raises(DataError, match="bring all to one size"):
        pixels_of(Sizes(4))
    dataset = SyntheticImages(4)
    dataset.images[2, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="NaN"):
        pixels_of(dataset)


# --- canvas ---------------------------------------------------------------------------------------


def inverse_transform(spectrum: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A real image from half of its spectrum, (H, W // 2 + 1), by the definition."""
    height, width = size
    image = np.zeros(size)
    for y in range(height):
        for x in range(width):
            total = 0j
            for v in range(height):
                for u in range(width):
                    half = u < width // 2 + 1
                    value = spectrum[v, u] if half else np.conj(spectrum[-v % height, width - u])
                    total += value * cmath.exp(2j * math.pi * (v * y / height + u * x / width))
            image[y, x] = total.real / math.sqrt(height * width)
    return image


@pytest.mark.parametrize("size", SIZES)
def test_a_free_canvas_is_a_sum_of_waves(size):
    pixels = pixels_of(SyntheticImages(9, size=(3, *size)))
    canvas = blank_canvas(pixels, [4], fixed_spectrum=False)
    height, width = size
    numbers = torch.view_as_complex(canvas.numbers.detach().double())[0].numpy()
    amplitude = np.zeros((height, width // 2 + 1))
    for v in range(height):
        for u in range(width // 2 + 1):
            frequency = math.hypot(min(v, height - v) / height, u / width)
            amplitude[v, u] = max(frequency, 1 / max(size)) ** -1.3
    amplitude /= math.sqrt((amplitude**2).mean())
    painted = np.stack([inverse_transform(numbers[c] * amplitude, size) for c in range(3)])
    colours = pixels.colours.double().numpy()
    colours /= max(math.sqrt((colours[:, c] ** 2).sum()) for c in range(3))
    mixed = np.einsum("cd,dhw->chw", colours, painted)
    expected = 1 / (1 + np.exp(-2 * mixed))
    assert_close(canvas.images()[0].detach(), torch.from_numpy(expected), tolerance=1e-5)


def measured_spectrum(image: Tensor, pixels: Pixels) -> Tensor:
    plain = torch.einsum(
        "dc,chw->dhw", torch.linalg.inv(pixels.colours), image - pixels.mean[:, None, None]
    )
    return torch.fft.rfft2(plain, norm="ortho").abs()


def assert_spectrum(image: Tensor, pixels: Pixels) -> None:
    """Magnitudes are those of the data set, but for one factor and the mean."""
    found, wanted = measured_spectrum(image, pixels), pixels.magnitude.clone()
    found[:, 0, 0] = wanted[:, 0, 0] = 0
    assert_close(found / found.norm(), wanted / wanted.norm(), tolerance=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_a_canvas_of_fixed_spectrum_keeps_it_whatever_the_phases(size):
    whole = pixels_of(SyntheticImages(9, size=(3, *size)))
    # Pale colours around grey, so that nothing is clamped.
    fields = {**vars(whole), "colours": 0.02 * whole.colours, "mean": torch.full((3,), 0.5)}
    pixels = Pixels(**fields)
    canvas = blank_canvas(pixels, [0, 1], fixed_spectrum=True)
    for image in canvas.images().detach():
        assert_spectrum(image, pixels)
    moved = Canvas(canvas.numbers.detach() + torch.randn(canvas.numbers.shape), pixels)
    assert_spectrum(moved.images()[0], pixels)
    with pytest.raises(AssertionError):
        assert_spectrum(torch.rand(3, *size), pixels)


@pytest.mark.parametrize("spectrum", [False, True])
def test_images_stay_in_range(spectrum):
    pixels = pixels_of(SyntheticImages(9))
    canvas = blank_canvas(pixels, [0], spectrum)
    wild = Canvas(100 * torch.randn_like(canvas.numbers), pixels)
    assert bool((wild.images() >= 0).all())
    assert bool((wild.images() <= 1).all())


def test_shaking_moves_all_images_alike_and_is_reproducible():
    one = torch.rand(1, 3, 20, 30)
    both = shake(torch.cat([one, one]), torch.Generator().manual_seed(3))
    assert torch.equal(both[0], both[1])
    assert torch.equal(shake(one, torch.Generator().manual_seed(3))[0], both[0])
    assert not torch.equal(shake(one, torch.Generator().manual_seed(4))[0], both[0])


def test_shaking_turns_without_squeezing():
    """A disc stays a disc, of about its size and near its place, also where sides differ."""
    down, right = torch.meshgrid(torch.arange(60), torch.arange(120), indexing="ij")
    disc = ((down - 30) ** 2 + (right - 60) ** 2 < 15**2).float()[None, None]
    for seed in range(20):
        moved = shake(disc, torch.Generator().manual_seed(seed))[0, 0] > 0.5
        rows, columns = moved.nonzero(as_tuple=True)
        height, width = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert abs(height - width) <= 2
        assert 26 <= height <= 34
        assert abs(float(rows.float().mean()) - 30) <= 7
        assert abs(float(columns.float().mean()) - 60) <= 12


# --- on disk --------------------------------------------------------------------------------------


def some_features() -> Features:
    random = np.random.default_rng(0)

    def picture() -> Image.Image:
        return Image.fromarray(random.integers(0, 256, (7, 6, 4), dtype=np.uint8))

    made = (
        Feature(3, None, 0, picture(), (1.5, 0.5, 1.0)),
        Feature(3, 0, 0, picture(), (0.5, 0.75, -0.25)),
        Feature(3, 0, 1, picture(), (0.25, 0.5, -0.25)),
        Feature(12, 1, 0, picture(), (2.0, 0.0, 2.0)),
    )
    return Features("layer", "abc", made, {"steps": 3}, left_out=2)


def test_features_come_back_from_disk(tmp_path):
    made = some_features()
    made.save(tmp_path / "features")
    files = {path.name for path in (tmp_path / "features").iterdir()}
    assert files == {"3.png", "3.0.png", "3.0_1.png", "12.1.png", "features.json"}
    back = Features.load(tmp_path / "features")
    assert (back.layer, back.weights, back.settings, back.left_out) == (
        "layer",
        "abc",
        {"steps": 3},
        2,
    )
    assert back.channels == (3, 12)
    for a, b in zip(made.features, back.features, strict=True):
        assert (a.channel, a.concept, a.place) == (b.channel, b.concept, b.place)
        assert a.responses == b.responses
        assert (a.picture.mode, a.picture.tobytes()) == ("RGBA", b.picture.tobytes())


def test_pictures_are_found_by_channel_and_concept():
    made = some_features()
    assert made.image(3) is made.features[0].picture
    assert made.image(3, 0) is made.features[1].picture
    assert [f.place for f in made.of(3, 0)] == [0, 1]
    assert made.of(3, 1) == ()
    with pytest.raises(KeyError, match="channel 3, concept 1"):
        made.image(3, 1)
    with pytest.raises(KeyError, match="channel 12"):
        made.image(12)


def damaged(folder: Path, how: str) -> None:
    index = folder / "features.json"
    about = json.loads(index.read_text())
    if how == "no index":
        index.unlink()
    elif how == "half an index":
        index.write_text(index.read_text()[:100])
    elif how == "no object":
        index.write_text("[1]")
    elif how == "another schema":
        index.write_text(json.dumps({**about, "schema": 7}))
    elif how == "no picture":
        (folder / "3.0.png").unlink()
    elif how == "half a picture":
        (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:60])
    elif how == "another format":
        Image.new("RGB", (3, 3)).save(folder / "3.png", "JPEG")
    elif how == "huge":
        Image.new("L", (5000, 1)).save(folder / "3.png")
    else:
        about["features"][0] |= how
        index.write_text(json.dumps(about))


@pytest.mark.parametrize(
    "how",
    [
        *("no index", "half an index", "no object", "another schema", "no picture"),
        *("half a picture", "another format", "huge"),
        *({"channel": "../3"}, {"channel": -1}, {"channel": True}, {"concept": 0.5}),
        *({"place": None}, {"responses": 1.0}, {"responses": ["x"]}),
    ],
    ids=str,
)
def test_damaged_features_are_told(tmp_path, how):
    some_features().save(tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(RunError, match="make them anew"):
        Features.load(tmp_path)


def test_a_picture_that_stands_there_twice_is_told(tmp_path):
    some_features().save(tmp_path)
    index = tmp_path / "features.json"
    about = json.loads(index.read_text())
    index.write_text(json.dumps({**about, "features": 2 * about["features"]}))
    with pytest.raises(RunError, match="stands there twice"):
        Features.load(tmp_path)


def test_more_pixels_than_memory_should_hold_are_told_before_any_is_read(tmp_path, monkeypatch):
    some_features().save(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42)
    Features.load(tmp_path)
    monkeypatch.setattr(features, "MAX_PIXELS", 4 * 42 - 1)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(RunError, match="have 168 pixels"):
        Features.load(tmp_path)


def test_an_index_of_any_size_is_not_read(tmp_path, monkeypatch):
    some_features().save(tmp_path)
    monkeypatch.setattr(strict, "MAX_BYTES", 100)
    with pytest.raises(RunError, match="too large"):
        Features.load(tmp_path)


# --- a step of a run ------------------------------------------------------------------------------


def test_a_run_keeps_its_visualisations_and_makes_them_once(pair, tmp_path):
    said: list[str] = []
    dataset = SyntheticImages(8)
    made = step.visualize_run(pair.changed, "layer", dataset, [3, 0, 1], tmp_path, said.append)
    assert len(said) == 1
    assert [f.channel for f in made.features[::3]] == [3, 0, 1]
    again = step.visualize_run(pair.changed, "layer", dataset, [3, 0, 1], tmp_path, said.append)
    assert len(said) == 1
    assert [f.picture.tobytes() for f in again.features] == [
        f.picture.tobytes() for f in made.features
    ]
    assert step.read_run(tmp_path).weights == made.weights
    assert step.read_run(tmp_path / "elsewhere") is None


def test_visualisations_of_another_split_or_damaged_ones_make_room(pair, tmp_path):
    some_features().save(tmp_path / "features")
    said: list[str] = []
    for _ in range(2):
        made = step.visualize_run(
            pair.changed, "layer", SyntheticImages(8), [0, 1], tmp_path, said.append
        )
        assert made.channels == (0, 1)
        assert not (tmp_path / "features" / "12.1.png").exists()
        (tmp_path / "features" / "1.0.png").unlink()
    assert len(said) == 2


def test_a_run_goes_on_without_visualisations(pair, tmp_path):
    said: list[str] = []
    flat = SyntheticImages(8)
    flat.images[:] = 0.5
    assert step.visualize_run(pair.changed, "layer", flat, [0], tmp_path, said.append) is None
    assert "left out: The data set's images are all of one colour" in said[-1]
    assert not (tmp_path / "features").exists()


def test_a_run_says_which_channels_time_did_not_allow(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(step, "SECONDS", 0.0)
    monkeypatch.setattr(making, "_PIXELS", 3 * 42)  # a channel at once
    said: list[str] = []
    made = step.visualize_run(
        pair.changed, "layer", SyntheticImages(8), [3, 0, 1], tmp_path, said.append
    )
    assert (made.channels, made.left_out) == ((3,), 2)
    assert said[-1] == "Visualised only the 1 channel with the lowest cosines."
    assert step.read_run(tmp_path).left_out == 2
