"""Split networks in other people's tools: exporters, compilers, Captum, zennit, files, training."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_apply import TWO, Pair, Splits, images, make_split, output_gradient
from torch import Tensor, nn

import unbraid
from checks import assert_bit_equal, assert_close, assert_same_outputs
from tiny_networks import KINDS, SyntheticImages, build
from unbraid.base.errors import LayerError, ModelError, RunError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.splitting.splits import Split

SINGLE = torch.float32
QUICK = ("groups", "same", "tokens")  # the kinds that go through ONNX in every run
SOME_KINDS = ["3x3", "groups", "same", "batch norm behind", "tokens", "pooled features"]


@pytest.fixture(scope="module")
def split_of(tmp_path_factory) -> Splits:
    return Splits(tmp_path_factory.mktemp)


class SinglePair(Pair):
    """As most tools have it: in single precision, and in the plain form besides."""

    def __init__(self, kind: str, split: Split) -> None:
        self.network, self.split = build(kind, SINGLE), split
        self.changed = unbraid.apply(self.network, split)
        self.plain = unbraid.apply(self.network, split, form="plain")


@pytest.fixture(params=SOME_KINDS)
def pair(request, split_of) -> SinglePair:
    return SinglePair(request.param, split_of(request.param, TWO, SINGLE))


@pytest.fixture
def one_pair(split_of) -> SinglePair:
    return SinglePair("3x3", split_of("3x3", TWO, SINGLE))


def single(n_images: int = 5) -> Tensor:
    return images(n_images, SINGLE)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_what_is_not_near_is_told():
    with pytest.raises(AssertionError):
        assert_near(torch.tensor([1.0, 1.0001]), torch.ones(2))


# --- exporters and compilers ----------------------------------------------------------------------


def traced(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(network, single())


def scripted(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.jit.script(network)


def exported(network: nn.Module) -> Callable[[Tensor], Tensor]:
    any_number = ({0: torch.export.Dim("n_images")},)
    return torch.export.export(network, (single(),), dynamic_shapes=any_number).module()


def compiled(network: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(network, backend="aot_eager", fullgraph=True)


def in_onnx(network: nn.Module) -> Callable[[Tensor], Tensor]:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs .[onnx]")
    pytest.importorskip("onnxscript", reason="needs .[onnx]")
    file = io.BytesIO()
    any_number = ({0: torch.export.Dim("n_images")},)
    program = torch.onnx.export(
        network, (single(),), dynamo=True, verbose=False, dynamic_shapes=any_number
    )
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


quiet = pytest.mark.filterwarnings("ignore::Warning")  # the tools', of what they will change


@quiet
@pytest.mark.parametrize("tool", [traced, scripted, exported, compiled])
def test_the_plain_form_computes_the_same_in_other_tools(tool, pair):
    elsewhere = tool(pair.plain)
    for n_images in (5, 3):
        assert_near(elsewhere(single(n_images)).detach(), pair.network(single(n_images)).detach())


@quiet
@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in SOME_KINDS]
)
def test_both_forms_compute_the_same_in_onnx(kind, split_of):
    pair = SinglePair(kind, split_of(kind, TWO, SINGLE))
    for form in (pair.plain, pair.changed):
        elsewhere = in_onnx(form)
        for n_images in (5, 3):
            expected = pair.network(single(n_images)).detach()
            assert_near(elsewhere(single(n_images)).detach(), expected)


@quiet
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("tool", [traced, exported, compiled])
def test_the_exact_form_computes_the_same_to_the_last_bit_in_torchs_tools(tool, graph, pair):
    with torch.set_grad_enabled(graph):
        elsewhere = tool(pair.changed)
        for n_images in (5, 3):
            assert_bit_equal(elsewhere(single(n_images)), pair.network(single(n_images)))


@quiet
@pytest.mark.parametrize("tool", [traced, exported, compiled, in_onnx])
def test_a_network_that_is_exported_with_a_gate_moved_stays_so(tool, one_pair):
    with one_pair.changed.gate("layer", 1, 0, 0.0), torch.no_grad():
        elsewhere, moved = tool(one_pair.changed), one_pair.changed(single())
        assert_near(elsewhere(single()), moved)
    assert not torch.allclose(moved, one_pair.network(single()), rtol=1e-3)
    assert_same_outputs(one_pair.network, one_pair.changed, single())  # exporting left it alone
    assert_near(tool(one_pair.changed)(single()).detach(), one_pair.network(single()).detach())


@quiet
def test_gates_and_clamps_move_in_a_compiled_network(one_pair):
    elsewhere = compiled(one_pair.changed)
    assert_bit_equal(elsewhere(single()), one_pair.network(single()))
    for move in (
        lambda: one_pair.changed.gate("layer", 1, 0, 0.0),
        lambda: one_pair.changed.gate("layer", 1, 0, torch.arange(5.0)),
        lambda: one_pair.changed.clamp("layer", 3, 1, high=0.0),
    ):
        with move():
            moved = one_pair.changed(single())
            assert not torch.equal(moved, one_pair.network(single()))
            assert_near(elsewhere(single()), moved)
    assert_bit_equal(elsewhere(single()), one_pair.network(single()))


@quiet
@pytest.mark.parametrize("tool", [exported, compiled])
def test_a_hook_that_was_there_before_exporting_counts(tool, one_pair):
    one_pair.changed.layer.concepts.register_forward_hook(lambda _module, _args, z: 2 * z)
    moved = one_pair.changed(single())
    assert not torch.allclose(moved, one_pair.network(single()), rtol=1e-3)
    assert_near(tool(one_pair.changed)(single()), moved)


@quiet
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"pads by size"}))
def test_the_exact_form_is_traced_by_torch_fx(kind, split_of):
    pair = SinglePair(kind, split_of(kind, TWO, SINGLE))
    followed = torch.fx.symbolic_trace
    elsewhere = followed(pair.changed)
    for n_images in (5, 3):
        assert_bit_equal(elsewhere(single(n_images)), pair.network(single(n_images)))
    for move in (
        lambda: pair.changed.gate("layer", 1, 0, 0.3),
        lambda: pair.changed.clamp("layer", 3, 1, low=9.0),
    ):
        with move():
            moved, elsewhere = pair.changed(single()), followed(pair.changed)
        assert not torch.equal(moved, pair.network(single()))
        assert_bit_equal(elsewhere(single()), moved)
    assert_near(followed(pair.plain)(single()).detach(), pair.network(single()).detach())


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_torchvision_extracts_concept_channels(kind, split_of):
    from torchvision.models.feature_extraction import create_feature_extractor

    pair = SinglePair(kind, split_of(kind, TWO, SINGLE))
    seen: list[Tensor] = []
    handle = pair.changed.layer.concepts.register_forward_hook(lambda _m, _a, z: seen.append(z))
    pair.changed(single())
    handle.remove()
    extracted = create_feature_extractor(pair.changed, ["layer.concepts", "head"])(single())
    assert_bit_equal(extracted["layer.concepts"], seen[0])
    assert_bit_equal(extracted["head"], pair.network(single()))
    assert seen[0].abs().max() > 0


def test_the_plain_form_names_its_rows(pair):
    layer, names = pair.plain.layer, pair.plain.layer.names
    assert len(names) == len(layer.wide.weight)
    for part in pair.split.channels:
        weight = layer.wide.weight.flatten(1)
        for k, row in enumerate(part.rows):
            assert_bit_equal(weight[names.index(f"{part.channel}.{k}")], row)
        residual = weight[names.index(f"{part.channel}.residual")]
        assert_bit_equal(residual, part.residual_row)
    assert names[-1] == "7" or names[-1] == ""
    assert {"2", "4"} <= set(names)


# --- Captum: the exact form -----------------------------------------------------------------------


TARGET = 2


@pytest.fixture
def attr() -> Any:
    return pytest.importorskip("captum.attr", reason="needs captum")


def test_captum_attributes_to_the_image_as_in_the_original(pair, attr):

    def attribute(network: nn.Module) -> Tensor:
        return attr.IntegratedGradients(network).attribute(single(), target=TARGET, n_steps=16)

    expected = attribute(pair.network)
    assert expected.abs().max() > 0
    assert_near(attribute(pair.changed), expected)


def test_concepts_less_residuals_have_the_relevance_of_the_channel_in_captum(pair, attr):

    def attribute(network: nn.Module, layer: nn.Module) -> Tensor:
        method = attr.LayerGradientXActivation(network, layer)
        relevance = method.attribute(single(), target=TARGET)
        return relevance if relevance.dim() == 4 or relevance.dim() == 2 else relevance.mT

    layer = pair.changed.layer
    concepts = attribute(pair.changed, layer.concepts)
    total = attribute(pair.changed, layer.residuals).index_add(1, layer.owners, concepts)
    assert (concepts.flatten(2) if concepts.dim() > 2 else concepts).abs().max() > 0
    expected = attribute(pair.network, pair.network.layer)[:, layer.channels]
    assert_near(total.detach(), expected.detach(), 1e-4)


def test_grad_cam_of_concept_channels_is_what_their_definition_says(one_pair, attr):
    layer = one_pair.changed.layer
    values = attr.LayerActivation(one_pair.changed, layer.concepts).attribute(single())
    expected = output_gradient(one_pair.network, single())[:, layer.channels[layer.owners]]
    expected = (expected.mean((2, 3), keepdim=True) * values).sum(1, keepdim=True)
    cam = attr.LayerGradCam(one_pair.changed, layer.concepts).attribute(single(), target=TARGET)
    assert cam.abs().max() > 0
    assert_near(cam.detach(), expected.detach(), 1e-4)


def test_integrated_gradients_of_concept_channels_add_up(one_pair, attr):
    """To the logit less the logit with the concept channels of the black image."""
    changed, concepts = one_pair.changed, one_pair.changed.layer.concepts
    method = attr.LayerIntegratedGradients(changed, concepts)
    relevance = method.attribute(single(), target=TARGET, n_steps=400)
    black = attr.LayerActivation(changed, concepts).attribute(torch.zeros_like(single()))
    with torch.no_grad():
        logits = changed(single())
        handle = concepts.register_forward_hook(lambda _m, _a, _output: black)
        without = changed(single())
        handle.remove()
    expected = (logits - without)[:, TARGET]
    assert expected.abs().max() > 0
    assert_near(relevance.flatten(1).sum(1), expected, 1e-2)  # of 400 steps


# --- zennit: the plain form -----------------------------------------------------------------------


def relevances(network: nn.Module, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """LRP by EpsilonPlusFlat with batch norms merged: of the image and of layers' outputs."""
    composites = pytest.importorskip("zennit.composites", reason="needs zennit")
    canonizers = pytest.importorskip("zennit.canonizers", reason="needs zennit")
    composite = composites.EpsilonPlusFlat(
        canonizers=[canonizers.SequentialMergeBatchNorm()], zero_params="bias"
    )
    x, kept = single().requires_grad_(), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            output.retain_grad()
            kept[name] = output

        return hook

    with composite.context(network) as ruled:
        handles = [network.get_submodule(n).register_forward_hook(keep(n)) for n in names]
        logits = ruled(x)
        logits.backward(torch.eye(logits.shape[1])[[TARGET] * len(x)])
    for handle in handles:
        handle.remove()
    return x.grad, {name: output.grad for name, output in kept.items()}


@pytest.mark.parametrize("kind", ["3x3", "groups", "batch norm behind"])
def test_relevance_of_concept_channels_sums_to_the_channels_in_zennit(kind, split_of):
    pair = SinglePair(kind, split_of(kind, TWO, SINGLE))
    # zennit knows torch's own pooling, and gives relevance to what was active alone.
    pair.plain.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image, kept = relevances(pair.plain, ["layer.wide", "layer.merge"])
    names = pair.plain.layer.names
    wide, merged = (kept[name].flatten(2).sum(2) for name in ("layer.wide", "layer.merge"))
    assert image.abs().max() > 0
    for part in pair.split.channels:
        mine = [row for row, name in enumerate(names) if name.split(".")[0] == str(part.channel)]
        assert len(mine) == len(part.concepts) + 1
        assert_near(wide[:, mine].sum(1), merged[:, part.channel], 1e-4)
        concepts = wide[:, mine[:-1]]
        assert (concepts.abs().sum(0) > 0).all()
    if kind != "batch norm behind":  # whose shift alone may have made a channel active
        assert_near(wide.sum(1), merged.sum(1), 1e-4)
    assert_near(pair.plain(single()).detach(), pair.network(single()).detach())  # all undone


# --- files, copies, devices, number formats -------------------------------------------------------


def test_a_state_dict_goes_through_files(one_pair, tmp_path):
    from safetensors.torch import load_file, save_file

    state = one_pair.changed.state_dict()
    torch.save(state, tmp_path / "state.pt")
    save_file(state, tmp_path / "state.safetensors")
    for read in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        load_file(tmp_path / "state.safetensors"),
    ):
        again = unbraid.apply(one_pair.network, one_pair.split)
        with torch.no_grad():
            for parameter in again.parameters():
                parameter.zero_()
        again.load_state_dict(read, strict=True)
        assert_same_outputs(one_pair.network, again, single())


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_network_of_another_number_format_is_still_the_original(kind, split_of):
    pair = SinglePair(kind, split_of(kind, TWO, SINGLE))
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        changed, network = (copy.deepcopy(m).to(dtype) for m in (pair.changed, pair.network))
        assert_same_outputs(network, changed, single().to(dtype))


def test_a_split_network_can_go_to_another_device(one_pair):
    there = copy.deepcopy(one_pair.changed).to("meta")
    assert {t.device.type for t in (*there.parameters(), *there.buffers())} == {"meta"}
    assert there(single().to("meta")).shape == (5, 4)
    with there.gate("layer", 1, 0, torch.ones(5)):
        assert there(single().to("meta")).shape == (5, 4)


# --- training -------------------------------------------------------------------------------------


def train(network: nn.Module, n_steps: int, *, part: str = "") -> list[float]:
    chosen = [p for name, p in network.named_parameters() if name.startswith(part)]
    optimizer = torch.optim.SGD(chosen, lr=0.05)
    dataset, losses = SyntheticImages(16, dtype=SINGLE), []
    network.train()
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(dataset.images), torch.tensor(dataset.targets))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    network.eval()
    return losses


def test_trained_rows_lower_the_loss_and_are_what_the_outputs_are_made_of(pair):
    layer = pair.changed.layer
    before = copy.deepcopy(layer.rows)
    losses = train(pair.changed, 8, part="layer.")
    assert losses[-1] < losses[0]
    assert not torch.equal(layer.rows, before)
    dim = -1 if layer.spec.channels_last else 1
    seen: dict[str, Tensor] = {}
    for name in ("concepts", "residuals"):
        getattr(layer, name).register_forward_hook(
            lambda _m, _args, output, name=name: seen.update({name: output})
        )
    outputs: list[Tensor] = []
    layer.register_forward_hook(lambda _m, _a, output: outputs.append(output.clone()))
    pair.changed(single())
    expected = (-seen["residuals"]).index_add(dim, layer.owners, seen["concepts"])
    assert_near(outputs[0].index_select(dim, layer.channels), expected)


def test_a_trained_network_goes_through_its_state_dict_and_copies(one_pair):
    train(one_pair.changed, 3)
    again = unbraid.apply(one_pair.network, one_pair.split)
    again.load_state_dict(one_pair.changed.state_dict())
    for twin in (again, copy.deepcopy(one_pair.changed)):
        assert_same_outputs(one_pair.changed, twin, single())
    assert not torch.allclose(one_pair.changed(single()), one_pair.network(single()))


def test_training_the_rest_leaves_the_rows_exact(one_pair):
    train(one_pair.changed, 3, part="head")
    with torch.no_grad():
        one_pair.network.load_state_dict(
            {
                name.replace("layer.original", "layer"): value
                for name, value in one_pair.changed.state_dict().items()
                if name not in ("layer.rows", "layer.row_bias")
            }
        )
    assert_same_outputs(one_pair.network, one_pair.changed, single())


# --- a file from someone else ---------------------------------------------------------------------


def test_a_split_file_is_put_into_the_network_in_one_line(one_pair, tmp_path):
    one_pair.split.save(tmp_path / "split.safetensors")
    changed = unbraid.load_split(build("3x3", SINGLE), tmp_path / "split.safetensors")
    assert_same_outputs(one_pair.network, changed, single())
    with changed.gate("layer", 1, 0, 0.0), one_pair.changed.gate("layer", 1, 0, 0.0):
        assert_same_outputs(one_pair.changed, changed, single())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("masks.3", None, "not a split that can be read"),
        ("weight", lambda weight: weight * 2, "not the network's .* file is damaged"),
    ],
)
def test_a_damaged_file_is_refused_in_one_sentence(name, change, message, one_pair, tmp_path):
    path = tmp_path / "split.safetensors"
    one_pair.split.save(path)
    tensors, about = read_tensors(path)
    old = tensors.pop(name)
    more = {} if change is None else {name: change(old)}
    write_tensors(path, {**tensors, **more}, about)  # with checksums that fit
    with pytest.raises(RunError, match=message) as caught:
        unbraid.load_split(one_pair.network, path)
    assert "\n" not in str(caught.value)


def test_a_file_for_another_network_is_refused_in_one_sentence(one_pair, tmp_path):
    path = tmp_path / "split.safetensors"
    one_pair.split.save(path)
    with pytest.raises(ModelError, match="made for a network with other weights"):
        unbraid.load_split(build("3x3", SINGLE, seed=1), path)
    with pytest.raises(LayerError, match="no layer 'layer'"):
        unbraid.load_split(nn.Sequential(nn.Linear(3, 3)), path)
    with pytest.raises(RunError, match=r"nothing\.safetensors"):
        unbraid.load_split(one_pair.network, tmp_path / "nothing.safetensors")


def test_other_weights_of_the_layer_are_refused_but_for_rounding(tmp_path):
    network = build("1x1")
    split = make_split(network, tmp_path)
    part = split.channels[0]

    def of_weights(times: float) -> Split:
        return replace(split, channels=(replace(part, weight=part.weight * times),))

    with pytest.raises(RunError, match="are not the network's"):
        unbraid.apply(network, of_weights(1.1))
    changed = unbraid.apply(network, of_weights(1 + 1e-6))  # as of a layer that computes them
    assert_close(changed(images()), network(images()))
