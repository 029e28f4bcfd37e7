"""A run over tensors of one's own: looked at again where its data is named, drawn by bands."""

import numpy as np
import pytest
import torch
from tensor_folders import NETWORKS

from unbraid.base.errors import CannotRun, DataError, UsageError
from unbraid.cli import app
from unbraid.exploring.explorer import open_explorer
from unbraid.exploring.opened import open_run
from unbraid.networks.given import as_batch
from unbraid.running.finished import Run

CODE = f"""{NETWORKS}
from tiny_networks import SyntheticImages

def images(shape, n):
    made = SyntheticImages(n, n_classes=3, size=shape, seed=n, dtype=torch.float32)
    made.classes = ['<b>"one"', "two\\n", "🐋"]
    return made

def bands():
    return made(nn.Conv2d, 5)
def signals():
    return made(nn.Conv1d, 2)
def some_bands():
    return images((5, 9, 8), 30), images((5, 9, 8), 12)
def some_signals():
    return images((2, 64), 30), images((2, 64), 12)
def fewer_bands():
    return images((5, 9, 8), 30), images((5, 9, 8), 11)
def fewer_signals():
    return images((2, 64), 30), images((2, 64), 11)
def other_bands():
    return others(some_bands())
def other_signals():
    return others(some_signals())
def others(made):
    for own in made:
        own.targets = [0, *own.targets[:-2], 0]
    return made
"""


def unbraid(*words):
    app([str(word) for word in words], exit_on_error=False, result_action="return_value")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(CODE)
    return folder


@pytest.fixture(scope="module", params=["bands", "signals"])
def kind_and_run(request, place):
    kind, out = request.param, place / request.param
    code = f"{place}/own.py"
    more = ("--bands", "4,2,0") if kind == "bands" else ()
    unbraid(
        *("run", "--model", f"{code}:{kind}", "--data", f"{code}:some_{kind}", "--layer", "2"),
        *("--out", out, "--tau", "0.01", "--p", "0.1", "--gamma", "0.9999", "--no-features"),
        *more,
    )
    return kind, out


def test_a_run_is_reported_drawn_and_explored_where_its_data_is_named(kind_and_run, place, capsys):
    kind, out = kind_and_run
    model, data = f"{place}/own.py:{kind}", f"{place}/own.py:some_{kind}"
    page = (out / "report.html").read_text()
    assert ("Pictures show bands 4, 2, 0 of 5" in page) == (kind == "bands")
    unbraid("report", out, "--data", data)
    assert page.count("data:image") == (out / "report.html").read_text().count("data:image") > 3
    if kind == "bands":
        unbraid("report", out, "--data", data, "--bands", "1")
        assert "Pictures show band 1 of 5" in (out / "report.html").read_text()
    channel = Run(out).split.channels[0].channel
    images = torch.randn(2, *((5, 9, 8) if kind == "bands" else (2, 64)))
    np.save(place / f"{kind}.npy", images[0].numpy())
    torch.save(images, place / f"{kind} both.pt")
    capsys.readouterr()
    unbraid("explain", out, place / f"{kind}.npy", place / f"{kind} both.pt", "--model", model)
    told = capsys.readouterr()
    assert told.out.count("concept channels)") == 3
    assert "preprocessing, which" not in told.err
    assert len(list((out / "explained").glob("*.png"))) == 3
    explorer = open_explorer(open_run(out, model, data=data), None)
    shown = explorer.explain("run", "val/3", channel)
    assert shown["rows"][0]["map"].startswith("data:image")
    assert shown["logits"]["classes"]
    unbraid("circuit", out, "--channel", channel, "--data", data, "--model", model)
    unbraid("edit", out, "--off", f"{channel}.0", "--out", place / f"{kind} edited",
            "--data", data, "--model", model)  # fmt: skip


@pytest.mark.parametrize(
    ("named", "words"),
    [("fewer", "are 11 images, fewer images than were scanned;"), ("other", "labels differ")],
)
def test_other_images_than_were_scanned_are_told_everywhere(named, words, kind_and_run, place):
    kind, out = kind_and_run
    model, data = f"{place}/own.py:{kind}", f"{place}/own.py:{named}_{kind}"
    with pytest.raises(UsageError, match=words):
        unbraid("report", out, "--data", data)
    opened = open_run(out, model, data=data)
    assert opened.val_images is None
    told = [text for text in opened.missing if words in text]
    assert told[-1].startswith("Reference images stay without pictures: ")
    assert (opened.train_images is None) == (named == "other")


def test_the_layers_of_a_network_for_signals_come_without_a_word_on_pictures(place, capsys):
    model = f"{place}/own.py:signals"
    with pytest.raises(CannotRun, match="images of its own by --data"):
        unbraid("layers", model)
    unbraid("layers", model, "--data", f"{place}/own.py:some_signals/val")
    assert "ImageNet" not in capsys.readouterr().err


def test_bands_without_pictures_to_share_are_refused(kind_and_run, place):
    with pytest.raises(UsageError, match="none are shared"):
        unbraid("share", kind_and_run[1], "--out", place / "shared", "--bands", "1")


def test_what_cannot_be_drawn_by_bands_or_explained_is_told(kind_and_run, place):
    kind, out = kind_and_run
    model, data = f"{place}/own.py:{kind}", f"{place}/own.py:some_{kind}"
    odd = place / "odd.npy"
    np.save(odd, np.zeros(3))
    (place / "broken.pt").write_text("no tensor")
    calls = [
        (("report", out, "--data", data, "--bands", "1,2"), "is not as in 3,2,1"),
        (("report", out, "--data", data, "--bands", "9"), "0 to 4|of shape"),
        (("explain", out, odd, "--model", model), r"tensor of shape \(3,\)"),
        (("explain", out, place / "broken.pt", "--model", model), "cannot be read"),
        (("explain", out, place / "none.npy", "--model", model), "There is no file"),
        (("explain", out, odd, place / "a.png", "--model", model), "both pictures and tensors"),
    ]
    for words, message in calls:
        with pytest.raises((UsageError, DataError), match=message):
            unbraid(*words)


def test_a_tensor_is_one_image_or_several_as_the_network_takes_it():
    line, map_, volume = (
        torch.nn.Sequential(conv(2, 3, 1)) for conv in (torch.nn.Conv1d, torch.nn.Conv2d,
                                                        torch.nn.Conv3d)
    )  # fmt: skip
    for network, shape, wanted in (
        (line, (2, 9), (1, 2, 9)),
        (line, (4, 2, 9), (4, 2, 9)),
        (map_, (2, 5, 9), (1, 2, 5, 9)),
        (map_, (4, 2, 5, 9), (4, 2, 5, 9)),
        (volume, (2, 4, 5, 9), (1, 2, 4, 5, 9)),
        (volume, (3, 2, 4, 5, 9), (3, 2, 4, 5, 9)),
    ):
        assert as_batch(torch.zeros(shape), network).shape == wanted
    for network in (map_, volume):
        with pytest.raises(UsageError, match="give one of shape"):
            as_batch(torch.zeros(2, 9), network)


class Mixed(torch.nn.Module):
    """Signals, of which a convolution makes a map for another one."""

    def __init__(self):
        super().__init__()
        self.line, self.map = torch.nn.Conv1d(1, 8, 5), torch.nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.map(self.line(x)[:, None]).mean((2, 3))


class Rows(torch.nn.Module):
    """Tokens, without a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.head = torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.first(x).relu().flatten(1, -2).mean(1))


def test_a_tensor_is_tried_where_convolutions_do_not_say_what_it_is():
    pictures = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 5 * 5, 2))
    for network, shape, wanted in (
        (Mixed(), (5, 1, 40), (5, 1, 40)),
        (Mixed(), (1, 1, 40), (1, 1, 40)),
        (Mixed(), (1, 40), (1, 1, 40)),
        (Rows(), (5, 7, 8), (5, 7, 8)),
        (Rows(), (7, 8), (1, 7, 8)),
        (pictures, (3, 5, 5), (1, 3, 5, 5)),
        (pictures, (2, 3, 5, 5), (2, 3, 5, 5)),
    ):
        assert as_batch(torch.zeros(shape), network.eval()).shape == wanted
    with pytest.raises(UsageError, match="give one of shape"):
        as_batch(torch.zeros(5, 8), torch.nn.Linear(8, 2))
