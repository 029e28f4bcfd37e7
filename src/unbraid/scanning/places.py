"""Places: where in its images a channel responds most, and some places drawn evenly from all.

Of one image a channel keeps one place, its strongest (of equal ones the first): neighbours show the
same thing, and would pass for many that agree. Of an image that is several items, one for each of
its labels, the first counts. Tokens that are no part of the image, such as CLS
and registers, are no places; how often they respond most is counted. Shapes: N images, P positions,
G groups, J taps, U places, M entries of lists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from unbraid.networks.spec import LayerSpec, channels_first, inputs_at, widen

N_DRAWN = 1000  # places of a layer that are drawn evenly from all of all images
_DRAWN_NUMBERS = 2**24  # of inputs at these, at most
_AT_ONCE = 2**24  # responses looked at for their strongest position
_NOT_DRAWN = torch.iinfo(torch.int64).max
# Where a network says nothing: tokens before those of a square of at least so many a side, and
# before those of a grid that is known.
_USUAL_PREFIX, _LEAST_SIDE, _MOST_PREFIX = (1, 2, 5), 7, 16
# Parameters of networks that are tokens before those of the image.
_PREFIX_NAMES = (
    *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token"),
    *("reg_token", "register_tokens"),
)


@dataclass(frozen=True)
class Tokens:
    """What a network says of its tokens."""

    n_prefix: int | None  # how many come before those of the image; None: nothing
    grid: tuple[int, int] | None  # rows and columns of those of the image
    asked: bool = False  # whether the user said how many come before, so that it is so everywhere


def tokens_of(model: nn.Module, n_prefix: int | None) -> Tokens:
    """Find how many tokens lie before those of the image, unless told, and how these lie.

    timm's networks say both; others have CLS and registers among their parameters.
    """
    asked = n_prefix is not None
    for module in model.modules():
        told = getattr(module, "num_prefix_tokens", None)
        if n_prefix is None and type(told) is int:
            n_prefix = told
    if n_prefix is None:
        known = [
            weight.shape[-2] if weight.dim() > 1 else 1
            for name, weight in model.named_parameters()
            if name.rpartition(".")[2] in _PREFIX_NAMES
        ]
        n_prefix = sum(known) or None
    sizes = (getattr(module, "grid_size", None) for module in model.modules())
    grids = [size for size in sizes if isinstance(size, (tuple, list)) and len(size) == 2]
    grid = (int(grids[0][0]), int(grids[0][1])) if grids else None
    return Tokens(n_prefix, grid, asked)


def lay_out(n_tokens: int, tokens: Tokens) -> tuple[int, int, int]:
    """How many of a row of tokens lie before those of the image; rows and columns of these.

    >>> lay_out(201, Tokens(None, None)), lay_out(8, Tokens(2, (2, 3))), lay_out(1, Tokens(5, None))
    ((5, 14, 14), (2, 2, 3), (0, 1, 1))
    """
    n_prefix = _n_prefix(n_tokens, tokens)
    n_own = n_tokens - n_prefix
    if tokens.grid and math.prod(tokens.grid) == n_own:
        return n_prefix, *tokens.grid
    side = math.isqrt(n_own)
    return (n_prefix, side, side) if side**2 == n_own else (n_prefix, 1, n_own)


def _n_prefix(n_tokens: int, tokens: Tokens) -> int:
    """How many of a layer's tokens lie before those of the image.

    Networks may add them behind some layers, or keep other grids in later stages.
    """
    told, of_grid = tokens.n_prefix, math.prod(tokens.grid) if tokens.grid else 0
    if told is not None and told >= n_tokens:  # a layer behind the choice of a token
        return 0
    if told is not None and (tokens.asked or n_tokens - told == of_grid):
        return told
    if n_tokens == of_grid:
        return 0
    if told is not None:
        return 0 if _is_square(n_tokens) and not _is_square(n_tokens - told) else told
    if of_grid and 0 < n_tokens - of_grid <= _MOST_PREFIX:
        return n_tokens - of_grid
    side = math.isqrt(n_tokens)
    rest = n_tokens - side**2
    return rest if rest in _USUAL_PREFIX and side >= _LEAST_SIDE else 0


def _is_square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


@dataclass
class Places:
    """Places, by image and position in order, and the lists that they stand in."""

    order: Tensor  # (U,), number of the image among those concerned
    image: Tensor  # (U,), its index in the data set
    label: Tensor  # (U,)
    prediction: Tensor  # (U,)
    position: Tensor  # (U,), without tokens that are no part of the image
    rows: Tensor  # (U,), of positions in the image
    columns: Tensor  # (U,)
    key: Tensor  # (U,), by which it was drawn, or the largest number
    inputs: Tensor  # (U, G, J), what the taps meet there
    # (M,): the lists of channels, each with its strongest place first
    channel: Tensor
    at: Tensor  # which place
    response: Tensor
    peaks: Tensor  # (C_out, prefix), images in which a token before the image's responds most


_OF_LISTS = ("channel", "at", "response", "peaks")
_OF_PLACES = [own.name for own in fields(Places) if own.name not in _OF_LISTS]


def join_places(parts: Sequence[Places]) -> Places:
    """Put places of different images together, in the order of images."""
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in (*_OF_PLACES, "channel", "response")
    }
    starts = np.cumsum([0, *(len(part.order) for part in parts)]).tolist()
    at = torch.cat([part.at + start for part, start in zip(parts, starts, strict=False)])
    return Places(**joined, at=at, peaks=add_peaks([part.peaks for part in parts]))


def add_peaks(parts: Sequence[Tensor]) -> Tensor:
    """Add counts (C_out, prefix) of images with so many tokens before their own, or fewer."""
    most = max(part.shape[1] for part in parts)
    return torch.stack([F.pad(part, (0, most - part.shape[1])) for part in parts]).sum(0)


def strongest(channel: Tensor, response: Tensor, k: int) -> Tensor:
    """Which entries (M,) are among the k strongest of their channel, channel by channel.

    Of equal ones that come first as they stand.
    """
    order = response.argsort(descending=True, stable=True)
    order = order[channel[order].argsort(stable=True)]
    channel = channel[order]
    n_each = channel.bincount()
    rank = torch.arange(len(order), dtype=torch.int64) - (n_each.cumsum(0) - n_each)[channel]
    return order[rank < k]


def drawn(key: Tensor, n: int) -> Tensor:
    """Which places (U,) are among the n with the lowest keys."""
    chosen = key < _NOT_DRAWN
    if int(chosen.sum()) > n:
        chosen &= key <= key.kthvalue(n).values
    return chosen


def n_drawn(spec: LayerSpec) -> int:
    """How many places of a layer are drawn: fewer of a layer of very many taps."""
    return max(1, min(N_DRAWN, _DRAWN_NUMBERS // (spec.groups * spec.n_taps)))


def sift(places: Places, k: int, n: int) -> Places:
    """Keep the k strongest places of each channel, and the n with the lowest keys."""
    entries = strongest(places.channel, places.response, k)
    chosen = drawn(places.key, n)
    used = chosen.clone()
    used[places.at[entries]] = True
    new = used.cumsum(0) - 1
    kept = {name: getattr(places, name)[used] for name in _OF_PLACES}
    kept["key"] = torch.where(chosen, places.key, _NOT_DRAWN)[used]
    return Places(
        **kept,
        channel=places.channel[entries],
        at=new[places.at[entries]],
        response=places.response[entries],
        peaks=places.peaks,
    )


class PlaceKeeper:
    """The places of one layer that a process has seen, of the shard at hand.

    Of shards that are closed only the figures remain that tell what no later place can beat.
    """

    def __init__(self, spec: LayerSpec, k: int, tokens: Tokens) -> None:
        """Have seen none; k is how many places a channel keeps."""
        self.spec, self.k, self.n_drawn, self.tokens = spec, k, n_drawn(spec), tokens
        self._parts: list[Places] = []
        self._best = torch.full((spec.n_out, k), -torch.inf, dtype=torch.float64)
        self._keys = torch.zeros(0, dtype=torch.int64)
        self._least = self._best[:, -1]  # what a place of each channel must reach
        self._most = _NOT_DRAWN  # what a key must not reach

    def look(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        known: Mapping[str, Tensor],
        repeated: Tensor | None = None,
    ) -> Places:
        """Choose from a batch the places that may be kept; nothing is changed.

        Args:
            outputs: of the layer at each call, of N images in parts, such as windows.
            inputs: likewise, channels first.
            known: `order`, `image`, `label` and `prediction` of the images, (N,) each.
            repeated: which images were seen before as other items, (N,) bool; they have no places.
        """
        n_images = len(known["order"])
        z = torch.cat([_by_image(self.spec, output, n_images) for output in outputs], 2)
        n_prefix, rows, columns = self._layout(outputs, z.shape[2], n_images)
        before, z = z[:, :, :n_prefix], z[:, :, n_prefix:]
        best = widen(z.amax(2)).cpu()
        new = ~(torch.zeros(n_images, dtype=torch.bool) if repeated is None else repeated)
        image, channel = ((best >= self._least) & new[:, None]).nonzero().T
        position = _first_strongest(z, image, channel)
        keys = _keys(known["order"], z.shape[2])
        keys[~new.numpy()] = _NOT_DRAWN
        own = np.flatnonzero(keys.ravel() < self._most)
        if len(own) > self.n_drawn:
            own = own[np.argpartition(keys.ravel()[own], self.n_drawn - 1)[: self.n_drawn]]
        code = torch.cat([image * z.shape[2] + position, torch.from_numpy(own)])
        places, at = code.unique(return_inverse=True)
        key = torch.full_like(places, _NOT_DRAWN)
        key[at[len(image) :]] = torch.from_numpy(keys.ravel()[own])
        of, where = places // z.shape[2], places % z.shape[2]
        return Places(
            **{name: column[of] for name, column in known.items()},
            position=where,
            rows=torch.full_like(where, rows),
            columns=torch.full_like(where, columns),
            key=key,
            inputs=inputs_at(self.spec, inputs, n_images, of, where + n_prefix),
            channel=channel,
            at=at[: len(image)],
            response=best[image, channel],
            peaks=_peaks(before[new.to(before.device)], best[new]),
        )

    def add(self, places: Places) -> None:
        """Take what was chosen from a batch; images come in order."""
        self._parts.append(places)
        # Now and then, so that memory holds twice the lists at most, and what a batch adds.
        if sum(len(part.channel) for part in self._parts) > 2 * self._best.numel():
            self._sift()
            (part,) = self._parts
            self._least = torch.maximum(
                self._best[:, -1], self._table(part.channel, part.response)[:, -1]
            )
            self._most = min(self._most, self._upto(part.key))

    def close(self) -> Places | None:
        """Give the places of the shard, None if there was no image, and begin another."""
        if not self._parts:
            return None
        self._sift()
        (part,) = self._parts
        self._parts = []
        self.learn(part.channel, part.response, part.key)
        return part

    def learn(self, channel: Tensor, response: Tensor, key: Tensor) -> None:
        """Know of a closed shard's lists (M,), each channel's strongest first, and of its keys."""
        values = self._table(channel, response)
        self._best = torch.cat([self._best, values], 1).topk(self.k).values
        self._keys = torch.cat([self._keys, key[key < _NOT_DRAWN]]).sort().values[: self.n_drawn]
        self._least = self._best[:, -1]
        self._most = self._upto(self._keys)

    def _sift(self) -> None:
        self._parts = [sift(join_places(self._parts), self.k, self.n_drawn)]

    def _table(self, channel: Tensor, response: Tensor) -> Tensor:
        """Responses of lists (M,) as (C_out, k), -inf where they are shorter."""
        values = torch.full_like(self._best, -torch.inf)
        n_each = channel.bincount(minlength=len(values))
        rank = torch.arange(len(channel), dtype=torch.int64) - (n_each.cumsum(0) - n_each)[channel]
        values[channel, rank] = response.double()
        return values

    def _upto(self, keys: Tensor) -> int:
        own = keys[keys < _NOT_DRAWN]
        return int(own.max()) + 1 if len(own) >= self.n_drawn else _NOT_DRAWN

    def _layout(
        self, outputs: Sequence[Tensor], n_positions: int, n_images: int
    ) -> tuple[int, int, int]:
        """Tokens before those of the image, rows and columns; one row where nobody can tell."""
        output = outputs[0]
        if len(outputs) > 1 or len(output) != n_images:
            return 0, 1, n_positions
        if self.spec.channels_last and output.dim() == 3:
            return lay_out(n_positions, self.tokens)
        sizes = output.shape[1:-1] if self.spec.channels_last else output.shape[2:]
        return (0, *sizes) if len(sizes) == 2 else (0, 1, n_positions)


def _by_image(spec: LayerSpec, output: Tensor, n_images: int) -> Tensor:
    """A layer's output at one call, (N, C_out, P), positions in the order of an image's parts."""
    z = channels_first(spec, output.detach()).flatten(2)
    by_image: Tensor = z.unflatten(0, (n_images, -1)).movedim(1, 2).flatten(2)
    return by_image


def _first_strongest(z: Tensor, image: Tensor, channel: Tensor) -> Tensor:
    """Where channels respond most in images, (M,), of responses (N, C_out, P)."""
    n = max(1, _AT_ONCE // z.shape[2])
    image, channel = image.to(z.device), channel.to(z.device)
    pairs = zip(image.split(n), channel.split(n), strict=True)
    return torch.cat([z[i, o].argmax(1) for i, o in pairs]).cpu()


def _peaks(before: Tensor, best: Tensor) -> Tensor:
    """Count the images in which a token before the image's responds more than all of these."""
    counts = torch.zeros(before.shape[1], before.shape[2], dtype=torch.int64)
    if before.shape[2]:
        value, token = widen(before).cpu().max(2)
        _, channel = ahead = (value > best).nonzero().T
        counts.index_put_((channel, token[*ahead]), torch.ones_like(channel), accumulate=True)
    return counts


def _keys(order: Tensor, n_positions: int) -> NDArray[np.int64]:
    """A number for each place of images of these numbers, (N, P), the same whoever asks."""
    images = _mix(order.numpy().astype(np.uint64))
    positions = np.arange(n_positions, dtype=np.uint64)
    return (_mix(images[:, None] + positions) >> np.uint64(1)).astype(np.int64)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Make numbers that look drawn at random of any that differ.

    Source:
        The finaliser of SplitMix64; Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
