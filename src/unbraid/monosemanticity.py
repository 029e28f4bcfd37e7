"""How alike the images are that a channel answers to, told from an encoder's embeddings.

Pure functions; METHOD.md section 6. Shapes: N images, C channels, D dimensions of an embedding.
All sums are float64. An image whose embedding is zero has no direction and is left out of what is
measured by cosines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unbraid.errors import UsageError

_ROUNDING = 1e-12  # relative; what is smaller than that is told from zero by rounding alone


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over images from which monosemanticity scores follow, whatever the order of images."""

    n_images: int  # that have a direction
    shift: Tensor  # (C,), subtracted from all activations below, so that large ones lose no digits
    low: Tensor  # (C,), smallest activation
    high: Tensor  # (C,), largest activation
    a: Tensor  # (C,), sum of activations
    aa: Tensor  # (C,), of their squares
    e: Tensor  # (D,), sum of unit embeddings
    ae: Tensor  # (C, D), of unit embeddings times activations


def add_images(before: Moments | None, activations: Tensor, embeddings: Tensor) -> Moments:
    """Add some images, such as those of one shard, to the sums.

    Args:
        before: sums over the images before, None for the first.
        activations: (N, C), in any unit, N at least 1.
        embeddings: (N, D), of the same images.

    Raises:
        UsageError: shapes do not fit, or a number is NaN or infinite.
    """
    _check(activations, embeddings)
    activations, embeddings = activations.double(), embeddings.double()
    if before is None:
        endless = torch.full_like(activations[0], torch.inf)
        nothing, nowhere = torch.zeros_like(activations[0]), torch.zeros_like(embeddings[0])
        before = Moments(
            n_images=0,
            shift=activations[0],
            low=endless,
            high=-endless,
            a=nothing,
            aa=nothing,
            e=nowhere,
            ae=nothing[:, None] * nowhere,
        )
    directed, unit = _directions(embeddings)
    shifted = activations[directed] - before.shift
    return Moments(
        n_images=before.n_images + len(unit),
        shift=before.shift,
        low=torch.cat([before.low[None], shifted]).amin(0),
        high=torch.cat([before.high[None], shifted]).amax(0),
        a=before.a + shifted.sum(0),
        aa=before.aa + shifted.square().sum(0),
        e=before.e + unit.sum(0),
        ae=before.ae + shifted.T @ unit,
    )


def score(sums: Moments) -> Tensor:
    """Compute monosemanticity scores from sums over all images.

    Returns:
        (C,), at most 1; NaN for a channel whose activation is the same in all images, or in all
        but one: no two images then share it.

    Source:
        Pach et al. 2025, arXiv:2504.02821, in the one-pass form of METHOD.md section 6.
    """
    low, n = sums.low, sums.n_images
    spread = sums.high - low
    w = (sums.ae - low[:, None] * sums.e) / spread[:, None]  # sum of scaled activation x embedding
    u = (sums.a - n * low) / spread  # sum of scaled activations
    v = (sums.aa - 2 * low * sums.a + n * low.square()) / spread.square()  # of their squares
    pairs = u.square() - v  # twice the sum over pairs of images
    size = torch.maximum((low + sums.shift).abs(), (sums.high + sums.shift).abs())
    shared = (spread > _ROUNDING * size) & (pairs > n * _ROUNDING * u.square())
    return torch.where(shared, (w.square().sum(1) - v) / pairs, torch.nan)


def monosemanticity_score(activation: Tensor, embeddings: Tensor) -> Tensor:
    """How alike the images are that a channel answers to, weighted by how much it answers.

    The mean cosine over all pairs of images, each weighted by the product of the two activations,
    which are first scaled to run from 0 to 1 over all images.

    Args:
        activation: (N,) of one channel, or (N, C) of many.
        embeddings: (N, D), of the same images by any image encoder.

    Returns:
        A number, or (C,), float64; NaN for a channel whose activation is the same in all images,
        or in all but one.

    Raises:
        UsageError: shapes do not fit, or a number is NaN or infinite.

    Source:
        Pach et al. 2025, arXiv:2504.02821; METHOD.md section 6.

    >>> embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    >>> monosemanticity_score(torch.tensor([0.0, 3.0, 5.0]), embeddings).item()
    1.0
    >>> monosemanticity_score(torch.tensor([2.0, 2.0, 2.0]), embeddings).item()
    nan
    """
    if activation.dim() == 1:
        return score(add_images(None, activation[:, None], embeddings))[0]
    return score(add_images(None, activation, embeddings))


def clarity(embeddings: Tensor) -> float:
    """How alike the images are that excite a channel most: their mean pairwise cosine.

    Args:
        embeddings: (N, D), of a channel's top images.

    Returns:
        At most 1; NaN for less than two images.

    Source:
        Dreyer et al. 2025 (SemanticLens), arXiv:2501.05398; METHOD.md section 6.

    >>> clarity(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]))
    0.3333333333333333
    """
    _, unit = _directions(embeddings.double())
    n = len(unit)
    if n < 2:
        return float("nan")
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def pure_distances(embeddings: Tensor, concept: Tensor) -> tuple[float, float]:
    """Mean Euclidean distance of embeddings within concepts and between them.

    Args:
        embeddings: (N, D), of crops of reference images, in the encoder's own unit.
        concept: (N,), the concept that each was chosen for.

    Returns:
        The mean over all pairs of the same concept, and over all pairs of different ones; NaN
        where there is no such pair.

    Raises:
        UsageError: there are not as many concepts as embeddings.

    Source:
        Dreyer et al. 2024 (PURE), arXiv:2404.06453; METHOD.md section 6.

    >>> pure_distances(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([0, 0, 1]))
    (1.0, 4.5)
    """
    if concept.shape != embeddings.shape[:1]:
        raise UsageError(
            f"There are {len(embeddings)} embeddings but {len(concept)} concepts; give one each."
        )
    distances: Tensor = F.pdist(embeddings.double())
    i, j = torch.triu_indices(len(concept), len(concept), offset=1)
    same = concept[i] == concept[j]
    return float(distances[same].mean()), float(distances[~same].mean())


def _directions(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Which embeddings are not zero, (N,), and those at unit length."""
    length = embeddings.norm(dim=1)
    directed = length > 0
    return directed, embeddings[directed] / length[directed, None]


def _check(activations: Tensor, embeddings: Tensor) -> None:
    if activations.dim() != 2 or embeddings.dim() != 2 or len(activations) != len(embeddings):
        raise UsageError(
            f"Activations {tuple(activations.shape)} and embeddings {tuple(embeddings.shape)} do "
            "not fit; give (images, channels) and (images, dimensions) of the same images."
        )
    if len(activations) == 0:
        raise UsageError("There is no image to measure; give one or more.")
    for name, values in (("activation", activations), ("embedding", embeddings)):
        if not values.isfinite().all():
            raise UsageError(f"An {name} is NaN or infinite; leave such images out.")
