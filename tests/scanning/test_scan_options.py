"""The options of a scan: what each may be, and that signature, commands and manifest follow."""

from __future__ import annotations

import inspect
import math
import re
from dataclasses import fields

import numpy as np
import pytest
import torch

import unbraid
from checks import assert_same_files
from tiny_networks import SyntheticImages, build
from unbraid import cli
from unbraid.base.errors import LayerError, UsageError
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.scan_options import Options, ScanOptions


def deep(depth: int) -> dict:
    return {"a": deep(depth - 1)} if depth else {}


NO_PLACE = "indices must name places in the data set, 0 to 3, one or more."
WRONG = [
    ({"batch_size": 2.5}, "batch_size is 2.5; give a whole number, 1 or more."),
    ({"batch_size": True}, "batch_size is True; give a whole number, 1 or more."),
    ({"batch_size": "8"}, "batch_size is '8'; give a whole number, 1 or more."),
    ({"batch_size": math.nan}, "batch_size is nan; give a whole number, 1 or more."),
    ({"workers": None}, "workers is None; give a whole number from 0 to 4096."),
    ({"workers": -1}, "workers is -1; give a whole number from 0 to 4096."),
    ({"workers": 10**9}, "workers is 1000000000; give a whole number from 0 to 4096."),
    ({"threads": "2"}, "threads is '2'; give a whole number from 1 to 4096."),
    ({"threads": 0}, "threads is 0; give a whole number from 1 to 4096."),
    ({"min_share": "x"}, "min_share is 'x'; give a number."),
    ({"indices": 3}, "indices is 3; give a list of whole numbers."),
    ({"indices": "12"}, "indices is '12'; give a list of whole numbers."),
    ({"indices": ["a"]}, "indices holds 'a'; give a list of whole numbers."),
    ({"indices": [1.5]}, "indices holds 1.5; give a list of whole numbers."),
    ({"indices": np.array([False, True])}, "indices holds False; give a list of whole"),
    ({"classes": [0.0]}, "classes holds 0.0; give a list of whole numbers."),
    ({"classes": "ab"}, "classes is 'ab'; give a list of whole numbers."),
    ({"positions": "no"}, "positions is 'no'; give True or False."),
    ({"skip_broken": 1}, "skip_broken is 1; give True or False."),
    ({"source": "ab"}, "source is a str; give a dictionary, or None."),
    ({"source": {"a": {1}}}, "source cannot be written as JSON (Object of type set is"),
    ({"source": {"a": math.nan}}, "source cannot be written as JSON (Out of range float"),
    ({"out": None}, "out is None; give a path."),
    ({"model": "resnet50"}, "The network is a str; pass a torch.nn.Module."),
    ({"layer": 3, "error": LayerError}, "3 is no layer; give a layer's name, or the mod"),
    ({"layer": None, "error": LayerError}, "None is no layer; give a layer's name, or the mod"),
    ({"source": deep(32)}, "source cannot be written as JSON (it is nested too deeply)"),
    ({"min_share": 0.0}, "min_share is 0.0; it must lie between 0 and 1."),
    ({"min_share": 1.0}, "min_share is 1.0; it must lie between 0 and 1."),
    ({"min_share": math.nan}, "min_share is nan; it must lie between 0 and 1."),
    ({"batch_size": 0}, "batch_size is 0; give a whole number, 1 or more."),
    ({"labels": "guessed"}, "labels is 'guessed'; use 'given' or 'predicted'."),
    ({"classes": []}, "classes is empty; name the classes to scan, or None for all."),
    ({"classes": [1, 77]}, "classes names [77], of which the data set has no image."),
    ({"classes": [0], "indices": [0]}, "classes and indices both say what to scan; pass one"),
    ({"indices": []}, NO_PLACE),
    ({"indices": [0, 4]}, NO_PLACE),
    ({"indices": [-1]}, NO_PLACE),
    ({"dataset": SyntheticImages(0)}, "The data set holds no image; pass one that does."),
]


@pytest.mark.parametrize(("settings", "sentence"), WRONG, ids=range(len(WRONG)))
def test_scan_with_a_wrong_argument_is_told_and_writes_nothing(settings, sentence, tmp_path):
    arguments = {"model": build("3x3"), "layer": "layer", "dataset": SyntheticImages(4)}
    arguments |= {"out": tmp_path, "error": UsageError, **settings}
    with pytest.raises(arguments.pop("error"), match=f"^{re.escape(sentence)}"):
        unbraid.scan(**arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "number", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "0-d"]
)
def test_scan_takes_numbers_of_other_libraries(number, tmp_path):
    plain = {"batch_size": 3, "workers": 0, "threads": 1, "classes": [1, 0]}
    given = {"batch_size": number(3), "workers": number(0), "threads": number(1)}
    given |= {"classes": [number(1), number(0)], "positions": np.bool_(False)}
    for name, options in (("plain", plain), ("given", given)):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(9), tmp_path / name, **options)
    assert_same_files(tmp_path / "plain", tmp_path / "given")


def test_options_are_those_of_the_signature_the_command_and_the_manifest():
    usual = {own.name: own.default for own in fields(ScanOptions)}
    shown = list(inspect.signature(unbraid.scan).parameters.values())
    assert [own.name for own in shown[:4]] == ["model", "layer", "dataset", "out"]
    assert {own.name: own.default for own in shown[4:]} == usual
    assert [own.name for own in shown[4:]] == list(Options.__annotations__)
    command = cli.app["scan"].assemble_argument_collection()
    named = {name for argument in command for name in argument.names}
    hidden = {"indices", "progress", "source"}
    assert {f"--{name.replace('_', '-')}" for name in usual.keys() - hidden} <= named
    kept = {own.name for own in fields(Manifest)}
    assert usual.keys() - {"progress", "workers"} <= kept
    for name in usual:
        assert f"        {name}: " in unbraid.scan.__doc__
    with pytest.raises(TypeError, match="unexpected keyword argument 'compiled'"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), "never", compiled=True)
