"""What `find` is asked for on the command line; no torch in here, so that help comes at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Finding:
    """The arguments of `unbraid.find` but tau.

    Args:
        p: Fraction of a class's images in which a channel matters.
        gamma: Cosine below which two classes have different reasons.
        concepts: What concepts are made of: classes; clusters of images, which need no labels; or
            whole, classes and clusters of what else excites a channel. By default classes, and
            clusters where `unbraid run` has no labels.
    """

    p: float = 0.75
    gamma: float = 0.5
    concepts: Literal["classes", "clusters", "whole"] | None = None

    def asked(self, *, labelled: bool = True) -> dict[str, Any]:
        """The arguments by name, those of `find`."""
        usual: Literal["classes", "clusters"] = "classes" if labelled else "clusters"
        return vars(self) | {"concepts": self.concepts or usual}
