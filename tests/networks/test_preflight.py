"""What a network must not do, and that every call leaves everything as it was."""

import random

import numpy as np
import pytest
import torch
from torch.nn.parameter import is_lazy

import unbraid
from checks import assert_same_tensors
from public_calls import call
from tiny_networks import SyntheticImages
from unbraid.base.errors import UnbraidError
from unsteady import (
    MIXING,
    RANDOM,
    REFUSED,
    SOUND,
    Begins,
    Ends,
    Small,
    _lone_refused,
    of_inference_mode,
    quantised,
)

MODES = {
    "plain": torch.enable_grad,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def images(n=17):
    return SyntheticImages(n, dtype=torch.float32)


def scan(network, folder, n=17, **options):
    return unbraid.scan(network, "layer", images(n), folder, batch_size=16, **options)


def random_state():
    numpy = np.random.get_state()[1].tolist()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy]


def state(network):
    """All that a call must leave as it was, tensors as themselves, where they are and as bytes."""
    found = random_state()
    for module in network.modules():
        found += [module.training, len(module._forward_hooks), len(module._forward_pre_hooks)]
        if not isinstance(module, torch.jit.ScriptModule):
            found += [list(module._parameters), list(module._buffers), list(module._modules)]
    for tensor in (*network.parameters(), *network.buffers()):
        found += [tensor.requires_grad, tensor.grad is None]
        if not is_lazy(tensor):
            found.append(tensor.is_inference())
            if not tensor.is_meta and tensor.layout == torch.strided:
                found += [id(tensor), tensor.data_ptr(), tensor.tolist()]
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", SOUND)
def test_scan_of_sound_network_works_and_leaves_it_as_it_was(name, tmp_path):
    network = SOUND[name]().train()
    before = state(network)
    seen = scan(network, tmp_path, positions=True)
    split = unbraid.split(seen, unbraid.find(seen, channels={0: [[0], [1]], 3: [[2], [3]]}))
    changed = unbraid.apply(network, split)
    assert unbraid.compare_outputs(network, changed, images(), tolerance=0).top1_agreement == 1
    unbraid.ablate(changed, images())
    unbraid.visualize(changed, "layer", images(), steps=2, n=1)
    assert state(network) == before


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_scan_of_network_that_cannot_be_scanned_says_why(name, tmp_path):
    make, sentence = REFUSED[name]
    random.seed(0)  # from which some networks draw
    network = make().train()
    before = state(network)
    with pytest.raises(UnbraidError, match=sentence):
        scan(network, tmp_path)
    assert state(network) == before
    assert not list(tmp_path.glob("shard-*"))


class OneAlone(SyntheticImages):
    """The fifth image is smaller than all others, so that it is alone in its batch."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return (image[..., :5] if index == 4 else image), label


@pytest.mark.parametrize("name", ["lone", "fails"])
def test_image_alone_in_its_batch_for_its_size_is_told_if_it_needs_others(name, tmp_path):
    network = Small(_lone_refused) if name == "lone" else Begins(_small_refused)
    dataset = OneAlone(8, dtype=torch.float32)
    told = {
        "lone": r"on more images at once but not on one image \(give two or more\), and one image "
        "is alone in its batch, .*; wrap the network",
        "fails": r"cannot run on .* \(not so small\); check size",  # which others would not mend
    }
    with pytest.raises(UnbraidError, match=told[name]):
        unbraid.scan(network, "layer", dataset, tmp_path, batch_size=4)


def _small_refused(_, x):
    if x.shape[-1] == 5:
        raise ValueError("not so small")
    return x


def test_scan_of_network_of_one_batch_size_or_with_a_squeezed_head_works(tmp_path):
    network = MIXING["mean"]()
    assert len(unbraid.scan(network, "layer", images(3), tmp_path, batch_size=1).labels_seen()) == 3
    network = Ends(lambda _, x: x.view(16, 4))  # and one of a fixed size takes full ones
    assert scan(network, tmp_path / "full", n=32).manifest.n_images == 32
    with pytest.raises(UnbraidError, match=r"does not reach the logits .*a quantised part"):
        unbraid.scan(quantised(), "layer", images(3), tmp_path / "other", batch_size=1)
    for name, network in (("whole", Small()), ("squeezed", SOUND["squeezed"]())):
        unbraid.scan(network, "head", images(), tmp_path / name, batch_size=16)
    assert_same_tensors(tmp_path / "whole", tmp_path / "squeezed")


@pytest.mark.parametrize("mode", MODES)
def test_public_calls_in_any_mode_move_no_random_numbers(mode, calls, tmp_path):
    for name, function in calls.items():
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        before = random_state()
        with MODES[mode]():
            call(function, **({"out": tmp_path} if name == "scan" else {}))
            assert torch.is_inference_mode_enabled() == (mode == "inference"), name
        assert random_state() == before, name


def test_scan_in_any_mode_and_of_images_of_any_has_the_same_records(tmp_path):
    with torch.inference_mode():
        held = images()
        held.images = held.images.clone()
    unbraid.scan(Small(), "layer", held, tmp_path / "held", batch_size=16)
    for mode, around in MODES.items():
        with around():
            scan(Small(), tmp_path / mode)
    kept = [next(unbraid.open_scan(tmp_path / name).shards()) for name in ("held", *MODES)]
    assert all(torch.equal(one.pooled, kept[0].pooled) for one in kept)


def test_apply_to_network_of_inference_mode_gives_ordinary_weights(tmp_path):
    network = of_inference_mode()
    seen = scan(network, tmp_path)
    with torch.inference_mode():
        split = unbraid.split(seen, unbraid.find(seen, channels={0: [[0], [1]]}))
        changed = unbraid.apply(network, split)
    assert not any(t.is_inference() for t in (*changed.parameters(), *changed.buffers()))
    changed(images().images).sum().backward()


def test_compare_outputs_blames_the_original():
    is_nan = Ends(lambda _, x: torch.where(x.argmax(1, keepdim=True) >= 0, x / 0 * 0, x))
    for original, told in (
        *((RANDOM[name](), "gives other outputs each time") for name in ("noise", "numpy")),
        (is_nan, "original network's own logits of image 0 are nan"),
    ):
        with pytest.raises(UnbraidError, match=told):
            unbraid.compare_outputs(original, Small(), images(), tolerance=0)
