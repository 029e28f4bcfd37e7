"""Splits are in force, or it is told that they are not; what is copied and what cannot be."""

import tempfile
import threading
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from pairs import images, make_split, split_network
from torch import nn
from ways import reaching

import unbraid
from checks import assert_close, assert_same_outputs, assert_untouched, snapshot
from structures import Around
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, ModelError, OutputChangedError
from unbraid.networks.copying import copy_network
from unbraid.surgery.apply import check_in_force


def test_two_functions_that_share_a_variable_do_so_in_a_copy():
    network = reaching("module")
    layer, seen = network.layer, []

    def put(other):
        nonlocal layer
        layer = other

    def middle(x):
        seen.append(len(x))
        return layer(x)

    network.put, network.body = put, middle
    changed = split_network(network)
    seen.clear()
    changed(images(2))
    assert seen == [2]  # what does not lead to the network is still the caller's
    changed.put(lambda x: torch.zeros_like(changed.layer(x)))
    assert not torch.equal(changed(images()), network(images()))


class Refuses:
    def __reduce_ex__(self, _protocol):
        raise ValueError("not to be copied")


def test_apply_shares_what_cannot_be_copied():
    for make in (
        *(threading.Lock, threading.Thread, tempfile.TemporaryFile, Refuses, lambda: torch),
        *(lambda: (n for n in range(3)), lambda: weakref.ref(Refuses)),
    ):
        network, own, inner = reaching("module"), make(), make()
        network.own = network.layer.own = own
        network.held = {"locks": [inner, {"more": (inner,)}]}
        network.layer.forward = types.MethodType(nn.Conv2d.forward, network.layer)  # to be probed
        changed = split_network(network)
        assert_same_outputs(network, changed, images())
        locks = changed.held["locks"]
        assert locks is not network.held["locks"]
        assert changed.own is changed.layer.own is own
        assert locks[0] is locks[1]["more"][0] is inner


def test_copy_network_copies_what_can_be_copied_and_what_a_traced_network_holds():
    network = reaching("module")
    network.own = {"numbers": [1, 2], "tensor": torch.ones(2)}
    network.again = network.own["numbers"]
    network.computed = [2 * network.stem.bias]
    network.round = [{}]
    network.round[0]["again"] = network.round
    network.scripted = torch.jit.script(nn.Linear(2, 3))
    network.stem.requires_grad_(False)
    twin = copy_network(network)
    for name in ("numbers", "tensor"):
        assert twin.own[name] is not network.own[name]
    assert twin.again is twin.own["numbers"]
    assert twin.round[0]["again"] is twin.round is not network.round
    twin.computed[0].data.zero_()
    assert network.computed[0].any()
    assert all(own.is_leaf for own in twin.parameters())
    wanted = [[own.requires_grad for own in one.parameters()] for one in (network, twin)]
    assert wanted[0] == wanted[1]
    network = torch.fx.symbolic_trace(reaching("module"))
    layer = network.layer
    network.stem.register_forward_hook(lambda _module, _args, z: z + 0 * layer.weight.sum())
    twin = copy_network(network)
    layer.weight.data.fill_(torch.nan)
    assert twin(images()).isfinite().all()
    assert network(images()).isnan().all()


def by_a_class(network):
    class Middle:
        layer = network.layer

    return lambda x: Middle.layer(x)


def by_its_weights(network):
    layer = network.layer
    return lambda x: torch.conv2d(x, layer.weight, layer.bias, padding=1)


def by_a_weak_method(network):
    method = weakref.WeakMethod(network.layer.__call__)
    return lambda x: method()(x)


def test_a_split_that_never_runs_is_told():
    for past in (lambda net: net.layer.forward, by_its_weights, by_a_weak_method, by_a_class):
        network = reaching("module")
        network.body = past(network)
        never, split = r"never runs layer 'layer' .* not in force", make_split(network)
        changed, plain = (unbraid.apply(network, split, form=form) for form in ("exact", "plain"))
        for one in (changed, plain):
            with pytest.raises(ModelError, match=never):
                unbraid.compare_outputs(network, one, SyntheticImages(5))
        with pytest.raises(LayerError, match=r"runs 0 times .* not in force"):
            unbraid.ablate(changed, SyntheticImages(5))
        with pytest.raises(ModelError, match=never):
            check_in_force(network, "layer", images(1))


GLOBAL = None
GLOBALS = None


def by_a_helper(x):
    return GLOBAL(x)


class Stem(nn.Module):
    def forward(self, x):
        return GLOBAL(x)


def test_apply_refuses_a_global_variable_that_runs_the_original(monkeypatch):
    for middle, variable in (
        (lambda _: lambda x: GLOBAL(x), "GLOBAL"),
        (lambda _: lambda x: (lambda: GLOBALS[0](x))(), "GLOBALS"),
        (lambda _: lambda x: by_a_helper(x), "GLOBAL"),
        (lambda network: Stem().__call__, "GLOBAL"),
    ):
        network = reaching("module")
        network.body = middle(network)
        monkeypatch.setitem(globals(), "GLOBAL", network.layer.__call__)
        monkeypatch.setitem(globals(), "GLOBALS", [network.layer])
        with pytest.raises(ModelError, match=f"uses the global variable '{variable}'"):
            split_network(network)
        with pytest.raises(ModelError, match=f"uses the global variable '{variable}'"):
            check_in_force(network, "layer", images(1))


def test_apply_takes_a_hook_that_keeps_outputs_in_a_global_variable(monkeypatch):
    network = reaching("module")
    network.layer.register_forward_hook(lambda _module, _args, output: GLOBALS.append(output))
    monkeypatch.setitem(globals(), "GLOBALS", [])
    assert_same_outputs(network, split_network(network), images())
    check_in_force(network, "layer", images(1))


class Held:
    """Takes the function that it holds for a constant when it is copied."""

    def __init__(self, run):
        self.run = run

    def __deepcopy__(self, _memo):
        return Held(self.run)

    def __call__(self, x):
        return self.run(x)


@pytest.mark.parametrize("by_its_class", [False, True])
def test_apply_refuses_a_function_that_still_runs_the_original(by_its_class):
    network = reaching("module")
    layer = network.layer

    def run(*args):
        return layer(args[-1])

    if by_its_class:
        network.__class__ = type("Stays", (Around,), {"body": run})
    else:
        network.body = Held(run)
    with pytest.raises(ModelError, match=r"run.* still leads to the original network"):
        split_network(network)


def by_variable(*seen):
    return GLOBALS[0](seen[-1])


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
@pytest.mark.parametrize("name", ["", "layer", "head"])
@pytest.mark.parametrize("way", ["variable", "object"])
def test_apply_names_the_hook_that_leads_to_the_original(kind, name, way, monkeypatch):
    network = reaching("module")
    monkeypatch.setitem(globals(), "GLOBALS", [network.layer])
    hook = by_variable if way == "variable" else Leading(network)
    getattr(network.get_submodule(name), f"register_{kind}_hook")(hook)
    called = "'by_variable'" if way == "variable" else "of type Leading"
    of = f"layer '{name}'" if name else "the network"
    told = f"the {kind.replace('full_', '').replace('_', ' ')} hook {called} of {of} "
    with pytest.raises(ModelError, match=f"{told}.*; remove that hook first, and give it to the"):
        split_network(network)


class Leading:
    """Cannot be copied, and holds a network."""

    __slots__ = ("network",)

    def __init__(self, network):
        self.network = network

    __reduce_ex__ = Refuses.__reduce_ex__

    def __call__(self, *_seen):
        pass


def test_check_in_force_takes_few_passes_and_leaves_the_network():
    network = reaching("closure")
    n_runs = []
    network.register_forward_hook(lambda *_: n_runs.append(1))
    before, state = snapshot(network), torch.get_rng_state()
    check_in_force(network, network.layer, images(1))
    assert len(n_runs) == 2  # of the network and of its copy
    assert_untouched(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)


def test_check_in_force_tells_a_network_that_depends_on_the_layers_type_from_a_random_one():
    network = reaching("module")

    def by_type(self, x):
        return self.layer(x) * (1 + (type(self.layer) is nn.Conv2d))

    network.body = types.MethodType(by_type, network)
    with pytest.raises(OutputChangedError, match="'layer' split the network computes something"):
        check_in_force(network, "layer", images(1))
    network.body = types.MethodType(lambda self, x: self.layer(x) + torch.rand(1), network)
    check_in_force(network, "layer", images(1))  # which is left to others


def test_gate_works_in_torchs_transformer_and_where_a_part_is_named_as_a_wrapper():
    """Which in eval mode reads the weights of its layers past them."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    parts = (nn.Flatten(2), nn.Linear(42, 8), block, nn.Flatten(), nn.Linear(24, 4))
    network, name = nn.Sequential(*parts).double().eval(), "2.linear1"
    changed = split_network(network, layer=name)
    with changed.gate(name, 1, 0, -9.0):
        moved = changed(images())
        with torch.no_grad():
            assert_close(changed(images()), moved)
    assert not torch.allclose(moved, network(images()))
    network = nn.Sequential(OrderedDict(module=reaching("module")))
    changed = split_network(network, layer="module.layer")
    with unbraid.gate(changed, "module.layer", 0, 0, 0.0):
        assert not torch.equal(changed(images(1)), network(images(1)))


@pytest.mark.parametrize("name", ["layer", "layer._orig_mod"])
def test_a_layer_compiled_by_itself_goes_by_its_name_with_or_without_the_wrapper(name):
    network, whole = reaching("module"), reaching("module")
    network.layer = torch.compile(network.layer, backend="eager")
    for one, split in (
        (network, make_split(network, layer=name)),
        (whole, make_split(network, layer=name)),  # which is the same network
        (network, make_split(whole)),
    ):
        changed = unbraid.apply(one, split)
        assert_same_outputs(one, changed, images())
        with torch.no_grad(), unbraid.gate(changed, "layer", 0, 0, 0.0):
            assert not torch.equal(changed(images()), network(images()))
