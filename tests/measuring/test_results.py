"""What evaluation.json holds, and what is read back from it."""

import json
import math
from dataclasses import asdict, replace

import pytest

import unbraid
from checks import OF_CHANNEL, OVER_ALL
from tiny_networks import SyntheticImages
from unbraid import Semantics
from unbraid.base.errors import RunError, UsageError
from unbraid.measuring import likeness, results


# Of two images, only of classes 0 and 1, some groups have none.
@pytest.fixture(params=[(None, None), (SyntheticImages(2, seed=5), [7])], scope="module")
def result(request, case):
    """All measures of a case, some of them unknown."""
    images, channels = request.param
    changed = unbraid.apply(case.network, case.split)
    ablation = unbraid.ablate(changed, images or case.images, channels=channels)
    pooled = unbraid.Penultimate(case.network)
    semantics = unbraid.measure_semantics(case.split, case.scan, case.images, pooled)
    like = likeness.Likeness(math.nan, 0.5)
    unknown = replace(semantics.channels[6], between=math.inf, original=like)
    output = unbraid.compare_outputs(case.network, changed, case.images)
    some = Semantics({1: semantics.channels[1], 6: unknown})
    return unbraid.evaluate(case.split, case.scan, output=output, ablation=ablation, semantics=some)


def test_save_keeps_all_measures_and_they_are_read_back(result, tmp_path):
    path = tmp_path / "evaluation.json"
    with pytest.raises(RunError, match=r"evaluation\.json cannot be read"):
        results.read_output(path)
    result.save(path)
    assert results.read_output(path) == result.output
    assert repr(results.read_ablation(path)) == repr(result.ablation)  # in which NaN is like NaN
    assert repr(results.read_semantics(path)) == repr(result.semantics).replace("inf", "nan")
    assert repr(tuple(results.read_channels(path))) == repr(result.channels)
    replace(result, output=None, ablation=None, semantics=None).save(path)
    for read in (results.read_output, results.read_ablation, results.read_semantics):
        assert read(path) is None


def test_to_dict_has_the_measures_under_the_keys_of_the_contract(result):
    content = result.to_dict()
    assert content["output"] == asdict(result.output)
    assert content["summary"] == result.summary
    errors = {"separation_error", "separation_error_rectified", *OF_CHANNEL}
    for entry, channel in zip(content["channels"], result.channels, strict=True):
        assert set(entry) == {"layer", "channel", "concepts", *errors, "ablation", "semantics"}
        for part, concept in zip(entry["concepts"], channel.concepts, strict=True):
            assert part.keys() == vars(concept).keys()
    assert content["channels"][1]["semantics"]["original"]["monosemanticity"] is None
    assert content["channels"][2]["semantics"] is None


def test_a_file_of_before_measures_over_all_images_opens(result, tmp_path):
    path = tmp_path / "evaluation.json"
    content = json.loads(json.dumps(result.to_dict()))
    for channel in content["channels"]:
        for part, names in ((channel, OF_CHANNEL), *((k, OVER_ALL) for k in channel["concepts"])):
            for name in names:
                del part[name]
    path.write_text(json.dumps(content))
    old = results.read_channels(path)
    for channel, one in zip(result.channels, old, strict=True):
        assert one.separation_error == channel.separation_error
        assert {getattr(one, name) for name in OF_CHANNEL} == {None}
        assert {getattr(k, name) for k in one.concepts for name in OVER_ALL} == {None}


def test_a_file_from_before_rest_channels_were_switched_off_is_read(result, tmp_path):
    path, content = tmp_path / "evaluation.json", json.loads(json.dumps(result.to_dict()))
    for entry in content["channels"]:
        if entry["ablation"] is not None:
            del entry["ablation"]["rest_channel"]
    path.write_text(json.dumps(content))
    channels = [replace(channel, rest_channel=None) for channel in result.ablation.channels]
    older = replace(result.ablation, channels=tuple(channels))
    assert repr(results.read_ablation(path)) == repr(older) != repr(result.ablation)


def test_reading_a_damaged_file_is_told(result, tmp_path):
    for damage in (
        lambda content: content["channels"][2]["ablation"]["concepts"][0].pop("own"),
        lambda content: content["channels"][2]["ablation"]["rest_channel"].pop("others"),
        lambda content: content["ablation"]["classes"].pop(),
        lambda content: content["channels"][0]["semantics"].pop("within"),
    ):
        path = tmp_path / "evaluation.json"
        content = json.loads(json.dumps(result.to_dict()))
        damage(content)
        path.write_text(json.dumps(content))
        with pytest.raises(RunError, match=r"evaluation\.json cannot be .* start the run again"):
            (results.read_ablation(path), results.read_semantics(path))


def test_evaluate_results_of_another_split_are_refused(case, result):
    ablation, one = result.ablation, result.semantics.channels[1]
    first, *rest = ablation.channels
    fewer = replace(ablation, channels=(replace(first, concepts=first.concepts[:-1]), *rest))
    # The last is of two concepts, not three.
    for other in (fewer, replace(ablation, layer="stem"), Semantics({7: one})):
        name = type(other).__name__.lower()
        with pytest.raises(UsageError, match=f"The {name} (is|are) of another split"):
            unbraid.evaluate(case.split, case.scan, **{name: other})
