"""One page on what an edit changed: accuracy by class, confusions, images that go elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from unbraid.measuring.before_after import BeforeAfter
from unbraid.reporting.pictures import Sight, encode, read_pictures
from unbraid.reporting.report import hash_of, page_environment, read_part

_MOST_ROWS = 200  # of classes and of confusions
_MOST_PICTURES = 48
_SIDE, _QUALITY = 128, 80


def before_after_page(
    changes: BeforeAfter,
    *,
    title: str,
    edits: Sequence[tuple[str, str, str]],
    dataset: Dataset[Any],
    sight: Sight | None,
    predicted: bool,
    files: Sequence[str],
) -> str:
    """Return the page.

    Args:
        changes: what was measured.
        title: of the run.
        edits: concept channel, its concept, and what was done to it.
        dataset: the images, for pictures of those that are taken for another class.
        sight: the part of a picture that the network sees, if known.
        predicted: whether labels are the network's own.
        files: names of the network's files beside the page.
    """
    shown = changes.flips[:_MOST_PICTURES]
    pictures = read_pictures(
        dataset,
        {flip.index: flip.label for flip in shown},
        lambda image: encode(sight(image) if sight else image, _SIDE, _QUALITY),
    )
    style = read_part("style.css")
    moved = [own for own in changes.classes if own.before != own.after]
    return (
        page_environment()
        .get_template("before_after.html.j2")
        .render(
            changes=changes,
            pictures=pictures,
            title=title,
            edits=edits,
            shown=shown,
            classes=moved[:_MOST_ROWS],
            confusions=changes.confusions[:_MOST_ROWS],
            most_rows=_MOST_ROWS,
            n_moved=len(moved),
            predicted=predicted,
            files=files,
            style=style,
            style_hash=hash_of(style),
        )
    )
