"""The hash of a network's weights, and weights that are broken."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.jit import freeze, script
from torch.testing._internal.two_tensor import TwoTensor

from unbraid.base.errors import ModelError
from unbraid.networks.weights import hash_weights, refuse_broken_weights

TWO = TwoTensor(torch.ones(2), torch.ones(2))


class Extra(nn.Linear):
    """Keeps anything beside its weights."""

    def __init__(self, extra):
        torch.manual_seed(0)
        super().__init__(2, 3)
        self.extra = extra

    def get_extra_state(self):
        return self.extra() if callable(self.extra) else self.extra


def linear(add):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4)).eval()
    network[0].weight.data[0, 0] += add
    return network


def holding(tensor):
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


MADE = {  # with one thing, and another
    "quantised": (lambda add: quantize_dynamic(linear(add), {nn.Linear}), 0.0, 0.5),
    "scripted": (lambda add: nn.Sequential(script(linear(add))), 0.0, 0.5),
    "frozen": (lambda add: nn.Sequential(freeze(script(linear(add)))), 0.0, 0.5),
    "meta": (lambda n: nn.Linear(n, 2, device="meta"), 2, 3),
    "lazy": (lambda dtype: nn.LazyLinear(3, dtype=dtype), torch.float32, torch.float64),
    "sparse": (lambda a: holding((a * torch.eye(2)).to_sparse()), 1, -1),
    "complex": (lambda turn: holding(turn(torch.tensor([1 + 2j]))), torch.conj, torch.clone),
    "extra number": (Extra, 1, 2),
    "extra none": (Extra, None, "None"),
    "extra parts": (Extra, {"a": [1, (2.5, b"x")]}, {"a": [1, (2.5, b"y")]}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_hash_weights_is_the_same_for_the_same_alone(name):
    make, one, other = MADE[name]
    assert hash_weights(make(one)) == hash_weights(make(one)) != hash_weights(make(other))
    refuse_broken_weights(make(one))


@pytest.mark.filterwarnings("ignore")
def test_hash_weights_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from test_weights import MADE, hash_weights\n"
        "print(hash('a'), *(hash_weights(make(one)) for make, one, _ in MADE.values()))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    ran = subprocess.check_output(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, text=True
    ).split()
    assert ran[0] != str(hash("a"))
    assert ran[1:] == [hash_weights(make(one)) for make, one, _ in MADE.values()]


def test_hash_weights_is_that_of_the_tensors_and_what_cannot_be_read_is_told():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).half()
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    assert hash_weights(network) == digest.hexdigest()
    for module, sentence in (
        (Extra(lambda: 1 / 0), r"cannot tell its state \(division by zero\)"),
        (Extra({"a": np.ones(2)}), r"'_extra_state' is a ndarray, which cannot be hashed"),
        (holding(TWO), "'held' is a TwoTensor, whose numbers cannot be read"),
    ):
        with pytest.raises(ModelError, match=sentence):
            hash_weights(module)


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.clone])
def test_refuse_broken_weights_sees_into_sparse_ones(make):
    with pytest.raises(ModelError, match="'held' holds NaN"):
        refuse_broken_weights(holding(make(torch.tensor([[0.0, torch.nan]]))))
