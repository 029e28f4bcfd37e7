"""Image encoders: any callable, a network of timm's, or the analysed network's own features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.data import Dataset

from unbraid.base.errors import ModelError, UsageError, brief, memory_full
from unbraid.base.modes import callers_device
from unbraid.base.progress import Advance, uncounted
from unbraid.images.batches import Batch, read_images
from unbraid.images.dataset import all_hold, picture_of, size_of
from unbraid.networks.copying import device_of
from unbraid.networks.models import RANDOM, Transform, load_timm
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed

NO_FEATURES = (
    "No fully connected layer or 1x1 convolution of the network gives its logits, so it has no "
    "penultimate layer to embed images with; pass another encoder, such as timm:NAME."
)

Encoder = Callable[[Tensor], Tensor]  # from images (N, C, H, W) to embeddings (N, D)
Encode = Callable[[Batch], Tensor]


class Penultimate(nn.Module):
    """A network's own features: what enters the layer whose output is the logits.

    That layer is the last fully connected layer or 1x1 convolution called whose output equals the
    logits. Its input is averaged over positions if it has any. Another network is the more
    independent judge, since this one may have the analysed channel in it.

    Args:
        model: gives logits (N, T) for a batch of images; it stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep the network."""
        super().__init__()
        self.model, self.name = model, "the network's own penultimate layer"

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings, (N, D).

        Raises:
            ModelError: no layer gives the logits, or the network cannot run.
        """
        features, _ = self.see(images)
        if features is None:
            raise ModelError(NO_FEATURES)
        return features

    def see(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """Compute embeddings, None if no layer gives the logits, and the logits, in one pass."""
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(_: nn.Module, args: Any, named: Any, output: Tensor) -> None:
            # One number a channel, as logits are; so what is kept is small.
            if output.dim() > 1 and len(output) and output[0].numel() == output.shape[1]:
                x = (args[0] if args else named["input"]).detach()
                # What follows may overwrite either.
                calls.append((x.flatten(2).mean(2) if x.dim() > 2 else x.clone(), output.clone()))

        with ExitStack() as hooks:
            for module in self.model.modules():
                if _may_classify(module):
                    handle = module.register_forward_hook(keep, with_kwargs=True)
                    hooks.callback(handle.remove)
            logits = run_network(self.model, images)
        for features, output in reversed(calls):
            if torch.equal(output.flatten(1).to(logits), logits):
                return features, logits
        return None, logits

    def __str__(self) -> str:
        """Name the encoder, for people."""
        return self.name


def _may_classify(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return set(module.kernel_size) == {1}
    # That of attention is no module that runs, unless it is looked at.
    return isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)


class TimmEncoder(nn.Module):
    """A network of timm's without its classifier, and with its own preprocessing of pictures.

    Images without a picture are only brought to the size (C, H, W) that the network takes.
    """

    def __init__(
        self, network: nn.Module, transform: Transform, size: torch.Size, name: str
    ) -> None:
        """Keep network, preprocessing, size and name."""
        super().__init__()
        self.network, self.transform, self.size, self.name = network, transform, size, name

    def forward(self, images: Tensor) -> Tensor:
        """Compute embeddings, (N, D)."""
        if images.shape[1] != self.size[0]:  # grey, or of many bands
            images = images.mean(1, keepdim=True).expand(-1, self.size[0], -1, -1)
        if images.shape[2:] != self.size[1:]:
            images = F.interpolate(images, self.size[1:], mode="bilinear", antialias=True)
        embeddings: Tensor = self.network(images)
        return embeddings


def load_encoder(spec: str, *, pretrained: bool = True, device: str | None = None) -> TimmEncoder:
    """Load the image encoder `timm:NAME`, with random weights unless `pretrained`.

    UsageError where there is none or timm is not installed, ModelError without its weights.
    """
    kind, _, name = spec.partition(":")
    if kind != "timm":
        raise UsageError(
            f"{spec!r} names no encoder; write timm:NAME, or pass a function from images to "
            "embeddings."
        )
    hint = "connect to the internet once, or use the network's own penultimate layer"
    network: Any
    network, transform = load_timm(name, None if pretrained else RANDOM, hint)
    network.reset_classifier(0)  # pooled features remain
    size = transform(Image.new("RGB", (64, 64))).shape
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return TimmEncoder(network.to(device).eval(), transform, size, spec)


def name_of_encoder(encoder: Encoder) -> str:
    """Name an encoder for people."""
    if isinstance(encoder, (Penultimate, TimmEncoder)):
        return encoder.name
    return getattr(encoder, "__qualname__", type(encoder).__name__)


@contextmanager
def ready(encoder: Encoder) -> Iterator[Encode]:
    """Make a function from batches to embeddings, (N, D), on the CPU; leave a module as it was."""
    # Also the module that a method such as `clip.encode_image` belongs to.
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    n_dimensions: int | None = None

    def encode(batch: Batch) -> Tensor:
        nonlocal n_dimensions
        index, images, _ = batch
        embeddings = _call(encoder, images if device is None else images.to(device))
        shape = tuple(embeddings.shape)
        if n_dimensions is None and len(shape) == 2:
            n_dimensions = shape[1]
        if not n_dimensions or shape != (len(images), n_dimensions):
            raise ModelError.of_image(
                f"The encoder gives {shape} for {len(images)} images from",
                int(index[0]),
                "on, not one embedding for each, all equally long; wrap it so that it does.",
            )
        wrong = ~embeddings.isfinite().all(1).cpu()
        if wrong.any():
            raise ModelError.of_image(
                "The encoder gives NaN or infinite numbers for",
                int(index[wrong][0]),
                "; check the image, its preprocessing and the encoder's weights.",
            )
        return embeddings.detach().cpu()

    with ExitStack() as stack, torch.no_grad():
        device = None
        if isinstance(module, nn.Module):
            stack.enter_context(undisturbed(module))
            if next(module.parameters(), None) is not None:
                device = device_of(module)
        yield encode


def _call(encoder: Encoder, images: Tensor) -> Tensor:
    try:
        with callers_device():
            embeddings = encoder(images)
    except ModelError:
        raise
    except Exception as error:  # of an encoder of anyone's own
        if memory_full(error):
            raise ModelError("The device is out of memory; lower batch_size.") from None
        raise ModelError(
            f"The encoder cannot run on images of shape {tuple(images.shape[1:])} "
            f"({brief(error)}); check size and channels of the images, and the encoder."
        ) from error
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise ModelError(
            f"The encoder gives {type(embeddings).__name__}, not a tensor of floating point "
            "numbers (images, dimensions); wrap it so that it does."
        )
    return embeddings


def load_batches(
    encoder: Encoder,
    dataset: Dataset[Any],
    batches: Sequence[Sequence[int]],
    workers: int,
    advance: Advance = uncounted,
) -> Iterator[Batch]:
    """Read images as `read_images` does, in the encoder's own preprocessing if it has one."""
    if isinstance(encoder, TimmEncoder) and all_hold(dataset, "picture"):
        dataset = _Pictures(dataset, encoder.transform)
    return read_images(dataset, batches, workers=workers, advance=advance)


class _Pictures(Dataset[tuple[Tensor, int]]):
    """A data set's pictures in another preprocessing, without labels."""

    def __init__(self, dataset: Dataset[Any], transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return size_of(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = picture_of(self.dataset, index)
        assert picture is not None
        return self.transform(picture.convert("RGB")), -1
