"""No number depends on torch's default type: whatever makes a tensor says the tensor's own.

Nor on its default device, which only code of the caller's own sees.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Subset

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.demo.network import load_images, load_network
from unbraid.networks.layers import describe
from unbraid.networks.models import load_model
from unbraid.networks.spec import pooled_input
from unbraid.networks.weights import hash_weights
from unbraid.scanning.scan import usable_layers

SOURCE = Path(unbraid.__file__).parent
MAKES = re.compile(
    r"torch(\.fft)?\.(zeros|ones|full|empty|rand|randn|normal|arange|range|linspace|logspace|eye"
    r"|tensor|as_tensor|asarray|scalar_tensor|r?fftfreq|hann_window|empty_strided|Tensor"
    r"|sparse_coo_tensor|FloatTensor)|.*\.new_tensor"
    r"|(torch\.)?nn\.(Linear|Bilinear|Conv.d|BatchNorm.d|LayerNorm|GroupNorm|Embedding|PReLU"
    r"|MultiheadAttention)"
)


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def untyped(code: str) -> list[str]:
    """Calls that make tensors, or modules with weights, of torch's default type."""
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if MAKES.fullmatch(ast.unparse(call.func))
        and not any(word.arg in ("dtype", None) for word in call.keywords)
    ]


def test_every_call_that_makes_a_tensor_says_its_type():
    for call in (
        "torch.full((2,), 0.5{})",
        "f(torch.fft.rfftfreq(8{})[None])",
        "nn.Conv2d(3, 4{})",
    ):
        assert len(untyped(call.format(""))) == 1
        assert untyped(call.format(", dtype=torch.float32")) == []
    found = {f.name: untyped(f.read_text(encoding="utf-8")) for f in sorted(SOURCE.rglob("*.py"))}
    assert {name: calls for name, calls in found.items() if calls} == {}
    assert found


# --- what comes out -------------------------------------------------------------------------------


def fingerprint_of(value: Any) -> Any:
    """Text and bytes, to compare by."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.double().numpy().tobytes()
    return repr(value)


def of_scans(network: nn.Module, out: Path) -> dict[str, Any]:
    """All that comes of scans of a network, and of what is split after them."""
    with torch.device("cpu"), default_type(torch.float32):
        images = SyntheticImages(12, dtype=torch.float32)
    options: dict[str, Any] = {"batch_size": 6, "threads": 1}
    layer = "layer"
    scan = unbraid.scan(network, layer, images, out / "scan", **options)
    maps = unbraid.scan(network, layer, images, out / "maps", positions=True, **options)
    unbraid.find(scan, tau=0.01, p=0.1, gamma=0.999).to_csv(out / "pairs.csv")
    found = unbraid.find(maps, channels={1: [[0], [1]], 3: [[0, 3], [2]]})
    splits = [unbraid.split(one, found) for one in (scan, maps)]
    splits.append(unbraid.split(maps, found, method="published"))
    for k, split in enumerate(splits):
        split.save(out / f"split-{k}")
    split = splits[1]
    model2 = unbraid.apply(network, split)
    x = torch.stack([images[k][0] for k in range(4)]).to(next(network.parameters()).dtype)
    with torch.no_grad(), unbraid.gate(model2, layer, 1, 0, 0.3):
        gated = model2(x)
    with torch.no_grad(), unbraid.clamp(model2, layer, 3, 1, -0.1, 0.3):
        clamped = model2(x)
    plain = unbraid.apply(network, split, form="plain")
    encoder = unbraid.Penultimate(network)
    made = {
        "gated": gated,
        "clamped": clamped,
        "sensitivity": unbraid.sensitivity(scan, found=found),
        "output": unbraid.compare_outputs(network, model2, images, tolerance=0.0),
        "plain form": unbraid.compare_outputs(network, plain, images, tolerance=1.0),
        "ablation": unbraid.ablate(model2, images, scan=scan),
        "evaluation": unbraid.evaluate(split, maps, baseline=splits[2], tau=0.01),
        "evaluation of sums": unbraid.evaluate(splits[0], scan),
        "semantics": unbraid.measure_semantics(split, maps, images, encoder, n_top=3),
        "circuit": unbraid.circuit(split, scan, 1, 0),
    }
    page = {"scan": maps, "found": found, "split": split, "dataset": images, "maps": maps}
    unbraid.report(out / "page.html", **page)
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return files | {name: fingerprint_of(value) for name, value in made.items()}


def of_demo(network: nn.Module, out: Path) -> dict[str, Any]:
    """What takes an image network: features, clusters, circuits through it, figures."""
    images = Subset(load_images("train"), range(0, 2400, 8))
    scan = unbraid.scan(network, "mix", images, out / "scan", batch_size=50, threads=1)
    clusters = unbraid.find(scan, concepts="clusters")
    split = unbraid.split(scan, unbraid.find(scan, channels={0: [[0], [1, 2]]}))
    before = unbraid.scan(network, "look.4", images, out / "before", batch_size=50, threads=1)
    early = unbraid.split(before, unbraid.find(before, channels={2: [[0], [3]]}))
    model2 = unbraid.apply(network, split)
    features = [
        unbraid.visualize(model2, "mix", images, [0], steps=2, spectrum=spectrum)
        for spectrum in (False, True)
    ]
    made: dict[str, Any] = {
        "weights": hash_weights(network),
        "clusters": clusters.concepts,
        "centres": [cluster.centres.tolist() for cluster in clusters.clusters.values()],
        "circuit": unbraid.circuit_from(early, split, scan, network, images, 0, 0),
        "pictures": [f.picture.tobytes() for one in features for f in one.features],
        "answers": [f.responses for one in features for f in one.features],
        "layers": [spec.name for spec in usable_layers(network, torch.stack([images[0][0]]))],
        "crops": unbraid.measure_semantics(split, scan, images, unbraid.Penultimate(network)),
    }
    return {name: fingerprint_of(value) for name, value in made.items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """Numbers are made without content unless told otherwise; stands for an accelerator."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


CASES = {  # what is made, of a network of a type, and another default type
    "3x3": (of_scans, torch.float32, torch.float64),
    "tokens": (of_scans, torch.bfloat16, torch.float16),
    "pooled features": (of_scans, torch.float64, torch.bfloat16),
    "demo": (of_demo, None, torch.bfloat16),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_made_depends_on_no_default_type_or_device(case, tmp_path, elsewhere):
    make, own, other = CASES[case]
    network = load_network() if own is None else build(case, own)
    expected = make(network, tmp_path / "usual")
    assert len(expected) > (7 if own is None else 20)
    with default_type(other):
        assert differing(expected, make(network, tmp_path / "other")) == []
    elsewhere()
    assert differing(expected, make(network, tmp_path / "elsewhere")) == []
    assert torch.get_default_device().type == "meta"


def test_a_number_of_the_default_type_is_noticed():
    layer, images = build("1x1", torch.float32), SyntheticImages(2, dtype=torch.float32).images
    found = []
    for other in (torch.float32, torch.bfloat16):
        with default_type(other), torch.no_grad():
            careless = layer(images) * torch.tensor(1 / 3).to(images)
            found.append({"careless": fingerprint_of(careless), "sound": repr(3)})
    assert differing(*found) == ["careless"]


def test_code_of_the_caller_keeps_the_caller_s_default_device(tmp_path, elsewhere):
    met: list[str] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            met.append(torch.empty(1).device.type)
            return x

    class NotingImages(SyntheticImages):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            met.append(torch.empty(1).device.type)
            return super().__getitem__(index)

    network = nn.Sequential(Noting(), build("3x3", torch.float32))
    images = NotingImages(8, dtype=torch.float32)
    elsewhere()
    unbraid.scan(network, "1.layer", images, tmp_path)
    assert set(met) == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tokens_beyond_half_precision_are_counted_right_under_any_default_type(dtype):
    spec = describe("layer", nn.Conv1d(2, 3, 1, dtype=torch.float32))
    x = torch.ones(1, 2, 3000, dtype=torch.float32)
    with default_type(dtype):
        assert pooled_input(spec, x).flatten().tolist() == [3000.0, 3000.0]


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_networks_of_a_library_are_of_single_precision(spec):
    picture = Image.fromarray(np.arange(90 * 80 * 3, dtype=np.uint8).reshape(90, 80, 3))
    usual = load_model(spec, "random", device="cpu")
    with default_type(torch.bfloat16):
        loaded = load_model(spec, "random", device="cpu")
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        assert torch.equal(loaded.transform(picture), usual.transform(picture))
        assert repr(loaded.transform) == repr(usual.transform)
