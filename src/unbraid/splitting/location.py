"""Where a split lies: in a file, in a folder that was shared, or on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from unbraid.base.arguments import as_path
from unbraid.base.errors import RunError, UsageError, brief

FILE = "split.safetensors"
_HUB = re.compile(r"hf:/(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")


def split_file(source: str | Path) -> Path:
    """Return the file of a split; one on the hub is downloaded, or taken from the hub's cache.

    Args:
        source: a file, a folder with a `split.safetensors` such as `unbraid share` writes, or
            `hf://OWNER/NAME`, perhaps with `@REVISION` behind it.

    Raises:
        UsageError: the address is none, or huggingface_hub is not installed.
        RunError: the folder or repository holds no split, or cannot be reached.
    """
    path = as_path("path", source)
    if (address := path.as_posix()).startswith("hf:"):  # a path has one slash for two
        found = _HUB.fullmatch(address)
        if found is None:
            raise UsageError(
                f"{source} is no address; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION."
            )
        return _download(found["repo"], found["revision"])
    if not path.is_dir():
        return path
    if not (path / FILE).exists():
        raise RunError(f"{path} holds no {FILE}; name a folder that `unbraid share` wrote.")
    return path / FILE


def _download(repo: str, revision: str | None) -> Path:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise UsageError(
            "Splits on the Hugging Face Hub take huggingface_hub; pip install 'unbraid[hub]'."
        ) from None
    try:
        return Path(hf_hub_download(repo, FILE, revision=revision))
    except errors.RepositoryNotFoundError:
        why = f"There is no hf://{repo}, or it is not yours to read; check the name, or log in"
        raise RunError(f"{why} with `hf auth login`.") from None
    except errors.RevisionNotFoundError:
        raise RunError(f"hf://{repo} has no revision {revision}; name one that it has.") from None
    except errors.LocalEntryNotFoundError as error:  # before its base, EntryNotFoundError
        why = brief(error.__cause__ or error)
    except errors.EntryNotFoundError:
        raise RunError(f"hf://{repo} holds no {FILE}, so no split; name another.") from None
    except Exception as error:  # of the connection, the cache, or a name that the hub refuses
        why = brief(error)
    raise RunError(
        f"hf://{repo} cannot be reached ({why.rstrip('.')}); try again later, or give a folder."
    )
