"""The command line as a new user meets it: whole jobs on small folders, and every mistake."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
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
    """A folder with a network of one's own, its trained weights, and images by class."""
    home = tmp_path_factory.mktemp("home")
    (home / "own.py").write_text(OWN)
    kinds = ["png", "jpg", "webp"]
    for part, n in (("train", 20), ("val", 10)):
        for label, name in enumerate(CLASSES):
            folder = home / "data" / part / name
            folder.mkdir(parents=True)
            for k in range(n):
                draw(label, 1000 * n + 10 * k + label).save(folder / f"{k}.{kinds[k % 3]}")
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
    safetensors.torch.save_file(network.state_dict(), home / "weights.safetensors")
    return home


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line in `home`: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["unbraid", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return run


NETWORK = ("--model", "own.py:build", "--weights", "weights.safetensors", "--layer", "2")
LOOSE = ("--tau", "0.02", "--p", "0.5", "--gamma", "0.95")


def assert_one_sentence(err: str) -> None:
    """An error is told in a line of words, without a traceback."""
    assert "Traceback" not in err
    told = [line for line in err.splitlines() if line.startswith("unbraid: ")]
    assert len(told) == 1
    assert told[0].rstrip().endswith((".", "?"))


@pytest.fixture(scope="module")
def ran(home: Path) -> subprocess.CompletedProcess[str]:
    arguments = ["run", *NETWORK, "--data", "data", "--out", "runs/a", *LOOSE]
    return subprocess.run(
        [sys.executable, "-m", "unbraid", *arguments],
        capture_output=True,
        text=True,
        cwd=home,
        check=False,
    )


class TestRun:
    def test_it_does_everything(self, ran: subprocess.CompletedProcess[str], home: Path) -> None:
        assert ran.returncode == 0, ran.stderr
        assert "runs/a/report.html" in ran.stdout
        assert "Largest logit difference 0;" in ran.stdout
        folder = home / "runs/a"
        left = {path.name for path in folder.iterdir()}
        assert {"scan-train", "scan-val", "findings.csv", "split.safetensors"} <= left
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert evaluation["output"]["max_abs_logit_diff"] == 0
        assert evaluation["output"]["top1_before"] > 0.9
        rows = list(csv.DictReader((folder / "findings.csv").open()))
        found = {int(row["channel"]) for row in rows}
        assert found
        assert {channel["channel"] for channel in evaluation["channels"]} == found
        assert set(evaluation["summary"]) == {"least_squares", "published"}
        assert {name for row in rows for name in (row["name1"], row["name2"])} <= set(CLASSES)

    def test_again_it_scans_nothing_and_writes_the_same(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        watched = ("scan-train/shard-000000.safetensors", "positions-val/shard-000000.safetensors")
        before = [(home / "runs/a" / name).stat().st_mtime_ns for name in watched]
        evaluation = (home / "runs/a/evaluation.json").read_bytes()
        code, _, _ = call("run", *NETWORK, "--data", "data", "--out", "runs/a", *LOOSE)
        assert code == 0
        assert [(home / "runs/a" / name).stat().st_mtime_ns for name in watched] == before
        assert (home / "runs/a/evaluation.json").read_bytes() == evaluation

    def test_other_thresholds_need_no_new_scan_and_leave_the_first_run_as_it_was(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        shutil.copytree(home / "runs/a", home / "runs/b")
        before = {p: p.read_bytes() for p in (home / "runs/b").rglob("*") if p.is_file()}
        strict = ("--tau", "0.9", "--p", "1", "--gamma", "-1")
        code, out, err = call("run", *NETWORK, "--data", "data", "--out", "runs/b", *strict)
        assert code == 0
        assert "0 pairs" in out
        told = "runs/b holds a run with tau 0.02, p 0.5, gamma 0.95; this one goes into "
        assert f"{told}runs/b/settings-2." in err
        assert "runs/b/settings-2/report.html" in out
        after = {p: p.read_bytes() for p in (home / "runs/b").rglob("*") if p.is_file()}
        assert {p: after[p] for p in before} == before
        new = {str(p.relative_to(home / "runs/b")) for p in set(after) - set(before)}
        names = ("settings.json", "findings.csv", "sensitivity.csv", "report.html")
        assert new == {f"settings-2/{name}" for name in names}

    def test_results_are_overwritten_only_when_asked(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        shutil.copytree(home / "runs/a", home / "runs/over")
        run = ("run", *NETWORK, "--data", "data", "--out", "runs/over", "--overwrite")
        scans = {p: p.stat().st_mtime_ns for p in (home / "runs/over").glob("scan-*/*")}
        before = (home / "runs/over/findings.csv").read_bytes()
        code, _, err = call(*run, "--tau", "1.03")  # a slip
        assert (code, (home / "runs/over/findings.csv").read_bytes()) == (2, before)
        code, out, err = call(*run, "--tau", "0.9", "--p", "1", "--gamma", "-1")
        assert code == 0, err
        assert "takes its place when it is finished" in err
        assert "Report: runs/over/report.html" in out
        assert {p: p.stat().st_mtime_ns for p in (home / "runs/over").glob("scan-*/*")} == scans
        left = {p.name for p in (home / "runs/over").iterdir()}
        kept = {"scan-train", "scan-val", "positions-train", "positions-val"}
        results = {"settings.json", "findings.csv", "sensitivity.csv", "report.html"}
        assert left == kept | results
        assert json.loads((home / "runs/over/settings.json").read_text())["thresholds"]["p"] == 1

    @pytest.mark.parametrize(
        "step",
        [
            ("find", "runs/a/scan-train", "--out", "runs/a/findings.csv"),
            ("split", "runs/a/scan-train", "--out", "runs/a/split.safetensors"),
            ("split", "runs/a/scan-train", "--out", "runs/a/scan-val/shard-000000.safetensors"),
            ("evaluate", "x", "runs/a/scan-val", "--out", "runs/a/evaluation.json"),
            ("sensitivity", "runs/a/scan-train", "--out", "runs/a/scan-val/manifest.json"),
        ],
    )
    def test_a_step_writes_into_no_run(self, ran, home: Path, call, step) -> None:
        before = (home / step[-1]).read_bytes()
        code, _, err = call(*step)
        assert code == 2
        assert "name another file" in err
        assert_one_sentence(err)
        assert (home / step[-1]).read_bytes() == before

    def test_feature_visualisations_can_be_left_out(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        assert "Visualising channels and concept channels." in ran.stdout + ran.stderr
        shutil.copytree(home / "runs/a", home / "runs/blind")
        shutil.rmtree(home / "runs/blind/features")
        code, out, err = call(
            "run", *NETWORK, "--data", "data", "--out", "runs/blind", *LOOSE, "--no-features"
        )
        assert code == 0
        assert "Visualising" not in out + err
        assert not (home / "runs/blind/features").exists()

    def test_the_report_is_written_again(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        page = home / "runs/a/report.html"
        before = page.read_bytes()
        page.unlink()
        code, out, _ = call("report", "runs/a")
        assert code == 0
        assert "report.html" in out
        assert page.read_bytes() == before

    def test_what_it_left_is_checked_and_repaired(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        shutil.copytree(home / "runs/a", home / "runs/checked")
        code, out, _ = call("check", "runs/checked")
        assert code == 0
        listed = out.splitlines()
        found = len((home / "runs/a/findings.csv").read_text().splitlines()) - 1
        assert listed[0].startswith("runs/checked: a run with tau 0.02, p 0.5, gamma 0.95; ")
        assert f"; {found} pair" in listed[0]
        assert listed[0].endswith("; split, evaluation, features, report.")
        assert "runs/checked/scan-train: a scan of layer 2, 60 images, finished." in listed
        assert listed[-1] == "19 files sound."
        split = home / "runs/checked/split.safetensors"
        split.write_bytes(split.read_bytes()[:-8])
        code, out, _ = call("check", "runs/checked")
        assert code == 1
        assert "18 files sound." in out
        assert "split.safetensors" in out
        code, _, err = call("check", "data")
        assert code == 1
        assert_one_sentence(err)

    def test_several_layers_share_a_pass_and_each_has_its_run(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        network = (*NETWORK[:4], "--layer", "0", "--layer", "[24]")
        images = ("--data", "data", "--out", "runs/several")
        code, out, err = call("run", *network, *images, *LOOSE)
        assert code == 0, err
        folders = [path.name for path in (home / "runs/several").iterdir()]
        assert sorted(folders) == ["0", "2"]
        assert err.count("Scanning 0, 2 ") == 2  # training and validation images
        assert "With all layers split, largest logit difference 0;" in out
        assert out.count("Report: ") == 2
        for name in ("findings.csv", "split.safetensors"):
            alone = (home / "runs/a" / name).read_bytes()
            assert (home / "runs/several/2" / name).read_bytes() == alone
        code, out, _ = call("report", "runs/several/2")
        assert code == 0

    def test_a_pattern_that_fits_one_layer_still_has_a_folder_for_it(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        network = (*NETWORK[:4], "--layer", "2*")
        code, out, err = call("scan", *network, "--data", "data/train", "--out", "steps/pattern")
        assert code == 0, err
        assert "Scanned 60 images" in out
        assert (home / "steps/pattern/2/manifest.json").exists()
        code, _, err = call("find", "steps/pattern")
        assert code == 1
        assert "scans of several layers: 2;" in err
        assert_one_sentence(err)

    def test_step_by_step_gives_the_same(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        data = ("--data", "data/train")
        code, _, err = call("scan", *NETWORK, *data, "--out", "steps/train", "--positions")
        assert code == 0, err
        code, _, err = call(
            "scan", *NETWORK, "--data", "data/val", "--out", "steps/val", "--positions"
        )
        assert code == 0, err
        code, _, _ = call("find", "steps/train", *LOOSE, "--out", "steps/findings.csv")
        assert code == 0
        same = (home / "runs/a/findings.csv").read_text()
        assert (home / "steps/findings.csv").read_text() == same
        code, _, err = call("split", "steps/train", *LOOSE, "--out", "steps/split.safetensors")
        assert code == 0, err
        code, _, _ = call(
            "evaluate", "steps/split.safetensors", "steps/val", "--out", "steps/evaluation.json"
        )
        assert code == 0
        steps = json.loads((home / "steps/evaluation.json").read_text())
        whole = json.loads((home / "runs/a/evaluation.json").read_text())
        assert set(steps["summary"]) == {"least_squares"}
        ours = whole["summary"]["least_squares"]
        assert steps["summary"]["least_squares"] == pytest.approx(ours, rel=1e-4)


class TestThresholds:
    def test_a_tau_that_fits_the_layer(self, ran, home: Path, call) -> None:
        shutil.copytree(home / "runs/a", home / "runs/auto")
        auto = ("--tau", "auto", *LOOSE[2:])
        code, out, err = call("run", *NETWORK, "--data", "data", "--out", "runs/auto", *auto)
        assert code == 0, err
        found = unbraid.find(
            unbraid.open_scan(home / "runs/auto/scan-train"), tau="auto", p=0.5, gamma=0.95
        )
        assert found.auto
        assert f"(tau {found.tau:g} (auto), p 0.5, gamma 0.95)" in out
        settings = json.loads((home / "runs/auto/settings-2/settings.json").read_text())
        assert settings["thresholds"]["tau"] == "auto"
        page = home / "runs/auto/settings-2/report.html"
        before = page.read_bytes()
        assert f"{found.tau:g} (auto)" in before.decode()
        page.unlink()
        assert call("report", "runs/auto/settings-2")[0] == 0
        assert page.read_bytes() == before
        code, out, _ = call("find", "runs/auto/scan-train", *auto)
        assert (code, "(auto)" in out) == (0, True)
        code, _, err = call("split", "runs/auto/scan-train", *auto, "--out", "auto.safetensors")
        assert code == 0, err
        split = unbraid.Split.load(home / "auto.safetensors")
        assert split.settings["tau"] == found.tau

    def test_a_run_counts_what_other_thresholds_find(self, ran, home: Path) -> None:
        scan = unbraid.open_scan(home / "runs/a/scan-train")
        found = unbraid.find(scan, tau=0.02, p=0.5, gamma=0.95)
        rows = list(csv.DictReader((home / "runs/a/sensitivity.csv").open()))
        (own,) = (
            row
            for row in rows
            if (float(row["tau"]), float(row["p"]), float(row["gamma"])) == (0.02, 0.5, 0.95)
        )
        assert (int(own["n_channels"]), int(own["n_pairs"])) == (len(found.concepts), len(found))
        assert len(found) > 0

    def test_any_thresholds_are_counted_without_a_run(self, ran, home: Path, call) -> None:
        grid = ("--taus", "0.02", "0.1", "--ps", "0.5", "--gammas", "0.5", "0.95")
        code, out, err = call("sensitivity", "runs/a/scan-train", *grid, "--out", "counted.csv")
        assert code == 0, err
        scan = unbraid.open_scan(home / "runs/a/scan-train")
        counted = unbraid.sensitivity(scan, [0.02, 0.1], [0.5], [0.5, 0.95])
        assert out.strip() == str(counted)
        assert len((home / "counted.csv").read_text().splitlines()) == 5
        assert call("sensitivity", "runs/a/scan-train")[0] == 0

    def test_clusters_ask_no_thresholds_of_classes(self, ran, home: Path, call) -> None:
        shutil.copytree(home / "runs/a", home / "runs/clusters")
        again = ("run", *NETWORK, "--data", "data", "--out", "runs/clusters", *LOOSE)
        assert call(*again, "--concepts", "clusters")[0] == 0
        assert not (home / "runs/clusters/settings-2/sensitivity.csv").exists()
        page = home / "runs/clusters/settings-2/report.html"
        before = page.read_text()
        assert "Other thresholds" not in before
        assert "Other thresholds" in (home / "runs/a/report.html").read_text()
        assert call("report", "runs/clusters/settings-2")[0] == 0
        assert page.read_text() == before

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("find", "runs/a/scan-train", "--tau", "autom"), "autom"),
            (("sensitivity", "runs/a/scan-train", "--taus", "auto"), "auto"),
            (("sensitivity", "runs/a/scan-train", "--ps", "0"), "p is 0"),
        ],
    )
    def test_no_such_thresholds(self, ran, call, arguments: tuple[str, ...], told: str) -> None:
        code, _, err = call(*arguments)
        assert code == 2
        assert told in err
        assert "Traceback" not in err


class TestEncoder:
    def test_the_networks_own_features_are_the_default(self, ran, home: Path) -> None:
        for channel in json.loads((home / "runs/a/evaluation.json").read_text())["channels"]:
            seen = channel["semantics"]
            assert seen["encoder"] == "the network's own penultimate layer"
            assert seen["n_images"] == 30
            assert len(seen["concepts"]) == len(channel["concepts"])
            assert all(-1 <= like["clarity"] <= 1 for like in seen["concepts"])

    def test_another_is_told_before_anything_is_scanned(self, home: Path, call) -> None:
        arguments = ("--data", "data", "--out", "runs/encoder", "--encoder", "timm:resnet17")
        code, _, err = call("run", *NETWORK, *arguments)
        assert code == 2
        assert "Did you mean" in err
        assert_one_sentence(err)
        assert not (home / "runs/encoder").exists()

    def test_timms_networks_embed_pictures(
        self, ran, home: Path, call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def at_random(spec: str, device: str) -> TimmEncoder:
            torch.manual_seed(0)
            return load_encoder(spec, pretrained=False, device=device)

        monkeypatch.setattr("unbraid.running.run.load_encoder", at_random)
        shutil.copytree(home / "runs/a", home / "runs/timm")
        arguments = ("--data", "data", "--out", "runs/timm", "--encoder", "timm:test_resnet")
        code, _, err = call("run", *NETWORK, *arguments, *LOOSE)
        assert code == 0, err
        evaluation = json.loads((home / "runs/timm/settings-2/evaluation.json").read_text())
        assert not list((home / "runs/timm/settings-2").glob("positions-*"))  # the first run's
        names = {channel["semantics"]["encoder"] for channel in evaluation["channels"]}
        assert names == {"timm:test_resnet"}
        page = home / "runs/timm/settings-2/report.html"
        before = page.read_bytes()
        page.unlink()
        assert call("report", "runs/timm/settings-2")[0] == 0
        assert page.read_bytes() == before

    def test_a_network_without_features_does_without(self, ran, home: Path, call) -> None:
        text = OWN.replace("nn.Linear(6, 3),", "nn.Linear(6, 3), nn.LogSoftmax(1),")
        assert text != OWN
        (home / "soft.py").write_text(text)
        network = ("--model", "soft.py:build", "--weights", "weights.safetensors", "--layer", "2")
        loose = ("--tau", "0.01", "--p", "0.3", "--gamma", "1")
        code, _, err = call("run", *network, "--data", "data", "--out", "runs/soft", *loose)
        assert code == 0, err
        assert "Semantic measures are left out" in err
        evaluation = json.loads((home / "runs/soft/evaluation.json").read_text())
        assert {channel["semantics"] for channel in evaluation["channels"]} == {None}
        assert "Semantic measures are left out" in (home / "runs/soft/report.html").read_text()


class TestLayers:
    def test_it_lists_what_can_be_split(self, call) -> None:
        code, out, _ = call("layers", "own.py:build")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()[1:]] == ["0", "2", "6"]

    def test_it_lists_exactly_what_scan_takes(self, home: Path, call) -> None:
        (home / "mixed.py").write_text(MIXED)
        network = ("mixed.py:build", "--output", "scores")
        code, out, _ = call("layers", *network)
        assert code == 0
        listed = [line.split()[0] for line in out.splitlines()[1:]]
        assert listed == ["stem", "pads", "head"]
        scan = ("--data", "data/val", "--out")
        for layer in ("stem", "depthwise", "pads", "scales", "unused", "aside", "head"):
            options = ("--model", "mixed.py:build", "--output", "scores", "--layer", layer)
            code, _, err = call("scan", *options, *scan, f"runs/mixed-{layer}")
            assert code == (0 if layer in listed else 2), err
            assert "Traceback" not in err

    def test_an_output_that_is_not_there_is_told(self, home: Path, call) -> None:
        (home / "mixed.py").write_text(MIXED)
        for arguments, told in (
            (("layers", "mixed.py:build"), "--output"),
            (("layers", "mixed.py:build", "--output", "1"), "has no 1"),
            (("layers", "mixed.py:build", "--output", "logits"), "has no 'logits'"),
        ):
            code, _, err = call(*arguments)
            assert code == 1
            assert told in " ".join(err.split())


class TestReproduce:
    def test_a_stand_in_is_compared_pair_by_pair(self, home: Path, call) -> None:
        for name in ("n01440764", "n01443537"):
            folder = home / "imagenet/train" / name
            folder.mkdir(parents=True, exist_ok=True)
            draw(0, 1).save(folder / "a.png")
        code, out, _ = call(
            "reproduce", "--imagenet", "imagenet", "--out", "runs/reproduce", "--weights", "random"
        )
        assert code == 1
        assert "0 of 20 pairs agree." in out
        assert out.count("differs") == 20


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("run", "--layer", "2"), "requires an argument"),
            (("rnu",), "Unknown command"),
            (("find", "nowhere", "--tau", "much"), "much"),
        ],
    )
    def test_a_wrong_call_is_usage(self, call, arguments: tuple[str, ...], told: str) -> None:
        code, _, err = call(*arguments)
        assert code == 2
        assert told in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("code", "arguments", "told"),
        [
            (2, ("layers", "torchvision:resnet5"), "Did you mean resnet50"),
            (2, ("layers", "nothing"), "torchvision:NAME"),
            (1, ("find", "nowhere"), "holds no scan"),
            (1, ("report", "nowhere"), "holds no finished run"),
            (1, ("evaluate", "nothing.safetensors", "nowhere"), "nothing.safetensors"),
        ],
    )
    def test_what_is_not_there_is_told(
        self, call, code: int, arguments: tuple[str, ...], told: str
    ) -> None:
        got, _, err = call(*arguments)
        assert got == code
        assert told in err
        assert_one_sentence(err)

    @pytest.mark.parametrize(
        ("changed", "code", "told"),
        [
            (("--layer", "3"), 2, "not a convolution"),
            (("--layer", "22"), 2, "Did you mean 2"),
            (("--weights", "missing.safetensors"), 1, "missing.safetensors"),
            (("--model", "own.py:bild"), 2, "Did you mean build"),
            (("--data", "nowhere"), 1, "There is no folder"),
            (("--batch-size", "0"), 2, "batch_size"),
            (("--min-share", "2"), 2, "min_share"),
            (("--classes", "7"), 2, "no image"),
            (("--out", "own.py"), 2, "is a file"),
            (("--device", "nonsense"), 2, "nonsense"),
        ],
    )
    def test_a_wrong_option_of_scan(
        self, home: Path, call, changed: tuple[str, str], code: int, told: str
    ) -> None:
        options = {"--data": "data/train", "--out": "mistake"}
        options |= dict(zip(NETWORK[::2], NETWORK[1::2], strict=True)) | {changed[0]: changed[1]}
        got, _, err = call("scan", *(word for pair in options.items() for word in pair))
        assert (got, "Traceback" in err) == (code, False)
        assert told in err
        assert_one_sentence(err)
        assert not (home / "mistake").exists()

    def test_more_classes_than_outputs(self, home: Path, call) -> None:
        for name in "abcd":
            (home / "many" / name).mkdir(parents=True)
            draw(0, 1).save(home / "many" / name / "a.png")
        code, _, err = call("scan", *NETWORK, "--data", "many", "--out", "mistake")
        assert code == 1
        assert "4 classes but the network has 3 outputs" in err

    def test_a_broken_image_is_named_or_skipped_and_listed(self, home: Path, call) -> None:
        shutil.copytree(home / "data/train", home / "broken")
        whole = (home / "broken/bee/0.png").read_bytes()
        (home / "broken/bee/0.png").write_bytes(whole[: len(whole) // 2])
        arguments = ("scan", *NETWORK, "--data", "broken", "--out", "broken-scan")
        code, _, err = call(*arguments)
        assert code == 1
        assert "broken/bee/0.png" in err
        assert_one_sentence(err)
        code, _, err = call(*arguments, "--skip-broken")
        assert code == 0
        assert "Left out 1 image that" in err
        assert "broken/bee/0.png" in err

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_broken_weights(self, home: Path, call, value: str) -> None:
        state = safetensors.torch.load_file(home / "weights.safetensors")
        state["2.weight"][0, 0] = float(value)
        safetensors.torch.save_file(state, home / f"{value}.safetensors")
        network = (*NETWORK[:2], "--weights", f"{value}.safetensors", "--layer", "2")
        code, _, err = call("scan", *network, "--data", "data/train", "--out", "mistake")
        assert code == 1
        assert "NaN or infinite" in err
        assert not (home / "mistake").exists()

    @pytest.mark.parametrize(
        "option", [("--tau", "0"), ("--tau", "0.001"), ("--p", "1.5"), ("--gamma", "2")]
    )
    def test_a_threshold_out_of_range(self, home: Path, call, option: tuple[str, str]) -> None:
        scan = ("scan", *NETWORK, "--data", "data/val", "--out", "thresholds")
        assert call(*scan)[0] == 0
        code, _, err = call("find", "thresholds", *option)
        assert code == 2
        assert_one_sentence(err)

    def test_another_networks_folder_is_refused(self, home: Path, call) -> None:
        scan = ("--data", "data/val", "--out", "other")
        assert call("scan", *NETWORK, *scan)[0] == 0
        network = (*NETWORK[:2], "--layer", "2")
        code, _, err = call("scan", *network, *scan)
        assert code == 1
        assert "the network's weights" in err
        assert_one_sentence(err)


class TestNothingIsLost:
    """What a failure, a second thought or a full folder must leave as it was."""

    def test_a_start_that_failed_leaves_the_folder_free(self, home: Path, call) -> None:
        broken = home / "half" / "ant"
        broken.mkdir(parents=True)
        (broken / "a.png").write_bytes(b"no picture")
        draw(0, 1).save(broken / "b.png")
        scan = ("scan", *NETWORK[:-2], "--data", "half", "--out", "free")
        assert call(*scan, "--layer", "0")[0] == 1
        assert call(*scan, "--layer", "2", "--skip-broken")[0] == 0

    def test_other_files_in_the_folder_stay(self, home: Path, call) -> None:
        (home / "mine").mkdir()
        for name in ("notes.tmp", "notes.txt"):
            (home / "mine" / name).write_text("mine")
        assert call("scan", *NETWORK, "--data", "data/val", "--out", "mine")[0] == 0
        assert (home / "mine/notes.tmp").read_text() == "mine"
        (home / "theirs").mkdir()
        (home / "theirs/settings.json").write_text("{}")
        code, _, err = call("run", *NETWORK, "--data", "data", "--out", "theirs")
        assert code == 1
        assert_one_sentence(err)
        assert (home / "theirs/settings.json").read_text() == "{}"

    def test_a_report_whose_images_are_gone_stays_as_it_is(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        shutil.copytree(home / "data", home / "data2")
        run = ("run", *NETWORK, "--data", "data2", "--out", "runs/moved", *LOOSE)
        assert call(*run)[0] == 0
        page = (home / "runs/moved/report.html").read_bytes()
        shutil.rmtree(home / "data2")
        code, _, err = call("report", "runs/moved")
        assert code == 1
        assert_one_sentence(err)
        assert (home / "runs/moved/report.html").read_bytes() == page

    def test_a_run_of_another_network_keeps_its_results(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        before = {p: p.read_bytes() for p in (home / "runs/a").rglob("*") if p.is_file()}
        other = ("--model", "own.py:build", "--layer", "2")
        code, _, err = call("run", *other, "--data", "data", "--out", "runs/a")
        assert code == 1
        assert "the network's weights" in err
        assert {p: p.read_bytes() for p in (home / "runs/a").rglob("*") if p.is_file()} == before

    def test_thresholds_are_checked_before_anything_is_scanned(self, home: Path, call) -> None:
        for wrong in (("--tau", "2"), ("--rho", "5"), ("--gamma", "nan"), ("--p", "0")):
            code, _, err = call("run", *NETWORK, "--data", "data", "--out", "early", *wrong)
            assert code == 2
            assert_one_sentence(err)
            assert not (home / "early").exists()

    def test_all_images_broken_is_a_failure(self, home: Path, call) -> None:
        (home / "junk/ant").mkdir(parents=True)
        (home / "junk/ant/a.png").write_bytes(b"no picture")
        scan = ("scan", *NETWORK, "--data", "junk", "--out", "junk-scan", "--skip-broken")
        code, _, err = call(*scan)
        assert code == 1
        assert "None of the 1 images" in err

    def test_ctrl_c_says_how_to_go_on(self, home: Path) -> None:
        slow = OWN.replace("def preprocess(picture):", "def preprocess(picture):\n    wait()")
        slow += "\n\ndef wait():\n    import time\n    time.sleep(0.2)\n"
        (home / "slow.py").write_text(slow)
        arguments = ["scan", "--model", "slow.py:build", "--layer", "2", "--data", "data/train"]
        process = subprocess.Popen(
            [sys.executable, "-m", "unbraid", *arguments, "--out", "stopped"],
            cwd=home,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not (home / "stopped/manifest.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "start the same command again" in err
        assert "Traceback" not in err


class TestLabels:
    def test_validation_folders_get_the_labels_of_training(self, home: Path, call) -> None:
        for part, names in (("train", CLASSES), ("val", CLASSES[1:])):
            for name in names:
                shutil.copytree(home / "data" / part / name, home / "fewer" / part / name)
        run = ("run", *NETWORK, "--data", "fewer", "--out", "runs/fewer")
        code, _, err = call(*run, "--tau", "0.9", "--p", "1", "--gamma", "-1")
        assert code == 0, err
        assert unbraid.open_scan(home / "runs/fewer/scan-val").labels_seen() == {1, 2}
        (home / "fewer/val/ant").mkdir()
        (home / "fewer/val/ant").rename(home / "fewer/val/dog")
        draw(0, 1).save(home / "fewer/val/dog/a.png")
        code, _, err = call(*run)
        assert code == 1
        assert "class folder 'dog'" in err


class TestSources:
    def test_a_run_of_lists_is_that_of_class_folders(
        self, ran: subprocess.CompletedProcess[str], home: Path, call
    ) -> None:
        (home / "listed").mkdir()
        for part in ("train", "val"):
            paths = sorted((home / "data" / part).glob("*/*"))
            rows = [f"../data/{part}/{path.parent.name}/{path.name}" for path in paths]
            lines = [f"{row},{path.parent.name}" for row, path in zip(rows, paths, strict=True)]
            (home / f"listed/{part}.csv").write_text("\n".join(["path,label", *lines]))
        run = ("run", *NETWORK, "--data", "listed", "--out", "runs/listed", *LOOSE)
        code, _, err = call(*run)
        assert code == 0, err
        for name in ("findings.csv", "evaluation.json"):
            assert (home / "runs/listed" / name).read_bytes() == (
                home / "runs/a" / name
            ).read_bytes()
        page = (home / "runs/listed/report.html").read_bytes()
        lines = (home / "listed/val.csv").read_text().splitlines()
        (home / "listed/val.csv").write_text("\n".join([lines[0], *lines[:0:-1]]))
        assert call("report", "runs/listed")[0] == 0
        assert (home / "runs/listed/report.html").read_bytes() == page  # found again by id

    def test_a_source_that_is_wrong_leaves_nothing_behind(self, home: Path, call) -> None:
        (home / "wrong.csv").write_text("path,label\ndata/val/ant/none.png,ant\n")
        (home / "wrong.tar").write_bytes(b"no tar")
        for data in ("wrong.csv", "wrong.tar", "wrong-{0..9}.tar", "hf:wrong", "pipe:touch ran"):
            code, _, err = call("scan", *NETWORK, "--data", data, "--out", "mistake")
            assert code in (1, 2)
            assert_one_sentence(err)
        assert not (home / "mistake").exists()
        assert not (home / "ran").exists()


class TestOddInput:
    def test_a_weights_file_that_is_junk(self, home: Path, call) -> None:
        (home / "junk.pt").write_bytes(b"hello this is junk")
        network = ("--model", "own.py:build", "--weights", "junk.pt", "--layer", "2")
        code, _, err = call("scan", *network, "--data", "data/val", "--out", "mistake")
        assert code == 1
        assert_one_sentence(err)

    def test_names_that_look_like_markup_are_only_names(self, home: Path, call) -> None:
        code, out, _ = call("scan", *NETWORK, "--data", "data/val", "--out", "s[/x]")
        assert code == 0
        assert "s[/x]" in out

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("def build(:", "SyntaxError"),
            ("import nowhere_to_be_found", "nowhere_to_be_found"),
            ("def build():\n    return 1 / 0", "ZeroDivisionError"),
            ("def build(size):\n    return size", "without arguments"),
        ],
    )
    def test_a_model_file_that_fails_is_told(self, home: Path, call, text: str, told: str) -> None:
        (home / "bad.py").write_text(text)
        code, _, err = call("layers", "bad.py:build")
        assert code == 2
        assert told in err
        assert "Traceback" not in err

    def test_a_model_file_may_import_its_neighbour(self, home: Path, call) -> None:
        (home / "neighbour.py").write_text("from own import build\n")
        assert call("layers", "neighbour.py:build")[0] == 0

    def test_a_network_that_fails_in_its_own_way_is_told(self, home: Path, call) -> None:
        fails = """
class Fails(nn.Sequential):
    def forward(self, x):
        assert x.shape[2] == 999


def build_failing():
    network, prepare = build()
    return Fails(*network), prepare
"""
        (home / "fails.py").write_text(OWN + fails)
        network = ("--model", "fails.py:build_failing", "--layer", "2")
        code, _, err = call("scan", *network, "--data", "data/val", "--out", "mistake")
        assert code == 1
        assert_one_sentence(err)


@pytest.fixture(scope="module")
def flat(home: Path) -> Path:
    """Images without class folders."""
    for part, n in (("train", 180), ("val", 90)):
        (home / "flat" / part).mkdir(parents=True)
        for k in range(n):
            draw(k % 3, 5000 * n + k).save(home / "flat" / part / f"{k:03d}.png")
    return home / "flat"


class TestWithoutLabels:
    OPTIONS = ("--concepts", "clusters", "--gamma", "0.95")

    def test_a_folder_without_classes_from_scan_to_report(self, flat, home: Path, call) -> None:
        run = ("run", *NETWORK, "--data", "flat", "--out", "runs/flat", *self.OPTIONS)
        code, out, err = call(*run)
        assert code == 0, err
        assert "flat/train holds images without class folders; the network's predictions" in err
        assert "of clusters in" in out.splitlines()[0]
        assert "Largest logit difference 0." in out
        folder = home / "runs/flat"
        for name in ("scan-train", "scan-val", "positions-train", "positions-val"):
            assert unbraid.open_scan(folder / name).manifest.labels == "predicted"
        found = unbraid.find(
            unbraid.open_scan(folder / "scan-train"), concepts="clusters", gamma=0.95
        )
        split = unbraid.Split.load(folder / "split.safetensors")
        assert {c.channel: c.concepts for c in split.channels} == found.concepts != {}
        assert set(split.clusters) == set(found.clusters)
        output = json.loads((folder / "evaluation.json").read_text())["output"]
        assert output["max_abs_logit_diff"] == 0
        assert (output["top1_before"], output["top1_after"]) == (None, None)
        rows = list(csv.DictReader((folder / "findings.csv").open()))
        assert [int(row["class1"]) for row in rows] == [pair.class1 for pair in found.pairs]
        page = (folder / "report.html").read_bytes()
        (folder / "report.html").unlink()
        assert call("report", "runs/flat")[0] == 0
        assert (folder / "report.html").read_bytes() == page
        stamp = (folder / "positions-val/shard-000000.safetensors").stat().st_mtime_ns
        assert call(*run)[0] == 0
        assert (folder / "positions-val/shard-000000.safetensors").stat().st_mtime_ns == stamp

    def test_step_by_step(self, flat, home: Path, call) -> None:
        for part in ("train", "val"):
            data = ("--data", f"flat/{part}", "--out", f"flat-{part}", "--positions")
            assert call("scan", *NETWORK, *data)[0] == 0
        code, out, err = call("find", "flat-train", *self.OPTIONS)
        assert code == 0, err
        assert "of clusters in" in out
        code, _, err = call("split", "flat-train", *self.OPTIONS, "--out", "flat.safetensors")
        assert code == 0, err
        code, out, err = call("evaluate", "flat.safetensors", "flat-val")
        assert code == 0, err
        assert "cluster 1" in out

    def test_validation_images_lie_as_those_of_training_do(self, flat, home: Path, call) -> None:
        shutil.copytree(flat / "train", home / "mixed/train")
        for k in range(60):
            folder = home / "mixed/val" / CLASSES[k % 3]
            folder.mkdir(parents=True, exist_ok=True)
            draw(k % 3, 77 + k).save(folder / f"{k}.png")
        (home / "mixed/val/empty").mkdir()  # would be a class without images
        run = ("run", *NETWORK, "--data", "mixed", "--out", "runs/mixed", *self.OPTIONS)
        code, _, err = call(*run)
        assert code == 0, err
        page = home / "runs/mixed/report.html"
        before = page.read_bytes()
        assert call("report", "runs/mixed")[0] == 0
        assert page.read_bytes() == before

    def test_channels_without_validation_images_are_left_out_and_counted(
        self, flat, home: Path, call
    ) -> None:
        shutil.copytree(flat / "train", home / "one/train")
        (home / "one/val").mkdir()
        for k in range(12):  # of one kind, which has no more than one cause
            draw(0, 99 + k).save(home / "one/val" / f"{k}.png")
        run = ("run", *NETWORK, "--data", "one", "--out", "runs/one", *self.OPTIONS)
        code, out, err = call(*run)
        assert code == 0, err
        told = "left out, as the validation images have none of one of the concepts; add some."
        assert "0 pairs of clusters in 0 polysemantic channels" in out
        assert told in out
        page = home / "runs/one/report.html"
        assert told in page.read_text()
        assert len((home / "runs/one/findings.csv").read_text().splitlines()) == 1
        before = page.read_bytes()
        assert call("report", "runs/one")[0] == 0
        assert page.read_bytes() == before

    def test_predicted_labels_in_place_of_given_ones(self, home: Path, call) -> None:
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
        found = unbraid.find(scan, tau=0.02, p=0.5, gamma=0.95)
        right = unbraid.open_scan(home / "runs/a/scan-train")
        pairs = unbraid.find(right, tau=0.02, p=0.5, gamma=0.95).pairs
        assert {pair.channel for pair in found.pairs} & {pair.channel for pair in pairs}
        output = json.loads((home / "runs/wrong/evaluation.json").read_text())["output"]
        assert output["top1_before"] < 0.5  # given labels still tell accuracy
        page = home / "runs/wrong/report.html"
        before = page.read_bytes()
        assert call("report", "runs/wrong")[0] == 0
        assert page.read_bytes() == before
        code, _, err = call(*run)
        assert code == 1
        assert "whether labels are given or predicted" in err
        assert_one_sentence(err)

    @pytest.mark.parametrize(
        "wrong", [("--concepts", "cluster"), ("--labels", "guessed"), ("--concepts", "")]
    )
    def test_a_wrong_value_is_told_with_the_right_ones(self, home: Path, call, wrong) -> None:
        code, _, err = call("run", *NETWORK, "--data", "data", "--out", "runs/never", *wrong)
        assert code == 2
        assert wrong[0] in err
        assert "Traceback" not in err
        assert not (home / "runs/never").exists()

    def test_a_folder_without_any_image_is_told(self, home: Path, call) -> None:
        (home / "nothing/train").mkdir(parents=True)
        code, _, err = call("run", *NETWORK, "--data", "nothing", "--out", "runs/never")
        assert code == 1
        assert_one_sentence(err)
        (home / "nothing/notes").mkdir()
        (home / "nothing/notes/a.txt").write_text("no image")
        code, _, err = call("scan", *NETWORK, "--data", "nothing/notes", "--out", "never")
        assert code == 1
        assert_one_sentence(err)
        draw(0, 1).save(home / "nothing/train/a.png")
        (home / "nothing/val").mkdir()
        code, _, err = call("run", *NETWORK, "--data", "nothing", "--out", "runs/never")
        assert code == 1
        assert "nothing/val holds no image" in err
        assert_one_sentence(err)
        assert not (home / "runs/never").exists()

    def test_classes_cannot_be_chosen_of_images_without_labels(self, flat, home, call) -> None:
        scan = ("scan", *NETWORK, "--data", "flat/val", "--out", "never")
        code, _, err = call(*scan, "--classes", "0")
        assert code == 2
        assert "classes names [0]" in err
        assert_one_sentence(err)


@pytest.mark.parametrize("empty", [["--out", ""], ["--out="]])
def test_an_empty_argument_is_told_and_not_taken_for_the_folder_at_hand(empty, home, call):
    before = sorted(home.iterdir())
    code, _, err = call("scan", *NETWORK, "--data", "data", *empty)
    assert code == 2
    assert_one_sentence(err)
    assert "--out is empty" in err
    assert sorted(home.iterdir()) == before
