"""The command line as a new user meets it: whole jobs on small folders, and every mistake."""

import csv
import html
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import unbraid
from unbraid.__main__ import main
from unbraid.base import files
from unbraid.base.errors import RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.cli import shared
from unbraid.images import kept, sample
from unbraid.running.finished import Run
from unbraid.scanning import scan as scanning

CLASSES = ("ant", "bee", "cat")

OWN = """
import numpy as np
import torch
from torch import nn

def preprocess(picture):
    pixels = np.asarray(picture.resize((12, 12)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255

def build(*more):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3), *more,
    ), preprocess

def build_soft():
    return build(nn.LogSoftmax(1))

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = build()[0]

    def forward(self, x):
        return [x, self.own(x)]

def build_both():
    return Both(), preprocess
"""
ENDS = """
import sys
from torch import nn

def build():
    sys.exit(3)

class Ends(nn.Conv2d):
    def forward(self, x):
        sys.exit()

def build_late():
    return Ends(3, 4, 1)
"""
FILES = {
    "own.py": OWN,
    "neighbour.py": "from own import build\n",
    "syntax.py": "def build(:",
    "ends.py": ENDS,
    "wrong.csv": "path,label\ndata/val/ant/none.png,ant\n",
    "junk/ant/a.png": "no picture",
    "half/ant/a.png": "no picture",
    "theirs/settings.json": "{}",
}


def draw(label, seed, file=None):
    """A picture of stripes whose direction and colour tell the class, perhaps saved."""
    pixels = np.random.default_rng(seed).integers(0, 60, (16, 16, 3))
    y, x = np.mgrid[:16, :16]
    pixels[..., label] += 180 * [(x % 4 < 2), (y % 4 < 2), ((x + y) % 6 < 3)][label]
    picture = Image.fromarray(pixels.astype(np.uint8))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return picture


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with networks of one's own, images by class, and much that fails."""
    home = tmp_path_factory.mktemp("home")
    for name, text in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    for part, n in (("train", 20), ("val", 10)):
        for label, name in enumerate(CLASSES):
            for k in range(n):
                file = home / "data" / part / name / f"{k}.{('png', 'jpg', 'webp')[k % 3]}"
                draw(label, 1000 * n + 10 * k + label, file)
        for k in range(9 * n):
            draw(k % 3, 5000 * 9 * n + k, home / "flat" / part / f"{k:03d}.png")
    for folder in ("half/ant", "no-val/train", *(f"many/{name}" for name in "abcd")):
        draw(0, 1, home / folder / "b.png")
    for k in range(8):
        draw(0, k, home / "one-class/ant" / f"{k}.png")
    (home / "no-val/val").mkdir()
    own = runpy.run_path(str(home / "own.py"))
    network, preprocess = own["build"]()
    images = torch.stack([preprocess(draw(k % 3, k)) for k in range(90)])
    labels = torch.arange(90) % 3
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimiser.step()
    state = network.state_dict()
    safetensors.torch.save_file(state, home / "weights.safetensors")
    state["2.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(state, home / "nan.safetensors")
    return home


@pytest.fixture
def call(home, monkeypatch, capsys):
    """Run the command line in `home`: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["unbraid", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if stopped.value.code:  # an error is told in a line of words
            told = [line for line in err.splitlines() if line.startswith("unbraid: ")]
            assert [line.rstrip()[-1] in ".?" for line in told] in ([True], [])
        return int(stopped.value.code or 0), out, err

    return run


NETWORK = ("--model", "own.py:build", "--weights", "weights.safetensors", "--layer", "2")
LOOSE = ("--tau", "0.02", "--p", "0.5", "--gamma", "0.95")
RUN = ("run", *NETWORK, "--data", "data")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluation_in(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def ran(home):
    """A finished run, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "unbraid", *RUN, "--out", "runs/a", *LOOSE],
        **{"capture_output": True, "text": True, "cwd": home, "check": False},
    )


@pytest.fixture
def again(ran, home, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(home / "runs/a", tmp_path / "again"))


def test_run_does_everything(ran, home):
    assert ran.returncode == 0, ran.stderr
    for told in ("Report: runs/a/report.html", "Largest logit difference 0;"):
        assert told in ran.stdout
    folder = home / "runs/a"
    evaluation = evaluation_in(folder)
    assert evaluation["output"]["max_abs_logit_diff"] == 0
    assert evaluation["output"]["top1_before"] > 0.9
    assert set(evaluation["summary"]) == {"least_squares", "published"}
    for figures in evaluation["summary"].values():  # also of those over all images
        assert None not in figures.values()
    rows = list(csv.DictReader((folder / "findings.csv").open()))
    found = {int(row["channel"]) for row in rows}
    assert {channel["channel"] for channel in evaluation["channels"]} == found != set()
    assert {name for row in rows for name in (row["name1"], row["name2"])} <= set(CLASSES)
    for channel in evaluation["channels"]:
        assert channel["semantics"]["encoder"] == "the network's own penultimate layer"
    counted = list(csv.DictReader((folder / "sensitivity.csv").open()))
    assert [row["n_pairs"] for row in counted if row["tau"] == "0.02"].count(str(len(rows))) > 0


def test_a_network_of_ones_own_is_edited_and_its_circuits_are_drawn(again, call):
    part = unbraid.Split.load(again / "split.safetensors").channels[0]
    code, out, err = call("circuit", str(again), "--channel", str(part.channel))
    assert code == 0, err
    assert f"What feeds channel {part.channel} of 2" in out
    made = {path.name for path in (again / "circuits").iterdir()}
    assert made == {f"{part.channel}.{ending}" for ending in ("json", "png", "svg")}
    edited = again / "edited"
    words = ("--off", f"{part.channel}.0", "--out", str(edited), *NETWORK[:4])
    code, out, err = call("edit", str(again), *words)
    assert code == 0, err
    about = json.loads((edited / "edit.json").read_text())
    assert about["n_images"] == 30
    assert (edited / "before_after.html").exists()
    assert (edited / "network.safetensors").exists()


def test_what_a_run_says_of_labels_stands_on_its_page(ran, home, call):
    """Of two of three classes, taken for other outputs; also when it is written again."""
    for file in (home / "data").glob("*/[bc]*/*.*"):
        to = home / "lost" / file.relative_to(home / "data")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    clusters = ("--concepts", "clusters", "--gamma", "0.9999", "--no-features")
    code, _, err = call("run", *NETWORK, "--data", "lost", "--out", "runs/lost", *clusters)
    assert code == 0, err
    assumed = "2 classes for 3 outputs; taken in order as the first outputs."
    doubt = "It seems that labels or preprocessing do not fit this network"
    page = home / "runs/lost/report.html"
    assert assumed in " ".join(err.split())  # the doubt is a warning, which pytest takes
    for told in (assumed, doubt):
        assert told in notes_of(page)
        assert told not in notes_of(home / "runs/a/report.html")
    before = page.read_bytes()
    page.unlink()
    assert call("report", "runs/lost")[0] == 0
    assert page.read_bytes() == before


def test_a_page_that_is_shared_tells_of_doubts_but_not_where_images_are(again, call, monkeypatch):
    monkeypatch.setattr(Run, "doubts", ["Labels may not fit."])
    settings = json.loads((again / "settings.json").read_text())
    settings["source"]["assumed"] = "In /our/images labels were guessed."
    (again / "settings.json").write_text(json.dumps(settings))
    assert call("report", str(again))[0] == 0
    code, _, err = call("share", str(again), "--out", str(again / "shared"))
    assert code == 0, err
    for page, told in (("report.html", True), ("shared/page.html", False)):
        notes = notes_of(again / page)
        assert ("Labels may not fit." in notes, "/our/images" in notes) == (True, told)


def notes_of(page):
    """What a page asks to note."""
    return html.unescape(page.read_text().partition('id="notes"')[2].partition("</aside>")[0])


def test_a_target_of_a_file_is_kept_so_that_any_folder_finds_it(home, call, monkeypatch, tmp_path):
    np.save(home / "text.npy", np.ones(3))
    run_in_turn = Mock(return_value=[])
    monkeypatch.setattr("unbraid.running.first_look.run_in_turn", run_in_turn)
    for target in ("embedding:text.npy", "regression:1"):
        code, _, err = call(*RUN, "--out", str(tmp_path / "out"), "--target", target)
        assert code == 0, err
    kept = [one.kwargs["source"]["target"] for one in run_in_turn.call_args_list]
    assert kept == [f"embedding:{(home / 'text.npy').resolve()}", "regression:1"]


def test_figure_is_drawn_and_check_tells_what_is_damaged(again, call):
    channel = str(unbraid.Split.load(again / "split.safetensors").channels[0].channel)
    options = ("--channel", channel, "--kind", "sources", "--out", str(again / "own.png"))
    assert call("figure", str(again), *options)[0] == 0
    assert Image.open(again / "own.png").width > 500
    code, out, _ = call("check", str(again))
    assert (code, out.splitlines()[-1]) == (0, "21 files sound.")
    split = again / "split.safetensors"
    split.write_bytes(split.read_bytes()[:-8])
    code, out, _ = call("check", str(again))
    assert (code, "20 files sound." in out, "split.safetensors" in out) == (1, True, True)


def test_step_by_step_gives_the_same(ran, home, call):
    for part in ("train", "val"):
        assert call(*scan(data=f"data/{part}", out=f"steps/{part}"), "--positions")[0] == 0
    assert call("find", "steps/train", *LOOSE, "--out", "steps/findings.csv")[0] == 0
    same = (home / "runs/a/findings.csv").read_text()
    assert (home / "steps/findings.csv").read_text() == same
    assert call("split", "steps/train", *LOOSE, "--out", "steps/split")[0] == 0
    assert call("evaluate", "steps/split", "steps/val", "--out", "steps/evaluation.json")[0] == 0
    summary = evaluation_in(home / "steps")["summary"]
    whole = evaluation_in(home / "runs/a")["summary"]["least_squares"]
    assert summary == {"least_squares": pytest.approx(whole, rel=1e-4)}
    grid = ("--taus", "0.02", "0.1", "--ps", "0.5", "--gammas", "0.5", "0.95")
    out = call("sensitivity", "steps/train", *grid, "--out", "counted.csv")[1]
    opened = unbraid.open_scan(home / "steps/train")
    assert out.strip() == str(unbraid.sensitivity(opened, [0.02, 0.1], [0.5], [0.5, 0.95]))
    assert len((home / "counted.csv").read_text().splitlines()) == 5


def test_run_of_layers_of_a_network_without_features_does_without(home, call):
    network = ("--model", "own.py:build_soft", *NETWORK[2:], "--layer", "0")
    loose = ("--tau", "auto", "--p", "0.3", "--gamma", "1", "--no-features")
    code, out, err = call("run", *network, "--data", "data", "--out", "runs/soft", *loose)
    assert (code, "Semantic measures are left out" in err) == (0, True), err
    for told in ("(auto), p 0.3", "With all layers split, largest logit difference 0"):
        assert told in out
    channels = evaluation_in(home / "runs/soft/2")["channels"]
    assert {channel["semantics"] for channel in channels} == {None}
    assert "Semantic measures are left out" in (home / "runs/soft/2/report.html").read_text()


def test_layers_lists_exactly_what_scan_takes(home, call):
    both = ("own.py:build_both", "--output", "-1")
    for network, prefix in ((["neighbour.py:build"], ""), (both, "own.")):
        code, out, _ = call("layers", *network)
        layers = [f"{prefix}{k}" for k in (0, 2, 6)]
        assert (code, [line.split()[0] for line in out.splitlines()[1:]]) == (0, layers)
    options = ("--model", *both, "--layer", "*", "--data", "data/val", "--out", "both")
    assert "Scanned 30 images" in call("scan", *options)[1]
    both = (home / "both").iterdir()
    assert sorted(path.name for path in both if path.is_dir()) == layers
    code, _, err = call("find", "both")
    assert (code, "several scans: own.0" in err) == (1, True), err


def test_layers_of_a_network_for_signals_are_listed_by_their_data(home, call):
    lines = ("import torch", "from torch import nn", "from torch.utils.data import TensorDataset")
    lines += ("def build():", "    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(1))")
    lines += ("def data():", "    return TensorDataset(torch.randn(3, 2, 9), torch.arange(3))")
    (home / "signals.py").write_text("\n".join(lines))
    code, out, err = call("layers", "signals.py:build", "--data", "signals.py:data")
    assert (code, [line.split()[0] for line in out.splitlines()]) == (0, ["layer", "0"]), err
    code, _, err = call("layers", "signals.py:build")
    assert (code, "or give it images of its own by --data" in err) == (1, True), err


def scan(**changed):
    """The arguments of a scan of validation images, but for some."""
    options = dict(zip(NETWORK[::2], NETWORK[1::2], strict=True))
    options |= {"--data": "data/val", "--out": "mistake"}
    options |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ("scan", *(word for pair in options.items() for word in pair))


def test_several_scans_are_read_as_one(home, call):
    common = ("--model", "own.py:build", "--layer", "2", "--data")
    for k, file in enumerate(sorted((home / "data" / "train").rglob("*.*"))):
        to = home / "parts" / "xy"[k % 2] / file.relative_to(home / "data" / "train")
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    both = ["parts/scan-x", "parts/scan-y"]
    for out in both:
        assert call("scan", *common, f"parts/{out[-1]}", "--out", out)[0] == 0
    code, told, _ = call("find", *both, *LOOSE)
    assert code == 0
    assert call("find", "parts/scan-*", *LOOSE)[:2] == (0, told)
    assert call("find", *reversed(both), *LOOSE, "--out", "parts/a.csv")[:2] == (0, told)
    assert call("sensitivity", *both)[0] == 0
    other = ("--model", "own.py:build", "--layer", "0", "--data", "parts/y", "--out", "parts/other")
    assert call("scan", *other)[0] == 0
    code, _, err = call("find", both[0], "parts/other")
    assert (code, "with a difference in the layer; name scans" in err) == (1, True), err
    code, _, err = call("find", "parts/none-*")
    assert (code, "No folder fits parts/none-*" in err) == (1, True), err


FIND = ("find", "runs/a/scan-train")
EARLY = (*RUN, "--out", "mistake")
PUBLISHED = ("--method", "published", "--out", "x")
INTO = {  # what a step would overwrite
    "findings.csv": FIND,
    "split.safetensors": ("split", "runs/a/scan-train"),
    "scan-val/shard-000000.safetensors": ("split", "runs/a/scan-train"),
    "evaluation.json": ("evaluate", "x", "runs/a/scan-val"),
    "scan-val/manifest.json": ("sensitivity", "runs/a/scan-train"),
}
# Each with a network that is not there either, so it is told before that is looked for.
NO_NETWORK = ("--model", "gone.py:build", "--layer", "2")
AMONG = [
    ("run", *NO_NETWORK, "--data", "data", "--out", "data/val"),
    ("run", *NO_NETWORK, "--data", "flat/train", "--out", "flat/train"),
    ("scan", *NO_NETWORK, "--data", "data/val", "--out", "data/val/ant/scan"),
]
OUT_OF_RANGE = [  # of data that is not there either
    ((command, *NO_NETWORK, "--data", "gone", "--out", "mistake", *option), told)
    for commands, option, told in [
        (("run",), ("--tau", "3"), "tau is 3; a share must"),
        (("run",), ("--tau", "0.001"), "keeps no share below 0.005; raise tau."),
        (("run",), ("--p", "75"), "p is 75; a fraction"),
        (("run",), ("--gamma", "2"), "gamma is 2; a cosine"),
        (("run",), ("--rho", "2"), "rho is 2; it must"),
        (("run", "scan"), ("--places", "-1"), "places is -1; give"),
        (("run", "scan"), ("--batch-size", "0"), "--batch-size is 0; give"),
        (("run", "scan"), ("--workers", "-1"), "workers is -1; give"),
        (("scan",), ("--min-share", "2"), "--min-share is 2.0; it must"),
    ]
    for command in commands
] + [
    (("find", "gone", "--gamma", "2"), "gamma is 2; a cosine"),
    (("split", "gone", "--p", "2", "--out", "mistake"), "p is 2; a fraction"),
]
ABSENT = [
    (("run", *NO_NETWORK, "--data", data, "--out", "mistake"), what)
    for data, what in [("nowhere", "nowhere"), ("x.csv", "x.csv"), ("x.py:data", "x.py")]
] + [
    (("scan", *NO_NETWORK, "--data", "data/nowhere", "--out", "mistake"), "data/nowhere"),
    (("layers", "gone.py:build", "--data", "nowhere"), "nowhere"),
    (("reproduce", "--imagenet", "nowhere", "--out", "mistake"), "nowhere/train"),
]
PICTURE = "data/val/ant/0.png"
EXPLAIN = ("explain", "runs/a", PICTURE)
MISTAKES = [  # arguments, exit code, and what the sentence, or a box about usage, says
    (("run", "--layer", "2"), 2, "--model is missing; unbraid run --help"),
    (("run", "--layer"), 2, "--layer requires an argument"),
    ((*EARLY, "--concepts", "cluster"), 2, "--concepts"),
    (("layers", "syntax.py:build"), 2, "SyntaxError"),
    (
        ("layers", "ends.py:build"),
        2,
        "build ended Python by sys.exit(3), raised in ends.py",
    ),
    (("layers", "ends.py:build_late"), 1, "Code of your own ended Python by sys.exit()"),
    (scan(device="gpu"), 2, "Device 'gpu' is none that torch knows; leave --device out"),
    (("find", "nowhere"), 1, "holds no scan"),
    ((*FIND, "--tau", "0"), 2, "tau"),
    ((*FIND, "--tau", "1e-4"), 2, "scan again with a smaller --min-share."),
    (
        ("split", *FIND[1:], *LOOSE, *PUBLISHED),
        2,
        "with --positions and pass that scan, or give --",
    ),
    (("split", *FIND[1:], *LOOSE, "--rho", ".5", "--out", "x"), 2, "pass --method published with"),
    *(((*step, "--out", f"runs/a/{name}"), 2, "name another file") for name, step in INTO.items()),
    (("run", *NETWORK[:2], *NETWORK[4:], "--data", "data", "--out", "runs/a"), 1, "'s weights"),
    ((*RUN, "--labels", "predicted", "--out", "runs/a"), 1, "labels are given or predicted"),
    ((*EARLY, "--encoder", "timm:resnet17"), 2, "Did you mean"),
    ((*RUN[:-1], "no-val", "--out", "mistake"), 1, "no-val/val holds no image"),
    ((*RUN, "--out", "theirs"), 1, "theirs/settings.json"),
    ((*RUN[:-1], "many", "--out", "mistake"), 1, "a class needs two images"),
    ((*RUN[:-1], "one-class", "--out", "mistake"), 2, "needs two; take --concepts clusters."),
    *((into, 2, "lies among the images of") for into in AMONG),
    *((late, 2, told) for late, told in OUT_OF_RANGE),
    *((absent, 1, f"There is nothing at {what}; name a") for absent, what in ABSENT),
    ((*EARLY, "--quick=3"), 2, "--quick"),
    (scan(weights="nan.safetensors"), 1, "NaN or infinite"),
    (scan(data="many"), 1, "4 classes but the network has 3 outputs"),
    (scan(data="wrong.csv"), 1, "wrong.csv"),
    (scan(data="flat/val", classes="0"), 2, "classes names [0]"),
    (scan(out="own.py"), 2, "is a file"),
    (scan(names="syntax.py"), 1, "names outputs 0 to 0"),
    ((*scan()[:-2], "--out="), 2, "--out is empty"),
    (EXPLAIN[:2], 2, "IMAGES is missing"),
    ((*EXPLAIN[:2], "data", *NETWORK[:2]), 2, "explain takes pictures, and data is a folder"),
    (EXPLAIN, 2, "own.py:build, which runs only if you name it; add --model own.py:build."),
    (("explain", "runs", PICTURE), 1, "runs holds no finished run"),
    ((*EXPLAIN[:2], "gone.png", *NETWORK[:2]), 1, "gone.png cannot be read (there is no such"),
    ((*EXPLAIN, "junk/ant/a.png", *NETWORK[:2]), 1, "a.png cannot be read"),
    ((*EXPLAIN, *NETWORK[:2], "--weights", "random"), 1, "a network with other weights"),
    (
        (*EXPLAIN, *NETWORK[:2], "--classes", "art"),
        2,
        "There is no class 'art'; name one of the network's. Did you",
    ),
    ((*EXPLAIN, *NETWORK[:2], "--out", "runs/a"), 2, "holds a run or scan; name another folder"),
    ((*EXPLAIN, *NETWORK[:2], "--n", "0"), 2, "n is 0"),
    (("circuit", "runs/a"), 2, "--channel is missing; unbraid circuit --help"),
    (("circuit", "runs", "--channel", "0"), 1, "runs holds no finished run"),
    (("circuit", "runs/a", "--channel", "77"), 2, "Channel 77 was not split; those that were"),
    (("circuit", "runs/a", "--channel", "x"), 2, "--channel"),
]


@pytest.mark.parametrize(("arguments", "code", "told"), MISTAKES, ids=str)
def test_mistake_is_told_in_a_sentence_and_leaves_nothing(ran, home, call, arguments, code, told):
    before = [*home.iterdir(), contents(home / "runs/a")]
    got, _, err = call(*arguments)
    assert got == code, err
    assert told in " ".join(err.split())
    assert [*home.iterdir(), contents(home / "runs/a")] == before
    assert (home / "theirs/settings.json").read_text() == "{}"


def relative(folder):
    return {path.relative_to(folder).as_posix(): own for path, own in contents(folder).items()}


def without_command(folder):
    """The same, but for the command that made the run, which names another folder."""
    files = relative(folder)
    settings = json.loads(files["settings.json"])
    assert "run" in settings["source"].pop("command")
    return files | {"settings.json": settings}


@pytest.mark.parametrize("n_written", [0, 1, 2, 4, 7, 12, 18, 21, 22])
def test_a_run_stopped_by_ctrl_c_goes_on_to_the_same_bytes(n_written, ran, home, call, tmp_path):
    """Before any file gets its name: a list, a manifest, a shard, results, the page."""
    written, real = [], files._write

    def write_or_stop(path, *how):
        if len(written) == n_written:
            raise KeyboardInterrupt
        written.append(path.name)
        real(path, *how)

    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write", write_or_stop)
        code, _, err = call(*RUN, "--out", str(out), *LOOSE)
    assert (code, "Stopped; start the same command again" in err) == (130, True)
    assert out.exists() == (n_written > 2)  # before a scan begins nothing is left
    assert not list(tmp_path.rglob("*.before"))
    assert call(*RUN, "--out", str(out), *LOOSE)[0] == 0
    assert without_command(out) == without_command(home / "runs/a")
    before = relative(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_write", write_or_stop)
        n_written = len(written) + 1
        assert call(*RUN, "--out", str(out), *LOOSE)[0] == 130
    assert relative(out) == before


def test_a_finished_scan_is_told_where_nothing_can_be_written(home, call, monkeypatch):
    assert call(*scan(out="finished"))[0] == 0
    before = contents(home / "finished")

    def refuse(path, *_):
        raise RunError(f"{path} cannot be written (Read-only file system).")

    monkeypatch.setattr(files, "_write", refuse)
    monkeypatch.setattr(kept.os, "access", lambda path, _: Path(path) != Path("finished"))
    code, out, err = call(*scan(out="finished"))
    assert (code, "Scanned 30 images into finished" in out) == (0, True), err
    code, _, err = call(*scan(data="data/train", out="finished"))
    assert (code, "difference in the images or labels" in " ".join(err.split())) == (1, True)
    code, _, err = call(*scan(out="not-there"))
    assert (code, "cannot be written" in err) == (1, True)
    assert contents(home / "finished") == before


def test_sensitivity_fits_the_terminal(ran, call, monkeypatch):
    monkeypatch.setattr(shared, "get_terminal_size", lambda: os.terminal_size((40, 20)))
    monkeypatch.setattr(shared, "sys", Mock(stdout=Mock(isatty=lambda: True)))
    code, out, _ = call("sensitivity", "runs/a/scan-train")
    assert (code, max(map(len, out.splitlines())) <= 40) == (0, True)
    assert {"gamma 0.3", "gamma 0.7"} <= set(re.findall("gamma 0..", out))


def test_broken_image_is_named_or_skipped_and_listed(home, call):
    code, _, err = call(*scan(data="half", out="s[/x]", layer="0"))
    assert (code, "half/ant/a.png" in err, "or leave it out with --skip-broken." in err) == (
        1,
        True,
        True,
    )
    code, out, err = call(*scan(data="half", out="s[/x]"), "--skip-broken")  # the folder is free
    assert (code, "Left out 1 image that" in err, "half/ant/a.png" in err) == (0, True, True)
    assert "s[/x]" in out  # what looks like markup is only a name
    code, _, err = call(*scan(data="junk", out="junk-scan"), "--skip-broken")
    assert (code, "None of the 1 images" in err) == (1, True)


def test_explain_tells_of_pictures_with_any_name_and_writes_where_it_should(again, home, call):
    hostile = home / "hostile"
    hostile.mkdir()
    names = ["..png", "-n.png", "<b onload=x>&\n\x1b[31m.png", b"\xff\xe2\x80\xae.png", "0.png"]
    for name in map(os.fsdecode, names):
        shutil.copy(home / PICTURE, hostile / name)
    pictures = [PICTURE, *(str(hostile / os.fsdecode(name)) for name in names)]
    before = contents(again)
    code, out, err = call("explain", str(again), *pictures, *NETWORK[:2], "--classes", "bee", "2")
    assert code == 0, err
    assert out.count("concept  response") == len(pictures)
    assert ("\x1b" in out, "\u202e" in out) == (False, False)
    made = {path.name for path in (again / "explained").iterdir()}
    stems = ["0", "image", "n", "b onload=x_&_[31m", "image~2", "0~2"]
    assert made == {f"{stem}{ending}" for stem in stems for ending in (".png", ".json")}
    for stem in stems:
        about = json.loads((again / "explained" / f"{stem}.json").read_text())
        assert {"bee", "cat"} <= set(about["class_names"])
        assert Image.open(again / "explained" / f"{stem}.png").width > 500
    now = contents(again)
    assert {path: now[path] for path in before} == before
    assert call("check", str(again))[0] == 0
    options = ("--out", str(again / "other"), *NETWORK[:2])
    assert call("explain", str(again), PICTURE, *options)[0] == 0
    assert len(list((again / "other").iterdir())) == 2


def test_explain_tells_of_a_split_that_is_damaged_or_of_an_earlier_version(again, call):
    command = ("explain", str(again), PICTURE, *NETWORK[:2])
    path = again / "split.safetensors"
    tensors, about = read_tensors(path)
    old = {name: tensor for name, tensor in tensors.items() if not name.startswith("quantiles")}
    assert len(old) < len(tensors)
    write_tensors(path, old, about)
    code, out, _ = call(*command)
    assert (code, "percentiles are unknown" in " ".join(out.split())) == (0, True)
    for wrong in (lambda x: -x, lambda x: x[:-1], lambda x: x * float("nan")):
        bent = {n: wrong(t) if n.startswith("quantiles") else t for n, t in tensors.items()}
        write_tensors(path, bent, about)
        code, _, err = call(*command)
        assert (code, "is not a split that can be read" in err) == (1, True)
    path.unlink()
    code, _, err = call(*command)
    assert (code, "holds no split" in err) == (1, True)


def test_explain_loads_networks_that_a_folder_names_unless_they_are_code(again, call):
    settings = json.loads((again / "settings.json").read_text())
    for source, code, told in (
        ({"model": "torchvision:resnet18", "weights": "random"}, 2, "no layer '2'"),
        ({"model": "torchvision:resnet0"}, 2, "Did you mean"),
        ({"model": 7}, 1, "does not say in words which network"),
        ({}, 2, "name it with --model"),
    ):
        (again / "settings.json").write_text(json.dumps({**settings, "source": source}))
        got, _, err = call("explain", str(again), PICTURE)
        assert (got, told in " ".join(err.split())) == (code, True), err


def test_report_whose_images_are_gone_stays_as_it_is(again, home, call):
    page = (again / "report.html").read_bytes()
    (home / "data").rename(home / "moved")
    code, _, err = call("report", str(again))
    (home / "moved").rename(home / "data")
    assert (code, "unbraid: " in err) == (1, True)
    assert (again / "report.html").read_bytes() == page


def test_run_of_a_folder_without_classes_from_scan_to_report(home, call):
    clusters = ("--concepts", "clusters", "--gamma", "0.95", "--no-features")
    code, out, err = call(*RUN[:-1], "flat", "--out", "runs/flat", *clusters)
    assert code == 0, err
    assert "flat/train holds images without class folders; the network's predictions" in err
    assert "of clusters in" in out.splitlines()[0]
    assert "Largest logit difference 0." in out
    folder = home / "runs/flat"
    for name in ("scan-train", "scan-val", "positions-train", "positions-val"):
        assert unbraid.open_scan(folder / name).manifest.labels == "predicted"
    found = unbraid.find(unbraid.open_scan(folder / "scan-train"), concepts="clusters", gamma=0.95)
    split = unbraid.Split.load(folder / "split.safetensors")
    assert {c.channel: c.concepts for c in split.channels} == found.concepts != {}
    assert set(split.clusters) == set(found.clusters)
    output = evaluation_in(folder)["output"]
    assert output == {**output, "max_abs_logit_diff": 0, "top1_before": None, "top1_after": None}
    rows = list(csv.DictReader((folder / "findings.csv").open()))
    assert [int(row["class1"]) for row in rows] == [pair.class1 for pair in found.pairs]
    assert not (folder / "sensitivity.csv").exists()  # which is of classes
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert call("report", str(folder))[0] == 0
    assert (folder / "report.html").read_bytes() == before
    assert b"Other thresholds" not in before


@pytest.mark.parametrize(
    ("source", "kind"), [("data/train", "classes"), ("flat/train", "clusters")]
)
def test_run_divides_a_folder_that_is_not_divided(source, kind, home, call, monkeypatch):
    monkeypatch.setitem(sample.SIZES, "train", 16)
    monkeypatch.setitem(sample.SIZES, "val", 16)
    monkeypatch.setattr(scanning, "images_per_shard", lambda positions: 16)
    folder = f"runs/{kind}"
    options = (*RUN[:-1], source, "--out", folder, "--p", "0.5", "--gamma", "0.95", "--no-features")
    code, out, err = call(*options, "--quick")
    assert code == 0, err
    told = re.search(rf"{source} has no train and val, so (\d+) of its (\d+) images .*ids\.", err)
    n_val, n_all = map(int, told.groups())
    assert ("Concepts are clusters of images" in err) == (kind == "clusters")
    look = re.search(r"^First look at (.*): .* The full run: (.*)$", out, re.MULTILINE)
    assert (
        look[1]
        == f"16 of {n_all - n_val} training and {min(n_val, 16)} of {n_val} validation images"
    )
    assert look[2].split() == ["unbraid", *options]
    assert f"Report: {folder}/quick/report.html" in out
    page = (home / folder / "quick/report.html").read_text()
    assert html.escape(told[0]) in page
    assert html.escape(look[0]) in page
    for name in ("scan-train", "scan-val"):
        manifest = unbraid.open_scan(home / folder / "quick" / name).manifest
        assert manifest.source["divided"] == told[0]
        assert manifest.labels == ("given" if kind == "classes" else "predicted")
    assert (
        json.loads((home / folder / "quick/settings.json").read_text())["thresholds"]["concepts"]
        == kind
    )
    assert call("report", f"{folder}/quick")[0] == 0
    assert (home / folder / "quick/report.html").read_text() == page
    scanned = call(*scan(data=f"{source}/val", out=f"{folder}/alone"))
    assert f"Scanned {n_val} images" in scanned[1]
    assert told[0] in " ".join(scanned[2].split())


def test_reproduce_tells_that_another_network_has_none_of_the_published_pairs(home, call):
    options = ("--weights", "random", "--out", "published")
    code, out, _ = call("reproduce", "--imagenet", "data", *options)
    assert (code, "0 of 20 pairs agree." in out) == (1, True)


def test_importing_is_light_and_every_public_name_is_there_and_is_no_module():
    python = partial(subprocess.run, capture_output=True, text=True, check=True)
    for statement in ("import unbraid", "import unbraid.cli"):
        code = f"import sys; {statement}; print('torch' in sys.modules)"
        assert python([sys.executable, "-c", code]).stdout.strip() == "False"
    late = ["run", *NO_NETWORK, "--data", "gone", "--out", "mistake", "--tau", "3"]
    code = (
        "import sys; from unbraid.__main__ import main\n"
        f"sys.argv[1:] = {late}\n"
        "try: main()\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)"
    )
    assert python([sys.executable, "-c", code]).stdout.split() == ["2", "False"]
    code = (
        "import json, types, unbraid, unbraid.cli, unbraid.running.run\n"
        "names = {n: getattr(unbraid, n) for n in unbraid.__all__}\n"
        "print(json.dumps([n for n, v in names.items() if isinstance(v, types.ModuleType)]))"
    )
    assert json.loads(python([sys.executable, "-c", code]).stdout) == []
    contract = {"scan", "open_scan", "find", "split", "apply", "evaluate", "report"}
    assert contract | {"compare_outputs", "Split"} <= set(unbraid.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        unbraid.nonsense  # noqa: B018
