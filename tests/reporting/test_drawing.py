"""Pictures of tensors: what is drawn of images of many bands, signals, clips and volumes."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset

import unbraid
from unbraid.base.errors import UsageError
from unbraid.reporting.drawing import as_drawn, bands_of, tell_bands, to_picture


def pixels(image, bands=None):
    return np.asarray(to_picture(image, bands)).astype(int)


def test_bands_are_those_that_are_chosen_else_the_mean():
    image = torch.zeros(5, 8, 9)
    for band in range(5):
        image[band, band] = 1 + band
    assert np.array_equal(pixels(image), pixels(image.mean(0)))
    chosen = pixels(image, (4, 0, 2))
    assert chosen.shape == (8, 9, 3)
    assert [int(chosen[row, 0].argmax()) for row in (4, 0, 2)] == [0, 1, 2]
    assert chosen[4, 0, 0] == 255  # on one scale, so that bands can be compared
    assert chosen[0, 0, 1] == 51
    assert np.array_equal(pixels(image, (3,)), pixels(image[3]))
    with pytest.raises(UsageError, match=r"bands are 5, 0, 1, and an image has 5; .* 0 to 4"):
        to_picture(image, (5, 0, 1))


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((6, 10, 12), (12, 10)),
        ((8, 8), (8, 8)),
        ((3, 400), (384, 192)),
        ((12, 5000), (384, 192)),
        ((100,), (384, 192)),
        ((1, 9000), (384, 192)),
        ((64, 300), (300, 64)),  # bands of a spectrogram
        ((1, 7, 10, 12), (40, 22)),
        ((3, 2, 10, 12), (26, 10)),
        ((13, 1, 10, 12), (12, 10)),
    ],
)
def test_to_picture_of_a_shape_is_of_a_size(shape, size):
    assert to_picture(torch.randn(shape)).size == size


def test_slices_lie_evenly_in_order():
    clip = torch.arange(12.0)[None, :, None, None].expand(1, 12, 4, 5)
    sheet = pixels(clip)
    found = [sheet[6 * row, 7 * column] for row in (0, 1) for column in (0, 1, 2)]
    assert found == [round(255 * t / 11) for t in (1, 3, 5, 7, 9, 11)]
    assert sheet[4, 0] == 255  # between them


def test_lines_go_where_the_signal_goes():
    rising = pixels(torch.linspace(-1, 1, 300)[None])
    dark = [int(np.argmin(rising[:, x])) for x in (3, 190, 380)]
    assert dark[0] > dark[1] > dark[2]
    # Of a long one, the spectrogram below is dark where its frequency is: a quarter of the rate.
    tone = torch.cos(torch.arange(8192.0) * torch.pi / 2)
    below = pixels(tone)[96:, 20:-20].mean(1)
    assert abs(int(below.argmin()) - 48) <= 2
    pixels(torch.zeros(1, 4000))
    pixels(torch.full((2, 50), torch.nan))


class Bands(Dataset):
    def __init__(self, bands=None, shape=(5, 7, 6)):
        self.shape = shape
        self.targets = [n % 4 for n in range(16)]
        if bands is not None:
            self.bands = bands

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        pattern = torch.Generator().manual_seed(100 + index % 4)
        image = torch.randn(self.shape, generator=pattern) * 2
        return image + torch.randn(self.shape, generator=generator), index % 4


def test_what_a_data_set_says_of_bands_is_found_through_subsets_and_checked():
    assert bands_of(Subset(Bands([3, 2, 1]), [2, 4]), 1) == (3, 2, 1)
    assert bands_of(Bands(4), 0) == (4,)
    assert bands_of(Bands(), 0) is None
    for bands in ((1, 2), (1, 2, -1), "rgb", (1.0, 2.0, 3.0), (True, 0, 1)):
        with pytest.raises(UsageError, match="give three numbers of bands"):
            bands_of(Bands(bands), 0)
    assert tell_bands(Bands((3, 2, 1)), 0) == "Pictures show bands 3, 2, 1 of 5, from 0."
    assert tell_bands(Bands(4), 0) == "Pictures show band 4 of 5, from 0."
    assert "the mean of 5 bands" in tell_bands(Bands(), 0)
    assert tell_bands(Bands(shape=(3, 7, 6)), 0) == ""
    assert tell_bands(Bands(shape=(5, 700)), 0) == ""


def test_values_lie_where_the_picture_shows_their_place():
    """A map as fine as a volume lights up the very pixels that the picture has of it."""
    volume = torch.rand(1, 9, 5, 4)
    drawn = as_drawn(volume[0], (9, 5, 4))
    picture = pixels(volume)
    inside = drawn > 0
    low, high = volume.min(), volume.max()
    expected = (255 * (drawn - low) / (high - low)).round().numpy()
    assert np.array_equal(picture[inside.numpy()], expected[inside.numpy()])
    assert (picture[~inside.numpy()] == 255).all()
    assert as_drawn(torch.rand(3, 2, 2), (9, 5, 4)).shape == drawn.shape
    assert as_drawn(torch.rand(7), (70,)).shape == (1, 7)
    assert as_drawn(torch.rand(7, 6), (70, 60)).shape == (7, 6)


SHAPES = {"bands": (5, 7, 6), "signal": (5, 60), "clip": (5, 4, 7, 6)}


@pytest.mark.parametrize("kind", SHAPES)
def test_networks_of_any_dimension_go_from_scan_to_report(kind, tmp_path):
    dataset = Bands((3, 2, 1) if kind == "bands" else None, SHAPES[kind])
    conv = {2: torch.nn.Conv1d, 3: torch.nn.Conv2d, 4: torch.nn.Conv3d}[len(SHAPES[kind])]
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        *(conv(5, 6, 3, padding=1), torch.nn.ReLU(), conv(6, 8, 3, padding=1), torch.nn.ReLU()),
        *(torch.nn.Flatten(2), Mean(), torch.nn.Linear(8, 4)),
    ).eval()
    scan = unbraid.scan(network, "2", dataset, tmp_path / "scan")
    found = unbraid.find(scan, channels={0: [[0], [1, 2]], 3: [[1], [3]]})
    split = unbraid.split(scan, found)
    changed = unbraid.apply(network, split)
    result = unbraid.compare_outputs(network, changed, dataset, tolerance=0.0)
    assert result.max_abs_logit_diff == 0
    unbraid.ablate(changed, dataset)
    page = unbraid.report(
        *(tmp_path / "report.html",),
        **{"scan": scan, "found": found, "split": split, "dataset": dataset},
        evaluation=unbraid.evaluate(split, scan),
    ).read_text()
    assert page.count("data:image") >= 16
    assert ("Pictures show bands 3, 2, 1 of 5" in page) == (kind == "bands")
    (one,) = unbraid.explain(changed, Subset(dataset, [0]))
    assert not one.note
    assert one.strongest[0][0].heatmap.shape == dataset[0][0].shape[1:]
    assert one[0].whole.map.shape == dataset[0][0].shape[1:]
    if kind == "bands":
        dataset.bands = (7, 0, 1)
        with pytest.raises(UsageError, match="an image has 5"):
            unbraid.report(
                *(tmp_path / "again.html",),
                **{"scan": scan, "found": found, "split": split, "dataset": dataset},
            )


class Mean(torch.nn.Module):
    def forward(self, x):
        return x.mean(2)
