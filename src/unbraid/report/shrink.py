"""Less of a page, where the file would be too large; the page says what is left out."""

from __future__ import annotations

from dataclasses import replace

from unbraid.report.pairs import MAX_LISTED
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
                rows=tuple(row.with_fewer(n) for row in section.rows),
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
    which = f"only the {count(n, 'channel')} with the lowest cosines" if n else "none"
    note = (
        f"To keep the file small, {which} of {page.n_divided:,} "
        f"{'are' if n > 1 else 'is'} shown in full."
    )
    return replace(
        page,
        channels=kept,
        overview=tuple(replace(row, shown=row.number in numbers) for row in page.overview),
        pairs=tuple(replace(pair, shown=pair.channel in numbers) for pair in page.pairs),
        notes=(*page.notes, note),
    )


def with_fewer_lines(page: Page, n: int = MAX_LISTED) -> Page:
    """Keep the first n lines of the lists of channels and of pairs, and say what is left out.

    Channels shown in full stay in the list.
    """
    first = sorted(page.overview, key=lambda row: not row.shown)[:n]
    listed = {row.number for row in first}
    notes = []
    if n < page.n_found:
        notes.append(
            f"The list of channels has {n:,} of {page.n_found:,}, those shown in full and then "
            "those with the lowest cosines."
        )
    if n < page.n_pairs:
        notes.append(
            f"The list of pairs has the {n:,} with the lowest cosines of {page.n_pairs:,}; "
            f"the other {page.n_pairs - n:,} are in findings.csv, which a run leaves beside its "
            "report and Findings.to_csv writes."
        )
    return replace(
        page,
        overview=tuple(row for row in page.overview if row.number in listed),
        pairs=page.pairs[:n],
        notes=(*page.notes, *notes),
    )
