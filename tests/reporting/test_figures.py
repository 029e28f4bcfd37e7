"""Figures for papers: they show what the images say, in any format, whatever names hold."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

import unbraid
from oracle import channel_input_relevance, channel_map, layer_io
from unbraid import Features, Scan, Split, UnbraidError
from unbraid.__main__ import main
from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.images.listing import ListedImages, list_folder
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.reporting import figures
from unbraid.reporting.paper import COLOURS
from unbraid.running.run import Run as RunFolder
from unbraid.visualizing.features import Feature

NAMES = ("$x_1$", "<b>&", "\u202edrawkcab\n", "w" * 5000)
CONCEPTS = {4: [[0], [1, 2]], 1: [[0, 1], [2], [3]]}
LETTERS = "ABC"

# --- a small real run -----------------------------------------------------------------------------


@dataclass
class Run:
    folder: Path  # as `unbraid run` leaves it
    network: nn.Sequential
    images: ListedImages
    scan: Scan
    split: Split

    def values(self, channel: int) -> list[list[list[float]]]:
        """Pooled pre-activations by row and concept, one image and one position at a time."""
        part = self.split[channel]
        layer = self.network[2]
        rows = [part.weight, *(mask * part.weight for mask in part.masks)]
        out: list[list[list[float]]] = [[[] for _ in part.concepts] for _ in rows]
        for image, label in self.images:  # type: ignore[attr-defined]
            for k, classes in enumerate(part.concepts):
                if label in classes:
                    x, _, _ = layer_io(self.network, "2", image)
                    for r, row in enumerate(rows):
                        z = channel_map(layer, channel, row, x).tolist()
                        out[r][k].append(math.fsum(z))
        return out

    def relevances(self, channel: int) -> list[tuple[list[float], list[float]]]:
        """Per concept, each input's mean relevance for the original and the concept channel."""
        part, found = self.split[channel], []
        for k, classes in enumerate(part.concepts):
            changed = copy.deepcopy(self.network[2])
            with torch.no_grad():
                changed.weight[channel] = part.rows[k].view_as(changed.weight[channel])
            sums, n_images = [[0.0] * 8, [0.0] * 8], 0
            for image, label in self.images:  # type: ignore[attr-defined]
                if label not in classes:
                    continue
                n_images += 1
                x, _, _ = layer_io(self.network, "2", image)
                for total, layer in zip(sums, (self.network[2], changed), strict=True):
                    for i, value in enumerate(channel_input_relevance(layer, x)[channel].tolist()):
                        total[i] += value
            original, kept = ([value / n_images for value in total] for total in sums)
            found.append((original, kept))
        return found


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).double() / 255


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    chance = np.random.default_rng(0)
    for label in range(4):
        (folder / f"data/val/{label}").mkdir(parents=True)
        base = chance.integers(0, 180, (9, 11, 3))
        for n in range(13):
            pixels = (base + chance.integers(0, 75, base.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"data/val/{label}/{n:02}.png")
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=1)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    ).double()
    images = ListedImages(list_folder(folder / "data/val"), to_tensor, class_names=NAMES)
    scan = unbraid.scan(network, "2", images, folder / "scan-val", min_share=1e-6)
    found = unbraid.find(scan, tau=1e-5, channels=CONCEPTS)
    split = unbraid.split(scan, found)
    split.save(folder / "split.safetensors")
    source = {"data": str(folder / "data"), "class_folders": True}
    settings = {"title": "x", "thresholds": {}, "source": source}
    (folder / "settings.json").write_text(json.dumps(settings))
    return Run(folder, network, images, scan, split)


def some_features(split: Split, channel: int) -> Features:
    made = [
        Feature(channel, k, 0, Image.new("RGBA", (10, 10), (40 * n, 9, 90, 255)), ())
        for n, k in enumerate([None, *range(len(split[channel].concepts))])
    ]
    return Features(split.layer.name, "", tuple(made))


# --- reading a figure -----------------------------------------------------------------------------


def panels(figure: Figure) -> list[Axes]:
    """The axes with densities, from above."""
    return [a for a in figure.axes if any(n.startswith("density") for n in lines(a))]


def lines(axes: Axes) -> dict[str, tuple[np.ndarray, np.ndarray, str]]:
    return {
        str(line.get_label()): (line.get_xdata(), line.get_ydata(), str(line.get_color()))
        for line in axes.get_lines()
    }


def tiles(figure: Figure) -> list[list[Axes]]:
    """The axes with pictures, row by row from above, from the left."""
    found = [a for a in figure.axes if a not in panels(figure)]

    def height(axes: Axes) -> float:
        return -round(axes.get_position().y0, 6)

    found.sort(key=lambda a: (height(a), a.get_position().x0))
    return [list(row) for _, row in itertools.groupby(found, height)]


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def kernel_density(values: Sequence[float], grid: Sequence[float]) -> list[float]:
    """Gaussian kernels of Scott's width, or of a step of the grid if that is more; peak 1."""
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    width = max(spread * n**-0.2, grid[1] - grid[0])
    heights = [
        math.fsum(math.exp(-(((place - v) / width) ** 2) / 2) for v in values) for place in grid
    ]
    return [height / max(heights) for height in heights]


def assert_densities(figure: Figure, values: list[list[list[float]]]) -> None:
    """Each panel holds each concept's density and mean, and nothing else, on one grid."""
    shown = panels(figure)
    assert len(shown) == len(values)
    everything = [v for row in values for concept in row for v in concept]
    for axes, row in zip(shown, values, strict=True):
        drawn = lines(axes)
        drawn.pop("zero", None)
        letters = LETTERS[: len(row)]
        assert set(drawn) == {f"{what} {name}" for what in ("density", "mean") for name in letters}
        assert axes.get_xlim() == shown[0].get_xlim()
        low, high = axes.get_xlim()
        assert low <= min(everything)
        assert high >= max(everything)
        for k, concept in enumerate(row):
            x, heights, colour = drawn[f"density {LETTERS[k]}"]
            expected = np.array(kernel_density(concept, x.tolist()))
            expected[expected <= 0.004] = np.nan
            np.testing.assert_allclose(heights, expected, rtol=1e-6, atol=1e-9)
            assert colour == COLOURS[k]
            (mean,), _, colour = drawn[f"mean {LETTERS[k]}"]
            assert mean == pytest.approx(math.fsum(concept) / len(concept), rel=1e-9)
            assert colour == COLOURS[k]


def assert_sources(figure: Figure, truth: list[tuple[list[float], list[float]]], n: int) -> None:
    """One panel per concept, its bars the relevances of the strongest inputs, taken in turns."""
    orders = [sorted(range(8), key=lambda i: -abs(original[i])) for original, _ in truth]
    turns = [order[place] for place in range(8) for order in orders]
    chosen = [i for place, i in enumerate(turns) if i not in turns[:place]][:n]
    inputs = [int(words) for words in words_of(figure) if words.isdigit()]
    assert sorted(inputs) == sorted(chosen)
    assert len(figure.axes) == len(truth)
    for axes, relevances, name in zip(figure.axes, truth, LETTERS[: len(truth)], strict=True):
        assert name in words_of(figure)
        for bars, values in zip(axes.containers, relevances, strict=True):
            assert [bar.get_width() for bar in bars] == pytest.approx([values[i] for i in inputs])
            low, high = axes.get_xlim()
            assert all(low <= values[i] <= high for i in inputs)


def assert_tiles(figure: Figure, run: Run, channel: int, n: int, skip: int = 0) -> None:
    """Each row holds the middle of its reference images, framed by what they belong to."""
    top = reference_images(run.scan, run.split, n=n, alike=ALIKE)[channel]
    rows = tiles(figure)
    assert len(rows) == 1 + len(top.concepts)
    for row, images in zip(rows, (top.original, *top.concepts), strict=True):
        assert len(row) == skip + len(images.index)
        for axes, index, concept in zip(
            row[skip:], images.index.tolist(), images.concept.tolist(), strict=True
        ):
            assert (pixels_of(axes) == middle(run, index)).all()
            frame = mpl.colors.to_hex(axes.spines["left"].get_edgecolor())
            assert frame == (COLOURS[concept] if concept >= 0 else "#e2e0db")
            assert [text.get_text() for text in axes.texts] == [*LETTERS[concept : concept + 1]]


def middle(run: Run, index: int) -> np.ndarray:
    """The middle of an image of 9 by 11 pixels, as a square."""
    return np.asarray(run.images.picture(index))[:, 1:10]


def pixels_of(axes: Axes) -> np.ndarray:
    (image,) = axes.get_images()
    return np.asarray(image.get_array())


# --- what figures show ----------------------------------------------------------------------------


def assert_all(run: Run, channel: int, spoil: Callable[[str, Figure], None] | None = None) -> None:
    """Densities, bars and pictures of a channel are those of its images."""
    spoil = spoil or (lambda kind, figure: None)
    values, images = run.values(channel), run.images
    density = unbraid.density_figure(run.split, run.scan, channel)
    teaser = unbraid.teaser_figure(run.split, run.scan, channel, dataset=images, n=3)
    sources = unbraid.source_figure(run.split, run.scan, channel, n=5)
    for kind, figure in (("density", density), ("teaser", teaser), ("sources", sources)):
        spoil(kind, figure)
    assert_densities(density, values)
    assert_densities(teaser, values)
    assert_tiles(teaser, run, channel, 3)
    assert_sources(sources, run.relevances(channel), 5)


@pytest.mark.parametrize("channel", CONCEPTS)
def test_figures_show_what_the_images_say(run: Run, channel: int) -> None:
    assert_all(run, channel)
    assert_densities(unbraid.teaser_figure(run.split, run.scan, channel), run.values(channel))


def _shift(axes: Axes, label: str) -> None:
    line = next(line for line in axes.get_lines() if line.get_label() == label)
    line.set_xdata(np.asarray(line.get_xdata()) + 0.01)


@pytest.mark.parametrize(
    ("kind", "spoil"),
    [
        ("density", lambda figure: _shift(panels(figure)[1], "mean A")),
        ("density", lambda figure: _shift(panels(figure)[2], "density B")),
        ("density", lambda figure: panels(figure)[0].remove()),
        ("density", lambda figure: panels(figure)[1].set_xlim(0, 1)),
        ("density", lambda figure: panels(figure)[0].get_lines()[-1].set_color("#000000")),
        ("sources", lambda figure: figure.axes[0].patches[2].set_width(9.0)),
        ("sources", lambda figure: figure.axes[1].patches[9].set_width(9.0)),
        ("sources", lambda figure: figure.axes[1].remove()),
        (
            "sources",
            lambda figure: next(t for t in figure.texts if t.get_text().isdigit()).set_text("77"),
        ),
        (
            "teaser",
            lambda figure: tiles(figure)[1][0].get_images()[0].set_data(np.zeros((9, 9, 3))),
        ),
        ("teaser", lambda figure: tiles(figure)[1][0].spines["left"].set_color("#123456")),
        ("teaser", lambda figure: tiles(figure)[1][0].texts[0].set_text("D")),
        ("teaser", lambda figure: tiles(figure)[1][0].texts[0].remove()),
    ],
)
def test_the_checkers_notice_what_is_wrong(
    run: Run, kind: str, spoil: Callable[[Figure], None]
) -> None:
    with pytest.raises(AssertionError):
        assert_all(run, 4, lambda drawn, figure: spoil(figure) if drawn == kind else None)


def test_visualisations_stand_first_where_every_row_has_one(run: Run) -> None:
    made = some_features(run.split, 4)
    figure = unbraid.teaser_figure(run.split, run.scan, 4, dataset=run.images, features=made, n=3)
    assert_tiles(figure, run, 4, 3, skip=1)
    for row, k in zip(tiles(figure), (None, 0, 1), strict=True):
        assert (pixels_of(row[0]) == np.asarray(made.image(4, k).convert("RGB"))).all()
    some = replace(made, features=made.features[:2])
    for features in (some, some_features(run.split, 1)):  # not of every row, of another channel
        figure = unbraid.teaser_figure(
            run.split, run.scan, 4, dataset=run.images, features=features, n=3
        )
        assert_tiles(figure, run, 4, 3)
    alone = tiles(unbraid.teaser_figure(run.split, run.scan, 4, features=made))
    assert [len(row) for row in alone] == [1, 1, 1]


def test_an_image_that_is_gone_is_crossed_out(run: Run) -> None:
    top = reference_images(run.scan, run.split, n=3, alike=ALIKE)[4].original.index.tolist()
    images = copy.copy(run.images)
    paths = list(images._read.paths)
    paths[top[1]] += ".gone"
    images._read = replace(images._read, paths=paths)
    row = tiles(unbraid.teaser_figure(run.split, run.scan, 4, dataset=images, n=3))[0]
    assert [len(axes.get_images()) for axes in row] == [1, 0, 1]
    assert len(row[1].get_lines()) == 2


def test_titles_name_channel_and_concepts_and_stay_within_the_figure(run: Run) -> None:
    figure = unbraid.density_figure(run.split, run.scan, 4)
    said = words_of(figure)
    assert "Original channel 4" in said
    assert [f"Concept channel {name}" in said for name in LETTERS] == [True, True, False]
    assert "  $x_1$" in said
    assert "  <b>&, drawkcab" in said  # without the mark that turns writing around
    wide = unbraid.teaser_figure(run.split, run.scan, 1, dataset=run.images)
    narrow = unbraid.density_figure(run.split, run.scan, 1, width=2.0)
    sources = unbraid.source_figure(run.split, run.scan, 1)
    for figure in (wide, narrow, sources):
        assert any(text.endswith("…") and "www" in text for text in words_of(figure))
        figure.canvas.draw()
        for text in figure.texts:
            box = text.get_window_extent()
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= figure.bbox.width
            assert box.y1 <= figure.bbox.height


def test_sizes_are_as_asked(run: Run) -> None:
    assert unbraid.density_figure(run.split, run.scan, 4).get_size_inches()[0] == 3.25
    assert unbraid.teaser_figure(run.split, run.scan, 4).get_size_inches()[0] == 5.5
    figure = unbraid.teaser_figure(run.split, run.scan, 4, dataset=run.images, n=5, width=7)
    assert figure.get_size_inches()[0] == 7
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(b.x0 >= 0 and b.x1 <= 1 and b.y0 >= 0 and b.y1 <= 1 for b in boxes)
    assert not any(
        one.x0 < two.x1 and two.x0 < one.x1 and one.y0 < two.y1 and two.y0 < one.y1
        for one, two in itertools.combinations(boxes, 2)
    )


# --- files ----------------------------------------------------------------------------------------


def saved(run: Run, folder: Path) -> dict[str, bytes]:
    figure = unbraid.teaser_figure(run.split, run.scan, 1, dataset=run.images)
    content = {}
    for suffix in figures.SUFFIXES:
        unbraid.save_figure(figure, folder / "new" / f"figure{suffix}")
        content[suffix] = (folder / "new" / f"figure{suffix}").read_bytes()
    return content


def test_every_format_is_written_sized_and_with_its_fonts(run: Run, tmp_path: Path) -> None:
    content = saved(run, tmp_path)
    with Image.open(io.BytesIO(content[".png"])) as picture:
        assert picture.width == 5.5 * 300
    root = ET.fromstring(content[".svg"])
    assert root.attrib["width"] == f"{5.5 * 72:g}pt"
    assert b"<text" not in content[".svg"]  # glyphs are outlines: no font is asked for
    pdf = content[".pdf"]
    assert pdf.startswith(b"%PDF")
    assert b"/MediaBox [ 0 0 396 " in pdf
    assert b"/FontFile2" in pdf  # TrueType, embedded
    assert b"/Type3" not in pdf
    for written in content.values():
        assert not re.search(rb"CreationDate|ModDate|dc:date|tIME", written)
    assert [path.suffix for path in sorted((tmp_path / "new").iterdir())] == [*figures.SUFFIXES]


def test_the_same_bytes_come_out_whatever_matplotlib_is_set_to(run: Run, tmp_path: Path) -> None:
    content = saved(run, tmp_path)
    mine = {"font.size": 30, "axes.grid": True, "svg.fonttype": "none", "axes.unicode_minus": False}
    with mpl.rc_context(mine):
        before = dict(mpl.rcParams)
        assert saved(run, tmp_path / "other") == content
        assert dict(mpl.rcParams) == before


def test_notebooks_show_a_picture_and_pyplot_is_left_alone(run: Run) -> None:
    figure = unbraid.density_figure(run.split, run.scan, 4)
    with Image.open(io.BytesIO(figure._repr_png_())) as picture:
        assert 400 < picture.width < 800
    code = "import sys, unbraid.reporting.paper; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- mistakes -------------------------------------------------------------------------------------


def test_a_mistake_is_one_sentence(run: Run, tmp_path: Path) -> None:
    split, scan = run.split, run.scan
    foreign = replace(split, weights="0" * 64)
    elsewhere = replace(some_features(split, 4), layer="7")
    too_short = Subset(run.images, range(20))
    figure = unbraid.density_figure(split, scan, 4)
    for call, said in (
        (lambda: unbraid.teaser_figure(split, scan, 3), "Channel 3 was not split; .* 1, 4"),
        (lambda: unbraid.density_figure(split, scan, 99), "Channel 99 was not split"),
        (lambda: unbraid.density_figure(foreign, scan, 4), "another network or layer"),
        (lambda: unbraid.density_figure(split, scan, 4, width=0.5), "width is 0.5"),
        (lambda: unbraid.density_figure(split, scan, 4, width=math.nan), "width is nan"),
        (lambda: unbraid.teaser_figure(split, scan, 4, dataset=run.images, n=0), "n is 0"),
        (lambda: unbraid.teaser_figure(split, scan, 4, dataset=run.images, n=40), "too many"),
        (lambda: unbraid.teaser_figure(split, scan, 4, dataset=too_short), "not the one"),
        (lambda: unbraid.teaser_figure(split, scan, 4, features=elsewhere), "of layer 7"),
        (lambda: unbraid.source_figure(split, scan, 3), "Channel 3 was not split"),
        (lambda: unbraid.source_figure(split, scan, 4, n=0), "n is 0"),
        (lambda: unbraid.source_figure(foreign, scan, 4), "another network or layer"),
        (lambda: unbraid.source_figure(split, scan, 1, width=2.0), "3 concepts, too many"),
        (lambda: unbraid.save_figure(figure, tmp_path / "a.docx"), "ends in none of .pdf"),
        (lambda: unbraid.save_figure(figure, tmp_path / "a"), "ends in none of .pdf"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    assert not list(tmp_path.iterdir())


def test_a_concept_without_images_is_named(run: Run, tmp_path: Path) -> None:
    one = unbraid.scan(run.network, "2", run.images, tmp_path / "scan", min_share=1e-6, classes=[0])
    for draw in (unbraid.teaser_figure, unbraid.density_figure, unbraid.source_figure):
        with pytest.raises(UsageError, match="The scan has no image of <b>&"):
            draw(run.split, one, 4)


def test_without_matplotlib_a_sentence_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (unbraid.teaser_figure, unbraid.density_figure, unbraid.source_figure):
        with pytest.raises(UnbraidError, match="pip install matplotlib"):
            draw(run.split, run.scan, 4)


# --- the command line -----------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> object:
    monkeypatch.setattr(sys, "argv", ["unbraid", "figure", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


def test_the_command_draws_what_the_functions_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teaser = unbraid.teaser_figure(run.split, run.scan, 4, dataset=run.images)
    for kind, figure in (
        ("", teaser),
        ("teaser", teaser),
        ("densities", unbraid.density_figure(run.split, run.scan, 4)),
        ("sources", unbraid.source_figure(run.split, run.scan, 4)),
    ):
        chosen = ("--kind", kind) if kind else ()
        out = tmp_path / "command.svg"
        assert command(monkeypatch, run.folder, "--channel", 4, "--out", out, *chosen) == 0
        unbraid.save_figure(figure, tmp_path / "function.svg")
        assert out.read_bytes() == (tmp_path / "function.svg").read_bytes()


def test_a_wrong_call_writes_nothing(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "f.png"
    for arguments, code, said in (
        ((run.folder, "--channel", 3, "--out", out), 2, "Channel 3 was not split"),
        ((run.folder, "--channel", 4, "--out", tmp_path / "f.gif"), 2, "ends in none of"),
        ((tmp_path, "--channel", 4, "--out", out), 1, "holds no finished run"),
        ((tmp_path / "no", "--channel", 4, "--out", out), 1, "holds no finished run"),
        ((run.folder, "--channel", 4, "--out", out, "--kind", "pie"), 2, "pie"),
    ):
        assert command(monkeypatch, *arguments) == code
        assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_run_without_split_or_images_says_so(run: Run, tmp_path: Path) -> None:
    settings = json.loads((run.folder / "settings.json").read_text())
    settings["source"]["data"] = str(tmp_path / "moved")
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(RunError, match="holds no split"):
        RunFolder(tmp_path).figure(4)
    (tmp_path / "split.safetensors").symlink_to(run.folder / "split.safetensors")
    (tmp_path / "scan-val").symlink_to(run.folder / "scan-val")
    with pytest.raises(DataError, match="moved"):
        RunFolder(tmp_path).figure(4)
    assert len(panels(RunFolder(tmp_path).figure(4, "densities"))) == 3  # they need no pictures
