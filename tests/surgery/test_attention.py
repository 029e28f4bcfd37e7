"""Attention's projections as layers: each parameterisation scanned, split, edited and let alone."""

import copy
from itertools import product

import pytest
import timm
import torch
from pairs import make_split
from torch import nn

import unbraid
from checks import assert_bit_equal, assert_close, assert_same_outputs, assert_untouched, snapshot
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, ModelError, OutputChangedError
from unbraid.networks.attention import OUT, attend, projections, with_projections
from unbraid.networks.layers import resolve_layer, splittable_layers, weight_rows
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.batch import bytes_of_one
from unbraid.scanning.scan import usable_layers

OPTIONS = {
    "packed": {},
    "without bias": {"bias": False},
    "odd heads": {"num_heads": 3},
    "other sizes": {"kdim": 5, "vdim": 4},
    "bias of keys": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "dropout": {"dropout": 0.3},
}
CASES = [*product(OPTIONS, (True, False))]


def attention(options="packed", batch_first=True, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.MultiheadAttention(
            **{"embed_dim": 6, "num_heads": 2, "batch_first": batch_first, **OPTIONS[options]}
        )
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.4)
    return made.double().eval()


class Around(nn.Module):
    """Tokens of an image, attention of one kind, and a head on their mean."""

    def __init__(self, options="packed", batch_first=True, crossed=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 2).double()
        self.attention = attention(options, batch_first)
        self.keys = nn.Linear(6, self.attention.kdim).double()
        self.values = nn.Linear(6, self.attention.vdim).double()
        self.head = nn.Linear(6, 4).double()
        self.apart = crossed or "kdim" in OPTIONS[options]
        self.options = {}

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        if not self.attention.batch_first:
            tokens = tokens.transpose(0, 1)
        key, value = (self.keys(tokens), self.values(tokens)) if self.apart else (tokens, tokens)
        met, self.weights = self.attention(tokens, key, value, **self.options)
        return self.head((tokens + met).mean(1 if self.attention.batch_first else 0))


def parts_of(network):
    return ["q_proj", "k_proj", "v_proj", OUT] if network.apart else ["in_proj", OUT]


def images(n=5):
    return SyntheticImages(n).images


@pytest.mark.parametrize(("options", "batch_first"), CASES)
def test_attend_is_torchs_attention_with_every_option(options, batch_first):
    layer, n = attention(options, batch_first), 3
    parts = {**projections(layer), OUT: layer.out_proj}
    query = torch.randn(n, 5, 6).double()
    key = torch.randn(n, 7, layer.kdim).double()
    value = torch.randn(n, 7, layer.vdim).double()
    causal = torch.triu(torch.ones(5, 5), 1).bool()
    padding = torch.tensor([[False] * 6 + [True]] * n)
    same = (query,) * 3 if layer.kdim == layer.vdim == 6 else None
    calls = [
        ((query, key, value), {}),
        ((query, key, value), {"need_weights": False}),
        ((query, key, value), {"average_attn_weights": False, "key_padding_mask": padding}),
        ((query, key, value), {"key_padding_mask": -2.0 * padding.double(), "need_weights": False}),
        ((query, key, value), {"attn_mask": torch.randn(n * layer.num_heads, 5, 7).double()}),
    ]
    if same:
        calls += [(same, {}), (same, {"attn_mask": causal, "is_causal": True})]
        calls += [(same, {"attn_mask": causal, "key_padding_mask": padding[:, :5]})]
    calls += [(tuple(x[0] for x in inputs), {}) for inputs, _ in calls[:1] + calls[5:6]]
    for inputs, named in calls:
        if inputs[0].dim() == 3 and not batch_first:
            first = inputs[0].transpose(0, 1)
            alike = inputs[0] is inputs[1]
            inputs = (first,) * 3 if alike else tuple(x.transpose(0, 1) for x in inputs)
        with torch.no_grad():
            expected, actual = layer(*inputs, **named), attend(layer, parts, *inputs, **named)
        assert_close(actual[0], expected[0], 1e-12)
        assert (actual[1] is None) == (expected[1] is None)
        if actual[1] is not None:
            assert_close(actual[1], expected[1], 1e-12)
    with pytest.raises(ValueError, match="is_causal"):
        attend(layer, parts, query, query, query, is_causal=True)


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("options", "batch_first"), CASES)
def test_scan_of_a_projection_is_by_hand_what_torchs_own_attention_says(
    options, batch_first, crossed, tmp_path
):
    """Pooled inputs are gradients by the weights; relevance of a row is W times its gradient."""
    network = Around(options, batch_first, crossed)
    names = [f"attention.{part}" for part in parts_of(network)]
    dataset = SyntheticImages(4)
    before = snapshot(network)
    scans = unbraid.scan(network, names, dataset, tmp_path, min_share=1e-9, batch_size=3)
    assert_untouched(before, snapshot(network))
    assert set(dict(network.named_modules())) == set(before_names(network))
    for n, (image, label) in enumerate(dataset):
        logit = network(image[None])[0, label]
        for name, scan in scans.items():
            module = resolve_layer(network, name)[1]
            rows, bias = module.weight, module.bias
            # z . dlogit/dz, summed over tokens, is W . dlogit/dW + b . dlogit/db.
            wanted = [rows] if bias is None else [rows, bias]
            held = held_by(network.attention, name.split(".")[1])
            slopes = torch.autograd.grad(logit, held, retain_graph=True, allow_unused=True)
            own = slice(None) if name.endswith(OUT) else module.at
            packed = name.endswith(OUT) or network.attention.in_proj_weight is None
            slopes = [s[own] if not (packed and k == 0) else s for k, s in enumerate(slopes)]
            relevance = sum(
                (w * s).reshape(len(w), -1).sum(1) for w, s in zip(wanted, slopes, strict=True)
            )
            share = relevance / relevance.clamp(min=0).sum()
            (records,) = scan.shards()
            found = torch.stack([records.share_of(o)[n] for o in range(scan.layer.n_out)])
            assert_close(found.double(), share.detach().clamp(min=0), 1e-5)
            assert int(records.n_positions[n]) == 30


def before_names(network):
    return [name for name, _ in network.named_modules()]


def held_by(layer, part):
    if part == OUT:
        names = (layer.out_proj.weight, layer.out_proj.bias)
    else:
        packed = layer.in_proj_weight is not None
        names = (layer.in_proj_weight if packed else getattr(layer, f"{part}_weight"),)
        names += (layer.in_proj_bias,)
    return [tensor for tensor in names if tensor is not None]


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize(("options", "batch_first"), CASES)
def test_a_split_projection_keeps_outputs_and_weights_to_the_last_bit(
    options, batch_first, crossed
):
    network = Around(options, batch_first, crossed)
    x = images()
    for named in ({}, {"need_weights": False}, {"average_attn_weights": False}):
        network.options = named
        for part in parts_of(network):
            name = f"attention.{part}"
            changed = unbraid.apply(network, make_split(network, layer=name))
            assert_same_outputs(network, changed, x)
            weights = [one(x) is None or one.weights for one in (network, changed)]
            if named.get("need_weights", True):
                assert_bit_equal(*weights)
            unbraid.compare_outputs(network, changed, SyntheticImages(3), tolerance=0.0)
            slopes = [slope(one, x) for one in (network, changed)]
            assert_close(*slopes, 1e-10)
            plain = unbraid.apply(network, make_split(network, layer=name), form="plain")
            assert_close(plain(x), network(x), 1e-12)
            with changed.gate(name, 1, 0, 0.0), torch.no_grad():
                moved = changed(x)
                assert not torch.allclose(moved, network(x))
                edited = unbraid.edit(network, make_split(network, layer=name), {"1.0": 0.0})
                assert_close(edited(x), moved, 1e-12)
            assert_same_outputs(network, changed, x)


def slope(network, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(network(x).square().sum(), x)[0]


def test_all_projections_of_an_attention_can_be_split_at_once_and_copied():
    network = Around()
    splits = [make_split(network, layer=f"attention.{part}") for part in ("in_proj", OUT)]
    for order in (splits, splits[::-1]):
        changed = copy.deepcopy(unbraid.apply(network, order))
        assert_same_outputs(network, changed, images())
        for part in ("in_proj", OUT):
            with unbraid.gate(changed, f"attention.{part}", 0, 0, 0.0):
                assert not torch.allclose(changed(images()), network(images()))
    ablated = unbraid.ablate(unbraid.apply(network, splits[:1]), SyntheticImages(6))
    assert ablated.layer == "attention.in_proj"


def test_layers_of_attention_are_those_that_run():
    for crossed, parts in ((False, ["in_proj"]), (True, ["q_proj", "k_proj", "v_proj"])):
        network = Around(crossed=crossed)
        names = [spec.name for spec in usable_layers(network, images(2))]
        own = [name.split(".")[1] for name in names if name.startswith("attention.")]
        assert sorted(own) == sorted([*parts, OUT])
        assert weight_rows(resolve_layer(network, f"attention.{parts[0]}")[1]).shape[1] == 6


def test_what_never_runs_says_so(tmp_path):
    network = Around()
    with pytest.raises(LayerError, match="does not run when the network does"):
        unbraid.scan(network, "attention.q_proj", SyntheticImages(3), tmp_path)
    apart = r"choose from attention\.q_proj, attention\.k_proj, attention\.v_proj\."
    with pytest.raises(LayerError, match=apart):
        unbraid.scan(Around(crossed=True), "attention.in_proj", SyntheticImages(3), tmp_path)
    changed = unbraid.apply(network, make_split(network, layer="attention.in_proj"))
    network.apart = changed.apart = True
    with pytest.raises(ModelError, match=r"never runs layer 'attention\.in_proj'"):
        unbraid.compare_outputs(network, changed, SyntheticImages(3))

    class Own(nn.MultiheadAttention):
        def forward(self, query, *_, **named):
            return super().forward(query, query, query, **named)

    network.attention.__class__ = Own
    assert not [s for s in splittable_layers(network) if s.name.endswith("in_proj")]


def encoder(norm_first=False, activation="relu"):
    torch.manual_seed(1)
    block = nn.TransformerEncoderLayer(
        *(6, 2, 12), dropout=0.1, activation=activation, batch_first=True, norm_first=norm_first
    )
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 2), nn.Flatten(2)),
        *(Turned(), nn.TransformerEncoder(block, 2, enable_nested_tensor=False), Mean()),
        nn.Linear(6, 4),
    ).eval()


class Turned(nn.Module):
    def forward(self, x):
        return x.mT


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("part", ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"])
def test_torchs_fused_transformer_layer_is_equal_to_the_last_bit_as_it_runs(part, norm_first):
    """In float32, where what is fused rounds in another way than what is not."""
    network, name = encoder(norm_first), f"3.layers.1.{part}"
    x = images().float()
    changed = unbraid.apply(network, make_split(network, layer=name))
    with torch.no_grad():
        fused = network(x)
        assert_bit_equal(changed(x), fused)
    assert_same_outputs(network, changed, x)
    unbraid.compare_outputs(network, changed, [(one, 0) for one in x], tolerance=0.0)
    with torch.no_grad(), changed.gate(name, 1, 0, 0.0):
        assert not torch.allclose(changed(x), fused)
    plain = unbraid.apply(network, make_split(network, layer=name), form="plain")
    with torch.no_grad():
        assert_close(plain(x), fused, 1e-5)
    both = copy.deepcopy(changed)
    assert_bit_equal(both(x), network(x))
    for one in (network, changed):
        one.train()
        one(x).sum().backward()
    assert changed.get_submodule(name).rows.grad.abs().sum() > 0


def test_a_hook_on_a_projection_sees_what_torch_computes_in_its_place():
    network, seen = encoder(), []
    name = "3.layers.0.self_attn.in_proj"
    projection = resolve_layer(network, name)[1]
    handle = projection.register_forward_hook(lambda _m, args, z: seen.append((args[0], z)))
    x = images().float()
    expected = network(x)
    assert not seen
    with undisturbed(network), torch.no_grad():
        assert_close(network(x), expected, 1e-5)
    ((met, z),) = seen
    own = network[3].layers[0].self_attn
    assert_close(z, met @ own.in_proj_weight.T + own.in_proj_bias, 1e-5)
    handle.remove()
    with undisturbed(network), torch.no_grad():
        network(x)
    assert len(seen) == 1


def test_a_projection_that_does_not_do_what_its_weights_say_is_refused(tmp_path):
    """The twin: what is checked can fail."""
    network = Around()
    projection = resolve_layer(network, "attention.in_proj")[1]
    projection.register_forward_hook(lambda _m, _a, z: z + 1)
    with pytest.raises(LayerError, match="does not compute what its weights say"):
        unbraid.scan(network, "attention.in_proj", SyntheticImages(3), tmp_path)
    network = Around()
    changed = unbraid.apply(network, make_split(network, layer="attention.in_proj"))
    with torch.no_grad():
        changed.attention.original.out_proj.weight.add_(0.1)
    with pytest.raises(OutputChangedError):
        unbraid.compare_outputs(network, changed, SyntheticImages(3))


def test_heads_are_the_rows_that_reach_a_heads_scores_and_values():
    """By derivatives: what head h gives is changed by its rows alone."""
    network = Around()
    rows = unbraid.heads(network, "attention.in_proj")
    assert list(rows) == ["q.h0", "q.h1", "k.h0", "k.h1", "v.h0", "v.h1"]
    assert unbraid.heads(network, "attention.out_proj") == {"h0": range(3), "h1": range(3, 6)}
    layer, tokens = network.attention, torch.randn(2, 5, 6).double()

    def met(h):  # what head h hands to out_proj
        seen = []
        parts = {**projections(layer), OUT: lambda x: seen.append(x) or x}
        attend(layer, parts, tokens, tokens, tokens, need_weights=False)
        return seen[0][..., list(unbraid.heads(network, "attention.out_proj")[f"h{h}"])].sum()

    for h in (0, 1):
        (slopes,) = torch.autograd.grad(met(h), layer.in_proj_weight)
        moved = {row for row in range(18) if slopes[row].abs().max() > 1e-9}
        assert moved == {row for name in rows if name.endswith(f"h{h}") for row in rows[name]}
    assert unbraid.heads(nn.DataParallel(network), "attention.in_proj") == rows
    crossed = Around(crossed=True)
    assert unbraid.heads(crossed, "attention.k_proj") == {"k.h0": range(3), "k.h1": range(3, 6)}
    for name in ("head", "attention"):
        with pytest.raises(LayerError, match="has no heads"):
            unbraid.heads(network, name)
    timms = timm.layers.Attention(8, num_heads=2)
    assert unbraid.heads(nn.Sequential(timms), "0.qkv")["v.h1"] == range(20, 24)
    assert unbraid.heads(nn.Sequential(timms), "0.proj") == {"h0": range(4), "h1": range(4, 8)}


def test_memory_is_reckoned_for_projections_too():
    """What lies behind a projection keeps its outputs for the gradient."""
    network = Around()
    layers = dict(with_projections(network))
    image = torch.randn(3, 4, 4).double()
    sizes = [bytes_of_one(network, [layers[f"attention.{own}"]], image) for own in ("in_proj", OUT)]
    assert sizes[0] > sizes[1]
