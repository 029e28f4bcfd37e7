"""What `find` returns: polysemantic channels, their pairs of classes and their concepts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unbraid.errors import UnbraidError
from unbraid.files import write_whole
from unbraid.tables import align, count

if TYPE_CHECKING:
    import pandas as pd

Concept = tuple[int, ...]  # the classes that share one cause

_COLUMNS = ("channel", "class1", "class2", "cosine", "use1", "use2", "name1", "name2")


@dataclass(frozen=True)
class Pair:
    """Two classes that use one channel for different reasons."""

    channel: int
    class1: int
    class2: int
    cosine: float  # of their averaged relevance vectors
    use1: float  # fraction of the images of class1 in which the channel matters
    use2: float


@dataclass(frozen=True)
class Findings:
    """The polysemantic channels of a layer.

    `concepts` divides the classes that use a channel into groups; `pairs` is the published list,
    lowest cosine first.
    """

    tau: float
    p: float
    gamma: float
    pairs: tuple[Pair, ...]
    concepts: dict[int, tuple[Concept, ...]]
    class_names: tuple[str, ...]
    hint: str  # if nothing was found, which thresholds come nearest
    layer: str  # that the channels belong to
    weights: str  # hash of the network's weights

    @property
    def channels(self) -> tuple[int, ...]:
        """The polysemantic channels, in order."""
        return tuple(sorted(self.concepts))

    @property
    def classes(self) -> tuple[int, ...]:
        """All classes of all concepts: those that a scan with positions needs."""
        every = {c for groups in self.concepts.values() for group in groups for c in group}
        return tuple(sorted(every))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.pairs)

    def __str__(self) -> str:
        """Show the pairs as a table, or say what comes nearest to a finding."""
        head = (
            f"{count(len(self.pairs), 'pair')} of classes in "
            f"{count(len(self.concepts), 'polysemantic channel')} "
            f"(tau {self.tau:g}, p {self.p:g}, gamma {self.gamma:g})"
        )
        if not self.pairs:
            return f"{head}. {self.hint}".rstrip()
        rows = [("channel", "cosine", "class 1", "used in", "class 2", "used in")]
        rows += [
            (
                str(pair.channel),
                f"{pair.cosine:.4f}",
                self.name(pair.class1),
                f"{pair.use1:.0%}",
                self.name(pair.class2),
                f"{pair.use2:.0%}",
            )
            for pair in self.pairs
        ]
        return f"{head}\n{align(rows)}"

    def name(self, label: int) -> str:
        """Return the name of a class, or its number where it has none."""
        known = label < len(self.class_names) and self.class_names[label]
        return self.class_names[label] if known else str(label)

    def rows(self) -> Iterator[tuple[int, int, int, float, float, float, str, str]]:
        """Give one row per pair, in the order of the CSV columns."""
        for pair in self.pairs:
            names = (self.name(pair.class1), self.name(pair.class2))
            yield (*vars(pair).values(), *names)

    def to_csv(self, path: str | Path) -> None:
        """Write the pairs: channel, class1, class2, cosine, use1, use2, name1, name2."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        writer.writerows(self.rows())
        write_whole(Path(path), text.getvalue().encode())

    def to_pandas(self) -> pd.DataFrame:
        """Return the pairs as a DataFrame with the columns of the CSV file.

        Raises:
            UnbraidError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise UnbraidError("pandas is not installed; pip install 'unbraid[pandas]'.") from None
        return pd.DataFrame(list(self.rows()), columns=list(_COLUMNS))
