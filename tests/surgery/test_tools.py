"""Split networks in other people's tools: exporters, compilers, Captum, zennit, files, training."""

import copy
import io
from contextlib import ExitStack, nullcontext

import pytest
import torch
from pairs import Pair, images
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import unbraid
from checks import assert_bit_equal, assert_close, assert_same_outputs
from tiny_networks import KINDS, SyntheticImages, build
from unbraid.base.errors import ModelError, RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.networks.relevance import cut_at

SINGLE = torch.float32
ROUNDING = 1e-5
TARGET = 2  # logit
quiet = pytest.mark.filterwarnings("ignore::Warning")  # the tools', of what they will change


def single(n_images=5):
    return images(n_images, SINGLE)


@pytest.fixture(params=["groups", "same", "tokens"])
def pair(request):
    return Pair(request.param, dtype=SINGLE)


@pytest.fixture
def one_pair():
    return Pair("3x3", dtype=SINGLE)


def traced(network):
    return torch.jit.trace(network, single())


def exported(network):
    any_number = ({0: torch.export.Dim("n_images")},)
    return torch.export.export(network, (single(),), dynamic_shapes=any_number).module()


def compiled(network):
    torch.compiler.reset()
    return torch.compile(network, backend="aot_eager", fullgraph=True)


def in_onnx(network):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs .[onnx]")
    pytest.importorskip("onnxscript", reason="needs .[onnx]")
    file, options = io.BytesIO(), {"dynamic_shapes": ({0: torch.export.Dim("n_images")},)}
    torch.onnx.export(network, (single(),), dynamo=True, verbose=False, **options).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@quiet
@pytest.mark.parametrize("tool", [traced, torch.jit.script, exported, compiled, in_onnx])
@pytest.mark.parametrize("form", ["plain", "exact"])
def test_both_forms_compute_the_same_in_other_tools(form, tool, pair):
    if (form, tool) == ("exact", torch.jit.script):
        return  # which cannot read it
    for graph in (True, False) if (form == "exact" and tool is not in_onnx) else (False,):
        with torch.set_grad_enabled(graph):
            elsewhere = tool(pair.plain if form == "plain" else pair.changed)
            for n_images in (5, 3):
                there, here = elsewhere(single(n_images)), pair.network(single(n_images))
                assert_close(there, here, ROUNDING)
                if form == "exact" and tool is not in_onnx:
                    assert_bit_equal(there, here)


MOVES = {
    "gate": lambda network: network.gate("layer", 1, 0, 0.0),
    "gate per image": lambda network: network.gate("layer", 1, 0, torch.arange(5.0)),
    "clamp": lambda network: network.clamp("layer", 3, 1, low=9.0),
    "rest": lambda network: network.gate("layer", 1, "rest", 0.0),
    "nothing": lambda _: nullcontext(),
}


@quiet
@pytest.mark.parametrize("tool", [traced, exported, compiled, in_onnx])
def test_a_network_that_is_exported_with_a_gate_and_a_hook_stays_so(tool, one_pair):
    concepts = one_pair.changed.layer.concepts
    hook = concepts.register_forward_hook(lambda _module, _args, z: 2 * z)
    with MOVES["gate"](one_pair.changed), torch.no_grad():
        elsewhere, moved = tool(one_pair.changed), one_pair.changed(single())
        assert_close(elsewhere(single()), moved, ROUNDING)
    assert not torch.allclose(moved, one_pair.network(single()), rtol=1e-3)
    hook.remove()
    assert_same_outputs(one_pair.network, one_pair.changed, single())  # exporting left it alone
    assert_close(tool(one_pair.changed)(single()), one_pair.network(single()), ROUNDING)


@quiet
def test_gates_and_clamps_move_in_a_compiled_network(one_pair):
    elsewhere = compiled(one_pair.changed)
    for name, move in MOVES.items():
        with move(one_pair.changed):
            moved = one_pair.changed(single())
            assert torch.equal(moved, one_pair.network(single())) == (name == "nothing")
            assert_close(elsewhere(single()), moved, ROUNDING)
    assert_bit_equal(elsewhere(single()), moved)  # of nothing moved


@quiet
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"pads by size"}))
def test_torch_fx_traces_both_forms_and_takes_out_concept_channels(kind):
    pair, followed = Pair(kind, dtype=SINGLE), torch.fx.symbolic_trace
    for name in ("gate", "clamp", "rest", "nothing"):
        with MOVES[name](pair.changed):
            moved, elsewhere = pair.changed(single()), followed(pair.changed)
        assert torch.equal(moved, pair.network(single())) == (name == "nothing")
        assert_bit_equal(elsewhere(single()), moved)
    assert_bit_equal(elsewhere(single(3)), pair.network(single(3)))
    assert_close(followed(pair.plain)(single()), pair.network(single()), ROUNDING)
    found = create_feature_extractor(pair.changed, ["layer.concepts"])(single())
    read = found["layer.concepts"].select(pair.dim, pair.changed.layer.names.index("1.0"))
    assert_close(read.reshape(5, -1), pair.concept_map(1, 0), ROUNDING)


def test_concepts_less_residuals_have_the_relevance_of_the_channel_in_captum(pair):
    attr = pytest.importorskip("captum.attr", reason="needs captum")

    def attribute(network, layer):
        method = attr.LayerGradientXActivation(network, layer)
        return method.attribute(single(), target=TARGET).movedim(pair.dim, 1)

    layer = pair.changed.layer
    concepts = attribute(pair.changed, layer.concepts)
    total = attribute(pair.changed, layer.residuals).index_add(1, layer.owners, concepts)
    assert concepts.abs().max() > 0
    expected = attribute(pair.network, pair.network.layer)[:, layer.channels]
    assert_close(total / expected.abs().max(), expected / expected.abs().max(), 1e-4)


def test_captum_attributes_to_the_image_as_in_the_original_and_by_grad_cam(one_pair):
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    by_image = [
        attr.IntegratedGradients(network).attribute(single(), target=TARGET, n_steps=16)
        for network in (one_pair.changed, one_pair.network)
    ]
    assert by_image[1].abs().max() > 0
    assert_close(*by_image, 1e-4)
    layer = one_pair.changed.layer
    values = attr.LayerActivation(one_pair.changed, layer.concepts).attribute(single())
    with cut_at(one_pair.network.layer, torch.clone) as cut:
        logit = one_pair.network(single())[:, TARGET].sum()
    (gradient,) = torch.autograd.grad(logit, cut.outputs)
    weight = gradient[:, layer.channels[layer.owners]].mean((2, 3), keepdim=True)
    cam = attr.LayerGradCam(one_pair.changed, layer.concepts).attribute(single(), target=TARGET)
    assert cam.abs().max() > 0
    assert_close(cam, (weight * values).sum(1, keepdim=True), 1e-4)


def test_integrated_gradients_of_concept_channels_add_up_in_captum(one_pair):
    """To the logit less the logit with the concept channels of the black image."""
    attr = pytest.importorskip("captum.attr", reason="needs captum")
    changed, concepts = one_pair.changed, one_pair.changed.layer.concepts
    method = attr.LayerIntegratedGradients(changed, concepts)
    relevance = method.attribute(single(), target=TARGET, n_steps=400)
    black = attr.LayerActivation(changed, concepts).attribute(torch.zeros_like(single()))
    logits = changed(single())
    handle = concepts.register_forward_hook(lambda _module, _arguments, _output: black)
    expected = (logits - changed(single()))[:, TARGET]
    handle.remove()
    assert expected.abs().max() > 0
    assert_close(relevance.flatten(1).sum(1), expected, 1e-2)  # of 400 steps


def relevances(network, names):
    """LRP by EpsilonPlusFlat with batch norms merged: of layers' outputs, (N, C) each."""
    composites = pytest.importorskip("zennit.composites", reason="needs zennit")
    canonizers = pytest.importorskip("zennit.canonizers", reason="needs zennit")
    norms = canonizers.SequentialMergeBatchNorm()
    kept = []
    composite = composites.EpsilonPlusFlat(canonizers=[norms], zero_params="bias")
    with composite.context(network) as ruled, ExitStack() as hooks:
        for module in map(network.get_submodule, names):
            keep = module.register_forward_hook(lambda _m, _a, output: kept.append(output))
            hooks.enter_context(keep)
        logits = ruled(single().requires_grad_())
        wanted = torch.eye(logits.shape[1])[[TARGET] * len(logits)]
        return [g.flatten(2).sum(2) for g in torch.autograd.grad(logits, kept, wanted)]


@pytest.mark.parametrize("kind", ["3x3", "groups", "batch norm behind"])
def test_relevance_of_concept_channels_sums_to_the_channels_in_zennit(kind):
    pair = Pair(kind, dtype=SINGLE)
    # zennit knows torch's own pooling, and gives relevance to what was active alone.
    pair.plain.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    wide, merged = relevances(pair.plain, ["layer.wide", "layer.merge"])
    owners = [name.split(".")[0] for name in pair.plain.layer.names]
    for part in pair.split.channels:
        mine = [row for row, owner in enumerate(owners) if owner == str(part.channel)]
        assert len(mine) == len(part.concepts) + 1
        assert_close(wide[:, mine].sum(1), merged[:, part.channel], 1e-4)
        assert wide[:, mine[:-1]].any(0).all()
    if kind != "batch norm behind":  # whose shift alone may have made a channel active
        assert_close(wide.sum(1), merged.sum(1), 1e-4)
    assert_close(pair.plain(single()), pair.network(single()), ROUNDING)  # all undone


def train(network, part="layer"):
    optimizer = torch.optim.SGD(network.get_submodule(part).parameters(), lr=0.05)
    dataset, losses = SyntheticImages(16, dtype=SINGLE), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(dataset.images), torch.tensor(dataset.targets))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_trained_rows_lower_the_loss_and_are_what_the_outputs_are_made_of(pair):
    layer, before = pair.changed.layer, pair.network(single())
    losses = train(pair.changed)
    assert losses[-1] < losses[0]
    assert not torch.allclose(pair.changed(single()), before)
    seen = []
    for module in (layer.concepts, layer.residuals, layer):
        module.register_forward_hook(lambda _m, _args, output: seen.append(output.clone()))
    pair.changed(single())
    concepts, residuals, output = seen
    expected = (-residuals).index_add(pair.dim, layer.owners, concepts)
    assert_close(output.index_select(pair.dim, layer.channels), expected, ROUNDING)


def test_training_the_rest_leaves_the_rows_exact(one_pair):
    train(one_pair.changed, "head")
    one_pair.network.head.load_state_dict(one_pair.changed.head.state_dict())
    assert_same_outputs(one_pair.network, one_pair.changed, single())
    assert not torch.allclose(one_pair.changed(single()), build("3x3", SINGLE)(single()))


def test_a_trained_state_dict_goes_through_files_and_copies(one_pair, tmp_path):
    train(one_pair.changed)
    save_file(one_pair.changed.state_dict(), tmp_path / "state")
    again = unbraid.apply(one_pair.network, one_pair.split)
    again.load_state_dict(load_file(tmp_path / "state"), strict=True)
    for one in (again, copy.deepcopy(one_pair.changed)):
        assert_same_outputs(one_pair.changed, one, single())


def test_a_split_network_can_go_to_another_device(one_pair):
    there = copy.deepcopy(one_pair.changed).to("meta")
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"meta"}
    with there.gate("layer", 1, 0, torch.ones(5)):
        assert there(single().to("meta")).shape == (5, 4)


def test_load_split_puts_a_file_into_the_network_that_it_was_made_for(one_pair, tmp_path):
    path, network = tmp_path / "split.safetensors", build("3x3", SINGLE)
    one_pair.split.save(path)
    changed = unbraid.load_split(network, path)
    with changed.gate("layer", 1, 0, 0.0), one_pair.changed.gate("layer", 1, 0, 0.0):
        assert_same_outputs(one_pair.changed, changed, single())
    with pytest.raises(ModelError, match="made for a network with other weights"):
        unbraid.load_split(build("3x3", SINGLE, seed=1), path)
    tensors, about = read_tensors(path)
    write_tensors(path, {**tensors, "weight": tensors["weight"] * (1 + 1e-6)}, about)
    assert_same_outputs(network, unbraid.load_split(network, path), single())  # computed, perhaps
    write_tensors(path, {**tensors, "weight": tensors["weight"] * 1.1}, about)
    with pytest.raises(RunError, match=r"not the network's .* file is damaged"):
        unbraid.load_split(network, path)
