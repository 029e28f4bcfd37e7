"""Put a split into a network: concept channels beside the layer, the output unchanged."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.base.arguments import as_kind
from unbraid.base.errors import (
    CannotRun,
    ModelError,
    OutOfMemory,
    OutputChangedError,
    RunError,
    UsageError,
)
from unbraid.base.modes import in_plain_modes
from unbraid.networks.attention import Projection, with_projections
from unbraid.networks.by_weight import own_class
from unbraid.networks.copying import Reach, become, copy_network, double, rebind, unwrap
from unbraid.networks.layers import bias_of, describe, resolve_layer, weight_rows
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed
from unbraid.networks.spec import LayerSpec
from unbraid.networks.weights import hash_weights
from unbraid.splitting.location import split_file
from unbraid.splitting.splits import ChannelSplit, Split
from unbraid.surgery.gates import clamp, gate
from unbraid.surgery.split_attention import open_around
from unbraid.surgery.split_layer import SplitLayer, is_split, plain_layer

Form = Literal["exact", "plain"]

NOT_IN_FORCE = (
    "its split is not in force; let the network's code run the layer as a module that self leads "
    "to, not by a global variable, its forward or its weights"
)

# What may run a layer; anything else that a function names is taken to be harmless.
_RUNNABLE = (nn.Module, dict, list, tuple, types.FunctionType, types.MethodType, partial)


@in_plain_modes
def apply(
    model: nn.Module,
    split: Split | Sequence[Split] | Mapping[str, Split],
    form: Form = "exact",
) -> nn.Module:
    """Return a copy of a network in which the split channels are made of concept channels.

    In the exact form outputs are the original's to the last bit, while gradients and interventions
    go through the concept channels. They pass through the module `LAYER.concepts`, in the order of
    `LAYER.names`, where hooks can read or change them; what is subtracted passes through
    `LAYER.residuals`. `model2.gate(layer, channel, concept, value)` scales one (0 switches it off)
    and `model2.clamp(layer, channel, concept, low, high)` bounds one, until its `remove()` or the
    end of its `with` block. Once training has changed the rows, the outputs are what the new rows
    make.

    In the plain form the layer is a wider layer, `LAYER.wide`, whose outputs `LAYER.names` names,
    and one with kernel 1 that merges, `LAYER.merge`; outputs agree up to rounding, without gates
    and clamps (docs/tools.md).

    Args:
        model: the network that the split was made for; it is not changed.
        split: one, or several of different layers, all made for this network.
        form: "exact" or "plain".

    Returns:
        A copy of the network, with the split layer in the layer's place.

    Raises:
        ModelError: the network's weights are not those that the split was made for; or its code
            would run its own layer past the split one.
        LayerError: the network lacks the layer.
        RunError: the split holds other weights of the layer than the network.
        UsageError: there is no such form, or there is no split or two of one layer.
    """
    if form not in ("exact", "plain"):
        raise UsageError(f"There is no form {form!r}; use 'exact' or 'plain'.")
    model = unwrap(model)
    splits = _as_list(split)
    names = [one.layer.name for one in splits]
    if not names or len(set(names)) < len(names):
        raise UsageError("Pass one split or more, each of another layer.")
    check_fit(model, *splits)
    changed = _split_copy(model, splits, form)
    if form == "exact":
        for method in (gate, clamp):
            if not hasattr(changed, method.__name__):  # a name that a network may use itself
                setattr(changed, method.__name__, partial(method, changed))
    return changed


def _as_list(split: Split | Sequence[Split] | Mapping[str, Split]) -> list[Split]:
    several = split.values() if isinstance(split, Mapping) else split
    if isinstance(several, (Split, str)) or not isinstance(several, Iterable):
        several = [several]
    return [as_kind("split", one, Split) for one in several]


def check_fit(model: nn.Module, *splits: Split) -> None:
    """Raise ModelError, LayerError or RunError if splits were not made for a network."""
    weights = hash_weights(model)
    for split in splits:
        _, original = resolve_layer(model, split.layer.name)
        if weights != split.weights:
            raise ModelError(
                "The split was made for a network with other weights; load the weights it was made "
                "for, before any split is applied or the number format is changed, or scan and "
                "split this network."
            )
        rows = weight_rows(original)
        if rows.shape != (split.layer.n_out, split.layer.n_taps):
            raise RunError(
                f"The split is of a layer {split.layer.name!r} of another shape than the network's "
                "although it was made for it, so its file is damaged; get or make it again."
            )
        for part in split.channels:
            # Not bit by bit, since a layer may compute its weights.
            if not torch.allclose(part.weight.to(rows), rows[part.channel], rtol=1e-2):
                raise RunError(
                    f"The split's weights of channel {part.channel} are not the network's although "
                    "it was made for it, so its file is damaged; get or make it again."
                )


def _split_copy(model: nn.Module, splits: Sequence[Split], form: Form) -> nn.Module:
    """Copy a network and split layers of the copy, which must not run the network's own."""
    changed = copy_network(model)
    for one in splits:
        _replace(changed, one, form)
    refuse_ways_past(model, changed, [resolve_layer(model, s.layer.name)[0] for s in splits])
    return changed


def _replace(model: nn.Module, split: Split, form: Form) -> None:
    """Make a layer its split form, for everything that leads to it."""
    open_around(model, resolve_layer(model, split.layer.name)[1], form == "exact")
    name, layer = resolve_layer(model, split.layer.name)
    kind, build = {"exact": (SplitLayer, SplitLayer), "plain": (nn.Sequential, plain_layer)}[form]
    inner = None if isinstance(layer, Projection) else double(layer, kind)
    new = build(layer if inner is None else inner, describe(name, layer), split.channels)
    if isinstance(new, SplitLayer):
        new.clusters, new.class_names = split.clusters, split.class_names
    new.train(layer.training)
    if inner is not None:
        become(layer, new)
        rebind(inner, layer)
        return
    for module in list(model.modules()):  # a module may be known under several names
        for key, child in module._modules.items():
            if child is layer and module is not new:
                module._modules[key] = new


@in_plain_modes
def load_split(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a split from a file, or from someone else, into the network that it was made for.

    Args:
        model: the network that the split was made for; it is not changed.
        path: a file from `Split.save`; a folder from `unbraid share`, or of a run; or
            `hf://OWNER/NAME`, perhaps with `@REVISION` behind it, such a folder on the Hugging
            Face Hub, which takes `pip install "unbraid[hub]"`.

    Returns:
        A copy of the network with the concept channels, as `apply` makes it.

    Raises:
        UsageError: the address is none, or huggingface_hub is not installed.
        RunError: there is no split there; or it cannot be reached, is damaged or not a split.
        ModelError, LayerError: as for `apply`.
    """
    return apply(model, Split.load(split_file(path)))


@in_plain_modes
def check_in_force(model: nn.Module, layer: str | nn.Module, images: Tensor) -> None:
    """Try on images, (N, C, H, W), one is enough, whether a split of a layer would be in force."""
    model = unwrap(model)
    name, module = resolve_layer(model, layer)
    changed = _split_copy(model, [_trial_split(describe(name, module), module)], "exact")
    with undisturbed(model), undisturbed(changed), torch.no_grad():
        before = run_network(model, images)
        with in_force(changed):
            after = run_network(changed, images)
        changes = not _equal(before, after) and _equal(before, run_network(model, images))
    if changes:  # though the network gives the same whenever it runs
        raise OutputChangedError(
            f"With layer {name!r} split the network computes something else, so its code depends "
            "on what the layer is; let it only run the layer, or choose another."
        )


def _trial_split(spec: LayerSpec, layer: nn.Module) -> Split:
    """Two concept channels of a layer's first channel, each with every other weight."""
    weight = weight_rows(layer)[0]
    even = (torch.arange(len(weight), dtype=torch.int64, device=weight.device) % 2).to(weight)
    masks, bias = torch.stack([even, 1 - even]), float(bias_of(layer)[0])
    part = ChannelSplit(0, ((0,), (1,)), masks, weight, bias, info={})
    return Split(spec, weights="", method="", settings={}, class_names=(), channels=(part,))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


@contextmanager
def in_force(model2: nn.Module) -> Iterator[None]:
    """Raise ModelError at the end if the network ran, but one of its split layers never did."""
    layers = {name: module for name, module in model2.named_modules() if is_split(module)}
    ran: set[str] = set()

    def refuse() -> None:
        never = [name for name in layers if name not in ran]
        if "" in ran and never:
            raise ModelError(
                f"The network never runs layer {never[0]!r} on these images, so {NOT_IN_FORCE}."
            ) from None

    with ExitStack() as stack:
        for name, module in {**layers, "": model2}.items() if layers else ():
            hook = module.register_forward_pre_hook(lambda *_, name=name: ran.add(name))
            stack.callback(hook.remove)
        try:
            yield
        except OutOfMemory:
            raise
        except ModelError as error:  # as where a layer's weights are asked of two layers
            # Unfit images fail before the layer; an attribute is missing whatever the images are.
            unfit = isinstance(error, CannotRun) and type(error.__cause__) is not AttributeError
            if not unfit:
                refuse()
            raise
    refuse()


def refuse_ways_past(model: nn.Module, copied: nn.Module, layers: Sequence[str]) -> None:
    """Raise ModelError if a copy, with these layers split, is seen to run the network's own."""
    modules = dict(with_projections(model, remove_duplicate=False))
    for name in layers:
        names = [other for other, module in modules.items() if module is modules[name]]
        # The network, what in it holds the layer, and the layer.
        paths = (accumulate(other.split("."), "{}.{}".format) for other in names)
        reach = Reach(modules[holder] for holder in {"", *chain.from_iterable(paths)})
        why = _way_past(copied, reach)
        if why:
            raise ModelError(f"The split of layer {name!r} would not be in force: {why}.")


def _way_past(copied: nn.Module, reach: Reach) -> str:
    """Say what in a network's copy leads to the original, and what to do; empty if nothing does."""
    hooks = _hooks_of(copied)
    way = reach.path(copied)
    reached = list(reach.apart.values())
    kinds = dict.fromkeys(
        own_class(type(one)) for one in reached if issubclass(type(one), nn.Module)
    )
    if way is None:  # methods that hold variables are not copied with the network
        methods = (m for kind in kinds for base in kind.__mro__ for m in vars(base).values())
        held = (m for m in methods if isinstance(m, types.FunctionType) and m.__closure__)
        way = next((path for path in map(reach.path, held) if path is not None), None)
    if way is not None:
        hook = next((hooks[id(one)] for one in way[::-1] if id(one) in hooks), "")
        return f"{hook or _name_holder(way)} still leads to the original network; {_advise(hook)}"
    forwards = [inspect.getattr_static(kind, "forward") for kind in kinds]
    functions = [f for f in (*reached, *forwards) if type(f) is types.FunctionType]
    users = {function: hooks.get(id(function), "") for function in functions}  # which grow
    for function in functions:
        for name in _globals_used(function.__code__):
            value = function.__globals__.get(name)
            if type(value) is types.FunctionType and value.__globals__ is function.__globals__:
                if value not in users:
                    users[value] = users[function]
                    functions.append(value)
            elif isinstance(value, _RUNNABLE) and reach.leads(value):
                hook = users[function]
                user = f"{hook or repr(function.__qualname__)} uses the global variable {name!r}"
                return f"{user}, which stays the original's; {_advise(hook)}"
    return ""


def _advise(hook: str) -> str:
    if hook:
        return "remove that hook first, and give it to the split network"
    return "let the network's code reach the layer by self or by an argument"


def _hooks_of(model: nn.Module) -> dict[int, str]:
    """Name all hooks in a network, by the ids of what is called and of the function behind it."""
    named: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitLayer):  # which keeps those of its layer's there
            module = module.original
        for kind, hooks in vars(module).items():
            if not (kind.endswith("_hooks") and isinstance(hooks, Mapping)):
                continue
            words = kind.strip("_").removesuffix("s").replace("_", " ")
            of = f"layer {name!r}" if name else "the network"
            for hook in hooks.values():
                function = getattr(hook, "__func__", hook)
                called = getattr(function, "__qualname__", None)
                called = repr(called) if called else f"of type {type(hook).__name__}"
                named.setdefault(id(hook), f"the {words} {called} of {of}")
                named.setdefault(id(function), named[id(hook)])
    return named


def _name_holder(way: Sequence[object]) -> str:
    """The last on the way that has a name, or the kind of what holds the original."""
    for one in way[-2::-1]:
        if isinstance(one, types.FunctionType):
            return f"{one.__qualname__!r}"
        if not isinstance(one, (dict, list, tuple, types.CellType)):
            return f"an object of type {type(one).__name__}"
    return "the network"


def _globals_used(code: types.CodeType) -> Iterator[str]:
    for one in dis.get_instructions(code):
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield str(one.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals_used(constant)
