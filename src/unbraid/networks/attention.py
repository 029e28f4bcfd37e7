"""The projections of nn.MultiheadAttention as layers of their own.

torch computes attention from weights and runs no module for a projection. Here each projection is a
module, and attention, where someone looks at one, runs them. N images, L and S tokens, E features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unbraid.base.errors import LayerError
from unbraid.networks.by_weight import NO_HOOKS, Hooks, has_other_hooks, hooks_of, run_unseen

OUT = "out_proj"  # which is a module of torch's
TOGETHER = "in_proj"
APART = ("q_proj", "k_proj", "v_proj")


class Projection(nn.Module):
    """Rows of an attention's own weights as a fully connected layer; it holds none itself."""

    def __init__(self, attention: nn.MultiheadAttention, part: str) -> None:  # noqa: D107
        super().__init__()
        self.of = (attention,)  # in a tuple, as it is no part of this module
        self.part = part

    @property
    def at(self) -> slice:
        """Where its rows stand among those for queries, keys and values."""
        n = self.of[0].embed_dim
        first = 0 if self.part == TOGETHER else n * APART.index(self.part)
        return slice(first, 3 * n if self.part == TOGETHER else first + n)

    @property
    def weight(self) -> Tensor:
        """The rows, (E or 3 E, inputs)."""
        attention = self.of[0]
        packed: Tensor | None = attention.in_proj_weight
        if packed is None:
            return getattr(attention, f"{self.part}_weight")  # type: ignore[no-any-return]
        return packed if self.part == TOGETHER else packed[self.at]

    @property
    def bias(self) -> Tensor | None:
        """The bias, (E or 3 E,), None if the attention has none."""
        bias: Tensor | None = self.of[0].in_proj_bias
        return None if bias is None else bias[self.at]

    @property
    def in_features(self) -> int:
        """How many features it takes."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """How many channels it has."""
        return self.weight.shape[0]

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """What it applies: for its own sake; a network's parameters are the attention's."""
        yield self.weight
        if self.bias is not None:
            yield self.bias

    def forward(self, input: Tensor) -> Tensor:
        """Project (N, L, inputs) to (N, L, E or 3 E)."""
        return F.linear(input, self.weight, self.bias)

    def put(self, rows: Tensor, bias: Tensor) -> None:
        """Write other rows and biases into new weights of the attention."""
        attention = self.of[0]
        packed = attention.in_proj_weight is not None
        name = "in_proj_weight" if packed else f"{self.part}_weight"
        for own, at, values in (
            (name, self.at if packed else slice(None), rows),
            ("in_proj_bias", self.at, bias),
        ):
            before = getattr(attention, own)
            if before is not None:
                after = before.detach().clone()
                after[at] = values.to(after)
                setattr(attention, own, nn.Parameter(after, before.requires_grad))


_known: WeakValueDictionary[tuple[int, str], Projection] = WeakValueDictionary()


def opens(module: nn.Module) -> bool:
    """Whether a module is attention whose projections can be looked at: it runs torch's code."""
    return (
        isinstance(module, nn.MultiheadAttention)
        and type(module).forward is nn.MultiheadAttention.forward
        and not {"forward", "closed"} & vars(module).keys()
    )


def projections(attention: nn.MultiheadAttention) -> dict[str, Projection]:
    """All projections by name, each the same module as long as someone holds it.

    `in_proj` runs where query, key and value are one; else the other three do.
    """
    packed = attention.in_proj_weight is not None
    own = {}
    for part in (TOGETHER, *APART) if packed else APART:
        key = id(attention), part  # which stays this attention's as long as the projection lives
        own[part] = _known.get(key) or _known.setdefault(key, Projection(attention, part))
    return own


def with_projections(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """A network's modules with their names, as `named_modules`, and its attentions' projections."""
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        yield name, module
        if opens(module):
            assert isinstance(module, nn.MultiheadAttention)
            for part, projection in projections(module).items():
                yield f"{name}.{part}" if name else part, projection


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Let attentions run their projections as modules wherever one of these has a hook.

    Meanwhile the projections are parts of the attentions, so that torch's fused transformer sees
    the hooks and leaves the layer to its own code. Hooks that an `out_proj` had before stay silent,
    as torch does not run it.
    """
    with ExitStack() as stack:
        for module in [module for module in model.modules() if opens(module)]:
            assert isinstance(module, nn.MultiheadAttention)
            parts = projections(module)
            earlier = hooks_of(module.out_proj)
            vars(module)["forward"] = partial(_attend_if_watched, module, earlier)
            module._modules.update(parts)
            stack.callback(_close, module, parts)
        for encoder in [m for m in model.modules() if encodes(m) and ASIDE not in vars(m)]:
            vars(encoder)[ASIDE] = True
            stack.callback(vars(encoder).pop, ASIDE, None)
        for encoder in [m for m in model.modules() if isinstance(m, nn.TransformerEncoder)]:
            # Only someone who looks at a projection puts hooks on it.
            seen = [
                (p, NO_HOOKS if isinstance(p, Projection) else hooks_of(p))
                for p in encoder.modules()
            ]
            if computes_as(encoder, nn.TransformerEncoder):
                vars(encoder)["forward"] = partial(_encode_if_watched, encoder, seen)
                stack.callback(vars(encoder).pop, "forward", None)
            elif type(encoder).forward is not nn.TransformerEncoder.forward:
                for layer in getattr(encoder, "layers", ()):
                    if "forward" not in vars(layer):
                        vars(layer)["forward"] = partial(_run_if_whole, layer, seen)
                        stack.callback(vars(layer).pop, "forward", None)
        yield


ASIDE = "gradients_aside"  # of an encoder in a network that is opened: as torch has it without


def encodes(module: nn.Module) -> bool:
    """Whether a module is torch's encoder, or stands in its place."""
    return isinstance(module, nn.TransformerEncoder) or hasattr(type(module), ASIDE)


def computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of a kind of torch's, or of a class made of it that computes the same."""
    own = type(module).forward is kind.forward and "forward" not in vars(module)
    return isinstance(module, kind) and own


def _encode_if_watched(
    encoder: Any,
    parts: Sequence[tuple[nn.Module, Hooks]],
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Any:
    given = (src, mask, src_key_padding_mask, is_causal)
    apart = left_out(encoder, True, *given)
    watched = any(has_other_hooks(part, hooks) for part, hooks in parts)
    if watched or (apart is not None and not leaves_out_now(encoder, *given)):
        return encode_whole(encoder, apart, *given)
    return nn.TransformerEncoder.forward(encoder, *given)


def _run_if_whole(
    layer: nn.Module,
    parts: Sequence[tuple[nn.Module, Hooks]],
    src: Tensor,
    *args: Any,
    **named: Any,
) -> Any:
    if any(has_other_hooks(part, hooks) for part, hooks in parts):
        refuse_apart(layer, (src,))
    return type(layer).forward(layer, src, *args, **named)


def refuse_apart(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Raise LayerError where padding was left out; as a hook, keep torch from its fused step."""
    if args and args[0].is_nested:
        raise LayerError(
            "An nn.TransformerEncoder with a forward of its own leaves padding out, where no layer "
            "inside can be looked at or split; set its use_nested_tensor to False."
        )


class _Observer(nn.Module):
    """Stands for an encoder's layers, to see whether torch leaves padding out before them."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.training = layer.training
        weight: Any = max(layer.parameters(), key=lambda weight: weight.requires_grad)
        part = SimpleNamespace(weight=weight, bias=weight)
        self.norm1 = self.norm2 = self.linear1 = self.linear2 = part
        own = {"in_proj_weight": weight, "in_proj_bias": weight, "out_proj": part}
        self.self_attn = SimpleNamespace(batch_first=layer.self_attn.batch_first, **own)
        self.left_out = False

    def forward(self, src: Tensor, **_: Any) -> Tensor:
        self.left_out = src.is_nested
        return src


def leaves_out_now(
    encoder: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool | None,
) -> bool:
    """Whether torch leaves padding out, by its own code, with gradients on or off as they are."""
    compiled = torch.compiler.is_compiling() and getattr(encoder, "mask_check", True)
    if padding is None or compiled or not getattr(encoder, "use_nested_tensor", False):
        return False
    observer = _Observer(encoder.layers[0])
    asked = twin(encoder, layers=[observer], norm=None)
    nn.TransformerEncoder.forward(asked, src, mask, padding, is_causal)
    return observer.left_out


def left_out(
    encoder: nn.TransformerEncoder,
    aside: bool,
    src: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool | None,
) -> Tensor | None:
    """The positions, (N, S), that an encoder leaves out as padding; None if it takes them all.

    With gradients put aside, those that it leaves out where nobody asks for any.
    """
    with torch.no_grad() if aside else nullcontext():
        apart = leaves_out_now(encoder, src, mask, padding, is_causal)
    return padding.bool() if apart and padding is not None else None


def encode_whole(
    encoder: nn.TransformerEncoder,
    apart: Tensor | None,
    src: Tensor,
    mask: Tensor | None = None,
    padding: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """Encode up to rounding what torch does, but with every token; its zeros stand at those apart.

    Layers that are looked at or split cannot leave padding out, as torch's fused ones do.
    """
    if apart is None:
        whole = twin(encoder, use_nested_tensor=False)
        return nn.TransformerEncoder.forward(whole, src, mask, padding, is_causal)
    hidden = apart & ~apart.all(1, keepdim=True)  # where all is padding none could be looked at
    whole = twin(encoder, use_nested_tensor=False, norm=None)
    output = nn.TransformerEncoder.forward(whole, src, mask, hidden, is_causal)
    output = output.masked_fill(apart[..., None], 0)
    return output if encoder.norm is None else encoder.norm(output)


def twin(module: Any, **other: Any) -> Any:
    """The same module with other attributes, as others may be using it meanwhile."""
    new = object.__new__(type(module))
    own = {**vars(module), **other}
    own["_modules"] = {name: m for name, m in module._modules.items() if name not in other}
    object.__setattr__(new, "__dict__", own)
    return new


def _close(attention: nn.MultiheadAttention, parts: Mapping[str, Projection]) -> None:
    vars(attention).pop("forward", None)
    for part in parts:
        attention._modules.pop(part, None)


def _attend_if_watched(
    attention: nn.MultiheadAttention, earlier: Hooks, *args: Any, **named: Any
) -> Any:
    parts, out = projections(attention), attention.out_proj
    watched = any(part._forward_hooks or part._forward_pre_hooks for part in parts.values())
    if watched or has_other_hooks(out, earlier):
        own: dict[str, Any] = {**parts, OUT: partial(run_unseen, out, earlier)}
        return attend(attention, own, *args, **named)
    return nn.MultiheadAttention.forward(attention, *args, **named)


def attend(
    attention: nn.MultiheadAttention,
    parts: Mapping[str, Callable[[Tensor], Tensor]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute what nn.MultiheadAttention does, up to rounding, by projections that are given.

    They meet tokens as (N, L, features), however the attention's own are laid out.

    Source:
        Vaswani et al. 2017, arXiv:1706.03762; masks and options as torch documents them.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is missing")
    batched, n_heads = query.dim() == 3, attention.num_heads

    def lay(x: Tensor) -> Tensor:
        return (x if attention.batch_first else x.transpose(0, 1)) if batched else x[None]

    if query is key and key is value and TOGETHER in parts:
        q, k, v = parts[TOGETHER](lay(query)).chunk(3, -1)
    else:
        q, k, v = (parts[p](lay(x)) for p, x in zip(APART, (query, key, value), strict=True))
    if attention.bias_k is not None and attention.bias_v is not None:
        k, v = (
            torch.cat([x, more.expand(len(x), 1, -1)], 1)
            for x, more in ((k, attention.bias_k), (v, attention.bias_v))
        )
    if attention.add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask = _mask(q, k, n_heads, attn_mask, key_padding_mask)
    q, k, v = (x.unflatten(-1, (n_heads, -1)).transpose(1, 2) for x in (q, k, v))
    dropout = attention.dropout if attention.training else 0.0
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
        met = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
        weights = weights if batched else weights[0]
    else:
        met = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = parts[OUT](met.transpose(1, 2).flatten(2))
    if batched:
        return (out if attention.batch_first else out.transpose(0, 1)), weights
    return out[0], weights


def _mask(
    q: Tensor, k: Tensor, n_heads: int, attn_mask: Tensor | None, padding: Tensor | None
) -> Tensor | None:
    """What is added to scores, (N or 1, heads or 1, L or 1, S); None for nothing."""
    masks = []
    if attn_mask is not None:  # (L, S) or (N * heads, L, S)
        by_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (-1, n_heads)) if by_head else attn_mask[None, None])
    if padding is not None:  # (N, S), or (S,) of a single image
        masks.append(padding.reshape(-1, 1, 1, padding.shape[-1]))
    whole = None
    for mask in masks:
        if mask.dtype == torch.bool:  # True is not to be seen
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        mask = F.pad(mask.to(q.dtype), (0, k.shape[1] - mask.shape[-1]))  # what was put behind
        whole = mask if whole is None else whole + mask
    return whole
