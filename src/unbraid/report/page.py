"""The page as text: view, pictures, charts and template put together."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch.utils.data import Dataset

from unbraid.report import bars, charts, maps, masks, spread_charts, text
from unbraid.report.gallery import LARGEST, Gallery, Pictures
from unbraid.report.material import Material
from unbraid.report.pairs import MAX_LISTED
from unbraid.report.pictures import Look
from unbraid.report.shrink import with_fewer_channels, with_fewer_images, with_fewer_lines
from unbraid.report.view import N_IMAGES, Page, build_page
from unbraid.tables import count

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
        "number": text.number,
        "value": text.value,
        "significant": text.significant,
        "ordinal": text.ordinal,
        "percent": text.percent,
        "isolate": text.isolate,
        "bounded": text.bounded,
    }
    charts_by_name: dict[str, Callable[..., Markup]] = {
        "draw_densities": charts.densities,
        "draw_bars": bars.draw_bars,
        "draw_ridges": spread_charts.ridges,
        "draw_scatter": spread_charts.scatter,
        "draw_masks": masks.draw_masks,
        "draw_map": maps.draw,
    }
    environment.globals |= {name: cache(draw) for name, draw in charts_by_name.items()}
    environment.globals |= {"count": count, "absent": text.ABSENT}
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
