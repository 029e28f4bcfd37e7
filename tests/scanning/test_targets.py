"""Targets: shares by another number than the class's logit, or none, beside plain autograd."""

import json
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import checks
import unbraid
from other_networks import NAMED, OUTPUTS, Body, build, images, mean
from tiny_networks import SyntheticImages
from tiny_networks import build as build_classifier
from unbraid.base.errors import DataError, LayerError, ModelError, RunError, UsageError
from unbraid.measuring.results import read_ablation
from unbraid.scanning.scan import usable_layers
from unbraid.scanning.targets import read_target

COLUMNS = ("pooled", "n_positions", "index", "spread", "spread_start")


def relevance_of(network, image, value):
    """Gradient x activation of the layer's channels for a number of one image's output, (C,)."""
    kept = []
    hook = network.layer.register_forward_hook(lambda *args: kept.append(args[-1]))
    try:
        with torch.enable_grad():
            number = value(network(image[None]))
            (gradient,) = torch.autograd.grad(number, kept[0], materialize_grads=True)
    finally:
        hook.remove()
    return (kept[0].detach() * gradient).flatten(2).sum(2)[0]


def shares_of(scan):
    layer = scan.layer
    (records,) = scan.shards()
    return torch.stack([records.share_of(o) for o in range(layer.n_out)], 1)


def assert_shares(scan, network, dataset, value):
    """Compare with autograd by hand, image by image; what is too small was not kept."""
    found, n_seen = shares_of(scan), 0
    for n in range(len(dataset)):
        relevance = relevance_of(network, dataset[n][0], value)
        total = relevance.clamp(min=0).sum()
        wanted = relevance / total if total > 0 else torch.zeros_like(relevance)
        wanted[wanted < scan.manifest.min_share] = 0
        torch.testing.assert_close(found[n].double(), wanted, rtol=1e-6, atol=1e-9)
        n_seen += int((wanted > 0).sum())
    assert n_seen > 5  # else little was compared


@pytest.mark.parametrize("kind", NAMED)
def test_shares_are_those_of_the_target(kind, tmp_path):
    network, dataset = build(kind), images()
    target, value = NAMED[kind]
    if callable(target):
        target, value = (
            (lambda out: out[1]["inner"][0].square().mean((1, 2, 3))),
            (lambda out: target(out)[0]),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scan = unbraid.scan(network, "layer", dataset, tmp_path, target=target, batch_size=4)
    assert_shares(scan, network, dataset, value)
    other = build(kind, seed=2)  # the twin: shares of another network
    with pytest.raises(AssertionError):
        assert_shares(scan, other, dataset, value)


@pytest.mark.parametrize("write", ["npy", "pt", "safetensors"])
@pytest.mark.parametrize("kind", ["embedding", "encoder"])
@pytest.mark.parametrize("by_class", [False, True])
def test_shares_are_those_of_an_embedding_beside_vectors_of_a_file(write, kind, by_class, tmp_path):
    network, dataset = build(kind), images()
    vectors = torch.randn(4, 5, dtype=torch.float64) if by_class else torch.randn(5).double()
    file = tmp_path / f"texts.{write}"
    if write == "npy":
        np.save(file, vectors.numpy())
    elif write == "pt":
        torch.save({"text": vectors}, file)
    else:
        safetensors.torch.save_file({"text": vectors}, file)
    scan = unbraid.scan(network, "layer", dataset, tmp_path / "a", target=f"embedding:{file}")
    found = shares_of(scan)
    for n, (image, label) in enumerate(images()):
        own = vectors[label] if by_class else vectors

        def cosine(out, own=own):
            out = out if isinstance(out, torch.Tensor) else out.pooler_output
            return (out[0] @ own) / (out[0].norm() * own.norm())

        relevance = relevance_of(network, image, cosine)
        wanted = relevance / relevance.clamp(min=0).sum()
        torch.testing.assert_close(
            found[n].double(), torch.where(wanted >= 0.005, wanted, 0), rtol=1e-6, atol=1e-9
        )
    assert scan.manifest.target.startswith(f"embedding:texts.{write} [")


def test_relevance_is_linear_in_the_target():
    network, (image, _) = build("embedding"), images(1)[0]
    one, other = (relevance_of(network, image, lambda out, k=k: out[0, k]) for k in (0, 3))
    both = relevance_of(network, image, lambda out: 2 * out[0, 0] - 3 * out[0, 3])
    torch.testing.assert_close(both, 2 * one - 3 * other)


def test_the_label_as_a_function_gives_the_same_shares_as_the_label(tmp_path):
    network, dataset = build_classifier("3x3"), SyntheticImages(8)
    dataset.targets = [2] * 8
    usual = unbraid.scan(network, "layer", dataset, tmp_path / "a")
    with pytest.warns(UserWarning, match=r"target .* is known by its name and code alone"):
        own = unbraid.scan(
            network, "layer", dataset, tmp_path / "b", target=lambda logits: logits[:, 2]
        )
    with pytest.warns(UserWarning, match="name and code"):
        raw = unbraid.scan(
            network, "layer", dataset, tmp_path / "c", target=lambda logits: logits[:, 1]
        )
    checks.assert_bit_equal(shares_of(own), shares_of(usual))
    assert not torch.equal(shares_of(raw), shares_of(usual))
    assert "<lambda> [code" in own.manifest.target
    assert own.manifest.target != raw.manifest.target  # as their code differs


@pytest.mark.parametrize("kind", OUTPUTS)
def test_without_a_target_no_gradient_is_asked_for(kind, tmp_path, monkeypatch):
    network, dataset = build(kind), images()

    def refuse(*_, **__):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    dataset.targets = [-1] * len(dataset)
    with pytest.raises(UsageError, match="pass labels='predicted' or labels='none'"):
        unbraid.scan(network, "layer", dataset, tmp_path, target=None)
    scan = unbraid.scan(network, "layer", dataset, tmp_path, target=None, labels="none")
    (records,) = scan.shards()
    assert (records.label.unique().tolist(), len(records.share_channel)) == ([0], 0)
    assert (scan.class_names, scan.manifest.target) == (("no label",), "none")
    found = unbraid.find(scan, images={3: [[0, 4, 8], [1, 5]]})
    split = unbraid.split(scan, found)
    changed = unbraid.apply(network, split)
    output = unbraid.compare_outputs(network, changed, dataset, tolerance=0.0, target=None)
    assert (output.max_abs_logit_diff, output.top1_agreement, output.n_images) == (0.0, None, 9)
    assert unbraid.evaluate(split, scan).channels[0].separation_error < 0.5


def test_without_a_target_all_else_is_as_with_labels(tmp_path):
    network, dataset = build_classifier("3x3"), SyntheticImages(12)
    usual = unbraid.scan(network, "layer", dataset, tmp_path / "a", batch_size=5)
    none = unbraid.scan(network, "layer", dataset, tmp_path / "b", batch_size=5, target="none")
    (one,), (other,) = usual.shards(), none.shards()
    for name in (*COLUMNS, "label"):
        checks.assert_bit_equal(getattr(other, name), getattr(one, name))
    groups = {0: [[0, 4, 8], [1, 5]]}
    masks = [
        unbraid.split(s, unbraid.find(s, images=groups)).channels[0].masks for s in (usual, none)
    ]
    checks.assert_bit_equal(*masks)


class Detached(Body):
    """What autograd cannot go through: a layer is scanned without a target all the same."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x).detach()


def test_a_network_without_gradients_is_scanned_without_a_target(tmp_path):
    network = Detached(mean).double()
    with pytest.raises(LayerError, match="does not reach"):
        unbraid.scan(network, "layer", images(), tmp_path / "a")
    unbraid.scan(network, "layer", images(), tmp_path / "b", target=None)
    with pytest.raises(LayerError, match=r"has no layer that can be split.*target='none' needs"):
        unbraid.scan(network, "all", images(), tmp_path / "c")
    assert unbraid.scan(network, "all", images(), tmp_path / "d", target=None).keys() >= {"layer"}


class Shuffled(Body):
    """Tiles laid into the batch tile by tile, so that those of an image do not lie together."""

    def __init__(self, together):
        super().__init__(mean)
        self.together = together

    def forward(self, x):
        tiles = x.unflatten(3, (2, 4)).movedim(3, 1 if self.together else 0).flatten(0, 1)
        out = super().forward(tiles)
        return out.unflatten(0, (-1, 2) if self.together else (2, -1)).mean(
            1 if self.together else 0
        )


@pytest.mark.parametrize("together", [True, False])
def test_parts_of_an_image_are_seen_to_lie_together_without_a_gradient(together, tmp_path):
    network = Shuffled(together).double()
    if together:
        usual = unbraid.scan(network, "layer", images(8), tmp_path / "a")
        none = unbraid.scan(network, "layer", images(8), tmp_path / "b", target=None)
        checks.assert_bit_equal(*(next(s.shards()).pooled for s in (usual, none)))
        return
    for target in ("label", None):
        with pytest.raises(LayerError, match="does not lie together; use batch_size=1"):
            unbraid.scan(network, "layer", images(8), tmp_path, target=target)


def one_file(tmp_path, tensor, name="v.pt"):
    torch.save(tensor, tmp_path / name)
    return f"embedding:{tmp_path / name}"


BAD_NAMES = {
    "classes": "There is no target 'classes'; write it: label, none",
    "segmentatoin:3": "Did you mean segmentation",
    "segmentation": "write it as segmentation:CLASS",
    "segmentation:": "not as segmentation:CLASS; give a whole number",
    "segmentation:cat": "whole number from 0 on",
    "regression:-1": "whole number from 0 on",
    "none:3": "write it as none",
    "label:3": "write it as label",
    "embedding:": "There is no file ''",
    "embedding:gone.pt": "There is no file 'gone.pt'",
    7: "target is an int; give a name",
    'x"><script>\n': "There is no target 'x\"><script>",
}


@pytest.mark.parametrize("target", BAD_NAMES, ids=str)
def test_a_target_that_is_none_is_told_before_anything_is_read(target, tmp_path):
    with pytest.raises(UsageError) as error:
        unbraid.scan(build("map"), "layer", object(), tmp_path, target=target)
    assert BAD_NAMES[target] in str(error.value)
    assert "\n" not in str(error.value)


BAD_VALUES = {
    "one number of all": ("map", lambda out: out.sum(), r"a tensor \(\) for a batch of 9"),
    "a map": ("map", lambda out: out.mean(1), r"of shape \(9,\)"),
    "no tensor": ("map", lambda out: [1.0] * len(out), "gives a list for a batch of 9"),
    "detached": ("map", lambda out: out.detach().mean((1, 2, 3)), "has no gradient, though"),
    "counted": ("map", lambda out: out.argmax(1).sum((1, 2)), "which have no gradient; let it"),
    "NaN": ("map", lambda out: out.mean((1, 2, 3)) * torch.nan, "of image 0 is NaN or infinite"),
    "wrong key": ("map", lambda out: out.scores, "fails on the network's output, a tensor"),
    "no such class": ("map", "segmentation:5", "have classes 0 to 4"),
    "no map": ("embedding", "segmentation:1", "not maps of logits of shape"),
    "no boxes": ("map", "detection:1", "not a list of dictionaries with scores and labels"),
    "no such output": ("pose", "regression:4", "has outputs 0 to 3"),
    "several outputs": ("tuple", "regression:0", "not numbers of shape (images, ...)"),
    "no embedding": ("map", lambda p: one_file(p, torch.ones(5)), "not embeddings of shape"),
    "other vectors": ("embedding", lambda p: one_file(p, torch.ones(6)), "of 6 numbers, but"),
    "too few vectors": ("embedding", lambda p: one_file(p, torch.ones(2, 5)), "holds 2 vectors"),
    "zero vector": ("embedding", lambda p: one_file(p, torch.zeros(5)), "zero or not finite"),
    "two tensors": ("embedding", lambda p: one_file(p, [torch.ones(5)] * 2), "no single vector"),
}
FILES = ("no embedding", "other vectors", "too few vectors", "zero vector", "two tensors")


@pytest.mark.filterwarnings("ignore:The target")
@pytest.mark.parametrize("case", BAD_VALUES)
def test_a_target_that_does_not_fit_the_network_is_told_in_one_sentence(case, tmp_path):
    kind, target, words = BAD_VALUES[case]
    target = target(tmp_path) if case in FILES else target
    with pytest.raises((UsageError, ModelError, DataError)) as error:
        unbraid.scan(build(kind), "layer", images(), tmp_path / "a", target=target)
    message = str(error.value)
    assert words.replace("\\", "") in message
    assert "\n" not in message
    assert message.endswith(".")
    assert not list((tmp_path / "a").glob("shard-*"))


def test_files_that_are_no_vectors_are_refused(tmp_path):
    for name, content in {"a.npy": b"no", "b.pt": b"no", "c.safetensors": b"no"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot be read .*give a tensor as .npy"):
            unbraid.scan(
                build("map"), "layer", images(), "x", target=f"embedding:{tmp_path / name}"
            )


def test_scans_of_other_targets_are_not_joined_or_gone_on_with(tmp_path):
    network, dataset = build("embedding"), images(8)
    dataset.ids = [f"i{n}" for n in range(8)]
    unbraid.scan(network, "layer", dataset, tmp_path / "a", target="regression:1")
    again = unbraid.scan(network, "layer", dataset, tmp_path / "a", target="regression:1")
    assert json.loads((again.path / "manifest.json").read_text())["target"] == "regression:1"
    for target in ("regression:2", None, "label"):
        with pytest.raises(RunError, match="a difference in the target"):
            unbraid.scan(network, "layer", dataset, tmp_path / "a", target=target)
    parts = [Subset(dataset, range(4)), Subset(dataset, range(4, 8))]
    for part, target in zip(parts, ("regression:1", "regression:2"), strict=True):
        unbraid.scan(network, "layer", part, tmp_path / target, target=target)
    with pytest.raises(RunError, match="cannot be read as one, with a difference in the target"):
        unbraid.open_scan([tmp_path / "regression:1", tmp_path / "regression:2"])


def test_steps_that_need_relevance_or_labels_say_so(tmp_path):
    network, dataset = build_classifier("3x3"), SyntheticImages(12)
    none = unbraid.scan(network, "layer", dataset, tmp_path / "a", target=None)
    bare = unbraid.scan(network, "layer", dataset, tmp_path / "b", target=None, labels="none")
    for asked in ({}, {"concepts": "whole"}, {"channels": {0: [[0], [1]]}}, {"tau": "auto"}):
        with pytest.raises(UsageError, match="without a target, so it does not tell which chan"):
            unbraid.find(none, **asked)
    with pytest.raises(UsageError, match="without a target"):
        unbraid.sensitivity(none)
    unbraid.find(bare, concepts="clusters", tau="auto")
    with pytest.raises(UsageError, match="target 'label' is of each image's class, so labels='no"):
        unbraid.scan(network, "layer", dataset, tmp_path / "c", labels="none")
    with pytest.raises(UsageError, match="labels is 'no'; use 'given', 'predicted' or 'none'"):
        unbraid.scan(network, "layer", dataset, tmp_path / "c", labels="no")
    changed = unbraid.apply(
        network, unbraid.split(none, unbraid.find(none, images={0: [[0], [1]]}))
    )
    with pytest.raises(UsageError, match="Without a target there is no number"):
        unbraid.ablate(changed, dataset, target=None)
    with pytest.raises(UsageError, match="With the target 'none' there is no relevance to tell"):
        unbraid.explain(changed, dataset[0][0], target=None)


class OfSeveral(SyntheticImages):
    """Two labels for most images, none for some."""

    def __init__(self, n):
        super().__init__(n)
        self.several = [[k % 4, (k + 1) % 4] if k % 5 else [] for k in range(n)]
        del self.targets

    def __len__(self):
        return len(self.several)

    def __getitem__(self, index):
        labels = torch.tensor(self.several[index], dtype=torch.int64)
        return self.images[index], F.one_hot(labels, 4).sum(0)


def test_an_image_of_several_labels_counts_once_for_each(tmp_path):
    network, dataset = build_classifier("3x3"), OfSeveral(12)
    single = unbraid.one_per_label(dataset)
    wanted = [(k, t) for k, own in enumerate(dataset.several) for t in sorted(own)]
    assert [(single.source(n), single.targets[n]) for n in range(len(single))] == wanted
    scan = unbraid.scan(network, "layer", single, tmp_path, target="multilabel")
    (records,) = scan.shards()
    image = torch.tensor([k for k, _ in wanted])
    assert torch.equal(records.group[:, None] == records.group, image[:, None] == image)
    found = shares_of(scan)
    for n, (k, t) in enumerate(wanted):
        relevance = relevance_of(network, dataset.images[k], lambda out, t=t: out[0, t])
        share = relevance / relevance.clamp(min=0).sum()
        torch.testing.assert_close(
            found[n].double(), torch.where(share >= 0.005, share, 0), rtol=1e-6, atol=1e-9
        )
    lists = [own for own in dataset.several]
    dataset.targets = lists
    assert unbraid.one_per_label(dataset).targets == [t for _, t in wanted]
    for wrong in ([3] * 12, [[0.5]] * 12, [torch.tensor([0.2, 1.0])] * 12, [["a"]] * 12):
        dataset.targets = wrong
        with pytest.raises(DataError, match=r"labels of image 0 are no several labels; give zeros"):
            unbraid.one_per_label(dataset)
    dataset.targets = [[]] * 12
    with pytest.raises(DataError, match="No image of the data set has a label"):
        unbraid.one_per_label(dataset)


@pytest.mark.parametrize("kind", ["map", "boxes", "pose", "tuple"])
def test_a_target_is_what_switching_off_costs(kind, tmp_path):
    network, dataset = build(kind), images(8)
    target, value = NAMED[kind]
    value = value or (lambda out: target(out)[0])
    scan = unbraid.scan(network, "layer", dataset, tmp_path, target=None)
    found = unbraid.find(scan, images={3: [[0, 4], [1, 5]]})
    changed = unbraid.apply(network, unbraid.split(scan, found))
    told = unbraid.ablate(changed, dataset, scan=scan, target=target, batch_size=3)
    (channel,) = told.channels
    for k in range(2):
        with changed.gate("layer", 3, k, 0.0), torch.no_grad():
            lost = []
            for n in (0, 4) if k == 0 else (1, 5):
                x = dataset[n][0][None]
                lost.append(float(value(network(x)) - value(changed(x))))
        own = channel.concepts[k].own
        assert own.n_images == 2
        assert own.logit == pytest.approx(sum(lost) / 2, abs=1e-9)
        assert own.accuracy != own.accuracy  # there is none
    assert told.target == unbraid.scanning.targets.read_target(target).name
    assert [one.n_images for one in told.classes] == [2, 2, 2, 2]
    split = unbraid.split(scan, found)
    unbraid.evaluate(split, scan, ablation=told).save(tmp_path / "evaluation.json")
    assert read_ablation(tmp_path / "evaluation.json").target == told.target
    with pytest.raises(UsageError, match="Suggestions go by accuracy, and with the target"):
        unbraid.suggest(told)
    explained = unbraid.explain(changed, dataset[0][0], target=target, heatmaps=False)[0]
    wanted = relevance_of(network, dataset[0][0], value)
    assert explained.classes == ()
    assert explained[3].whole.relevance[0] == pytest.approx(float(wanted[3]), rel=1e-6, abs=1e-12)


def test_another_split_network_shows_in_outputs_of_any_structure(tmp_path):
    for kind in OUTPUTS:
        network, dataset = build(kind), images(4)
        same = unbraid.compare_outputs(network, network, dataset, target=None, tolerance=0)
        assert same.max_abs_logit_diff == 0
        with pytest.raises(unbraid.UnbraidError, match="differ from the original's by"):
            unbraid.compare_outputs(network, build(kind, seed=2), dataset, target=None)


def with_aux():
    """A segmenter that puts out maps of a head that the target does not look at."""
    network = Body(lambda maps: maps).double().eval()
    network.aux = torch.nn.Conv2d(3, 5, 1).double()
    network.put_out = lambda maps: {"out": maps}
    forward = network.forward

    def both(x):
        return {**forward(x), "aux": network.aux(x)}

    network.forward = both
    return network


def test_all_layers_are_those_that_reach_the_target(tmp_path):
    seen = torch.stack([image for image, _ in images(2)])
    names = [spec.name for spec in usable_layers(with_aux(), seen, "segmentation:1")]
    assert names == ["stem.0", "layer", "head"]
    every = [spec.name for spec in usable_layers(with_aux(), seen)]  # of the whole output
    assert "aux" in every
    scans = unbraid.scan(with_aux(), "all", images(), tmp_path, target="segmentation:1")
    assert list(scans) == names


@pytest.mark.filterwarnings("ignore:The target .* is known by its name")
@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("detection:1", "not a list of dictionaries"),
        ("segmentation:9", "no class 9"),
        (lambda out: out["maps"].mean((1, 2, 3)), "fails on the network's output"),
    ],
)
def test_all_layers_with_a_target_that_does_not_fit_the_output_say_so(target, match, tmp_path):
    with pytest.raises(unbraid.UnbraidError, match=match):
        unbraid.scan(with_aux(), "all", images(), tmp_path, target=target)


def test_of_a_single_map_the_class_wins_where_its_logit_is_positive():
    maps = torch.tensor([[[[5.0, -3.0], [-3.0, 2.0]]]])
    label = torch.zeros(1, dtype=torch.int64)
    assert read_target("segmentation:0").of(maps, label, label).tolist() == [7.0]
