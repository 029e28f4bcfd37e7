"""The embedded demo: what is in the package, the script that made it, and the command."""

import collections
import json
import subprocess
import sys

import pytest
import torch

import unbraid
from unbraid.base.errors import UsageError
from unbraid.demo import network as demo
from unbraid.running.finished import Run
from unbraid.running.folders import validation_images


@pytest.mark.parametrize(("split", "least"), [("train", 300), ("test", 200)])
def test_load_images_of_each_class_as_many_that_the_network_knows(split, least):
    images = demo.load_images(split)
    counts = collections.Counter(images.targets)
    assert set(counts) == set(range(10))
    assert len(set(counts.values())) == 1
    assert min(counts.values()) >= least
    assert images[3][1] == images.targets[3]
    assert images.picture(3).size == (28, 28)
    pictures = torch.stack([images[i][0] for i in range(0, len(images), 5)])
    with torch.no_grad():
        predicted = demo.load_network()(pictures).argmax(1)
    assert (predicted == torch.tensor(images.targets[::5])).double().mean() > 0.9
    with pytest.raises(UsageError, match="train, test"):
        demo.load_images("val")


@pytest.mark.parametrize("more", [{"data": "elsewhere"}, {"bands": [0]}])
def test_other_images_or_bands_of_a_demo_are_refused(more):
    with pytest.raises(UsageError, match="The demo's images are included"):
        validation_images({"demo": True, **more}, None)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, "-m", "unbraid", "demo", "--out", str(out)]
    return out, subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_demo_ends_with_a_report_of_what_is_there_also_in_unseen_images(ran):
    out, done = ran
    assert done.returncode == 0, done.stderr
    assert "images/s" in done.stderr  # progress
    assert done.stdout.splitlines()[-1] == f"Report: {out / 'report.html'}"
    assert (out / "report.html").stat().st_size > 100_000
    output = json.loads((out / "evaluation.json").read_text())["output"]
    assert output["max_abs_logit_diff"] == 0
    assert output["top1_before"] == output["top1_after"] > 0.9
    run = Run(ran[0])
    assert all(run.figure(0, kind).axes for kind in ("teaser", "sources"))
    unseen = unbraid.find(run.val_scan, channels=run.found.concepts)
    there = {(p.channel, p.class1, p.class2): p.cosine for p in unseen.pairs}
    assert len(run.found.channels) >= 4
    for pair in run.found.pairs:
        assert there[pair.channel, pair.class1, pair.class2] == pytest.approx(pair.cosine, abs=0.05)
    assert run.features.channels == tuple(sorted(part.channel for part in run.split.channels))
    assert run.features.left_out == 0
    assert run.features.image(run.split.channels[0].channel, None).size == (28, 28)
