"""Shards behind URLs, fetched whole into a cache."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from unbraid.errors import DataError, UsageError
from unbraid.tables import one_line


def is_url(where: str) -> bool:
    """Say whether something to open is a URL.

    Raises:
        UsageError: it is a command, which `webdataset` would run.
    """
    if where.startswith("pipe:"):
        raise UsageError("Commands (pipe:) are not run; write what it prints to a tar file.")
    return re.match(r"[a-z][a-z0-9+.-]*://", where) is not None


def fetch(url: str) -> Path:
    """Fetch a file that the library `webdataset` can open, unless it is in the cache.

    The cache is the folder `unbraid/shards` in `$XDG_CACHE_HOME`, by default `~/.cache`.

    Raises:
        UsageError: webdataset is not installed.
        DataError: it cannot be fetched.
    """
    try:
        from webdataset import gopen
    except ImportError:
        raise UsageError(
            "Shards behind a URL need the library webdataset; pip install webdataset."
        ) from None
    path = _cache() / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(urlsplit(url).path).name
    if os.path.exists(path):  # whatever is wrong with the cache is told below
        return path
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with gopen(url, "rb") as stream:
                shutil.copyfileobj(stream, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except Exception as error:  # each kind of URL fails in its own way
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        status = re.search(r"exit \d+", str(error))  # the rest of it would be a whole command
        reason = status.group() if status else one_line(str(error))
        raise DataError(
            f"{url} cannot be fetched ({reason}); check the URL, or fetch it yourself and name the "
            "file."
        ) from None
    return path


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "unbraid" / "shards"
