"""Weights in files of every kind: what training scripts write loads, else a sentence says why."""

from __future__ import annotations

import argparse
import collections
import copy
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
from unbraid.networks.checkpoints import load_weights

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


class Own(dict[str, Any]):
    """Of a class that nobody else has."""


def neighbours() -> dict[str, Any]:
    model = network()
    adam = torch.optim.AdamW(model.parameters())
    state = {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}}
    return {
        "optimizer": {**adam.state_dict(), "state": state},
        "scheduler": torch.optim.lr_scheduler.StepLR(adam, 3).state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "numbers": [np.float64(3), np.int64(4), 10**50, 1j, float("nan")],
        "arrays": (np.ones(3), np.dtype("f4"), np.random.get_state()),
        "holders": [{1, 2}, frozenset([3]), collections.deque([1]), collections.Counter("aab")],
        "others": (b"a" * 300, torch.float16, range(3), ..., int, print),
        "keys": {(1, (2,)): 3, None: 4, b"a": 5},
    }


FSDP = "_fsdp_wrapped_module."
LOADS = {
    "DDP of compiled": under("module._orig_mod."),
    "FSDP": {FSDP + name.replace("fc.", f"{FSDP}fc."): t for name, t in STATE.items()},
    "checkpointed": {n.replace("c1", "c1._checkpoint_wrapped_module"): t for n, t in STATE.items()},
    "deep": {"state": {"trainer": {"model": under("a.b.c.")}}},
    "in a list": [1, {"weights": STATE}],
    "generator of another network": {"net": STATE, "discriminator": {"c9.weight": torch.ones(1)}},
    "half precision": HALF,
    "without counts of batches": UNCOUNTED,
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


def test_load_weights_goes_by_what_a_file_holds_not_by_its_name(tmp_path: Path) -> None:
    content = Own(**neighbours(), model=under("module."), own=Own(a=1))
    assert_is(loaded(saved(tmp_path, content, "w.safetensors")))
    safetensors.torch.save_file(under("backbone."), tmp_path / "last.ckpt")
    assert_is(loaded(tmp_path / "last.ckpt"))


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
    ("content", "sentence"),
    [
        ({"state_dict_ema": OTHER, "state_dict": STATE}, "one under state_dict is taken, not"),
        ({**under("net."), **under("net_swa.", OTHER)}, "the one under net is taken, not"),
        ({"schema": STATE, "ema": OTHER}, "the one under schema is taken, not"),
        (
            {"net": {**under("model."), "loss.weight": torch.ones(2)}},
            "only what lies under net.model is loaded, not net.loss.weight",
        ),
    ],
)
def test_load_weights_beside_others_tells(content: Any, sentence: str, tmp_path: Path) -> None:
    model = network()
    with pytest.warns(UserWarning, match="the one under|lies under") as told:
        load_weights(model, saved(tmp_path, content))
    assert sentence in str(told[0].message)
    assert_is(model.state_dict())


def test_load_weights_of_tied_tensors_needs_one_of_them(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        parts = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        parts[1].weight = parts[0].weight
        return parts.append(parts[0])

    model, again = tied(), tied()
    safetensors.torch.save_model(model, str(tmp_path / "w.safetensors"))
    assert_is(loaded(tmp_path / "w.safetensors", again), model.state_dict())


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


def test_load_weights_of_dictionaries_in_circles_comes_to_an_end(tmp_path: Path) -> None:
    circle: dict[str, Any] = {"model": STATE}
    inner = circle
    for _ in range(60):  # each twice in the one around: 2**60 ways to the innermost
        inner["a"] = inner["b"] = {}
        inner = inner["a"]
    circle["self"] = circle
    assert_is(loaded(saved(tmp_path, circle)))


def saving(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


NEVER = "holds Python code or objects, which are never loaded; save the state dict alone"
BOTH = {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER)}}
SEVERAL = "several state dicts that fit the network, under"
LAYERS = {f"c{k}.weight": torch.ones(4, 3, 3, 3) for k in range(9)}
SAID: dict[str, tuple[Callable[[Path], object], str]] = {
    "other classes": (
        saving({"state_dict": under("model.", trained(10))}),
        r"2 have another shape \(fc.weight is \(10, 4\), not \(4, 4\), fc.bias is \(10,\), not "
        r"\(4,\)\); give --model FILE.py:FUNCTION, where FUNCTION builds the network",
    ),
    "missing": (
        saving({"model": {"c1.weight": STATE["c1.weight"]}, "epoch": 1}),
        r"do not fit the network: the file lacks 7 of 9 tensors \(c1.bias, bn.weight, bn.bias, and "
        r"4 more\); its keys are model, epoch; give --model",
    ),
    "a larger network": (
        saving({"state_dict": under("module.", {**LAYERS, **STATE})}),
        r"no place for 8 \(c0.weight, c2.weight, c3.weight, and 5 more\)",
    ),
    "model in a dictionary": (
        saving({"model": network(), "epoch": 1}),
        rf"{NEVER}, as safetensors; its keys are model, epoch\.",
    ),
    "arrays": (saving({n: t.numpy() for n, t in STATE.items()}), NEVER),
    "no tensors": (saving({"epoch": 1}), r"no state dict; save .*; its keys are epoch"),
    "two encoders": (saving(BOTH), SEVERAL),
    "complex": (
        saving({**STATE, "fc.weight": torch.ones(4, 4) * 1j}),
        "holds fc.weight as complex64, which are no real weights",
    ),
    "script": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), NEVER),
    "arrays of numpy": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "torch.save has not writt"),
    "pickle": (
        lambda path: path.write_bytes(pickle.dumps({"a": 1})),
        r"cannot be read \(.*\); give a sound file",
    ),
    "pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com\n"),
        "Git LFS left",
    ),
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
    if kind == "complex":
        assert_is(model.state_dict(), before)
