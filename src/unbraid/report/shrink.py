"""Less of a page, where the file would be too large; the page says what is left out."""

from __future__ import annotations

from dataclasses import replace

from unbraid.report.view import Page
from unbraid.tables import count


def with_fewer_images(page: Page, n: int, usual: int) -> Page:
    """Keep the n strongest reference images of each channel.

    Args:
        page: with `usual` of them.
        n: how many to keep; if all, nothing is said.
        usual: how many there would be.
    """
    if n >= usual:
        return page
    note = (
        f"To keep the file small, pictures are small too, and {count(n, 'reference image')} of "
        f"each channel {'is' if n == 1 else 'are'} shown in place of {usual}."
    )
    return replace(
        page,
        channels=tuple(
            replace(
                section,
                rows=tuple(replace(row, shots=row.shots[:n]) for row in section.rows),
            )
            for section in page.channels
        ),
        notes=(*page.notes, note),
    )


def with_fewer_channels(page: Page, n: int) -> Page:
    """Show only the first n channels in full; if that is all, nothing is said."""
    if n >= page.n_divided:
        return page
    kept = page.channels[:n]
    numbers = {section.number for section in kept}
    note = (
        f"To keep the file small, only the {count(n, 'channel')} with the lowest cosines of "
        f"{page.n_divided:,} {'is' if n == 1 else 'are'} shown in full; the list below names all."
    )
    return replace(
        page,
        channels=kept,
        overview=tuple(replace(row, shown=row.number in numbers) for row in page.overview),
        pairs=tuple(replace(pair, shown=pair.channel in numbers) for pair in page.pairs),
        notes=(*page.notes, note),
    )
