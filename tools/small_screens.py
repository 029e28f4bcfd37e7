"""For MkDocs: pictures, tables and commands that can be read where they do not fit.

A picture leads to itself, so that a tap enlarges it. Where a line breaks, options and names
stay whole.
"""

from __future__ import annotations

import re
from typing import Any

_PICTURE = re.compile(r'(?<=<p>)<img [^>]*?src="(?P<at>[^"]+)"[^>]*>(?=</p>)')
_TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
_FIRST_HEAD = re.compile(r"<th(?=[ >])")
_FIRST_CELL = re.compile(r"<tr>\s*<td[^>]*>(.*?)</td>", re.DOTALL)
_CODE = re.compile(r"(?<!<span></span>)<code>(?P<text>[^<]*)</code>")
_AFTER = re.compile(r"([/_.,=:])(?=\w)")  # where long code may break
_OPTION = re.compile(r"(?<!\S)--?\w[\w-]*")
_SHELL = re.compile(r'(?<=<div class="language-sh highlight">).*?(?=</div>)', re.DOTALL)
_HYPHENED = re.compile(r"(?<=[>\s])-?(?:-|\w[\w./]*-)[\w./-]{1,20}(?=[<\s])")
_GOES_ON = re.compile(r'(?:<span class="w"> +</span>| +)<span class="se">\\</span>(?=\n)')
_TAG = re.compile(r"<[^>]*>")
_WHOLE = r'<span class="whole">\g<0></span>'
SHORT = 24  # characters of code in a cell that stay in one line
LONG = 24  # characters of a first cell that get a column of more than a word


def on_page_content(html: str, **_about: Any) -> str:
    """Change a page's HTML."""
    html = _PICTURE.sub(r'<a class="picture" href="\g<at>">\g<0></a>', html)
    html = _TABLE.sub(lambda found: _table(found[0]), html)
    html = _CODE.sub(_options, html)
    return _SHELL.sub(lambda found: _shell(found[0]), html)


def _table(html: str) -> str:
    if any(len(_TAG.sub("", cell)) > LONG for cell in _FIRST_CELL.findall(html)):
        html = _FIRST_HEAD.sub('<th class="wide"', html, count=1)
    return _CODE.sub(_code, html)


def _options(found: re.Match[str]) -> str:
    return f"<code>{_OPTION.sub(_WHOLE, found['text'])}</code>"


def _code(found: re.Match[str]) -> str:
    if len(found["text"]) <= SHORT:
        return found[0]
    text = _AFTER.sub(r"\1<wbr>", found["text"])
    return f'<code class="long">{text}</code>'


def _shell(html: str) -> str:
    html = _GOES_ON.sub(r'<span class="whole"> <span class="se">\\</span></span>', html)
    return _HYPHENED.sub(_WHOLE, html)
