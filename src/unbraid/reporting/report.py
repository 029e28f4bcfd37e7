"""The report: one self-contained page on the channels that were found and split."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch.utils.data import Dataset

from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import count
from unbraid.reporting import charts
from unbraid.reporting.material import Material
from unbraid.reporting.pictures import LARGEST, Gallery, Look, Pictures
from unbraid.reporting.view import MAX_LISTED, N_IMAGES, Page, build_page
from unbraid.reporting.view import draw as draw_map
from unbraid.reporting.words import (
    ABSENT,
    bounded,
    isolate,
    number,
    ordinal,
    percent,
    significant,
    value,
)

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from unbraid.finding.findings import Findings
    from unbraid.finding.thresholds import Sensitivity
    from unbraid.measuring.results import Evaluation
    from unbraid.scanning.records import Scan
    from unbraid.splitting.splits import Split
    from unbraid.visualizing.features import Features


# Less of a page, where the file would be too large; the page says what is left out.


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


# The page as text: view, pictures, charts and template put together.


LIMIT = 10_000_000  # bytes of the file
# The room that pictures are given, generous first; the first with which the page fits is taken.
LOOKS = (
    Look(N_IMAGES, LARGEST, 75),
    Look(N_IMAGES, 72, 55),
    Look(N_IMAGES, 64, 40),
    Look(5, 64, 40),
    Look(3, 56, 35),
)
_FEW = 200  # lines of a list
_HERE = Path(__file__).parent
_TEMPLATES = _HERE / "templates"


def render(material: Material, *, dataset: Dataset[Any] | None, title: str | None) -> str:
    """Return the page, of at most `LIMIT` bytes; arguments as in `unbraid.report`."""
    page = build_page(material, has_images=dataset is not None, title=title)
    hang = cache(Gallery(page, material, dataset).hang)
    environment = _environment()
    text = ""
    for look, n, n_lines in _attempts(len(page.channels)):
        smaller = with_fewer_images(page, look.n_images, N_IMAGES)
        smaller = with_fewer_lines(with_fewer_channels(smaller, n), n_lines)
        text = _fill(environment, smaller, hang(look))
        if len(text.encode("utf-8", "backslashreplace")) <= LIMIT:
            break
    return text


def _attempts(n: int) -> Iterator[tuple[Look, int, int]]:
    """Room for pictures, number of channels in full and lines of a list, ever less.

    The last has one line and no channel in full; all else on the page is bounded.
    """
    yield from ((look, n, MAX_LISTED) for look in LOOKS)
    yield LOOKS[-1], n, _FEW
    while n > 0:
        n //= 2
        yield LOOKS[-1], n, _FEW
    n_lines = _FEW
    while n_lines > 1:
        n_lines //= 2
        yield LOOKS[-1], 0, n_lines


def _environment() -> Environment:
    """Prepare the template, and to draw each chart once, however often the page is filled."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "value": value,
        "significant": significant,
        "ordinal": ordinal,
        "percent": percent,
        "isolate": isolate,
        "bounded": bounded,
    }
    charts_by_name: dict[str, Callable[..., Markup]] = {
        "draw_densities": charts.densities,
        "draw_bars": charts.draw_bars,
        "draw_ridges": charts.ridges,
        "draw_scatter": charts.scatter,
        "draw_masks": charts.draw_masks,
        "draw_map": draw_map,
    }
    environment.globals |= {name: cache(draw) for name, draw in charts_by_name.items()}
    environment.globals |= {"count": count, "absent": ABSENT}
    return environment


def _fill(environment: Environment, page: Page, pictures: Pictures) -> str:
    """Put a page's data into the template."""
    style, script = _inline("style.css"), _inline("script.js")
    return environment.get_template("page.html.j2").render(
        page=page,
        pictures=pictures,
        style=style,
        script=script,
        style_hash=_hash_of(style),
        script_hash=_hash_of(script),
    )


def _inline(name: str) -> Markup:
    """Read what stands in the page itself."""
    return Markup((_HERE / name).read_text(encoding="utf-8"))


def _hash_of(content: str) -> str:
    """Name a style or script in a Content-Security-Policy, so that no other one is let in."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


# The report: one self-contained page on the channels that were found and split.


@in_plain_modes
def report(
    path: str | Path,
    *,
    scan: Scan,
    found: Findings,
    split: Split | None = None,
    evaluation: Evaluation | None = None,
    train_scan: Scan | None = None,
    sensitivity: Sensitivity | None = None,
    maps: Scan | None = None,
    features: Features | None = None,
    dataset: Dataset[Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write one HTML file that shows what was found, how it was split and how well.

    The file has at most 10 MB: of many channels it shows fewer and smaller pictures, or not all
    channels in full, and says so. It holds all it needs, pictures included, and asks nothing of any
    network. What an argument left out would have contributed is left out, and the page says so.

    Args:
        path: the file to write; a folder that is missing is made.
        scan: of the validation images; reference images are chosen from it.
        found: the polysemantic channels, perhaps none.
        split: their concept channels, None if there are none.
        evaluation: the split's measures on validation images.
        train_scan: of the training images, for the input channels that feed each concept.
        sensitivity: what other thresholds would find.
        maps: of the same images as `scan`, or some of them, with positions: for where in its
            reference images a channel answers. Not needed if `scan` itself has positions.
        features: images made to excite the channels, from `unbraid.visualize`.
        dataset: the images that `scan` was made of, for their pictures; where it has ids, their
            order may have changed.
        title: the page's heading; by default it names the layer.

    Returns:
        The path of the file.

    Raises:
        UsageError: scans, split, evaluation, features and data set do not belong together.
        RunError: the file cannot be written, or a scan is damaged.
    """
    from unbraid.base.arguments import as_kind, as_path
    from unbraid.base.files import write_whole
    from unbraid.finding.findings import Findings
    from unbraid.reporting.material import Material
    from unbraid.scanning.records import Scan
    from unbraid.scanning.scan import as_scanned

    file = as_path("path", path)
    as_kind("scan", scan, Scan)
    as_kind("found", found, Findings)
    material = Material(scan, found, split, evaluation, train_scan, sensitivity, features, maps)
    material.refuse_strangers()
    images = None if dataset is None else as_scanned(dataset, scan)
    page = render(material, dataset=images, title=title)
    # A folder's name may hold bytes that are no text; they are spelt out, not fatal.
    write_whole(file, page.encode("utf-8", "backslashreplace"))
    return file
