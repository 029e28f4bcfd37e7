"""Model specs: what people give and get wrong."""

import sys
from unittest.mock import Mock

import pytest
import torch

from unbraid.base.errors import ModelError, UsageError
from unbraid.networks.models import import_torchvision, load_model

OWN = """
import torch
from torch import nn

net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
net[0].unused = nn.Linear(3, 3, device="meta")

def to_tensor(picture):
    return torch.ones(3, 2, 2)

def build():
    return """


def own(returned, folder):
    (folder / "own.py").write_text(OWN + returned)
    return f"{folder}/own.py:build"


def test_load_model_of_a_function_takes_what_it_returns(tmp_path):
    for returned, names, assumed in (
        ("net", (), True),
        ("(net, to_tensor)", (), False),
        ("(net, to_tensor, ['cat', 'dog'])", ("cat", "dog"), False),
        ("(net, None, {1: 'b', 0: 'a'})", ("a", "b"), True),
        ("(net, to_tensor, range(2))", ("0", "1"), False),
    ):
        loaded = load_model(own(returned, tmp_path), device="cpu")
        assert loaded.class_names == names
        assert ("ImageNet's usual one is assumed" in loaded.note) == assumed
        assert assumed or loaded.n_outputs() == 2
        assert not loaded.model.training
        assert loaded.model[0].unused.weight.is_meta  # which is not used


def test_load_model_of_what_is_none_says_what_there_is(tmp_path):
    for spec, weights, hint in (
        ("torchvision:resnet5", None, "resnet50"),
        ("timm:resnet17", None, "resnet18"),
        ("timm:resnet18", "some", "timm's own tag goes into the name"),
        ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("resnet50", None, "torchvision:NAME"),
        ("missing.py:build", None, "no file missing.py"),
        ("OWN net", "some", "no weights file some"),
        ("OWN net", None, "Device 'nonsense'"),
        ("OWN net\n\ndef biuld(): pass\n\ndel build", None, "Did you mean biuld"),
        ("OWN net\n\n1 / 0", None, r"cannot be run \(ZeroDivisionError: division by zero\)"),
        ("OWN 1 / 0", None, r"fails \(ZeroDivisionError: .*\); it is called without arguments"),
        ("OWN 3", None, r"must return a network.* not int\."),
        ("OWN ()", None, r"must return a network.* not tuple\."),
        ("OWN (net, None, 'ab')", None, "a str for output names; give a list of texts"),
    ):
        if spec.startswith("OWN "):
            spec = own(spec.removeprefix("OWN "), tmp_path)
        with pytest.raises(UsageError, match=hint):
            load_model(spec, weights, "nonsense")


@pytest.mark.parametrize("spec", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_random_weights_are_the_same_each_time_and_the_callers_numbers_stay(spec):
    pytest.importorskip(spec.partition(":")[0])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_model(spec, "random", "cpu").model.state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = load_model(spec, "random", "cpu").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(value.std() > 0 for value in first.values() if value.is_floating_point())


def test_load_model_without_a_connection_or_with_torchvision_for_another_torch_is_told(monkeypatch):
    refuse = Mock(side_effect=OSError("no route"))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    with pytest.raises(ModelError, match=r"\(no route\); give --weights FILE"):
        load_model("torchvision:resnet18", "IMAGENET1K_V1", "cpu")
    broken = Mock()
    broken.find_spec.side_effect = RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(sys, "meta_path", [broken])
    with pytest.raises(ModelError, match="install both together"):
        import_torchvision()
