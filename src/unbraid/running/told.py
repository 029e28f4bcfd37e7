"""What a finished run says on the terminal."""

from __future__ import annotations

from unbraid.measuring.compare import OutputComparison
from unbraid.running.folders import first_look_in_words
from unbraid.running.run import Run


def in_words(result: Run) -> str:
    """Give a short table of what was found and how well it was split, and where the report is."""
    told = [str(result.found)]
    if result.evaluation is not None:
        assert result.evaluation.output is not None
        told += ["", str(result.evaluation), "", str(result.evaluation.summary_table()), ""]
        told.append(compared("Largest logit difference", result.evaluation.output))
    if look := first_look_in_words(result.settings.source, result.found):
        told.append(look)
    return "\n".join([*told, f"Report: {result.page}"])


def compared(words: str, output: OutputComparison) -> str:
    """Say how much splitting changed the outputs."""
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        text += f"; accuracy {output.top1_before:.2%} before, {output.top1_after:.2%} after"
    return f"{text}."
