"""Processes that scan together: what they must agree on, and that torchrun may start them again."""

from dataclasses import replace

import pytest
from torch.distributed import HashStore

from faults.test_faults import assert_same, start
from tiny_networks import SyntheticImages, build
from unbraid.base import team
from unbraid.base.errors import RunError
from unbraid.base.team import Team
from unbraid.scanning import shards
from unbraid.scanning.manifest import Manifest
from unbraid.scanning.scan import scan
from unbraid.scanning.shards import Target, claim_together


@pytest.fixture
def target(tmp_path):
    network = build("1x1")
    made = scan(network, "layer", SyntheticImages(4), tmp_path / "made")
    return Target(network.get_submodule("layer"), made.manifest, tmp_path / "scan")


def test_ranks_that_would_scan_another_network_are_told_and_touch_nothing(target):
    store = HashStore()
    claim_together([target], Team(store, 0, 2))
    claimed = {path: path.read_bytes() for path in target.folder.iterdir()}
    claim_together([target], Team(store, 1, 2))  # the same work
    other = replace(target, manifest=replace(target.manifest, weights="of another seed"))
    with pytest.raises(RunError, match="a difference in the network's weights;"):
        claim_together([other], Team(store, 1, 2))
    with pytest.raises(RunError, match="the number of layers"):
        claim_together([target, target], Team(store, 1, 2))
    assert {path: path.read_bytes() for path in target.folder.iterdir()} == claimed


def test_what_was_claimed_before_a_restart_does_not_count(monkeypatch):
    store = HashStore()
    monkeypatch.setattr(team, "_joined", lambda: (store, 0, 1))
    monkeypatch.setattr(team, "n_ranks", lambda: 2)
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        monkeypatch.setattr(team, "_works", iter([0]))  # as in a process that has just begun
        assert list(team.join_team().claims(3)) == [0, 1, 2]


def test_what_a_file_system_shows_late_is_waited_for_but_not_for_ever(target, monkeypatch):
    looks = []
    monkeypatch.setattr(shards, "_PAUSE", 0.0)
    monkeypatch.setattr(Target, "lacks", lambda _, __: looks.append(len(looks) < 4) or looks[-1])
    shards.await_shards([target], 60.0)
    assert looks == [True] * 4 + [False]
    monkeypatch.setattr(Target, "lacks", lambda _, __: True)
    shards.await_shards([target], 0.05)


def test_what_processes_share_and_kills_strike_is_channels_last(undisturbed):
    manifests = list(undisturbed.rglob("manifest.json"))
    assert [Manifest.from_json(m.read_text()).channels_last for m in manifests] == [True, True]


def test_torchrun_may_start_a_dead_rank_anew(undisturbed, tmp_path):
    process = start(tmp_path, 2, "named 7", ("--max-restarts", "1"))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("ready") == 4
    assert_same(tmp_path, undisturbed)
