"""No number depends on torch's default type or device, which only code of the caller's sees."""

from functools import partial

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
from unbraid.running import run as running
from unbraid.running.folders import Thresholds
from unbraid.running.run import run
from unbraid.scanning.scan import usable_layers
from unbraid.scanning.scan_options import Loading


@pytest.fixture
def set_defaults():
    """Choose what numbers are made as unless told otherwise; "meta" stands for an accelerator."""

    def choose(dtype=torch.float32, device=None):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)

    yield choose
    choose()


def fingerprint_of(value):
    """Text and bytes, to compare by."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.double().numpy().tobytes()
    return repr(value)


def made_of(network, layer, images, out):
    """Every file of a run, and what is done with its split after it."""
    tiny = layer == "layer"
    options = {"loading": Loading(batch_size=len(images) // 2), "source": {}, "title": "x"}
    thresholds = Thresholds(0.01, 0.1, 0.999) if tiny else Thresholds(concepts="clusters")
    done = run(network, layer, images, images, out, thresholds=thresholds, say=str, **options)
    split, channel = done.split, done.split.channels[0].channel
    model2, plain = (unbraid.apply(network, split, form=form) for form in ("exact", "plain"))
    x = torch.stack([images[k][0] for k in range(4)]).to(next(network.parameters()).dtype)
    with torch.no_grad(), unbraid.gate(model2, layer, channel, 0, 0.3):
        gated = model2(x)
    with torch.no_grad(), unbraid.clamp(model2, layer, channel, 1, -0.1, 0.3):
        clamped = model2(x)
    made = {
        **{"gated": gated, "clamped": clamped},
        "plain form": unbraid.compare_outputs(network, plain, images, tolerance=1.0),
        "sums": unbraid.evaluate(unbraid.split(done.train_scan, done.found), done.train_scan),
        "circuit": unbraid.circuit(split, done.train_scan, channel, 0),
        "evaluation": done.evaluation,
        "explained": [own.to_dict() for own in unbraid.explain(model2, x).images],
        "layers": [spec.name for spec in usable_layers(network, x[:1])],
    }
    made |= {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return {name: fingerprint_of(value) for name, value in made.items()}


def differing(one, other):
    return [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]


@pytest.mark.parametrize(
    ("case", "own", "other"),
    [
        ("3x3", torch.float32, torch.float64),
        ("tokens", torch.bfloat16, torch.float16),
        ("demo", torch.float32, torch.bfloat16),
    ],
)
def test_no_default_type_or_device_changes_a_result(
    case, own, other, tmp_path, set_defaults, monkeypatch
):
    quick = partial(running.visualize, steps=2, spectrum=case == "3x3")
    monkeypatch.setattr(running, "visualize", quick)
    monkeypatch.setattr(running, "SECONDS", 0.0)
    if case == "demo":
        made = load_network(), "mix", Subset(load_images("train"), range(0, 4800, 16))
    else:
        made = build(case, own), "layer", SyntheticImages(12, dtype=torch.float32)
    expected = made_of(*made, tmp_path / "usual")
    assert len(expected) > 20
    set_defaults(other)
    assert differing(expected, made_of(*made, tmp_path / "other")) == []
    set_defaults(device="meta")
    assert differing(expected, made_of(*made, tmp_path / "elsewhere")) == []
    assert torch.get_default_device().type == "meta"


def test_a_number_of_the_default_type_is_noticed_and_tokens_are_counted_right(set_defaults):
    layer, images = build("1x1", torch.float32), SyntheticImages(2, dtype=torch.float32).images
    found = []
    for other in (torch.float32, torch.bfloat16):
        set_defaults(other)
        careless = layer(images).detach() * torch.tensor(1 / 3).to(images)
        found.append({"careless": fingerprint_of(careless), "sound": repr(3)})
    assert differing(*found) == ["careless"]
    spec = describe("layer", nn.Conv1d(2, 3, 1, dtype=torch.float32))
    x = torch.ones(1, 2, 3000, dtype=torch.float32)
    for other in (torch.float64, torch.bfloat16, torch.float16):
        set_defaults(other)
        assert pooled_input(spec, x).flatten().tolist() == [3000.0, 3000.0]


def test_code_of_the_caller_keeps_the_caller_s_default_device(tmp_path, set_defaults):
    met = []

    class NotingImages(SyntheticImages):
        def __getitem__(self, index):
            met.append(f"images on {torch.empty(1).device.type}")
            return super().__getitem__(index)

    network = build("3x3", torch.float32)
    network.register_forward_pre_hook(lambda *_: met.append(f"on {torch.empty(1).device.type}"))
    images = NotingImages(8, dtype=torch.float32)
    set_defaults(device="meta")
    unbraid.scan(network, "layer", images, tmp_path)
    assert set(met) == {"images on meta", "on meta"}


@pytest.mark.parametrize("spec", ["timm:resnet18", "torchvision:resnet18"])
def test_networks_of_a_library_are_of_single_precision(spec, set_defaults):
    picture = Image.fromarray(np.arange(90 * 80 * 3, dtype=np.uint8).reshape(90, 80, 3))
    usual = load_model(spec, "random", device="cpu")
    set_defaults(torch.bfloat16)
    loaded = load_model(spec, "random", device="cpu")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert torch.equal(loaded.transform(picture), usual.transform(picture))
    assert repr(loaded.transform) == repr(usual.transform)
