"""Whatever unbraid reads is sound, and can be computed with, or refused in one sentence.

A short run comes with every test run; `-m slow` tries 100,000 inputs (UNBRAID_FUZZ, if set).
"""

import contextlib
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import unbraid
from fuzz.mutations import damaged, tampered, tampered_json
from tiny_networks import SyntheticImages, build
from unbraid.base import files
from unbraid.base import schema as strict
from unbraid.base.errors import UnbraidError
from unbraid.finding.findings import Findings
from unbraid.images import pictures, tensors
from unbraid.images.pictures import read_picture
from unbraid.images.tensors import read_tensor_file
from unbraid.measuring import likeness, results
from unbraid.measuring.ablate import ablate
from unbraid.measuring.compare import OutputComparison
from unbraid.networks import checkpoints as states
from unbraid.networks import spec as layers
from unbraid.networks.checkpoints import load_weights
from unbraid.networks.outputs import numbers_in
from unbraid.running.check import check
from unbraid.running.folders import read_settings
from unbraid.scanning import manifest, records
from unbraid.splitting import splits
from unbraid.splitting.splits import Split
from unbraid.visualizing import features
from unbraid.visualizing.features import Feature, Features

resource = pytest.importorskip("resource")  # of Unix

EXAMPLES = 60  # of each reader
MANY = int(os.environ.get("UNBRAID_FUZZ", "100000"))  # of all readers, by hand
MEMORY = 4 * 2**30  # bytes that all of it may take beside what is taken before
OWN = {0: [[0], [1, 2]]}  # concepts, as a search need not find any in so few images
TENSORS = ("one.npy", "one-columns.npy", "one.pt", "one-old.pt", "one.safetensors")
KINDS = ("png", "jpeg", "webp", "bmp", "tiff", "gif", "ppm")


class Escaped(AssertionError):
    """Something else than UnbraidError came out of a reader."""


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    network = build("uneven")  # padded, so that lies about padding matter
    images = SyntheticImages(9)
    images.ids = [f"folder/{k}.png" for k in range(9)]
    scan = unbraid.scan(network, "layer", images, folder / "scan", positions=True)
    unbraid.scan(network, "layer", images, folder / "pooled")
    # Shards that do not say whose they are, as any manifest that is lied about would disown them.
    nameless = Path(shutil.copytree(scan.path, folder / "nameless"))
    records.write_shard(nameless, 0, records.read_shard(scan.path, 0))
    split = unbraid.split(scan, unbraid.find(scan, channels=OWN), method="published", rho=0.7)
    split.save(folder / "split.safetensors")
    by_hand = unbraid.find(scan, channels=OWN).correct(scan, 1, groups=[[0, 1], [2, 3]])
    by_hand.save(folder / "found.safetensors")
    like = likeness.Likeness(0.5, 0.25)
    rest = (False, False, like, (like, like), 1.0, float("nan"))
    measured = {"ablation": ablate(unbraid.apply(network, split), images)}
    measured["output"] = OutputComparison(0.0, 1.0, 0.5, 0.5)
    measured["semantics"] = likeness.Semantics({0: likeness.ChannelSemantics("it", 9, 2, *rest)})
    unbraid.evaluate(split, scan, **measured).save(folder / "evaluation.json")
    run = {"title": "t", "thresholds": {"tau": "auto", "concepts": "classes"}, "source": {}}
    (folder / "settings.json").write_text(json.dumps(run))
    feature = Feature(0, None, 0, Image.new("RGBA", (8, 8)), (1.0, 2.0))
    Features("layer", "0", (feature,)).save(folder / "features")
    noise = np.random.default_rng(0).integers(0, 255, (24, 16, 3), np.uint8)
    for kind in KINDS:
        Image.fromarray(noise).save(folder / f"picture.{kind}")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), folder / "weights.pt")
    torch.save(layer.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    files.write_tensors(folder / "weights.safetensors", dict(layer.state_dict()), {})
    one = torch.arange(24.0).reshape(2, 3, 4)
    np.save(folder / "one.npy", one.numpy())
    np.save(folder / "one-columns.npy", np.asfortranarray(one.numpy()))
    torch.save(one, folder / "one.pt")
    torch.save({"one": one}, folder / "one-old.pt", _use_new_zipfile_serialization=False)
    files.write_tensors(folder / "one.safetensors", {"one": one}, {})
    return SimpleNamespace(folder=folder, scan=scan, split=split)


def tamper(data, path, to=None):
    """Write a damaged or lying twin of a file, in its place or to another."""
    kind = {".json": tampered_json, ".safetensors": tampered}.get(path.suffix)
    changed = kind(path) if kind else damaged(path.read_bytes())
    (to or path).write_bytes(data.draw(changed))


def use_scan(data, seeds, folder):
    """A scan of which one file is tampered with: opened, searched, split and measured."""
    own = fresh(folder / "scan", seeds.folder / "scan")
    names = ("manifest.json", "layer.safetensors", *["shard-000000.safetensors"] * 2)
    tamper(data, own / data.draw(st.sampled_from(names)))
    for use in (
        lambda scan: list(scan.shards()),
        lambda scan: [scan.broken(), scan.labels_seen()],
        lambda scan: [scan.ids(), spread_within(scan)],
        lambda scan: str(unbraid.find(scan, tau="auto")),
        lambda scan: str(unbraid.find(scan, concepts="clusters")),
        lambda scan: work(scan, own),
        lambda scan: str(unbraid.evaluate(seeds.split, scan)),
    ):
        sound_or_refused(lambda use=use: use(unbraid.open_scan(own)))
    sound_or_refused(lambda: str(check(own)))


def use_pooled(data, seeds, folder):
    """A scan without positions, of which a shard is tampered with."""
    own = fresh(folder / "scan", seeds.folder / "pooled")
    tamper(data, own / "shard-000000.safetensors")
    for use in (lambda scan: list(scan.shards()), spread_within):
        sound_or_refused(lambda use=use: use(unbraid.open_scan(own)))
    sound_or_refused(lambda: str(check(own)))


def spread_within(scan):
    spread = scan.spread(0)
    if spread is not None:
        assert (spread.dtype, spread.shape[1:]) == (torch.float64, (scan.layer.n_taps,))
        assert (spread.T @ spread).isfinite().all()


def use_manifest(data, seeds, folder):
    own = fresh(folder / "scan", seeds.folder / "nameless")
    tamper(data, own / "manifest.json")
    sound_or_refused(lambda: list(unbraid.open_scan(own).shards()))
    sound_or_refused(lambda: str(check(own)))


def work(scan, folder):
    found = unbraid.find(scan, channels=OWN)
    found.to_csv(folder / "findings.csv")
    unbraid.evaluate(unbraid.split(scan, found, method="published"), scan)
    unbraid.evaluate(unbraid.split(scan, found), scan).save(folder / "evaluation.json")


def use_split(data, seeds, folder):
    path = folder / "split.safetensors"
    tamper(data, seeds.folder / path.name, path)

    def use():
        split = Split.load(path)
        evaluation = unbraid.evaluate(split, seeds.scan)
        assert str(evaluation) + str(split)
        split.save(folder / "again.safetensors")

    sound_or_refused(use)


def use_findings(data, seeds, folder):
    path = folder / "found.safetensors"
    tamper(data, seeds.folder / path.name, path)

    def use():
        found = Findings.load(path)
        assert str(found)
        unbraid.split(seeds.scan, found, method="published", rho=0.7)
        found.save(folder / "again.safetensors")

    sound_or_refused(use)


def use_evaluation(data, seeds, folder):
    path, kinds = folder / "evaluation.json", ("output", "ablation", "semantics")
    tamper(data, seeds.folder / path.name, path)

    def use():
        measured = {kind: getattr(results, f"read_{kind}")(path) for kind in kinds}
        result = unbraid.evaluate(seeds.split, seeds.scan, **measured)
        result.save(folder / "again.json")
        assert [str(one) for one in (result, *measured.values())]

    sound_or_refused(use)


def use_settings(data, seeds, folder):
    tamper(data, seeds.folder / "settings.json", folder / "settings.json")
    sound_or_refused(lambda: read_settings(folder))


def use_features(data, seeds, folder):
    own = fresh(folder / "features", seeds.folder / "features")
    tamper(data, own / data.draw(st.sampled_from(("features.json", "0.png"))))
    sound_or_refused(lambda: Features.load(own).save(folder / "again"))


def use_picture(data, seeds, folder):
    tamper(data, seeds.folder / f"picture.{data.draw(st.sampled_from(KINDS))}", folder / "picture")

    def use():
        picture = read_picture(folder / "picture")
        assert picture.mode == "RGB"
        picture.load()

    sound_or_refused(use)


def use_weights(data, seeds, folder):
    name = data.draw(st.sampled_from(("weights.pt", "old.pt", "weights.safetensors")))
    tamper(data, seeds.folder / name, folder / name)
    sound_or_refused(lambda: load_weights(torch.nn.Linear(3, 2), folder / name))


def use_tensors(data, seeds, folder):
    """A tensor of each kind of file, as `explain` and a target of embeddings read it."""
    for name in TENSORS:
        path = folder / name
        tamper(data, seeds.folder / name, path)
        sound_or_refused(lambda path=path: numbers_in(read_tensor_file(path)))


READERS = {
    "scan": use_scan,
    "pooled": use_pooled,
    "manifest": use_manifest,
    "split": use_split,
    "findings": use_findings,
    "evaluation": use_evaluation,
    "settings": use_settings,
    "features": use_features,
    "picture": use_picture,
    "weights": use_weights,
    "tensors": use_tensors,
}


def fresh(folder, sound):
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


def sound_or_refused(read):
    try:
        read()
    except UnbraidError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 2000
    except Exception as error:
        raise Escaped(f"{type(error).__name__}: {str(error)[:300]}") from error


@contextlib.contextmanager
def bounded_memory():
    """Let allocations beyond a bound fail, as what is not UnbraidError then comes out."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(use, seeds, folder, n, phases=()):
    """Try n inputs, always the same ones."""

    @settings(
        **{"max_examples": n, "deadline": None, "derandomize": True, "database": None},
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases or (Phase.generate, Phase.shrink),
    )
    @given(data=st.data())
    def run(data):
        use(data, seeds, folder)

    # What could only be written to the screen is not looked at here.
    with bounded_memory(), contextlib.redirect_stderr(io.StringIO()):
        run()


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds of Linux")
pytestmark = [needs_proc, pytest.mark.filterwarnings("ignore")]


def many_of(n_readers):
    """How many inputs each reader gets where all are fuzzed for long."""
    return pytest.param(-(-MANY // n_readers), marks=pytest.mark.slow)


@pytest.mark.parametrize("n", [EXAMPLES, many_of(len(READERS))])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_is_sound_or_refused(reader, n, seeds, tmp_path):
    fuzz(READERS[reader], seeds, tmp_path, n)


def test_what_is_sound_is_read(seeds, tmp_path):
    """Else refusing everything would pass."""
    scan, evaluation = unbraid.open_scan(seeds.folder / "scan"), seeds.folder / "evaluation.json"
    assert sum(map(len, scan.shards())) == 9
    work(scan, tmp_path)
    spreads = [unbraid.open_scan(seeds.folder / name).spread(0) for name in ("scan", "pooled")]
    assert torch.equal(*spreads)
    assert Split.load(seeds.folder / "split.safetensors").channels[0].channel == 0
    assert results.read_ablation(evaluation).channels[0].concepts[1].classes == (1, 2)
    assert None not in (results.read_semantics(evaluation), results.read_output(evaluation))
    assert read_settings(seeds.folder) is not None
    assert Features.load(seeds.folder / "features").channels == (0,)
    for kind in KINDS:
        assert read_picture(seeds.folder / f"picture.{kind}").size == (16, 24)
    for name in ("weights.pt", "old.pt", "weights.safetensors"):
        load_weights(torch.nn.Linear(3, 2), seeds.folder / name)
    for name in TENSORS:
        (one,) = numbers_in(read_tensor_file(seeds.folder / name))
        assert torch.equal(one, torch.arange(24.0).reshape(2, 3, 4))
    assert zipfile.is_zipfile(seeds.folder / "weights.pt")


def test_memory_beyond_the_bound_is_noticed():
    with bounded_memory(), pytest.raises(Escaped, match="MemoryError"):
        sound_or_refused(lambda: bytearray(2 * MEMORY))


def without_types_of_meanings(kind, values, **options):
    """Build semantic measures of whatever is there, all else as it should be."""
    return kind(**values) if kind is likeness.ChannelSemantics else BUILD(kind, values, **options)


BUILD = strict.build
# Each check, and what it protects: without it, something else than UnbraidError comes out.
CHECKS = {
    "records": (records, "records_fault", lambda *_: None, "scan"),
    "weights of a layer": (records, "layer_fault", lambda *_: None, "scan"),
    "numbers of a layer": (layers.LayerSpec, "check", lambda _: None, "manifest"),
    "types of a manifest": (manifest, "build", lambda kind, values: kind(**values), "manifest"),
    "types of a split": (splits, "build", lambda kind, values: kind(**values), "split"),
    "types of meanings": (results, "build", without_types_of_meanings, "evaluation"),
    "errors of features": (features, "Exception", ZeroDivisionError, "features"),
    "depth of JSON": (strict, "RecursionError", ZeroDivisionError, "settings"),
    "errors of pictures": (pictures, "Exception", ZeroDivisionError, "picture"),
    "errors of tensors": (tensors, "Exception", ZeroDivisionError, "tensors"),
    "errors of weights": (states, "Exception", ZeroDivisionError, "weights"),
}


@pytest.mark.parametrize("check_left_out", CHECKS)
def test_a_check_left_out_is_noticed(check_left_out, seeds, tmp_path, monkeypatch):
    module, name, instead, reader = CHECKS[check_left_out]
    monkeypatch.setattr(module, name, instead, raising=False)
    with pytest.raises(Escaped):
        fuzz(READERS[reader], seeds, tmp_path, 2000, (Phase.generate,))
