"""The app keeps no more in memory, and lays out no more images, than the bounds say."""

from unbraid.exploring import explorer as explorer_module
from unbraid.exploring.explorer import RUN, Kept


def test_of_many_things_the_latest_are_kept(explorer):
    kept = Kept(2)
    for name in "ab":
        kept.put(name, name.upper())
    assert kept.made("a", lambda: "anew") == "A"  # so b is the oldest now
    kept.put("c", "C")
    assert [kept.get(name) for name in "abc"] == ["A", None, "C"]
    own = {name: one._most for name, one in vars(explorer).items() if isinstance(one, Kept)}
    assert len(own) > 5
    assert max(own.values()) <= 1024
    assert own["_networks"] <= 3
    assert own["_dropped"] <= 64


def test_the_bench_takes_no_more_of_the_strongest_than_the_bound(explorer, monkeypatch):
    monkeypatch.setattr(explorer_module, "_MOST_LAID", 10)
    undivided = next(
        c
        for c in range(explorer.opened.train_scan.layer.n_out)
        if c not in explorer.opened.run.found.concepts
    )
    for n, n_laid, more in ((4, 4, True), (10, 10, False), (10**6, 10, False)):
        laid = explorer.bench(RUN, undivided, n)
        assert (len(laid["images"]), laid["more"]) == (n_laid, more)
