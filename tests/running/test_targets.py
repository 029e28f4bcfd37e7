"""Every command on a run with each kind of target: it works, or says in one sentence why not."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unbraid
from unbraid.base.errors import UnbraidError
from unbraid.cli import app
from unbraid.exploring.explorer import open_explorer
from unbraid.exploring.opened import open_run
from unbraid.images.open import open_images
from unbraid.running import run as running
from unbraid.running.finished import Run
from unbraid.running.folders import Thresholds
from unbraid.scanning.scan_options import Loading

pytestmark = pytest.mark.filterwarnings("ignore:The target", "ignore:.*no train and val")
COLOURS = ("blue", "green", 'red "<i>\n\U0001f534')
NETWORK = '''
import numpy, torch
from torch import nn

def preprocess(picture):
    return torch.from_numpy(numpy.asarray(picture, dtype=numpy.float32)).movedim(2, 0) / 255

class Network(nn.Module):
    """Four inputs see each colour; channel 0 of the layer answers to red and to blue."""

    def __init__(self, put_out):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.layer = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 4, 1)
        self.head, self.put_out = nn.Conv2d(4, 3, 1), put_out
        with torch.no_grad():
            colour = torch.eye(3).repeat_interleave(4, 0)[..., None, None]
            self.stem.weight.mul_(0.2).add_(colour * torch.rand(12, 3, 3, 3)).sub_(0.05)
            own = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
            self.layer.weight.copy_(own.repeat_interleave(4, 1)[..., None, None] + 0.05)
            self.head.weight.copy_(torch.tensor(
                [[0.6, 0, 0.0, 0.4], [0, 0.4, 0, 0], [0.5, 0, 0.5, 0]])[..., None, None])

    def forward(self, x):
        return self.put_out(self.head(self.layer(self.stem(x).relu()).relu()))

def mean(maps):
    return maps.mean((2, 3))

def boxes(maps):
    found = []
    for own in maps:
        rows = own.flatten(1).T
        found.append({"boxes": rows[:, [0, 1, 2, 0]], "labels": torch.arange(len(rows)) % 2,
                      "scores": rows[:, 0]})
    return found

def logits():
    return Network(mean).eval(), preprocess, NAMES
def maps():
    return Network(lambda maps: {"out": maps[:, :2]}).eval(), preprocess
def detector():
    return Network(boxes).eval(), preprocess
def encoder():
    return Network(mean).eval(), preprocess
'''
# The network, and what is asked for beside the target.
KINDS = {
    "label": ("logits", []),
    "multilabel": ("logits", []),
    "segmentation:0": ("maps", []),
    "detection:1": ("detector", []),
    "regression:0": ("encoder", []),
    "embedding:one.npy": ("encoder", []),
    "embedding:each.npy": ("encoder", []),
    "none": ("encoder", []),
    "a function": ("encoder", []),
}
NO_CLASSES = "The page of an edit counts classes, and the run's target"
NO_ACCURACY = "Suggestions go by accuracy, and with the target"
REFUSED = {  # by command, what it says for which targets
    "explain": {
        "none": "With the target 'none' there is no relevance to tell",
        "embedding:each.npy": "no class to compare images with",
        "a function": "is not in its folder; give it to unbraid.explain in Python",
    },
    "edit": {kind: NO_CLASSES for kind in KINDS if kind != "label"},
    "suggest": {
        **{kind: NO_ACCURACY for kind in KINDS if kind != "label"},
        "none": "switched nothing off, as it has no target",
    },
}


def paint(file, n, colour):
    """Noise with one colour brighter in places."""
    pixels = np.random.default_rng(n).integers(0, 60, (8, 8, 3))
    for one in colour:
        own = np.random.default_rng(1000 * one + n).integers(120, 255, (4, 8))
        pixels[:4, :, one] = own
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Pictures in class folders, a list of several labels, vectors, and the networks."""
    home = tmp_path_factory.mktemp("home")
    (home / "own.py").write_text(f"NAMES = {COLOURS!r}\n{NETWORK}", encoding="utf-8")
    np.save(home / "one.npy", np.float32([1, 0, 1]))
    np.save(home / "each.npy", np.float32([[1, 0, 0.9], [0, 1, 0], [0.9, 0, 1]]))
    for part, n_each in (("train", 40), ("val", 12)):
        lines = ["path,label"]
        for label, name in enumerate(COLOURS):
            for k in range(n_each):
                n = k + (500 if part == "val" else 0)
                paint(home / "data" / part / name / f"{k}.png", n, [2 - label])
                more = [label, 1][: 1 + (k % 4 == 0 and label != 1)]
                paint(home / "list" / part / f"{label}-{k}.png", n, [2 - one for one in more])
                names = [COLOURS[one].replace('"', '""') for one in more]
                lines += [f'{part}/{label}-{k}.png,"{name}"' for name in names]
        (home / "list" / f"{part}.csv").write_text("\n".join(lines), encoding="utf-8")
    return home


def command(*words):
    return app([*map(str, words)], exit_on_error=False, result_action="return_value")


def make(home, target):
    """A run with a target, by the command; of a function in Python."""
    network, out = KINDS[target][0], home / "runs" / re.sub(r"\W", "-", target)
    model = f"{home / 'own.py'}:{network}"
    if target == "a function":
        thresholds = Thresholds(0.02, 0.5, 0.7)
        asked = {"features": False, "say": lambda _: None, "title": "own"}
        asked |= {"thresholds": thresholds, "loading": Loading(), "source": {}}
        loaded = unbraid.networks.models.load_model(model, None, None)
        train = open_images(home / "data/train", loaded.transform)
        val = open_images(home / "data/val", loaded.transform)
        source = {"model": model, "data": str(home / "data")}
        asked |= {"source": source, "target": own_score}
        running.run(loaded.model, "layer", train, val, out, **asked)
        return out, model
    told = f"embedding:{home / target.partition(':')[2]}" if "embedding" in target else target
    thresholds = ["--tau", 0.02, "--p", 0.5] if target != "none" else []
    command(
        *("run", "--model", model, "--layer", "layer", "--target", told, "--out", out),
        *("--data", home / ("list" if target == "multilabel" else "data"), "--gamma", 0.7),
        *("--no-features", "--no-quick", *thresholds),
    )
    return out, model


def own_score(output):
    return output[:, 0] - output[:, 1] / 2


@pytest.fixture(scope="module", params=KINDS)
def made(request, home):
    out, model = make(home, request.param)
    return request.param, out, model


def test_every_command_works_on_a_run_of_any_target_or_says_why_not(made, home, tmp_path):
    target, folder, model = made
    run = Run(folder)
    channel = run.split.channels[0]
    assert channel.channel == 0
    assert len(channel.concepts) >= 2
    picture = home / "data/val" / COLOURS[0] / "0.png"
    own = ("--model", model)
    commands = {
        "explain": (folder, picture, *own, "--out", tmp_path / "explained"),
        "edit": (folder, "--off", "0.0", *own, "--out", tmp_path / "edited"),
        "suggest": (folder,),
        "circuit": (folder, "--channel", 0, *own),
        "figure": (folder, "--channel", 0, "--out", tmp_path / "figure.png"),
        "report": (folder,),
        "share": (folder, "--out", tmp_path / "shared"),
        "check": (folder,),
    }
    for name, words in commands.items():
        sentence = REFUSED.get(name, {}).get(target)
        if sentence is None:
            assert not command(name, *words)
            continue
        with pytest.raises(UnbraidError) as error:
            command(name, *words)
        assert sentence in str(error.value)
        assert re.fullmatch(r"[^\n]+\.", str(error.value))
        assert not (tmp_path / "edited").exists()
    assert unbraid.load_split(run_network(model), tmp_path / "shared")


def run_network(model):
    return unbraid.networks.models.load_model(model, None, None).model


def test_the_app_opens_a_run_of_any_target(made):
    target, folder, model = made
    opened = open_run(folder, model=model)
    explorer = open_explorer(opened, None)
    assert explorer.overview()["explains"] == (target not in REFUSED["explain"])
    told = [words for words in opened.missing if words.startswith("No picture can be explained")]
    assert len(told) == (target in REFUSED["explain"])
    if told:
        assert (
            REFUSED["explain"][target]
            .partition("; give")[0]
            .removeprefix("With the target 'none' ")
            in told[0]
        )
    else:
        view = explorer.explain("run", "val/3", None)
        assert view["rows"]
    assert explorer.channel("run", 0)["shots"]


def test_a_run_says_its_target_and_measures_what_there_is(made):
    target, folder, _ = made
    run, page = Run(folder), (folder / "report.html").read_text()
    told = json.loads((folder / "evaluation.json").read_text())
    assert (told["ablation"] is None) == (target == "none")
    assert ("accuracy" in page) == (target == "label")
    assert run.evaluation.output.max_abs_logit_diff == 0
    assert Path(run.page).exists()
