"""The kinds of networks that zoo.py takes through every step, one row each: add yours to KINDS."""

from __future__ import annotations

import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d

import unbraid

STEPS = ("scan", "find by classes", "find by clusters", "split", "ablate", "report")
N_CLASSES, N_TRAIN, N_VAL = 3, 60, 18
BY_HAND = {channel: [[0], [1], [2]] for channel in (0, 1, 2)}
MARK = "<!-- kinds: written by benchmarks/zoo.py -->"


class Patterns(Dataset[tuple[Tensor, int]]):
    """A pattern for each class and one of some causes that are no class, and noise."""

    def __init__(self, shape: tuple[int, ...], n: int, seed: int) -> None:
        """Draw so many of a shape."""
        known = torch.Generator().manual_seed(9)
        patterns = torch.randn(N_CLASSES, *shape, generator=known)
        causes = torch.randn(4, *shape, generator=known)
        generator = torch.Generator().manual_seed(seed)
        self.targets = [k % N_CLASSES for k in range(n)]
        self.classes = ["wave", "grain", "fold"]
        self.images = torch.randn(n, *shape, generator=generator) / 2
        which = torch.randint(4, (n,), generator=generator)
        self.images += patterns[self.targets] + causes[which]

    def __len__(self) -> int:
        """Count the images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one with its label."""
        return self.images[index], self.targets[index]


@dataclass(frozen=True)
class Kind:
    """A kind of network: how it is built, what it takes, the layer, and what its target is."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layer: str
    target: Any = "label"  # as `unbraid.scan` takes it


class Pooled(nn.Module):
    """Mean over positions of class maps, (N, T, ...) to (N, T)."""

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.flatten(2).mean(2)


class Turned(nn.Module):
    """Maps (N, C, H, W) to tokens (N, H * W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        """Flatten."""
        return x.flatten(2).mT


class MeanToken(nn.Module):
    """Mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Average."""
        return x.mean(1)


class Crossed(nn.Module):
    """Learned queries that attend to an image's tokens, as decoders of detectors do."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.tokens = nn.Sequential(nn.Conv2d(3, 32, 4, 4), Turned())
        self.queries = nn.Parameter(torch.randn(5, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        tokens = self.tokens(x)
        met, _ = self.attention(self.queries.expand(len(x), -1, -1), tokens, tokens)
        return self.head(met.mean(1))


def decoder(kind: type[nn.Module], conv: type[nn.Module], n_in: int) -> nn.Module:
    """An encoder and a decoder with transposed convolutions; logits are means of class maps."""
    return nn.Sequential(
        *(conv(n_in, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(conv(16, 32, 3, stride=2, padding=1), nn.ReLU()),
        *(kind(32, 24, 4, stride=2, padding=1), nn.ReLU()),
        *(kind(24, 16, 3, stride=2, padding=1, output_padding=1), nn.ReLU()),
        *(conv(16, 5, 1), Pooled()),
    )


def audio() -> nn.Module:
    """A network of 1-D convolutions on a wave."""
    return nn.Sequential(
        *(nn.Conv1d(1, 16, 80, stride=4), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4)),
        *(nn.Conv1d(16, 32, 3), nn.BatchNorm1d(32), nn.ReLU(), nn.MaxPool1d(4)),
        *(nn.Conv1d(32, 32, 3), nn.ReLU(), Pooled(), nn.Linear(32, 5)),
    )


def volumes() -> nn.Module:
    """A network of 3-D convolutions on a volume."""
    return nn.Sequential(
        *(nn.Conv3d(1, 16, 3, stride=2, padding=1), nn.BatchNorm3d(16), nn.ReLU()),
        *(nn.Conv3d(16, 32, 3, stride=2, padding=1), nn.ReLU(), Pooled(), nn.Linear(32, 5)),
    )


def fused() -> nn.Module:
    """Torch's own transformer, which runs fused in eval mode."""
    block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Conv2d(3, 32, 4, 4), Turned(), encoder, MeanToken(), nn.Linear(32, 10))


class Padded(nn.Module):
    """Torch's own transformer on tokens of which the last are padding, as the image says."""

    def __init__(self) -> None:
        """Build it."""
        super().__init__()
        self.tokens = nn.Sequential(nn.Conv2d(3, 32, 4, 4), Turned())
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(block, 2), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Encode what is no padding."""
        tokens = self.tokens(x)
        lengths = 32 + (100 * x.mean((1, 2, 3))).abs().long() % 32
        padding = torch.arange(tokens.shape[1])[None] >= lengths[:, None]
        met = self.encoder(tokens, src_key_padding_mask=padding)
        return self.head(met.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None])


def swin(v2: bool = False) -> nn.Module:
    """Torchvision's Swin, small, of either version."""
    own = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if v2 else {}
    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, **own)


def video_swin() -> nn.Module:
    """Torchvision's Swin for clips, small."""
    return SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], num_classes=10)


def vit() -> nn.Module:
    """Torchvision's ViT, small."""
    return torchvision.models.VisionTransformer(32, 8, 3, 4, 64, 128, num_classes=10)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of timm's."""
    return lambda: timm.create_model(name, pretrained=False, **options)


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A network of torchvision's."""
    return lambda: torchvision.models.get_model(name, weights=None, **options)


def logits_of(build: Callable[[], nn.Module], pick: Callable[[Any], Tensor]) -> Any:
    """A network with logits picked out of what it puts out."""
    return lambda: unbraid.with_logits(build(), pick)


def maps(output: Any) -> Tensor:
    """Means of class maps."""
    return output["out"].mean((2, 3))


_VIT = "encoder.layers.encoder_layer_1"
_SEGMENTER = of_torchvision("lraspp_mobilenet_v3_large", weights_backbone=None, num_classes=5)
_DETECTOR = of_torchvision(
    *("ssdlite320_mobilenet_v3_large",), weights_backbone=None, num_classes=4
)
_DINO = of_timm("vit_small_patch14_reg4_dinov2", img_size=56, depth=2, num_classes=0)
PICTURE = (3, 32, 32)
KINDS = [
    Kind("convolutional", of_torchvision("resnet18"), (3, 64, 64), "layer2.0.downsample.0"),
    Kind("mobile, scales after a pool", of_torchvision("mobilenet_v3_small"), (3, 64, 64),
         "features.7.block.2.fc1"),
    Kind("ConvNeXt", of_timm("convnext_atto", num_classes=10), (3, 64, 64),
         "stages.2.blocks.1.mlp.fc2"),
    Kind("Swin, windows", of_timm("swin_tiny_patch4_window7_224", img_size=56, num_classes=10),
         (3, 56, 56), "layers.0.blocks.1.attn.qkv"),
    Kind("torchvision Swin, attention in", swin, (3, 48, 56), "features.1.1.attn.qkv"),
    Kind("torchvision Swin V2, attention out", lambda: swin(v2=True), (3, 48, 56),
         "features.1.1.attn.proj"),
    Kind("video Swin, attention in", video_swin, (3, 4, 48, 56), "features.0.1.attn.qkv"),
    Kind("timm ViT, attention",
         of_timm("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_classes=10),
         PICTURE, "blocks.1.attn.qkv"),
    Kind("torchvision ViT, MLP", vit, PICTURE, f"{_VIT}.mlp.3"),
    Kind("torchvision ViT, attention in", vit, PICTURE, f"{_VIT}.self_attention.in_proj"),
    Kind("torchvision ViT, attention out", vit, PICTURE, f"{_VIT}.self_attention.out_proj"),
    Kind("torch's fused transformer", fused, PICTURE, "2.layers.1.self_attn.in_proj"),
    Kind("the same with padding masks", Padded, PICTURE, "encoder.layers.1.linear1"),
    Kind("attention between two inputs", Crossed, PICTURE, "attention.v_proj"),
    Kind("decoder, transposed", lambda: decoder(nn.ConvTranspose2d, nn.Conv2d, 3), PICTURE, "6"),
    Kind("decoder of volumes", lambda: decoder(nn.ConvTranspose3d, nn.Conv3d, 1),
         (1, 8, 16, 16), "6"),
    Kind("decoder of signals", lambda: decoder(nn.ConvTranspose1d, nn.Conv1d, 2), (2, 128), "4"),
    Kind("audio, 1-D", audio, (1, 4000), "8"),
    Kind("several leads, 1-D", lambda: decoder(nn.ConvTranspose1d, nn.Conv1d, 12), (12, 512), "2"),
    Kind("video", of_torchvision("r3d_18", num_classes=10), (3, 4, 24, 24),
         "layer2.0.downsample.0"),
    Kind("volumes, 3-D", volumes, (1, 16, 16, 16), "3"),
    Kind("grey", of_timm("resnet18", in_chans=1, num_classes=10), (1, 64, 64),
         "layer2.0.downsample.0"),
    Kind("many bands", of_timm("resnet18", in_chans=13, num_classes=10), (13, 64, 64),
         "layer2.0.downsample.0"),
    Kind("segmenter, logits picked", logits_of(_SEGMENTER, maps), (3, 64, 64),
         "backbone.16.0"),
    # What is no class logit: `target` says which number the gradient is of.
    Kind("segmenter", _SEGMENTER, (3, 64, 64), "backbone.16.0", "segmentation:1"),
    Kind("detector", _DETECTOR, (3, 320, 320), "backbone.features.1.0.3.0", "detection:1"),
    Kind("regression", lambda: nn.Sequential(audio(), nn.Linear(5, 2)), (1, 4000), "0.8",
         "regression:1"),
    Kind("several labels", of_torchvision("resnet18"), (3, 64, 64), "layer2.0.downsample.0",
         "multilabel"),
    Kind("encoder (DINOv2 with registers)", _DINO, (3, 56, 56), "blocks.1.mlp.fc2", None),
    Kind("encoder, ConvNeXt", of_timm("convnext_atto", num_classes=0), (3, 64, 64),
         "stages.2.blocks.1.mlp.fc2", None),
]  # fmt: skip


def try_kind(kind: Kind) -> dict[str, Any]:
    """Take a network through every step; say for each whether it holds, or why not."""
    torch.manual_seed(0)
    model = kind.build().eval()
    randomise_norms(model)
    train, val = Patterns(kind.shape, N_TRAIN, 1), Patterns(kind.shape, N_VAL, 2)
    row: dict[str, Any] = {"kind": kind.name, "layer": kind.layer, "target": str(kind.target)}
    step = STEPS[0]
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out, options = Path(folder), {"batch_size": 10}
            of_target = {} if kind.target == "label" else {"target": kind.target}
            if of_target and "target" not in inspect.signature(unbraid.scan).parameters:
                return row | dict.fromkeys(STEPS, "scans take no target yet")
            labels = {"labels": "given"}
            scan, val_scan = (
                unbraid.scan(model, kind.layer, data, out / name, **options, **of_target, **labels)
                for name, data in (("train", train), ("val", val))
            )
            row[step] = True
            if kind.target is None:
                row[STEPS[1]] = "needs a target; groups by hand"
                groups = [[k for k, t in enumerate(train.targets) if t == c] for c in (0, 1, 2)]
                found = unbraid.find(scan, images={channel: groups for channel in BY_HAND})
            else:
                step = STEPS[1]
                found = unbraid.find(scan, tau=0.01, p=0.5, gamma=0.95)
                row[step] = len(found.concepts) or "none found; by hand"
                found = found if found.concepts else unbraid.find(scan, channels=BY_HAND)
            step = STEPS[2]
            clusters = unbraid.find(scan, concepts="clusters")
            row[step] = len(clusters.concepts) or "none found; by hand"
            step = STEPS[3]
            split = unbraid.split(scan, found)
            changed = unbraid.apply(model, split)
            row[step] = all(equal(model, changed, val.images[:n]) for n in (1, 4))
            step = STEPS[4]
            if kind.target is None:
                row[step] = "needs a target"
            else:
                unbraid.ablate(changed, val, layer=kind.layer, batch_size=6, **of_target)
                row[step] = True
            step = STEPS[5]
            shown = {"evaluation": unbraid.evaluate(split, val_scan), "train_scan": scan}
            page = unbraid.report(
                out / "report.html", scan=val_scan, found=found, split=split, dataset=val, **shown
            )
            row[step] = "data:image" in page.read_text()
    except Exception as error:
        row[step] = f"{type(error).__name__}: {error}".splitlines()[0][:160].replace("|", "/")
    return row


def randomise_norms(model: nn.Module) -> None:
    """Give norms statistics of data, so that no map dies."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


def equal(model: nn.Module, changed: nn.Module, images: Tensor) -> bool:
    """To the last bit, with and without a graph, everything that the networks put out."""
    with torch.no_grad():
        pairs = list(zip(tensors(model(images)), tensors(changed(images)), strict=True))
    pairs += zip(tensors(model(images)), tensors(changed(images)), strict=True)
    return bool(pairs) and all(torch.equal(one, other) for one, other in pairs)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def table(rows: list[dict[str, Any]]) -> str:
    """Write the matrix: yes, or why not."""
    head = ("network", "layer", "target", *STEPS)
    lines = [head, ("---",) * len(head)]
    for row in rows:
        cells = [cell(row.get(step, "")) for step in STEPS]
        lines.append((row["kind"], f"`{row['layer']}`", row["target"], *cells))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(value: Any) -> str:
    """Yes, a count, or what is wrong."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"yes, {value}" if isinstance(value, int) else str(value)


def write_into(page: Path, rows: list[dict[str, Any]]) -> None:
    """Put the matrix between the marks of a page."""
    before, _, after = page.read_text().split(MARK)
    page.write_text(f"{before}{MARK}\n\n{table(rows)}\n{MARK}{after}")


def n_green(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """How many cells hold, and of how many."""
    cells = [row.get(step, "") for row in rows for step in STEPS]
    return sum(c is True or (isinstance(c, int) and c > 0) for c in cells), math.prod(
        (len(rows), len(STEPS))
    )
