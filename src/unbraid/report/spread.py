"""What the page shows of single images' responses: a ridge per class, and concept against concept.

Nothing here writes markup. Shapes: N images of a channel's concepts, K concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from unbraid.findings import Findings
from unbraid.report.channels import ConceptView
from unbraid.report.density import density, shared_grid
from unbraid.report.text import bounded

if TYPE_CHECKING:
    from unbraid.evaluation import Responses

N_CLASSES = 12  # classes with a ridge of their own
N_POINTS = 240  # of a scatter plot; spread evenly over each class's images
N_SHADES = 3  # of a concept's colour
_N_AXES = 3  # concepts of which every two are set against each other
_N_GRID = 81


@dataclass(frozen=True, eq=False)
class Ridge:
    """How the original and each concept channel answer to one class."""

    name: str
    concept: ConceptView
    n_images: int
    means: tuple[float, ...]  # of the original channel, then the concept channels, (1 + K,)
    original: np.ndarray  # heights over the grid, peak 1
    concepts: tuple[np.ndarray, ...]  # (K,)


@dataclass(frozen=True, eq=False)
class Ridges:
    """Ridges of a channel's classes over one axis."""

    concepts: tuple[ConceptView, ...]
    grid: np.ndarray
    rows: tuple[Ridge, ...]
    n_left_out: int  # classes


@dataclass(frozen=True, eq=False)
class Cloud:
    """The images of one class."""

    name: str
    concept: ConceptView
    shade: int
    n_images: int  # of which some are points
    points: np.ndarray  # (n, K), pooled pre-activation of the concept channels


@dataclass(frozen=True, eq=False)
class Scatter:
    """Concept channels against each other."""

    axes: tuple[tuple[int, int], ...]  # which concept channels
    concepts: tuple[ConceptView, ...]
    clouds: tuple[Cloud, ...]
    low: float  # of both axes, which have one scale
    high: float


def ridges(
    found: Findings, views: Sequence[ConceptView], answers: Responses, groups: Sequence[np.ndarray]
) -> Ridges:
    """Estimate, class by class, how a channel and its concept channels answer.

    Args:
        found: names the classes.
        views: of the concepts.
        answers: to the images of the concepts.
        groups: from `by_class`.
    """
    columns = [z.double().numpy() for z in (answers.original, *answers.concepts.T)]
    shown = _few_of_each(answers, groups, max(1, N_CLASSES // len(views)))
    grid = shared_grid([z[images] for images in shown for z in columns], _N_GRID)
    rows = []
    for images in shown:
        original, *concepts = (density(z[images], grid) for z in columns)
        rows.append(
            Ridge(
                name=_name(found, answers, images),
                concept=views[int(answers.concept[images[0]])],
                n_images=len(images),
                means=tuple(float(z[images].mean()) for z in columns),
                original=original,
                concepts=tuple(concepts),
            )
        )
    return Ridges(tuple(views), grid, tuple(rows), len(groups) - len(shown))


def scatter(
    found: Findings, views: Sequence[ConceptView], answers: Responses, groups: Sequence[np.ndarray]
) -> Scatter:
    """Set the concept channels' responses to each image against each other; as `ridges`."""
    concepts = answers.concepts.double().numpy()
    n_points = max(1, N_POINTS // max(1, len(groups)))
    clouds, shades = [], dict.fromkeys(range(len(views)), 0)
    for images in groups:
        k = int(answers.concept[images[0]])
        clouds.append(
            Cloud(
                name=_name(found, answers, images),
                concept=views[k],
                shade=shades[k] % N_SHADES,
                n_images=len(images),
                points=concepts[images[_evenly(len(images), n_points)]],
            )
        )
        shades[k] += 1
    shown = np.concatenate([cloud.points.ravel() for cloud in clouds])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes = tuple(combinations(range(min(len(views), _N_AXES)), 2))
    return Scatter(axes, tuple(views), tuple(clouds), low - margin, high + margin)


def by_class(answers: Responses) -> list[np.ndarray]:
    """Sort images by concept and class, or by concept alone where clusters cut through classes.

    Returns:
        For each, which of the N images; by concept, those with most images first.
    """
    concept, label = answers.concept.numpy(), answers.label.numpy()
    pairs = np.stack([concept, label], axis=1)
    keys, inverse, sizes = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    order = sorted(range(len(keys)), key=lambda n: (keys[n][0], -sizes[n], keys[n][1]))
    return [np.flatnonzero(inverse.reshape(-1) == n) for n in order]


def _few_of_each(answers: Responses, groups: Sequence[np.ndarray], n: int) -> list[np.ndarray]:
    """Keep the first n groups of each concept."""
    owners = [int(answers.concept[images[0]]) for images in groups]
    return [group for place, group in enumerate(groups) if owners[:place].count(owners[place]) < n]


def _evenly(n: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, n - 1, min(n, wanted)).round().astype(np.int64))


def _name(found: Findings, answers: Responses, images: np.ndarray) -> str:
    return bounded(found.name(int(answers.label[images[0]])))
