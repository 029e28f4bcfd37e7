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
    (tmp_path / "part").mkdir()
    (tmp_path / "part/of.py").write_text("def fail():\n    raise ValueError('a\\nb')")
    for spec, weights, hint in (
        ("torchvision:resnet5", None, "resnet50"),
        ("timm:resnet17", None, "resnet18"),
        ("timm:resnet18", "some", "timm's own tag goes into the name"),
        ("torchvision:resnet50", "IMAGENET1K_V9", "IMAGENET1K_V1"),
        ("resnet50", None, "torchvision:NAME"),
        ("missing.py:build", None, "no file missing.py"),
        ("OWN net", "some", "no weights file some"),
        ("OWN net", None, "Device 'nonsense' is none that torch knows; leave --device out"),
        ("OWN net\n\ndef biuld(): pass\n\ndel build", None, "Did you mean biuld"),
        ("OWN net\n\n1 / 0", None, r"cannot be run \(Zero.*zero, raised in own.py, line 14\)\."),
        ("OWN 1 / 0", None, r"fails \(ZeroDivisionError: .*\); it is called without arguments"),
        ("OWN torch.zeros(2).view(3)", None, r"\(RuntimeError: .*, raised in own.py, line 12\); "),
        ("OWN fail()\n\nfrom part.of import fail", None, r"in part/of.py, line 2\); it is"),
        ("OWN next(iter(()))", None, r"fails \(StopIteration, raised in own.py, line 12\); it"),
        ("OWN exit(3)", None, r"ended Python by sys.exit\(3\), raised in own.py, line 12; let"),
        ("OWN net\n\nraise SystemExit", None, r"own.py ended Python by sys.exit\(\), raised in"),
        ("OWN 3", None, r"must return a network.* not int\."),
        ("OWN ()", None, r"must return a network.* not tuple\."),
        ("OWN (net, None, 'ab')", None, "a str for output names; give a list of texts"),
    ):
        if spec.startswith("OWN "):
            spec = own(spec.removeprefix("OWN "), tmp_path)
        with pytest.raises(UsageError, match=hint):
            load_model(spec, weights, "nonsense")


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])  # as torch was built
def test_load_model_on_a_device_that_is_not_there_says_what_to_do(error, tmp_path, monkeypatch):
    refuse = Mock(side_effect=error("Torch not compiled\nwith CUDA enabled."))
    monkeypatch.setattr(torch.nn.Module, "_apply", refuse)
    told = r"'cuda' cannot be used \(Torch .* with CUDA enabled\); .*, or give --device cpu\.$"
    with pytest.raises(UsageError, match=told):
        load_model(own("net", tmp_path), device="cuda")


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
