"""Run the notebook anew and keep its outputs, without times or what differs between machines.

python examples/execute.py
"""

from __future__ import annotations

import copy
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

WALKTHROUGH = Path(__file__).with_name("walkthrough.ipynb")
_SECONDS = 600  # a cell may take on a slow machine


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run a copy of a notebook with this Python, from its first cell on.

    Raises:
        CellExecutionError: a cell raised.
    """
    fresh = copy.deepcopy(notebook)
    NotebookClient(fresh, timeout=_SECONDS, record_timing=False).execute()
    fresh.metadata = copy.deepcopy(notebook.metadata)  # the kernel's own names Python's version
    return fresh


def main() -> None:
    """Write the notebook with new outputs."""
    nbformat.write(execute(read(WALKTHROUGH)), WALKTHROUGH)


if __name__ == "__main__":
    main()
