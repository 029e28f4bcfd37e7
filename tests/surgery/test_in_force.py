"""Splits are in force however a network reaches the layer, or it is told that they are not."""

from __future__ import annotations

import copy
import functools
import logging
import pickle
import tempfile
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_apply import images, make_split
from torch import Tensor, nn

import unbraid
from checks import assert_bit_equal, assert_close, assert_same_outputs, assert_untouched, snapshot
from tiny_networks import N_CLASSES, SyntheticImages
from unbraid.base.errors import LayerError, ModelError, OutputChangedError, UnbraidError
from unbraid.networks.copying import Reach, copy_network, unwrap
from unbraid.surgery.apply import check_in_force

PAIR = {0: [[0], [1]]}


class Plain(nn.Module):
    """Runs its layer as a module, or by `middle`, where one is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, N_CLASSES)
        self.double()

    def middle(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x).relu()).relu().mean((2, 3)))


@dataclass(slots=True, frozen=True)
class Held:
    layers: tuple[nn.Module, ...]


class Calls:
    """Runs a layer, and cannot be copied."""

    def __init__(self, layer: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.lock = layer, threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class NeverCopied(Calls):
    def __deepcopy__(self, _memo: Any) -> NeverCopied:
        return self


class WithSlots(nn.Conv2d):
    __slots__ = ("own",)


class Ways:
    """Ways to reach the layer: each returns the network's `middle`, or the network, or None."""

    def as_a_module(network, layer):
        pass

    def by_a_closure(network, layer):
        seen = []

        def middle(x: Tensor) -> Tensor:
            seen.append(x)
            return layer(x)

        return middle

    def by_a_closure_in_a_closure(network, layer):
        return (lambda get: lambda x: get()(x))(lambda: layer)

    def by_a_function_that_calls_itself(network, layer):
        def middle(x: Tensor, n: int = 2) -> Tensor:
            return layer(x) if n == 0 else middle(x, n - 1)

        return middle

    def by_a_default(network, layer):
        return lambda x, layer=layer: layer(x)

    def by_a_keyword_default(network, one):
        def middle(x: Tensor, *, layer: nn.Module = one) -> Tensor:
            return layer(x)

        return middle

    def by_a_decorated_method(network, layer):
        method = network.middle

        @functools.wraps(method)
        def middle(x: Tensor) -> Tensor:
            return method(x)

        return middle

    def by_a_static_method(network, layer):
        return staticmethod(lambda x: layer(x))

    def by_a_cached_function(network, layer):
        find = functools.lru_cache(lambda: layer)
        return lambda x: find()(x)

    def by_a_partial(network, layer):
        return functools.partial(lambda network, x: network.layer(x), network)

    def by_the_layers_own_call(network, layer):
        return layer.__call__

    def by_a_list(network, layer):
        network.steps = [network.stem, layer]
        return types.MethodType(lambda self, x: self.steps[1](x), network)

    def by_a_dictionarys_method(network, layer):
        get = {"layer": layer}.get
        return lambda x: get("layer")(x)

    def by_an_object_with_slots(network, layer):
        network.held = Held((layer,))
        return types.MethodType(lambda self, x: self.held.layers[0](x), network)

    def by_an_object_with_a_lock(network, layer):
        return Calls(layer)

    def by_an_object_that_copies_to_itself(network, layer):
        return NeverCopied(layer)

    def by_weak_references(network, layer):
        one, whole = weakref.ref(layer), weakref.proxy(network)
        by_name = weakref.WeakValueDictionary(layer=layer)
        return lambda x: (one()(x) + whole.layer(x) + by_name["layer"](x)) / 3

    def by_a_hook(network, layer):
        network.around = nn.Identity()
        network.around.register_forward_hook(lambda _module, _args, output: layer(output))
        return network.around.__call__

    def by_a_compiled_function(network, layer):
        return torch.compile(lambda x: layer(x), backend="eager")

    def by_a_layer_compiled_by_itself(network, layer):
        compiled = torch.compile(layer, backend="eager")
        return lambda x: compiled(x)

    def by_its_compile_method(network, layer):
        layer.compile(backend="eager")

    def in_a_wrapper(network, layer):
        network.middle = lambda x: layer(x)
        return nn.DataParallel(network)

    def with_weight_norm(network, layer):
        normed = nn.utils.parametrizations.weight_norm(layer)
        return lambda x: normed(x)

    def with_weight_norm_of_old(network, layer):
        normed = nn.utils.weight_norm(layer)
        return lambda x: normed(x)

    # The layer's own forward, which runs inside of the split layer.

    def with_a_forward_by_a_method(network, layer):
        layer.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x), layer)

    def with_a_forward_that_asks_for_the_kind(network, layer):
        layer.forward = lambda x: type(layer).forward(layer, x)

    def with_a_forward_put_around_the_old(network, layer):
        layer.old = layer.forward
        layer.forward = functools.partial(lambda layer, x: layer.old(x), layer)

    def with_a_forward_by_an_object(network, layer):
        layer.forward = Calls(layer.forward)

    def of_a_class_with_slots(network, layer):
        network.layer = WithSlots(6, 8, 3, padding=1).double()


WAYS = [name for name in vars(Ways) if not name.startswith("__")]


def reaching(name: str) -> nn.Module:
    """A network that reaches its layer in one of the ways."""
    torch.manual_seed(0)
    network = Plain()
    made = getattr(Ways, name)(network, network.layer)
    if isinstance(made, nn.Module) and made is not network.layer:
        return made.eval()
    if made is not None:
        network.middle = made
    return network.eval()


@pytest.mark.parametrize("name", WAYS)
def test_apply_is_in_force_however_the_layer_is_reached(name, tmp_path):
    network, x = reaching(name), images()
    expected = network(x)
    before = snapshot(unwrap(network))
    check_in_force(network, "layer", x[:1])
    split = make_split(network, tmp_path)
    changed = unbraid.apply(network, split)
    assert_bit_equal(changed(x), expected)
    with changed.gate("layer", 1, 0, 0.0):
        assert not torch.allclose(changed(x), expected, rtol=1e-3)
        assert_bit_equal(network(x), expected)
    unbraid.compare_outputs(network, changed, SyntheticImages(5), tolerance=0.0)
    if name != "by_weak_references":  # which run the layer more than once
        unbraid.ablate(changed, SyntheticImages(5))
    plain = unbraid.apply(network, split, form="plain")
    assert_close(plain(x), expected)
    with torch.no_grad():
        plain.layer.merge.weight.zero_()
    assert not torch.allclose(plain(x), expected, rtol=1e-3)
    assert_untouched(before, snapshot(unwrap(network)))


def test_two_functions_that_share_a_variable_do_so_in_a_copy(tmp_path):
    network = Plain()
    layer, seen = network.layer, []

    def put(other: nn.Module) -> None:
        nonlocal layer
        layer = other

    def middle(x: Tensor) -> Tensor:
        seen.append(len(x))
        return layer(x)

    network.put, network.middle = put, middle
    changed = unbraid.apply(network, make_split(network, tmp_path))
    seen.clear()
    changed(images(2))
    assert seen == [2]  # what does not lead to the network is still the caller's
    changed.put(lambda x: torch.zeros_like(changed.layer(x)))
    assert not torch.equal(changed(images()), network(images()))


@pytest.mark.parametrize("form", ["exact", "plain"])
def test_several_layers_in_a_list_are_split_at_once(form, tmp_path):
    network = Plain()
    network.more = nn.Conv2d(8, 8, 1).double()
    steps = [network.layer, network.more]
    network.middle = lambda x: steps[1](steps[0](x).relu())
    splits = [make_split(network, tmp_path / name, layer=name) for name in ("layer", "more")]
    changed = unbraid.apply(network, splits, form=form)
    assert_close(changed(images()), network(images()))
    unbraid.compare_outputs(network, changed, SyntheticImages(5))
    for name in ("layer", "more") if form == "exact" else ():
        with changed.gate(name, 1, 0, 0.0):
            assert not torch.equal(changed(images()), network(images()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy_network])
def test_a_split_layer_that_computes_its_weights_can_be_copied(duplicate, tmp_path):
    network = reaching("as_a_module")
    nn.utils.parametrizations.weight_norm(network.layer)
    twin = duplicate(unbraid.apply(network, make_split(network, tmp_path)))
    assert_same_outputs(network, twin, images())
    with twin.gate("layer", 1, 0, 0.0):
        assert not torch.equal(twin(images()), network(images()))


def test_a_split_layer_reached_by_a_list_goes_through_pickle(tmp_path):
    network = Plain()
    network.steps = [network.layer]
    changed = unbraid.apply(network, make_split(network, tmp_path))
    twin = pickle.loads(pickle.dumps(changed))
    assert twin.steps[0] is twin.layer
    assert_same_outputs(network, twin, images())


# --- what cannot be copied ------------------------------------------------------------------------


class Refuses:
    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise ValueError("not to be copied")


class RefusesToo(Refuses):
    def __deepcopy__(self, _memo: Any) -> Any:
        raise ValueError("not to be copied")


UNCOPYABLE: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "file": tempfile.TemporaryFile,
    "generator": lambda: (n for n in range(3)),
    "logger": lambda: logging.getLogger("one"),
    "thread": lambda: threading.Thread(target=print),
    "module": lambda: torch,
    "weak reference": lambda: weakref.ref(Refuses),
    "refuses": Refuses,
    "refuses too": RefusesToo,
    "in containers": lambda: {"locks": [threading.Lock(), {"more": (Refuses(),)}]},
}


@pytest.mark.parametrize("name", UNCOPYABLE)
@pytest.mark.parametrize("place", ["network", "layer"])
def test_apply_shares_what_cannot_be_copied(name, place, tmp_path):
    network = reaching("as_a_module")
    own = UNCOPYABLE[name]()
    (network if place == "network" else network.layer).own = own
    network.layer.forward = types.MethodType(nn.Conv2d.forward, network.layer)  # to be probed
    changed = unbraid.apply(network, make_split(network, tmp_path))
    assert_same_outputs(network, changed, images())
    kept = changed.own if place == "network" else changed.layer.own
    if name == "in containers":
        kept, own = kept["locks"], own["locks"]
        assert kept is not own
        assert kept[0] is own[0]
        assert kept[1]["more"][0] is own[1]["more"][0]
    else:
        assert kept is own


def test_copy_network_copies_what_can_be_copied():
    network = Plain()
    network.own = {"numbers": [1, 2], "tensor": torch.ones(2)}
    network.again = network.own["numbers"]
    network.round = [{"numbers": [1]}]
    network.round[0]["again"] = network.round
    twin = copy_network(network)
    assert twin.own["numbers"] == [1, 2]
    for name in ("numbers", "tensor"):
        assert twin.own[name] is not network.own[name]
    assert twin.again is twin.own["numbers"]
    assert twin.round[0]["again"] is twin.round
    assert twin.round is not network.round


# --- what is not in force, and told ---------------------------------------------------------------


def by_a_class(network: Plain) -> Any:
    class Middle:
        layer = network.layer

    return lambda x: Middle.layer(x)


def by_a_weak_method(network: Plain) -> Any:
    method = weakref.WeakMethod(network.layer.__call__)
    return lambda x: method()(x)


def by_its_weights(network: Plain) -> Any:
    layer = network.layer
    return lambda x: F.conv2d(x, layer.weight, layer.bias, padding=1)


@pytest.mark.parametrize(
    "past", [lambda network: network.layer.forward, by_its_weights, by_a_weak_method, by_a_class]
)
def test_a_split_that_never_runs_is_told(past, tmp_path):
    network = Plain()
    split = make_split(network, tmp_path)
    network.middle = past(network)
    never = r"never runs layer 'layer' .* not in force"
    for form in ("exact", "plain"):
        changed = unbraid.apply(network, split, form=form)
        with pytest.raises(ModelError, match=never):
            unbraid.compare_outputs(network, changed, SyntheticImages(5))
        if form == "exact":
            with pytest.raises(LayerError, match=r"runs 0 times .* not in force"):
                unbraid.ablate(changed, SyntheticImages(5))
    with pytest.raises(ModelError, match=never):
        check_in_force(network, "layer", images(1))


def test_images_that_cannot_be_read_are_told_before_a_split_that_never_ran(tmp_path):
    network = Plain()
    changed = unbraid.apply(network, make_split(network, tmp_path))

    class Broken(SyntheticImages):
        def __getitem__(self, index: int) -> Any:
            raise OSError("broken")

    with pytest.raises(UnbraidError, match="No image could be read"):
        unbraid.compare_outputs(network, changed, Broken(2), skip_broken=True)


GLOBAL: Any = None
GLOBALS: Any = None


def by_a_helper(x: Tensor) -> Tensor:
    return GLOBAL.layer(x)


class Stem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return GLOBAL(x)


def _with_stem(network: Plain) -> Any:
    network.around = Stem()
    return network.around.__call__


@pytest.mark.parametrize(
    ("middle", "variable"),
    [
        (lambda _: lambda x: GLOBAL.layer(x), "GLOBAL"),
        (lambda _: lambda x: GLOBALS[0](x), "GLOBALS"),
        (lambda _: lambda x: (lambda: GLOBAL.layer(x))(), "GLOBAL"),
        (lambda _: lambda x: by_a_helper(x), "GLOBAL"),
        (lambda _: lambda x: GLOBAL.middle_of(x), "GLOBAL"),
        (_with_stem, "GLOBAL"),
    ],
)
@pytest.mark.parametrize("form", ["exact", "plain"])
def test_apply_refuses_a_global_variable_that_runs_the_original(
    middle, variable, form, tmp_path, monkeypatch
):
    network = Plain()
    split = make_split(network, tmp_path)
    network.middle_of = network.layer.__call__
    network.middle = middle(network)
    holder = network.layer if isinstance(getattr(network, "around", None), Stem) else network
    monkeypatch.setitem(globals(), "GLOBAL", holder)
    monkeypatch.setitem(globals(), "GLOBALS", [network.layer])
    with pytest.raises(ModelError, match=f"uses the global variable '{variable}'") as caught:
        unbraid.apply(network, split, form=form)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=f"uses the global variable '{variable}'"):
        check_in_force(network, "layer", images(1))


def test_apply_takes_a_hook_that_keeps_outputs_in_a_global_variable(tmp_path, monkeypatch):
    network = Plain().eval()
    network.layer.register_forward_hook(lambda _module, _args, output: GLOBALS.append(output))
    monkeypatch.setitem(globals(), "GLOBALS", [])
    changed = unbraid.apply(network, make_split(network, tmp_path))
    assert_same_outputs(network, changed, images())
    check_in_force(network, "layer", images(1))


class CopiesItself(nn.Module):
    """Takes the functions that it holds for constants when it is copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        twin = CopiesItself()
        memo[id(self)] = twin
        twin.run = copy.deepcopy(self.run)
        return twin

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def _held_by_a_part(network: Plain) -> None:
    network.around, layer = CopiesItself(), network.layer
    network.around.run = lambda x: layer(x)
    network.middle = types.MethodType(lambda self, x: self.around(x), network)


def _held_by_its_class(network: Plain) -> None:
    layer = network.layer

    class Stays(Plain):
        def middle(self, x: Tensor) -> Tensor:
            return layer(x)

    network.__class__ = Stays


@pytest.mark.parametrize("hold", [_held_by_a_part, _held_by_its_class])
def test_apply_refuses_a_function_that_still_runs_the_original(hold, tmp_path):
    network = Plain()
    hold(network)
    split = make_split(network, tmp_path)
    with pytest.raises(ModelError, match=f"{hold.__name__}.* still leads to the original network"):
        unbraid.apply(network, split)


def test_copy_network_copies_what_a_traced_network_holds():
    network = torch.fx.symbolic_trace(Plain())
    layer = network.layer
    network.stem.register_forward_hook(lambda _m, _args, z: z + 0 * layer.weight.sum())
    twin = copy_network(network)
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    assert twin(images()).isfinite().all()
    assert network(images()).isnan().all()


def test_copy_network_keeps_which_weights_want_gradients():
    network = Plain()
    network.scripted = torch.jit.script(nn.Linear(2, 3))
    network.stem.requires_grad_(False)
    twin = copy_network(network)
    for one, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert other.is_leaf
        assert other.requires_grad == one.requires_grad


# --- tried before anything is begun ---------------------------------------------------------------


def test_check_in_force_takes_few_passes_and_leaves_the_network():
    network = reaching("by_a_closure")
    n_runs: list[int] = []
    network.register_forward_hook(lambda *_: n_runs.append(1))
    before, state = snapshot(network), torch.get_rng_state()
    check_in_force(network, network.layer, images(1))
    assert len(n_runs) == 2  # of the network and of its copy
    assert_untouched(before, snapshot(network))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", ["layers", "around"])
def test_check_in_force_refuses_a_layer_that_cannot_be_split(layer):
    network = Plain()
    network.around = nn.Identity()
    with pytest.raises(LayerError, match=layer):
        check_in_force(network, layer, images(1))


def test_check_in_force_tells_a_network_that_depends_on_the_layers_type_from_a_random_one():
    network = Plain()
    network.middle = types.MethodType(
        lambda self, x: self.layer(x) * (1 + (type(self.layer) is nn.Conv2d)), network
    )
    with pytest.raises(OutputChangedError, match="'layer' split the network computes something"):
        check_in_force(network, "layer", images(1))
    network.middle = types.MethodType(
        lambda self, x: self.layer(x) + torch.rand(1, dtype=x.dtype), network
    )
    check_in_force(network, "layer", images(1))  # which is left to others


class Trainer:
    """Leads to the network, and to much else."""

    def __init__(self, model: nn.Module) -> None:
        self.log = [{"step": [n]} for n in range(300)]
        self.model = model
        self.images = [[n] for n in range(300)]


class Counting(Reach):
    """Counts how often it looks into an object."""

    def __init__(self, targets: Any) -> None:
        super().__init__(targets)
        self.looks: Counter[int] = Counter()

    def inside(self, x: object) -> Any:
        self.looks[id(x)] += 1
        return super().inside(x)


def test_reach_looks_into_each_object_once_whoever_asks():
    network = Plain()
    network.trainer = trainer = Trainer(network)
    reach = Counting(network.modules())
    asked = [trainer, vars(trainer), trainer.log, *trainer.log, trainer.images, *trainer.images]
    assert [reach.leads(one) for one in asked] == [True, True] + [False] * 602
    way = reach.path(trainer)
    assert (way[0], way[-1]) == (trainer, network)
    assert reach.path(trainer.log) is None
    assert set(reach.looks.values()) == {1}
    assert {id(one) for one in asked} <= set(reach.looks)


def test_gate_finds_layers_of_a_network_that_has_a_part_named_as_a_wrapper(tmp_path):
    network = nn.Module()
    network.module = Plain().eval()
    network.forward = network.module.__call__
    scan = unbraid.scan(network, "module.l*", SyntheticImages(8), tmp_path / "scan")
    split = unbraid.split(scan["module.layer"], unbraid.find(scan["module.layer"], channels=PAIR))
    changed = unbraid.apply(network, split)
    with unbraid.gate(changed, "module.layer", 0, 0, 0.0):
        assert not torch.equal(changed(images(1)), network(images(1)))


@pytest.mark.parametrize("name", ["layer", "layer._orig_mod"])
def test_a_layer_compiled_by_itself_goes_by_its_name_with_or_without_the_wrapper(name, tmp_path):
    network = Plain().eval()
    whole = copy.deepcopy(network)
    network.layer = torch.compile(network.layer, backend="eager")
    split = make_split(network, tmp_path / "compiled", PAIR, name)
    changed = unbraid.apply(network, split)
    x = images()
    with torch.no_grad(), changed.gate("layer", 0, 0, 0.0):
        off = changed(x)
    assert_same_outputs(network, changed, x)
    assert (off - network(x)).abs().max() > 0
    # A network is the same whether it is compiled or not, and so are its splits.
    for there, made in ((whole, split), (network, make_split(whole, tmp_path / "whole", PAIR))):
        with torch.no_grad(), unbraid.gate(unbraid.apply(there, made), "layer", 0, 0, 0.0):
            pass
