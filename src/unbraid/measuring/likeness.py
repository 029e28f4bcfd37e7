"""What `measure_semantics` returns: how alike the images are that excite channels."""

from __future__ import annotations

from dataclasses import dataclass

from unbraid.base.tables import Table, Tabular


@dataclass(frozen=True)
class Likeness:
    """How alike the images are that excite one channel; see "Evaluate" in docs/method.md."""

    monosemanticity: float  # mean cosine of pairs of images, weighted by its responses to both
    clarity: float  # mean cosine of pairs of its top images


@dataclass(frozen=True)
class ChannelSemantics:
    """A split channel beside its concept channels, as an encoder sees their images; or NaN."""

    encoder: str  # its name
    n_images: int
    n_top: int  # top images of each channel, for clarity and PURE's distances
    positions: bool  # whether responses were rectified position by position
    crops: bool  # whether distances are of the parts of images where concept channels respond
    original: Likeness
    concepts: tuple[Likeness, ...]
    within: float  # PURE's mean distance of top images of the same concept channel
    between: float  # and of different ones, both in the encoder's unit


@dataclass(frozen=True)
class Semantics(Tabular):
    """Semantic measures of all split channels, by channel.

    Attributes:
        channels: by channel, monosemanticity and clarity of the whole channel and of each concept
            channel (at most 1), and PURE's distances of top images between and within concept
            channels.
    """

    channels: dict[int, ChannelSemantics]

    def table(self) -> Table:
        """Show the measures, a row per channel and concept channel."""
        rows = [("channel", "", "monosemanticity", "clarity", "within", "between")]
        for channel, one in self.channels.items():
            for k, like in enumerate((one.original, *one.concepts)):
                name = ("", f"concept {k - 1}") if k else (str(channel), "original")
                distances = ("", "") if k else (f"{one.within:.3f}", f"{one.between:.3f}")
                rows.append(
                    (*name, f"{like.monosemanticity:.3f}", f"{like.clarity:.3f}", *distances)
                )
        caption = "How alike the images are that channels answer to"
        return Table(rows, caption=caption, all_in="Semantics.channels has all")
