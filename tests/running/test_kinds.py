"""Kinds of networks that are no classifiers, small and with random weights: from scan to page."""

import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torchvision.models import detection, segmentation

import unbraid
from tiny_networks import SyntheticImages, randomise_batch_norms
from unbraid.running.folders import Thresholds
from unbraid.running.run import run
from unbraid.scanning.scan_options import Loading

timm = pytest.importorskip("timm")
GROUPS = [[0, 4, 8], [1, 5]]


@dataclass(frozen=True)
class Kind:
    """How a network is built, which layer is split, and which target there is beside none."""

    build: object
    layer: str
    target: object
    size: tuple = (3, 64, 64)
    batch_size: int = 4


def segmenter(name):
    build = getattr(segmentation, name)
    return build(weights=None, weights_backbone=None, num_classes=4)


def detector(name, **options):
    build = getattr(detection, name)
    return build(weights=None, weights_backbone=None, num_classes=3, **options)


def transformers_model(name, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **options})
    return getattr(transformers, options.pop("kind", f"{name}Model"))(config)


class HuggingFace(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(pixel_values=images)


class Tower(nn.Module):
    """An image tower shaped as CLIP's: a class token, pre-norm blocks, a projection."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, 8, bias=False)
        self.token = nn.Parameter(torch.randn(24))
        self.places = nn.Parameter(torch.randn(17, 24) / 4)
        block = nn.TransformerEncoderLayer(
            24, 2, 48, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(24)
        self.project = nn.Linear(24, 16, bias=False)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.places
        return nn.functional.normalize(self.project(self.norm(self.blocks(x))[:, 0]), dim=1)


def encoder(name, **options):
    return timm.create_model(name, num_classes=0, **options)


def summed(output):
    return output["pooler_output"].square().sum(1)


DINO = {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 3}
SMALL = (3, 32, 32)
KINDS = {
    "deeplab": Kind(
        lambda: segmenter("deeplabv3_mobilenet_v3_large"), "backbone.2.block.0.0", "segmentation:?"
    ),
    "lraspp": Kind(
        lambda: segmenter("lraspp_mobilenet_v3_large"), "backbone.2.block.0.0", "segmentation:?"
    ),
    "ssdlite": Kind(
        lambda: detector("ssdlite320_mobilenet_v3_large", score_thresh=0.0, detections_per_img=20),
        "backbone.features.0.2.block.0.0",
        "detection:?",
    ),
    "faster r-cnn": Kind(
        lambda: detector(
            "fasterrcnn_mobilenet_v3_large_320_fpn",
            **{"box_score_thresh": 0.0, "min_size": 64, "max_size": 64},
            **{"rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10},
        ),
        "backbone.body.2.block.0.0",
        "detection:?",
    ),
    "regression": Kind(
        lambda: timm.create_model("resnet10t", num_classes=3),
        "layer2.0.downsample.1",
        "regression:1",
    ),
    "several labels": Kind(
        lambda: timm.create_model("resnet10t", num_classes=4), "layer2.0.downsample.1", "multilabel"
    ),
    "encoder": Kind(lambda: encoder("resnet10t"), "layer2.0.downsample.1", "regression:5"),
    "DINO with registers": Kind(
        lambda: encoder("vit_small_patch14_reg4_dinov2", **DINO),
        "blocks.1.mlp.fc1",
        "regression:0",
        (3, 56, 56),
    ),
    "CLIP's tower": Kind(Tower, "blocks.layers.1.linear1", "regression:0", SMALL),
    "Hugging Face's ViT": Kind(
        lambda: HuggingFace(transformers_model("ViT")),
        "network.pooler.dense",
        summed,
        SMALL,
    ),
    "Hugging Face's DINOv2": Kind(
        lambda: HuggingFace(transformers_model("Dinov2WithRegisters")),
        "network.encoder.layer.1.mlp.fc1",
        summed,
        SMALL,
    ),
}


def network_of(kind):
    torch.manual_seed(0)
    network = kind.build().eval()
    randomise_batch_norms(network)
    return network


def images_of(kind, n=10, **options):
    return SyntheticImages(n, size=kind.size, dtype=torch.float32, **options)


@torch.no_grad()
def commonest(network, dataset):
    """The class that random weights give most positions, or boxes."""
    output = network(dataset.images)
    if isinstance(output, list):
        return int(torch.cat([own["labels"] for own in output]).mode().values)
    return int(output["out"].argmax(1).flatten().mode().values)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("with_target", [False, True])
def test_a_network_goes_from_scan_to_page(name, with_target, tmp_path):
    kind = KINDS[name]
    network, dataset = network_of(kind), images_of(kind)
    target = kind.target if with_target else None
    if isinstance(target, str) and target.endswith("?"):
        target = target.replace("?", str(commonest(network, dataset)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a function as a target
        scan = unbraid.scan(
            network, kind.layer, dataset, tmp_path, target=target, batch_size=kind.batch_size
        )
    shares = sum(len(own.share_channel) for own in scan.shards())
    assert (shares > 0) == with_target
    found = unbraid.find(scan, images={1: GROUPS})
    split = unbraid.split(scan, found)
    changed = unbraid.apply(network, split)
    asked = {"target": target, "batch_size": kind.batch_size}
    output = unbraid.compare_outputs(network, changed, dataset, tolerance=0.0, **asked)
    assert (output.max_abs_logit_diff, output.n_images) == (0.0, 10)
    ablation = unbraid.ablate(changed, dataset, scan=scan, **asked) if with_target else None
    evaluation = unbraid.evaluate(split, scan, output=output, ablation=ablation)
    page = tmp_path / "report.html"
    unbraid.report(page, scan=scan, found=found, split=split, evaluation=evaluation)
    text = page.read_text()
    assert "top-1 accuracy" not in text
    assert "Accuracy lost by" not in text
    assert ("Target lost by" in text) == with_target
    assert ("the scan has no target" in text) != with_target


@pytest.mark.parametrize("name", ["ssdlite", "faster r-cnn"])
def test_images_of_different_sizes_are_taken_as_one_by_one(name, tmp_path):
    kind = KINDS[name]
    network, dataset = network_of(kind), images_of(kind, 4)
    dataset.images = [image[:, : 64 - 8 * k] for k, image in enumerate(dataset.images)]
    together = unbraid.scan(network, kind.layer, dataset, tmp_path / "a", target=None, batch_size=2)
    scan = unbraid.scan(network, kind.layer, dataset, tmp_path / "b", target=None, batch_size=1)
    pooled = [torch.cat(list(own.columns("pooled"))) for own in (together, scan)]
    assert torch.equal(*pooled)
    changed = unbraid.apply(
        network, unbraid.split(scan, unbraid.find(scan, images={1: [[0, 1], [2, 3]]}))
    )
    options = {"tolerance": 0.0, "target": None, "batch_size": 1}
    assert unbraid.compare_outputs(network, changed, dataset, **options).max_abs_logit_diff == 0


def test_layers_behind_the_proposals_are_scanned_one_image_at_a_time(tmp_path):
    kind = KINDS["faster r-cnn"]
    network, dataset = network_of(kind), images_of(kind, 4)
    for target in (None, "detection:1"):
        options = {"target": target, "batch_size": 1}
        scan = unbraid.scan(
            network, "roi_heads.box_head.fc6", dataset, tmp_path / str(target), **options
        )
        (records,) = scan.shards()
        assert records.n_positions.tolist() == [20] * 4 or records.n_positions.max() <= 20


class Body(nn.Sequential):
    """A classifier and what is asked of it in runs."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 4)),
        )
        self.double()


def job(target, **options):
    usual = {"source": {}, "title": "x", "features": False, "say": lambda _: None}
    usual |= {"thresholds": Thresholds(0.01, 0.5, 0.99), "loading": Loading(batch_size=16)}
    return {**usual, "target": target, **options}


def test_a_run_with_a_target_keeps_it_and_a_run_with_another_goes_elsewhere(tmp_path):
    train, val = SyntheticImages(48, seed=48), SyntheticImages(24, seed=24)
    made = run(Body(), "2", train, val, tmp_path / "a", **job("regression:1"))
    assert made.settings.target == "regression:1"
    assert made.evaluation.ablation.target == "regression:1"
    assert made.evaluation.output.top1_before is None
    text = made.page.read_text()
    assert "regression:1" in text
    assert "top-1 accuracy" not in text
    with pytest.raises(unbraid.UnbraidError, match="with a difference in the target"):
        run(Body(), "2", train, val, tmp_path / "a", **job("regression:2"))


def test_a_run_without_a_target_asks_for_clusters_before_it_scans(tmp_path):
    train, val = SyntheticImages(48, seed=48), SyntheticImages(24, seed=24)
    with pytest.raises(unbraid.UnbraidError, match="Without a target there are no classes to find"):
        run(Body(), "2", train, val, tmp_path / "a", **job(None))
    assert not (tmp_path / "a").exists()
    clusters = Thresholds(0.01, 0.5, 0.99, concepts="clusters")
    made = run(Body(), "2", train, val, tmp_path / "a", **job(None, thresholds=clusters))
    assert made.page.exists()
