"""Figures for papers show what the images say, whatever names hold."""

import copy
import io
import itertools
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import gaussian_kde
from torch import Tensor, nn
from torch.utils.data import Subset

import unbraid
from oracle import channel_input_relevance, channel_map, layer_io
from pages import Blobs, make_network
from unbraid import Features, Scan, Split, UnbraidError
from unbraid.base.errors import UsageError
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.reporting.matplotlib_style import COLOURS
from unbraid.visualizing.features import Feature

CONCEPTS = {4: [[0], [1, 2]], 1: [[0, 1], [2], [3]]}
LETTERS = "ABC"


class Images(Blobs):
    """Their pictures are wider than high, and tell their index."""

    classes = ("$x_1$", "<b>&", "\u202edrawkcab\n", "w" * 5000)

    def __init__(self, gone=None):
        super().__init__(52, 1)
        self.x, self.gone, self.broken = self.x.double(), gone, ()

    def picture(self, index):
        if index == self.gone:
            raise RuntimeError("gone")
        values = np.arange(99, dtype=np.uint8)[:, None] + index
        return Image.fromarray(values.repeat(3, 1).reshape(9, 11, 3))


@dataclass
class Run:
    layer: nn.Module
    images: Images
    scan: Scan
    split: Split
    inputs: list[tuple[Tensor, int]]  # of the layer, image by image, with labels

    def of(self, concept):
        return [x for x, label in self.inputs if label in concept]

    def values(self, channel):
        """Pooled pre-activations by row and concept, one image and one position at a time."""
        part = self.split[channel]
        rows = [part.weight, *(mask * part.weight for mask in part.masks)]

        def value(row, x):
            return math.fsum(channel_map(self.layer, channel, row, x).tolist())

        return [[[value(row, x) for x in self.of(own)] for own in part.concepts] for row in rows]

    def relevances(self, channel):
        """Per concept, each input's mean relevance for the original and the concept channel."""
        part, found = self.split[channel], []
        for own, row in zip(part.concepts, part.rows, strict=True):
            changed = copy.deepcopy(self.layer)
            changed.weight.data[channel] = row.view_as(changed.weight[channel])
            both = [
                [channel_input_relevance(layer, x)[channel] for x in self.of(own)]
                for layer in (self.layer, changed)
            ]
            found.append([torch.stack(each).mean(0).tolist() for each in both])
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    network, images = make_network().double(), Images()
    scan = unbraid.scan(network, "2", images, tmp_path_factory.mktemp("run"), min_share=1e-6)
    split = unbraid.split(scan, unbraid.find(scan, tau=1e-5, channels=CONCEPTS))
    inputs = [(layer_io(network, "2", images[n][0])[0], images[n][1]) for n in range(52)]
    return Run(network[2], images, scan, split, inputs)


def draw(run, kind, channel=4, **options):
    return getattr(unbraid, f"{kind}_figure")(run.split, run.scan, channel, **options)


def panels(figure):
    """The axes with densities, from above."""
    return [a for a in figure.axes if any("density" in str(x.get_label()) for x in a.lines)]


def tiles(figure):
    """The axes with pictures, row by row from above, from the left."""
    rows = {}
    for axes in figure.axes:
        if axes not in panels(figure):
            rows.setdefault(-round(axes.get_position().y0, 6), []).append(axes)
    return [sorted(rows[y], key=lambda axes: axes.get_position().x0) for y in sorted(rows)]


def assert_densities(figure, values):
    """Each panel holds each concept's density and mean, and nothing else, on one grid."""
    everything = [v for row in values for concept in row for v in concept]
    for axes, row in zip(panels(figure), values, strict=True):
        drawn = {str(line.get_label()): line for line in axes.lines}
        drawn.pop("zero", None)
        low, high = axes.get_xlim()
        assert (low, high) == panels(figure)[0].get_xlim()
        assert low <= min(everything) < max(everything) <= high
        for name, colour, concept in zip(LETTERS, COLOURS, row, strict=False):
            density, mean = drawn.pop(f"density {name}"), drawn.pop(f"mean {name}")
            x = np.asarray(density.get_xdata())
            # Gaussian kernels of Scott's width, or of a step of the grid if that is more; peak 1.
            least = (x[1] - x[0]) / np.std(concept, ddof=1)
            expected = gaussian_kde(concept, max(len(concept) ** -0.2, least))(x)
            expected /= expected.max()
            expected[expected <= 0.004] = np.nan
            np.testing.assert_allclose(density.get_ydata(), expected, rtol=1e-6, atol=1e-9)
            assert mean.get_xdata() == pytest.approx([math.fsum(concept) / len(concept)], rel=1e-9)
            assert density.get_color() == mean.get_color() == colour
        assert not drawn


def assert_sources(figure, truth):
    """One panel per concept, its bars the relevances of the strongest inputs, taken in turns."""
    orders = [sorted(range(8), key=lambda i: -abs(original[i])) for original, _ in truth]
    turns = dict.fromkeys(order[place] for place in range(8) for order in orders)
    said = [text.get_text() for text in figure.texts]
    inputs = [int(words) for words in said if words.isdigit()]
    assert sorted(inputs) == sorted(list(turns)[:5])
    for axes, relevances, name in zip(figure.axes, truth, LETTERS[: len(truth)], strict=True):
        assert name in said
        for bars, values in zip(axes.containers, relevances, strict=True):
            assert [bar.get_width() for bar in bars] == pytest.approx([values[i] for i in inputs])
            low, high = axes.get_xlim()
            assert all(low <= values[i] <= high for i in inputs)


def assert_tiles(figure, run, channel, skip=0):
    """Each row holds the middle of its reference images, framed by what they belong to."""
    top = reference_images(run.scan, run.split, n=3, alike=ALIKE)[channel]
    for row, images in zip(tiles(figure), (top.original, *top.concepts), strict=True):
        pairs = zip(images.index.tolist(), images.concept.tolist(), strict=True)
        for axes, (index, concept) in zip(row[skip:], pairs, strict=True):
            (image,) = axes.images
            assert (image.get_array() == np.asarray(run.images.picture(index))[:, 1:10]).all()
            frame = mpl.colors.to_hex(axes.spines["left"].get_edgecolor())
            assert frame == (COLOURS[concept] if concept >= 0 else "#e2e0db")
            assert [text.get_text() for text in axes.texts] == [*LETTERS[concept : concept + 1]]


def assert_true(run, kind, channel, spoil=lambda figure: None):
    """A figure's densities, bars and pictures are those of the images."""
    options = {"teaser": {"dataset": run.images, "n": 3}, "source": {"n": 5}}.get(kind, {})
    figure = draw(run, kind, channel, **options)
    spoil(figure)
    if kind == "source":
        assert_sources(figure, run.relevances(channel))
    else:
        assert_densities(figure, run.values(channel))
    if kind == "teaser":
        assert_tiles(figure, run, channel)


@pytest.mark.parametrize("channel", CONCEPTS)
@pytest.mark.parametrize("kind", ["teaser", "density", "source"])
def test_figures_show_what_the_images_say(run, kind, channel):
    assert_true(run, kind, channel)


def _shift(axes, label):
    (line,) = (line for line in axes.lines if line.get_label() == label)
    line.set_xdata(np.asarray(line.get_xdata()) + 0.01)


def test_the_checkers_notice_what_is_wrong(run):
    for kind, spoil in (
        ("density", lambda figure: _shift(panels(figure)[1], "mean A")),
        ("density", lambda figure: _shift(panels(figure)[2], "density B")),
        ("density", lambda figure: panels(figure)[0].remove()),
        ("density", lambda figure: panels(figure)[0].lines[-1].set_color("#000000")),
        ("source", lambda figure: figure.axes[1].patches[9].set_width(9.0)),
        ("teaser", lambda figure: tiles(figure)[1][0].images[0].set_data(np.zeros((9, 9, 3)))),
        ("teaser", lambda figure: tiles(figure)[1][0].spines["left"].set_color("#123456")),
    ):
        with pytest.raises(AssertionError):
            assert_true(run, kind, 1, spoil)


def test_teaser_figure_shows_visualisations_and_crosses_out_what_is_gone(run):
    pictures = [Image.new("RGBA", (10, 10), (40 * n, 9, 90, 255)) for n in range(3)]
    made = [Feature(4, k, 0, pictures[n], ()) for n, k in enumerate((None, 0, 1))]
    features, fewer = (Features("2", "", tuple(shown)) for shown in (made, made[:2]))
    figure = draw(run, "teaser", dataset=run.images, features=features, n=3)
    assert_tiles(figure, run, 4, skip=1)
    for row, picture in zip(tiles(figure), pictures, strict=True):
        assert np.array_equal(row[0].images[0].get_array(), picture.convert("RGB"))
    assert_tiles(draw(run, "teaser", dataset=run.images, features=fewer, n=3), run, 4)
    assert [len(row) for row in tiles(draw(run, "teaser", features=features))] == [1, 1, 1]
    top = reference_images(run.scan, run.split, n=3, alike=ALIKE)[4].original.index.tolist()
    row = tiles(draw(run, "teaser", dataset=Images(gone=top[1]), n=3))[0]
    assert [(len(axes.images), len(axes.lines)) for axes in row] == [(1, 0), (0, 2), (1, 0)]


def test_figures_have_their_size_and_titles_that_stay_within(run):
    said = {text.get_text() for text in draw(run, "density").texts}
    assert {"  $x_1$", "  <b>&, drawkcab"} <= said  # without the mark that turns writing
    wide = draw(run, "teaser", 1, dataset=run.images, n=5, width=7)
    narrow = draw(run, "density", 1, width=2.0)
    for figure, width in ((wide, 7), (narrow, 2), (draw(run, "source", 1), 3.25)):
        assert figure.get_size_inches()[0] == width
        assert any("www" in t.get_text() and t.get_text().endswith("…") for t in figure.texts)
        assert figure._repr_png_()  # for notebooks; now all is in its place
        boxes = [axes.bbox for axes in figure.axes]
        for box in [*boxes, *(text.get_window_extent() for text in figure.texts)]:
            assert 0 <= box.x0 <= box.x1 <= figure.bbox.width + 1e-9
            assert 0 <= box.y0 <= box.y1 <= figure.bbox.height + 1e-9
        for one, two in itertools.combinations(boxes, 2):
            assert not one.padded(-0.01).overlaps(two.padded(-0.01))


def test_save_figure_writes_the_same_bytes_whatever_matplotlib_is_set_to(run, tmp_path):
    def saved(folder):
        figure = draw(run, "teaser", 1, dataset=run.images, n=3)
        for suffix in (".pdf", ".png", ".svg"):
            unbraid.save_figure(figure, folder / f"figure{suffix}")
        return {path.suffix: path.read_bytes() for path in sorted(folder.iterdir())}

    content = saved(tmp_path / "new")
    with Image.open(io.BytesIO(content[".png"])) as picture:
        assert picture.width == 5.5 * 300
    assert b' width="396pt"' in content[".svg"]
    assert b"<text" not in content[".svg"]  # glyphs are outlines: no font is asked for
    for inside in (b"%PDF", b"/MediaBox [ 0 0 396 ", b"/FontFile2"):  # TrueType, embedded
        assert inside in content[".pdf"]
    assert not re.search(rb"CreationDate|ModDate|dc:date|tIME", b"".join(content.values()))
    mine = {"font.size": 30, "axes.grid": True, "svg.fonttype": "none", "axes.unicode_minus": False}
    with mpl.rc_context(mine):
        before = dict(mpl.rcParams)
        assert saved(tmp_path / "other") == content
        assert dict(mpl.rcParams) == before


def test_figures_refuse_in_one_sentence(run):
    for kind, channel, options, said in (
        ("teaser", 3, {}, "Channel 3 was not split; .* 1, 4"),
        ("density", 4, {"width": math.nan}, "width is nan"),
        ("teaser", 4, {"n": 0, "dataset": 52}, "n is 0"),
        ("teaser", 4, {"n": 40, "dataset": 52}, "too many"),
        ("teaser", 4, {"dataset": 20}, "not the one"),
        ("teaser", 4, {"features": Features("7", "", ())}, "of layer 7"),
        ("source", 1, {"width": 2.0}, "3 concepts, too many"),
    ):
        if "dataset" in options:
            options = {**options, "dataset": Subset(run.images, range(options["dataset"]))}
        with pytest.raises(UsageError, match=said):
            draw(run, kind, channel, **options)


@pytest.mark.parametrize("kind", ["teaser", "density", "source"])
def test_figures_refuse_another_network_absent_images_and_no_matplotlib(run, monkeypatch, kind):
    with pytest.raises(UsageError, match="another network or layer"):
        draw(replace(run, split=replace(run.split, weights="0" * 64)), kind)
    part = replace(run.split[4], concepts=((0,), (7,)))
    with pytest.raises(UsageError, match="The scan has no image of 7"):
        draw(replace(run, split=replace(run.split, channels=(part,))), kind)
    with pytest.raises(UsageError, match=r"ends in none of \.pdf"):
        unbraid.save_figure(draw(run, kind), "a.docx")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnbraidError, match="pip install matplotlib"):
        draw(run, kind)


def test_colours_of_figures_are_those_of_the_page():
    style = (Path(unbraid.__file__).parent / "reporting" / "style.css").read_text()
    assert list(COLOURS) == re.findall(r"--c\d: (#\w{6})", style)[:8]
