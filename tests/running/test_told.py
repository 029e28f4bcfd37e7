"""What a run says on the terminal when it is done."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from unbraid import Evaluation
from unbraid.base.tables import Table
from unbraid.finding.findings import Findings
from unbraid.finding.pairs import Pair
from unbraid.measuring.compare import OutputComparison
from unbraid.measuring.results import ChannelEvaluation, ConceptEvaluation
from unbraid.running.told import told


def run_of(n):
    """A run that found and measured n channels."""
    same = (0.9, 0.8, 0.05, 0.2, 0.99, 0.98)
    pairs = tuple(Pair(o, 0, 1, 0.1, *same) for o in range(n))
    found = Findings(
        *(0.03, 0.75, 0.5, pairs, {o: ((0,), (1,)) for o in range(n)}, ("a", "b"), "", "mix", "")
    )
    concepts = [ConceptEvaluation((k,), "ab"[k], 7, 1, 0, 0, 0, 1, ()) for k in (0, 1)]
    measured = [ChannelEvaluation("mix", o, tuple(concepts), 0.25, None) for o in range(n)]
    output = OutputComparison(*([None] * len(OutputComparison.__dataclass_fields__)))
    output = SimpleNamespace(**vars(output) | {"max_abs_logit_diff": 0.0, "top1_agreement": 1.0})
    evaluation = Evaluation("least_squares", "mix", tuple(measured), 0.03, {}, output)
    settings = SimpleNamespace(source={})
    about = {"folder": Path("runs/a"), "page": Path("runs/a/report.html"), "settings": settings}
    return SimpleNamespace(found=found, evaluation=evaluation, **about)


@pytest.mark.parametrize("n", [1, 20, 21, 40, 41, 9000])
def test_told_is_bounded_and_names_the_files_that_have_all(n):
    parts = [str(part) for part in told(run_of(n))]
    text = "\n".join(parts)
    assert len(text.splitlines()) < 110
    for rows, file in ((n, "findings.csv"), (2 * n, "evaluation.json")):
        assert (f"runs/a/{file} has all." in text) == (rows > 40)
    if n == 9000:
        assert "And 8,960 more rows; runs/a/findings.csv has all." in text
        assert "And 17,960 more rows; runs/a/evaluation.json has all." in text
    assert f"{n:,} pair" in text
    assert "least squares  0.250" in text  # the means stay
    assert parts[-1] == "Report: runs/a/report.html"
    assert sum(isinstance(part, Table) for part in told(run_of(n))) == 3
