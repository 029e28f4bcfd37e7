"""Whatever unbraid reads is sound, and can be computed with, or refused in one sentence.

A short run comes with every test run; `-m slow` tries 100,000 inputs (UNBRAID_FUZZ, if set).
"""

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from unbraid.images import pictures
from unbraid.images.pictures import read_picture
from unbraid.measuring import results
from unbraid.measuring.ablate import ablate
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.results import (
    ChannelSemantics,
    Evaluation,
    Likeness,
    Semantics,
    read_ablation,
    read_output,
    read_semantics,
)
from unbraid.networks import checkpoints as states
from unbraid.networks import spec as layers
from unbraid.networks.checkpoints import load_weights
from unbraid.running.check import check
from unbraid.running.folders import read_settings
from unbraid.scanning import manifest, records
from unbraid.scanning.records import Scan
from unbraid.splitting import splits
from unbraid.splitting.splits import Split
from unbraid.visualizing import features
from unbraid.visualizing.features import Feature, Features

resource = pytest.importorskip("resource")  # of Unix

EXAMPLES = 60  # of each reader
MANY = int(os.environ.get("UNBRAID_FUZZ", "100000"))  # of all readers, by hand
MEMORY = 4 * 2**30  # bytes that all of it may take beside what is taken before
OWN = {0: [[0], [1, 2]]}  # concepts, as a search need not find any in so few images
KINDS = ("png", "jpeg", "webp", "bmp", "tiff", "gif", "ppm")


class Escaped(AssertionError):
    """Something else than UnbraidError came out of a reader."""


@dataclass
class Seeds:
    folder: Path  # of sound files
    scan: Scan
    split: Split


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> Seeds:
    folder = tmp_path_factory.mktemp("seeds")
    network = build("uneven")  # padded, so that lies about padding matter
    images = SyntheticImages(9)
    images.ids = [f"folder/{k}.png" for k in range(9)]
    scan = unbraid.scan(network, "layer", images, folder / "scan", positions=True)
    # Shards that do not say whose they are, as any manifest that is lied about would disown them.
    nameless = Path(shutil.copytree(scan.path, folder / "nameless"))
    records.write_shard(nameless, 0, records.read_shard(scan.path, 0))
    split = unbraid.split(scan, unbraid.find(scan, channels=OWN), method="published", rho=0.7)
    split.save(folder / "split.safetensors")
    model2 = unbraid.apply(network, split)
    likeness = Likeness(0.5, 0.25)
    semantics = ChannelSemantics(
        "it", 9, 2, False, False, likeness, (likeness, likeness), 1.0, float("nan")
    )
    result = unbraid.evaluate(
        split,
        scan,
        output=OutputComparison(0.0, 1.0, 0.5, 0.5),
        ablation=ablate(model2, images),
        semantics=Semantics({0: semantics}),
    )
    result.save(folder / "evaluation.json")
    run = {"title": "t", "thresholds": {"tau": "auto", "concepts": "classes"}, "source": {}}
    (folder / "settings.json").write_text(json.dumps(run))
    Features("layer", "0", (Feature(0, None, 0, Image.new("RGBA", (8, 8)), (1.0, 2.0)),)).save(
        folder / "features"
    )
    noise = np.random.default_rng(0).integers(0, 255, (24, 16, 3), np.uint8)
    for kind in KINDS:
        Image.fromarray(noise).save(folder / f"picture.{kind}")
    layer = torch.nn.Linear(3, 2)
    torch.save(layer.state_dict(), folder / "weights.pt")
    torch.save(layer.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    files.write_tensors(folder / "weights.safetensors", dict(layer.state_dict()), {})
    return Seeds(folder, scan, split)


def use_scan(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    """A scan of which one file is tampered with: opened, searched, split and measured."""
    own = fresh(folder / "scan", seeds.folder / "scan")
    name = data.draw(st.sampled_from(("manifest.json", "layer", "shard-000000", "shard-000000")))
    if name.endswith(".json"):
        (own / name).write_bytes(data.draw(tampered_json(own / name)))
    else:
        path = own / f"{name}.safetensors"
        path.write_bytes(data.draw(tampered(path)))
    sound_or_refused(lambda: list(unbraid.open_scan(own).shards()))
    sound_or_refused(
        lambda: [unbraid.open_scan(own).broken(), unbraid.open_scan(own).labels_seen()]
    )
    sound_or_refused(lambda: unbraid.open_scan(own).ids())
    sound_or_refused(lambda: str(unbraid.find(unbraid.open_scan(own), tau="auto")))
    sound_or_refused(lambda: str(unbraid.find(unbraid.open_scan(own), concepts="clusters")))
    sound_or_refused(lambda: work(unbraid.open_scan(own), own))
    sound_or_refused(lambda: str(unbraid.evaluate(seeds.split, unbraid.open_scan(own))))
    sound_or_refused(lambda: str(check(own)))


def use_manifest(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    own = fresh(folder / "scan", seeds.folder / "nameless")
    path = own / "manifest.json"
    path.write_bytes(data.draw(tampered_json(path)))
    sound_or_refused(lambda: list(unbraid.open_scan(own).shards()))
    sound_or_refused(lambda: str(check(own)))


def work(scan: Scan, folder: Path) -> None:
    found = unbraid.find(scan, channels=OWN)
    found.to_csv(folder / "findings.csv")
    unbraid.evaluate(unbraid.split(scan, found, method="published"), scan)
    unbraid.evaluate(unbraid.split(scan, found), scan).save(folder / "evaluation.json")


def use_split(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    path = folder / "split.safetensors"
    path.write_bytes(data.draw(tampered(seeds.folder / path.name)))

    def use() -> None:
        split = Split.load(path)
        evaluation = unbraid.evaluate(split, seeds.scan)
        assert str(evaluation) + str(split)
        split.save(folder / "again.safetensors")

    sound_or_refused(use)


def use_evaluation(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    path = folder / "evaluation.json"
    path.write_bytes(data.draw(tampered_json(seeds.folder / path.name)))

    def use() -> None:
        measured: dict[str, Any] = {
            "output": read_output(path),
            "ablation": read_ablation(path),
            "semantics": read_semantics(path),
        }
        result: Evaluation = unbraid.evaluate(seeds.split, seeds.scan, **measured)
        result.save(folder / "again.json")
        assert [str(one) for one in (result, *measured.values())]

    sound_or_refused(use)


def use_settings(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    (folder / "settings.json").write_bytes(data.draw(tampered_json(seeds.folder / "settings.json")))
    sound_or_refused(lambda: read_settings(folder))


def use_features(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    own = fresh(folder / "features", seeds.folder / "features")
    if data.draw(st.booleans()):
        path = own / "features.json"
        path.write_bytes(data.draw(tampered_json(path)))
    else:
        path = own / "0.png"
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    sound_or_refused(lambda: Features.load(own).save(folder / "again"))


def use_picture(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    path = folder / "picture"
    path.write_bytes(data.draw(damaged((seeds.folder / f"picture.{kind}").read_bytes())))

    def use() -> None:
        picture = read_picture(path)
        assert picture.mode == "RGB"
        picture.load()

    sound_or_refused(use)


def use_weights(data: st.DataObject, seeds: Seeds, folder: Path) -> None:
    name = data.draw(st.sampled_from(("weights.pt", "old.pt", "weights.safetensors")))
    path = folder / name
    sound = seeds.folder / name
    if name.endswith(".pt"):
        path.write_bytes(data.draw(damaged(sound.read_bytes())))
    else:
        path.write_bytes(data.draw(tampered(sound)))
    sound_or_refused(lambda: load_weights(torch.nn.Linear(3, 2), path))


Use = Callable[[st.DataObject, Seeds, Path], None]
READERS: dict[str, Use] = {
    "scan": use_scan,
    "manifest": use_manifest,
    "split": use_split,
    "evaluation": use_evaluation,
    "settings": use_settings,
    "features": use_features,
    "picture": use_picture,
    "weights": use_weights,
}


def fresh(folder: Path, sound: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(sound, folder))


def sound_or_refused(read: Callable[[], object]) -> None:
    try:
        read()
    except UnbraidError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 2000
    except Exception as error:
        raise Escaped(f"{type(error).__name__}: {str(error)[:300]}") from error


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let allocations beyond a bound fail, as what is not UnbraidError then comes out."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(use: Use, seeds: Seeds, folder: Path, n: int, phases: tuple[Phase, ...] = ()) -> None:
    """Try n inputs, always the same ones."""

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        phases=phases or (Phase.generate, Phase.shrink),
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        use(data, seeds, folder)

    # What could only be written to the screen is not looked at here.
    with bounded_memory(), contextlib.redirect_stderr(io.StringIO()):
        run()


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="bounds of Linux")
pytestmark = [needs_proc, pytest.mark.filterwarnings("ignore")]


def many_of(n_readers: int) -> Any:
    """How many inputs each reader gets where all are fuzzed for long."""
    return pytest.param(-(-MANY // n_readers), marks=pytest.mark.slow)


@pytest.mark.parametrize("n", [EXAMPLES, many_of(len(READERS))])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_read_is_sound_or_refused(reader, n, seeds, tmp_path):
    fuzz(READERS[reader], seeds, tmp_path, n)


def test_what_is_sound_is_read(seeds, tmp_path):
    """Else refusing everything would pass."""
    scan = unbraid.open_scan(seeds.folder / "scan")
    assert sum(map(len, scan.shards())) == 9
    work(scan, tmp_path)
    assert Split.load(seeds.folder / "split.safetensors").channels[0].channel == 0
    ablation = read_ablation(seeds.folder / "evaluation.json")
    assert ablation is not None
    assert ablation.channels[0].concepts[1].classes == (1, 2)
    assert read_semantics(seeds.folder / "evaluation.json") is not None
    assert read_output(seeds.folder / "evaluation.json") is not None
    assert read_settings(seeds.folder) is not None
    assert Features.load(seeds.folder / "features").channels == (0,)
    for kind in KINDS:
        assert read_picture(seeds.folder / f"picture.{kind}").size == (16, 24)
    for name in ("weights.pt", "old.pt", "weights.safetensors"):
        load_weights(torch.nn.Linear(3, 2), seeds.folder / name)
    assert zipfile.is_zipfile(seeds.folder / "weights.pt")


def test_memory_beyond_the_bound_is_noticed():
    with bounded_memory(), pytest.raises(Escaped, match="MemoryError"):
        sound_or_refused(lambda: bytearray(2 * MEMORY))


# Each check, and what it protects: without it, something else than UnbraidError comes out.
def without_types_of_meanings(kind: Any, values: Any, **options: Any) -> Any:
    """Build semantic measures of whatever is there, all else as it should be."""
    return kind(**values) if kind is ChannelSemantics else BUILD(kind, values, **options)


BUILD = strict.build
CHECKS: dict[str, tuple[Any, str, Any, str]] = {
    "records": (records, "records_fault", lambda *_: None, "scan"),
    "weights of a layer": (records, "layer_fault", lambda *_: None, "scan"),
    "numbers of a layer": (layers.LayerSpec, "check", lambda _: None, "manifest"),
    "types of a manifest": (manifest, "build", lambda kind, values: kind(**values), "manifest"),
    "types of a split": (splits, "build", lambda kind, values: kind(**values), "split"),
    "types of meanings": (results, "build", without_types_of_meanings, "evaluation"),
    "errors of features": (features, "Exception", ZeroDivisionError, "features"),
    "depth of JSON": (strict, "RecursionError", ZeroDivisionError, "settings"),
    "errors of pictures": (pictures, "Exception", ZeroDivisionError, "picture"),
    "errors of weights": (states, "Exception", ZeroDivisionError, "weights"),
}


@pytest.mark.parametrize("check_left_out", CHECKS)
def test_a_check_left_out_is_noticed(check_left_out, seeds, tmp_path, monkeypatch):
    module, name, instead, reader = CHECKS[check_left_out]
    monkeypatch.setattr(module, name, instead, raising=False)
    with pytest.raises(Escaped):
        fuzz(READERS[reader], seeds, tmp_path, 2000, (Phase.generate,))
