"""Model specs: what people give and get wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from unbraid.base.errors import ModelError, UsageError
from unbraid.networks.models import import_torchvision, load_model

OWN = """
import numpy as np
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    return net, to_tensor, ["cat", "dog"]

def to_tensor(picture):
    return torch.tensor(np.asarray(picture.resize((8, 8)))).permute(2, 0, 1) / 255

def nothing():
    return 3

def many():
    return nn.Identity(), None, ["a"], 3

def texts():
    return nn.Identity(), None, "ab"

def with_parts():
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    network[0].unused = nn.Linear(3, 3, device="meta")
    return network

def fails():
    raise ValueError("on purpose")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_load_model_of_a_function_gives_network_preprocessing_and_names(own: Path) -> None:
    loaded = load_model(f"{own}:build", device="cpu")
    assert loaded.class_names == ("cat", "dog")
    assert loaded.n_outputs() == 2
    assert not loaded.model.training
    parts = load_model(f"{own}:with_parts", device="cpu").model
    assert parts[0].unused.weight.is_meta  # which is not used


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_load_model_with_random_weights_needs_no_download(spec: str) -> None:
    assert load_model(spec, "random", "cpu").n_outputs() == 1000


@pytest.mark.parametrize(
    ("spec", "weights", "hint"),
    [
        ("torchvision:resnet5", None, "resnet50"),
        ("timm:resnet17", None, "resnet18"),
        ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("resnet50", None, "torchvision:NAME"),
        ("missing.py:build", None, "no file missing.py"),
        ("OWN:build", "some", "no weights file some"),
        ("OWN:build", None, "Device 'nonsense'"),
        ("OWN:biuld", None, "Did you mean build"),
        ("OWN:nothing", None, "must return a network"),
        ("OWN:many", None, "must return a network"),
        ("OWN:texts", None, "a str for output names; give a list of texts"),
        ("OWN:fails", None, r"fails \(ValueError: on purpose\); it is called without arguments"),
    ],
)
def test_load_model_of_an_unknown_name_says_what_there_is(
    spec: str, weights: str | None, hint: str, own: Path
) -> None:
    with pytest.raises(UsageError, match=hint):
        load_model(spec.replace("OWN", str(own)), weights, "nonsense")


def test_load_model_without_a_connection_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"\(no route\); give --weights FILE"):
        load_model("torchvision:resnet18", "IMAGENET1K_V1", "cpu")


def test_import_torchvision_built_for_another_torch_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ModelError, match="install both together"):
        import_torchvision()


@pytest.mark.parametrize(
    ("returned", "assumed"),
    [("net", True), ("(net, lambda picture: None)", False), ("(net, len, ['a'])", False)],
)
def test_load_model_says_where_preprocessing_is_assumed(tmp_path, returned, assumed):
    file = tmp_path / "own.py"
    file.write_text(
        f"import torch\ndef build():\n    net = torch.nn.Linear(2, 2)\n    return {returned}\n"
    )
    note = load_model(f"{file}:build").note
    assert ("ImageNet's usual one is assumed" in note) == assumed
