"""What tensors from disk must be like before anything is computed of them.

Shapes: N images, C_out and C_in channels, G groups, J taps. Each function says what is wrong, in
words that follow the file's name, or None if nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unbraid.layers import LayerSpec
from unbraid.manifest import MAX_CLASSES, Manifest

_LARGEST = torch.finfo(torch.float32).max  # of a sound number; squares of it still fit into float64
_MOST_SHARE = 1.001  # rounding may put the only share a little above one
_PLACES = 2**62  # more images than any data set has
_POSITIONS = 2**53  # the last whole number of which float64 knows both neighbours
# Padding may make an input map so many times larger, or as many numbers larger in any case.
_PADDED_TIMES, _PADDED_FREE = 16, 2**26


def layer_fault(manifest: Manifest, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge layer.safetensors: weight (C_out, J) and bias (C_out,)."""
    spec = manifest.layer
    shapes = {"weight": (spec.n_out, spec.n_taps), "bias": (spec.n_out,)}
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            return f"holds no {name!r} of the layer's shape"
        if not sound_figures(tensors[name]):
            return f"holds a {name!r} that is not of finite numbers"
    if tensors["weight"].dtype != tensors["bias"].dtype:
        return "holds weights and biases of different types"
    same = _widened(tensors["weight"]) == _wide(manifest.dtype)
    return None if same else "holds weights of another type than the network's"


def column_fault(manifest: Manifest, shard: int, name: str, column: Tensor) -> str | None:
    """Judge one tensor of a shard by itself."""
    spec, n_images = manifest.layer, manifest.images_in(shard)
    if name in ("pooled", "share_value", "input_map"):
        if not sound_figures(column):
            return f"holds a {name!r} that is not of finite numbers"
        # A shard of broken images alone says nothing of types.
        kind = column.dtype if name == "pooled" else _widened(column)
        if name != "share_value" and column.numel() and kind != _wide(manifest.dtype):
            return f"holds a {name!r} of another type than the network's"
        least, most = (0.0, _MOST_SHARE) if name == "share_value" else (-_LARGEST, _LARGEST)
    else:
        whole = torch.int32 if name == "share_channel" else torch.int64
        if column.dtype != whole or column.dim() != 1:
            return f"holds a {name!r} that is no list of whole numbers"
        n_shares = n_images * spec.n_out
        most_of: dict[str, int] = {
            "label": manifest.most_classes - 1,
            "prediction": MAX_CLASSES - 1,
            "n_positions": _POSITIONS,
            "share_start": n_shares,
            "share_channel": spec.n_out - 1,
        }
        if len(column) > {"share_start": n_images + 1, "share_channel": n_shares}.get(
            name, n_images
        ):
            return f"holds a {name!r} of a wrong shape"
        least, most = int(name == "n_positions"), most_of.get(name, _PLACES)
    if column.numel() and not (least <= column.min() and column.max() <= most):
        return f"holds a {name!r} with numbers that cannot be"
    if name == "share_start" and (not len(column) or column[0] or (column.diff() < 0).any()):
        return "holds shares of no image"
    return None


def records_fault(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
    """Judge all tensors of a shard, each by itself and one beside the other.

    What is not there is not judged.
    """
    faults = (column_fault(manifest, shard, name, t) for name, t in tensors.items())
    fault = next(filter(None, faults), None)
    return fault or _misfit(manifest, shard, tensors)


def _misfit(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
    spec = manifest.layer
    per_image = ("index", "label", "prediction", "n_positions", "group")
    there = [len(tensors[name]) for name in per_image if name in tensors]
    n = there[0] if there else len(tensors.get("share_start", [0])) - 1
    if len(set(there)) > 1:
        return "holds tensors of different numbers of images"
    if "broken" in tensors and there:
        n_images = n + len(tensors["broken"])
        if n_images != manifest.images_in(shard):
            return f"holds {n_images} images of {manifest.images_in(shard)}"
        if any(
            (tensors[name].diff() <= 0).any() for name in ("index", "broken") if name in tensors
        ):
            return "holds images out of order"
        if _elsewhere(manifest, shard, tensors):
            return "holds images of another shard"
    start = tensors.get("share_start")
    if start is not None:
        ends = (int(start[-1]),)
        if len(start) != n + 1 or any(
            tensors[name].shape != ends
            for name in ("share_channel", "share_value")
            if name in tensors
        ):
            return "holds shares of no image"
    pooled, input_map = tensors.get("pooled"), tensors.get("input_map")
    if pooled is not None and there and pooled.shape != (n, spec.groups, spec.n_taps):
        return "holds a 'pooled' of a wrong shape"
    return None if input_map is None else _map_fault(spec, n, input_map)


def _elsewhere(manifest: Manifest, shard: int, tensors: Mapping[str, Tensor]) -> bool:
    """Whether images lie elsewhere in the data set than this shard's, where all were scanned."""
    if manifest.classes is not None or manifest.indices:
        return False
    first = shard * manifest.shard_size
    last = first + manifest.images_in(shard)
    columns = (tensors[name] for name in ("index", "broken") if name in tensors)
    return any(bool(((c < first) | (c >= last)).any()) for c in columns)


def _map_fault(spec: LayerSpec, n: int, input_map: Tensor) -> str | None:
    sizes = input_map.shape[2:]
    if input_map.shape[:2] != (n, spec.n_in) or len(sizes) != len(spec.kernel):
        return "holds an 'input_map' of a wrong shape"
    if n == 0:
        return None
    padded = n * spec.n_in
    for dim, size in enumerate(sizes):
        pads = spec.pads(dim, size)
        reach = spec.dilation[dim] * (spec.kernel[dim] - 1) + 1
        # The modes that repeat the input cannot go beyond it.
        most = {"reflect": size - 1, "circular": size}.get(spec.pad_mode, max(pads))
        if size + sum(pads) < reach or size < 1 or max(pads) > most:
            return "holds an 'input_map' that is too small for the layer"
        padded *= size + sum(pads)
    if padded > _PADDED_TIMES * input_map.numel() + _PADDED_FREE:
        return "holds an 'input_map' that the layer's padding makes too large"
    return None


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
