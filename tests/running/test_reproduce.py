"""The comparison with the published list, and that it can fail."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from unbraid.finding.findings import Pair
from unbraid.running import reproduce
from unbraid.running.reproduce import REFERENCE, match_pairs, published_pairs

PUBLISHED = published_pairs()
FOUND = [Pair(o, s, t, cosine, 1.0, 1.0) for (o, s, t), cosine in PUBLISHED.items()]


def all_agree(found: list[Pair]) -> bool:
    return all(match.agrees for match in match_pairs(found, PUBLISHED))


def test_the_list_is_the_published_one() -> None:
    assert len(PUBLISHED) == 20
    assert len({channel for channel, _, _ in PUBLISHED}) == 9
    assert PUBLISHED[1660, 530, 938] == 0.471
    shared = Path(__file__).parents[3] / "shared" / "reference" / REFERENCE
    if shared.exists():  # beside a development checkout
        assert shared.read_text() == (Path(reproduce.__file__).parent / REFERENCE).read_text()


def test_the_published_pairs_agree_with_themselves_in_any_order() -> None:
    turned = [dataclasses.replace(p, class1=p.class2, class2=p.class1) for p in reversed(FOUND)]
    assert all_agree(turned)


@pytest.mark.parametrize(
    "corrupt",
    [
        lambda found: found[1:],
        lambda found: [*found, Pair(3, 1, 2, 0.4, 1.0, 1.0)],
        lambda found: [dataclasses.replace(found[0], cosine=found[0].cosine + 0.003), *found[1:]],
        lambda found: [dataclasses.replace(found[0], channel=1), *found[1:]],
    ],
    ids=["one missing", "one too many", "a cosine off", "another channel"],
)
def test_a_difference_is_seen(corrupt) -> None:
    assert not all_agree(corrupt(FOUND))


def test_rounding_and_negative_cosines_that_the_script_dropped_are_no_difference() -> None:
    rounded = [dataclasses.replace(pair, cosine=pair.cosine + 0.0009) for pair in FOUND]
    assert all_agree([*rounded, Pair(3, 1, 2, -0.1, 1.0, 1.0)])
