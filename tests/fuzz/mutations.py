"""Damage and lies of every kind, drawn by hypothesis."""

import copy
import json
import struct

import torch
from hypothesis import reject
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from unbraid.base.errors import RunError
from unbraid.base.files import write_tensors

DEEP = "@deep@"  # stands for a value that cannot be written otherwise
NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 1000, 2**20 - 1, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, -(2**63)),
    *(10**12, -(10**12), 10**30, 10**400, 0.5, -0.5, 1e-320, 1e30, 1e200, -1e200, 1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
TEXTS = ("", "x" * 100_000, "\ud800", "\x1b[31m", "\u202e", "../../etc/passwd", "=1+1", "1", "\0")
HOSTILE = (*NUMBERS, *TEXTS, None, True, False, [], {}, [[]], {"a": 1}, [0], [1, 2], DEEP)
DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16),
    *(torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2),
)


@st.composite
def damaged(draw, content):
    """Bytes that are cut, flipped, spliced, overwritten with telling numbers, or noise."""
    kind = draw(st.sampled_from(("flip", "cut", "drop", "repeat", "number", "noise", "empty")))
    if kind == "noise":
        return draw(st.binary(max_size=300))
    if kind == "empty" or not content:
        return b""
    out = bytearray(content)
    # Most of what matters stands at the beginning.
    near = st.integers(0, min(len(out), 200) - 1)
    places = st.one_of(near, st.integers(0, len(out) - 1))
    at = draw(places)
    n = draw(st.one_of(st.integers(1, 16), st.integers(1, len(out))))
    if kind == "flip":
        for place in draw(st.lists(places, min_size=1, max_size=8)):
            out[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "cut":
        del out[at:]
    elif kind == "drop":
        del out[at : at + n]
    elif kind == "repeat":
        out[at:at] = out[at : at + n]
    else:
        number = draw(st.sampled_from((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)))
        size = draw(st.sampled_from((2, 4, 8)))
        order = draw(st.sampled_from(("little", "big")))
        out[at : at + size] = (number % 2 ** (8 * size)).to_bytes(size, order)
    return bytes(out)


@st.composite
def edited(draw, value):
    """JSON with one to three parts replaced, dropped, repeated or put elsewhere."""
    root = {"root": copy.deepcopy(value)}
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(root))
        holder, key = draw(st.sampled_from(spots))
        kinds = ("replace", "replace", "number", "number", "drop", "repeat", "swap")
        kind = draw(st.sampled_from(kinds))
        numbers = [spot for spot in spots if type(spot[0][spot[1]]) in (int, float)]
        if kind == "number" and numbers:
            holder, key = draw(st.sampled_from(numbers))
            holder[key] = draw(st.sampled_from(NUMBERS))
        elif kind == "drop" and len(spots) > 1 and holder is not root:
            del holder[key]
        elif kind == "repeat" and isinstance(holder, list):
            holder.extend([copy.deepcopy(holder[key])] * draw(st.sampled_from((1, 3, 1000))))
        elif kind == "swap":
            other, place = draw(st.sampled_from(spots))
            holder[key] = copy.deepcopy(other[place])
        else:
            old = holder[key]
            near = [old + 1, old - 1, -old] if type(old) in (int, float) else []
            holder[key] = copy.deepcopy(draw(st.sampled_from([*HOSTILE, *near])))
    return root["root"]


def _spots(value):
    """Where a value may be put: every place in every object and list, two hundred at most."""
    level, n_spots = [value], 0
    while level and n_spots < 200:
        below = []
        for holder in level:
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            for key in list(keys)[:40]:
                n_spots += 1
                yield holder, key
                if isinstance(holder[key], (dict, list)):
                    below.append(holder[key])
        level = below


def as_json(value, depth=100_000):
    """Write JSON, nan and infinity too, and what is nested deeper than Python can write."""
    return json.dumps(value).replace(f'"{DEEP}"', "[" * depth + "]" * depth)


@st.composite
def changed(draw, tensors):
    """Tensors of which one or two have other numbers, types, shapes or names."""
    out = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(out) or ["none"]))
        tensor = out.get(name, torch.zeros(1))
        kind = draw(st.sampled_from(("number", "number", "all", "type", "shape", "name", "swap")))
        if kind in ("number", "all"):
            number = draw(st.sampled_from(NUMBERS))
            flat = tensor.flatten().clone()
            at = draw(st.integers(0, max(0, flat.numel() - 1)))
            try:
                flat[slice(None) if kind == "all" else slice(at, at + 1)] = number
            except (RuntimeError, ValueError, OverflowError, TypeError):
                continue  # no number of this type
            out[name] = flat.reshape(tensor.shape)
        elif kind == "type":
            out[name] = tensor.to(draw(st.sampled_from(DTYPES)))
        elif kind == "shape":
            out[name] = draw(_reshaped(tensor))
        elif kind == "name":
            out.pop(name, None)
            out[draw(st.sampled_from(("odd", "group", "input_map", "id_start", "weight")))] = tensor
        else:
            other = draw(st.sampled_from(sorted(out) or ["none"]))
            out[name], out[other] = out.get(other, tensor).clone(), tensor.clone()
    return out


@st.composite
def _reshaped(draw, tensor):
    kind = draw(st.sampled_from(("flat", "more", "scalar", "none", "less", "twice", "hollow")))
    if kind == "hollow":  # no number in it, and yet longer than memory
        return tensor.new_zeros(draw(st.sampled_from(((2**40, 0), (0, 2**40), (0,), (1, 0)))))
    if kind == "scalar":
        return tensor.flatten()[0].clone() if tensor.numel() else tensor.new_zeros(())
    if kind == "none":
        return tensor[:0] if tensor.dim() else tensor.reshape(1)[:0]
    if kind == "more":
        return tensor[..., None].contiguous()
    if kind == "flat" or not tensor.dim():
        return tensor.flatten()
    return tensor[:-1].clone() if kind == "less" else torch.cat([tensor, tensor])


@st.composite
def lying(draw, path):
    """A safetensors file whose header says of its tensors what is not so."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = draw(edited(json.loads(content[8 : 8 + size])))
    text = as_json(header, 1000).encode()
    told = draw(st.sampled_from((len(text), len(text), len(text), size, 2**62, 2**64 - 1, 0)))
    return struct.pack("<Q", told) + text + content[8 + size :]


@st.composite
def tampered(draw, path):
    """A safetensors file that is damaged, that lies, or with checksums that fit its lies."""
    kind = draw(st.sampled_from(("bytes", "header", "tensors", "tensors", "about", "about")))
    if kind == "bytes":
        return draw(damaged(path.read_bytes()))
    if kind == "header":
        return draw(lying(path))
    tensors = load_file(path)  # without the checks of the reader under test
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("unbraid", "{}"))
    about.pop("crc32", None)
    if kind == "tensors" or not about:
        tensors = draw(changed(tensors))
    else:
        about = draw(edited(about))
    aside = path.with_suffix(".tampered")
    if isinstance(about, dict) and DEEP not in json.dumps(about):
        try:
            write_tensors(aside, tensors, about)
        except RunError:  # more text than the format holds, which no file can have
            reject()
        return aside.read_bytes()
    return save(tensors, {"unbraid": as_json(about, 2000)})


@st.composite
def tampered_json(draw, path):
    """A JSON file that is damaged, or with other values."""
    content = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    return as_json(draw(edited(json.loads(content)))).encode("utf-8", "surrogatepass")
