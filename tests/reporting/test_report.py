"""The report: self-contained, harmless, bounded, and true to the figures that it was given."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import Subset

import unbraid
from pages import (
    BROKEN,
    LONG,
    QUOTES,
    REVERSED,
    SCRIPT,
    Run,
    assert_harmless,
    notes,
    read,
    sections,
    shots,
)
from unbraid import Evaluation, Findings
from unbraid.base.errors import UsageError
from unbraid.finding.findings import Pair
from unbraid.measuring.evaluate import intervals
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.measuring.results import Drop, Likeness
from unbraid.reporting import report as report_module
from unbraid.reporting import view
from unbraid.reporting.words import ABSENT, number, percent, significant

LIMIT = 10_000_000

# --- harmless -------------------------------------------------------------------------------------


def test_report_is_self_contained_and_harmless(page: str) -> None:
    assert_harmless(page)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("</main>", '<img src="https://example.org/x.png"></main>'),
        ("</main>", '<img src="//example.org/x.png"></main>'),
        ("</main>", '<img src="x.png"></main>'),
        ("</main>", "<script>1</script></main>"),
        ("</main>", '<p onclick="x()"></p></main>'),
        ("</main>", '<link rel="stylesheet"></main>'),
        ("</main>", '<a href="javascript:x()"></a></main>'),
        ("</main>", '<a href="#nowhere"></a></main>'),
        ("</main>", "<style>p { background: url(x) }</style></main>"),
        ("</style>", "@import 'x';</style>"),
        ("</main>", '<p style="color: red"></p></main>'),
        ("</main>", '<iframe srcdoc="x"></iframe></main>'),
        ("</main>", "<b><i></b></i></main>"),
        ("</main>", '<p id="main"></p></main>'),
        ("default-src 'none'", "default-src *"),
        ("</script>", " </script>"),
        ("</style>", " </style>"),
    ],
)
def test_checker_sees_harm(page: str, old: str, new: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        assert_harmless(page.replace(old, new))


def test_hostile_names_show_as_text_and_turn_no_other_text_around(page: str) -> None:
    root = read(page)
    shown = {bdi.text for bdi in root.all("bdi")}
    assert {SCRIPT, QUOTES, REVERSED} <= shown
    drawn = " ".join(text.text for text in root.all("text"))
    assert all(name in drawn for name in (SCRIPT, QUOTES, REVERSED))
    in_elements = sum(bdi.text.count("\u202e") for bdi in root.all("bdi"))
    in_plain_text = len(re.findall("\u2068[^\u2069]*\u202e[^\u2069]*\u2069", page))
    assert in_elements + in_plain_text == page.count("\u202e")


def test_notes_and_hints_are_bounded_text(run: Run, tmp_path: Path) -> None:
    harm = "<script>x</script>\u2069\u202e" + 100_000 * "y"
    none = replace(unbraid.find(run.train_scan, gamma=-1.0), hint=harm)
    for text in (
        run.report(tmp_path / "note.html", found=replace(run.found, note=harm)),
        run.report(tmp_path / "hint.html", found=none, split=None, evaluation=None),
    ):
        assert_harmless(text)
        assert 1900 * "y" in text
        assert 2001 * "y" not in text
        assert "\u2069\u202e" not in text
        shown = [bdi.text for bdi in read(text).all("bdi")]
        assert any(words.startswith("<script>x</script>\ufffd\u202e") for words in shown)


# --- figures --------------------------------------------------------------------------------------


def assert_measures(page: str, evaluation: Evaluation) -> None:
    """Every measure stands in its place in the section of its channel."""
    for channel in evaluation.channels:
        section = sections(page)[channel.channel]
        errors = [b.text for b in section.all("p", "errors")[0].all("b")]
        rectified = channel.separation_error_rectified
        assert errors == [number(channel.separation_error), number(rectified)]
        measures, ratios = (table.all("tbody")[0].all("tr") for table in section.all("table")[:2])
        for concept, row, ratio_row in zip(channel.concepts, measures, ratios, strict=True):
            assert [cell.own_text for cell in row.all("td")] == [
                str(concept.n_images),
                *map(number, (concept.retention, concept.leakage, concept.mimic_error)),
                *map(number, (concept.silence_error, concept.auroc)),
            ]
            assert [cell.text for cell in ratio_row.all("td")] == [
                f"{number(ratio.mean)} ({number(ratio.median)})" for ratio in concept.ratios
            ]


def assert_effects(page: str, evaluation: Evaluation) -> None:
    """What is lost with each concept channel off stands in its place, by concept and by class."""
    assert evaluation.ablation is not None
    for channel in evaluation.ablation.channels:
        (table,) = sections(page)[channel.channel].all("table", "effects")
        for concept, shown in zip(channel.concepts, table.rows(), strict=True):
            own, others, rest = concept.own, concept.others, concept.rest
            assert shown == [
                *(
                    f"{percent(d.part)} {number(d.logit)} of {number(d.whole_logit)}"
                    for d in (own, others)
                ),
                f"{number(rest.logit)} whole {number(rest.whole_logit)}",
                *(
                    f"{percent(d.accuracy, 1)} whole {percent(d.whole_accuracy, 1)}"
                    for d in (own, others)
                ),
            ]


def assert_likeness(page: str, evaluation: Evaluation) -> None:
    """Scores of the original and of each concept channel, and distances, stand in their places."""
    assert evaluation.semantics is not None
    for channel, seen in evaluation.semantics.channels.items():
        section = sections(page)[channel]
        (table,) = section.all("table", "likeness")
        assert table.rows("th")[0] == [f"Original channel {channel}"]
        assert table.rows() == [
            [number(like.monosemanticity), number(like.clarity)]
            for like in (seen.original, *seen.concepts)
        ]
        (line,) = section.all("p", "distances")
        distances = [significant(d) for d in (seen.within, seen.between)]
        assert [b.text for b in line.all("b")] == distances
        for told in (seen.encoder, f"{seen.n_images} images", f"the {seen.n_top} strongest"):
            assert told in line.text
        assert ("the parts of images" in line.text) == seen.crops


CHECKS = (assert_measures, assert_effects, assert_likeness)


@pytest.mark.parametrize("check", CHECKS)
def test_figures_are_the_evaluations(page: str, run: Run, check: Callable[..., None]) -> None:
    check(page, run.evaluation)


def with_first(evaluation: Evaluation, place: str, change: Callable[[Any], Any]) -> Evaluation:
    """Change the first channel of the measures, the ablation or the semantics."""
    if place == "measures":
        first, *rest = evaluation.channels
        return replace(evaluation, channels=(change(first), *rest))
    if place == "ablation":
        assert evaluation.ablation is not None
        first, *rest = evaluation.ablation.channels
        ablation = replace(evaluation.ablation, channels=(change(first), *rest))
        return replace(evaluation, ablation=ablation)
    assert evaluation.semantics is not None
    channels = evaluation.semantics.channels
    number = min(channels)
    changed = {**channels, number: change(channels[number])}
    return replace(evaluation, semantics=replace(evaluation.semantics, channels=changed))


def spoil_loss(name: str) -> Callable[[Any], Any]:
    def change(channel: Any) -> Any:
        concept = channel.concepts[0]
        known = getattr(concept, name)
        changed = replace(concept, **{name: replace(known, logit=known.logit + 0.01)})
        return replace(channel, concepts=(changed, *channel.concepts[1:]))

    return change


@pytest.mark.parametrize(
    ("check", "place", "change"),
    [
        (0, "measures", lambda c: replace(c, separation_error=c.separation_error + 0.01)),
        *((1, "ablation", spoil_loss(name)) for name in ("own", "others", "rest")),
        (2, "semantics", lambda s: replace(s, original=replace(s.original, clarity=-0.01))),
        (2, "semantics", lambda s: replace(s, concepts=s.concepts[::-1])),
        (2, "semantics", lambda s: replace(s, between=s.within)),
        (2, "semantics", lambda s: replace(s, crops=not s.crops)),
        (2, "semantics", lambda s: replace(s, n_images=1)),
        (2, "semantics", lambda s: replace(s, encoder="another")),
    ],
)
def test_checker_sees_a_wrong_figure(
    page: str, run: Run, check: int, place: str, change: Callable[[Any], Any]
) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](page, with_first(run.evaluation, place, change))


def test_unknown_figures_have_a_dash(run: Run, tmp_path: Path) -> None:
    none, unknown = Drop(0, *[math.nan] * 4), Likeness(math.nan, math.nan)
    evaluation = with_first(
        run.evaluation,
        "ablation",
        lambda c: replace(c, concepts=tuple(replace(k, own=none) for k in c.concepts)),
    )
    evaluation = with_first(
        evaluation,
        "semantics",
        lambda s: replace(s, original=unknown, within=math.nan, encoder=SCRIPT),
    )
    page = run.report(tmp_path / "r.html", evaluation=evaluation)
    assert_harmless(page)
    assert_effects(page, evaluation)
    assert_likeness(page, evaluation)
    assert "nan" not in " ".join(section.text for section in sections(page).values())


def test_facts_are_the_evaluations(page: str, run: Run) -> None:
    facts = " ".join(fact.text for fact in read(page).all("ul", "facts")[0].all("li"))
    output = run.evaluation.output
    assert output is not None
    assert f"0 largest logit difference top-1 {percent(output.top1_before, 1)} before" in facts
    mean = run.evaluation.summary["published"]["separation_error"]
    assert f"{number(mean)} mean separation error" in facts


def test_settings_tell_network_and_data(page: str, run: Run) -> None:
    settings = read(page).all("dl", "settings")[0].text
    assert run.scan.manifest.weights in settings
    assert run.scan.manifest.data in settings
    assert f"149; 1 broken image left out (places {BROKEN})" in settings


def test_intervals_stand_below_their_measures(page: str, run: Run) -> None:
    for channel in run.evaluation.channels:
        known = intervals(run.evaluation.responses[channel.channel])
        assert known is not None
        rows = sections(page)[channel.channel].all("table")[0].all("tbody")[0].all("tr")
        for sure, row in zip(known.concepts, rows, strict=True):
            shown = [small.text for small in row.all("small", "interval")]
            assert shown == [f"{number(a)} to {number(b)}" for a, b in vars(sure).values()]
            assert all(cell.own_text for cell in row.all("td"))


def test_no_ratio_to_a_mean_that_is_not_told_from_zero(run: Run, tmp_path: Path) -> None:
    channel = run.evaluation.channels[0].channel
    responses = run.evaluation.responses[channel]
    own = responses.concept == 0
    z = responses.original.clone()
    z[own] -= z[own].mean()
    changed = replace(responses, original=z)
    known = intervals(changed)
    assert known is not None
    assert known.means[0][0] < 0 < known.means[0][1]
    everything = {**run.evaluation.responses, channel: changed}
    page = run.report(tmp_path / "r.html", evaluation=replace(run.evaluation, responses=everything))
    rows = sections(page)[channel].all("table")[0].all("tbody")[0].all("tr")
    zero = [low <= 0 <= high for low, high in known.means]
    for k, row in enumerate(rows):
        cells = row.all("td")[1:]
        dashes = [zero[k], any(z for n, z in enumerate(zero) if n != k), False, False, False]
        assert [cell.own_text == ABSENT for cell in cells] == dashes
        assert ["not told from 0" in cell.text for cell in cells] == dashes
    assert rows[0].all("td")[1].own_text == ABSENT


# --- the list of pairs ----------------------------------------------------------------------------


def interval_text(pair: Pair, gamma: float) -> str:
    certain = pair.high < gamma if pair.cosine < gamma else pair.low >= gamma
    known = not math.isnan(pair.low)
    text = f"{number(pair.low)} to {number(pair.high)}" if known else ABSENT
    return text if certain else f"? {text}"


def assert_pairs_listed(page: str, found: Findings) -> None:
    """Every pair stands in the list, in order, with its figures and how sure they are."""
    root = read(page)
    cells = root.all("table", "pairs")[0].rows()
    assert [(*row[:3], *row[4:6], *row[7:]) for row in cells] == [
        (
            *(str(pair.channel), number(pair.cosine), interval_text(pair, found.gamma)),
            *(percent(pair.use1), number(pair.half1)),
            *(percent(pair.use2), number(pair.half2)),
        )
        for pair in found.pairs
    ]
    n_uncertain = sum("?" in row[2] for row in cells)
    told = re.search(r"\? marks (\d+) uncertain pairs? of", root.text)
    assert int(told[1]) == n_uncertain if told else n_uncertain == 0
    (overview,) = root.all("table", "overview")
    names = [row[0] for row in overview.rows("th")]
    assert dict(zip(names, (row[1] for row in overview.rows()), strict=True)) == {
        str(lowest.channel): f"{number(lowest.cosine)} {interval_text(lowest, found.gamma)}"
        for lowest in reversed(found.pairs)
    }


@pytest.fixture(scope="module")
def unsure(run: Run) -> Findings:
    """The run's pairs, but two are uncertain, one of which has a class with a single image."""
    first, second, *rest = run.found.pairs
    one = replace(first, high=run.found.gamma)
    single = replace(second, low=math.nan, high=math.nan, half2=math.nan)
    return replace(run.found, pairs=(one, single, *rest))


def test_pairs_are_listed_with_how_sure_they_are(
    run: Run, page: str, unsure: Findings, tmp_path: Path
) -> None:
    assert_pairs_listed(page, run.found)
    page = run.report(tmp_path / "r.html", found=unsure)
    assert_pairs_listed(page, unsure)
    *others, last = unsure.pairs
    for name in ("low", "high", "half1", "half2", "cosine"):
        spoiled = replace(last, **{name: getattr(last, name) - 0.01})
        with pytest.raises(AssertionError):
            assert_pairs_listed(page, replace(unsure, pairs=(*others, spoiled)))
    told = f"?</span> marks {sum(map(unsure.uncertain, unsure.pairs))} "
    assert page.count(told) == 1
    with pytest.raises(AssertionError):
        assert_pairs_listed(page.replace(told, "?</span> marks 1 "), unsure)


# --- images ---------------------------------------------------------------------------------------


def test_every_channel_has_a_section_with_its_strongest_images(page: str, run: Run) -> None:
    parts, known = sections(page), reference_images(run.scan, run.split, alike=ALIKE)
    assert set(parts) == {part.channel for part in run.split.channels}
    for channel, top in known.items():
        rows = parts[channel].all("ol", "shots")
        for row, images in zip(rows, (top.original, *top.concepts), strict=True):
            names = [image.attributes["alt"] for image in shots(row)]
            assert len(names) == len(row.all("li")) == 8
            n = 8 - len(row.all("li", "first"))
            shown = [int(re.findall(r"image (\d+)", name)[-1]) for name in names]
            assert shown[:n] == images.index.tolist()[:n]


def test_an_unreadable_image_is_a_box(run: Run, tmp_path: Path) -> None:
    class Half(type(run.images)):  # type: ignore[misc]
        def __getitem__(self, index: int) -> Any:
            if index % 2:
                raise RuntimeError("gone")
            return super().__getitem__(index)

    page = run.report(tmp_path / "r.html", dataset=Half(150, 1))
    assert_harmless(page)
    assert read(page).all("span", "unreadable")
    assert read(page).all("img")


# --- what is missing, and what does not fit -------------------------------------------------------


def test_same_run_gives_the_same_page(page: str, run: Run, tmp_path: Path) -> None:
    assert run.report(tmp_path / "again.html") == page


def test_nothing_found(run: Run, tmp_path: Path) -> None:
    none = unbraid.find(run.train_scan, gamma=-1.0)
    page = run.report(
        tmp_path / "r.html", found=none, split=None, evaluation=None, title=SCRIPT + "\udcff"
    )
    assert_harmless(page)
    assert none.hint in read(page).text
    assert not sections(page)
    assert read(page).all("h1")[0].text == SCRIPT + "\\udcff"


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        (("evaluation",), "Measures and the output check are left out"),
        (("evaluation.ablation",), "Nothing was switched off"),
        (("evaluation.semantics",), "Semantic measures are left out"),
        (("evaluation.ablation.all",), "Only 1 of"),
        (("train_scan",), "Input channels are left out"),
        (("dataset",), "Pictures are left out"),
        (("split", "evaluation"), "Details of the channels are left out"),
    ],
)
def test_what_is_missing_is_said(
    run: Run, page: str, tmp_path: Path, missing: tuple[str, ...], note: str
) -> None:
    changed: dict[str, Any] = dict.fromkeys(missing)
    evaluation, ablation = run.evaluation, run.evaluation.ablation
    assert ablation is not None
    for name in [name for name in missing if "." in name]:
        del changed[name]
        first = replace(ablation, channels=ablation.channels[:1]) if "all" in name else None
        changed["evaluation"] = replace(evaluation, **{name.split(".")[1]: first})
    assert note not in notes(page)
    without = run.report(tmp_path / "r.html", **changed)
    assert_harmless(without)
    assert note in notes(without)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("split", lambda run: {"split": replace(run.split, weights="x"), "evaluation": None}),
        ("training scan", lambda run: {"train_scan": foreign(run.scan, weights="x")}),
        ("evaluation", lambda run: {"evaluation": without_first(run.evaluation)}),
        ("data set", lambda run: {"dataset": Subset(run.images, list(range(150))[::-3] * 3)}),
        ("data set", lambda run: {"dataset": Subset(run.images, range(3))}),
        ("`maps`", lambda run: {"maps": run.train_scan}),  # without positions
        ("`maps`", lambda run: {"maps": foreign(run.scan, data="x")}),
        ("features", lambda run: {"features": unbraid.Features("another", "any", ())}),
    ],
)
def test_strangers_are_refused(
    run: Run, tmp_path: Path, what: str, change: Callable[[Run], dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match=what if what != "features" else "visualisations"):
        run.report(tmp_path / "r.html", **change(run))
    assert not list(tmp_path.iterdir())


def foreign(scan: unbraid.Scan, **changes: str) -> unbraid.Scan:
    return replace(scan, manifest=replace(scan.manifest, **changes))


def without_first(evaluation: Evaluation) -> Evaluation:
    return replace(evaluation, channels=evaluation.channels[1:])


def test_too_many_channels_and_thresholds_are_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = unbraid.sensitivity(run.train_scan, found=run.found)
    assert read(run.report(tmp_path / "a.html", sensitivity=counted)).all("div", "maps")
    monkeypatch.setattr(view, "MAX_ROWS", 1)
    monkeypatch.setattr(view, "_MAX_CELLS", len(counted.cells) - 1)
    page = run.report(tmp_path / "r.html", sensitivity=counted)
    assert_harmless(page)
    assert list(sections(page)) == [run.found.pairs[0].channel]
    assert len(read(page).all("table", "overview")[0].rows()) == len(run.found.concepts)
    assert "only the 1 channel" in notes(page)
    assert not read(page).all("div", "maps")
    assert "Other thresholds are left out" in notes(page)


def test_of_many_pairs_the_lowest_cosines_are_listed(run: Run, page: str, tmp_path: Path) -> None:
    assert "The list of" not in notes(page)
    known = run.found.pairs
    many = tuple(
        replace(known[n % len(known)], cosine=(n * 7919 % 60_000) / 100_000) for n in range(60_000)
    )
    file = tmp_path / "r.html"
    page = run.report(file, found=replace(run.found, pairs=many))
    assert file.stat().st_size <= LIMIT
    assert_harmless(page)
    rows = read(page).all("table", "pairs")[0].rows()
    n = len(rows)
    assert n > 500
    lowest = sorted(pair.cosine for pair in many)[:n]
    assert [row[1] for row in rows] == [number(cosine) for cosine in lowest]
    told = f"the {n:,} with the lowest cosines of 60,000; the other {60_000 - n:,} are in"
    assert told in notes(page)
    assert "60,000 pairs of classes" in read(page).all("ul", "facts")[0].text
    told = re.search(r"\? marks ([\d,]+) uncertain pairs? of [\d,]+ listed", read(page).text)
    n_uncertain = sum("?" in row[2] for row in rows)
    assert int(told[1].replace(",", "")) == n_uncertain if told else n_uncertain == 0


def test_endless_lists_of_endless_names_stay_below_the_limit(run: Run, tmp_path: Path) -> None:
    names = tuple(f"{n}<&'\"{LONG[:300]}" for n in range(120))
    concepts = {n: tuple((c,) for c in range(120)) for n in range(3000)}
    few = tuple(
        replace(run.found.pairs[0], channel=n % 3000, class1=n % 120, class2=(n + 1) % 120)
        for n in range(3000)
    )
    found = replace(run.found, concepts=concepts, pairs=few, class_names=names)
    file = tmp_path / "r.html"
    page = run.report(file, found=found, split=None, evaluation=None)
    assert file.stat().st_size <= LIMIT
    assert_harmless(page)
    rows = read(page).all("table", "overview")[0].rows()
    assert 10 < len(rows) < 3000
    assert f"The list of channels has {len(rows):,} of 3,000" in notes(page)
    assert "3,000 of the 6 channels" in read(page).all("p", "lead")[0].text
    assert "and 94 more" in rows[0][0]


@pytest.mark.parametrize(("room", "n_shown"), [(0, 0), (100_000, 1)])
def test_sections_and_lists_beyond_their_bytes_are_left_out(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, n_shown: int
) -> None:
    monkeypatch.setattr(report_module, "SECTIONS", room)
    monkeypatch.setattr(report_module, "LIST", 2000)
    page = run.report(tmp_path / "r.html")
    assert_harmless(page)
    assert len(sections(page)) == n_shown
    told = "only the 1 channel with the lowest cosines" if n_shown else "none"
    assert f"{told} of {len(run.split.channels)} is shown in full" in notes(page)
    listed = read(page).all("table", "overview")[0].rows("th")
    assert 0 < len(listed) < len(run.found.concepts)
    assert f"The list of channels has {len(listed)} of" in notes(page)


def test_channels_shown_in_full_are_listed_in_any_case(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "LIST", 3000)
    nearer = [replace(run.found.pairs[0], channel=90 + k, cosine=-0.9) for k in range(5)]
    concepts = {**run.found.concepts, **{pair.channel: ((0,), (1,)) for pair in nearer}}
    found = replace(run.found, concepts=concepts, pairs=(*nearer, *run.found.pairs))
    page = run.report(tmp_path / "r.html", found=found)
    assert_harmless(page)
    listed = {int(row[0]) for row in read(page).all("table", "overview")[0].rows("th")}
    in_full = {part.channel for part in run.split.channels}
    assert in_full <= listed < set(found.concepts)


def test_how_well_it_was_solved_is_no_news_for_readers(run: Run, tmp_path: Path) -> None:
    info = {"lambda": 0.031622, "kkt_residual": 1e-13, "<b>": 300 * "x"}
    parts = tuple(replace(part, info=info) for part in run.split.channels)
    page = run.report(tmp_path / "r.html", split=replace(run.split, channels=parts))
    assert_harmless(page)
    for section in sections(page).values():
        words = section.all("p", "info")[0].text
        assert "lambda 0.03162" in words
        assert "kkt" not in words
        assert f"<b> {199 * 'x'}…" in words
