"""Layers whose weights a network applies without running them: torchvision's Swin, and others."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pairs import make_split
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video.swin_transformer import SwinTransformer3d

import unbraid
from checks import assert_bit_equal, assert_close, assert_same_outputs, assert_untouched, snapshot
from tiny_networks import SyntheticImages
from unbraid.base.errors import LayerError, OutputChangedError
from unbraid.networks.attention import with_projections
from unbraid.networks.by_weight import applied_by, users
from unbraid.networks.relevance import cut_at, undisturbed
from unbraid.scanning.scan import usable_layers

SIZES = {"v1": (3, 20, 24), "v2": (3, 20, 24), "video": (3, 4, 20, 24)}


def swin(kind):
    torch.manual_seed(0)
    if kind == "video":
        network = SwinTransformer3d([2, 4, 4], 6, [2], [2], [2, 2, 2], num_classes=4)
    else:
        v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
        own = v2 if kind == "v2" else {}
        network = SwinTransformer([4, 4], 6, [2], [2], [4, 4], num_classes=4, **own)
    for name, parameter in network.named_parameters():
        if name.endswith("qkv.bias"):  # of which the second version leaves a part out
            nn.init.normal_(parameter)
    return network.eval()


def attention_of(network):
    name = next(n for n, m in network.named_modules() if n.endswith("1.attn"))
    return name, network.get_submodule(name)


def images(kind, n=3):
    return SyntheticImages(n, size=SIZES[kind], dtype=torch.float32).images


def slope(network, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(network(x).square().sum(), x)[0]


@pytest.mark.parametrize("part", ["qkv", "proj"])
@pytest.mark.parametrize("kind", SIZES)
def test_torchvisions_swin_attention_is_split_to_the_last_bit(kind, part):
    network, x = swin(kind), images(kind)
    name = f"{attention_of(network)[0]}.{part}"
    assert name in {spec.name for spec in usable_layers(network, x)}
    split = make_split(network, layer=name)
    changed = unbraid.apply(network, split)
    for one in (changed, copy.deepcopy(changed), pickle.loads(pickle.dumps(changed))):
        assert_same_outputs(network, one, x)
        with one.gate(name, 1, 0, 0.0) if one is changed else unbraid.gate(one, name, 1, 0, 0.0):
            moved = one(x)
        assert not torch.allclose(moved, network(x))
    edited = unbraid.edit(network, split, {"1.0": 0.0})
    assert_close(edited(x), moved, 1e-4)
    assert_close(slope(changed, x), slope(network, x), 1e-4)
    plain = unbraid.apply(network, split, form="plain")
    assert_close(plain(x), network(x), 1e-4)
    with torch.no_grad():
        plain.get_submodule(name).merge.weight.zero_()
    assert not torch.allclose(plain(x), network(x))
    with torch.no_grad():
        exported = torch.export.export(changed, (x,)).module()
        assert_bit_equal(exported(x), network(x))


@pytest.mark.parametrize(
    ("kind", "parts"), [("v1", ("qkv", "proj")), ("v2", ("proj",)), ("video", ("qkv", "proj"))]
)
def test_scan_of_swin_attention_is_by_hand_what_its_weights_gradients_say(kind, parts, tmp_path):
    """Of the second version's qkv the bias is not all of what runs, so it is left out here."""
    network = swin(kind)
    path, attention = attention_of(network)
    dataset = SyntheticImages(3, size=SIZES[kind], dtype=torch.float32)
    before, names = snapshot(network), [f"{path}.{part}" for part in parts]
    scans = unbraid.scan(network, names, dataset, tmp_path, min_share=1e-9, batch_size=3)
    assert_untouched(before, snapshot(network))
    for n, (image, label) in enumerate(dataset):
        logit = network(image[None])[0, label]
        for part, scan in zip(parts, scans.values(), strict=True):
            own = [*getattr(attention, part).parameters()]
            slopes = torch.autograd.grad(logit, own, retain_graph=True)
            pairs = zip(own, slopes, strict=True)
            relevance = sum((w * slope).reshape(len(w), -1).sum(1) for w, slope in pairs)
            share = relevance / relevance.clamp(min=0).sum()
            (records,) = scan.shards()
            found = torch.stack([records.share_of(o)[n] for o in range(scan.layer.n_out)])
            assert_close(found, share.detach().clamp(min=0), 1e-4)


def found(network):
    return {
        name.rpartition(".")[2]
        for _, parts in users(network)
        for name, module in network.named_modules()
        if module in parts
    }


def test_of_torchvisions_families_swin_alone_applies_weights():
    """Others name `fc` or `classifier` and, elsewhere, a weight, as where they make them."""
    models = torchvision.models
    families = {models.get_model_builder(n).__module__: n for n in models.list_models(models)}
    assert len(families) > 15
    families["torchvision.models.regnet"] = "regnet_x_400mf"  # which needs numbers to be built
    for name in families.values():
        own = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            network = models.get_model(name, **own)
        assert found(network) == ({"qkv", "proj"} if name.startswith("swin") else set()), name


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("eva02_tiny_patch14_224", "qkv"),
        ("beit_base_patch16_224", "qkv"),
        ("swinv2_tiny_window8_256", "qkv"),
    ],
)
def test_timms_attentions_apply_weights(name, part):
    timm = pytest.importorskip("timm", reason="needs timm")
    with torch.device("meta"):
        assert part in found(timm.create_model(name))


class Asks(nn.Module):
    """One that asks for weights of layers that it runs, and makes them in its own way."""

    def __init__(self):
        super().__init__()
        self.patches, self.fc, self.head = nn.Conv2d(3, 6, 2), nn.Linear(6, 5), nn.Linear(5, 4)
        self.reset()

    def reset(self):
        nn.init.normal_(self.fc.weight)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT.to(self.fc.weight.dtype)
        return self.head(self.fc(tokens).relu().mean(1))


def test_a_layer_that_a_network_runs_goes_through_a_compiler_when_split():
    network, x = Asks().eval(), SyntheticImages(2, dtype=torch.float32).images
    assert not found(network)
    for form in ("exact", "plain"):
        changed = unbraid.apply(network, make_split(network, layer="fc"), form=form)
        torch.compiler.reset()
        with torch.no_grad():
            compiled = torch.compile(changed, backend="eager", fullgraph=True)
            assert_close(compiled(x), network(x), 1e-5)
    assert_close(torch.jit.script(changed)(x), network(x), 1e-5)


def test_threads_run_one_split_network_at_once():
    network, x = swin("v1"), images("v1", 1)
    name = f"{attention_of(network)[0]}.qkv"
    network.get_submodule(name).register_forward_hook(lambda *_: torch.zeros(()))  # never called
    changed = unbraid.apply(network, make_split(network, layer=name))
    with unbraid.gate(changed, name, 1, 0, 0.0), torch.no_grad():
        expected = changed(x)

        def run(_):
            with torch.no_grad():
                return torch.equal(changed(x), expected)

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(run, range(200)))
    assert not torch.equal(expected, network(x))
    assert len(changed.get_submodule(name).original._forward_hooks) == 1


@pytest.mark.parametrize("form", ["exact", "plain"])
def test_torch_fx_takes_a_module_with_such_a_split_layer_as_one_step(form):
    network, x = swin("v1"), images("v1")
    path, attention = attention_of(network)
    changed = unbraid.apply(network, make_split(network, layer=f"{path}.qkv"), form=form)
    assert isinstance(changed.get_submodule(path), type(attention))
    layer = changed.get_submodule(f"{path}.qkv")
    with torch.no_grad():
        (layer.rows if form == "exact" else layer.merge.weight)[:3].mul_(100)
    assert not torch.allclose(changed(x), network(x))
    assert_bit_equal(torch.fx.symbolic_trace(changed)(x), changed(x))
    assert_bit_equal(create_feature_extractor(changed, ["head"])(x)["head"], changed(x))
    if form == "exact":
        with pytest.raises(ValueError, match="concepts"):
            create_feature_extractor(changed, [f"{path}.qkv.concepts"])


def test_beside_a_split_layer_another_of_its_module_is_seen_and_split():
    network, x = swin("v1"), images("v1")
    path, _ = attention_of(network)
    qkv, proj = f"{path}.qkv", f"{path}.proj"
    changed = unbraid.apply(network, make_split(network, layer=qkv))
    layer = changed.get_submodule(proj)
    with undisturbed(changed), torch.no_grad(), cut_at(layer, torch.Tensor.clone) as cut:
        assert_close(changed(x), network(x), 1e-6)
    assert len(cut.outputs) == 1
    assert {qkv, proj} <= {spec.name for spec in usable_layers(network, x)}
    both = unbraid.apply(network, [make_split(network, layer=name) for name in (qkv, proj)])
    assert_same_outputs(network, both, x)
    for name in (qkv, proj):
        with both.gate(name, 1, 0, 0.0):
            assert not torch.allclose(both(x), network(x))


class Own(nn.Module):
    """One that applies a layer's weight itself, with no bias, and now and then runs the layer."""

    def __init__(self, runs=False):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.fc = nn.Conv2d(3, 6, 2), nn.Linear(6, 5, bias=False)
        self.shift, self.head, self.runs = nn.Parameter(torch.randn(5)), nn.Linear(5, 4), runs

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        met = self.fc(tokens) if self.runs else F.linear(tokens, self.fc.weight, bias=self.shift)
        return self.head(met.relu().mean(1))


@pytest.mark.parametrize("runs", [False, True])
def test_a_layer_runs_once_and_hooks_that_the_network_would_not_call_stay_silent(runs):
    network, theirs, x = Own(runs).eval(), [], SyntheticImages(2, dtype=torch.float32).images
    network.fc.register_forward_hook(lambda *_: theirs.append("after"))
    network.fc.register_forward_pre_hook(lambda *_: theirs.append("before"))
    ((user, parts),) = users(network)
    assert user is network
    assert network.fc in parts
    expected, n_theirs = network(x), len(theirs)
    assert n_theirs == 2 * runs
    with undisturbed(network), torch.no_grad():
        with cut_at(network.fc, torch.Tensor.clone) as cut:
            assert_close(network(x), expected, 1e-6)
        assert (len(cut.outputs), len(theirs)) == (1, 2 * n_theirs)
        assert_close(cut.outputs[0], cut.inputs[0] @ network.fc.weight.T, 1e-6)
    assert "forward" not in vars(network)
    assert len(network.fc._forward_hooks) == 1
    changed = unbraid.apply(network, make_split(network, layer="fc"))
    theirs.clear()
    assert_bit_equal(changed(x), expected)
    assert len(theirs) == n_theirs
    assert_same_outputs(network, changed, x)


def test_a_hook_on_the_way_out_of_attention_stays_silent():
    theirs, x = [], torch.randn(2, 5, 6)
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    attention.out_proj.register_forward_hook(lambda *_: theirs.append(1))
    network = Attends(attention).eval()
    with undisturbed(network), torch.no_grad(), cut_at(attention.out_proj, torch.Tensor.clone):
        network(x)
    for part in ("in_proj", "out_proj"):
        changed = unbraid.apply(network, make_split(network, layer=f"attention.{part}"))
        assert_same_outputs(network, changed, x)
    assert not theirs
    assert len(attention.out_proj._forward_hooks) == 1


class Attends(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        return self.attention(x, x, x)[0].mean(1)


def test_a_layer_that_is_not_found_to_run_says_why_that_may_be(tmp_path):
    """The twin: a weight that is asked for by another way than a name in the class's code."""

    class Hidden(Own):
        def forward(self, x):
            tokens = self.patches(x).flatten(2).mT
            return self.head((tokens @ getattr(self.fc, "weigh" + "t").T).relu().mean(1))

    network = Hidden().eval()
    data = SyntheticImages(3, dtype=torch.float32)
    assert "fc" not in {spec.name for spec in usable_layers(network, data.images)}
    with pytest.raises(LayerError, match="its weights are used without it"):
        unbraid.scan(network, "fc", data, tmp_path)


def test_a_layer_that_is_run_in_place_of_its_product_can_be_wrong():
    network, x = Own().eval(), SyntheticImages(2, dtype=torch.float32).images
    with torch.no_grad(), applied_by([(network.fc, lambda t: network.fc.forward(t) + 1)]):
        assert not torch.allclose(network(x), Own().eval()(x))
    changed = unbraid.apply(network, make_split(network, layer="fc"))
    with torch.no_grad():
        changed.shift.add_(0.1)
    with pytest.raises(OutputChangedError):
        unbraid.compare_outputs(network, changed, [(one, 0) for one in x])


class Padded(nn.Module):
    """Tokens of which the last are padding, as many as the image says, in torch's own encoder."""

    def __init__(self, raw=False, own=nn.TransformerEncoder):
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.raw = nn.Conv2d(3, 8, 2), raw
        block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = own(block, 2, norm=nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        lengths = 2 + (100 * x.mean((1, 2, 3))).abs().long() % (tokens.shape[1] - 3)
        padding = torch.arange(tokens.shape[1])[None] >= lengths[:, None]
        met = self.encoder(tokens, src_key_padding_mask=padding)
        if self.raw:
            return met
        return self.head(met.masked_fill(padding[..., None], 0).sum(1) / lengths[:, None])


@pytest.mark.parametrize(
    "part", ["layers.0.self_attn.in_proj", "layers.1.self_attn.out_proj", "layers.1.linear1"]
)
def test_an_encoder_that_leaves_padding_out_is_split_to_the_last_bit(part, tmp_path):
    network, raw, name = Padded().eval(), Padded(raw=True).eval(), f"encoder.{part}"
    data = SyntheticImages(5, size=(3, 8, 8), dtype=torch.float32)
    x = data.images
    with torch.no_grad():
        assert (raw(x)[0, -1] == raw.encoder.norm.bias).all()  # torch's own zeros
    for one in (network, raw):
        changed = unbraid.apply(one, make_split(one, layer=name))
        for own in (changed, copy.deepcopy(changed)):
            assert_same_outputs(one, own, x)
        with torch.no_grad(), changed.gate(name, 1, 0, 0.0):
            assert not torch.allclose(changed(x), one(x))
    unbraid.scan(network, name, data, tmp_path, batch_size=2)
    assert vars(network.encoder)["use_nested_tensor"] is True
    plain = unbraid.apply(network, make_split(network, layer=name), form="plain")
    with torch.no_grad():
        assert_close(plain(x), network(x), 1e-5)


class Pooled(Padded):
    """One that uses what its encoder puts at padded positions."""

    def forward(self, x):
        return self.head(super().forward(x).mean(1))


class SameEncoder(nn.TransformerEncoder):
    """torch's under another name."""


class OwnEncoder(nn.TransformerEncoder):
    """One with a forward of its own."""

    def forward(self, *args, **named):
        return super().forward(*args, **named) + 1


INSIDE = ["encoder.layers.0.self_attn.in_proj", "encoder.layers.0.linear1"]


@pytest.mark.parametrize("own", [nn.TransformerEncoder, SameEncoder])
@pytest.mark.parametrize("name", ["patches", *INSIDE, "head"])
def test_what_is_looked_at_near_padding_is_the_network_itself(name, own):
    network, x = Pooled(True, own).eval(), padded_images()
    with torch.no_grad():
        own_logits = network(x)
    layer = dict(with_projections(network))[name]
    with undisturbed(network), torch.enable_grad(), cut_at(layer, torch.Tensor.clone) as cut:
        logits = network(x)
        (gradient,) = torch.autograd.grad(logits[:, 0].sum(), cut.outputs)
    assert_close(logits, own_logits, 1e-5)
    if name in INSIDE:
        assert (gradient[0, -1] == 0).all()  # of what the network left out


def padded_images():
    x = SyntheticImages(5, size=(3, 8, 8), dtype=torch.float32).images
    x[0] = 0  # of two tokens
    return x


@pytest.mark.parametrize("own", [nn.TransformerEncoder, SameEncoder])
@pytest.mark.parametrize("name", INSIDE)
def test_near_padding_a_gate_has_the_effect_of_the_same_edit(name, own):
    network, x = Pooled(True, own).eval(), padded_images()
    split = make_split(network, layer=name)
    exact = unbraid.apply(network, split)
    plain = unbraid.apply(network, split, form="plain")
    assert_same_outputs(network, exact, x)
    part = split.channels[0]
    edited = copy.deepcopy(network)
    of = dict(with_projections(edited))[name]
    with torch.no_grad():
        rows, bias = of.weight.clone(), of.bias.clone()
        rows[part.channel] -= part.rows[0]
        bias[part.channel] -= part.bias
        if name.endswith("in_proj"):
            of.put(rows, bias)
        else:
            of.weight.copy_(rows)
            of.bias.copy_(bias)
        assert_close(plain(x), network(x), 1e-5)
        with exact.gate(name, part.channel, 0, 0.0):
            assert_close(exact(x), edited(x), 1e-5)
            assert not torch.allclose(exact(x), network(x))


def test_nothing_is_written_on_an_encoder_that_others_may_be_using():
    network, x, name = Pooled(True).eval(), padded_images(), INSIDE[1]
    changed, seen = unbraid.apply(network, make_split(network, layer=name)), []
    for one in (network, changed):
        encoder = getattr(one.encoder, "original", [one.encoder])[0]
        look = lambda *_, encoder=encoder: seen.append(encoder.use_nested_tensor)  # noqa: E731
        with undisturbed(one), one.get_submodule(name).register_forward_hook(look):
            one(x)
    assert seen == [True, True]


def test_an_encoder_with_a_forward_of_its_own_is_refused_where_it_leaves_padding_out(tmp_path):
    network, x, name = Pooled(True, OwnEncoder).eval(), padded_images(), INSIDE[1]
    data = [(one, 0) for one in x]
    with pytest.raises(LayerError, match="set its use_nested_tensor to False"):
        unbraid.scan(network, name, data, tmp_path / "a")
    for form in ("exact", "plain"):
        changed = unbraid.apply(network, make_split(network, layer=name), form=form)
        with torch.no_grad(), pytest.raises(LayerError, match="set its use_nested_tensor to"):
            changed(x)
    network.encoder.use_nested_tensor = False
    unbraid.scan(network, name, data, tmp_path / "b")
    assert_same_outputs(network, unbraid.apply(network, make_split(network, layer=name)), x)
