"""Divide a channel's weights among its concepts by box-constrained least squares.

Each concept k gets a mask m_k in [0, 1] over the taps; its channel z_k should answer to the images
of k as the original z does, and to those of the other concepts not at all. With errors relative to
Z_l, the original's rms on the images of concept l, that is (METHOD.md section 5)

    sum over n in k of (z_k[n] - z[n])^2 / (N_k Z_k^2)
    + sum over l != k, n in l of z_k[n]^2 / (N_l Z_l^2) + lambda |m_k - prior_k|^2

to be minimised: convex, with one answer, and a function of the concepts' second moments alone.
The bias is treated as one more tap, fed by the number of positions, whose mask is held at one.
Shapes: N images, J taps, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.background import Term, background_of, background_term
from unbraid.box import kkt_residual, solve_box
from unbraid.findings import Concept
from unbraid.gram import Gram, Rows, add, leading, scale
from unbraid.moments import ConceptMoment, Moments, concept_moment, read_moments
from unbraid.records import Records, Scan
from unbraid.threads import side_by_side


@dataclass(frozen=True)
class Fit:
    """Masks of one channel, and how they were found."""

    masks: Tensor  # (K, J), float64
    prior: Tensor  # (K, J)
    penalty: float  # lambda, in units of the mean curvature
    kkt_residual: float


@dataclass(frozen=True)
class Problem:
    """The quadratic problems of one channel: K objectives that share their curvature."""

    gram: Gram  # (J, J), without penalty
    linear: Tensor  # (K, J), without penalty
    prior: Tensor  # (K, J)
    constant: Tensor  # (K,)

    def plus(self, term: Term) -> Problem:
        """Ask for something more, of every mask alike."""
        return Problem(
            gram=add([self.gram, Rows(term.rows)], [1, 1]),
            linear=self.linear + term.linear,
            prior=self.prior,
            constant=self.constant + term.constant,
        )

    def loss(self, masks: Tensor) -> Tensor:
        """Objectives without penalty, (K,): squared mimic and silence errors, and so on."""
        return (masks * (self.gram.times(masks) - 2 * self.linear)).sum(1) + self.constant


def fit_least_squares(
    scan: Scan,
    concepts: Mapping[int, Sequence[Concept]],
    penalty: float,
    sample: Records,
    start: Mapping[int, Tensor] | None = None,
) -> dict[int, Fit]:
    """Fit the masks of all channels.

    Args:
        scan: of the training images.
        concepts: per channel.
        penalty: lambda, in units of the mean curvature of the problem.
        sample: of all training images, from `sample_images`.
        start: per channel, masks (K, J) to begin with; the answer does not depend on them.

    Returns:
        One Fit per channel.
    """
    fits: dict[int, Fit] = {}
    for channels, moments in read_moments(scan, concepts):

        def fit(channel: int, moments: Moments = moments) -> Fit:
            own, row = concepts[channel], augmented_row(scan, channel)
            background = background_of(scan, sample, channel, own)
            term = background_term(background, row, len(own))
            group = scan.layer.group_of(channel)
            problem = pose(row, [concept_moment(moments, group, c) for c in own], term)
            return solve(problem, penalty, (start or {}).get(channel))

        fits.update(zip(channels, side_by_side(fit, channels), strict=True))
    return fits


def augmented_row(scan: Scan, channel: int) -> Tensor:
    """Put a channel's bias behind its weights: (J + 1,), float64."""
    return torch.cat([scan.weight[channel], scan.bias[channel, None]]).double()


def pose(row: Tensor, moments: Sequence[ConceptMoment], background: Term | None = None) -> Problem:
    """Write down the problems of one channel.

    Args:
        row: (J + 1,), the channel's weights and bias.
        moments: of each concept.
        background: what is asked of images of no concept.
    """
    tiny = torch.finfo(row.dtype).tiny
    taps, bias = slice(None, -1), -1
    silenced, held = row.clone(), torch.zeros_like(row)  # what masks can reach, and the bias
    silenced[bias], held[bias] = 0, row[bias]
    by_taps = torch.stack([m.times(silenced) for m in moments]) * row  # (K, J + 1)
    by_bias = torch.stack([m.times(held) for m in moments]) * row
    power = (by_taps + by_bias).sum(1)  # Z_k squared
    inverse = torch.where(power > tiny, 1 / power, 0)  # a concept that never moves it says nothing
    own = by_taps[:, taps] * inverse[:, None]
    pull = by_bias[:, taps] * inverse[:, None]  # of the bias, which no mask can silence
    everywhere, rest = pull.sum(0), by_bias[:, bias] * inverse
    one = torch.zeros_like(row)
    one[bias] = 1  # times the number of positions: proportional to the ARVs, and to their squares
    weighted = torch.stack([m.times(one) for m in moments])
    strength = (weighted[:, taps] * row[taps] / weighted[:, bias, None]).abs()
    parts = [part for moment in moments for part in moment.parts]
    weights = [
        float(i) / m.n_images for m, i in zip(moments, inverse, strict=True) for _ in m.parts
    ]
    problem = Problem(
        gram=scale(leading(add(parts, weights), len(row) - 1), row[taps]),
        linear=own - (everywhere - pull),
        prior=strength / strength.sum(0).clamp(min=tiny),
        constant=own.sum(1) + rest.sum() - rest,
    )
    return problem if background is None else problem.plus(background)


def solve(problem: Problem, penalty: float, start: Tensor | None = None) -> Fit:
    """Solve the problems of one channel, from the prior or a nearby answer."""
    ridge = penalty * float(problem.gram.diagonal().mean())
    ridge = max(ridge, torch.finfo(torch.float64).tiny)  # a channel that never answers
    linear = problem.linear + ridge * problem.prior
    begin = problem.prior if start is None else start.to(problem.prior)
    masks = solve_box(problem.gram, ridge, linear, begin)
    residual = kkt_residual(problem.gram, ridge, linear, masks).max()
    return Fit(masks, problem.prior, penalty, float(residual))
