"""How well concept channels keep apart: mimic, silence and separation errors (docs/method.md).

N images; z (N,) the whole channel, new (N, K) its concept channels, concept (N,) an image's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def mimic_error(z: Tensor, z_k: Tensor, own: Tensor) -> float:
    """Relative error of a concept channel z_k (N,) as a copy of z (N,) on its own images (N,)."""
    return float(rms(z_k[own] - z[own]) / rms(z[own]))


def silence_errors(z: Tensor, new: Tensor, concept: Tensor, k: int) -> list[float]:
    """Relative size of concept channel k's response to each other concept's images."""
    others = others_than(concept, new, k)
    return [float(rms(new[other, k]) / rms(z[other])) for other in others]


def separation_error(z: Tensor, new: Tensor, concept: Tensor) -> float:
    """Mean of all mimic and silence errors of a channel: 0 is ideal, halving it gives 0.5."""
    errors: list[float] = []
    for k in range(new.shape[1]):
        errors += [mimic_error(z, new[:, k], concept == k), *silence_errors(z, new, concept, k)]
    return mean(errors)


def others_than(concept: Tensor, new: Tensor, k: int) -> list[Tensor]:
    """Which images belong to each concept but k, (N,) each."""
    return [concept == other for other in range(new.shape[1]) if other != k]


def rms(values: Tensor) -> Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()


def mean(values: Sequence[float]) -> float:
    """Mean of some figures."""
    return sum(values) / len(values)
