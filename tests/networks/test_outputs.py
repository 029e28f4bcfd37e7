"""Where logits are in what a network puts out: by `--output` and `with_logits`, or told."""

from __future__ import annotations

import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import unbraid
from unbraid.__main__ import main
from unbraid.base.errors import ModelError
from unbraid.networks.outputs import as_logits

LOGITS = torch.arange(20.0).reshape(5, 4)
MAP = torch.ones(5, 2, 3, 3)


class PutsOut(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Any) -> Any:
        return self.output


Two = namedtuple("Two", "features scores")

PICKED: dict[str, tuple[Any, list[Any]]] = {
    "list": ([MAP, LOGITS], [1, -1, "1", "-1", "+1"]),
    "keys that look like numbers": ({"0": MAP, "1": LOGITS}, [1, "1"]),
    "keys that are numbers": ({0: MAP, -1: LOGITS}, [-1, "-1"]),
    "key with a dot": ({"a.b": LOGITS, "a": MAP}, ["a.b"]),
    "attribute": (SimpleNamespace(features=MAP, scores=LOGITS), ["scores"]),
    "named tuple": (Two(MAP, LOGITS), ["scores", 1, -1]),
    "parts of parts": ({"out": {"heads": [MAP, LOGITS]}}, ["out.heads.1", "out.heads.-1"]),
    "logits in a part": ([MAP, {"logits": LOGITS}], ["1.logits", "-1.logits"]),
}


@pytest.mark.parametrize("kind", PICKED)
def test_with_logits_by_number_key_or_attribute_takes_that_part(kind: str) -> None:
    output, picks = PICKED[kind]
    for pick in picks:
        assert unbraid.with_logits(PutsOut(output), pick)(LOGITS) is LOGITS


def test_with_logits_of_a_part_with_logits_in_it_leaves_them_to_be_found() -> None:
    part = unbraid.with_logits(PutsOut([MAP, {"logits": LOGITS}]), -1)(LOGITS)
    assert as_logits(part) is LOGITS


def test_with_logits_by_a_function_hides_no_error_of_it() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        unbraid.with_logits(PutsOut(LOGITS), lambda output: output + None)(LOGITS)


@pytest.mark.parametrize("kind", [kind for kind in PICKED if kind != "logits in a part"])
def test_as_logits_names_places_that_can_be_given(kind: str) -> None:
    output, _ = PICKED[kind]
    with pytest.raises(ModelError, match=r"where they are: --output \S+ \(5, 4\), or") as caught:
        as_logits(output)
    place = str(caught.value).partition("--output ")[2].split()[0]
    assert unbraid.with_logits(PutsOut(output), place)(LOGITS) is LOGITS


SAID: dict[str, tuple[Any, Any, str]] = {
    "out of range from the end": (
        [MAP, LOGITS],
        -3,
        r"has no -3 .* a list; .*: --output 1 \(5, 4\)",
    ),
    "no such key": ({"a": LOGITS, "b": LOGITS}, "c", r"--output a \(5, 4\) or --output b \(5, 4\)"),
    "a map": ([MAP, LOGITS], 0, r"Part 0 .* is a tensor \(5, 2, 3, 3\), not logits .*--output 1"),
    "no part": ([MAP, MAP], -1, r"Part -1 .* no part of it is, so compute them in FILE.py:FUNCTIO"),
    "a row": (LOGITS, -1, "it is logits itself, so leave --output out"),
    "layers stacked": (torch.ones(2, 5, 4), 0, "by a function that unbraid.with_logits takes"),
    "a method": ({"a": LOGITS}, "keys", r"has no 'keys' .*: --output a \(5, 4\)"),
    "nothing": (None, 0, "it is a NoneType; no part of it is"),
}


@pytest.mark.parametrize("kind", SAID)
def test_with_logits_of_no_logits_says_what_there_is(kind: str) -> None:
    output, pick, message = SAID[kind]
    with pytest.raises(ModelError, match=message) as caught:
        unbraid.with_logits(PutsOut(output), pick)(LOGITS)
    assert "\n" not in str(caught.value)


OWN = """
from torch import nn

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        maps = self.conv(x).relu()
        return [maps, maps.mean((2, 3))]

def build():
    return Both()
"""


@pytest.mark.parametrize(("options", "status"), [(["--output", "-1"], 0), (["--output=3"], 1)])
def test_layers_takes_output_as_one_argument_or_two_and_names_what_to_give(
    options: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setattr(sys, "argv", ["unbraid", "layers", f"{tmp_path}/own.py:build", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == status
    shown = capsys.readouterr()
    assert ("conv" in shown.out) == (status == 0)
    assert ("say where they are: --output 1 (1, 4)" in shown.err) == (status == 1)
    assert "run on what its preprocessing makes" not in shown.err
