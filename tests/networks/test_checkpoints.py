"""Weights in files of every kind: what training scripts write loads, else a sentence says why."""

from __future__ import annotations

import argparse
import collections
import copy
import os
import pickle
import re
import resource
import shutil
import warnings
import zipfile
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
FLOATS = {name: t.float() if t.is_floating_point() else t for name, t in HALF.items()}
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


FSDP = "_fsdp_wrapped_module."
LOADS = {  # what is saved, and what is then in the network
    "DDP of compiled": (under("module._orig_mod."), STATE),
    "FSDP": ({FSDP + n.replace("fc.", f"{FSDP}fc."): t for n, t in STATE.items()}, STATE),
    "deep": ({"state": {"trainer": {"model": under("a.b.c.")}}}, STATE),
    "another network too": ({"net": STATE, "critic": {"c9.weight": torch.ones(1)}}, STATE),
    "half precision": (HALF, FLOATS),
    "without counts": (UNCOUNTED, {**STATE, "bn.num_batches_tracked": torch.tensor(0)}),
}


@pytest.mark.parametrize("form", LOADS)
@pytest.mark.parametrize("old", [False, True])
def test_load_weights_of_a_usual_checkpoint_loads(form: str, old: bool, tmp_path: Path) -> None:
    content, expected = LOADS[form]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=not old)
    assert_is(loaded(path), expected)


class Own(dict[str, Any]):
    """Of a class that nobody else has."""


def test_load_weights_beside_what_training_scripts_keep_loads(tmp_path: Path) -> None:
    adam = torch.optim.AdamW(network().parameters())
    content = Own(
        optimizer={**adam.state_dict(), "state": {0: {"exp_avg": torch.ones(2)}}},
        scheduler=torch.optim.lr_scheduler.StepLR(adam, 3).state_dict(),
        args=argparse.Namespace(lr=0.1, out=Path("x")),
        numbers=[np.float64(3), np.int64(4), 10**50, 1j, float("nan")],
        arrays=(np.ones(3), np.dtype("f4"), np.random.get_state()),
        holders=[{1, 2}, frozenset([3]), collections.deque([1]), collections.Counter("aab")],
        others=(b"a" * 300, torch.float16, range(3), ..., int, print, Own(a=1)),
        keys={(1, (2,)): 3, None: 4, b"a": 5},
        model=under("module."),
    )
    # What a file holds counts, not its name.
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
    one, other = (nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2))
    for model in (one, other):
        model[1].weight = model[0].weight
    safetensors.torch.save_model(one, str(tmp_path / "w.safetensors"))
    assert_is(loaded(tmp_path / "w.safetensors", other), one.state_dict())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_load_weights_of_older_names_that_the_network_knows_loads(tmp_path: Path) -> None:
    old = nn.utils.weight_norm(nn.Linear(2, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    load_weights(new, saved(tmp_path, {"model": old.state_dict()}))
    assert torch.equal(new.weight, old.weight)


def test_load_weights_with_a_wrong_checksum_is_refused(tmp_path: Path) -> None:
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


NEVER = "holds Python code or objects, which are never loaded; save the state dict alone"
BOTH = {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER)}}
LAYERS = {f"c{k}.weight": torch.ones(4, 3, 3, 3) for k in range(9)}
SHAPES = (
    r"2 have another shape \(fc.weight is \(10, 4\), not \(4, 4\), fc.bias is \(10,\), not "
    r"\(4,\)\); give --model FILE.py:FUNCTION, where FUNCTION builds the network"
)
LACKS = (
    r"do not fit the network: the file lacks 7 of 9 tensors \(c1.bias, bn.weight, bn.bias, and "
    r"4 more\); its keys are model, epoch; give --model"
)
SAID: dict[str, tuple[Any, str]] = {  # what is saved, or how it is written
    "other classes": ({"state_dict": under("model.", trained(10))}, SHAPES),
    "missing": ({"model": {"c1.weight": STATE["c1.weight"]}, "epoch": 1}, LACKS),
    "larger": (under("module.", {**LAYERS, **STATE}), r"8 \(c0.weight, c2.weight, c3.weight, and"),
    "model": ({"model": network(), "epoch": 1}, rf"{NEVER}, as safetensors; its keys are model, e"),
    "arrays": ({name: t.numpy() for name, t in STATE.items()}, NEVER),
    "two encoders": (BOTH, "several state dicts that fit the network, under"),
    "complex": ({**STATE, "fc.weight": torch.ones(4, 4) * 1j}, "fc.weight as complex64, which are"),
    "script": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), NEVER),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), r"cannot be read .* sound file"),
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com\n"), "Git LFS left"),
    "folder": (Path.mkdir, "it is a folder; name the file in it"),
    "arrays of numpy": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "torch.save has not writt"),
    "missing file": (lambda _: None, "there is no such file"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SAID)
def test_load_weights_that_do_not_fit_says_why(kind: str, tmp_path: Path) -> None:
    content, message = SAID[kind]
    path, model = tmp_path / "w.pt", network()
    before = copy.deepcopy(model.state_dict())
    if callable(content):
        content(path)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=message) as caught:
        loaded(path, model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500
    if kind == "complex":
        assert_is(model.state_dict(), before)


# Files that lie about their sizes, or are packed.

PLAIN = (11, 7)  # inputs and outputs
TALL = b"K\x07K\x0b\x86"  # (7, 11), in a pickle
NUMEL = b"(?<=cpuq.)KM"  # 77, behind a storage's device


def rewrite(path: Path, old: bytes, new: bytes, how: int = zipfile.ZIP_STORED) -> None:
    """Change what fits a pattern in the description in a torch file, of either format."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(re.sub(old, lambda _: new, path.read_bytes(), flags=re.DOTALL))
        return
    with zipfile.ZipFile(path) as source:
        members = {member.filename: source.read(member) for member in source.infolist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            changed = re.sub(old, lambda _: new, content, flags=re.DOTALL)
            target.writestr(name, changed if name.endswith("/data.pkl") else content, how)


def assert_refused(path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=r"cannot be read \(.*\); give a sound file"):
        load_weights(nn.Linear(*PLAIN, bias=False), path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NUMEL, b"J\xff\xff\xff\x7f"),
        (TALL, b"K\x07J\xff\xff\xff\xff\x86"),
        (TALL, b"K\x07K\x0bK\x01\x87"),
    ],
)
def test_load_weights_of_sizes_that_lie_is_refused(old_format, old, new, tmp_path):
    state = nn.Linear(*PLAIN, bias=False).state_dict()
    path = saved(tmp_path, state, _use_new_zipfile_serialization=not old_format)
    load_weights(nn.Linear(*PLAIN, bias=False), path)
    rewrite(path, old, new)
    assert_refused(path)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("large", [Calls(bytearray, 2**40), Calls(torch.Tensor, 10**13)])
def test_load_weights_beside_what_takes_memory_is_refused(old_format, large, tmp_path):
    state = {"weight": torch.zeros(2, 2), "large": large}
    assert_refused(saved(tmp_path, state, _use_new_zipfile_serialization=not old_format))


def test_load_weights_that_are_packed_are_refused(tmp_path):
    path = saved(tmp_path, {"weight": torch.zeros(1000, 1000)})
    rewrite(path, b"", b"", zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10_000
    assert_refused(path)
