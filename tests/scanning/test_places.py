"""Places that excite channels most, and those drawn evenly, beside loops over all positions."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import oracle
import structures
import unbraid
from checks import assert_bit_equal, assert_close
from tiny_networks import KINDS, SyntheticImages, WithBroken, build
from unbraid.base.errors import RunError, UsageError
from unbraid.running.check import check
from unbraid.scanning import place_shards, places
from unbraid.scanning.records import shard_path

N_IMAGES = 70
SHARD = 16
K = 5


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: SHARD)
    monkeypatch.setattr(place_shards, "_MOST_PLACES", 24)


def all_positions(layer, network, dataset, images):
    """Responses (C, P) and what taps meet (P, G, J) at all positions of each image, one by one."""
    truth = {}

    def keep(_module, args, output):
        calls.append((args[0].clone(), output.clone()))

    for n in images:
        calls = []
        with network.layer.register_forward_hook(keep), torch.no_grad():
            network(dataset.images[n][None])
        parts = [(x, z) for xs, zs in calls for x, z in zip(xs, zs, strict=True)]
        z = torch.cat([oracle._by_channel(layer, z) for _, z in parts], 1)
        truth[n] = z, torch.cat([oracle.tap_inputs(layer, x) for x, _ in parts])
    return truth


def expected_list(truth, channel, k):
    """Image and position of the k strongest places, by loops over all."""
    best = []
    for image, (z, _) in truth.items():
        value, at = -math.inf, None
        for position, response in enumerate(z[channel].tolist()):
            if response > value:
                value, at = response, position
        best.append((-value, image, at))
    return [(image, at) for _, image, at in sorted(best)[:k]]


def lists_of(scan):
    """The same by channel, as a scan of places has them, in no order."""
    lists = {o: set() for o in range(scan.layer.n_out)}
    for records in scan.shards():
        at = list(zip(records.image.tolist(), records.position.tolist(), strict=True))
        for o, own in lists.items():
            own.update(at[n] for n in records.kept_of(o).nonzero().flatten().tolist())
    return lists


def assert_places(scan, truth, k):
    """The lists, and what is told of each place, are those of loops over all positions."""
    for o, own in lists_of(scan).items():
        assert own == set(expected_list(truth, o, k))
    for records in scan.shards():
        columns = (records.image, records.position, records.pooled, records.rows * records.columns)
        for image, position, inputs, n in zip(*columns, strict=True):
            z, met = truth[int(image)]
            assert_close(inputs, met[position])
            assert int(n) == z.shape[1]
        assert set(records.n_positions.tolist()) == {1}


def every(scan):
    """All records of a scan of places, as one."""
    parts = [vars(records) for records in scan.shards()]
    names = ("index", "image", "position", "drawn", "pooled", "label", "group")
    return SimpleNamespace(**{n: torch.cat([part[n] for part in parts]) for n in names})


@pytest.mark.parametrize("kind", KINDS)
def test_places_are_those_that_loops_find(kind, small_shards, tmp_path):
    network, dataset = build(kind), SyntheticImages(N_IMAGES)
    truth = all_positions(network.layer, network, dataset, range(N_IMAGES))
    scan = unbraid.scan(network, "layer", dataset, tmp_path, places=K, batch_size=6).places
    assert_places(scan, truth, K)
    own = every(scan)
    assert own.label.tolist() == [dataset.targets[n] for n in own.image.tolist()]
    assert own.group.tolist() == own.image.tolist()
    assert own.index.tolist() == list(range(len(own.index)))
    at = list(zip(own.image.tolist(), own.position.tolist(), strict=True))
    assert at == sorted(set(at))
    assert not list((tmp_path / "places").glob("part-*"))
    assert check(tmp_path).whole


@pytest.mark.parametrize("kind", structures.STRUCTURES)
def test_places_count_positions_over_all_runs_on_an_image(kind, tmp_path):
    network, dataset = structures.build(kind), structures.images()
    layer = structures.bare_layer(kind, network)
    network.forward = torch.no_grad()(network.forward)
    truth = all_positions(layer, network, dataset, range(8))
    scan = unbraid.scan(structures.build(kind), "layer", dataset, tmp_path, places=3)
    assert_places(scan.places, truth, 3)


def test_other_places_are_noticed(tmp_path):
    network, dataset = build("3x3"), SyntheticImages(N_IMAGES)
    truth = all_positions(network.layer, network, dataset, range(N_IMAGES))
    scan = unbraid.scan(network, "layer", dataset, tmp_path, places=K).places
    records = scan.shard(0)
    wrong = [
        ("position", records.position.roll(1)),
        ("image", records.image.roll(1)),
        ("kept_channel", records.kept_channel.roll(1)),
        ("pooled", records.pooled.roll(1, 2)),
        ("pooled", records.pooled + 1e-6),
    ]
    for name, tensor in wrong:
        twin = SimpleNamespace(layer=scan.layer, shards=lambda: [other])  # noqa: B023
        other = scan.shard(0)
        setattr(other, name, tensor)
        with pytest.raises(AssertionError):
            assert_places(twin, truth, K)
    with pytest.raises(AssertionError):
        assert_places(scan, truth, K + 1)


class Whole(nn.Module):
    """Whole numbers throughout, so that sums are exact and many places are equal."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(2, 5, 2), nn.Linear(5, 4)
        draw = torch.Generator().manual_seed(1)
        for weight in self.parameters():
            weight.data = torch.randint(-2, 3, weight.shape, generator=draw).to(weight)
        self.layer.weight.data[4] = 0  # responds alike everywhere

    def forward(self, x):
        return self.head(self.layer(x).relu().sum((2, 3)))


def whole_images(n_images=N_IMAGES):
    dataset = SyntheticImages(n_images, size=(2, 5, 4))
    dataset.images = dataset.images.round().clamp(-1, 1).float()
    return dataset


def content(folder):
    """All files of a scan of places, but for what the manifest says of batches."""
    paths = sorted(folder.glob("*.safetensors"))
    return {path.name: path.read_bytes() for path in paths}


def test_equal_places_are_told_by_image_and_position_whatever_the_batch(small_shards, tmp_path):
    network, dataset, scans = Whole().eval(), whole_images(), []
    truth = all_positions(network.layer, network, dataset, range(N_IMAGES))
    for batch_size in (1, 3, 16):
        out = tmp_path / str(batch_size)
        made = unbraid.scan(network, "layer", dataset, out, places=K, batch_size=batch_size)
        scans.append(made.places)
        assert_places(made.places, truth, K)
    assert lists_of(scans[0])[4] == {(n, 0) for n in range(K)}
    assert content(scans[0].path) == content(scans[1].path) == content(scans[2].path)


def test_memory_is_sifted_and_shards_may_come_in_any_order(small_shards, monkeypatch, tmp_path):
    network, dataset = Whole().eval(), whole_images()
    options = {"places": K, "batch_size": 4}
    before = unbraid.scan(network, "layer", dataset, tmp_path / "before", **options)
    out = tmp_path / "out"
    merge = place_shards.merge_parts
    monkeypatch.setattr("unbraid.scanning.shards.merge_parts", lambda *_: None)
    with pytest.raises(RunError, match="holds no scan"):
        unbraid.scan(network, "layer", dataset, out, **options).places  # noqa: B018
    for missing in ([0], [1, 3], [4]):  # the others' places are known when these are seen again
        for shard in missing:
            shard_path(out, shard).unlink()
            place_shards.part_path(out, shard).unlink()
        unbraid.scan(network, "layer", dataset, out, **options)
    place_shards.part_path(out, 2).unlink()
    monkeypatch.setattr("unbraid.scanning.shards.merge_parts", merge)
    made = unbraid.scan(network, "layer", dataset, out, **options)
    assert content(made.places.path) == content(before.places.path)
    looked = [part for part in out.rglob("part-*")]
    assert looked == []


def splitmix(x):
    """Of the reference implementation, in Python's own whole numbers."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_places_drawn_are_those_of_the_lowest_keys(batch_size, small_shards, monkeypatch, tmp_path):
    monkeypatch.setattr(places, "N_DRAWN", 30)
    network, dataset = build("3x3"), SyntheticImages(N_IMAGES)
    options = {"places": 1, "batch_size": batch_size}
    own = every(unbraid.scan(network, "layer", dataset, tmp_path, **options).places)
    n_positions = 5 * 4
    keys = {
        (n, p): splitmix((splitmix(n) + p) % 2**64) >> 1
        for n in range(N_IMAGES)
        for p in range(n_positions)
    }
    at = zip(own.image.tolist(), own.position.tolist(), own.drawn.tolist(), strict=True)
    assert sorted((n, p) for n, p, is_drawn in at if is_drawn) == sorted(
        sorted(keys, key=keys.get)[:30]
    )


def test_places_drawn_are_spread_evenly():
    keys = places._keys(torch.arange(4000), 49)
    low = keys < sorted(keys.ravel().tolist())[4900]  # 100 a position expected
    for axis, expected in ((0, 100.0), (1, 4900 / 4000)):
        counts = low.sum(axis)
        chi = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi - len(counts)) < 4 * math.sqrt(2 * len(counts))


@pytest.mark.parametrize("chosen", [{"classes": [1, 3]}, {"indices": range(5, 69)}], ids=str)
def test_places_are_of_the_images_scanned_less_broken_ones(chosen, small_shards, tmp_path):
    network, dataset = build("groups"), WithBroken(N_IMAGES)
    dataset.broken = (7, 9, 33)
    images = [n for n in chosen.get("indices", range(N_IMAGES)) if n not in dataset.broken]
    images = [n for n in images if n % 4 in chosen.get("classes", range(4))]
    truth = all_positions(network.layer, network, dataset, images)
    options = {**chosen, "skip_broken": True, "places": K}
    assert_places(unbraid.scan(network, "layer", dataset, tmp_path, **options).places, truth, K)


class Tokened(nn.Module):
    """A transformer of one block, with tokens before those of the image."""

    def __init__(self, n_registers, named):
        super().__init__()
        self.patches, self.layer = nn.Conv2d(3, 6, 2), nn.Linear(6, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))
        name = "reg_token" if named else "others"
        self.register_parameter(name, nn.Parameter(3 * torch.randn(1, n_registers, 6)))
        self.others = getattr(self, name)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        own = self.patches(x).flatten(2).mT
        first = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.others)]
        return self.head(self.layer(torch.cat([*first, own], 1)).relu().mean(1))


@pytest.mark.parametrize(("named", "told"), [(True, None), (False, 3)])
def test_tokens_before_those_of_the_image_are_no_places(named, told, small_shards, tmp_path):
    torch.manual_seed(0)
    network, dataset = Tokened(2, named).double().eval(), SyntheticImages(N_IMAGES)
    truth = all_positions(network.layer, network, dataset, range(N_IMAGES))
    n, peaks = 3, torch.zeros(8, 3, dtype=torch.int64)
    for z, _ in truth.values():
        for o in range(8):
            at = int(z[o].argmax())
            if at < n:
                peaks[o, at] += 1
    options = {"places": K, "prefix_tokens": told}
    scan = unbraid.scan(network, "layer", dataset, tmp_path, **options).places
    assert_places(scan, {k: (z[:, n:], met[n:]) for k, (z, met) in truth.items()}, K)
    assert 0 < peaks.sum() < 8 * N_IMAGES
    assert_bit_equal(scan.peaks, peaks)
    with pytest.raises(AssertionError):
        assert_places(scan, truth, K)


@pytest.mark.parametrize(
    ("name", "size", "n_tokens", "layout"),
    [
        ("vit_tiny_patch16_224", 224, 197, (1, 14, 14)),
        ("vit_small_patch14_reg4_dinov2", 518, 1374, (5, 37, 37)),
        ("deit_tiny_distilled_patch16_224", 224, 198, (2, 14, 14)),
    ],
)
def test_tokens_of_timms_networks(name, size, n_tokens, layout):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        network = timm.create_model(name)
    told = places.tokens_of(network, None)
    assert places.lay_out(n_tokens, told) == layout
    assert places.lay_out(1, told) == (0, 1, 1)


@pytest.mark.parametrize(
    ("n_tokens", "told", "layout"),
    [
        (196, (1, (14, 14)), (0, 14, 14)),  # CLS comes behind this layer
        (197, (1, (14, 14)), (1, 14, 14)),
        (196, (1, None), (0, 14, 14)),
        (785, (None, (56, 56)), (1, 28, 28)),  # a later stage has a grid of its own
        (50, (None, (56, 56)), (1, 7, 7)),
        (784, (1, (56, 56)), (0, 28, 28)),
        (785, (1, (56, 56)), (1, 28, 28)),
        (36, (1, (5, 7)), (1, 5, 7)),  # a square by chance
        (200, (None, (14, 14)), (4, 14, 14)),
        (213, (None, (14, 14)), (0, 1, 213)),
        (196, (1, (14, 14), True), (1, 1, 195)),  # the user's word
    ],
)
def test_tokens_of_layers_that_differ(n_tokens, told, layout):
    assert places.lay_out(n_tokens, places.Tokens(*told)) == layout


def test_tokens_before_are_the_users_word(tmp_path):
    network = Tokened(2, named=True)
    assert places.tokens_of(network, 1) == places.Tokens(1, None, asked=True)
    assert places.tokens_of(network, None) == places.Tokens(3, None)


def test_a_scan_of_places_is_a_scan_but_for_classes(tmp_path):
    network, dataset = build("1x1"), SyntheticImages(N_IMAGES)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, places=20)
    for concepts in ("classes", "whole"):
        with pytest.raises(UsageError, match="does not say which classes use a channel"):
            unbraid.find(scan.places, concepts=concepts)
    with pytest.raises(UsageError, match="does not say which classes use a channel"):
        unbraid.sensitivity(scan.places)
    hint = unbraid.find(scan.places, gamma=-1, concepts="clusters").hint
    short = "No channel's strongest places form clusters that differ. Lists of {} places are short "
    short += "for clusters; scan 500 images or more"
    assert hint == short.format(20) + ", with places=1000."
    many = unbraid.scan(network, "layer", dataset, tmp_path / "many", places=1000)
    hint = unbraid.find(many.places, gamma=-1, concepts="clusters").hint
    assert hint == short.format(N_IMAGES) + "."
    assert "short" not in unbraid.find(scan, gamma=-1, concepts="clusters").hint
    found = unbraid.find(scan.places, images={0: [[0, 1], [2, 5, 6]]})
    split = unbraid.split(scan.places, found)
    split.save(tmp_path / "split.safetensors")
    for one in (split, unbraid.Split.load(tmp_path / "split.safetensors")):
        assert unbraid.evaluate(one, scan.places).channels[0].coverage is not None
        with pytest.raises(UsageError, match=r"of places, but the scan is of images; .*places\)"):
            unbraid.evaluate(one, scan)
    of_images = unbraid.split(scan, unbraid.find(scan, images={0: [[0, 1], [2, 5, 6]]}))
    with pytest.raises(UsageError, match="of images, but the scan is of places; pass a scan of im"):
        unbraid.evaluate(of_images, scan.places)
    images = torch.stack([dataset[n][0] for n in range(8)])
    with torch.no_grad():
        assert torch.equal(network(images), unbraid.apply(network, split)(images))
    for other in (unbraid.scan(network, "layer", dataset, tmp_path / "none"), scan.places):
        with pytest.raises(UsageError, match=r"keeps no places; scan with places=1000"):
            other.places  # noqa: B018
    with pytest.raises(RunError, match="how many places are kept"):
        unbraid.scan(network, "layer", dataset, tmp_path, places=21)


def test_damaged_places_are_told_and_made_anew(small_shards, tmp_path):
    network, dataset = build("1x1"), SyntheticImages(N_IMAGES)
    path = unbraid.scan(network, "layer", dataset, tmp_path, places=K).places.path
    before = content(path)
    shard = shard_path(path, 1)
    damaged = bytearray(before[shard.name])
    damaged[-1] ^= 1
    shard.write_bytes(bytes(damaged))
    assert [str(shard) in told for told in check(tmp_path).damaged] == [True]
    unbraid.scan(network, "layer", dataset, tmp_path, places=K)
    (path / f"{shard.name}.damaged").unlink()
    assert content(path) == before


@pytest.mark.parametrize("damaged", [True, False])
@pytest.mark.parametrize("name", ["layer.safetensors", "tokens.safetensors"])
def test_lost_files_of_places_are_told_and_made_anew(name, damaged, small_shards, tmp_path):
    torch.manual_seed(0)
    network, dataset = Tokened(2, named=True).double().eval(), SyntheticImages(N_IMAGES)
    made = unbraid.scan(network, "layer", dataset, tmp_path, places=K).places
    before, path = content(made.path), made.path / name
    assert made.manifest.n_prefix == made.peaks.shape[1] == 3
    if damaged:
        path.write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))
        told = check(tmp_path)
        assert [str(path) in text for text in told.damaged] == [True]
        path.with_name(f"{name}.damaged").unlink()
    else:
        path.unlink()
        assert str(path) in str(check(tmp_path))
    with pytest.raises(RunError, match=f"{path}.*again"):
        unbraid.open_scan(made.path).peaks  # noqa: B018
    unbraid.scan(network, "layer", dataset, tmp_path, places=K)
    assert content(made.path) == before
    assert check(tmp_path).whole


class OfSeveral(SyntheticImages):
    """Images of no label, one or three."""

    def __init__(self, n_images):
        super().__init__(n_images)
        self.targets = [[0, 1, 3][: n % 2 * 3] or [n % 4][: n % 3] for n in range(n_images)]

    def __getitem__(self, index):
        return self.images[index], self.targets[index]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_an_image_of_several_labels_has_places_once(batch_size, monkeypatch, tmp_path):
    monkeypatch.setattr("unbraid.scanning.scan.images_per_shard", lambda _: 2)
    torch.manual_seed(0)
    network, dataset = Tokened(2, named=True).double().eval(), OfSeveral(20)
    single = unbraid.one_per_label(dataset)
    order = [*range(len(single) // 2, len(single)), *range(len(single) // 2)]
    parts = torch.utils.data.Subset(single, order)
    shown = [single.source(n) for n in order]
    first = [n for n, image in enumerate(shown) if image not in shown[:n]]
    assert 0 < len(first) < len(shown)
    options = {"target": "multilabel", "places": 30, "batch_size": batch_size}
    scan = unbraid.scan(network, "layer", parts, tmp_path, **options).places
    truth = all_positions(network.layer, network, dataset, set(shown))
    truth = {n: truth[shown[n]] for n in first}
    assert_places(scan, {n: (z[:, 3:], met[3:]) for n, (z, met) in truth.items()}, 30)
    peaks = torch.zeros(8, 3, dtype=torch.int64)
    for z, _ in truth.values():
        for o in range(8):
            if int(z[o].argmax()) < 3:
                peaks[o, int(z[o].argmax())] += 1
    assert_bit_equal(scan.peaks, peaks)
    assert set(every(scan).image.tolist()) == set(first)


def test_several_scans_of_places_are_not_read_as_one(tmp_path):
    network = build("1x1")
    for seed in (0, 1):
        images = SyntheticImages(20, seed=seed)
        images.ids = [f"{seed}/{n}.png" for n in range(20)]
        unbraid.scan(network, "layer", images, tmp_path / str(seed), places=K)
    both = unbraid.open_scan([tmp_path / "0", tmp_path / "1"])
    with pytest.raises(UsageError, match=r"opened as one, but .* open one of the scans, or scan"):
        both.places  # noqa: B018


def test_ablate_says_that_it_takes_no_places(tmp_path):
    network, dataset = build("1x1"), SyntheticImages(20)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, places=20)
    groups = {0: [[0, 1], [2, 5, 6]]}
    of_places = unbraid.split(scan.places, unbraid.find(scan.places, images=groups))
    of_images = unbraid.split(scan, unbraid.find(scan, images=groups))
    pairs = [(of_places, None), (of_places, scan), (of_places, scan.places)]
    for split, given in [*pairs, (of_images, scan.places)]:
        with pytest.raises(UsageError, match="in whole images, so ablate takes no split and no"):
            unbraid.ablate(unbraid.apply(network, split), dataset, scan=given)
    assert unbraid.ablate(unbraid.apply(network, of_images), dataset, scan=scan).channels


def test_too_many_places_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(place_shards, "_MOST_BYTES", 10**6)
    with pytest.raises(UsageError, match=r"may take .* GB; ask for \d+ at most"):
        unbraid.scan(build("3x3"), "layer", SyntheticImages(4), tmp_path, places=1000)
    assert not list(tmp_path.iterdir())
