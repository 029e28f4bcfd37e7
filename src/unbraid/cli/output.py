"""What the command line says: results on standard output, all else on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from unbraid.tables import count, one_line

if TYPE_CHECKING:
    from unbraid.output import OutputComparison
    from unbraid.pipeline import Run
    from unbraid.run_layers import LayerRuns

out_console = Console(highlight=False, soft_wrap=True, markup=False)
err_console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(text: str) -> None:
    """Tell of a step."""
    err_console.print(text)


def say_broken(names: list[str]) -> None:
    """Count and list images that were left out."""
    if names:
        say(f"Left out {count(len(names), 'image')} that could not be read:")
    for name in names:
        say(f"  {one_line(name)}")


def show_run(result: Run) -> None:
    """End a run: a short table and where the report is."""
    say_broken(result.broken)
    out_console.print(str(result.found))
    if result.evaluation is not None:
        out_console.print()
        out_console.print(str(result.evaluation))
        out_console.print()
        for method, errors in result.evaluation.summary.items():
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value:.3f}"
                for name, value in errors.items()
                if value is not None
            )
            out_console.print(f"{method.replace('_', ' ')}: mean {figures}")
        assert result.evaluation.output is not None
        _show_comparison("Largest logit difference", result.evaluation.output)
    out_console.print(f"Report: {result.report}")


def show_runs(done: LayerRuns) -> None:
    """End a run over one or several layers."""
    for name, result in done.runs.items():
        if len(done.runs) > 1:
            out_console.print(f"\n{name}")
        show_run(result)
    if done.output is not None:
        out_console.print()
        _show_comparison("With all layers split, largest logit difference", done.output)


def _show_comparison(words: str, output: OutputComparison) -> None:
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        text += f"; accuracy {output.top1_before:.2%} before, {output.top1_after:.2%} after"
    out_console.print(f"{text}.")
