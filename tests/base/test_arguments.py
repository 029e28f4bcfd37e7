"""What the functions behind a scan are given: a wrong type is told in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import UsageError

IMAGES = SyntheticImages(16)

WHOLE, REAL = "give a whole number", "give a number."
WHOLES, REALS = "give a list of whole numbers.", "give a list of numbers."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    network = build("3x3")
    scan = unbraid.scan(
        network, "layer", IMAGES, tmp_path_factory.mktemp("scan"), positions=True, batch_size=8
    )
    found = unbraid.find(scan, channels={1: [[0], [1]], 2: [[2], [3]]})
    split = unbraid.split(scan, found)
    return SimpleNamespace(
        network=network,
        scan=scan,
        found=found,
        split=split,
        model2=unbraid.apply(network, split),
        page=tmp_path_factory.mktemp("report") / "report.html",
    )


CALLS: dict[str, Callable[..., Any]] = {
    "find": lambda m, **given: unbraid.find(**{"scan": m.scan, **given}),
    "sensitivity": lambda m, **given: unbraid.sensitivity(**{"scan": m.scan, **given}),
    "split": lambda m, **given: unbraid.split(**{"scan": m.scan, "found": m.found, **given}),
    "published": lambda m, **given: unbraid.split(m.scan, m.found, method="published", **given),
    "evaluate": lambda m, **given: unbraid.evaluate(**{"split": m.split, "scan": m.scan, **given}),
    "apply": lambda m, **given: unbraid.apply(**{"model": m.network, "split": m.split, **given}),
    "circuit": lambda m, **given: unbraid.circuit(
        **{"split": m.split, "scan": m.scan, "channel": 1, "concept": 0, **given}
    ),
    "circuit_from": lambda m, **given: unbraid.circuit_from(
        m.split, m.split, m.scan, m.network, IMAGES, **{"channel": 1, "concept": 0, **given}
    ),
    "ablate": lambda m, **given: unbraid.ablate(m.model2, IMAGES, **given),
    "compare_outputs": lambda m, **given: unbraid.compare_outputs(
        m.network, m.model2, IMAGES, **given
    ),
    "measure_semantics": lambda m, **given: unbraid.measure_semantics(
        **{
            "split": m.split,
            "scan": m.scan,
            "dataset": IMAGES,
            "encoder": unbraid.Penultimate(m.network),
            **given,
        }
    ),
    "visualize": lambda m, **given: unbraid.visualize(
        m.model2, "layer", IMAGES, **{"channels": [1], "steps": 1, **given}
    ),
    "gate": lambda m, **given: unbraid.gate(
        m.model2, **{"layer": "layer", "channel": 1, "concept": 0, "value": 0.5, **given}
    ),
    "clamp": lambda m, **given: unbraid.clamp(
        m.model2, **{"layer": "layer", "channel": 1, "concept": 0, **given}
    ),
    "teaser_figure": lambda m, **given: unbraid.teaser_figure(
        m.split, m.scan, **{"channel": 1, "dataset": IMAGES, **given}
    ),
    "density_figure": lambda m, **given: unbraid.density_figure(
        m.split, m.scan, **{"channel": 1, **given}
    ),
    "source_figure": lambda m, **given: unbraid.source_figure(
        m.split, m.scan, **{"channel": 1, **given}
    ),
    "open_scan": lambda _, **given: unbraid.open_scan(**given),
    "load_split": lambda m, **given: unbraid.load_split(m.network, **given),
    "report": lambda m, **given: unbraid.report(
        **{"path": m.page, "scan": m.scan, "found": m.found, **given}
    ),
}


@pytest.mark.parametrize(
    ("function", "argument", "value", "sentence"),
    [
        ("find", "scan", "runs/train", "scan is 'runs/train'; give one object of type Scan."),
        ("find", "tau", None, f"tau is None; {REAL}"),
        ("find", "tau", True, f"tau is True; {REAL}"),
        ("find", "p", "0.75", f"p is '0.75'; {REAL}"),
        ("find", "gamma", [0.5], f"gamma is [0.5]; {REAL}"),
        ("find", "gamma", 1j, f"gamma is 1j; {REAL}"),
        ("find", "channels", [[0], [1]], "channels is a list; give groups of classes per channel"),
        ("find", "channels", {"1": [[0], [1]]}, f"a channel in channels is '1'; {WHOLE}."),
        ("find", "channels", {True: [[0], [1]]}, f"a channel in channels is True; {WHOLE}."),
        ("find", "channels", {1: [[0.5], [1]]}, "The concepts of channel 1 must be two or more"),
        ("find", "channels", {1: [["0"], [1]]}, "The concepts of channel 1 must be two or more"),
        ("sensitivity", "taus", 0.03, f"taus is 0.03; {REALS}"),
        ("sensitivity", "ps", ["0.5"], f"ps holds '0.5'; {REALS}"),
        ("sensitivity", "gammas", [True], f"gammas holds True; {REALS}"),
        ("split", "found", None, "found is None; give one object of type Findings."),
        ("split", "everything", "runs/train", "everything is 'runs/train'; give one object of"),
        ("split", "start", "split.safetensors", "start is 'split.safetensors'; give one object"),
        ("published", "rho", "0.7", f"rho is '0.7'; {REAL}"),
        ("published", "rho", True, f"rho is True; {REAL}"),
        ("evaluate", "tau", "0.03", f"tau is '0.03'; {REAL}"),
        ("evaluate", "tau", math.nan, "tau is nan; a share must lie between 0 and 1."),
        ("evaluate", "baseline", 3, "baseline is 3; give one object of type Split."),
        ("apply", "split", None, "split is None; give one object of type Split."),
        ("apply", "split", "a.safetensors", "split is 'a.safetensors'; give one object of type"),
        ("apply", "split", [3], "split is 3; give one object of type Split."),
        ("apply", "model", None, "The network is a NoneType; pass a torch.nn.Module."),
        ("circuit", "channel", True, f"channel is True; {WHOLE}."),
        ("circuit", "concept", True, f"concept is True; {WHOLE}."),
        ("circuit", "channel", [1], f"channel is [1]; {WHOLE}."),
        ("circuit", "n", 2.5, f"n is 2.5; {WHOLE}, 1 or more."),
        ("circuit_from", "n", None, f"n is None; {WHOLE}, 1 or more."),
        ("circuit_from", "channel", 1.0, f"channel is 1.0; {WHOLE}."),
        ("circuit_from", "batch_size", "8", f"batch_size is '8'; {WHOLE}, 1 or more."),
        ("ablate", "channels", 1, f"channels is 1; {WHOLES}"),
        ("ablate", "channels", [True], f"channels holds True; {WHOLES}"),
        ("ablate", "channels", [1.0], f"channels holds 1.0; {WHOLES}"),
        ("ablate", "batch_size", None, f"batch_size is None; {WHOLE}, 1 or more."),
        ("ablate", "batch_size", 2.5, f"batch_size is 2.5; {WHOLE}, 1 or more."),
        ("ablate", "workers", None, f"workers is None; {WHOLE} from 0 to 4096."),
        ("ablate", "skip_broken", "no", "skip_broken is 'no'; give True or False."),
        ("ablate", "scan", "runs/val", "scan is 'runs/val'; give one object of type Scan."),
        ("compare_outputs", "tolerance", "0", f"tolerance is '0'; {REAL}"),
        ("compare_outputs", "tolerance", math.nan, "tolerance is nan; it must be 0 or more."),
        ("compare_outputs", "tolerance", -1, "tolerance is -1; it must be 0 or more."),
        ("compare_outputs", "batch_size", True, f"batch_size is True; {WHOLE}, 1 or more."),
        ("compare_outputs", "skip_broken", "no", "skip_broken is 'no'; give True or False."),
        ("measure_semantics", "n_top", 2.5, f"n_top is 2.5; {WHOLE}, 2 or more."),
        ("measure_semantics", "n_top", 1, f"n_top is 1; {WHOLE}, 2 or more."),
        ("measure_semantics", "workers", 1.5, f"workers is 1.5; {WHOLE} from 0 to 4096."),
        ("visualize", "channels", 1, f"channels is 1; {WHOLES}"),
        ("visualize", "channels", [1.0], f"channels holds 1.0; {WHOLES}"),
        ("visualize", "n", "1", f"n is '1'; {WHOLE}, 1 or more."),
        ("visualize", "steps", 1.5, f"steps is 1.5; {WHOLE}, 1 or more."),
        ("visualize", "seed", None, f"seed is None; {WHOLE}."),
        ("visualize", "seconds", "60", f"seconds is '60'; {REAL}"),
        ("visualize", "seconds", math.nan, "seconds is nan; it must be 0 or more."),
        ("visualize", "size", 8, f"size is 8; {WHOLES}"),
        ("visualize", "size", (8.0, 8), f"size holds 8.0; {WHOLES}"),
        ("visualize", "size", (8,), "size is (8,); give height and width, 2 to"),
        ("visualize", "spectrum", "yes", "spectrum is 'yes'; give True or False."),
        ("gate", "value", "0", f"The value of a gate is '0'; {REAL}"),
        ("gate", "channel", "1", f"channel is '1'; {WHOLE}."),
        ("clamp", "low", None, f"low is None; {REAL}"),
        ("clamp", "high", "1", f"high is '1'; {REAL}"),
        ("teaser_figure", "n", 2.5, f"n is 2.5; {WHOLE}, 1 or more."),
        ("density_figure", "channel", True, f"channel is True; {WHOLE}."),
        ("density_figure", "width", "3", f"width is '3'; {REAL}"),
        ("source_figure", "n", "6", f"n is '6'; {WHOLE}, 1 or more."),
        ("open_scan", "path", None, "path is None; give a path."),
        ("load_split", "path", 3, "path is 3; give a path."),
        ("report", "path", None, "path is None; give a path."),
        ("report", "scan", "runs/val", "scan is 'runs/val'; give one object of type Scan."),
        ("report", "found", None, "found is None; give one object of type Findings."),
        ("measure_semantics", "scan", "runs/val", "scan is 'runs/val'; give one object of type"),
    ],
)
def test_a_wrong_type_is_told_in_a_sentence(function, argument, value, sentence, made):
    with pytest.raises(UsageError, match=f"^{re.escape(sentence)}") as caught:
        CALLS[function](made, **{argument: value})
    assert "\n" not in str(caught.value)
    assert not made.page.exists()


@pytest.mark.parametrize(
    ("function", "plain"),
    [
        ("find", {"channels": {1: [[0], [1]]}}),
        ("circuit", {"channel": 1, "concept": 1, "n": 3}),
        ("ablate", {"channels": [2, 1], "batch_size": 8, "workers": 0}),
        ("compare_outputs", {"batch_size": 8, "workers": 0}),
        ("measure_semantics", {"n_top": 3, "batch_size": 8}),
    ],
)
def test_whole_numbers_of_other_libraries_are_whole_numbers(function, plain, made):
    expected = repr(CALLS[function](made, **plain))
    assert "int64" not in expected
    assert repr(CALLS[function](made, **_of_numpy(plain))) == expected


def _of_numpy(value: Any) -> Any:
    if isinstance(value, dict):
        return {_of_numpy(key): _of_numpy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_of_numpy(inner) for inner in value]
    return np.int64(value) if isinstance(value, int) else value


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor])
def test_numbers_of_other_libraries_are_numbers(number, made):
    thresholds = {"tau": 0.03125, "p": 0.75, "gamma": 0.5}  # which float32 holds exactly
    given = {name: number(value) for name, value in thresholds.items()}
    assert repr(unbraid.find(made.scan, **given)) == repr(unbraid.find(made.scan, **thresholds))


def test_channels_in_a_tensor_are_visualised_by_number(made):
    plain = CALLS["visualize"](made, channels=[2, 1])
    given = CALLS["visualize"](made, channels=torch.tensor([2, 1]), steps=np.int64(1))
    assert given.channels == plain.channels
    assert given.settings == plain.settings
