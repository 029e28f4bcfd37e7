"""What the app answers, compared with what the library says; every mistake in a sentence."""

import io
import json
import shutil
from dataclasses import replace
from itertools import chain

import numpy
import pytest
import torch
from PIL import Image

import unbraid
from explored import NAMES, logits_by_hand, open_own
from unbraid.base.errors import DataError, UnbraidError, UsageError
from unbraid.cli.look import explain
from unbraid.exploring.bench import findings_of, lay_out, measure
from unbraid.exploring.explorer import HAND, RUN, SAVED, open_explorer
from unbraid.measuring.reference_images import reference_images
from unbraid.scanning.targets import read_target

ODD = "\u202e<b>'\"\n\U0001f45c.png"


def a_file(picture, kind="PNG"):
    content = io.BytesIO()
    picture.save(content, kind)
    return content.getvalue()


@pytest.fixture
def dropped(explorer):
    return explorer.drop(a_file(explorer.seen("val/7").picture), ODD)["picture"]


def set_source(folder, named="label", **source):
    """Let a run's folder say something else of how it was made."""
    settings = json.loads((folder / "settings.json").read_text())
    settings["target"] = named
    settings["source"] |= source
    (folder / "settings.json").write_text(json.dumps(settings))


def first_channel(explorer):
    return explorer.opened.split.channels[0].channel


def two_groups(explorer, channel, n=12):
    """Images of two concepts of a channel, as a person would find them on the bench."""
    laid = explorer.bench(RUN, channel, 60)["images"]
    return [[one["index"] for one in laid if one["group"] == k][:n] for k in (0, 1)]


def test_all_answers_are_json_and_name_the_runs_channels(explorer, dropped):
    channel = first_channel(explorer)
    answers = [explorer.overview(), explorer.channels(RUN), explorer.thumbs(RUN)]
    answers += [explorer.channel(RUN, channel), explorer.bench(RUN, channel, 5)]
    answers += [explorer.explain(RUN, dropped, one) for one in (None, channel)]
    text = json.dumps(answers, allow_nan=False)
    assert text.isascii()
    split = explorer.opened.split
    assert [one["channel"] for one in answers[1]] == [part.channel for part in split.channels]
    part = split.channels[0]
    assert [c["name"] for c in answers[1][0]["concepts"]] == [split.name(c) for c in part.concepts]


def test_the_explanation_is_that_of_the_library(explorer, dropped):
    view = explorer.explain(RUN, dropped, None)
    model2 = unbraid.apply(explorer.opened.network.model, explorer.opened.split)
    image = explorer.opened.network.transform(explorer.seen(dropped).picture)
    own = unbraid.explain(model2, image, heatmaps=False)[0]
    assert [row["gate"] for row in view["rows"]] == [concept.name for concept, _ in own.strongest]
    shares = [f"{c.share[0]:.1%}".replace("-", "\N{MINUS SIGN}") for c, _ in own.strongest]
    assert [row["figures"]["share"] for row in view["rows"]] == shares
    assert view["predicted"] == own.class_names[0]
    assert all(row["map"].startswith("data:image/") for row in view["rows"])
    of_channel = explorer.explain(RUN, dropped, first_channel(explorer))["rows"]
    names = [f"{first_channel(explorer)}.{k}" for k in (0, 1, "rest")]
    assert [of_channel[place]["gate"] for place in (0, 1, -1)] == names


@pytest.mark.parametrize("gates", [{}, {"0": 0.0}, {"0": 1.7, "rest": 0.4}])
def test_gates_move_logits_as_the_librarys_and_leave_nothing_behind(explorer, dropped, gates):
    channel = first_channel(explorer)
    named = {f"{channel}.{concept}": value for concept, value in gates.items()}
    moved = explorer.gate(RUN, dropped, named)
    expected = logits_by_hand(explorer, dropped, named)
    before = logits_by_hand(explorer, dropped, {})
    for one in moved["classes"]:
        label = NAMES.index(one["name"])
        assert (one["before"], one["now"]) == (float(before[label]), float(expected[label]))
    assert moved["classes"][moved["predicted"]]["name"] == NAMES[int(expected.argmax())]
    again = explorer.gate(RUN, dropped, {})
    assert [c["now"] for c in again["classes"]] == [c["before"] for c in again["classes"]]


def test_a_run_with_another_target_is_explained_by_that_alone(bare):
    set_source(bare, "regression:3", target="regression:3")
    explorer = open_explorer(open_own(bare), None)
    assert explorer.opened.missing == ()
    channel, picture = first_channel(explorer), "val/7"
    view = explorer.explain(RUN, picture, None)
    model2 = unbraid.apply(explorer.opened.network.model, explorer.opened.split)
    image = explorer.opened.network.transform(explorer.seen(picture).picture)
    own = unbraid.explain(model2, image, heatmaps=False, target="regression:3")[0]
    shares = [f"{c.share[0]:.1%}".replace("-", "\N{MINUS SIGN}") for c, _ in own.strongest]
    assert [row["figures"]["share"] for row in view["rows"]] == shares
    (only,) = view["logits"]["classes"]
    assert (view["logits"]["ofClass"], only["name"]) == (False, "regression:3")
    assert only["before"] == float(logits_by_hand(explorer, picture, {})[3])
    gates = {f"{channel}.0": 0.0}
    (moved,) = explorer.gate(RUN, picture, gates)["classes"]
    assert moved["now"] == float(logits_by_hand(explorer, picture, gates)[3])
    assert moved["now"] != moved["before"] == only["before"]


@pytest.mark.parametrize(
    ("target", "output"),
    [
        ("segmentation:3", lambda z: {"out": z[:, :, None, None].expand(-1, -1, 2, 2)}),
        (
            "detection:3",
            lambda z: [
                {"scores": own.softmax(0), "labels": torch.arange(10), "boxes": torch.zeros(10, 4)}
                for own in z
            ],
        ),
    ],
)
def test_outputs_that_are_no_logits_are_shown_by_their_target(bare, target, output):
    opened = open_own(bare)
    model = opened.network.model
    model.register_forward_hook(lambda _module, _args, z: output(z))
    explorer = open_explorer(replace(opened, target=read_target(target)), None)
    view = explorer.explain(RUN, "val/3", None)
    assert view["rows"]
    (only,) = view["logits"]["classes"]
    image = opened.network.transform(explorer.seen("val/3").picture)[None]
    label = torch.zeros(1, dtype=torch.int64)
    assert only["name"] == target
    with torch.no_grad():
        assert only["now"] == float(read_target(target).of(model(image), label, label))


@pytest.mark.parametrize(
    ("target", "told", "why"),
    [
        ("none", "none", "With the run's target 'none' there is no relevance to tell"),
        (None, "embedding:{}", "no class to compare images with"),
        ("own.score", "label", "own.score, is not in its folder"),
    ],
)
def test_a_run_without_a_target_for_pictures_says_so_and_refuses_them(
    bare, tmp_path, target, told, why
):
    numpy.save(tmp_path / "vectors.npy", numpy.eye(10))
    told = told.format(tmp_path / "vectors.npy")
    set_source(bare, target or read_target(told).name, target=told)
    explorer = open_explorer(open_own(bare), None)
    (missing,) = explorer.opened.missing
    assert missing.startswith("No picture can be explained: ")
    assert why in missing
    assert not explorer.overview()["explains"]
    for ask in (
        lambda: explorer.explain(RUN, "val/0", None),
        lambda: explorer.gate(RUN, "val/0", {}),
    ):
        with pytest.raises(UsageError, match="no target that a picture"):
            ask()
    assert explorer.channel(RUN, first_channel(explorer))["shots"]


def test_a_picture_beside_tensors_of_ones_own_is_said_to_be_prepared_otherwise(
    explorer, bare, tmp_path, capsys
):
    note = "usual preprocessing, which the run's own tensors did not"
    explorer.seen("val/7").picture.save(tmp_path / "a.png")

    def told():
        own = f"{tmp_path / 'own.py'}:build"
        explain(bare, [tmp_path / "a.png"], model=own, out=tmp_path / "explained")
        in_command = " ".join(capsys.readouterr().err.split())
        return note in in_command, sum(note in words for words in open_own(bare).missing)

    assert told() == (False, 0)
    set_source(bare, data=f"{tmp_path / 'images.py'}:build")
    assert told() == (True, 1)


@pytest.mark.parametrize("content", [b"{", b'{"schema": 99}', b"[]", b""])
def test_measures_that_cannot_be_read_are_made_anew(bare, content):
    before = open_explorer(open_own(bare), None)
    channel = first_channel(before)
    expected = before.channel(RUN, channel)["figures"]
    assert len(before.opened.measured) == len(before.opened.split.channels)
    (bare / "evaluation.json").write_bytes(content)
    explorer = open_explorer(open_own(bare), None)
    (missing,) = explorer.opened.missing
    assert missing.startswith("Channels are measured again: ")
    assert "evaluation.json cannot be read" in missing
    found = explorer.channel(RUN, channel)
    assert found["figures"] == expected
    assert found["note"] == ""


def test_a_channel_of_many_concepts_keeps_them_all(explorer):
    channel = first_channel(explorer)
    images = [one["index"] for one in explorer.bench(RUN, channel, 60)["images"]]
    scan, before = explorer.opened.train_scan, explorer.opened.split
    found = findings_of(before).correct(scan, channel, groups=[images[k::12] for k in range(12)])
    explorer._splits.put("hand:many", unbraid.split(scan, found, refit=before))
    laid = explorer.bench("hand:many", channel, 5)
    assert len(laid["groups"]) == 12
    groups = [[one["index"] for one in laid["images"] if one["group"] == k] for k in range(12)]
    assert sorted(chain(*groups)) == sorted(images)
    made = explorer.part("hand:many", channel, groups, [])
    assert len(made["channel"]["concepts"]) == 12
    with pytest.raises(UsageError, match="at most 12"):
        explorer.part("hand:many", channel, [*groups[1:], groups[0][:1], groups[0][1:]], [])


def test_the_bench_lays_out_the_strongest_images_with_their_concepts(explorer):
    channel, scan = first_channel(explorer), explorer.opened.train_scan
    part = explorer.opened.split[channel]
    laid = lay_out(scan, explorer.opened.split, channel, 20)
    top = reference_images(scan, explorer.opened.split, n=20)[channel].original
    assert set(top.index.tolist()) <= set(laid.index.tolist())
    concept_of = {c: k for k, concept in enumerate(part.concepts) for c in concept}
    expected = [concept_of.get(label, -1) for label in laid.label.tolist()]
    assert laid.group.tolist() == expected
    assert {0, 1} <= set(expected)
    assert (laid.response.diff() <= 0).all()
    shown = [explorer.opened.train_images[index][1] for index in laid.index.tolist()]
    assert shown == laid.label.tolist()  # training images, not others of the same numbers
    undivided = next(
        c for c in range(scan.layer.n_out) if c not in explorer.opened.run.found.concepts
    )
    bare = lay_out(scan, explorer.opened.split, undivided, 20)
    assert len(bare.index) == 20
    assert set(bare.group.tolist()) == {-1}


def test_a_channel_parted_by_hand_is_that_of_find_and_split(explorer):
    channel, scan = first_channel(explorer), explorer.opened.train_scan
    groups = two_groups(explorer, channel)
    made = explorer.part(RUN, channel, groups, ["tops", ""])
    split = explorer.split(made["split"])
    before = explorer.opened.split
    corrected = explorer.opened.run.found.correct(scan, channel, groups=groups)
    expected = unbraid.split(scan, corrected, refit=before)
    for own, other in zip(split.channels, expected.channels, strict=True):
        assert own.channel == other.channel
        assert torch.equal(own.masks, other.masks)
    assert made["channel"]["concepts"][0]["name"] == "tops"
    assert made["channel"]["concepts"][1]["name"].startswith("group 2 (")
    error = measure(split, explorer.opened.val_scan, channel).separation_error
    assert made["channel"]["figures"][0]["figure"] == f"{error:.3f}"
    assert explorer.split(RUN) is before
    again = explorer.bench(made["split"], channel, 5)["images"]
    assert {one["index"] for one in again} >= {*groups[0], *groups[1]}
    assert all((one["group"] == 0) == (one["index"] in groups[0]) for one in again)


def test_an_undivided_channel_is_parted_and_the_others_stay(explorer):
    split, scan = explorer.opened.split, explorer.opened.train_scan
    divided = {part.channel for part in split.channels}
    channel = next(c for c in range(scan.layer.n_out) if c not in divided)
    laid = explorer.bench(RUN, channel, 24)
    assert laid["groups"] == []
    indices = [one["index"] for one in laid["images"]]
    made = explorer.split(explorer.part(RUN, channel, [indices[:8], indices[8:16]], [])["split"])
    assert {part.channel for part in made.channels} == divided | {channel}
    assert all(made[c] is split[c] for c in divided)


def test_a_saved_split_is_whole_reloads_and_is_never_replaced(explorer):
    channel = first_channel(explorer)
    made = explorer.part(RUN, channel, two_groups(explorer, channel), ["<b>", "\u202e"])
    saved = explorer.save(made["split"], "my \U0001f45c <i> 'split'")
    assert saved["saved"] == ["my \U0001f45c <i> 'split'"]
    model2 = unbraid.load_split(explorer.opened.network.model, saved["path"])
    image = explorer.opened.network.transform(explorer.seen("val/3").picture)[None]
    assert torch.equal(model2(image), explorer.opened.network.model(image))
    other = open_explorer(explorer.opened, explorer.save_to)  # another process, later
    assert other.overview()["saved"] == saved["saved"]
    names = [c["name"] for c in other.channel(saved["split"], channel)["concepts"]]
    assert names == [c["name"] for c in made["channel"]["concepts"]]
    again = other.part(saved["split"], channel, two_groups(explorer, channel, 6), [])
    before = (explorer.save_to / f"{saved['saved'][0]}.safetensors").read_bytes()
    with pytest.raises(UsageError, match="another name"):
        other.save(again["split"], saved["saved"][0])
    assert [path.read_bytes() for path in explorer.save_to.iterdir()] == [before]


@pytest.mark.parametrize(
    "name", ["", " ", "a/b", "..", ".hidden", "a\\b", "a\nb", "a\0b", "n" * 201]
)
def test_a_name_that_could_lead_elsewhere_is_refused(explorer, name):
    with pytest.raises(UsageError, match="Name the split by a file's name"):
        explorer.save(RUN, name)
    with pytest.raises(UnbraidError):
        explorer.split(f"{SAVED}{name}")
    assert not explorer.save_to.exists() or not list(explorer.save_to.iterdir())


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.channel(RUN, 99), "not divided"),
        (lambda e: e.channel(f"{HAND}0", 0), "gone from memory"),
        (lambda e: e.channel(f"{SAVED}nothing", 0), "cannot be read"),
        (lambda e: e.bench(RUN, 24, 5), "There is no channel 24"),
        (lambda e: e.bench(RUN, -1, 5), "There is no channel -1"),
        (lambda e: e.drop(b"no picture", "a.png"), "a.png cannot be read"),
        (lambda e: e.drop(b"", ODD), "cannot be read"),
        (lambda e: e.explain(RUN, "drop/0", None), "drop it again"),
        (lambda e: e.explain(RUN, "val/99999", None), "no image 99999"),
        (lambda e: e.explain(RUN, "val/../x", None), "not there"),
        (lambda e: e.explain(RUN, "val/0", 99), "not divided"),
        (lambda e: e.gate(RUN, "val/0", {"0.0": -1.0}), "from 0 to 10"),
        (lambda e: e.gate(RUN, "val/0", {"x": 0.0}), "no concept channel 'x'"),
        (lambda e: e.gate(RUN, "val/0", {"0.99": 0.0}), "no concept 99"),
        (lambda e: e.part(RUN, 0, [[0]], []), "two groups or more"),
        (lambda e: e.part(RUN, 0, [[0], []], []), "none of them empty"),
        (lambda e: e.part(RUN, 0, [[0], [0]], []), "twice; leave it in one group"),
        (lambda e: e.part(RUN, 0, [[0], [10**9]], []), "which the scan has not"),
        (lambda e: e.part(RUN, 0, [[0], [10**30]], []), "give a whole number"),
        (lambda e: e.part(RUN, 0, [[0], [1]], ["a", "a"]), "the same name"),
        (lambda e: e.part(RUN, 0, [[k] for k in range(10)], []), "at most 9"),
        (lambda e: e.part(RUN, 99, [[0], [1]], []), "There is no channel 99"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(explorer, ask, message):
    with pytest.raises(UnbraidError, match=message) as told:
        ask(explorer)
    assert "\n" not in str(told.value).strip() or isinstance(told.value, DataError)


def test_what_is_missing_is_told_and_the_rest_goes_on(bare, tmp_path):
    def names(opened):
        return " | ".join(opened.missing)

    without_network = open_own(bare, model=None)
    assert "No picture can be explained: The run's network is your own code" in names(
        without_network
    )
    explorer = open_explorer(without_network, None)
    assert explorer.save_to == bare / "splits"
    channel = first_channel(explorer)
    assert explorer.channel(RUN, channel)["shots"]
    with pytest.raises(UsageError, match="network is not there"):
        explorer.explain(RUN, "val/0", None)
    assert explorer.part(RUN, channel, two_groups(explorer, channel), [])["channel"]["shots"]

    settings = json.loads((bare / "settings.json").read_text())
    settings["source"]["data"] = str(tmp_path / "gone")
    (bare / "settings.json").write_text(json.dumps(settings))
    without_images = open_explorer(open_own(bare), None)
    assert "Reference images stay without pictures: The run's images are no longer in" in names(
        without_images.opened
    )
    assert without_images.thumbs(RUN) == {}
    assert without_images.channel(RUN, channel)["shots"]
    with pytest.raises(UsageError, match="not there"):
        without_images.picture_file("val/0", 96)

    shutil.rmtree(bare / "scan-val")
    without_val = open_explorer(open_own(bare), None)
    assert "no measures, and training images stand for reference: " in names(without_val.opened)
    view = without_val.channel(RUN, channel)
    assert view["shots"][0]["picture"].startswith("train/")
    assert "no measures" in view["note"]
    shutil.rmtree(bare / "scan-train")
    without_scans = open_explorer(open_own(bare), None)
    assert "no measures, and no reference images: " in names(without_scans.opened)
    assert without_scans.channel(RUN, channel)["shots"] == []
    (bare / "split.safetensors").unlink()
    with pytest.raises(UnbraidError, match="neither a split nor a scan"):
        open_own(bare)


def test_a_run_without_a_split_is_parted_by_its_training_scan_alone(bare):
    for name in ("split.safetensors", "evaluation.json"):
        (bare / name).unlink()
    shutil.rmtree(bare / "scan-val")
    explorer = open_explorer(open_own(bare), None)
    indices = [one["index"] for one in explorer.bench(RUN, 3, 30)["images"]]
    made = explorer.part(RUN, 3, [indices[:10], indices[10:20]], [])
    assert [part.channel for part in explorer.split(made["split"]).channels] == [3]
    assert made["channel"]["shots"]
    again = explorer.part(made["split"], 4, [indices[:10], indices[10:20]], [])
    assert [part.channel for part in explorer.split(again["split"]).channels] == [3, 4]


def test_a_run_without_a_split_can_be_parted_by_hand(bare):
    (bare / "split.safetensors").unlink()
    explorer = open_explorer(open_own(bare), None)
    assert "left no split" in explorer.opened.missing[0]
    assert explorer.channels(RUN) == []
    assert explorer.thumbs(RUN) == {}
    indices = [one["index"] for one in explorer.bench(RUN, 3, 30)["images"]]
    made = explorer.part(RUN, 3, [indices[:10], indices[10:20]], [])
    assert [one["channel"] for one in explorer.channels(made["split"])] == [3]
    assert explorer.explain(made["split"], "val/0", 3)["rows"]


def test_splits_of_another_network_are_refused(explorer, tmp_path):
    explorer.save_to.mkdir()
    (explorer.save_to / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(UnbraidError, match="cannot be read"):
        explorer.channels(f"{SAVED}junk")
    with pytest.raises(UsageError, match="holds a run or scan"):
        open_explorer(explorer.opened, explorer.opened.run.folder)


def test_a_pictures_file_is_small_and_cut_as_the_network_sees_it(explorer):
    large = explorer.drop(a_file(Image.effect_noise((900, 300), 50), "WEBP"), "large")["picture"]
    content, kind = explorer.picture_file(large, 192)
    assert kind == "image/webp"
    assert Image.open(io.BytesIO(content)).size == (192, 64)
    content, kind = explorer.picture_file("val/0", 192)
    assert kind == "image/png"
    assert Image.open(io.BytesIO(content)).size == (28, 28)
