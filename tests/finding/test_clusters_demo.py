"""Clusters of images in a trained network: they hold on unseen images, one class stays whole."""

from __future__ import annotations

import pytest

import unbraid
from unbraid import Findings, Scan
from unbraid.demo import network as demo
from unbraid.finding.arv import class_cosines, class_sums


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> tuple[Scan, Scan]:
    """Of the training images, and of unseen ones."""
    home, network = tmp_path_factory.mktemp("demo"), demo.load_network()
    train, unseen = (
        unbraid.scan(network, demo.LAYER, demo.load_images(name), home / name, batch_size=250)
        for name in demo.SPLITS
    )
    return train, unseen


@pytest.fixture(scope="module")
def found(scans) -> Findings:
    return unbraid.find(scans[0], concepts="clusters")


def test_clusters_agree_with_classes_and_are_there_in_unseen_images_too(found, scans):
    assert len(found.channels) >= 8
    assert sum(found.known_agreement) / len(found.known_agreement) > 0.8
    sums = class_sums(scans[1], [], found.clusters)
    assert all(sums.n_images[number] >= 10 for number in found.clusters)
    for pair in found.pairs:
        again = class_cosines(scans[1], sums, pair.channel, [pair.class1, pair.class2])[0, 1]
        assert float(again) == pytest.approx(pair.cosine, abs=0.05)


@pytest.mark.parametrize("label", range(10), ids=demo.CLASSES)
def test_images_of_one_class_have_one_cause(label, tmp_path):
    """So a channel fed by two random halves of a class is not polysemantic."""
    network, images = demo.load_network(), demo.load_images("train")
    own = {"classes": [label], "batch_size": 250}
    one = unbraid.scan(network, demo.LAYER, images, tmp_path, **own)
    assert one.manifest.n_images == 500
    assert unbraid.find(one, concepts="clusters").channels == ()
