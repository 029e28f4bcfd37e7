"""No more places are held in memory and kept in a shard than the bounds say."""

from dataclasses import replace

import torch
from torch import nn

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.networks.layers import describe
from unbraid.scanning import place_shards, places


def test_memory_and_shards_hold_no_more_places_than_the_bounds(tmp_path, monkeypatch):
    n, held, keys = 5, [], []

    class Told(places.PlaceKeeper):
        def add(self, chosen):
            super().add(chosen)
            held.append(sum(len(part.channel) for part in self._parts))

        def close(self):
            closed = super().close()
            keys.append(len(self._keys))
            return closed

    monkeypatch.setattr("unbraid.scanning.shards.PlaceKeeper", Told)
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: 16)
    monkeypatch.setattr(places, "N_DRAWN", 30)
    network, dataset = build("3x3"), SyntheticImages(70)
    for numbers, most, size in ((2**24, 24, 24), (7 * 6 * 9, 24, 7)):
        monkeypatch.setattr(place_shards, "_SHARD_NUMBERS", numbers)
        monkeypatch.setattr(place_shards, "_MOST_PLACES", most)
        scan = unbraid.scan(network, "layer", dataset, tmp_path / str(size), places=n, batch_size=3)
        assert scan.places.manifest.shard_size == size
        assert max(len(records) for records in scan.places.shards()) == size
    assert n * scan.layer.n_out < max(held) <= 2 * n * scan.layer.n_out
    assert max(keys) == 30


def test_of_very_many_taps_fewer_places_are_drawn():
    layer = describe("x", nn.Linear(100, 10))
    assert places.n_drawn(layer) == 1000
    assert places.n_drawn(replace(layer, n_in=2**20)) == 16
    assert places.n_drawn(replace(layer, n_in=2**24 + 1)) == 1


def test_responses_are_looked_at_for_their_strongest_position_by_portions(monkeypatch):
    z, sizes = torch.randn(4, 3, 6), []

    class Told:
        shape, device = z.shape, z.device

        def __getitem__(self, at):
            sizes.append(len(at[0]))
            return z[at]

    image, channel = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 2, 1, 0, 2])
    monkeypatch.setattr(places, "_AT_ONCE", 2 * 6)
    found = places._first_strongest(Told(), image, channel)
    assert sizes == [2, 2, 1]
    assert found.tolist() == z[image, channel].argmax(1).tolist()
