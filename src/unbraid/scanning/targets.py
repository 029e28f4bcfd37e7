"""Targets: the one number of each image whose gradient says what a layer's channels are for.

Usually that is the logit of the image's own class; of networks that are no classifiers it is
another number, or none. Shapes: N images, T classes, D numbers of an embedding.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.base.arguments import a_type
from unbraid.base.errors import DataError, ModelError, UsageError, brief, nearest
from unbraid.base.tables import one_line
from unbraid.images.identity import text_of
from unbraid.images.tensors import read_tensor_file
from unbraid.networks.outputs import (
    attributes_of,
    check_labels,
    describe_output,
    logits_of,
    numbers_in,
    refuse_broken_values,
)
from unbraid.scanning.scan_options import ScanOptions

LABEL, NONE, MULTILABEL = "label", "none", "multilabel"
_EXAMPLES = {
    LABEL: LABEL,
    NONE: NONE,
    MULTILABEL: MULTILABEL,
    "segmentation": "segmentation:CLASS",
    "detection": "detection:CLASS",
    "embedding": "embedding:FILE",
    "regression": "regression:INDEX",
}
_FORMS = ", ".join(_EXAMPLES.values())
# Where encoders of several libraries put the embedding of an image.
_EMBEDDINGS = ("image_embeds", "pooler_output", "x_norm_clstoken")
_MAPS = ("out", "logits")  # likewise a map of logits
_LONGEST = 200  # characters of a name

GivenTarget = str | Callable[[Any], Any] | None
Value = Callable[[Any, Tensor], Tensor]  # from a network's output and labels (N,), to (N,)


@dataclass(frozen=True, eq=False)
class Scalar:
    """A number of each image, by its name in a scan's manifest."""

    name: str
    value: Value | None  # None: no number, so no gradient
    of_class: bool = False  # of the image's own class, so that labels name outputs
    by_label: bool = False  # otherwise for each label, which must then be given
    is_own: bool = False  # a function of anyone's own, known by its name and code

    def of(self, output: Any, label: Tensor, index: Tensor) -> Tensor:
        """Compute it, (N,), for images of these labels and indices in the data set, (N,) each.

        Raises:
            UsageError: it is no number for each image, or has no gradient though the output has.
            ModelError: it is not finite, or the output is none that it can be taken from.
        """
        assert self.value is not None
        if self.of_class:
            logits = logits_of(output, len(label))
            check_labels(label.cpu(), index, logits)
            refuse_broken_values(logits, index)
            return logits.gather(1, label.to(logits.device)[:, None])[:, 0]
        try:
            value = self.value(output, label)
        except (UsageError, ModelError, DataError):
            raise
        except Exception as error:  # of a function of anyone's own
            raise UsageError(
                f"The target {self.name!r} fails on the network's output, "
                f"{describe_output(output)} ({brief(error)}); let it take that and return one "
                "number for each image."
            ) from error
        n_images = len(label)
        if not isinstance(value, Tensor) or value.shape != (n_images,):
            told = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else a_type(value)
            raise UsageError(
                f"The target {self.name!r} gives {told} for a batch of {n_images}; let it return "
                f"one number for each image, of shape ({n_images},)."
            )
        if not value.is_floating_point():
            raise UsageError(
                f"The target {self.name!r} gives numbers of {value.dtype}, which have no gradient; "
                "let it return fractions."
            )
        wrong = ~value.detach().isfinite().cpu()
        if wrong.any():
            raise ModelError.of_image(
                f"The target {self.name!r} of",
                int(index[wrong][0]),
                "is NaN or infinite; check the image, its preprocessing, the weights and the "
                "target.",
            )
        return value

    def refuse_detached(self, output: Any, value: Tensor) -> None:
        """Raise UsageError if the target, not the network, left the gradient behind."""
        if not value.requires_grad and any(one.requires_grad for one in numbers_in(output)):
            raise UsageError(
                f"The target {self.name!r} has no gradient, though the network's output has "
                "(detach, item, argmax or numpy perhaps); compute it by operations that torch can "
                "differentiate, or use target='none'."
            )


def read_target(given: Any) -> Scalar:
    """Make a target of what a caller says: a name, a function, None, or a Scalar."""
    if isinstance(given, Scalar):
        return given
    if given is None:
        return Scalar(NONE, None)
    if callable(given):
        module = getattr(given, "__module__", type(given).__module__)
        name = " ".join(f"{module}.{text_of(given)}".split())
        if len(name) > _LONGEST:
            name = f"{name[:_LONGEST]}… [{hashlib.sha256(name.encode()).hexdigest()[:16]}]"
        return Scalar(name, lambda output, _: given(output), is_own=True)
    if not isinstance(given, str):
        raise UsageError(f"target is {a_type(given)}; give a name ({_FORMS}), a function or None.")
    kind, colon, rest = given.partition(":")
    if kind not in _EXAMPLES or (kind in (LABEL, NONE, MULTILABEL)) == bool(colon):
        shown = f" as {_EXAMPLES[kind]}" if kind in _EXAMPLES else f": {_FORMS}"
        near = "" if kind in _EXAMPLES else nearest(kind, list(_EXAMPLES))
        raise UsageError(f"There is no target {one_line(given)!r}; write it{shown}.{near}")
    if kind == NONE:
        return Scalar(NONE, None)
    if kind in (LABEL, MULTILABEL):
        return Scalar(kind, lambda output, label: logits_of(output, len(label)), of_class=True)
    if kind == "embedding":
        return _embedding(rest)
    number = _whole(given, rest, _EXAMPLES[kind])
    value: dict[str, Callable[[Any, int, int], Tensor]] = {
        "segmentation": _mask,
        "detection": _boxes,
        "regression": _regression,
    }
    return Scalar(f"{kind}:{number}", lambda output, label: value[kind](output, number, len(label)))


def is_named(told: Any) -> bool:
    """Whether a target is given by name, not the name of a function."""
    return isinstance(told, str) and told.partition(":")[0] in _EXAMPLES


def found_again(name: str) -> str:
    """Name a target so that the file that it may need is found from any folder."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).resolve()}" if kind == "embedding" else name


def _whole(given: str, text: str, example: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise UsageError(
            f"The target {one_line(given)!r} is not as {example}; give a whole number from 0 on."
        )
    return int(text)


def _mask(output: Any, number: int, n_images: int) -> Tensor:
    """Sum of a class's logits over the positions where they are the largest of all classes'."""
    maps = _part(output, _MAPS, lambda part: part.dim() >= 3)
    if maps is None or len(maps) != n_images:
        raise ModelError(
            f"The network's output is {describe_output(output)}, not maps of logits of shape "
            "(images, classes, positions); use another target, or a function."
        )
    if number >= maps.shape[1]:
        raise UsageError(
            f"There is no class {number} for the target segmentation:{number}; the network's maps "
            f"have classes 0 to {maps.shape[1] - 1}."
        )
    wins = maps.detach().argmax(1) == number
    if maps.shape[1] == 1:  # of a single logit the class wins where it is above zero
        wins = maps.detach()[:, 0] > 0
    return (maps[:, number] * wins).flatten(1).sum(1)


def _boxes(output: Any, number: int, n_images: int) -> Tensor:
    """Sum of the scores of a class's boxes."""
    told = isinstance(output, (list, tuple)) and len(output) == n_images
    if not told or not all(
        isinstance(one, Mapping) and {"scores", "labels"} <= one.keys() for one in output
    ):
        raise ModelError(
            f"The network's output is {describe_output(output)}, not a list of dictionaries with "
            "scores and labels, one an image; use another target, or a function."
        )
    return torch.stack([one["scores"][one["labels"] == number].sum() for one in output])


def _regression(output: Any, number: int, n_images: int) -> Tensor:
    """One of the numbers that a network puts out for each image, counted over all dimensions."""
    numbers = numbers_in(output)
    if len(numbers) != 1 or numbers[0].dim() == 0 or len(numbers[0]) != n_images:
        raise ModelError(
            f"The network's output is {describe_output(output)}, not numbers of shape (images, "
            "...); pick them out by unbraid.with_logits, or use a function as the target."
        )
    row = numbers[0].reshape(n_images, -1)
    if number >= row.shape[1]:
        raise UsageError(
            f"There is no output {number} for the target regression:{number}; the network has "
            f"outputs 0 to {row.shape[1] - 1}."
        )
    return row[:, number]


def _part(output: Any, names: Sequence[str], fits: Callable[[Tensor], bool]) -> Tensor | None:
    """The output itself, the only part of a list, or the first part of a known name, if it fits."""
    if isinstance(output, (list, tuple)) and len(output) == 1:
        output = output[0]
    held = output if isinstance(output, Mapping) else attributes_of(output)
    for part in (output, *(held[name] for name in names if name in held)):
        if isinstance(part, Tensor) and fits(part):
            return part
    return None


def _embedding(path: str) -> Scalar:
    """Cosine of an image's embedding with a vector (D,) of a file, or with its class's, (T, D)."""
    vectors = _read_vectors(path)
    digest = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()[:16]

    def value(output: Any, label: Tensor) -> Tensor:
        embeddings = _part(output, _EMBEDDINGS, lambda part: part.dim() == 2)
        if embeddings is None or len(embeddings) != len(label):
            raise ModelError(
                f"The network's output is {describe_output(output)}, not embeddings of shape "
                "(images, numbers); pick them out with --output or unbraid.with_logits."
            )
        if embeddings.shape[1] != vectors.shape[-1]:
            raise UsageError(
                f"{path} holds vectors of {vectors.shape[-1]} numbers, but the network's "
                f"embeddings have {embeddings.shape[1]}; give vectors of the same encoder."
            )
        wanted = vectors.to(embeddings)
        if wanted.dim() == 2:
            if int(label.min()) < 0 or int(label.max()) >= len(wanted):
                raise DataError(
                    f"An image has label {int(label.max())}, but {path} holds {len(wanted)} "
                    "vectors; give one for each class."
                )
            wanted = wanted[label.to(wanted.device)]
        return F.cosine_similarity(embeddings, wanted.expand_as(embeddings), dim=1)

    name = f"embedding:{Path(path).name} [{digest}]"
    return Scalar(name, value, by_label=vectors.dim() == 2)


def _read_vectors(path: str) -> Tensor:
    """Read a vector (D,), or one for each class (T, D), from .npy, .pt or .safetensors."""
    file = Path(path)
    if not path or not file.is_file():
        raise UsageError(f"There is no file {path!r}; write the target as embedding:FILE.")
    tensors = numbers_in(read_tensor_file(file))
    if len(tensors) != 1 or tensors[0].dim() not in (1, 2) or not tensors[0].numel():
        raise UsageError(
            f"{path} holds no single vector (D,) or one for each class (T, D); give one tensor."
        )
    vectors = tensors[0].detach().to(torch.float64)
    if not vectors.isfinite().all() or (vectors.norm(dim=-1) == 0).any():
        raise UsageError(f"{path} holds a vector that is zero or not finite; give another.")
    return vectors


def settled(options: ScanOptions) -> ScanOptions:
    """The options with their target read; UsageError if labels do not go with it."""
    target = read_target(options.target)
    wanted = "'given'" if target.by_label else "'given' or 'predicted'"
    if (target.of_class and options.labels == "none") or (
        target.by_label and options.labels != "given"
    ):
        raise UsageError(
            f"The target {target.name!r} is of each image's class, so labels={options.labels!r} "
            f"does not go with it; use target='none', or labels={wanted}."
        )
    if target.is_own:
        warnings.warn(
            f"The target {target.name!r} is known by its name and code alone; a scan that goes on "
            "cannot tell whether what it calls has changed.",
            stacklevel=5,
        )
    return replace(options, target=target)
