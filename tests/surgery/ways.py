"""Ways in which a network's code can reach a layer."""

import functools
import threading
import types
import weakref
from dataclasses import dataclass

import torch
from torch import nn

from structures import Around


class Calls:
    """Runs a layer, and cannot be copied."""

    def __init__(self, layer):
        self.layer, self.lock = layer, threading.Lock()

    def __call__(self, x):
        return self.layer(x)


class NeverCopied(Calls):
    def __deepcopy__(self, _memo):
        return self


class WithSlots(nn.Conv2d):
    __slots__ = ("own",)


def calling_itself(_, layer):
    def middle(x, n=2):
        return layer(x) if n == 0 else middle(x, n - 1)

    return middle


def weak_references(network, layer):
    one, whole = weakref.ref(layer), weakref.proxy(network)
    by_name = weakref.WeakValueDictionary(layer=layer)
    return lambda x: (one()(x) + whole.layer(x) + by_name["layer"](x)) / 3


def slots_and_two_names(network, _):
    network.layer = network.again = WithSlots(6, 6, 3, padding=1).double()
    return types.MethodType(lambda self, x: self.again(x), network)


@dataclass(slots=True, frozen=True)
class Held:
    layers: tuple


def held_in_slots(network, layer):
    network.held, network.steps = Held((layer,)), [layer]
    return types.MethodType(lambda own, x: (own.held.layers[0](x) + own.steps[0](x)) / 2, network)


def hook(network, layer):
    network.around = nn.Identity()
    network.around.register_forward_hook(lambda _module, _args, output: layer(output))
    return network.around.__call__


def of(layer):
    return lambda x: layer(x)


def own_forward(_, layer):
    layer.old = layer.forward
    layer.forward = Calls(functools.partial(lambda layer, x: layer.old(x), layer))


# Each takes the network and its layer, and returns its `body` or None.
WAYS = {
    "module": lambda network, layer: None,
    "closure": lambda network, layer: of(layer),
    "keyword default": lambda network, layer: lambda x, *, layer=layer: layer(x),
    "static method": lambda network, layer: staticmethod(lambda x: layer(x)),
    "partial": lambda network, layer: functools.partial(lambda net, x: net.layer(x), network),
    "its own call": lambda network, layer: layer.__call__,
    "cached function": lambda network, layer: functools.lru_cache(lambda x: layer(x)),
    "method of a dictionary": lambda network, layer: functools.partial(
        lambda get, x: get("layer")(x), {"layer": layer}.get
    ),
    "object with a lock": lambda network, layer: Calls(layer),
    "object that copies to itself": lambda network, layer: NeverCopied(layer),
    "compiled function": lambda network, layer: torch.compile(lambda x: layer(x), backend="eager"),
    "compile method": lambda network, layer: layer.compile(backend="eager"),
    "closure in a closure": lambda network, layer: of(of(layer)),
    "compiled layer": lambda network, layer: of(torch.compile(layer, backend="eager")),
    "old weight norm": lambda network, layer: of(nn.utils.weight_norm(layer)),
    "method as forward": lambda network, layer: setattr(
        layer, "forward", types.MethodType(lambda self, x: nn.Conv2d.forward(self, x), layer)
    ),
    "forward by the kind": lambda network, layer: setattr(
        layer, "forward", lambda x: type(layer).forward(layer, x)
    ),
    "hook": hook,
    "slots and a list": held_in_slots,
    "calling itself": calling_itself,
    "weak references": weak_references,
    "slots and two names": slots_and_two_names,
    "own forward": own_forward,
}


def reaching(way):
    torch.manual_seed(0)
    network = Around().double()
    made = WAYS[way](network, network.layer)
    if made is not None:
        network.body = made
    return network.eval()
