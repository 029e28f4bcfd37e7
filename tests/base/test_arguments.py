"""What public functions are given: a wrong type is told in a sentence."""

import math
import re

import numpy as np
import pytest
import torch

from public_calls import call
from unbraid.base.errors import UsageError

WHOLE, REAL = "give a whole number", "give a number."
WHOLES, REALS = "give a list of whole numbers.", "give a list of numbers."
ONE = "give one object of type"


def test_a_wrong_type_is_told_in_a_sentence(calls):
    for function, argument, value, sentence in (
        ("find", "scan", "runs/train", f"scan is 'runs/train'; {ONE} Scan."),
        ("find", "tau", None, f"tau is None; {REAL}"),
        ("find", "tau", True, f"tau is True; {REAL}"),
        ("find", "channels", {True: [[0], [1]]}, f"a channel in channels is True; {WHOLE}."),
        ("find", "channels", {1: [["0"], [1]]}, "The concepts of channel 1 must be two or more"),
        ("sensitivity", "ps", ["0.5"], f"ps holds '0.5'; {REALS}"),
        ("split", "start", "a.safetensors", f"start is 'a.safetensors'; {ONE}"),
        ("published", "rho", "0.7", f"rho is '0.7'; {REAL}"),
        ("evaluate", "tau", math.nan, "tau is nan; a share must lie between 0 and 1."),
        ("evaluate", "baseline", 3, f"baseline is 3; {ONE} Split."),
        ("apply", "split", "a.safetensors", f"split is 'a.safetensors'; {ONE}"),
        ("apply", "model", None, "The network is a NoneType; pass a torch.nn.Module."),
        ("circuit", "n", 2.5, f"n is 2.5; {WHOLE}, 1 or more."),
        ("circuit_from", "batch_size", "8", f"batch_size is '8'; {WHOLE}, 1 or more."),
        ("ablate", "channels", [True], f"channels holds True; {WHOLES}"),
        ("ablate", "workers", None, f"workers is None; {WHOLE} from 0 to 4096."),
        ("ablate", "skip_broken", "no", "skip_broken is 'no'; give True or False."),
        ("compare_outputs", "tolerance", math.nan, "tolerance is nan; it must be 0 or more."),
        ("measure_semantics", "n_top", 1, f"n_top is 1; {WHOLE}, 2 or more."),
        ("visualize", "channels", [1.0], f"channels holds 1.0; {WHOLES}"),
        ("visualize", "seconds", math.nan, "seconds is nan; it must be 0 or more."),
        ("visualize", "size", (8,), "size is (8,); give height and width, 2 to"),
        ("visualize", "spectrum", "yes", "spectrum is 'yes'; give True or False."),
        ("explain", "n", 2.5, f"n is 2.5; {WHOLE}, 1 or more."),
        ("explain", "images", "a.png", "images is 'a.png'; give images as the network takes them"),
        ("explain", "classes", [None], f"A class is None; {WHOLE} from 0 to 3."),
        ("gate", "value", "0", f"The value of a gate is '0'; {REAL}"),
        ("clamp", "low", None, f"low is None; {REAL}"),
        ("density_figure", "width", "3", f"width is '3'; {REAL}"),
        ("open_scan", "path", None, "path is None; give a path."),
        ("load_split", "path", 3, "path is 3; give a path."),
        ("report", "scan", "runs/val", f"scan is 'runs/val'; {ONE} Scan."),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(sentence)}") as caught:
            call(calls[function], **{argument: value})
        assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_are_numbers(calls):
    for function, plain, others in (
        ("find", {"channels": {1: [[0], [1]]}}, {"channels": {np.int64(1): np.array([[0], [1]])}}),
        ("find", {"p": 0.75, "gamma": 0.5}, {"p": np.float32(0.75), "gamma": torch.tensor(0.5)}),
        ("circuit", {"channel": 1, "n": 3}, {"channel": np.int64(1), "n": torch.tensor(3)}),
        ("ablate", {"channels": [2, 1]}, {"channels": torch.tensor([2, 1]), "workers": np.int8(0)}),
    ):
        made, again = (call(calls[function], **numbers) for numbers in (plain, others))
        assert repr(again) == repr(made)
        assert "int64" not in repr(made)
