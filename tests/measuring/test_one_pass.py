"""One pass of both networks tells what comparing, switching off and embedding tell apart."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

import unbraid
from checks import assert_close
from tiny_networks import SyntheticImages, WithBroken
from unbraid.base.errors import OutputChangedError, UsageError
from unbraid.measuring.one_pass import pass_once
from unbraid.measuring.semantics import look
from unbraid.networks.weights import hash_weights

SOME = [0, 2, 3, 7, 11, 12]
N_TOP = 3


class Counted(nn.Module):
    """A network that counts the images that it sees."""

    def __init__(self, network):
        super().__init__()
        self.network, self.n_images = network, 0

    def forward(self, x):
        self.n_images += len(x)
        return self.network(x)


def once(case, indices, **changed):
    options = {"encoder": unbraid.Penultimate(case.network), "channels": [1], "scan": None}
    options |= {"labels": None, "batch_size": 4, "workers": 0, "skip_broken": False}
    options |= {"model": case.network, "model2": unbraid.apply(case.network, case.split)}
    options |= {"dataset": case.images, "indices": indices, "progress": False, **changed}
    return pass_once(**options)


@pytest.mark.parametrize("kind", ["1x1", "3x3", "tokens"])
def test_pass_once_is_what_each_step_tells_by_itself(kind, case_of):
    case = case_of(kind)
    model2, encoder = unbraid.apply(case.network, case.split), unbraid.Penultimate(case.network)
    for indices in (SOME, range(13)):
        passed, chosen = once(case, indices), {"indices": indices, "batch_size": 4}
        assert passed.output == unbraid.compare_outputs(case.network, model2, case.images, **chosen)
        assert passed.output.n_images == len(indices)
        alone = unbraid.ablate(model2, case.images, channels=[1], **chosen)
        # As text, since the error of a single image is no number, and none equals another.
        assert str(passed.ablation.to_dict()) == str(alone.to_dict())
        assert passed.index == list(indices)
        with torch.no_grad():
            shown = encoder(case.images.images[list(indices)])
        assert_close(torch.stack(passed.embeddings), shown)
        looked = look(case.split, case.scan, indices, N_TOP)
        scores, whole = looked.embed(iter(passed.embeddings))
        asked = (case.split, case.scan, case.images, encoder)
        alone = unbraid.measure_semantics(*asked, n_top=N_TOP, **chosen)
        for channel, one in looked.judge("", scores, whole, {}).channels.items():
            assert one.n_images == len(indices)
            assert_close(one.original.clarity, alone.channels[channel].original.clarity)
            for mine, other in zip(one.concepts, alone.channels[channel].concepts, strict=True):
                assert_close(mine.monosemanticity, other.monosemanticity)


def test_pass_once_runs_each_network_once_and_only_the_images_asked_for(case):
    counted = Counted(case.network)
    once(case, SOME, model=counted, encoder=unbraid.Penultimate(counted))
    assert counted.n_images == len(SOME)
    counted = Counted(case.network)
    once(case, SOME, model=counted, encoder=None)
    assert counted.n_images == len(SOME)


def test_pass_once_notices_a_change_and_tells_of_missing_features_and_broken_images(case):
    changed = unbraid.apply(case.network, case.split)
    with torch.no_grad():
        changed.layer.original.weight.flatten()[0].add_(1e-3)
    with pytest.raises(OutputChangedError, match="more than the tolerance 0"):
        once(case, SOME, model2=changed)
    soft = nn.Sequential(case.network, nn.Softmax(1))
    spec = replace(case.split.layer, name="0.layer")
    soft2 = unbraid.apply(soft, replace(case.split, layer=spec, weights=hash_weights(soft)))
    passed = once(case, SOME, model=soft, model2=soft2, encoder=unbraid.Penultimate(soft))
    assert passed.embeddings == []
    assert "penultimate" in passed.fault
    assert passed.output.n_images == len(SOME)
    broken = once(case, SOME, dataset=WithBroken(13, seed=1), skip_broken=True)
    assert broken.index == [n for n in SOME if n != 3]
    assert len(broken.embeddings) == broken.output.n_images == len(SOME) - 1


def test_measures_of_some_images_are_those_of_a_data_set_of_these_alone(case):
    model2, few = unbraid.apply(case.network, case.split), Subset(case.images, SOME)
    few.targets = [case.images.targets[n] for n in SOME]
    of_few = unbraid.compare_outputs(case.network, model2, few)
    assert unbraid.compare_outputs(case.network, model2, case.images, indices=SOME) == of_few
    of_few = repr(unbraid.ablate(model2, few, channels=[1]))  # as nan is not itself
    assert repr(unbraid.ablate(model2, case.images, channels=[1], indices=SOME)) == of_few
    for wrong in ([], [13], [-1], "all"):
        for way in (
            lambda: unbraid.compare_outputs(case.network, model2, case.images, indices=wrong),  # noqa: B023
            lambda: unbraid.ablate(model2, case.images, indices=wrong),  # noqa: B023
        ):
            with pytest.raises(UsageError, match="indices"):
                way()


def test_measure_semantics_of_some_images_is_the_oracles_of_a_scan_of_these(case, tmp_path):
    encode = lambda x: nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)  # noqa: E731
    own = {"indices": SOME, "positions": True, "batch_size": 6}
    few = unbraid.scan(case.network, "layer", SyntheticImages(13, seed=1), tmp_path, **own)
    asked = {"n_top": N_TOP, "encoder": encode, "dataset": case.images, "split": case.split}
    all_of_few = unbraid.measure_semantics(scan=few, **asked)
    some_of_all = unbraid.measure_semantics(scan=case.scan, indices=SOME, **asked)
    for channel, one in all_of_few.channels.items():
        other = some_of_all.channels[channel]
        assert (one.n_images, one.crops) == (other.n_images, other.crops)
        figures = [(one.within, other.within), (one.between, other.between)]
        likes = [(own.original, *own.concepts) for own in (one, other)]
        for mine, its in zip(*likes, strict=True):
            figures += zip(vars(mine).values(), vars(its).values(), strict=True)
        for mine, its in figures:
            assert its == pytest.approx(mine, rel=1e-6, nan_ok=True)


def test_evaluate_takes_rectified_errors_from_a_scan_with_positions_of_some(case, tmp_path):
    plain = unbraid.scan(case.network, "layer", case.images, tmp_path / "plain")
    own = {"positions": True, "batch_size": 6}
    maps = unbraid.scan(
        case.network, "layer", case.images, tmp_path / "maps", indices=range(12), **own
    )
    both, whole = (
        unbraid.evaluate(case.split, plain, maps=maps),
        unbraid.evaluate(case.split, plain),
    )
    of_some = unbraid.evaluate(case.split, maps)
    for one, rest, rectified in zip(both.channels, whole.channels, of_some.channels, strict=True):
        expected = rectified.separation_error_rectified
        assert rest.separation_error_rectified is None
        assert one == replace(rest, separation_error_rectified=expected)
        assert expected != one.separation_error
    (few,) = [n for n, label in enumerate(case.images.targets[:12]) if label == 0][:1]
    lacks = unbraid.scan(case.network, "layer", case.images, tmp_path / "few", indices=[few], **own)
    for one in unbraid.evaluate(case.split, plain, maps=lacks).channels:
        assert one.separation_error_rectified is None
    with pytest.raises(UsageError, match="no scan with positions of the same images"):
        unbraid.evaluate(case.split, plain, maps=plain)
