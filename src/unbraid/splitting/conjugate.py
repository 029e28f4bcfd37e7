"""Steps of box-constrained least squares whose curvature is never written down.

    minimise  gradient.d + d.H.d / 2   over  0 <= mask + d <= 1

Conjugate gradients need products with the curvature H alone: two passages through the images each,
where to write it down takes as many as there are taps. All is in float32, which the caller makes up
for: it takes the gradient anew where a step has led. Shapes: N images, J taps.

Source: Hestenes and Stiefel 1952, J. Res. Nat. Bur. Standards 49(6), with an inverse of a similar
matrix to precondition (Concus, Golub and O'Leary 1976); bounds as in `box_solver`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unbraid.splitting.moments import products_of
from unbraid.splitting.silence import Images

Product = Callable[[Tensor], Tensor]  # H times a step, (J,) to (J,)

_PART = 0.01  # of the gradient that a step may leave: what it ends with is taken anew
_GUESSES = 8  # of bounds; two to four are usual
_LEFT_OUT = 0.05  # of what images bend a step on average: less than that hardly bends it
_MOST_TURNS = 40  # of conjugate gradients for one guess; one to five are usual


@dataclass(frozen=True)
class Common:
    """What the objectives of one channel have in common, in float32."""

    inputs: Tensor  # (N, J), times the channel's weights
    lengths: Tensor  # (N,), squared, of these
    held: Tensor  # (N,), float64: what the bias gives, which no mask reaches
    inverse: Tensor  # (J, J), of a curvature that is like all of theirs

    @classmethod
    def of(cls, images: Images, row: Tensor, gram: Tensor, counts: Tensor) -> Common | None:
        """From what images count (N,) and a quadratic (J, J); None where float32 cannot hold it.

        Of images that are more than taps every second, third or so stands for its neighbours.
        """
        if images.unit > 1 or not bool(counts.sum().isfinite()):
            return None
        inputs = images.rough[:, :-1] * row[:-1].float()
        lengths = inputs.square().sum(1)
        some = _telling(counts, lengths)
        some = some[:: max(1, len(some) // len(gram))]
        shares = counts[some]
        if len(some):
            shares = shares * (counts.sum() / shares.sum())
        rows = inputs[some]
        curvature = products_of(rows, rows * shares[:, None].float()).add_(gram)
        factor, fault = torch.linalg.cholesky_ex(curvature)
        if int(fault):
            return None
        inverse = torch.cholesky_inverse(factor)
        if not bool(inverse.sum().isfinite()):
            return None
        held = images.n_positions * row[-1]
        return cls(inputs, lengths, held, inverse)

    def respond(self, mask: Tensor) -> Tensor:
        """Pooled responses, (N,), of the masked channel."""
        return (self.inputs @ mask.float()).double() + self.held

    def gather(self, pull: Tensor) -> Tensor:
        """Sum over images of what pulls (N,) at their inputs times weights, (J,)."""
        most = pull.abs().amax().clamp(min=torch.finfo(pull.dtype).tiny)  # no overflow in float32
        return ((pull / most).float() @ self.inputs).double() * most

    def moves(self, mask: Tensor, gradient: Tensor) -> float:
        """How far the next step should move any tap of a mask, about."""
        start, gradient = mask.float(), gradient.float()
        free = _bounds(start, gradient) == 0
        reached = (start - self.inverse @ (gradient * free) * free).clamp(0, 1)
        return float((reached - start).abs().amax())

    def product(
        self, gram: Tensor, counts: Tensor, turns: Sequence[tuple[Tensor, Tensor]]
    ) -> Product:
        """Products with half a curvature: of a quadratic (J, J) and what images count (N,).

        Turns are vectors and what they meet, taken from either side, (J,) each. Images that bend a
        step little are left out, so that each product takes less than half of the time.
        """
        counts = counts.clamp(max=torch.finfo(torch.float32).max)
        most = float(counts.amax())
        some = _telling(counts, self.lengths)
        shares = (counts[some] / (most or 1.0)).float()
        inputs = self.inputs.index_select(0, some)
        both = [(one.float(), other.float()) for one, other in turns]

        def times(step: Tensor) -> Tensor:
            images = (inputs @ step).mul_(shares)
            product = torch.addmv(gram @ step, inputs.T, images, alpha=most)
            for one, other in both:
                product.add_(one, alpha=float(other @ step)).add_(other, alpha=float(one @ step))
            return product

        return times


def _telling(counts: Tensor, lengths: Tensor) -> Tensor:
    """Which images make the curvature, (n,), of what all count and their squared lengths, (N,).

    A strong image that stands for itself may bend it more than a weak one that stands for many.
    """
    bends = counts * lengths
    least = (_LEFT_OUT * bends.mean()).nan_to_num(0.0, 0.0)  # all, where float32 holds no length
    return (bends > least).nonzero()[:, 0]


def step_in_box(times: Product, inverse: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """Go from a mask to where the model is nearly least, (J,) float64.

    Guesses which taps lie at which bound, goes down with the others, and guesses again.
    """
    start, gradient = mask.float(), gradient.float()
    bound = _bounds(start, gradient)
    step, rest = torch.zeros_like(start), -gradient  # rest: where the model still falls
    least = -1.0
    for _ in range(_GUESSES):
        free = bound == 0
        to_bound = torch.where(free, 0.0, bound.clamp(min=0) - start - step)
        if bool(to_bound.any()):
            step, rest = step + to_bound, rest - times(to_bound)
        own, ahead = rest * free, (inverse @ (rest * free)) * free
        power, way = float(own @ ahead), ahead
        least = _PART**2 * power if least < 0 else least
        for _ in range(_MOST_TURNS):
            if not power > least:
                break
            turned = times(way)
            bend = float(way @ turned)
            if not power < bend * torch.finfo(way.dtype).max:  # flat, or no number, in float32
                break
            length = power / bend
            step, rest = step.add(way, alpha=length), rest.sub(turned, alpha=length)
            ahead = (inverse @ (rest * free)) * free
            before, power = power, float(rest @ ahead)
            way = ahead.add(way, alpha=power / before)
        reached = start + step
        beyond = (reached > 1).float() - (reached < 0).float()
        guess = torch.where(free, beyond, torch.where(bound * rest >= 0, bound, 0.0))
        if torch.equal(guess, bound):
            break
        bound = guess
    return (start + step).clamp(0, 1).double()


def _bounds(mask: Tensor, gradient: Tensor) -> Tensor:
    """Which taps lie at the upper bound (1) or lower (-1) and would go beyond, (J,)."""
    return ((mask >= 1) & (gradient < 0)).float() - ((mask <= 0) & (gradient > 0)).float()
