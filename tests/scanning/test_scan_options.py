"""The options of a scan: what each may be, and that signature, commands and manifest follow."""

import inspect
import json
import math
import re
from dataclasses import fields

import numpy as np
import pytest

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid import cli
from unbraid.base.errors import LayerError, UsageError
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.scan_options import Options, ScanOptions, in_command_words

COUNT = "give a whole number, 1 or more."
SHARE = "it must lie between 0 and 1."
LIST = "give a list of whole numbers."
NO_PLACE = "indices must name places in the data set, 0 to 3, one or more."
NO_JSON = "source cannot be written as JSON "
WRONG = [
    ("batch_size", 2.5, f"batch_size is 2.5; {COUNT}"),
    ("workers", 10**9, "workers is 1000000000; give a whole number from 0 to 4096."),
    ("threads", 0, "threads is 0; give a whole number from 1 to 4096."),
    ("min_share", 1.0, f"min_share is 1.0; {SHARE}"),
    ("min_share", math.nan, f"min_share is nan; {SHARE}"),
    ("indices", np.array([False, True]), f"indices holds False; {LIST}"),
    ("indices", [], NO_PLACE),
    ("indices", [0, 4], NO_PLACE),
    ("skip_broken", 1, "skip_broken is 1; give True or False."),
    ("channels_last", "no", "channels_last is 'no'; give True or False."),
    ("source", {"a": math.nan}, f"{NO_JSON}(Out of range float"),
    ("classes", "ab", f"classes is 'ab'; {LIST}"),
    ("classes", [], "classes is empty; name the classes to scan, or None for all."),
    ("classes", [1, 77], "classes names [77], of which the data set has no image."),
    ("labels", "guessed", "labels is 'guessed'; use 'given', 'predicted' or 'none'."),
    ("source", {"a": {1}}, f"{NO_JSON}(Object of type set is"),
    ("source", json.loads('{"a":' * 33 + "0" + "}" * 33), f"{NO_JSON}(it is nested too deeply)"),
    ("both", None, "classes and indices both say what to scan; pass one"),
    ("out", None, "out is None; give a path."),
    ("model", "resnet50", "The network is a str; pass a torch.nn.Module."),
    ("layer", 3, "3 is no layer; give a layer's name, or the mod"),
    ("dataset", SyntheticImages(0), "The data set holds no image; pass one that does."),
]


@pytest.mark.parametrize(("name", "value", "sentence"), WRONG, ids=range(len(WRONG)))
def test_scan_with_a_wrong_argument_is_told_and_writes_nothing(name, value, sentence, tmp_path):
    usual = {"model": build("3x3"), "layer": "layer", "dataset": SyntheticImages(4)}
    error = LayerError if name == "layer" else UsageError
    named = {"indices": [0], "classes": [0]} if name == "both" else {name: value}
    with pytest.raises(error, match=f"^{re.escape(sentence)}"):
        unbraid.scan(**{**usual, "out": tmp_path, **named})
    assert not list(tmp_path.iterdir())


def test_options_are_those_of_the_signature_the_command_and_the_manifest():
    usual = {own.name: own.default for own in fields(ScanOptions)}
    shown = list(inspect.signature(unbraid.scan).parameters.values())
    assert {own.name: own.default for own in shown[4:]} == usual
    assert [own.name for own in shown[4:]] == list(Options.__annotations__)
    command = cli.app["scan"].assemble_argument_collection()
    named = {name for argument in command for name in argument.names}
    hidden = {"indices", "progress", "source"}
    assert {f"--{name.replace('_', '-')}" for name in usual.keys() - hidden} <= named
    assert usual.keys() - {"progress", "workers"} <= {own.name for own in fields(Manifest)}
    with pytest.raises(TypeError, match="takes no argument 'compiled'; leave it out"):
        unbraid.scan(build("1x1"), "layer", SyntheticImages(4), "never", compiled=True)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pass labels='predicted'.", "pass --labels predicted."),
        ("(and min_share, batch_size)", "(and --min-share, --batch-size)"),
        ("scan with workers=0.", "scan with --workers 0."),
        *[(text, text) for text in ("a/batch_size.csv", "'skip_broken=True'", "rho is 2; workers")],
        *[
            (text, text)
            for text in ("join=[[0, 2]]", "http://x/y?labels=1", "n_images", "threads.a")
        ],
    ],
)
def test_in_command_words_turns_arguments_into_options_and_leaves_all_else(text, told):
    assert in_command_words(text) == told
