"""What a finished run says on the terminal."""

from __future__ import annotations

from unbraid.base.tables import Table, percent
from unbraid.measuring.compare import OutputComparison
from unbraid.running.finished import Run
from unbraid.running.folders import first_look_in_words


def told(result: Run) -> list[str | Table]:
    """What was found and how well it was split, as tables and lines, and where the report is."""
    parts: list[str | Table] = [result.found.table().kept_in(result.folder / "findings.csv")]
    if result.evaluation is not None:
        assert result.evaluation.output is not None
        measures = result.evaluation.table().kept_in(result.folder / "evaluation.json")
        parts += ["", measures, "", result.evaluation.summary_table(), ""]
        what = "logit" if result.evaluation.output.top1_agreement is not None else "output"
        parts.append(compared(f"Largest {what} difference", result.evaluation.output))
    if look := first_look_in_words(result.settings.source, result.found):
        parts.append(look)
    return [*parts, f"Report: {result.page}"]


def compared(words: str, output: OutputComparison) -> str:
    """Say how much splitting changed the outputs."""
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        before, after = percent(output.top1_before, 2), percent(output.top1_after, 2)
        text += f"; accuracy {before} before, {after} after"
    return f"{text}."
