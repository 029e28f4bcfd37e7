"""For MkDocs: a word of the glossary is a link to it where it first stands on a page."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import Files

GLOSSARY = "glossary.md"
# Words by heading of the glossary; those that everyone knows, such as channel, are left out.
WORDS = {
    "tap": "taps?",
    "pre-activation": "pre-activations?",
    "logit": "logits?",
    "pooled-input": "pooled inputs?",
    "reference-images": "reference images",
    "polysemantic-channel": "polysemantic",
    "relevance": "relevance",
    "arv": "ARVs?|averaged relevance vectors?",
    "cosine": "cosines?",
    "tau-p-gamma": "tau|gamma",
    "mask": "masks?",
    "concept-channel": "concept channels?",
    "residual-channel": "residual channels?",
    "rest-channel": "rest channels?",
    "gate-clamp": "gates?|clamps?",
    "circuit": "circuits?",
    "published-rule-rho": "published rule|rho",
    "mimic-error": "mimic errors?",
    "silence-error": "silence errors?",
    "separation-error": "separation errors?",
    "retention": "retention",
    "auroc": "AUROC",
    "r-precision": "R-precision",
    "positive-activity": "positive activity",
    "coverage": "coverage",
    "explained-share": "explained share",
    "monosemanticity-clarity": "monosemanticity",
}
_TAG = re.compile(r"(<[^>]*>)")
_OPEN = re.compile(r"<(a|code|pre|h[1-6]|th|svg|script|style)\b")
_CLOSE = re.compile(r"</(a|code|pre|h[1-6]|th|svg|script|style)>")
_ANY = re.compile(
    "|".join(
        rf"(?P<_{number}>(?<![\w.=-])(?:{word})(?![\w=-]))"
        for number, word in sorted(enumerate(WORDS.values()), key=lambda pair: -len(pair[1]))
    ),
    re.IGNORECASE,
)
_ANCHORS = tuple(WORDS)


def on_page_content(html: str, *, page: Any, files: Files, **_about: Any) -> str:
    """Link the first of each word; pages made from docstrings and the glossary have none."""
    glossary = files.get_file_from_path(GLOSSARY)
    if glossary is None or page.file == glossary or "doc-contents" in html:
        return html
    return linked(html, glossary.url_relative_to(page.file))


def linked(html: str, address: str) -> str:
    """Put links into the text of a page, but not into links, code and headings."""
    left = {anchor for anchor in WORDS if f"{address}#{anchor}" not in html}

    def link(found: re.Match[str]) -> str:
        anchor = _ANCHORS[int(str(found.lastgroup)[1:])]
        if anchor not in left:
            return found[0]
        left.discard(anchor)
        return f'<a class="term" href="{address}#{anchor}">{found[0]}</a>'

    depth, parts = 0, []
    for part in _TAG.split(html):
        if part.startswith("<"):
            depth += bool(_OPEN.match(part)) - bool(_CLOSE.match(part))
        elif not depth:
            part = _ANY.sub(link, part)
        parts.append(part)
    return "".join(parts)
