"""Which of the tensors in a checkpoint are a network's: found by their names, not by its keys."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from unbraid.pickles import Unmade, View

# By which torch.compile, DataParallel, FSDP and checkpointing name the network inside.
_WRAPPERS: Set[str] = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
)
# In names of what is kept beside the weights that were trained.
_COPIES = {"ema", "teacher", "swa", "averaged", "average", "avg", "shadow", "momentum", "target"}
_EXTRA_STATE = "_extra_state"  # which modules store as they like
_MOST_TENSORS = 2**17
_MOST_SETS = 100
_MOST_PARTS = 64
_LONGEST = 500  # characters of a key

Name = tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A tensor in a checkpoint."""

    name: Name  # parts between dots, after the keys of the dictionaries around it
    holder: int  # which dictionary it lies in
    value: Any

    @property
    def text(self) -> str:
        """Its name for people."""
        return ".".join(self.name)


@dataclass(frozen=True)
class Content:
    """What a checkpoint holds, as far as it concerns weights."""

    tensors: list[Found]
    objects: bool  # whether it holds some that are not made


@dataclass(frozen=True)
class Candidate:
    """Tensors whose names, less a prefix, are a network's."""

    prefix: Name
    taken: dict[str, Found]  # by the network's names
    extra: dict[str, Found]  # beside them, which it does not have

    @property
    def text(self) -> str:
        """Where they lie, for people."""
        return ".".join(self.prefix) or "no prefix"


def find_tensors(content: Any) -> Content:
    """Find all named tensors in dictionaries and lists inside of one another, outermost first.

    Raises:
        ValueError: there are too many.
    """
    tensors: list[Found] = []
    objects = isinstance(content, Unmade)
    seen = {id(content)}  # as a few bytes may name one dictionary again and again
    queue: deque[tuple[Name, Any]] = deque([((), content)])
    while queue:
        around, holder = queue.popleft()
        for key, value in _parts(holder):
            objects = objects or isinstance(value, Unmade)
            name = (*around, *str(key).split("."))
            if len(name) > _MOST_PARTS or len(str(key)) > _LONGEST:
                continue
            if isinstance(value, (View, Tensor)) or name[-1] == _EXTRA_STATE:
                if isinstance(key, str):
                    tensors.append(Found(name, id(holder), value))
            elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                queue.append((name, value))
        if len(tensors) > _MOST_TENSORS:
            raise ValueError("it holds too many tensors")
    return Content(tensors, objects)


def _parts(holder: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(holder, Mapping):
        return holder.items()
    return enumerate(holder) if isinstance(holder, (list, tuple)) else ()


def candidates(tensors: Sequence[Found], own: Iterable[str]) -> list[Candidate]:
    """Find sets of tensors that may be a network's, the one that has most of its names first.

    Args:
        tensors: of a checkpoint.
        own: names in the network's state dict. Names of wrappers in either do not matter.
    """
    names = [tuple(name.split(".")) for name in own]
    wrappers = _WRAPPERS
    if len({_without(wrappers, name) for name in names}) < len(names):
        wrappers = frozenset()  # as the network itself uses such names to tell tensors apart
    wanted = {_without(wrappers, name): ".".join(name) for name in names}
    taken: dict[Name, dict[str, Found]] = {}
    for found in tensors:
        bare: Name = ()
        for at in range(len(found.name) - 1, -1, -1):
            if found.name[at] in wrappers:
                continue
            bare = (found.name[at], *bare)
            if bare in wanted:
                taken.setdefault(found.name[:at], {}).setdefault(wanted[bare], found)
    if not taken and tensors:  # a network may know older names of its own
        most, _ = Counter(found.holder for found in tensors).most_common(1)[0]
        inside = [found.name for found in tensors if found.holder == most]
        taken[_common(inside)] = {}
    largest = sorted(taken.items(), key=lambda item: -len(item[1]))[:_MOST_SETS]
    made = []
    for prefix, values in largest:
        extra = {
            ".".join(_without(wrappers, found.name[len(prefix) :])): found
            for found in _behind(prefix, tensors, values)
        }
        made.append(Candidate(prefix, values, extra))
    return made


def _without(wrappers: Set[str], name: Name) -> Name:
    return tuple(part for part in name if part not in wrappers)


def _common(names: Sequence[Name]) -> Name:
    """The parts that all names begin with; of one name alone, all but its last."""
    low, high = min(names), max(names)
    n = next((k for k, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: min(n, len(low) - 1)]


def _behind(prefix: Name, tensors: Sequence[Found], taken: Mapping[str, Found]) -> Iterator[Found]:
    """What lies behind the prefix too, in the same dictionaries."""
    holders = {found.holder for found in taken.values()}
    used = {id(found) for found in taken.values()}
    for found in tensors:
        beside = found.holder in holders or not taken
        if beside and found.name[: len(prefix)] == prefix and id(found) not in used:
            yield found


def completed(candidate: Candidate, model: nn.Module) -> dict[str, Any]:
    """Give the values for a network's names, with those that files may lack.

    Those are counts of batches, which older torch did not have, and of tensors that the network
    has under several names all but one.
    """
    own = model.state_dict(keep_vars=True)
    values = {name: found.value for name, found in candidate.taken.items()}
    first = {id(own[name]): name for name in values if isinstance(own[name], Tensor)}
    for name in own.keys() - values.keys():
        if id(own[name]) in first:
            values[name] = values[first[id(own[name])]]
        elif name.endswith("num_batches_tracked"):
            values[name] = own[name]
    return values


def misshapen(values: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of tensors that have another shape in the network."""
    return [name for name, value in values.items() if not _fits(value, own[name])]


def _fits(value: Any, own: Any) -> bool:
    if not isinstance(value, (View, Tensor)) or not isinstance(own, Tensor) or is_lazy(own):
        return True
    shape = tuple(value.shape)
    return shape == tuple(own.shape) or (shape == (1,) and own.dim() == 0)  # as once saved


def is_copy(candidate: Candidate) -> bool:
    """Whether it is an average or the like, kept beside the weights that were trained.

    >>> is_copy(Candidate(("state_dict_ema",), {}, {})), is_copy(Candidate(("schema",), {}, {}))
    (True, False)
    """
    return any(
        word in _COPIES for part in candidate.prefix for word in re.split("[^a-z]+", part.lower())
    )


def distinct(found: Sequence[Candidate]) -> list[Candidate]:
    """Leave out candidates of the very same tensors as another one."""
    kept: list[Candidate] = []
    for candidate in found:
        if not any(_same(candidate, other) for other in kept):
            kept.append(candidate)
    return kept


def _same(one: Candidate, other: Candidate) -> bool:
    return one.taken.keys() == other.taken.keys() and all(
        found.value is other.taken[name].value
        or (isinstance(found.value, View) and found.value == other.taken[name].value)
        for name, found in one.taken.items()
    )


def classes_of(
    values: Mapping[str, Any], own: Mapping[str, Any], others: Sequence[str]
) -> tuple[int, int] | None:
    """Numbers of classes in file and network, if they differ in nothing else; None otherwise."""
    pairs = {(tuple(values[name].shape), tuple(own[name].shape)) for name in others}
    counts = {(one[:1], two[:1]) for one, two in pairs if one[1:] == two[1:]}
    if len(counts) != 1 or any(one[1:] != two[1:] for one, two in pairs):
        return None
    ((one, two),) = counts
    return (one[0], two[0]) if one and two else None
