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


def returning(returned: str, folder: Path) -> str:
    """The spec of a function that returns this, which may use `net`."""
    file = folder / "it.py"
    file.write_text(
        f"from torch.nn import Identity\nnet = Identity()\nbuild = lambda: {returned}\n"
    )
    return f"{file}:build"


def test_load_model_of_a_function_gives_network_preprocessing_and_names(own: Path) -> None:
    loaded = load_model(f"{own}:build", device="cpu")
    assert loaded.class_names == ("cat", "dog")
    assert loaded.n_outputs() == 2
    assert not loaded.model.training
    parts = load_model(f"{own}:with_parts", device="cpu").model
    assert parts[0].unused.weight.is_meta  # which is not used


@pytest.mark.parametrize(
    ("returned", "names", "assumed"),
    [
        ("net", (), True),
        ("(net, lambda picture: None)", (), False),
        ("(net, None, {1: 'b', 0: 'a'})", ("a", "b"), True),
        ("(net, len, range(2))", ("0", "1"), False),
    ],
)
def test_load_model_says_where_preprocessing_is_assumed(returned, names, assumed, tmp_path):
    loaded = load_model(returning(returned, tmp_path), device="cpu")
    assert loaded.class_names == names
    assert ("ImageNet's usual one is assumed" in loaded.note) == assumed


@pytest.mark.parametrize(
    ("returned", "hint"),
    [
        ("3", r"must return a network.* not int\."),
        ("(net, None, ['a'], 3)", "must return a network"),
        ("(net, None, 'ab')", "a str for output names; give a list of texts"),
        ("(net, None, {'a': 0})", "a dict for output names"),
        ("1 / 0", r"fails \(ZeroDivisionError: division by zero\); it is called without arguments"),
    ],
)
def test_load_model_of_a_function_that_returns_no_network_says_what_to_return(
    returned, hint, tmp_path
):
    with pytest.raises(UsageError, match=hint):
        load_model(returning(returned, tmp_path), device="cpu")


@pytest.mark.parametrize("spec", ["torchvision:resnet18", "timm:resnet18"])
def test_load_model_with_random_weights_needs_no_download(spec: str) -> None:
    assert load_model(spec, "random", "cpu").n_outputs() == 1000


@pytest.mark.parametrize(
    ("spec", "weights", "hint"),
    [
        ("torchvision:resnet5", None, "resnet50"),
        ("timm:resnet17", None, "resnet18"),
        ("timm:resnet18", "some", "timm's own tag goes into the name"),
        ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("resnet50", None, "torchvision:NAME"),
        ("missing.py:build", None, "no file missing.py"),
        ("OWN:build", "some", "no weights file some"),
        ("OWN:build", None, "Device 'nonsense'"),
        ("OWN:biuld", None, "Did you mean build"),
    ],
)
def test_load_model_of_an_unknown_name_says_what_there_is(spec, weights, hint, own):
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
