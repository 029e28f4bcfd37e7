"""The command line as a new user meets it: whole jobs on small folders, and every mistake."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import unbraid
from unbraid import cli
from unbraid.measuring.encoders import TimmEncoder, load_encoder

Call = Callable[..., tuple[int, str, str]]

CLASSES = ("ant", "bee", "cat")

OWN = """
import numpy as np
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )
    return net, preprocess


def preprocess(picture):
    pixels = np.asarray(picture.resize((12, 12)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255
"""


MIXED = """
import torch
from torch import nn

from own import preprocess


class Pads(nn.Conv2d):
    def forward(self, x):
        return super().forward(nn.functional.pad(x, (1, 0, 1, 0)))


class Scales(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.pads = Pads(6, 6, 2)
        self.scales = Scales(6, 6, 1)
        self.unused = nn.Linear(6, 6)
        self.aside = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.scales(self.pads(self.depthwise(self.stem(x)).relu_()).relu_()).flatten(2).mean(2)
        return {"features": self.aside(x), "scores": self.head(x)}


def build():
    torch.manual_seed(0)
    return Mixed(), preprocess
"""


FAILS = """

class Fails(nn.Sequential):
    def forward(self, x):
        assert x.shape[2] == 999


def build_failing():
    network, prepare = build()
    return Fails(*network), prepare
"""
SOFT = OWN.replace("nn.Linear(6, 3),", "nn.Linear(6, 3), nn.LogSoftmax(1),")
SLOW = (
    OWN.replace("def preprocess(picture):", "def preprocess(picture):\n    wait()")
    + """

def wait():
    import time
    time.sleep(0.2)
"""
)
FILES = {
    "own.py": OWN,
    "mixed.py": MIXED,
    "fails.py": OWN + FAILS,
    "soft.py": SOFT,
    "slow.py": SLOW,
    "neighbour.py": "from own import build\n",
    "syntax.py": "def build(:",
    "divides.py": "def build():\n    return 1 / 0",
    "wrong.csv": "path,label\ndata/val/ant/none.png,ant\n",
    "wrong.tar": "no tar",
    "junk.pt": "hello this is junk",
    "junk/ant/a.png": "no picture",
    "half/ant/a.png": "no picture",
    "theirs/settings.json": "{}",
    "text/notes/a.txt": "no image",
}


def draw(label: int, seed: int) -> Image.Image:
    """A picture of stripes whose direction and colour tell the class."""
    noise = np.random.default_rng(seed).integers(0, 60, (16, 16, 3))
    y, x = np.mgrid[:16, :16]
    stripes = [(x % 4 < 2), (y % 4 < 2), ((x + y) % 6 < 3)][label]
    pixels = noise.copy()
    pixels[..., label] += 180 * stripes
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with networks of one's own, images by class, and much that fails."""
    home = tmp_path_factory.mktemp("home")
    for name, text in FILES.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    kinds = ["png", "jpg", "webp"]
    for part, n in (("train", 20), ("val", 10)):
        for label, name in enumerate(CLASSES):
            (home / "data" / part / name).mkdir(parents=True)
            for k in range(n):
                file = home / "data" / part / name / f"{k}.{kinds[k % 3]}"
                draw(label, 1000 * n + 10 * k + label).save(file)
    for folder in ("half/ant", "no-val/train", *(f"many/{name}" for name in "abcd")):
        (home / folder).mkdir(parents=True, exist_ok=True)
        draw(0, 1).save(home / folder / "b.png")
    for folder in ("nothing/train", "no-val/val"):
        (home / folder).mkdir(parents=True)
    for name in ("n01440764", "n01443537"):
        (home / "imagenet/train" / name).mkdir(parents=True)
        draw(0, 1).save(home / "imagenet/train" / name / "a.png")
    namespace: dict[str, object] = {}
    exec(OWN, namespace)
    network, preprocess = namespace["build"]()  # type: ignore[operator]
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
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command line in `home`: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["unbraid", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


NETWORK = ("--model", "own.py:build", "--weights", "weights.safetensors", "--layer", "2")
LOOSE = ("--tau", "0.02", "--p", "0.5", "--gamma", "0.95")
RUN = ("run", *NETWORK, "--data", "data")
STRICT = ("--tau", "0.9", "--p", "1", "--gamma", "-1")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_sentence(err: str) -> None:
    """An error is told in a line of words."""
    (told,) = [line for line in err.splitlines() if line.startswith("unbraid: ")]
    assert told.rstrip().endswith((".", "?"))


def assert_report_again(call: Call, folder: Path) -> str:
    """The report is written again to the last byte; its text."""
    page = folder / "report.html"
    before = page.read_bytes()
    page.unlink()
    code, out, err = call("report", str(folder))
    assert (code, "report.html" in out) == (0, True), err
    assert page.read_bytes() == before
    return before.decode()


@pytest.fixture(scope="module")
def ran(home: Path) -> subprocess.CompletedProcess[str]:
    """A finished run, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "unbraid", *RUN, "--out", "runs/a", *LOOSE],
        **{"capture_output": True, "text": True, "cwd": home, "check": False},
    )


@pytest.fixture
def again(ran, home: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(home / "runs/a", tmp_path / "again"))


# --- whole jobs -----------------------------------------------------------------------------------


def test_run_does_everything(ran, home: Path) -> None:
    assert ran.returncode == 0, ran.stderr
    assert "runs/a/report.html" in ran.stdout
    assert "Largest logit difference 0;" in ran.stdout
    assert "Visualising channels and concept channels." in ran.stdout + ran.stderr
    folder = home / "runs/a"
    left = {path.name for path in folder.iterdir()}
    assert {"scan-train", "scan-val", "findings.csv", "split.safetensors"} <= left
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["output"]["max_abs_logit_diff"] == 0
    assert evaluation["output"]["top1_before"] > 0.9
    assert set(evaluation["summary"]) == {"least_squares", "published"}
    rows = list(csv.DictReader((folder / "findings.csv").open()))
    found = {int(row["channel"]) for row in rows}
    assert {channel["channel"] for channel in evaluation["channels"]} == found != set()
    assert {name for row in rows for name in (row["name1"], row["name2"])} <= set(CLASSES)
    for channel in evaluation["channels"]:
        seen = channel["semantics"]
        assert seen["encoder"] == "the network's own penultimate layer"
        assert seen["n_images"] == 30
        assert len(seen["concepts"]) == len(channel["concepts"])
        assert all(-1 <= like["clarity"] <= 1 for like in seen["concepts"])
    counted = unbraid.find(unbraid.open_scan(folder / "scan-train"), tau=0.02, p=0.5, gamma=0.95)
    (own,) = (
        row
        for row in csv.DictReader((folder / "sensitivity.csv").open())
        if (float(row["tau"]), float(row["p"]), float(row["gamma"])) == (0.02, 0.5, 0.95)
    )
    assert int(own["n_channels"]) == len(counted.concepts)
    assert int(own["n_pairs"]) == len(counted) > 0


def test_run_with_other_thresholds_goes_beside_the_first_or_when_asked_in_its_place(
    again: Path, call: Call
) -> None:
    before = contents(again)
    code, out, err = call(*RUN, "--out", str(again), *STRICT)
    assert (code, "0 pairs" in out) == (0, True)
    told = f"{again} holds a run with tau 0.02, p 0.5, gamma 0.95; this one goes into "
    assert f"{told}{again}/settings-2." in err
    assert f"{again}/settings-2/report.html" in out
    after = contents(again)
    assert {path: after[path] for path in before} == before
    assert call(*RUN, "--out", str(again), "--overwrite", "--tau", "1.03")[0] == 2  # a slip
    assert contents(again) == after
    code, out, err = call(*RUN, "--out", str(again), "--overwrite", *STRICT[:-1], "-0.9")
    assert (code, "takes its place when it is finished" in err) == (0, True), err
    assert f"Report: {again}/report.html" in out
    assert json.loads((again / "settings.json").read_text())["thresholds"]["gamma"] == -0.9


def test_run_again_scans_nothing_and_leaves_features_out_when_asked(
    again: Path, call: Call
) -> None:
    names = ("scan-train/shard-000000.safetensors", "positions-val/shard-000000.safetensors")
    before = [(again / name).stat().st_mtime_ns for name in names]
    evaluation = (again / "evaluation.json").read_bytes()
    shutil.rmtree(again / "features")
    code, out, err = call(*RUN, "--out", str(again), *LOOSE, "--no-features")
    assert (code, "Visualising" in out + err) == (0, False)
    assert not (again / "features").exists()
    assert [(again / name).stat().st_mtime_ns for name in names] == before
    assert (again / "evaluation.json").read_bytes() == evaluation
    assert_report_again(call, again)


def test_check_tells_what_a_run_holds_and_what_is_damaged(again: Path, call: Call) -> None:
    code, out, _ = call("check", str(again))
    assert code == 0
    listed = out.splitlines()
    assert listed[0].startswith(f"{again}: a run with tau 0.02, p 0.5, gamma 0.95; ")
    assert f"{again}/scan-train: a scan of layer 2, 60 images, finished." in listed
    assert listed[-1] == "19 files sound."
    split = again / "split.safetensors"
    split.write_bytes(split.read_bytes()[:-8])
    code, out, _ = call("check", str(again))
    assert code == 1
    assert "18 files sound." in out
    assert "split.safetensors" in out


def test_run_of_several_layers_shares_a_pass_and_each_has_its_run(
    ran, home: Path, call: Call
) -> None:
    layers = ("--layer", "0", "--layer", "[24]", "--data", "data", "--out", "runs/several")
    code, out, err = call("run", *NETWORK[:4], *layers, *LOOSE)
    assert code == 0, err
    assert sorted(path.name for path in (home / "runs/several").iterdir()) == ["0", "2"]
    assert err.count("Scanning 0, 2 ") == 2  # training and validation images
    assert "With all layers split, largest logit difference 0;" in out
    assert out.count("Report: ") == 2
    for name in ("findings.csv", "split.safetensors"):
        alone = (home / "runs/a" / name).read_bytes()
        assert (home / "runs/several/2" / name).read_bytes() == alone
    assert call("report", "runs/several/2")[0] == 0


def test_scan_of_a_pattern_that_fits_one_layer_still_has_a_folder_for_it(
    home: Path, call: Call
) -> None:
    code, out, err = call(
        "scan", *NETWORK[:4], "--layer", "2*", "--data", "data/train", "--out", "pattern"
    )
    assert code == 0, err
    assert "Scanned 60 images" in out
    assert (home / "pattern/2/manifest.json").exists()
    code, _, err = call("find", "pattern")
    assert (code, "scans of several layers: 2;" in err) == (1, True)
    assert_one_sentence(err)


def test_step_by_step_gives_the_same(ran, home: Path, call: Call) -> None:
    for part in ("train", "val"):
        scan = ("--data", f"data/{part}", "--out", f"steps/{part}", "--positions")
        assert call("scan", *NETWORK, *scan)[0] == 0
    assert call("find", "steps/train", *LOOSE, "--out", "steps/findings.csv")[0] == 0
    same = (home / "runs/a/findings.csv").read_text()
    assert (home / "steps/findings.csv").read_text() == same
    assert call("split", "steps/train", *LOOSE, "--out", "steps/split")[0] == 0
    assert call("evaluate", "steps/split", "steps/val", "--out", "steps/evaluation.json")[0] == 0
    steps, whole = (
        json.loads((home / folder / "evaluation.json").read_text())["summary"]
        for folder in ("steps", "runs/a")
    )
    assert set(steps) == {"least_squares"}
    assert steps["least_squares"] == pytest.approx(whole["least_squares"], rel=1e-4)


def test_reproduce_compares_pair_by_pair(home: Path, call: Call) -> None:
    options = ("--imagenet", "imagenet", "--out", "reproduced", "--weights", "random")
    code, out, _ = call("reproduce", *options)
    assert code == 1
    assert "0 of 20 pairs agree." in out
    assert out.count("differs") == 20


# --- thresholds, encoders, layers -----------------------------------------------------------------


def test_tau_that_fits_the_layer_is_kept_and_shown(again: Path, home: Path, call: Call) -> None:
    auto = ("--tau", "auto", *LOOSE[2:])
    code, out, err = call(*RUN, "--out", str(again), *auto)
    assert code == 0, err
    found = unbraid.find(unbraid.open_scan(again / "scan-train"), tau="auto", p=0.5, gamma=0.95)
    assert f"(tau {found.tau:g} (auto), p 0.5, gamma 0.95)" in out
    settings = json.loads((again / "settings-2/settings.json").read_text())
    assert settings["thresholds"]["tau"] == "auto"
    assert f"{found.tau:g} (auto)" in assert_report_again(call, again / "settings-2")
    assert "(auto)" in call("find", f"{again}/scan-train", *auto)[1]
    assert call("split", f"{again}/scan-train", *auto, "--out", "auto.safetensors")[0] == 0
    assert unbraid.Split.load(home / "auto.safetensors").settings["tau"] == found.tau


def test_sensitivity_counts_any_thresholds(ran, home: Path, call: Call) -> None:
    grid = ("--taus", "0.02", "0.1", "--ps", "0.5", "--gammas", "0.5", "0.95")
    code, out, err = call("sensitivity", "runs/a/scan-train", *grid, "--out", "counted.csv")
    assert code == 0, err
    scan = unbraid.open_scan(home / "runs/a/scan-train")
    assert out.strip() == str(unbraid.sensitivity(scan, [0.02, 0.1], [0.5], [0.5, 0.95]))
    assert len((home / "counted.csv").read_text().splitlines()) == 5
    assert call("sensitivity", "runs/a/scan-train")[0] == 0


def test_run_with_an_encoder_embeds_pictures_by_it(again: Path, call: Call, monkeypatch) -> None:
    def at_random(spec: str, device: str) -> TimmEncoder:
        torch.manual_seed(0)
        return load_encoder(spec, pretrained=False, device=device)

    monkeypatch.setattr("unbraid.running.run.load_encoder", at_random)
    encoder = ("--encoder", "timm:test_resnet")
    code, _, err = call(*RUN, "--out", str(again), *encoder, *LOOSE)
    assert code == 0, err
    evaluation = json.loads((again / "settings-2/evaluation.json").read_text())
    assert not list((again / "settings-2").glob("positions-*"))  # the first run's
    names = {channel["semantics"]["encoder"] for channel in evaluation["channels"]}
    assert names == {"timm:test_resnet"}
    assert_report_again(call, again / "settings-2")


def test_run_of_a_network_without_features_does_without(home: Path, call: Call) -> None:
    network = ("--model", "soft.py:build", *NETWORK[2:])
    loose = ("--tau", "0.01", "--p", "0.3", "--gamma", "1")
    code, _, err = call("run", *network, "--data", "data", "--out", "runs/soft", *loose)
    assert code == 0, err
    assert "Semantic measures are left out" in err
    evaluation = json.loads((home / "runs/soft/evaluation.json").read_text())
    assert {channel["semantics"] for channel in evaluation["channels"]} == {None}
    assert "Semantic measures are left out" in (home / "runs/soft/report.html").read_text()


def test_layers_lists_exactly_what_scan_takes(home: Path, call: Call) -> None:
    def listed(*network: str) -> list[str]:
        code, out, _ = call("layers", *network)
        assert code == 0
        return [line.split()[0] for line in out.splitlines()[1:]]

    assert listed("own.py:build") == listed("neighbour.py:build") == ["0", "2", "6"]
    layers = listed("mixed.py:build", "--output", "scores")
    assert layers == ["stem", "head"]
    for layer in ("stem", "depthwise", "pads", "scales", "unused", "aside", "head"):
        options = ("--model", "mixed.py:build", "--output", "scores", "--layer", layer)
        code, _, err = call("scan", *options, "--data", "data/val", "--out", f"mixed-{layer}")
        assert code == (0 if layer in layers else 2), err


# --- mistakes -------------------------------------------------------------------------------------


def scan(**changed: str) -> tuple[str, ...]:
    """The arguments of a scan of validation images, but for some."""
    options = dict(zip(NETWORK[::2], NETWORK[1::2], strict=True))
    options |= {"--data": "data/val", "--out": "mistake"}
    options |= {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ("scan", *(word for pair in options.items() for word in pair))


FIND = ("find", "runs/a/scan-train")
EARLY = (*RUN, "--out", "mistake")
INTO = {  # what a step would overwrite
    "findings.csv": ("find", "runs/a/scan-train"),
    "split.safetensors": ("split", "runs/a/scan-train"),
    "scan-val/shard-000000.safetensors": ("split", "runs/a/scan-train"),
    "evaluation.json": ("evaluate", "x", "runs/a/scan-val"),
    "scan-val/manifest.json": ("sensitivity", "runs/a/scan-train"),
}
USAGE = [  # calls that cannot be understood, told in a box
    (("run", "--layer", "2"), "requires an argument"),
    (("rnu",), "Unknown command"),
    (("find", "nowhere", "--tau", "much"), "much"),
    ((*FIND, "--tau", "autom"), "autom"),
    (("sensitivity", "runs/a/scan-train", "--taus", "auto"), "auto"),
    ((*EARLY, "--concepts", "cluster"), "--concepts"),
    ((*EARLY, "--labels", "guessed"), "--labels"),
    ((*scan(), "--compiled"), "--compiled"),
]
MISTAKES = [  # arguments, exit code, and what the sentence says
    (("layers", "torchvision:resnet5"), 2, "Did you mean resnet50"),
    (("layers", "nothing"), 2, "torchvision:NAME"),
    (("layers", "syntax.py:build"), 2, "SyntaxError"),
    (("layers", "divides.py:build"), 2, "ZeroDivisionError"),
    (("layers", "mixed.py:build"), 1, "--output"),
    (("layers", "mixed.py:build", "--output", "logits"), 1, "has no 'logits'"),
    (("find", "nowhere"), 1, "holds no scan"),
    (("report", "nowhere"), 1, "holds no finished run"),
    (("check", "data"), 1, "data"),
    (("evaluate", "nothing.safetensors", "nowhere"), 1, "nothing.safetensors"),
    ((*FIND, "--tau", "0"), 2, "tau"),
    (("sensitivity", "runs/a/scan-train", "--ps", "0"), 2, "p is 0"),
    *(((*step, "--out", f"runs/a/{name}"), 2, "name another file") for name, step in INTO.items()),
    (("run", *NETWORK[:2], *NETWORK[4:], "--data", "data", "--out", "runs/a"), 1, "'s weights"),
    ((*EARLY, "--rho", "5"), 2, "rho"),
    ((*EARLY, "--gamma", "nan"), 2, "gamma"),
    ((*EARLY, "--concepts", ""), 2, "--concepts is empty"),
    ((*EARLY, "--encoder", "timm:resnet17"), 2, "Did you mean"),
    ((*RUN[:-1], "nothing", "--out", "mistake"), 1, "nothing/train"),
    ((*RUN[:-1], "no-val", "--out", "mistake"), 1, "no-val/val holds no image"),
    ((*RUN, "--out", "theirs"), 1, "theirs/settings.json"),
    (scan(layer="3"), 2, "not a convolution"),
    (scan(layer="22"), 2, "Did you mean 2"),
    (scan(weights="missing.safetensors"), 1, "missing.safetensors"),
    (scan(weights="junk.pt"), 1, "junk.pt"),
    (scan(weights="nan.safetensors"), 1, "NaN or infinite"),
    (scan(model="fails.py:build_failing"), 1, "cannot run"),
    (scan(data="nowhere"), 1, "There is no folder"),
    (scan(data="many"), 1, "4 classes but the network has 3 outputs"),
    (scan(data="text/notes"), 1, "text/notes"),
    (scan(data="wrong.csv"), 1, "wrong.csv"),
    (scan(data="wrong.tar"), 1, "wrong.tar"),
    (scan(data="hf:wrong"), 1, "wrong"),
    (scan(data="pipe:touch ran"), 2, "(pipe:) are not run"),
    (scan(batch_size="0"), 2, "batch_size"),
    (scan(classes="7"), 2, "no image"),
    (scan(out="own.py"), 2, "is a file"),
    (scan(device="nonsense"), 2, "nonsense"),
    (scan(out=""), 2, "--out is empty"),
    ((*scan()[:-2], "--out="), 2, "--out is empty"),
]


@pytest.mark.parametrize(("arguments", "told"), USAGE, ids=str)
def test_wrong_call_is_usage(ran, call: Call, arguments: tuple[str, ...], told: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert told in err


@pytest.mark.parametrize(("arguments", "code", "told"), MISTAKES, ids=str)
def test_mistake_is_told_in_a_sentence_and_leaves_nothing(
    ran, home: Path, call: Call, arguments: tuple[str, ...], code: int, told: str
) -> None:
    before = {path for path in home.iterdir()} | set(contents(home / "runs/a").items())
    got, _, err = call(*arguments)
    assert got == code, err
    assert told in " ".join(err.split())
    assert_one_sentence(err)
    assert {path for path in home.iterdir()} | set(contents(home / "runs/a").items()) == before
    assert (home / "theirs/settings.json").read_text() == "{}"


def test_broken_image_is_named_or_skipped_and_listed(home: Path, call: Call) -> None:
    shutil.copytree(home / "data/train", home / "broken")
    whole = (home / "broken/bee/0.png").read_bytes()
    (home / "broken/bee/0.png").write_bytes(whole[: len(whole) // 2])
    code, _, err = call(*scan(data="broken", out="broken-scan"))
    assert (code, "broken/bee/0.png" in err) == (1, True)
    assert_one_sentence(err)
    code, _, err = call(*scan(data="broken", out="broken-scan"), "--skip-broken")
    assert (code, "Left out 1 image that" in err, "broken/bee/0.png" in err) == (0, True, True)
    code, _, err = call(*scan(data="junk", out="junk-scan"), "--skip-broken")
    assert (code, "None of the 1 images" in err) == (1, True)


# --- nothing is lost ------------------------------------------------------------------------------


def test_start_that_failed_leaves_the_folder_free_and_other_files_stay(
    home: Path, call: Call
) -> None:
    notes = home / "s[/x]/notes.tmp"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    assert call(*scan(data="half", out="s[/x]", layer="0"))[0] == 1
    code, out, _ = call(*scan(data="half", out="s[/x]"), "--skip-broken")
    assert (code, "s[/x]" in out) == (0, True)  # what looks like markup is only a name
    code, _, err = call(*scan(data="half", out="s[/x]", layer="0"), "--skip-broken")
    assert (code, "the layer differ" in err) == (1, True)
    assert notes.read_text() == "mine"


def test_report_whose_images_are_gone_stays_as_it_is(again: Path, home: Path, call: Call) -> None:
    page = (again / "report.html").read_bytes()
    (home / "data").rename(home / "moved")
    code, _, err = call("report", str(again))
    (home / "moved").rename(home / "data")
    assert code == 1
    assert_one_sentence(err)
    assert (again / "report.html").read_bytes() == page


def test_ctrl_c_says_how_to_go_on(home: Path) -> None:
    arguments = ["scan", "--model", "slow.py:build", "--layer", "2", "--data", "data/train"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unbraid", *arguments, "--out", "stopped"],
        **{"cwd": home, "stderr": subprocess.PIPE, "text": True},
    )
    while not (home / "stopped/manifest.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "start the same command again" in err
    assert "Traceback" not in err


# --- labels and sources ---------------------------------------------------------------------------


def test_validation_folders_are_those_of_training(home: Path, call: Call) -> None:
    shutil.copytree(home / "data", home / "more")
    (home / "more/val/dog").mkdir()
    draw(0, 1).save(home / "more/val/dog/a.png")
    code, _, err = call("run", *NETWORK, "--data", "more", "--out", "runs/more")
    assert (code, "has a class 'dog' that the training images have not" in err) == (1, True)


def test_run_of_lists_is_that_of_class_folders(ran, home: Path, call: Call) -> None:
    (home / "listed").mkdir()
    for part in ("train", "val"):
        paths = sorted((home / "data" / part).glob("*/*"))
        lines = [f"../data/{part}/{p.parent.name}/{p.name},{p.parent.name}" for p in paths]
        (home / f"listed/{part}.csv").write_text("\n".join(["path,label", *lines]))
    code, _, err = call("run", *NETWORK, "--data", "listed", "--out", "runs/listed", *LOOSE)
    assert code == 0, err
    for name in ("findings.csv", "evaluation.json"):
        same = (home / "runs/a" / name).read_bytes()
        assert (home / "runs/listed" / name).read_bytes() == same
    lines = (home / "listed/val.csv").read_text().splitlines()
    (home / "listed/val.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
    assert_report_again(call, home / "runs/listed")  # images are found again by id


def test_predicted_labels_stand_in_for_given_ones(ran, home: Path, call: Call) -> None:
    shutil.copytree(home / "data", home / "wrong")
    for part in ("train", "val"):  # folders that say nothing
        for source, name in ((CLASSES[0], "x"), (CLASSES[1], CLASSES[0]), ("x", CLASSES[1])):
            (home / "wrong" / part / source).rename(home / "wrong" / part / name)
    run = ("run", *NETWORK, "--data", "wrong", "--out", "runs/wrong", *LOOSE)
    code, _, err = call(*run, "--labels", "predicted")
    assert code == 0, err
    scan = unbraid.open_scan(home / "runs/wrong/scan-train")
    assert scan.manifest.labels == "predicted"
    for records in scan.shards():
        assert records.label.equal(records.prediction)
    scans = (scan, unbraid.open_scan(home / "runs/a/scan-train"))
    found, right = (unbraid.find(one, tau=0.02, p=0.5, gamma=0.95) for one in scans)
    assert found.concepts.keys() & right.concepts.keys()
    output = json.loads((home / "runs/wrong/evaluation.json").read_text())["output"]
    assert output["top1_before"] < 0.5  # given labels still tell accuracy
    assert_report_again(call, home / "runs/wrong")
    code, _, err = call(*run)
    assert (code, "whether labels are given or predicted" in err) == (1, True)
    assert_one_sentence(err)


# --- images without labels ------------------------------------------------------------------------

CLUSTERS = ("--concepts", "clusters", "--gamma", "0.95")


@pytest.fixture(scope="module")
def flat(home: Path) -> Path:
    """Images without class folders."""
    for part, n in (("train", 180), ("val", 90)):
        (home / "flat" / part).mkdir(parents=True)
        for k in range(n):
            draw(k % 3, 5000 * n + k).save(home / "flat" / part / f"{k:03d}.png")
    return home / "flat"


def test_run_of_a_folder_without_classes_from_scan_to_report(flat, home: Path, call: Call) -> None:
    run = ("run", *NETWORK, "--data", "flat", "--out", "runs/flat", *CLUSTERS)
    code, out, err = call(*run)
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
    output = json.loads((folder / "evaluation.json").read_text())["output"]
    assert output["max_abs_logit_diff"] == 0
    assert (output["top1_before"], output["top1_after"]) == (None, None)
    rows = list(csv.DictReader((folder / "findings.csv").open()))
    assert [int(row["class1"]) for row in rows] == [pair.class1 for pair in found.pairs]
    assert not (folder / "sensitivity.csv").exists()  # which is of classes
    assert "Other thresholds" not in assert_report_again(call, folder)


def test_steps_on_a_folder_without_classes(flat, home: Path, call: Call) -> None:
    for part in ("train", "val"):
        assert call(*scan(data=f"flat/{part}", out=f"flat-{part}"), "--positions")[0] == 0
    code, out, err = call("find", "flat-train", *CLUSTERS)
    assert (code, "of clusters in" in out) == (0, True), err
    assert call("split", "flat-train", *CLUSTERS, "--out", "flat.safetensors")[0] == 0
    code, out, err = call("evaluate", "flat.safetensors", "flat-val")
    assert (code, "cluster 1" in out) == (0, True), err
    code, _, err = call(*scan(data="flat/val", classes="0"))
    assert (code, "classes names [0]" in err) == (2, True)


def test_channels_without_validation_images_are_left_out_and_counted(
    flat, home: Path, call: Call
) -> None:
    shutil.copytree(flat / "train", home / "one/train")
    (home / "one/val").mkdir()
    for k in range(12):  # of one kind, which has no more than one cause
        draw(0, 99 + k).save(home / "one/val" / f"{k}.png")
    code, out, err = call("run", *NETWORK, "--data", "one", "--out", "runs/one", *CLUSTERS)
    assert code == 0, err
    told = "left out, as the validation images have none of one of the concepts; add some."
    assert "0 pairs of clusters in 0 polysemantic channels" in out
    assert told in out
    assert told in assert_report_again(call, home / "runs/one")
    assert len((home / "runs/one/findings.csv").read_text().splitlines()) == 1
