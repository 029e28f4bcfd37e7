"""The report: self-contained, harmless, bounded, and true to the figures that it was given."""

import math
import re
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch.utils.data import Subset

import unbraid
from handmade import plant
from pages import BROKEN, HOSTILE, LONG, Blobs, assert_harmless, notes, read, sections, shots
from unbraid.base.errors import UsageError
from unbraid.base.tables import count
from unbraid.measuring.evaluate import intervals
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.reporting import channel as channel_module
from unbraid.reporting import report as report_module
from unbraid.reporting import view
from unbraid.reporting.words import ABSENT, number, percent, significant


def test_report_shows_hostile_names_as_text_and_the_checker_sees_harm(page):
    for old, new in (
        ("</main>", '<img src="https://example.org/x.png"></main>'),
        ("</main>", "<script>1</script></main>"),
        ("</main>", '<p onclick="x()"></p></main>'),
        ("</main>", "<b><i></b></i></main>"),
        ("</style>", "@import 'x';</style>"),
        ("default-src 'none'", "default-src *"),
    ):
        with pytest.raises((AssertionError, ValueError)):
            assert_harmless(page.replace(old, new))
    root = read(page)
    drawn = " ".join(text.text for text in root.all("text"))
    assert set(HOSTILE) <= {bdi.text for bdi in root.all("bdi")}
    assert all(name in drawn for name in HOSTILE)
    in_elements = sum(bdi.text.count("\u202e") for bdi in root.all("bdi"))
    in_plain_text = len(re.findall("\u2068[^\u2069]*\u202e[^\u2069]*\u2069", page))
    assert in_elements + in_plain_text == page.count("\u202e")


def test_report_bounds_notes_and_how_channels_were_split_and_of_nothing_found_says_why(run, write):
    harm = "<script>x</script>\u2069\u202e" + 100_000 * "y"
    info = {"lambda": 0.031622, "kkt_residual": 1e-13, "<b>": 300 * "x"}
    parts = tuple(replace(part, info=info) for part in run.split.channels)
    text = write(found=replace(run.found, note=harm), split=replace(run.split, channels=parts))
    assert f"<script>x</script>\ufffd\u202e{1979 * 'y'}…" in [b.text for b in read(text).all("bdi")]
    for section in sections(text).values():
        assert f"lambda 0.03162 <b> {199 * 'x'}…" in section.all("p", "info")[0].text
    none = unbraid.find(run.train_scan, gamma=-1.0)
    page = read(write(found=none, split=None, evaluation=None, title=HOSTILE[0] + "\udcff"))
    assert none.hint in page.text
    assert not page.all("article")
    assert page.all("h1")[0].text == HOSTILE[0] + "\\udcff"


ALONE = ("errors", "coverage", "distances")  # kinds of paragraphs with figures


def figures_in(section):
    """The tables of a channel's section, and the figures that stand alone."""
    alone = [p for kind in ALONE for p in section.all("p", kind)]
    tables = [table.rows() for table in section.all("table")]
    return [*tables, [b.text for p in alone for b in p.all("b")]]


def figures_of(evaluation, channel):
    """What they should be: measures with intervals, ratios, likeness, effects, and the rest."""
    measured = next(c for c in evaluation.channels if c.channel == channel)
    off = next(c for c in evaluation.ablation.channels if c.channel == channel)
    seen = evaluation.semantics.channels[channel]
    sure = intervals(evaluation.responses[channel])
    last, measures, effects = off.rest_channel, [], []
    runs = [off.whole, *(part.by_class for part in (*off.concepts, last))]
    for concept, known in zip(measured.concepts, map(vars, sure.concepts), strict=True):
        measures.append([str(concept.n_images)])
        for name in ("retention", "leakage", "mimic_error", "silence_error", "auroc"):
            interval = " to ".join(map(number, known[name]))
            measures[-1].append(f"{number(getattr(concept, name))} {interval}")
        for name in ("r_precision", "auroc_all"):
            whole = number(getattr(concept, f"whole_{name}"))
            measures[-1].append(f"{number(getattr(concept, name))} whole {whole}")
    for concept in off.concepts:
        two, rest = (concept.own, concept.others), concept.rest
        row = [f"{percent(d.part)} {number(d.logit)} of {number(d.whole_logit)}" for d in two]
        row.append(f"{number(rest.logit)} whole {number(rest.whole_logit)}")
        row += [f"{percent(d.accuracy, 1)} whole {percent(d.whole_accuracy, 1)}" for d in two]
        effects.append(row)
    own, rest = last.concepts, last.others
    effects.append(
        [
            f"{percent(own.part)} {number(own.logit)} of {number(own.whole_logit)}",
            "",
            f"{number(rest.logit)} whole {number(rest.whole_logit)}",
            f"{percent(own.accuracy, 1)} whole {percent(own.whole_accuracy, 1)}",
            "",
        ]
    )
    own = [label for concept in off.concepts for label in concept.classes]
    losses = []
    for n, output in enumerate(evaluation.ablation.classes):
        lost = [f"{number(run.logit[n])} {percent(run.accuracy[n], 1)}" for run in runs]
        place = own.index(output.label) if output.label in own else len(own)
        hardest = -max(abs(run.logit[n]) for run in runs)
        losses.append((place, hardest, [*lost, str(output.n_images)]))
    errors = (measured.separation_error, measured.separation_error_rectified)
    covered = (measured.coverage, measured.explained_share, measured.top_coverage)
    parts = [percent(part, 1) for part in covered]
    return [
        measures,
        [[f"{number(r.mean)} ({number(r.median)})" for r in k.ratios] for k in measured.concepts],
        [[number(a.monosemanticity), number(a.clarity)] for a in (seen.original, *seen.concepts)],
        effects,
        [row for *_, row in sorted(losses)],
        [*map(number, errors), *parts, *map(significant, (seen.within, seen.between))],
    ]


def test_every_figure_fact_and_setting_is_the_evaluations(page, run):
    for channel, section in sections(page).items():
        expected = figures_of(run.evaluation, channel)
        assert figures_in(section) == expected
        bold = [b for kind in ALONE for b in section.all("p", kind)[0].all("b")]
        cells = [cell for body in section.all("tbody") for cell in body.all("td")]
        for cell in [*cells, *bold]:  # a wrong one is noticed
            kept, cell.children = cell.children, ["9.999"]
            assert figures_in(section) != expected
            cell.children = kept
    lists = (("ul", "facts"), ("dl", "settings"))
    facts, settings = (read(page).all(*kind)[0].text for kind in lists)
    top1 = percent(run.evaluation.output.top1_before, 1)
    mean = number(run.evaluation.summary["published"]["separation_error"])
    assert "0 largest logit difference same first choice in 100.0% of the images" in facts
    assert f"{top1} top-1 accuracy the same when split" in facts
    assert f"{mean} mean separation error" in facts
    broken = f"149; 1 broken image left out (places {BROKEN})"
    for told in (run.scan.manifest.weights, run.scan.manifest.data, broken):
        assert told in settings


@pytest.mark.parametrize(("before", "warns"), [(0.49, True), (0.51, False), (None, None)])
def test_a_low_accuracy_is_a_warning(run, write, before, warns):
    output = replace(run.evaluation.output, top1_before=before, top1_after=before)
    root = read(write(evaluation=replace(run.evaluation, output=output)))
    told = [fact for fact in root.all("ul", "facts")[0].all("li") if "top-1" in fact.text]
    assert [("check labels" in fact.text, fact in root.all("li", "warns")) for fact in told] == (
        [] if before is None else [(warns, warns)]
    )


def test_first_channels_are_examples_and_concepts_have_a_thumbnail(page, run):
    root = read(page)
    shown = list(sections(page))[:3]
    examples = root.all("ul", "examples")[0].all("li")
    for channel, example in zip(shown, examples, strict=True):
        rows = sections(page)[channel].all("div", "row")[1:]
        expected = [image.attributes["src"] for row in rows for image in shots(row)[:3]]
        assert [image.attributes["src"] for image in example.all("img")] == expected
        assert f"Channel {channel}" in example.text
    for row in root.all("table", "overview")[0].all("tr")[1:]:
        channel = int(row.attributes["data-channel"])
        assert len(row.all("img", "thumb")) == len(run.split[channel].concepts)


def test_of_many_channels_all_but_the_first_are_folded(write, monkeypatch):
    assert not read(write()).all("details", "whole-channel")
    monkeypatch.setattr(report_module, "_FEW", 1)
    monkeypatch.setattr(report_module, "N_UNFOLDED", 1)
    folded = [bool(s.all("details", "whole-channel")) for s in sections(write()).values()]
    assert folded == [False, *[True] * (len(folded) - 1)]
    assert len(folded) > 1


def test_report_lists_few_classes_of_no_concept_that_lose_most(run, write, monkeypatch):
    monkeypatch.setattr(channel_module, "N_OTHERS", 0)
    for channel, section in sections(write()).items():
        own = sum(map(len, run.split[channel].concepts))
        assert len(section.all("table")[-1].rows()) == own
        left_out = f"{count(4 - own, 'class', 'classes')} that lose or gain less are left out"
        assert (left_out in section.text) == (own < 4)


def test_report_has_no_ratio_to_a_mean_not_told_from_zero(run, write):
    channel = run.evaluation.channels[0].channel
    responses = run.evaluation.responses[channel]
    own, z = responses.concept == 0, responses.original.clone()
    z[own] -= z[own].mean()
    changed = replace(responses, original=z)
    everything = {**run.evaluation.responses, channel: changed}
    page = write(evaluation=replace(run.evaluation, responses=everything))
    zero = [low <= 0 <= high for low, high in intervals(changed).means]
    assert zero[0]
    for k, row in enumerate(sections(page)[channel].all("table")[0].all("tbody")[0].all("tr")):
        dashes = [zero[k], any(zero[:k] + zero[k + 1 :]), *[False] * 5]
        cells = row.all("td")[1:]
        assert [cell.text.startswith(ABSENT) for cell in cells] == dashes
        assert ["not told from 0" in cell.text for cell in cells] == dashes


def pairs_in(root):
    """The list of pairs without names, the lowest of each channel, and how many are uncertain."""
    (overview,), (pairs,) = (root.all("table", kind) for kind in ("overview", "pairs"))
    lowest = zip(overview.rows("th"), overview.rows(), strict=True)
    told = re.search(r"\? marks (\d+) uncertain pairs? of", root.text)
    return [
        [(*row[:3], *row[4:6], *row[7:]) for row in pairs.rows()],
        {name: row[1] for (name,), row in lowest},
        int(told[1]) if told else 0,
    ]


def pairs_of(found):
    rows = []
    for pair in found.pairs:
        certain = pair.high < found.gamma if pair.cosine < found.gamma else pair.low >= found.gamma
        known = f"{number(pair.low)} to {number(pair.high)}"
        interval = ("" if certain else "? ") + (ABSENT if math.isnan(pair.low) else known)
        uses = (percent(pair.use1), number(pair.half1), percent(pair.use2), number(pair.half2))
        rows.append((str(pair.channel), number(pair.cosine), interval, *uses))
    lowest = {row[0]: f"{row[1]} {row[2]}" for row in reversed(rows)}
    return [rows, lowest, sum("?" in row[2] for row in rows)]


def test_pairs_are_listed_with_how_sure_they_are(run, page, write):
    assert pairs_in(read(page)) == pairs_of(run.found)
    first, second, *rest = run.found.pairs
    one = replace(first, high=run.found.gamma)  # uncertain; so is a class with a single image
    single = replace(second, low=math.nan, high=math.nan, half2=math.nan)
    unsure = replace(run.found, pairs=(one, single, *rest))
    root, expected = read(write(found=unsure)), pairs_of(unsure)
    assert pairs_in(root) == expected
    assert expected[2] >= 2
    for cell in root.all("table", "pairs")[0].all("td"):
        kept, cell.children = cell.children, ["9.999"]
        assert pairs_in(root) != expected or "name" in cell.attributes["class"]
        cell.children = kept


def test_endless_lists_of_endless_names_stay_below_the_limit(run, write):
    names = tuple(f"{n}<&'\"{LONG[:300]}" for n in range(120))
    concepts = {n: tuple((c,) for c in range(120)) for n in range(3000)}
    changes = [(n % 3000, n % 120, n * 7919 % 30_000 / 1e5) for n in range(30_000)]
    first = run.found.pairs[0]
    pairs = tuple(replace(first, channel=o, class1=c, cosine=cosine) for o, c, cosine in changes)
    found = replace(run.found, concepts=concepts, pairs=pairs, class_names=names)
    page = write(found=found, split=None, evaluation=None)
    assert len(page.encode()) <= 10_000_000
    channels, listed = (read(page).all("table", kind)[0].rows() for kind in ("overview", "pairs"))
    assert 10 < len(channels) < 3000
    n = len(listed)
    assert [row[1] for row in listed] == [*map(number, sorted(pair.cosine for pair in pairs)[:n])]
    assert f"The list of channels has {len(channels):,} of 3,000" in notes(page)
    told = f"the {n:,} with the lowest cosines of 30,000; the other {30_000 - n:,} are in"
    assert told in notes(page)


@pytest.mark.parametrize("limit", [0, 100_000])
def test_report_leaves_out_channels_beyond_its_limits(run, write, monkeypatch, limit):
    nearer = [replace(run.found.pairs[0], channel=90 + k, cosine=-0.9) for k in range(5)]
    concepts = {**run.found.concepts, **{pair.channel: ((0,), (1,)) for pair in nearer}}
    found = replace(run.found, concepts=concepts, pairs=(*nearer, *run.found.pairs))
    monkeypatch.setattr(report_module, "SECTIONS", limit)
    monkeypatch.setattr(report_module, "LIST", 2000)
    monkeypatch.setattr(view, "MAX_CELLS", 1)
    page = write(found=found, sensitivity=unbraid.sensitivity(run.train_scan, found=run.found))
    assert "Other thresholds are left out" in notes(page)
    assert "unbraid sensitivity" in notes(page)
    assert not read(page).all("div", "maps")
    lowest = [run.found.pairs[0].channel] if limit else []
    assert [*sections(page)] == lowest
    told = "only the 1 channel with the lowest cosines" if limit else "none"
    assert f"{told} of {len(run.split.channels)} is shown in full" in notes(page)
    listed = {int(row[0]) for row in read(page).all("table", "overview")[0].rows("th")}
    assert set(lowest) <= listed < set(concepts)
    assert f"The list of channels has {len(listed)} of {len(concepts)}" in notes(page)


def test_sections_show_the_strongest_images_and_say_which_cannot_be_read(page, run, write):
    half = Blobs(150, 1)
    half.broken = range(1, 150, 2)
    halved = write(dataset=half)
    known = reference_images(run.scan, run.split, alike=ALIKE)
    assert set(sections(page)) == set(known)
    for channel, top in known.items():
        rows, some = (sections(text)[channel].all("ol", "shots") for text in (page, halved))
        for row, half, images in zip(rows, some, (top.original, *top.concepts), strict=True):
            shown = [int(re.findall(r"\d+", i.attributes["alt"])[-1]) for i in shots(row)]
            n = 8 - len(row.all("li", "first"))
            assert len(shown) == len(row.all("li")) == 8
            assert shown[:n] == images.index.tolist()[:n]
            gone = [f"image {i} cannot be read" for i in shown if i % 2]
            assert [box.text for box in half.all("span", "unreadable")] == gone
            assert len(shots(half)) == 8 - len(gone)


def test_report_of_nothing_found_says_why(run, write):
    none = unbraid.find(run.train_scan, gamma=-1.0)
    page = read(write(found=none, split=None, evaluation=None, title=HOSTILE[0] + "\udcff"))
    assert none.hint in page.text
    assert not page.all("article")
    assert page.all("h1")[0].text == HOSTILE[0] + "\\udcff"
    table = page.all("table", "nearest")[0]
    heads = [cell.text for cell in table.all("th", "number")[1:]]
    assert heads == [str(c.pair.channel) for c in none.nearest]
    options = [c.options(none) for c in none.nearest]
    assert [code.text for code in table.all("code")] == options != []
    index, label = (torch.cat(list(run.scan.columns(name))) for name in ("index", "label"))
    labels = dict(zip(index.tolist(), label.tolist(), strict=True))
    seen = [labels[int(image.attributes["alt"])] for image in table.all("img")]
    told = [n for c in none.nearest for n in (c.pair.class1, c.pair.class2)]
    assert [label for label, _ in groupby(seen)] == [label for label, _ in groupby(told)]


def test_what_chance_may_have_decided_does_not_count_in_the_headline(run, write):
    first, *others = run.found.channels
    pairs = [replace(p, high=2.0) if p.channel == first else p for p in run.found.pairs]
    found = replace(run.found, pairs=tuple(pairs))
    sure = len(found.sure_channels)
    assert first not in found.sure_channels
    page = read(write(found=found))
    facts = [item.text for item in page.all("ul", "facts")[0].all("li")]
    assert re.match(
        rf"{sure} polysemantic channels? and {1 + len(others) - sure} uncertain", facts[0]
    )
    none = replace(found, pairs=tuple(replace(p, high=2.0) for p in pairs))
    page = read(write(found=none))
    assert page.all("ul", "facts")[0].all("li")[0].text.startswith(f"{1 + len(others)} uncertain")
    assert "surely answers to several" in page.text


def test_report_says_what_is_missing(run, page, write):
    for note, missing in (
        ("Measures and the output check are left out", "evaluation"),
        ("Nothing was switched off", "evaluation.ablation"),
        ("Semantic measures are left out", "evaluation.semantics"),
        ("The output check is left out", "evaluation.output"),
        ("Input channels are left out", "train_scan"),
        ("Pictures are left out", "dataset"),
    ):
        whole, _, part = missing.partition(".")
        changed = replace(run.evaluation, **{part: None}) if part else None
        assert note in notes(write(**{whole: changed}))
        assert note not in notes(page)


def test_report_without_measures_over_all_images_says_so(run, page, write):
    note, channels = "R-precision and coverage are left out", run.evaluation.channels
    some = tuple(replace(channel, coverage=None) for channel in channels)
    text = write(evaluation=replace(run.evaluation, channels=some))
    assert (note in notes(text), note in notes(page)) == (True, False)
    for section, whole in zip(sections(text).values(), sections(page).values(), strict=True):
        rows, more = (one.all("table")[0].rows() for one in (section, whole))
        assert rows == [row[:-2] for row in more]
        assert not section.all("p", "coverage")


def test_report_over_scans_without_images_of_a_concept_leaves_out_what_needs_them(
    run, write, tmp_path
):
    some = [i for i, label in enumerate(run.images.targets) if label != 0]
    few = unbraid.scan(
        run.network, "2", Subset(run.images, some), tmp_path / "few", skip_broken=True
    )
    hit = [part.channel for part in run.split.channels if 0 in sum(part.concepts, ())]
    with pytest.raises(UsageError) as refused:
        unbraid.evaluate(run.split, few)
    page = write(scan=few, train_scan=few, evaluation=None, dataset=None)
    assert f"Densities are left out: {refused.value}" in notes(page)
    told = (
        f"The input channels of channel {', '.join(map(str, hit))} are left out: the training scan"
    )
    assert told in notes(page)
    headings = {o: [h.text for h in s.all("h3")] for o, s in sections(page).items()}
    assert set(headings) == {part.channel for part in run.split.channels}
    for channel, own in headings.items():
        assert "What each concept channel keeps" in own
        assert ("Where each concept comes from" in own) == (channel not in hit)
        assert {"How it answers to each concept", "Class by class"}.isdisjoint(own)


def foreign(one, **changes):
    return replace(one, manifest=replace(one.manifest, **changes))


def test_report_refuses_strangers(run, tmp_path):
    for said, change in (
        ("split", lambda run: {"split": replace(run.split, weights="x"), "evaluation": None}),
        ("training scan", lambda run: {"train_scan": foreign(run.scan, weights="x")}),
        ("evaluation", lambda run: {"split": replace(run.split, channels=run.split.channels[1:])}),
        ("data set", lambda run: {"dataset": Subset(run.images, list(range(150))[::-3] * 3)}),
        ("`maps`", lambda run: {"maps": run.train_scan}),  # without positions
        ("`maps`", lambda run: {"maps": foreign(run.scan, data="x")}),
        ("visualisations", lambda run: {"features": unbraid.Features("another", "any", ())}),
    ):
        with pytest.raises(UsageError, match=said):
            run.report(tmp_path / "r.html", **change(run))
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def clusters(tmp_path_factory):
    """What a report on concepts that are clusters of images is made from."""
    home = tmp_path_factory.mktemp("clusters")
    train, val = (plant(home / name, seed=seed).scan for name, seed in (("train", 0), ("val", 7)))
    found = unbraid.find(train, concepts="clusters")
    split = unbraid.split(train, found)
    known = {"scan": val, "train_scan": train, "found": found, "split": split}
    return known | {"evaluation": unbraid.evaluate(split, val)}


def write_clusters(clusters, folder, **changed):
    text = unbraid.report(folder / "report.html", **(clusters | changed)).read_text()
    assert_harmless(text)
    return read(text)


def test_report_speaks_of_clusters_and_calls_predicted_classes_so(clusters, tmp_path):
    page, found = write_clusters(clusters, tmp_path), clusters["found"]
    predicted = foreign(clusters["scan"], labels="predicted")
    assert "with predicted class and" in write_clusters(clusters, tmp_path, scan=predicted).text
    assert "with predicted class and" not in page.text
    assert f"{len(found)} pairs of clusters" in page.text
    for words in ("airs of classes", "other classes", "Interval", "Halves", "its class"):
        assert words not in page.text
    settings = page.all("dl", "settings")[0]
    assert {e.text for e in settings.all("dt")}.isdisjoint({"tau", "p"})
    assert page.all("table", "pairs")[0].rows() == [
        [
            *(str(pair.channel), number(pair.cosine)),
            *(found.name(pair.class1), f"{100 * pair.use1:.0f}%"),
            *(found.name(pair.class2), f"{100 * pair.use2:.0f}%"),
        ]
        for pair in found.pairs
    ]


@pytest.mark.parametrize("agreement", [{}, {0: math.nan, 1: math.nan}])
def test_report_shows_agreement_with_classes(clusters, tmp_path, agreement):
    found = replace(clusters["found"], agreement=clusters["found"].agreement | agreement)
    known = list(found.agreement.values())
    page = write_clusters(clusters, tmp_path, found=found)
    (table,) = page.all("table", "overview")
    channels = [int(name) for (name,) in table.rows("th")]
    assert sorted(channels) == sorted(found.agreement)
    assert [row[-1] for row in table.rows()] == [number(found.agreement[o]) for o in channels]
    mean = f"agreement with classes {number(sum(known) / len(known))}"
    assert (mean in page.all("ul", "facts")[0].text) != bool(agreement)
