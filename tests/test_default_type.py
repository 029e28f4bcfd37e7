"""No number depends on torch's default type: whatever makes a tensor says the tensor's own.

Nor on its default device, which only code of the caller's own sees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
TYPES = [torch.float64, torch.bfloat16, torch.float16]
FACTORIES = {
    *("zeros", "ones", "full", "empty", "rand", "randn", "normal", "arange", "range", "linspace"),
    *("logspace", "eye", "tensor", "as_tensor", "asarray", "scalar_tensor", "fftfreq", "rfftfreq"),
    *("hann_window", "empty_strided", "sparse_coo_tensor", "Tensor", "FloatTensor", "new_tensor"),
}
WITH_WEIGHTS = {
    *("Linear", "Bilinear", "Conv1d", "Conv2d", "Conv3d", "BatchNorm1d", "BatchNorm2d"),
    *("BatchNorm3d", "LayerNorm", "GroupNorm", "Embedding", "PReLU", "MultiheadAttention"),
}


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- what the code says ---------------------------------------------------------------------------


def untyped(code: str) -> list[str]:
    """Calls that make tensors, or modules with weights, of torch's default type."""
    found = []
    for call in (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)):
        root, _, name = ast.unparse(call.func).rpartition(".")
        makes = (root in ("torch", "torch.fft") and name in FACTORIES) or name == "new_tensor"
        makes = makes or (root in ("nn", "torch.nn") and name in WITH_WEIGHTS)
        if makes and not any(word.arg in ("dtype", None) for word in call.keywords):
            found.append(f"{call.lineno}: {ast.unparse(call)}")
    return found


def test_every_call_that_makes_a_tensor_says_its_type():
    files = sorted(SOURCE.rglob("*.py"))
    assert files
    for file in files:
        calls = untyped(file.read_text(encoding="utf-8"))
        assert not calls, (file, calls)


@pytest.mark.parametrize(
    "call",
    [
        "torch.zeros(3)",
        "torch.full((2,), 0.5)",
        "torch.arange(1.0, 4)",
        "torch.fft.rfftfreq(8)[None]",
        "f(torch.rand(4, generator=g))",
        "nn.Conv2d(3, 4, 1)",
        "torch.as_tensor(value)",
    ],
)
def test_a_call_without_a_type_is_noticed(call):
    assert len(untyped(call)) == 1
    inner = call.rstrip("[None]") if call.endswith("[None]") else call
    typed = ast.parse(inner)
    for node in ast.walk(typed):
        if isinstance(node, ast.Call):
            node.keywords.append(ast.keyword("dtype", ast.parse("torch.float32").body[0].value))
    assert untyped(ast.unparse(typed)) == []


# --- what comes out -------------------------------------------------------------------------------


def fingerprint_of(value: Any) -> Any:
    """Text and bytes, to compare by."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.double().numpy().tobytes()
    return repr(value)


def of_scans(network: nn.Module, images: Any, out: Path) -> dict[str, Any]:
    """All that comes of scans of a network, and of what is split after them."""
    options: dict[str, Any] = {"batch_size": 6, "threads": 1}
    layer = "mix" if "mix" in dict(network.named_modules()) else "layer"
    scan = unbraid.scan(network, layer, images, out / "scan", **options)
    maps = unbraid.scan(network, layer, images, out / "maps", positions=True, **options)
    pairs = unbraid.find(scan, tau=0.01, p=0.1, gamma=0.999)
    found = unbraid.find(maps, channels={1: [[0], [1]], 3: [[0, 3], [2]]})
    pairs.to_csv(out / "pairs.csv")
    splits = [
        unbraid.split(one, found, method=method)
        for one in (scan, maps)
        for method in ("least_squares", "published")
        if one is maps or method == "least_squares"
    ]
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
    unbraid.report(
        out / "page.html", scan=maps, found=found, split=split, dataset=images, maps=maps
    )
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    found_files = {str(path.relative_to(out)): path.read_bytes() for path in files}
    return found_files | {name: fingerprint_of(value) for name, value in made.items()}


def of_demo(out: Path, network: nn.Module | None = None) -> dict[str, Any]:
    """What takes an image network: features, clusters, circuits through it, figures."""
    network, images = network or load_network(), Subset(load_images("train"), range(0, 2400, 8))
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


NETWORKS = [
    ("3x3", torch.float32),
    ("tokens", torch.bfloat16),
    ("pooled features", torch.float64),
]


@pytest.mark.parametrize(("kind", "dtype"), NETWORKS)
def test_what_is_scanned_split_and_measured_depends_on_no_default_type(kind, dtype, tmp_path):
    network, images = build(kind, dtype), SyntheticImages(12, dtype=torch.float32)
    expected = of_scans(network, images, tmp_path / "usual")
    assert len(expected) > 20
    for other in TYPES:
        with default_type(other):
            found = of_scans(network, images, tmp_path / str(other))
        assert differing(expected, found) == []


def test_what_is_made_of_the_demo_depends_on_no_default_type(tmp_path):
    expected = of_demo(tmp_path / "usual")
    for other in TYPES:
        with default_type(other):
            assert differing(expected, of_demo(tmp_path / str(other))) == []


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Numbers are made without content unless told otherwise; stands for an accelerator."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(("kind", "dtype"), NETWORKS)
def test_what_is_scanned_split_and_measured_depends_on_no_default_device(
    kind, dtype, tmp_path, request
):
    network, images = build(kind, dtype), SyntheticImages(12, dtype=torch.float32)
    expected = of_scans(network, images, tmp_path / "usual")
    request.getfixturevalue("elsewhere")
    assert differing(expected, of_scans(network, images, tmp_path / "elsewhere")) == []
    assert torch.get_default_device().type == "meta"


def test_what_is_made_of_the_demo_depends_on_no_default_device(tmp_path, request):
    expected, network = of_demo(tmp_path / "usual"), load_network()
    request.getfixturevalue("elsewhere")
    assert differing(expected, of_demo(tmp_path / "elsewhere", network)) == []


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

    with torch.device("cpu"):
        network = nn.Sequential(Noting(), build("3x3", torch.float32))
        images = NotingImages(8, dtype=torch.float32)
    unbraid.scan(network, "1.layer", images, tmp_path)
    assert met
    assert set(met) == {"meta"}


def test_tokens_beyond_half_precision_are_counted_right_under_any_default_type():
    spec = describe("layer", nn.Conv1d(2, 3, 1, dtype=torch.float32))
    x = torch.ones(1, 2, 3000, dtype=torch.float32)
    for other in TYPES:
        with default_type(other):
            assert pooled_input(spec, x).flatten().tolist() == [3000.0, 3000.0]


def test_a_number_of_the_default_type_is_noticed():
    layer, images = build("1x1", torch.float32), SyntheticImages(2, dtype=torch.float32).images
    found = []
    for other in (torch.float32, torch.bfloat16):
        with default_type(other), torch.no_grad():
            careless = layer(images) * torch.tensor(1 / 3).to(images)
            found.append({"careless": fingerprint_of(careless), "sound": repr(3)})
    assert differing(*found) == ["careless"]


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_networks_of_a_library_are_of_single_precision(spec):
    picture = Image.fromarray(np.arange(90 * 80 * 3, dtype=np.uint8).reshape(90, 80, 3))
    usual = load_model(spec, "random", device="cpu")
    with default_type(torch.bfloat16):
        loaded = load_model(spec, "random", device="cpu")
        assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
        assert torch.equal(loaded.transform(picture), usual.transform(picture))
        assert repr(loaded.transform) == repr(usual.transform)
