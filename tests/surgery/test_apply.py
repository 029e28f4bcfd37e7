"""What holds of a split network, whatever its layer and however the layer is reached."""

import copy
import io
import itertools
from contextlib import suppress

import pairs
import pytest
import torch
from torch import Tensor, nn

import checks
import oracle
import unbraid
from structures import STRUCTURES
from tiny_networks import KINDS, SyntheticImages, build, layer_input
from unbraid.base.errors import ModelError, UsageError
from unbraid.networks.copying import copy_network, unwrap
from unbraid.surgery.apply import check_in_force
from unbraid.surgery.split_layer import Pad

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the plain form
FORMATS = list(itertools.product(TOLERANCES, (pairs.TWO, pairs.THREE)))


def keeps_outputs_to_the_last_bit(make):
    for dtype, channels in FORMATS:
        network = make().to(dtype)
        changed = pairs.split_network(network, channels=channels)
        assert changed.layer.rows.dtype == dtype
        for n_images in (1, 6):
            checks.assert_same_outputs(network, changed, pairs.images(n_images, dtype))


def keeps_gradients_by_the_image(make):
    network = make()
    changed = pairs.split_network(network, channels=pairs.THREE)
    checks.assert_same_input_gradients(network, changed, pairs.images())


def has_a_plain_form_that_agrees_up_to_rounding(make):
    for dtype, channels in FORMATS:
        network, x = make().to(dtype), pairs.images(5, dtype)
        plain = unbraid.apply(network, pairs.make_split(network, channels), form="plain")
        scale = network(x).abs().max()
        checks.assert_close(plain(x) / scale, network(x) / scale, TOLERANCES[dtype])
        with torch.no_grad():
            plain.layer.merge.weight.zero_()
        assert not torch.allclose(plain(x), network(x), rtol=1e-3)


def is_in_force_until_taken_back(make):
    network, x = make(), pairs.images()
    check_in_force(network, "layer", x[:1])
    changed, expected = pairs.split_network(network), network(x)
    with suppress(ZeroDivisionError), changed.gate("layer", 1, 0, 0.0):
        assert not torch.allclose(changed(x), expected, rtol=1e-3)
        checks.assert_bit_equal(network(x), expected)
        raise ZeroDivisionError
    checks.assert_same_outputs(network, changed, x)
    unbraid.compare_outputs(network, changed, SyntheticImages(5), tolerance=0.0)


def leaves_the_original_untouched(make):
    network = unwrap(make().train())
    before, modules = checks.snapshot(network), list(network.modules())
    split = pairs.make_split(network)
    for form in ("exact", "plain"):
        changed = unbraid.apply(network, split, form=form)
        assert changed.training
        assert changed.layer.training
        with torch.no_grad():
            for parameter in changed.parameters():
                parameter.add_(1)
    checks.assert_untouched(before, checks.snapshot(network))
    assert list(network.modules()) == modules
    assert not hasattr(network, "gate")


INVARIANTS = [
    keeps_outputs_to_the_last_bit,
    keeps_gradients_by_the_image,
    has_a_plain_form_that_agrees_up_to_rounding,
    is_in_force_until_taken_back,
    leaves_the_original_untouched,
]
EXCEPTIONS = {
    (f"built in: {kind}", keeps_gradients_by_the_image)
    for kind, about in STRUCTURES.items()
    if not about.differentiable
}


@pytest.mark.parametrize("invariant", INVARIANTS)
@pytest.mark.parametrize("network", pairs.NETWORKS)
def test_apply_on_every_network(invariant, network):
    if (network, invariant) not in EXCEPTIONS:
        invariant(pairs.NETWORKS[network])


def gates_scale_their_concept_channel(pair):
    moves = [(1, 0, 0.0), (1, 1, 3.0), (3, 1, -0.5), (0, 0, pairs.VALUES)]
    moves += [(1, "rest", 0.0), (3, "rest", -0.5), (0, "rest", pairs.VALUES)]
    for channel, concept, value in moves:
        z_k = pair.concept_map(channel, concept)
        wanted = value[:, None] * z_k if isinstance(value, Tensor) else value * z_k
        with pair.changed.gate("layer", channel, concept, value):
            pairs.assert_moved(pair, channel, concept, wanted)
    checks.assert_same_outputs(pair.network, pair.changed, pairs.images())


def clamps_bound_their_concept_channel(pair):
    for concept in (0, "rest"):
        z_k = pair.concept_map(3, concept)
        some, more = (float(z_k.quantile(part)) for part in (0.3, 0.7))
        for low, high in ((some, more), (more, more), (-torch.inf, some), (more, torch.inf)):
            with pair.changed.clamp("layer", 3, concept, low, high):
                pairs.assert_moved(pair, 3, concept, z_k.clip(low, high))
    checks.assert_same_outputs(pair.network, pair.changed, pairs.images())


def without_its_rest_a_channel_is_the_sum_of_its_concept_channels(pair):
    for part in pair.split.channels:
        row, n = part.channel, pair.plain.layer.names.index(f"{part.channel}.residual")
        wanted = sum(pair.concept_map(row, k) for k in range(len(part.concepts)))

        def assert_sum(network, row=row, wanted=wanted):
            actual = pairs.layer_output(network, pair.images()).select(pair.dim, row)
            checks.assert_close(actual.reshape(5, -1), wanted)

        for network in (pair.changed, pair.plain):
            with pytest.raises(AssertionError):  # while the rest is on
                assert_sum(network)
        with pair.changed.gate("layer", row, "rest", 0.0), torch.no_grad():
            assert_sum(pair.changed)
            pair.plain.layer.merge.weight[row, n] = 0
            assert_sum(pair.plain)


def concepts_can_be_read(pair):
    seen = []
    concepts = pair.changed.layer.concepts
    concepts.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone()))
    checks.assert_bit_equal(pair.changed(pairs.images()), pair.network(pairs.images()))
    names = pair.changed.layer.names
    assert sorted(names) == sorted(f"{channel}.{concept}" for channel, concept in pairs.CONCEPTS)
    for channel, concept in pairs.CONCEPTS:
        read = seen[0].select(pair.dim, names.index(f"{channel}.{concept}"))
        checks.assert_close(read.reshape(5, -1), pair.concept_map(channel, concept))


def rows_have_the_gradients_of_their_channel(pair):
    for network in (pair.network, pair.changed):
        network(pairs.images()).square().sum().backward()
    layer, own = pair.changed.layer, pair.network.layer
    original = oracle.rows_of(own, own.weight.grad)
    owners = [int(name.split(".")[0]) for name in layer.names]
    signed = [original[o] for o in owners] + [-original[o] for o in layer.channels]
    assert all(row.any() for row in signed)
    checks.assert_close(layer.rows.grad, torch.stack(signed), 1e-10)  # residuals are subtracted
    expected = original.clone()
    expected[layer.channels] = 0
    checks.assert_close(oracle.rows_of(own, layer.original.weight.grad), expected, 1e-10)
    after = dict(pair.changed.named_parameters())
    for name, parameter in pair.network.named_parameters():
        if not name.startswith("layer."):
            checks.assert_close(after[name].grad, parameter.grad, 1e-10)


def the_plain_form_is_of_standard_modules(pair):
    layer, names = pair.plain.layer, pair.plain.layer.names
    kinds = {type(module) for module in layer.modules()}
    assert kinds - {Pad} == {nn.Sequential, type(layer.wide), type(layer.merge)}
    weight = oracle.rows_of(layer.wide, layer.wide.weight)
    assert len(names) == len(weight)
    for part in pair.split.channels:
        rows = {f"{part.channel}.{k}": row for k, row in enumerate(part.rows)}
        for name, row in {**rows, f"{part.channel}.residual": part.residual_row}.items():
            checks.assert_bit_equal(weight[names.index(name)], row)
    for name, row in zip(names, weight, strict=True):
        assert bool(row.any()) == (name != "")


OF_LAYERS = [
    gates_scale_their_concept_channel,
    clamps_bound_their_concept_channel,
    without_its_rest_a_channel_is_the_sum_of_its_concept_channels,
    concepts_can_be_read,
    rows_have_the_gradients_of_their_channel,
    the_plain_form_is_of_standard_modules,
]


@pytest.mark.parametrize("invariant", OF_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_apply_on_every_kind_of_layer(invariant, kind):
    invariant(pairs.Pair(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_apply_in_other_number_and_memory_formats_is_the_original_until_a_gate_moves(kind, dtype):
    pair = pairs.Pair(kind, dtype=dtype, channels_last=True)
    for form in (pair.changed, pair.plain):
        assert {parameter.dtype for parameter in form.parameters()} == {dtype}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = pair.images().contiguous(memory_format=memory_format)
        checks.assert_same_outputs(pair.network, pair.changed, x)
        checks.assert_same_outputs(build(kind, dtype), pairs.Pair(kind).changed.to(dtype), x)
        before, after = (pairs.layer_output(one, x) for one in (pair.network, pair.changed))
        assert before.stride() == after.stride()
    maps = [pair.concept_map(1, concept) for concept in (0, 1)]
    row, inputs = pair.split[1].weight, layer_input(pair.network, x)
    whole = torch.stack([oracle.channel_map(pair.network.layer, 1, row, one) for one in inputs])
    rounding = 6 * torch.finfo(dtype).eps * max(float(z.abs().max()) for z in (whole, *maps))

    def assert_is(network, wanted):
        actual = pairs.layer_output(network, x).select(pair.dim, 1).reshape(5, -1).double()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=rounding)

    assert_is(pair.plain, whole)
    with pair.changed.gate("layer", 1, 0, 0.0):
        assert_is(pair.changed, whole - maps[0])
        with pytest.raises(AssertionError):
            assert_is(pair.changed, whole - maps[1])
    assert_is(pair.changed, whole)


def break_apply(monkeypatch, corrupt):
    """Have `apply` give what `corrupt` makes of a network and its copy."""

    def apply(network, *arguments, apply=unbraid.apply, **options):
        changed = apply(network, *arguments, **options)
        corrupt(network, changed)
        return changed

    monkeypatch.setattr(unbraid, "apply", apply)


@pytest.mark.parametrize(("dtype", "channels"), FORMATS)
def test_a_bit_that_differs_in_one_format_with_one_split_is_told(dtype, channels, monkeypatch):
    def corrupt(_, changed):
        if changed.layer.rows.dtype == dtype and set(changed.layer.divided) == set(channels):
            share = 2 * torch.finfo(dtype).eps
            changed.register_forward_hook(lambda _module, _args, logits: logits * (1 + share))

    break_apply(monkeypatch, corrupt)
    with pytest.raises(AssertionError):
        keeps_outputs_to_the_last_bit(lambda: build("3x3"))


@pytest.mark.parametrize("invariant", INVARIANTS + OF_LAYERS)
def test_every_invariant_fails_on_a_network_that_breaks_all(invariant, monkeypatch):
    def corrupt(network, changed):
        network.layer.eval()
        changed.layer.names.reverse()
        changed.register_forward_hook(lambda _module, _args, logits: logits * (1 + 1e-8))

    break_apply(monkeypatch, corrupt)
    with pytest.raises(AssertionError):
        invariant((lambda: build("3x3")) if invariant in INVARIANTS else pairs.Pair("3x3"))


def test_assert_moved_tells_a_move_that_did_something_else(pair):
    z_k = pair.concept_map(1, 0)
    with pair.changed.gate("layer", 1, 0, 0.5):
        pairs.assert_moved(pair, 1, 0, 0.5 * z_k)
        with pytest.raises(AssertionError):
            pairs.assert_moved(pair, 1, 0, 0.51 * z_k)
        with pair.changed.gate("layer", 3, 0, 0.5), pytest.raises(AssertionError):
            pairs.assert_moved(pair, 1, 0, 0.5 * z_k)


def test_apply_keeps_outputs_in_every_mode_and_even_the_sign_of_a_zero(pair):
    norms, x = pairs.Pair("batch norm behind"), pairs.images()
    checks.assert_bit_equal(norms.changed.train()(x), norms.network.train()(x))
    single = pairs.Pair("3x3", dtype=torch.float32)
    with torch.inference_mode():
        checks.assert_bit_equal(single.changed(single.images()), single.network(single.images()))
    with torch.autocast("cpu", torch.bfloat16):
        checks.assert_same_outputs(single.network, single.changed, single.images())
    pair.changed.layer.original.register_forward_hook(lambda _m, _a, z: torch.full_like(z, -0.0))
    for graph in (torch.enable_grad, torch.no_grad):
        with graph():
            output = pairs.layer_output(pair.changed, pairs.images())
        checks.assert_bit_equal(output, torch.full_like(output, -0.0))


def test_apply_keeps_modes_wanted_gradients_and_attributes_of_the_layer():
    network = build("batch norm behind").train()
    network.stem_norm.eval()
    network.stem.weight.requires_grad_(False)
    changed = pairs.split_network(network)
    for name, module in network.named_modules():
        assert changed.get_submodule(name).training == module.training
    assert changed.layer.original.training
    wants = {name: parameter.requires_grad for name, parameter in changed.named_parameters()}
    assert (wants["layer.rows"], wants["stem.weight"]) == (True, False)
    layer = changed.layer
    assert (layer.stride, layer.out_channels) == ((1, 1), 8)
    assert layer.weight is layer.original.weight
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = layer.colour


def test_apply_refuses_a_network_with_other_weights(pair):
    others = [pair.changed]  # which was split already
    for name in ("stem.weight", "layer.bias", "stem_norm.running_var"):
        others.append(build("3x3"))
        with torch.no_grad():
            others[-1].state_dict()[name].flatten()[0].mul_(1 + 1e-12)
    for other in others:
        with pytest.raises(ModelError, match="made for a network with other weights"):
            unbraid.apply(other, pair.split)
    with pytest.raises(UsageError, match="no form 'both'; use 'exact' or 'plain'"):
        unbraid.apply(pair.network, pair.split, form="both")


def _saved_whole(network):
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _in_a_list():
    network = build("3x3")
    network.steps = [network.layer]
    return network


def test_gates_of_a_copy_work_on_the_copy_alone():
    for duplicate, make in (
        (copy.deepcopy, pairs.NETWORKS["built in: weight norm"]),
        *((duplicate, _in_a_list) for duplicate in (copy_network, _saved_whole)),
    ):
        network, x = make(), pairs.images()
        changed = pairs.split_network(network)
        twin = duplicate(changed)
        if hasattr(network, "steps"):
            assert twin.steps[0] is twin.layer
        checks.assert_same_outputs(network, twin, x)
        for one, other in ((twin, changed), (changed, twin)):
            with one.gate("layer", 1, 0, 0.0):
                checks.assert_same_outputs(network, other, x)
                assert not torch.equal(one(x), network(x))
        with changed.gate("layer", 1, 0, 0.5):  # which stays so in the copy
            twin = duplicate(changed)
            moved = changed(x)
        checks.assert_bit_equal(twin(x), moved)
        checks.assert_same_outputs(network, changed, x)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["groups", "tokens"])
def test_concepts_and_residuals_what_a_hook_makes_of_them_counts(kind, in_place, before):
    def intervene(layer, change):
        def hook(_module, args, *output):
            (values,) = output or args
            changed = change(values if in_place else values.clone())
            return None if in_place else changed

        (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)

    pair = pairs.Pair(kind)
    row, z_k = pair.changed.layer.names.index("1.0"), pair.concept_map(1, 0)

    def double(output):
        output.select(pair.dim, row).mul_(2)
        return output

    intervene(pair.changed.layer.concepts, double)
    for graph in (torch.enable_grad, torch.no_grad):
        with graph():
            pairs.assert_moved(pair, 1, 0, 2 * z_k)
    with pair.changed.gate("layer", 1, 0, 0.25):  # which scales what the hook left
        pairs.assert_moved(pair, 1, 0, 2 * 0.25 * z_k)
    pair = pairs.Pair(kind)
    intervene(pair.changed.layer.residuals, lambda output: output.add_(1))
    for o, change in enumerate(pair.change()):
        checks.assert_close(change, torch.full_like(change, -1.0 if o in pairs.TWO else 0.0))


def test_concepts_gradients_can_be_read_and_taken_by_hooks(pair):
    layer, n_concepts = pair.changed.layer, len(pairs.CONCEPTS)
    seen = []
    with layer.concepts.register_full_backward_hook(lambda _m, _i, out: seen.append(out[0])):
        pair.changed(pairs.images())[:, 2].sum().backward()
    assert seen[0].any()
    checks.assert_close(layer.row_bias.grad[:n_concepts], seen[0].sum((0, 2, 3)))
    for register, take in (
        (layer.concepts.register_full_backward_hook, lambda _m, grads, _o: (0 * grads[0],)),
        (layer.concepts.register_forward_hook, lambda _m, _a, output: output.detach()),
    ):
        layer.rows.grad = None
        with register(take):
            logits = pair.changed(pairs.images())
            checks.assert_close(logits, pair.network(pairs.images()), 1e-12)
            logits[:, 2].sum().backward()
        assert not layer.rows.grad[:n_concepts].any()


def test_concepts_a_module_in_their_place_is_run(pair):
    pair.changed.layer.concepts = nn.Threshold(torch.inf, 0.0)  # which silences all
    checks.assert_close(pair.change()[1], -pair.concept_map(1, 0) - pair.concept_map(1, 1))
