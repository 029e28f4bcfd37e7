"""Weights in files of every kind: what training scripts write loads, else a sentence says why."""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import enum
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from unbraid.base.errors import ModelError
from unbraid.networks import checkpoints
from unbraid.networks.checkpoints import load_weights
from unbraid.networks.models import load_model

State = dict[str, Any]


def network(n_classes: int = 4) -> nn.Module:
    parts = {"c1": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, n_classes)}
    return nn.Sequential(collections.OrderedDict(parts))


def trained(n_classes: int = 4) -> State:
    torch.manual_seed(1)
    return {name: tensor + 1 for name, tensor in network(n_classes).state_dict().items()}


STATE = trained()
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
HALF = {name: t.half() if t.is_floating_point() else t for name, t in STATE.items()}
UNCOUNTED = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}


def under(prefix: str, state: State = STATE) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def saved(tmp_path: Path, content: Any, name: str = "w.pt", **options: Any) -> Path:
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def loaded(path: Path, model: nn.Module | None = None) -> State:
    model = network() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(model, path)
    return model.state_dict()


def assert_is(state: State, expected: State = STATE) -> None:
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


class Phase(enum.Enum):
    TRAIN = 1


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Attributes(dict[str, Any]):
    pass


def neighbours() -> dict[str, Any]:
    model = network()
    adam = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adam.step()
    return {
        "optimizer": adam.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(adam, 3).state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "numbers": [np.float64(3), np.int64(4), 10**50, 1j, float("nan")],
        "arrays": (np.ones(3), np.dtype("f4"), np.random.get_state()),
        "holders": [{1, 2}, frozenset([3]), collections.deque([1]), collections.Counter("aab")],
        "bytes": (b"a" * 300, bytearray(b"b")),
        "random": torch.get_rng_state(),
        "default": collections.defaultdict(list, {"a": [1]}),
        "torch": (torch.Size([1, 2]), torch.device("cpu"), torch.float16),
        "own": (Phase.TRAIN, Settings(), Attributes(a=1)),
        "keys": {(1, (2,)): 3, None: 4, b"a": 5},
        "range": (range(3), slice(1), ..., int, print),
        "text": "é" * 300,
        "parameter": nn.Parameter(torch.zeros(2, 3).t()),
    }


FSDP = "_fsdp_wrapped_module."
LOADS = {
    "plain": STATE,
    "DataParallel": under("module."),
    "torch.compile": under("_orig_mod."),
    "DDP of compiled": under("module._orig_mod."),
    "compiled DDP in Lightning": {"state_dict": under("model.module._orig_mod."), "epoch": 1},
    "a compiled part": {name.replace("c1.", "c1._orig_mod."): t for name, t in STATE.items()},
    "FSDP": {FSDP + name.replace("fc.", f"{FSDP}fc."): t for name, t in STATE.items()},
    "checkpointed": {n.replace("c1", "c1._checkpoint_wrapped_module"): t for n, t in STATE.items()},
    "a part in DataParallel": {n.replace("c1", "c1.module"): t for n, t in STATE.items()},
    "any attribute": {"state_dict": under("my_own_net.")},
    "deep": {"state": {"trainer": {"model": under("a.b.c.")}}},
    "in a list": [1, {"weights": STATE}],
    "same twice": {"state_dict": STATE, "model": dict(STATE)},
    "average alone": {"ema_state_dict": STATE},
    "generator of another network": {"net": STATE, "discriminator": {"c9.weight": torch.ones(1)}},
    "beside any objects": Attributes(**neighbours(), model=under("module.")),
    "half precision": HALF,
    "without counts of batches": UNCOUNTED,
    **{key: {key: STATE, "epoch": 3} for key in ("model_state_dict", "net", "module", "params")},
}
EXPECTED = {
    "half precision": {n: t.float() if t.is_floating_point() else t for n, t in HALF.items()},
    "without counts of batches": {**STATE, "bn.num_batches_tracked": torch.tensor(0)},
}


@pytest.mark.parametrize("form", LOADS)
@pytest.mark.parametrize("old", [False, True])
def test_load_weights_of_a_usual_checkpoint_loads(form: str, old: bool, tmp_path: Path) -> None:
    path = saved(tmp_path, LOADS[form], _use_new_zipfile_serialization=not old)
    assert_is(loaded(path), EXPECTED.get(form, STATE))


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "pytorch_model.bin", "last.ckpt"])
def test_load_weights_goes_by_what_a_file_holds_not_by_its_name(name: str, tmp_path: Path) -> None:
    assert_is(loaded(saved(tmp_path, {"model": STATE, "own": Settings()}, name)))
    safetensors.torch.save_file(under("backbone."), tmp_path / name)
    assert_is(loaded(tmp_path / name))


class Calls:
    """Would call a function if it was made."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("blocked", [False, True])  # torch itself refuses some modules' functions
def test_load_weights_beside_code_runs_none_of_it(blocked: bool, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = Calls(os.mkdir, str(mark)) if blocked else Calls(shutil.copy, __file__, str(mark))
    path = saved(tmp_path, {"hooks": code, "model": STATE})
    if blocked:
        with pytest.raises(ModelError, match="Python code or objects, which are never loaded; sav"):
            loaded(path)
    else:
        assert_is(loaded(path))
    assert not mark.exists()
    torch.load(path, weights_only=False)  # which shows that there was something to run
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "taken"),
    [
        ({"model": STATE, "model_ema": under("module.", OTHER)}, "model"),
        ({"state_dict_ema": OTHER, "state_dict": STATE}, "state_dict"),
        ({"teacher": OTHER, "student": STATE}, "student"),
        ({"state_dict": {**under("net."), **under("net_swa.", OTHER)}}, "state_dict.net"),
        ({"schema": STATE, "ema": OTHER}, "schema"),
    ],
)
def test_load_weights_beside_averages_takes_the_trained_and_tells(
    content: Any, taken: str, tmp_path: Path
) -> None:
    model = network()
    with pytest.warns(UserWarning, match="the one under|lies under") as told:
        load_weights(model, saved(tmp_path, content))
    assert f"the one under {taken} is taken, not" in str(told[0].message)
    assert_is(model.state_dict())


def test_load_weights_tells_what_lies_beside_them_in_their_dictionary(tmp_path: Path) -> None:
    content = {"state_dict": {**under("model."), "loss.weight": torch.ones(2)}}
    model = network()
    with pytest.warns(UserWarning, match=r"only what lies under .*model is .*not .*loss\.weight"):
        load_weights(model, saved(tmp_path, content))
    assert_is(model.state_dict())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b, self.c.weight = self.a, self.a.weight


class Keeps(nn.Linear):
    """Has a state of its own."""

    kept: Any = None

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_load_weights_of_tied_tensors_needs_one_of_them(tmp_path: Path) -> None:
    model, again = Tied(), Tied()
    safetensors.torch.save_model(model, str(tmp_path / "w.safetensors"))
    assert_is(loaded(tmp_path / "w.safetensors", again), model.state_dict())


@pytest.mark.parametrize("kept", [3, None, {"scale": [1.5, "a"]}])
def test_load_weights_hands_on_a_modules_own_state(kept: Any, tmp_path: Path) -> None:
    model, again = Keeps(2, 2), Keeps(2, 2)
    model.kept = kept
    load_weights(again, saved(tmp_path, {"model": model.state_dict()}))
    assert again.kept == kept
    model.kept = Settings()
    with pytest.raises(ModelError, match="never loaded, in the weights"):
        load_weights(again, saved(tmp_path, model.state_dict()))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_load_weights_of_older_names_that_the_network_knows_loads(tmp_path: Path) -> None:
    old = nn.utils.weight_norm(nn.Linear(2, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    load_weights(new, saved(tmp_path, {"model": old.state_dict()}))
    assert torch.equal(new.weight, old.weight)


def test_load_weights_without_a_checksum_loads_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        assert_is(loaded(saved(tmp_path, STATE)))
    finally:
        torch.serialization.set_crc32_options(True)
    path = saved(tmp_path, STATE)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["fc.bias"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"cannot be read \(Bad CRC-32"):
        loaded(path)


def test_load_model_gives_weights_of_a_checkpoint_to_a_function(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(2, 3))\n"
    )
    state = nn.Sequential(nn.Linear(2, 3)).state_dict()
    path = saved(tmp_path, {"state_dict": under("model.", state), "own": Settings()})
    model = load_model(f"{tmp_path}/own.py:build", str(path), "cpu").model
    assert_is(model.state_dict(), state)


def test_load_weights_of_a_network_that_has_names_of_wrappers_loads(tmp_path: Path) -> None:
    """Without the wrapper's name, two of its tensors would have the same."""
    parts = {"fc": nn.Linear(2, 2), "module": nn.ModuleDict({"fc": nn.Linear(2, 2)})}
    model, again = nn.ModuleDict(parts), nn.ModuleDict(copy.deepcopy(parts))
    state = {name: tensor + k for k, (name, tensor) in enumerate(model.state_dict().items())}
    assert_is(loaded(saved(tmp_path, {"state_dict": under("net.", state)}), again), state)
    load_weights(nn.DataParallel(model), saved(tmp_path, under("module.", state)))
    assert_is(model.state_dict(), state)


def test_dictionaries_in_circles_and_many_tensors_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    circle: dict[str, Any] = {"model": STATE}
    inner = circle
    for _ in range(60):  # each twice in the one around: 2**60 ways to the innermost
        inner["a"] = inner["b"] = {}
        inner = inner["a"]
    circle["self"] = circle
    path = saved(tmp_path, circle)
    assert_is(loaded(path))
    monkeypatch.setattr(checkpoints, "_MOST_TENSORS", 7)
    with pytest.raises(ModelError, match="too many tensors"):
        loaded(path)


def test_a_wrong_set_of_weights_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "load", lambda *_, **__: OTHER)
    with pytest.raises(AssertionError):
        assert_is(loaded(saved(tmp_path, STATE)))


def saving(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


def writing(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


NEVER = "holds Python code or objects, which are never loaded"
BOTH = {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER)}}
SEVERAL = "several state dicts that fit the network, under"
NUMBERS = {
    str(kind): {**STATE, "fc.weight": torch.ones(4, 4).to(kind)}
    for kind in (torch.int8, torch.complex64, torch.bool)
}
LAYERS = {f"c{k}.weight": torch.ones(4, 3, 3, 3) for k in range(9)}
SAID: dict[str, tuple[Callable[[Path], object], str]] = {
    "other classes": (
        saving({"state_dict": under("model.", trained(10)), "own": Settings()}),
        r"of a network with 10 classes, this one has 4 \(fc.weight is \(10, 4\), not \(4, 4\), "
        r"fc.bias is \(10,\), not \(4,\)\); give --model FILE.py:FUNCTION, where .* with 10\.$",
    ),
    "missing": (
        saving({"model": {"c1.weight": STATE["c1.weight"]}, "epoch": 1}),
        r"do not fit the network: the file lacks 7 of 9 tensors \(c1.bias, bn.weight, bn.bias, and "
        r"4 more\); its keys are model, epoch; give --model",
    ),
    "more": (
        saving({**STATE, "fc2.weight": torch.ones(1)}),
        r"the network has no place for 1 \(fc2.weight\)",
    ),
    "a larger network": (
        saving({"state_dict": under("module.", {**LAYERS, **STATE})}),
        r"no place for 8 \(c0.weight, c2.weight, c3.weight, and 5 more\)",
    ),
    "another shape": (
        saving({**STATE, "c1.weight": torch.ones(4, 1, 3, 3)}),
        r"1 have another shape \(c1.weight is \(4, 1, 3, 3\), not \(4, 3, 3, 3\)\)",
    ),
    "another network": (
        saving({"net": nn.Conv1d(2, 3, 4).state_dict(), "epoch": 1}),
        r"lacks 8 of 9 .*its keys are net, epoch; its first tensors are net.weight \(3, 2, 4\), "
        r"net.bias \(3,\)",
    ),
    "very many sets": (
        saving({f"{k}.fc.{name}": torch.ones(1) for k in range(3000) for name in ("weight", "b")}),
        r"the file lacks 7 of 9 tensors .*1 have another shape",
    ),
    "whole model": (saving(network()), f"{NEVER}; sav"),
    "model in a dictionary": (
        saving({"model": network(), "epoch": 1}),
        r"never loaded \(its keys are model, epoch\); save the state dict alone",
    ),
    "arrays": (saving({n: t.numpy() for n, t in STATE.items()}), NEVER),
    "code for a tensor": (saving({"fc.weight": Calls(shutil.rmtree, "x")}), NEVER),
    "raw pickle of code": (
        writing(pickle.dumps(Calls(shutil.rmtree, "x"))),
        "torch.save has no",
    ),
    "another protocol": (lambda path: torch.save(STATE, path, pickle_protocol=4), NEVER),
    "no tensors": (saving({"epoch": 1}), r"no state dict \(its keys are epoch\)"),
    "a list": (saving([1, 2]), "holds no state dict"),
    "one tensor": (saving(torch.ones(3)), "holds no state dict"),
    "unnamed tensors": (saving([torch.ones(3)]), "holds no state dict"),
    "numbered tensors": (saving({1: torch.ones(3)}), "holds no state dict"),
    "two encoders": (saving(BOTH), SEVERAL),
    "two in a list": (saving([STATE, OTHER]), SEVERAL),
    "two averages": (saving({"ema": STATE, "swa": OTHER}), SEVERAL),
    **{
        kind: (saving(state), "holds fc.weight as .*, which are no real weights")
        for kind, state in NUMBERS.items()
    },
    "script": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), NEVER),
    "exported": (
        lambda p: torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), p),
        "torch.save has not written it",
    ),
    "arrays of numpy": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "torch.save has not writt"),
    "pickle": (writing(pickle.dumps({"a": 1})), "torch.save has not written it"),
    "rubbish": (writing(b"\xff" * 100), r"cannot be read \(.*\); give a sound file"),
    "list of parts": (
        writing(json.dumps({"weight_map": {"a": "b"}}, indent=1).encode()),
        "it is a text, such as a list of parts",
    ),
    "pointer": (writing(b"version https://git-lfs.github.com/spec/v1\nsize 3\n"), "Git LFS left"),
    "empty": (writing(b""), "it is empty"),
    "folder": (lambda path: path.mkdir(), "it is a folder; name the file in it"),
    "missing file": (lambda _: None, "there is no such file"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SAID)
def test_load_weights_that_do_not_fit_says_why(kind: str, tmp_path: Path) -> None:
    write, message = SAID[kind]
    write(tmp_path / "w.pt")
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=message) as caught:
        loaded(tmp_path / "w.pt", model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    if kind in NUMBERS:
        assert_is(model.state_dict(), before)
