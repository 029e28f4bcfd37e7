"""What part of channels that matter is the same in bfloat16, counted from scans in both formats."""

import pytest
import torch
from torch import nn

import unbraid
from tiny_networks import SyntheticImages
from unbraid.cli import make
from unbraid.images.dataset import spaced
from unbraid.scanning.bfloat16 import TAU, part_alike


class Network(nn.Module):
    """Two layers, with shares that hang on a hair if asked for."""

    def __init__(self, hair=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 40, 1)
        self.head = nn.Linear(40, 4)
        self.more = 3.0 if hair else 0.0  # beside which bfloat16 rounds the image
        self.a.weight.data -= self.a.weight.data.mean((1, 2, 3), keepdim=True)

    def forward(self, x):
        x = x + self.more
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


IMAGES = SyntheticImages(20, dtype=torch.float32)


def uses(scan, wanted):
    found = set()
    for records in scan.shards():
        for n, image in enumerate(records.index.tolist()):
            own = slice(int(records.share_start[n]), int(records.share_start[n + 1]))
            pairs = zip(records.share_channel[own], records.share_value[own], strict=True)
            found |= {(image, int(o)) for o, share in pairs if share >= TAU and image in wanted}
    return found


@pytest.mark.parametrize("hair", [False, True])
def test_part_alike_is_what_two_scans_say(hair, tmp_path):
    network = Network(hair)
    some = others = 0
    for layer in ("a", "b"):
        found = [
            uses(
                unbraid.scan(
                    network,
                    layer,
                    IMAGES,
                    tmp_path / f"{layer}{autocast}",
                    labels="predicted",
                    batch_size=20,
                    autocast=autocast,
                    channels_last=False,
                ),
                set(spaced(20)),
            )
            for autocast in (False, True)
        ]
        some, others = some + len(found[0] & found[1]), others + len(found[0] | found[1])
    assert part_alike(network, ["a", "b"], IMAGES) == pytest.approx(some / others, abs=0.02)
    assert not hair or some < others


@pytest.mark.parametrize(("part", "n_told"), [(0.97, 1), (0.8, 1), (0.79, 0), (None, 0)])
def test_bfloat16_is_suggested_only_where_it_comes_to_much_the_same(
    part, n_told, monkeypatch, capsys
):
    monkeypatch.setattr("unbraid.networks.formats.faster_in_bfloat16", lambda _: True)
    monkeypatch.setattr("unbraid.scanning.bfloat16.part_alike", lambda *_: part)
    make._suggest_bfloat16(Network(), ["a"], IMAGES)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("With --autocast") == n_told
    if n_told:
        assert f"{part:.0%} of the channels that matter" in told
    make._suggest_bfloat16(Network(), ["*"], IMAGES)
    assert capsys.readouterr().err == ""
