"""Values from files: built as their types say, or refused in one sentence."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from unbraid.base.schema import build, check_schema, parse_json


@dataclass(frozen=True)
class Part:
    n: int
    share: float = 0.0


@dataclass(frozen=True)
class Whole:
    name: str
    parts: tuple[Part, ...] = ()
    pair: tuple[int, float] | None = None
    kind: Literal["a", "b"] = "a"
    by_name: dict[str, Part] = field(default_factory=dict)
    free: Any = None


def test_build_makes_what_the_types_say_and_text_writable_but_for_what_may_be_a_path():
    values = {
        "name": "it",
        "parts": [{"n": 1, "share": None}, {"n": 2**63 - 1, "share": 1}],
        "pair": [3, 0.5],
        "by_name": {"x": {"n": 0}},
        "free": [{"any": 2**70}],
    }
    made = build(Whole, values, null_figures=True)
    assert math.isnan(made.parts[0].share)
    assert made.parts[1] == Part(2**63 - 1, 1.0)
    assert (made.pair, made.kind, made.by_name) == ((3, 0.5), "a", {"x": Part(0)})
    assert made.free == [{"any": 2**70}]
    made = build(Whole, parse_json(r'{"name": "a\ud800\ud83d\ude00", "free": ["d\udcff"]}'))
    assert (made.name, made.free) == ("a?😀", ["d\udcff"])


def test_build_refuses_what_does_not_fit():
    for entries, message in (
        ({"name": 1}, r"Expected `str`, got `int` - at `\$.name`"),
        ({"parts": [{"n": 1, "m": 2}]}, r"unknown entries \['m'\]"),
        ({"parts": [{}]}, r"missing required field `n` - at `\$.parts\[0\]`"),
        ({"parts": [{"n": True}]}, "Expected `int`, got `bool`"),
        ({"parts": [{"n": 1.0}]}, "Expected `int`, got `float`"),
        ({"parts": [{"n": 2**63}]}, "does not fit into 64 bits"),
        ({"parts": [{"n": -(2**63)}]}, "does not fit into 64 bits"),
        ({"parts": [{"n": 1, "share": math.nan}]}, "nan is no finite number"),
        ({"parts": [{"n": 1, "share": math.inf}]}, "inf is no finite number"),
        ({"parts": [{"n": 1, "share": None}]}, "Expected `float`, got `null`"),
        ({"kind": "x" * 10**6}, "Invalid enum value 'xxx"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build(Whole, {"name": "it", **entries})
        assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "text",
    [
        "[" * 33 + "]" * 33,
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "[" + "[]," * 2**20 + "1]",
        "1" * 10_000,
        '"' + "x" * (64 * 2**20) + '"',
    ],
    ids=["too deep", "deep list", "deep object", "many parts", "long number", "long text"],
)
def test_parse_json_refuses_what_would_take_the_machine(text):
    with pytest.raises(ValueError, match=r"deep|large|digits"):
        parse_json(text)
    assert parse_json('{"a": 1, "a": 2, "b": ' + "[" * 31 + "]" * 31 + "}")["a"] == 2


@pytest.mark.parametrize("values", [[], {}, {"schema": 2}])
def test_check_schema_refuses_another_one(values):
    with pytest.raises(ValueError, match=r"no JSON object|schema .*, this version reads 1"):
        check_schema(values, 1)
