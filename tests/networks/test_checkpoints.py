"""Weights in files of every kind: what training scripts write loads, else a sentence says why."""

import argparse
import collections
import os
import pickle
import resource
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from unbraid.base.errors import ModelError
from unbraid.networks.checkpoints import load_weights


def network(n_classes=4):
    torch.manual_seed(1)
    parts = {"c1": nn.Conv2d(3, 4, 3), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, n_classes)}
    return nn.Sequential(collections.OrderedDict(parts))


STATE = {name: tensor + 1 for name, tensor in network().state_dict().items()}
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}
HALF = {name: t.half() if t.is_floating_point() else t for name, t in STATE.items()}
UNCOUNTED = {name: tensor for name, tensor in STATE.items() if "num_batches" not in name}


def under(prefix, state=STATE):
    return {prefix + name: tensor for name, tensor in state.items()}


def in_circles():
    """Each dictionary twice in the one around: 2**60 ways to the innermost; and around itself."""
    circle = {"model": STATE}
    inner = circle
    for _ in range(60):
        inner["a"] = inner["b"] = {}
        inner = inner["a"]
    return circle | {"self": circle}


def saved(tmp_path, content, name="w.pt", **options):
    torch.save(content, tmp_path / name, **options)
    return tmp_path / name


def rewrite(path, old, new, how=zipfile.ZIP_STORED):
    """Change the description in a torch file of either format, under checksums that fit."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(old, new))
        return
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", how) as target:
        for name, content in members.items():
            target.writestr(name, content.replace(old, new) if "data.pkl" in name else content)


def write_damaged(path):
    torch.save(STATE, path)
    bias = STATE["fc.bias"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(bias, bytes(len(bias))))


def loaded(path, model=None):
    model = network() if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_weights(model, path)
    return model.state_dict()


def assert_is(state, expected=STATE):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


FSDP, CHECKPOINT = "_fsdp_wrapped_module.", "_checkpoint_wrapped_module"
LOADS = {  # what is saved, and what is then in the network
    "DDP of compiled": (under("module._orig_mod."), STATE),
    "Lightning": ({"state_dict": under("model.module._orig_mod."), "epoch": 1}, STATE),
    "checkpointed": ({n.replace("c1", f"c1.{CHECKPOINT}"): t for n, t in STATE.items()}, STATE),
    "in a list": ([1, {"weights": STATE}], STATE),
    "average alone": ({"ema_state_dict": STATE}, STATE),
    "FSDP": ({FSDP + n.replace("fc.", f"{FSDP}fc."): t for n, t in STATE.items()}, STATE),
    "deep": ({"state": {"trainer": {"model": under("a.b.c.")}}}, STATE),
    "another network too": ({"net": STATE, "critic": {"c9.weight": torch.ones(1)}}, STATE),
    "half precision": (HALF, {name: t.to(STATE[name].dtype) for name, t in HALF.items()}),
    "without counts": (UNCOUNTED, {**STATE, "bn.num_batches_tracked": torch.tensor(0)}),
    "in circles": (in_circles(), STATE),
}


@pytest.mark.parametrize("form", LOADS)
@pytest.mark.parametrize("old", [False, True])
def test_load_weights_of_a_usual_checkpoint_loads(form, old, tmp_path):
    content, expected = LOADS[form]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=not old)
    assert_is(loaded(path), expected)


OLD = torch.__version__.startswith("2.6.")  # whose reader fills lists alone
HOLDERS = () if OLD else (frozenset([3]), collections.deque([1]))


def test_load_weights_beside_what_training_scripts_keep_loads(tmp_path):
    adam = torch.optim.AdamW(network().parameters())
    content = {
        "optimizer": {**adam.state_dict(), "state": {0: {"exp_avg": torch.ones(2)}}},
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "numbers": [np.float64(3), np.int64(4), 10**50, 1j, float("nan")],
        "arrays": (np.ones(3), np.dtype("f4"), np.random.get_state()),
        "holders": [{1, 2}, *HOLDERS, collections.Counter("aab")],
        "others": (b"a" * 300, torch.float16, range(3), ..., int, print, Calls(dict)),
        "keys": {(1, (2,)): 3, None: 4, b"a": 5},
        "model": under("module."),
    }
    # What a file holds counts, not its name.
    assert_is(loaded(saved(tmp_path, content, "w.safetensors")))
    safetensors.torch.save_file(under("backbone."), tmp_path / "last.ckpt")
    assert_is(loaded(tmp_path / "last.ckpt"))


class Calls:
    """Would call a function if it was made."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("blocked", [False, True])  # torch itself refuses some modules' functions
def test_load_weights_beside_code_runs_none_of_it(blocked, tmp_path):
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


def test_load_weights_beside_others_tells(tmp_path):
    for content, sentence in (
        ({"state_dict_ema": OTHER, "state_dict": STATE}, "one under state_dict is taken, not"),
        ({"teacher": OTHER, "student": STATE}, "the one under student is taken, not"),
        ({**under("net."), **under("net_swa.", OTHER)}, "the one under net is taken, not"),
        ({"schema": STATE, "ema": OTHER}, "the one under schema is taken, not"),
        ({"net": {**under("model."), "w": torch.ones(2)}}, "under net.model is loaded, not net.w"),
    ):
        model = network()
        with pytest.warns(UserWarning, match=sentence):
            load_weights(model, saved(tmp_path, content))
        assert_is(model.state_dict())


def test_load_weights_of_one_of_tied_tensors_or_without_a_checksum_loads(tmp_path):
    one, other = (nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2))
    for model in (one, other):
        model[1].weight = model[0].weight
    safetensors.torch.save_model(one, str(tmp_path / "w.safetensors"))
    assert_is(loaded(tmp_path / "w.safetensors", other), one.state_dict())
    torch.serialization.set_crc32_options(False)
    try:
        assert_is(loaded(saved(tmp_path, STATE)))
    finally:
        torch.serialization.set_crc32_options(True)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_load_weights_of_older_names_that_the_network_knows_loads(tmp_path):
    old = nn.utils.weight_norm(nn.Linear(2, 2))
    new = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    load_weights(new, saved(tmp_path, {"model": old.state_dict()}))
    assert torch.equal(new.weight, old.weight)


CODE = Calls(shutil.rmtree, "x")
NEVER = "holds Python code or objects, which are never loaded; save the state dict alone"
BOTH = {"state_dict": {**under("module.encoder_q."), **under("module.encoder_k.", OTHER)}}
SHAPES = r"2 have another shape \(fc.weight is \(10, 4\), not \(4, 4\), fc.bias .*; give --model"
LACKS = r"lacks 7 of 9 tensors \(c1.bias, .*, and 4 more\); its keys are model, epoch; give --model"
SAID = {  # what is saved, or how it is written
    "other classes": ({"state_dict": under("model.", network(10).state_dict())}, SHAPES),
    "missing": ({"model": {"c1.weight": STATE["c1.weight"]}, "epoch": 1}, LACKS),
    "model": ({"model": network(), "epoch": 1}, rf"{NEVER}, as safetensors; its keys are model, e"),
    "two encoders": (BOTH, "several state dicts that fit the network, under"),
    "larger": (under("module.", {"c0.weight": STATE["c1.weight"], **STATE}), r"c0.weight"),
    "folder": (Path.mkdir, "it is a folder; name the file in it"),
    "two averages": ({"ema": STATE, "swa": OTHER}, "several state dicts that fit the network, un"),
    "arrays": ({name: t.numpy() for name, t in STATE.items()}, NEVER),
    "code for a tensor": ({"fc.weight": CODE}, NEVER),
    "pickle of code": (lambda path: path.write_bytes(pickle.dumps(CODE, 2)), NEVER),
    "protocol": (lambda path: torch.save(STATE, path, pickle_protocol=4), NEVER),
    "no tensors": ({"epoch": 1}, r"no state dict; save .*; its keys are epoch"),
    "one tensor": (torch.ones(3), "holds no state dict"),
    "empty": (Path.touch, "it is no file of torch"),
    "int8": ({**STATE, "fc.weight": STATE["fc.weight"].char()}, "fc.weight as int8, which are no"),
    "complex": ({**STATE, "fc.weight": torch.ones(4, 4) * 1j}, "fc.weight as complex64, which are"),
    "script": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), NEVER),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), r"cannot be read .* sound file"),
    "pointer": (lambda p: p.write_text("version https://git-lfs.github.com\n"), "Git LFS left"),
    "arrays of numpy": (lambda p: np.savez(p.open("wb"), a=np.ones(2)), "torch.save has not writt"),
    "missing file": (lambda _: None, "there is no such file"),
    "changed bytes": (write_damaged, r"cannot be read \(Bad CRC-32"),
}
TALL, TALLER = b"K\x07K\x0b\x86", b"K\x07Jzzz\x7f\x86"  # (7, 11) in a pickle, and with a lie
LINEAR = {"weight": torch.zeros(7, 11)}
HOSTILE = {  # what is saved, and what is changed then
    "sizes lie": (LINEAR, (TALL, TALLER)),
    "sizes below zero lie": (LINEAR, (TALL, b"K\x07J\xff\xff\xff\xff\x86")),
    "sizes of three lie": (LINEAR, (TALL, b"K\x07K\x0bK\x01\x87")),
    "sizes in all lie": (LINEAR, (b"KM", b"K\x4e")),
    "sizes in all lie much": (LINEAR, (b"KM", b"J\xff\xff\xff\x7f")),
    "call": (LINEAR | {"large": Calls(bytearray, 2**40)}, ()),
    "call of torch": (LINEAR | {"large": Calls(torch.Tensor, 10**13)}, ()),
    "packed": ({"weight": torch.zeros(1000, 1000)}, (b"", b"", zipfile.ZIP_DEFLATED)),
    "two descriptions": (LINEAR, ()),
}
ZIP = ("packed", "two descriptions")  # of the newer format alone


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", SAID)
def test_load_weights_that_do_not_fit_says_why(kind, tmp_path):
    content, message = SAID[kind]
    path, model = tmp_path / "w.pt", network()
    if callable(content):
        content(path)
    else:
        torch.save(content, path)
    with pytest.raises(ModelError, match=message) as caught:
        loaded(path, model)
    assert "\n" not in str(caught.value)
    assert_is(model.state_dict(), network().state_dict())


@pytest.mark.parametrize(
    ("kind", "old"),
    [*((kind, False) for kind in HOSTILE), *((kind, True) for kind in HOSTILE if kind not in ZIP)],
)
def test_load_weights_that_would_take_memory_is_refused(kind, old, tmp_path):
    content, change = HOSTILE[kind]
    path = saved(tmp_path, content, _use_new_zipfile_serialization=not old)
    if content is LINEAR:
        load_weights(nn.Linear(11, 7, bias=False), path)  # while they do not
    if change:
        rewrite(path, *change)
    if kind == "two descriptions":
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("w/DATA.PKL", b"")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = nn.Linear(11, 7, bias=False)
    if OLD and not old and kind.startswith("sizes in all lie"):  # it goes by what is there
        load_weights(model, path)
        assert_is(model.state_dict(), LINEAR)
    else:
        with pytest.raises(ModelError, match=r"cannot be read \(.*\); give a sound file"):
            load_weights(model, path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30
