"""The record of an image: its fields, in one table, and what is wrong with damaged ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Literal, get_type_hints

import torch
from torch import Tensor

from unbraid.base.errors import SizesDiffer
from unbraid.images.identity import unpack_ids
from unbraid.networks.spec import LayerSpec
from unbraid.scanning.manifest import MAX_CLASSES, Manifest

_LARGEST = torch.finfo(torch.float32).max  # of a sound number; squares of it still fit into float64
_MOST_SHARE = 1.001  # rounding may put the only share a little above one
_LAST_INDEX = 2**62  # more images than any data set has
_POSITIONS = 2**53  # the last whole number of which float64 knows both neighbours
# Padding may make an input map so many times larger, or as many numbers larger in any case.
_PADDED_TIMES, _PADDED_FREE = 16, 2**26
_APART = 32  # how far a transposed convolution may set inputs apart without a look at their number


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one tensor of the records is like."""

    per: str = "image"  # what its first dimension counts: image, share, broken or id's byte
    starts: str = ""  # what begins there for each image, so that there is one number more: the end
    dtype: torch.dtype | Literal["wide", "network's", "fraction"] = torch.int64
    inner: Callable[[LayerSpec], tuple[int | None, ...]] = lambda _: ()  # its other dimensions
    least: float = 0
    most: Callable[[Manifest], float] = lambda _: _LAST_INDEX
    is_index: bool = False  # of images, in order


@dataclass
class Records:
    """The records of some images: N images, S shares kept, B broken images, L bytes of ids.

    All that is made of records or asked of them follows from this table of fields. What may be None
    is there if the scan keeps positions, or if it does not (M positions of its sampled images), or
    if the data set has groups or ids, or if it is a scan of places.
    """

    # (N,): index in the data set, class, the network's top class, positions that sums run over
    index: Annotated[Tensor, Column(is_index=True)]
    label: Annotated[Tensor, Column(most=lambda m: m.most_classes - 1)]
    prediction: Annotated[Tensor, Column(most=lambda _: MAX_CLASSES - 1)]
    n_positions: Annotated[Tensor, Column(least=1, most=lambda _: _POSITIONS)]
    # (N, G, J)
    pooled: Annotated[Tensor, Column(dtype="wide", inner=lambda s: (s.groups, s.n_taps))]
    # (N + 1,): image n has the shares share_start[n]:share_start[n + 1]; then (S,) and (S,)
    share_start: Annotated[Tensor, Column(starts="share")]
    share_channel: Annotated[
        Tensor, Column(per="share", dtype=torch.int32, most=lambda m: m.layer.n_out - 1)
    ]
    share_value: Annotated[
        Tensor, Column(per="share", dtype="fraction", most=lambda _: _MOST_SHARE)
    ]
    # (B,): index of images that could not be read
    broken: Annotated[Tensor, Column(per="broken", is_index=True)]
    # (N, C_in, positions ...)
    input_map: Annotated[
        Tensor | None, Column(dtype="network's", inner=lambda s: (s.n_in, *[None] * len(s.kernel)))
    ] = None
    # (N + 1,): image n has the positions spread_start[n]:spread_start[n + 1]; then (M, G, J), what
    # taps meet there less the image's mean
    spread_start: Annotated[Tensor | None, Column(starts="position")] = None
    spread: Annotated[
        Tensor | None, Column(per="position", dtype="wide", inner=lambda s: (s.groups, s.n_taps))
    ] = None
    # (N,): which images belong together
    group: Annotated[Tensor | None, Column()] = None
    # (N + 1,): image n has the id id_bytes[id_start[n]:id_start[n + 1]]; then (L,)
    id_start: Annotated[Tensor | None, Column(starts="id")] = None
    id_bytes: Annotated[Tensor | None, Column(per="id", dtype=torch.uint8)] = None
    # Of a scan of places, (N,) each: the image that it lies in, its position there, of how many
    # rows and columns, and whether it was drawn evenly from all places
    image: Annotated[Tensor | None, Column()] = None
    position: Annotated[Tensor | None, Column()] = None
    rows: Annotated[Tensor | None, Column(least=1)] = None
    columns: Annotated[Tensor | None, Column(least=1)] = None
    drawn: Annotated[Tensor | None, Column(dtype=torch.uint8, most=lambda _: 1)] = None
    # (N + 1,): place n is among those that excite the channels kept_channel[kept_start[n] :
    # kept_start[n + 1]] most; then (M,)
    kept_start: Annotated[Tensor | None, Column(starts="entry")] = None
    kept_channel: Annotated[
        Tensor | None,
        Column(per="entry", dtype=torch.int32, most=lambda m: m.layer.n_out - 1),
    ] = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.index)

    @property
    def ids(self) -> list[str] | None:
        """What names each image for good, whatever its index; None if the data set has no ids."""
        if self.id_start is None or self.id_bytes is None:
            return None
        return unpack_ids(self.id_start, self.id_bytes)

    @property
    def share_image(self) -> Tensor:
        """(S,), which of the N images each share belongs to."""
        return torch.repeat_interleave(
            torch.arange(len(self), dtype=torch.int64), self.share_start.diff()
        )

    def kept_of(self, channel: int) -> Tensor:
        """(N,), which are among the places that excite a channel most, of a scan of places."""
        assert self.kept_start is not None
        kept = torch.zeros(len(self), dtype=torch.bool)
        places = torch.arange(len(self), dtype=torch.int64)
        own = torch.repeat_interleave(places, self.kept_start.diff())
        kept[own[self.kept_channel == channel]] = True
        return kept

    def share_of(self, channel: int) -> Tensor:
        """(N,), the share of one channel in every image, zero where it was too small to keep."""
        share = self.share_value.new_zeros(len(self))
        found = self.share_channel == channel
        share[self.share_image[found]] = self.share_value[found]
        return share


COLUMNS: dict[str, Column] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(Records, globals(), include_extras=True).items()
}
OF_PLACES = ("image", "position", "rows", "columns", "drawn", "kept_start", "kept_channel")
NEEDED = {own.name for own in fields(Records) if own.default is MISSING}


def no_records(spec: LayerSpec, positions: bool) -> Records:
    """Records of no image: what remains of a batch in which every image was broken."""
    tensors = {}
    for name in NEEDED | ({"input_map"} if positions else {"spread_start", "spread"}):
        column = COLUMNS[name]
        shape = (int(bool(column.starts)), *(size or 0 for size in column.inner(spec)))
        dtype = torch.float32 if isinstance(column.dtype, str) else column.dtype
        tensors[name] = torch.zeros(shape, dtype=dtype)
    return Records(**tensors)


def join_records(parts: Sequence[Records]) -> Records:
    """Put records into one, with what all parts have; DataError if input maps differ in size."""
    some = [part for part in parts if len(part)] or list(parts[:1])
    joined = {}
    for name, column in COLUMNS.items():
        own = [getattr(part, name) for part in (parts if column.per == "broken" else some)]
        if any(tensor is None for tensor in own):
            continue
        try:
            if column.starts:
                sizes = torch.cat([tensor.diff() for tensor in own])
                joined[name] = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
            else:
                joined[name] = torch.cat(own)
        except RuntimeError:
            if name != "input_map":
                raise
            raise SizesDiffer(
                "Images of different sizes give input maps of different sizes, which "
                "positions=True cannot keep; bring all to one size in the data set's transform."
            ) from None
    return Records(**joined)


def choose_records(records: Records, chosen: Tensor) -> Records:
    """Take some images' records, those where `chosen` (N,) is true, and no broken ones."""
    taken: dict[str, Tensor | None] = {}
    within = {"image": chosen, "broken": torch.zeros(len(records.broken), dtype=torch.bool)}
    for name, column in COLUMNS.items():
        tensor = getattr(records, name)
        if tensor is not None and column.starts:
            within[column.starts] = torch.repeat_interleave(chosen, tensor.diff())
    for name, column in COLUMNS.items():
        tensor = getattr(records, name)
        if tensor is not None and column.starts:
            taken[name] = torch.cat([tensor.new_zeros(1), tensor.diff()[chosen].cumsum(0)])
        else:
            taken[name] = None if tensor is None else tensor[within[column.per]]
    return Records(**taken)  # type: ignore[arg-type]


def records_fault(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge those tensors of a shard that are there, each by itself and beside the others."""
    for name, tensor in tensors.items():
        fault = _column_fault(manifest, shard, name, tensor)
        if fault:
            return fault
    counted: dict[str, set[int]] = defaultdict(set)
    for name, tensor in tensors.items():
        column = COLUMNS[name]
        counted[column.per].add(len(tensor) - bool(column.starts))
        if column.starts:
            counted[column.starts].add(int(tensor[-1]))
    if len(counted["image"]) > 1:
        return "holds tensors of different numbers of images"
    for kind in ("share", "id", "position", "entry"):
        if len(counted[kind]) > 1:
            return f"holds {kind}s of no image"
    of_kind = {"id": "id_bytes", "position": "spread", "entry": "kept_channel"}
    for kind, own in of_kind.items():
        if (own in tensors) != any(COLUMNS[name].starts == kind for name in tensors):
            return f"holds {kind}s of no image"
    if counted["image"] and counted["broken"]:
        n_images = sum((*counted["image"], *counted["broken"]))
        if n_images != manifest.images_in(shard):
            return f"holds {n_images} images of {manifest.images_in(shard)}"
    input_map = tensors.get("input_map")
    return None if input_map is None else _map_fault(manifest.layer, input_map)


def _column_fault(manifest: Manifest, shard: int, name: str, tensor: Tensor) -> str | None:
    """Judge one tensor of a shard by itself."""
    column, spec, n_images = COLUMNS[name], manifest.layer, manifest.images_in(shard)
    if isinstance(column.dtype, str):
        if not sound_figures(tensor):
            return f"holds a {name!r} that is not of finite numbers"
        kind = tensor.dtype if column.dtype == "wide" else _widened(tensor)
        # A shard of broken images alone says nothing of types.
        if column.dtype != "fraction" and tensor.numel() and kind != _wide(manifest.dtype):
            return f"holds a {name!r} of another type than the network's"
    elif tensor.dtype != column.dtype or tensor.dim() != 1:
        return f"holds a {name!r} that is no list of whole numbers"
    inner = column.inner(spec)
    longest = {"image": n_images, "broken": n_images, "share": n_images * spec.n_out}
    if (
        tensor.dim() != 1 + len(inner)
        or len(tensor) - bool(column.starts) > longest.get(column.per, _LAST_INDEX)
        or any(size not in (None, own) for size, own in zip(inner, tensor.shape[1:], strict=True))
    ):
        return f"holds a {name!r} of a wrong shape"
    if column.starts and (not len(tensor) or tensor[0] or (tensor.diff() < 0).any()):
        return f"holds {column.starts}s of no image"
    if column.dtype not in ("wide", "network's") and len(tensor):  # these are, by being sound
        least, most = tensor.min().item(), tensor.max().item()
        if least < column.least or most > column.most(manifest):
            return f"holds a {name!r} with numbers that cannot be"
    if column.is_index:
        if (tensor.diff() <= 0).any():
            return "holds images out of order"
        first = shard * manifest.shard_size
        elsewhere = (tensor < first) | (tensor >= first + n_images)
        in_order = manifest.classes is None and not manifest.indices and not manifest.n_first
        if in_order and elsewhere.any():
            return "holds images of another shard"
    return None


def _map_fault(spec: LayerSpec, input_map: Tensor) -> str | None:
    if not len(input_map):
        return None
    padded = len(input_map) * spec.n_in
    times = _PADDED_TIMES
    for dim, size in enumerate(input_map.shape[2:]):
        pads = spec.pads(dim, size)
        reach = spec.reaches[dim] + 1
        if spec.transposed:  # whose inputs lie apart
            times *= min(spec.stride[dim], _APART)
            size = (size - 1) * spec.stride[dim] + 1
        # The modes that repeat the input cannot go beyond it.
        most = {"reflect": size - 1, "circular": size}.get(spec.pad_mode, max(pads))
        if size + sum(pads) < reach or size < 1 or max(pads) > most:
            return "holds an 'input_map' that is too small for the layer"
        padded *= size + sum(pads)
    if padded > times * input_map.numel() + _PADDED_FREE:
        return "holds an 'input_map' that the layer's padding makes too large"
    return None


def layer_fault(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge layer.safetensors: weight (C_out, J) and bias (C_out,)."""
    spec = manifest.layer
    for name, shape in {"weight": (spec.n_out, spec.n_taps), "bias": (spec.n_out,)}.items():
        if name not in tensors or tensors[name].shape != shape:
            return f"holds no {name!r} of the layer's shape"
        if not sound_figures(tensors[name]):
            return f"holds a {name!r} that is not of finite numbers"
    if tensors["weight"].dtype != tensors["bias"].dtype:
        return "holds weights and biases of different types"
    same = _widened(tensors["weight"]) == _wide(manifest.dtype)
    return None if same else "holds weights of another type than the network's"


def _wide(dtype: str) -> torch.dtype:
    """What pooled inputs of a network of a type are kept in."""
    return torch.float64 if dtype == "float64" else torch.float32


def _widened(tensor: Tensor) -> torch.dtype:
    """What numbers of a tensor are computed with."""
    return torch.promote_types(tensor.dtype, torch.float32)


def sound_figures(tensor: Tensor) -> bool:
    """Whether a tensor holds fractions, all of them finite and none beyond float32."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return False
    if tensor.numel() == 0:
        return True
    least, most = tensor.aminmax()  # NaN if any is
    return bool(least >= -_LARGEST) and bool(most <= _LARGEST)
