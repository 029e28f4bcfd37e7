"""From a model's name to the network, its preprocessing and the names of its outputs."""

from __future__ import annotations

import os
import urllib.error
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from unbraid.base.errors import ModelError, UsageError, brief, nearest
from unbraid.base.modes import drawing_alike
from unbraid.base.own_code import call_function
from unbraid.networks.checkpoints import load_weights
from unbraid.networks.class_names import Names, output_names
from unbraid.networks.outputs import count_outputs

Transform = Callable[[Any], Tensor]  # from an RGB picture or a tensor

RANDOM = "random"
_ASSUMED = (
    "{spec} returns no preprocessing, so ImageNet's usual one is assumed (shorter side 256, the "
    "central 224 pixels, its mean and deviation); return (network, preprocessing) for another."
)
_ENDINGS = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}  # of files of weights
_HINT = "give --weights FILE, or --weights random to try without"


@dataclass(frozen=True)
class LoadedModel:
    """A network with what is needed to feed it pictures."""

    model: nn.Module
    transform: Transform
    class_names: tuple[str, ...]  # of the outputs; empty where unknown
    source: dict[str, Any]  # what `load_model` needs to load it again
    names: Names = field(default_factory=Names)  # given for outputs or classes, to be read
    note: str = ""  # what was assumed of pictures, for people
    # What brings tensors to what it takes, if it is known.
    tensor_transform: Transform | None = None

    def n_outputs(self, image: Tensor | None = None) -> int:
        """Run the network on an image, (C, H, W), by default a blank one; count the logits."""
        try:
            if image is None:
                image = self.transform(Image.new("RGB", (256, 256)))
            return count_outputs(self.model, image)
        except Exception as error:  # of a network or preprocessing of anyone's own
            if isinstance(error, ModelError) and error.__cause__ is None:
                raise  # as it says what is wrong with the network's output
            what = (
                "what its preprocessing makes of a picture"
                if image is None
                else f"an image of shape {tuple(image.shape)}"
            )
            raise ModelError(
                f"The network cannot run on {what} "
                f"({brief(error.__cause__ or error)}); let FILE.py:FUNCTION return (network, "
                "preprocessing) that fit each other and the images."
            ) from error


def load_model(spec: str, weights: str | None = None, device: str | None = None) -> LoadedModel:
    """Load a network, in eval mode, on a device (by default this process's accelerator).

    `spec` is `torchvision:NAME`, `timm:NAME`, or `FILE.py:FUNCTION`, a function that returns the
    network, alone or with its preprocessing and names of its outputs. `weights` are a file, a
    torchvision name or "random", the same each time; by default the best that there are.
    """
    kind, _, name = spec.partition(":")
    note, tensor_transform = "", None
    file = None if weights is None else Path(weights)
    if file is not None and file.suffix not in _ENDINGS and not file.is_file():
        file = None
    named = RANDOM if file else weights
    if kind == "torchvision":
        model, transform, names = _torchvision(name, named)
    elif kind == "timm":
        model, transform = load_timm(name, named)
        names = list(output_names(model))
    elif ".py:" in spec:
        if named not in (None, RANDOM):
            raise UsageError(f"There is no weights file {named}; --weights names a file here.")
        model, tensor_transform, names = _own(*spec.rsplit(":", 1))
        transform = tensor_transform or imagenet_transform()
        note = "" if tensor_transform else _ASSUMED.format(spec=spec)
    else:
        raise UsageError(
            f"{spec!r} names no model; write torchvision:NAME, timm:NAME or FILE.py:FUNCTION."
        )
    if file is not None:
        load_weights(model, file)
    if device is None:
        rank = os.environ.get("LOCAL_RANK", "0")  # of this process, where torchrun has started it
        device = f"cuda:{rank}" if torch.cuda.is_available() else "cpu"
    _move(model, device)
    source = {"model": spec, "weights": weights}
    return LoadedModel(
        model.eval(), transform, tuple(names), source, note=note, tensor_transform=tensor_transform
    )


def _move(model: nn.Module, device: str) -> None:
    try:
        target = torch.device(device)
    except Exception:  # whose text lists all that torch could be built for
        raise UsageError(
            f"Device {device!r} is none that torch knows; leave --device out, or give one such as "
            "cpu or cuda:0."
        ) from None
    try:
        # What is on the meta device stays; whether it is used shows in a run.
        model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(target))
    except Exception as error:  # not all of torch's are of one type
        why = brief(error).rstrip(".")
        raise UsageError(
            f"Device {device!r} cannot be used ({why}); leave --device out, or give --device cpu."
        ) from None


def import_torchvision() -> ModuleType:
    """Import torchvision; ModelError explains the one way in which it commonly breaks."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise ModelError(
            "torchvision was built for another torch (often a CPU-only torch beside the default "
            "torchvision); install both together: pip install --force-reinstall torch torchvision."
        ) from None
    return torchvision  # type: ignore[no-any-return]


def imagenet_transform() -> Transform:
    """Resize to 256, cut the central 224, normalise: what ImageNet networks commonly expect."""
    import_torchvision()
    from torchvision.transforms import v2

    return v2.Compose(  # type: ignore[no-any-return]
        [
            v2.PILToTensor(),
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )


def _torchvision(name: str, weights: str | None) -> tuple[nn.Module, Transform, list[str]]:
    models = import_torchvision().models
    kinds = (models, models.segmentation, models.detection)
    known = [own for kind in kinds for own in models.list_models(module=kind)]
    if name not in known:
        raise UsageError(
            f"torchvision has no classifier, segmenter or detector {name!r}.{nearest(name, known)}"
        )
    classifies = name in models.list_models(module=models)
    if weights == RANDOM:
        # The weights of a segmenter's or detector's own backbone would be downloaded.
        backbone = {} if classifies else {"weights_backbone": None}
        with _in_single(), drawing_alike():  # or a run with them could never go on
            model = models.get_model(name, weights=None, **backbone)
        return model, imagenet_transform(), []
    choices = models.get_model_weights(name)
    if weights is not None and weights not in choices.__members__:
        raise UsageError(
            f"{name} has no weights {weights!r}; there are {', '.join(choices.__members__)}, "
            "'random', or the path of a file."
        )
    chosen = choices[weights or "DEFAULT"]
    model = _download(lambda: models.get_model(name, weights=chosen), chosen.url)
    return model, chosen.transforms(), chosen.meta["categories"] if classifies else []


def load_timm(
    name: str, weights: str | None = None, hint: str = _HINT
) -> tuple[nn.Module, Transform]:
    """Load one of timm's networks, and its own preprocessing; `weights` may be "random".

    `hint` says what to do if the weights cannot be had.
    """
    import_torchvision()  # timm imports it too, so breaks with it
    try:
        import timm
    except ImportError:
        raise UsageError("timm is not installed; pip install timm.") from None
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise UsageError(f"timm has no model {name!r}.{nearest(name, timm.list_models())}")
    if weights not in (None, RANDOM):
        raise UsageError(f"There is no weights file {weights}; timm's own tag goes into the name.")
    # Random weights are the same each time, or a run with them could never go on.
    with nullcontext() if weights is None else drawing_alike():
        model = _download(
            lambda: timm.create_model(name, pretrained=weights is None), f"timm:{name}", hint
        )
    with _in_single():
        config = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
    from torchvision.transforms import ToTensor

    steps = transform.transforms
    steps[:] = [_ToSingle(step) if isinstance(step, ToTensor) else step for step in steps]
    return model, transform


@contextmanager
def _in_single() -> Iterator[None]:
    """Have a library make numbers of single precision, whatever torch's default type is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _ToSingle:
    """torchvision's ToTensor, which otherwise makes numbers of torch's default type."""

    def __init__(self, step: Callable[[Any], Tensor]) -> None:
        self._step = step

    def __call__(self, picture: Image.Image) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        values: Tensor = pil_to_tensor(picture)
        return values.contiguous().to(torch.float32).div(255)

    def __repr__(self) -> str:
        return repr(self._step)


def _own(path: str, function: str) -> tuple[nn.Module, Transform | None, list[str]]:
    made = call_function(path, function, "--model")
    parts = list(made) if isinstance(made, tuple) else [made]
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise UsageError(
            f"{path}:{function} must return a network, (network, preprocessing) or (network, "
            f"preprocessing, output names), not {type(made).__name__}."
        )
    transform = parts[1] if len(parts) > 1 else None
    names = parts[2] if len(parts) > 2 else []
    if isinstance(names, Mapping) and set(names) == set(range(len(names))):
        names = [names[output] for output in range(len(names))]
    if isinstance(names, (str, Mapping, Set)) or not isinstance(names, Iterable):
        raise UsageError(
            f"{path} gives a {type(names).__name__} for output names; give a list of texts."
        )
    return parts[0], transform, [str(name) for name in names]


def _download(build: Callable[[], nn.Module], what: str, hint: str = _HINT) -> nn.Module:
    try:
        with _in_single():
            return build()
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = brief(error).rstrip(".")
        raise ModelError(f"The weights {what} cannot be had ({reason}); {hint}.") from None
