from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization
from torch import Tensor, nn

from unbraid.base.errors import ModelError
from unbraid.networks.weights import hash_weights, refuse_broken_weights


class Extra(nn.Linear):
    """Keeps anything beside its weights."""

    def __init__(self, extra: Any) -> None:
        torch.manual_seed(0)
        super().__init__(2, 3)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Thing:
    """Of a kind that nobody knows how to write."""

    def __init__(self, number: int) -> None:
        self.number, self.itself, self.do = number, self, lambda: number


class Wrapped(Tensor):
    """A tensor that says how it is made of others."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_: Any) -> Wrapped:
        return Wrapped(inner["inner"])

    def __repr__(self) -> str:
        return "Wrapped"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return type(args[0])(args[0].inner)
        raise NotImplementedError


def linear(add: float) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Linear(4, 4)
    with torch.no_grad():
        inner.weight[0, 0] += add
    return nn.Sequential(inner).eval()


def quantised(add: float) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(linear(add), {nn.Linear})


def static(add: float) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(torch.ao.quantization.QuantStub(), nn.Conv2d(2, 3, 1)).eval()
    with torch.no_grad():
        network[1].weight[0, 0] += add
    network.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    ready = torch.ao.quantization.prepare(network)
    ready(torch.ones(1, 2, 4, 4))
    return torch.ao.quantization.convert(ready)


def holding(tensor: Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("held", tensor)
    return module


MADE: dict[str, tuple[Callable[[Any], nn.Module], Any, Any]] = {  # with one thing, and another
    "quantised": (quantised, 0.0, 0.5),
    "static": (static, 0.0, 0.5),
    "scripted": (lambda add: nn.Sequential(torch.jit.script(linear(add))), 0.0, 0.5),
    "frozen": (
        lambda add: nn.Sequential(torch.jit.freeze(torch.jit.script(linear(add)))),
        0.0,
        0.5,
    ),
    "meta": (lambda n: nn.Linear(n, 2, device="meta"), 2, 3),
    "lazy": (lambda dtype: nn.LazyLinear(3, dtype=dtype), torch.float32, torch.float64),
    "sparse": (lambda a: holding((a * torch.eye(2)).to_sparse()), 1, -1),
    "csr": (lambda a: holding((a * torch.eye(2)).to_sparse_csr()), 1, 2),
    "complex": (lambda turn: holding(turn(torch.tensor([1 + 2j]))), torch.conj, torch.clone),
    "wrapped": (lambda a: holding(Wrapped(torch.full((2,), a))), 1.0, 0.0),
}
EXTRA: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "number": (lambda: 1, lambda: 2),
    "none": (lambda: None, lambda: "None"),
    "nested": (lambda: {"a": [1, (2.5, b"x")]}, lambda: {"a": [1, (2.5, b"y")]}),
    "set": (lambda: {"b", "a"}, lambda: {"b", "c"}),
    "array": (lambda: np.arange(3), lambda: np.arange(1, 4)),
    "bytes": (lambda: io.BytesIO(b"a"), lambda: io.BytesIO(b"b")),
    "dtype": (lambda: torch.int8, lambda: torch.int16),
    "thing": (lambda: Thing(1), lambda: Thing(2)),
    "tensor": (lambda: torch.ones(2), lambda: torch.zeros(2)),
}
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    name: (partial(make, one), partial(make, other)) for name, (make, one, other) in MADE.items()
} | {
    f"extra {name}": (lambda one=one: Extra(one()), lambda other=other: Extra(other()))
    for name, (one, other) in EXTRA.items()
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAIRS)
def test_hash_weights_of_any_state_is_the_same_for_the_same_alone(name):
    make, other = PAIRS[name]
    hashed = hash_weights(make())
    assert hashed == hash_weights(make())
    assert hashed != hash_weights(other())
    refuse_broken_weights(make())


@pytest.mark.filterwarnings("ignore")
def test_hash_weights_is_the_same_in_another_process():
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.path.append('..')\n"
        "from test_weights import PAIRS, hash_weights\n"
        "print(*(hash_weights(make()) for make, _ in PAIRS.values()))"
    )
    options: dict[str, Any] = {"capture_output": True, "text": True, "check": True}
    ran = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, **options)
    assert ran.stdout.split() == [hash_weights(make()) for make, _ in PAIRS.values()]


def test_hash_weights_of_ordinary_network_is_that_of_its_tensors():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)).half()
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    assert hash_weights(network) == digest.hexdigest()


class Refuses(nn.Linear):
    def get_extra_state(self) -> Any:
        raise RuntimeError("not now")


class Closed(Wrapped):
    __tensor_flatten__ = None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Refuses(1, 1), r"cannot tell its state \(not now\)"),
        (
            lambda: holding(Closed(torch.ones(2))),
            "'held' is a Closed, whose numbers cannot be read",
        ),
    ],
)
def test_hash_weights_of_what_cannot_be_read_is_told(make, sentence):
    with pytest.raises(ModelError, match=sentence):
        hash_weights(make())


@pytest.mark.parametrize("make", [Tensor.to_sparse, Tensor.to_sparse_csr, Tensor.clone])
def test_refuse_broken_weights_sees_into_sparse_ones(make):
    with pytest.raises(ModelError, match="'held' holds NaN"):
        refuse_broken_weights(holding(make(torch.tensor([[0.0, torch.nan]]))))
