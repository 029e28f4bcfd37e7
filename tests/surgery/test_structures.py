"""Layers built in in every way: records, what counts as a layer, outputs, wrappers."""

import types

import pytest
import torch
from pairs import make_split
from torch import Tensor, nn

import oracle
import unbraid
from checks import assert_bit_equal, assert_close, assert_untouched, snapshot
from structures import STRUCTURES, Around, Tokens, build, images, trace
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, ModelError, RunError
from unbraid.networks.layers import describe, splittable_layers, why_not
from unbraid.networks.spec import tap_inputs
from unbraid.scanning.scan import usable_layers


def assert_traced(records, kind, min_share):
    """Every record is what a run on that image alone says, with nothing cut."""
    dataset = images()
    assert records.index.tolist() == list(range(len(dataset)))
    for n, (image, label) in enumerate(dataset):
        pooled, relevance, n_positions = trace(kind, image, label)
        assert_close(records.pooled[n], pooled)
        assert records.n_positions[n] == n_positions
        for o, share in enumerate(oracle.shares(relevance).tolist()):
            assert_close(records.share_of(o)[n], share if share >= min_share else 0.0)


@pytest.mark.parametrize("kind", STRUCTURES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_records_hold_what_a_run_on_each_image_alone_says(kind, batch_size, tmp_path):
    network, once = build(kind), STRUCTURES[kind].once
    before = snapshot(network)
    assert "layer" in [spec.name for spec in usable_layers(network, images(2).images)]
    options = {"dataset": images(), "out": tmp_path, "batch_size": batch_size}
    if not once:
        with pytest.raises(LayerError, match="more than once on each image"):
            unbraid.scan(network, "layer", positions=True, **options)
    scan = unbraid.scan(network, "layer", positions=once, **options)
    assert_untouched(before, snapshot(network))
    (records,) = scan.shards()
    assert_traced(records, kind, scan.manifest.min_share)
    if once:
        seen = torch.einsum("njp->nj", tap_inputs(scan.layer, records.input_map, 0))
        assert_close(seen, records.pooled[:, scan.layer.group_of(2)])
    if batch_size == 3 and kind == "runs again":  # that a wrong record is noticed
        for damage in ("pooled", "n_positions", "share_value", "index"):
            (wrong,) = scan.shards()
            getattr(wrong, damage).view(-1)[3] += 1
            with pytest.raises(AssertionError):
                assert_traced(wrong, kind, scan.manifest.min_share)


@pytest.mark.parametrize("kind", [kind for kind in STRUCTURES if STRUCTURES[kind].weight])
def test_apply_of_computed_weights_survives_state_dicts_and_refuses_others(kind):
    network, x = build(kind), images().images
    split, expected = make_split(network), network(x)
    again = unbraid.apply(network, split)
    again.load_state_dict(unbraid.apply(network, split).state_dict())
    assert_bit_equal(again(x), expected)
    next(network.layer.parameters()).data.view(-1)[0] += 0.1
    with pytest.raises(ModelError, match="other weights"):
        unbraid.apply(network, split)


@pytest.mark.parametrize("n_images", [1, 2])
def test_a_layer_that_sees_no_image_is_not_listed(n_images):
    network = Around().double().eval()
    codes = network.codes = nn.Linear(2, 6).double()  # of positions alone
    places = torch.cartesian_prod(torch.arange(7.0), torch.arange(6.0)).double()
    network.stem.register_forward_hook(lambda *seen: seen[2] + codes(input=places).T.view(6, 7, 6))
    for x in (images(n_images).images, torch.zeros(n_images, 3, 7, 6)):
        assert [spec.name for spec in usable_layers(network, x)] == ["stem", "layer", "head"]


def putting_out(wrap, n_logits=4):
    """A network that wraps its logits as other libraries do."""
    torch.manual_seed(5)
    network = Around(n_logits=n_logits).eval()
    network.register_forward_hook(lambda _module, _args, logits: wrap(logits))
    return network.double()


class Mixes(Around):
    """Lays halves of images into the batch, all left ones first."""

    def forward(self, x):
        left, right = self.layer(torch.cat(self.stem(x).chunk(2, 3))).relu().chunk(2)
        return self.head((left + 2 * right).flatten(2).mean(2))


def test_scan_of_what_is_not_one_row_an_image_is_refused(tmp_path):
    mixed, doubled = Mixes().double().eval(), putting_out(lambda z: torch.cat([z, z]))
    with pytest.raises(LayerError, match=r"\(8, 6, 7, 3\) for 4 images.*use batch_size=1"):
        unbraid.scan(mixed, "layer", images(4), tmp_path)
    with pytest.raises(ModelError, match="2 rows of logits for 1 image;"):
        unbraid.scan(doubled, "layer", images(4), tmp_path / "doubled")
    turned = Tokens(lambda x: x.transpose(0, 1)).double().eval()  # tokens before images
    turned.back.register_forward_hook(lambda _module, _args, z: z.transpose(0, 1))
    with pytest.raises(LayerError, match=r"\(42, 4, 10\) for 4 images"):
        unbraid.scan(turned, "layer", images(4), tmp_path / "turned")
    scan = unbraid.scan(mixed, "layer", images(4), tmp_path, batch_size=1)
    assert next(scan.shards()).n_positions.tolist() == [42] * 4


def test_a_layer_that_is_more_than_its_weights_is_refused():
    for kind, forward, reason in (
        (nn.Conv2d, lambda own, x: nn.Conv2d.forward(own, x * x.mean()), "weights of its own say"),
        (nn.Linear, lambda own, x: own.forward_(x) + own.forward_(x * x), "runs 2 convolutions"),
        (nn.Linear, lambda own, x, scale: own.forward_(x) * scale, "cannot be run by itself"),
    ):
        bare = type("Bare", (kind,), {"forward_": kind.forward})
        own = type("Own", (bare,), {"forward": forward})
        by_class, by_itself = (made(6, 8, 3) for made in (own, bare))
        by_itself.forward = types.MethodType(forward, by_itself)
        for module in (by_class, by_itself):
            assert reason in why_not(module)
            assert splittable_layers(nn.Sequential(module)) == []
            with pytest.raises(LayerError, match="cannot be split"):
                describe("it", module)


def test_looking_into_a_layer_leaves_no_trace_in_it():
    for kind in ("plain", "spectral norm", "old spectral norm"):
        layer = build(kind).train().layer
        layer.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
        before = snapshot(layer)
        assert describe("layer", layer).n_taps == 54
        assert_untouched(before, snapshot(layer))


def test_logits_are_picked_out_the_same_everywhere(tmp_path):
    network, bare = putting_out(lambda z: [[-z], [z]]), putting_out(lambda z: z)
    picked = unbraid.with_logits(network, lambda output: output[1][0])
    assert [name for name, _ in picked.named_modules()] == [n for n, _ in network.named_modules()]
    assert_same_shares(picked, "layer", bare, tmp_path)
    split = make_split(bare)
    changed = unbraid.apply(picked, split)
    assert unbraid.compare_outputs(picked, changed, images(), tolerance=0.0).top1_agreement == 1
    assert unbraid.ablate(changed, images()) == unbraid.ablate(unbraid.apply(bare, split), images())
    assert not isinstance(network(images().images), Tensor)  # the given one is as it was
    with pytest.raises(RunError, match="which part of the output is the logits"):
        unbraid.scan(unbraid.with_logits(network, "0.0"), "layer", images(), tmp_path / "0")


def test_a_scan_goes_on_only_where_the_same_function_picks_logits(tmp_path):
    network = putting_out(lambda z: [z, -z])
    one, again, other = (
        unbraid.with_logits(network, lambda output, place=k: output[place]) for k in (0, 0, 1)
    )
    scan = unbraid.scan(one, "layer", images(), tmp_path)
    assert unbraid.scan(again, "layer", images(), tmp_path).manifest == scan.manifest
    with pytest.raises(RunError, match="which part of the output is the logits"):
        unbraid.scan(other, "layer", images(), tmp_path)


def assert_same_shares(one, layer, other, folder):
    (other_layer,) = (name for name, _ in other.named_modules() if name.endswith("layer"))
    scans = [
        unbraid.scan(network, name, images(), folder / str(n))
        for n, (network, name) in enumerate([(one, layer), (other, other_layer)])
    ]
    assert scans[0].manifest.weights == scans[1].manifest.weights
    for a, b in zip(*(scan.columns("share_value") for scan in scans), strict=True):
        assert_bit_equal(a, b)


@pytest.mark.parametrize("flat", [True, False])
def test_a_single_logit_tells_two_classes_apart(flat, tmp_path):
    network = putting_out(lambda z: z[:, 0] if flat else z, n_logits=1)
    dataset = SyntheticImages(8, n_classes=2)
    (records,) = unbraid.scan(network, "layer", dataset, tmp_path).shards()
    bare = nn.Sequential(network, nn.Flatten(0), nn.Unflatten(0, (1, 1)))
    for n, (image, label) in enumerate(dataset):
        assert records.prediction[n] == int(network(image[None]).flatten()[0] > 0)
        relevance = oracle.relevance(bare, "0.layer", image, 0) * (1 if label == 1 else -1)
        for o, share in enumerate(oracle.shares(relevance).tolist()):
            assert_close(records.share_of(o)[n], share if share >= 0.005 else 0.0)


def test_a_wrapped_network_is_the_network(tmp_path):
    network = build("plain")
    wrapped = nn.DataParallel(torch.compile(network, backend="eager"))
    inside = next(name for name, module in wrapped.named_modules() if module is network.layer)
    for number, layer in enumerate(("layer", inside, network.layer)):
        assert_same_shares(wrapped, layer, network, tmp_path / str(number))
    changed = unbraid.apply(wrapped, make_split(network))
    assert unbraid.compare_outputs(wrapped, changed, images(), tolerance=0.0).top1_agreement == 1
    names = [spec.name for spec in usable_layers(wrapped, images(1).images)]
    assert names == ["stem", "layer", "head"]
    part = nn.Sequential(torch.compile(build("plain"), backend="eager"))
    part(images().images)  # compiled now, without hooks
    assert_same_shares(part, "0._orig_mod.layer", nn.Sequential(build("plain")), tmp_path / "part")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace", "export"])
def test_network_made_a_program_has_no_layers_and_is_compared_all_the_same(way, tmp_path):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 4)).eval()
    dataset = SyntheticImages(4, size=(3, 6, 6), dtype=torch.float32)
    x = torch.stack([image for image, _ in dataset])[:2]
    program = {
        "script": lambda: torch.jit.script(plain),
        "trace": lambda: torch.jit.trace(plain, x),
        "export": lambda: torch.export.export(
            plain, (x,), dynamic_shapes=[{0: torch.export.Dim("n", min=1, max=64)}]
        ).module(),
    }[way]()
    with pytest.raises(LayerError, match=r"a program that torch.jit or torch.export made"):
        unbraid.scan(program, "all", dataset, tmp_path)
    with pytest.raises(LayerError, match="cannot be split"):
        unbraid.scan(program, "0", dataset, tmp_path)
    assert unbraid.compare_outputs(plain, program, dataset, batch_size=2).top1_agreement == 1


def test_network_of_layers_with_nothing_to_divide_says_why_none_can_be_split(tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(LayerError, match="has no layer that can be split: none is"):
        unbraid.scan(network, "all", images(), tmp_path)


class OneByOne(nn.Module):
    """Runs its convolution on each image of a batch, without the first dimension."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.stack([self.layer(one).relu().mean((1, 2)) for one in x]))


class AtOnce(OneByOne):
    def forward(self, x):
        return self.head(self.layer(x).relu().mean((2, 3)))


def test_layer_that_runs_on_single_images_without_their_first_dimension(tmp_path):
    torch.manual_seed(0)
    one, whole = OneByOne().double(), AtOnce().double()
    whole.load_state_dict(one.state_dict())
    dataset = SyntheticImages(8)
    with pytest.raises(LayerError, match="does not lie together; use batch_size=1"):
        unbraid.scan(one, "layer", dataset, tmp_path / "four", batch_size=4)
    scans = [
        unbraid.scan(network, "layer", dataset, tmp_path / name, batch_size=1)
        for name, network in (("one", one), ("whole", whole))
    ]
    ours, theirs = (next(scan.shards()) for scan in scans)
    assert_close(ours.pooled, theirs.pooled)
    assert_close(ours.share_of(2), theirs.share_of(2))
    split = unbraid.split(scans[0], unbraid.find(scans[0], channels={2: [[0], [1]]}))
    x = dataset.images[:3]
    moved = []
    for network in (one, whole):
        changed = unbraid.apply(network, split)
        assert_bit_equal(network(x), changed(x))
        with changed.gate("layer", 2, 0, 0.0):
            moved.append(changed(x))
    assert_close(*moved)
    assert not torch.allclose(moved[0], one(x))
