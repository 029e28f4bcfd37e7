"""The comparison with the published list, and that it can fail."""

from dataclasses import replace
from pathlib import Path

from unbraid.finding.pairs import Pair
from unbraid.running import reproduce
from unbraid.running.reproduce import REFERENCE, match_pairs, published_pairs, show_matches

PUBLISHED = published_pairs()
FOUND = [Pair(o, s, t, cosine, 1.0, 1.0) for (o, s, t), cosine in PUBLISHED.items()]
FIRST, *REST = FOUND


def test_the_list_is_the_published_one():
    assert (len(PUBLISHED), len({channel for channel, _, _ in PUBLISHED})) == (20, 9)
    assert PUBLISHED[1660, 530, 938] == 0.471
    shared = Path(__file__).parents[3] / "shared" / "reference" / REFERENCE
    if shared.exists():  # beside a development checkout
        assert shared.read_text() == (Path(reproduce.__file__).parent / REFERENCE).read_text()


def test_match_pairs_tells_a_difference():
    for found, n_agree, n_pairs in (
        ([replace(p, class1=p.class2, class2=p.class1) for p in reversed(FOUND)], 20, 20),
        # Rounding, and negative cosines, which the script dropped, are no difference.
        ([replace(p, cosine=p.cosine + 0.0009) for p in FOUND], 20, 20),
        ([*FOUND, Pair(3, 1, 2, -0.1, 1.0, 1.0)], 20, 20),
        ([*FOUND, Pair(3, 1, 2, 0.4, 1.0, 1.0)], 20, 21),
        ([replace(FIRST, cosine=FIRST.cosine + 0.003), *REST], 19, 20),
        (REST, 19, 20),
        ([replace(FIRST, channel=1), *REST], 19, 21),
    ):
        matches = match_pairs(found, PUBLISHED)
        assert (sum(match.agrees for match in matches), len(matches)) == (n_agree, n_pairs)
        assert show_matches(matches).endswith(f"\n{n_agree} of {n_pairs} pairs agree.")
