"""Crops show what lies around a place, of the image that it lies in."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, UsageError
from unbraid.reporting import figures
from unbraid.reporting.crops import Crops, crop_box
from unbraid.reporting.pictures import read_pictures
from unbraid.reporting.view import _tell_tokens

SIDE = 60


class Pictures(SyntheticImages):
    """Images with pictures: red tells the row, green the column, blue the image."""

    def __init__(self, n_images=12):
        super().__init__(n_images)
        self.ids = [f"{n}.png" for n in range(n_images)]

    def picture(self, index):
        place = np.arange(SIDE, dtype=np.uint8)
        bands = [place[:, None] + 0 * place, place + 0 * place[:, None]]
        blue = np.full((SIDE, SIDE), index, dtype=np.uint8)
        return Image.fromarray(np.stack([*bands, blue], 2))


def assert_shows(crop, image, row, column, rows, columns):
    """The middle of a place lies in its crop, and the crop is of its image."""
    red, green, blue = np.asarray(crop).transpose(2, 0, 1)
    assert set(np.unique(blue)) == {image}
    for band, place, n in ((red, row, rows), (green, column, columns)):
        assert band.min() <= (place + 0.5) / n * SIDE <= band.max()
        width = int(band.max()) - int(band.min()) + 1
        assert abs(width - max(3 / n, 0.25) * SIDE) <= 1  # rounded at both ends


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    dataset = Pictures()
    scan = unbraid.scan(build("1x1"), "layer", dataset, tmp_path_factory.mktemp("s"), places=4)
    return dataset, scan.places


def test_a_crop_is_around_its_place(made):
    dataset, scan = made
    crops = Crops(dataset, scan)
    crops._sight = lambda picture: picture  # all of it is seen
    (records,) = scan.shards()
    assert len(crops) == len(records) > 20
    names = ("image", "position", "rows", "columns")
    for n, (image, position, rows, columns) in enumerate(
        zip(*(getattr(records, name).tolist() for name in names), strict=True)
    ):
        at = (image, position // columns, position % columns, rows, columns)
        assert_shows(crops.picture(n), *at)
        assert crops[n][1] == dataset.targets[image]
        assert crops.ids[n] == f"{image}.png @ {at[1]},{at[2]}"
        far = (image, (at[1] + rows // 2) % rows, (at[2] + 3) % columns, rows, columns)
        for other in (far, ((image + 1) % 12, *at[1:])):
            with pytest.raises(AssertionError):
                assert_shows(crops.picture(n), *other)


def test_crops_follow_ids_where_the_order_changed(made):
    dataset, scan = made
    (records,) = scan.shards()
    order = list(reversed(range(12)))
    turned = torch.utils.data.Subset(dataset, order)
    crops = Crops(turned, scan)
    assert [order[n] for n in crops.images] == records.image.tolist()
    with pytest.raises(UsageError, match="fewer images than were scanned"):
        Crops(SyntheticImages(3), scan)


def test_a_crop_of_an_image_that_is_gone_is_unreadable(made):
    dataset, scan = made
    (records,) = scan.shards()
    left = torch.utils.data.Subset(dataset, [n for n in range(12) if n != 3])
    crops = Crops(left, scan)
    gone = records.image == 3
    for n in range(len(crops)):
        if gone[n]:
            for read in (crops.picture, crops.source, crops.__getitem__):
                with pytest.raises(DataError, match=r"^Image 3\.png is gone; bring it back"):
                    read(n)
        else:
            assert left.indices[crops.source(n)] == records.image[n]
    one, other = int(gone.nonzero()[0]), int((~gone).nonzero()[0])
    labels = {n: crops.targets[n] for n in (one, other)}
    taken = read_pictures(crops, labels, lambda picture: picture)
    assert [taken[n] is None for n in (one, other)] == [True, False]


def test_crops_go_by_the_order_where_no_id_is_known(made):
    _, scan = made
    (records,) = scan.shards()
    renamed = Pictures()
    renamed.ids = [f"new/{n}.png" for n in range(12)]
    assert Crops(renamed, scan).images == records.image.tolist()


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_a_crop_lies_within_its_picture(n):
    for position in range(n * n):
        left, top, right, bottom = crop_box(position, n, n)
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1 + 1e-9


def test_figures_of_places_show_the_images_that_they_lie_in(made):
    dataset, scan = made
    channel, (records,) = 0, scan.shards()
    kept = [n for n in range(len(records)) if bool(records.kept_of(channel)[n])]
    groups = [[records.index[n].item() for n in own] for own in (kept[:2], kept[2:])]
    found = unbraid.find(scan, images={channel: groups})
    split = unbraid.split(scan, found)
    graph = unbraid.circuit_graph(
        [unbraid.circuit(split, scan, channel=channel, concept=0)], [(split, scan)]
    )
    shown = [image for node in graph.nodes for image in node.images]
    assert len(shown) > 3
    for image in shown:
        assert image.image.startswith(f"{image.index}.png @ ")
    tiles = figures._read_tiles(split, split.channels[0], scan, dataset, 2)
    blues = {int(np.asarray(picture)[..., 2].max()) for row in tiles for _, picture in row}
    assert blues <= set(records.image.tolist())
    with pytest.raises(UsageError, match="whole images"):
        unbraid.measure_semantics(split, scan, dataset, lambda batch: batch.flatten(1))


def test_a_page_tells_of_channels_that_live_on_tokens_before_the_image():
    peaks = torch.tensor([[0, 0], [3, 1], [0, 2]])
    scan = SimpleNamespace(peaks=peaks)
    (told,) = _tell_tokens(SimpleNamespace(scan=scan, concepts={0: (), 1: (), 2: ()}))
    assert "of 2 channels, most of all 1 (in 4 images), 2 (in 2 images);" in told
    assert _tell_tokens(SimpleNamespace(scan=scan, concepts={0: ()})) == []
