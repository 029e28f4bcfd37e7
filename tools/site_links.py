"""For MkDocs: what the docs link to outside their folder, such as the notebook, goes with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_OUTSIDE = re.compile(r"(?<=\]\()\.\./(?P<path>[\w./-]+)")
_NAMED = re.compile(r"(?<![\w/])(<code>)?docs/(?P<name>[\w-]+\.md)(?(1)</code>)")
_BLOCK = re.compile(r"(<pre>.*?</pre>)", re.DOTALL)
FOLDER = "source"  # of the site, where they lie


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files that pages link to by `../`."""
    root = Path(config["config_file_path"]).parent
    for page in files.documentation_pages():
        for path in _OUTSIDE.findall(page.content_string):
            name = f"{FOLDER}/{path}"
            if (root / path).is_file() and files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, **_about: Any) -> str:
    """Lead these links there; one to what is not there is told by MkDocs."""
    return _OUTSIDE.sub(rf"{FOLDER}/\g<path>", markdown)


def on_page_content(html: str, *, page: Any, files: Files, **_about: Any) -> str:
    """Lead from pages that docstrings name, such as docs/data.md, to them."""

    def link(found: re.Match[str]) -> str:
        target = files.get_file_from_path(found["name"])
        if target is None:
            return found[0]
        return f'<a href="{target.url_relative_to(page.file)}">{found["name"]}</a>'

    parts = _BLOCK.split(html)  # blocks of code at odd places, which stay as they are
    return "".join(part if n % 2 else _NAMED.sub(link, part) for n, part in enumerate(parts))
