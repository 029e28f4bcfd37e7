"""What benchmarks/zoo.py found, as a page of Markdown.

Needs `pip install timm`.
"""

from __future__ import annotations

from typing import Any

import timm
import torchvision

from machine import describe_machine

CHECKS = ("scan", "equal", "gradient", "plain")
CHECKS_OF_ALL = ("scan", "equal", "gradient")  # of all layers of a network at once
CLOSE = 1e-5  # what the plain form in float32 is held to


def page(rows: list[dict[str, Any]]) -> str:
    """Write the whole page: what was tried, what holds, and every layer."""
    return (
        "# Every family of networks\n\n"
        "Written by `benchmarks/zoo.py`; [networks.md](networks.md) says what is asked.\n\n"
        f"{summary(rows)}\n\n{describe_machine()}, torchvision {torchvision.__version__}, timm "
        f"{timm.__version__}.\n\n{table(rows)}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """Count what was tried and what holds."""
    tried = [layer for row in rows for layer in row.get("tried", [])]
    failing = [f"{row['library']} {row['family']}" for row in rows if not passed(row)]
    n_all = sum(row.get("n_layers", 0) for row in rows)
    amplified = [layer for layer in tried if layer.get("plain") and layer["off"] > CLOSE]
    most = max(rows, key=lambda row: row.get("peak", 0))
    return (
        f"{len(rows)} families, {len(tried)} layers one by one, {n_all} at once. All checks hold "
        f"in {len(rows) - len(failing)} families{', not in ' if failing else ''}"
        f"{', '.join(failing)}; in {len(amplified)} layers the plain form is judged in float64. "
        f"Most memory: {most['peak']} GiB ({most['model']})."
    )


def passed(row: dict[str, Any]) -> bool:
    """Whether every check of every layer that was tried holds."""
    tried, together = row.get("tried", []), row.get("all", {})
    holds = [layer.get(check) is True for layer in tried for check in CHECKS]
    return bool(tried) and all(holds + [together.get(check) is True for check in CHECKS_OF_ALL])


def table(rows: list[dict[str, Any]]) -> str:
    """Write one line for each layer."""
    head = ("family", "network", "image", "layer", "kind", *CHECKS, "remark")
    lines = [head, ("---",) * len(head)]
    for row in sorted(rows, key=lambda row: (row["library"], row["family"])):
        start = (f"{row['library']} {row['family']}", row.get("model", ""), row.get("size", ""))
        if "error" in row:
            lines.append((*start, *[""] * 6, row["error"]))
        for tried in [*row.get("tried", []), *([row["all"]] if "all" in row else [])]:
            marks = [{True: "yes", False: "**no**"}.get(tried.get(check), "") for check in CHECKS]
            remark = tried.get("error", _amplified(tried))
            layer = f"`{tried['layer']}`" if tried["kind"] else tried["layer"]
            lines.append((*start, layer, tried["kind"], *marks, remark))
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _amplified(tried: dict[str, Any]) -> str:
    if tried.get("off", 0) <= CLOSE:
        return ""
    return (
        f"plain form: layer off by {tried['layer_off']:.0e}, logits by {tried['off']:.0e}, in "
        f"float64 by {tried['off64']:.0e}; float32 itself is off by {tried['own']:.0e}"
    )
