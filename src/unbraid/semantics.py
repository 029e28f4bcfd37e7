"""What `measure_semantics` returns: how alike the images are that channels answer to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unbraid.strict import build
from unbraid.tables import align


@dataclass(frozen=True)
class Likeness:
    """How alike the images are that one channel answers to; METHOD.md section 6 defines it."""

    monosemanticity: float  # mean cosine of pairs of images, weighted by what it answers to both
    clarity: float  # mean cosine of pairs of its top images


@dataclass(frozen=True)
class ChannelSemantics:
    """One split channel beside its concept channels, as an image encoder sees their images.

    A figure that cannot be computed is NaN.
    """

    encoder: str  # its name
    n_images: int
    n_top: int  # top images of each channel, for clarity and PURE's distances
    positions: bool  # whether answers were rectified position by position
    crops: bool  # whether distances are of the parts of images where concept channels answer
    original: Likeness
    concepts: tuple[Likeness, ...]
    within: float  # PURE's mean distance of top images of the same concept channel
    between: float  # and of different ones, both in the encoder's unit

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChannelSemantics:
        """Read what evaluation.json holds.

        Raises:
            ValueError: an entry is missing or of another kind.
        """
        return build(cls, values, null_figures=True)


@dataclass(frozen=True)
class Semantics:
    """Semantic measures of all split channels, by channel."""

    channels: dict[int, ChannelSemantics]

    def __str__(self) -> str:
        """Show the measures as a table, a row per channel and concept channel."""
        head = ("channel", "", "monosemanticity", "clarity", "within", "between")
        rows: list[tuple[str, ...]] = [head]
        for channel, one in self.channels.items():
            distances = (f"{one.within:.3f}", f"{one.between:.3f}")
            for k, like in enumerate([one.original, *one.concepts]):
                rows.append(
                    (
                        "" if k else str(channel),
                        f"concept {k - 1}" if k else "original",
                        f"{like.monosemanticity:.3f}",
                        f"{like.clarity:.3f}",
                        *(("", "") if k else distances),
                    )
                )
        return align(rows)
