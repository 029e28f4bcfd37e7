"""Densities of few or many values, and the axis that holds several of them to their ends.

The page and the figures for papers draw both from here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MAX_VALUES = 2000  # images that a density is estimated from; more would not change the curve
_REACH = 3.5  # kernel widths beyond the data; there a kernel is down to 0.2 % of its peak


def shared_grid(groups: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Lay n evenly spaced points over all groups, and as far beyond as their densities reach.

    Args:
        groups: values of each density that is to be drawn over it, at least one in each.
        n: number of points, more than 2 * 3.5 + 1.

    >>> few = np.array([0.0, 1.0])
    >>> grid = shared_grid([few], 121)
    >>> grid[[0, -1]].round(2).tolist(), density(few, grid)[[0, -1]].round(2).tolist()
    ([-2.15, 3.15], [0.0, 0.0])
    """
    ends = [(float(values.min()), float(values.max()), _width(_some(values))) for values in groups]
    low, high = _reach(ends, 0.0)
    if high == low:  # one value only
        margin = 0.05 * abs(high) or 1.0
        return np.linspace(low - margin, high + margin, n)
    # No kernel is narrower than a step, which is longer the farther the grid reaches.
    return np.linspace(*_reach(ends, (high - low) / (n - 1 - 2 * _REACH)), n)


def _reach(ends: Sequence[tuple[float, float, float]], step: float) -> tuple[float, float]:
    return (
        min(low - _REACH * max(width, step) for low, _, width in ends),
        max(high + _REACH * max(width, step) for _, high, width in ends),
    )


def density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Estimate a density by a Gaussian kernel of Scott's width, scaled to a peak of 1.

    The kernel is never narrower than a step of the grid, where it would slip through between two
    points; so a single value, or many equal ones, become a spike.

    Args:
        values: (N,), N at least 1.
        grid: evenly spaced points.

    Returns:
        The shape of `grid`.

    >>> density(np.array([2.0, 2.0]), np.linspace(0, 4, 5)).round(2).tolist()
    [0.14, 0.61, 1.0, 0.61, 0.14]
    """
    values = _some(values)
    width = max(_width(values), float(grid[1] - grid[0]))
    heights = np.exp(-0.5 * ((grid[:, None] - values) / width) ** 2).sum(1)
    return np.asarray(heights / heights.max())


def _some(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, len(values) // _MAX_VALUES)]


def _width(values: np.ndarray) -> float:
    """Scott's width of a kernel."""
    return float(values.std(ddof=1)) * len(values) ** -0.2 if len(values) > 1 else 0.0
