"""The page as text: view, pictures, charts and template put together."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch.utils.data import Dataset

from unbraid.report import charts, maps, text
from unbraid.report.material import Material
from unbraid.report.pictures import Picture, pictures, refuse_other_images
from unbraid.report.view import Page, build_page
from unbraid.tables import count

_HERE = Path(__file__).parent
_TEMPLATES = _HERE / "templates"


def render(material: Material, *, dataset: Dataset[Any] | None, title: str | None) -> str:
    """Return the page; arguments as in `unbraid.report`."""
    page = build_page(material, has_images=dataset is not None, title=title)
    return fill_template(page, None if dataset is None else _pictures_of(page, dataset))


def fill_template(page: Page, images: dict[int, Picture | None] | None) -> str:
    """Put a page's data into the template.

    Args:
        page: what to show.
        images: pictures by place in the data set; None for a page without pictures.
    """
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
        "percent": text.percent,
        "isolate": text.isolate,
    }
    environment.globals |= {
        "count": count,
        "draw": charts,
        "draw_map": maps.draw,
        "absent": text.ABSENT,
    }
    style, script = _inline("style.css"), _inline("script.js")
    return environment.get_template("page.html.j2").render(
        page=page,
        images=images,
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


def _pictures_of(page: Page, dataset: Dataset[Any]) -> dict[int, Picture | None]:
    shots = [shot for section in page.channels for row in section.rows for shot in row.shots]
    refuse_other_images(dataset, {shot.index: shot.label for shot in shots})
    return pictures(dataset, dict.fromkeys(shot.index for shot in shots))
