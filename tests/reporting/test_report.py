"""The report: self-contained, harmless, complete, and true to the figures that it was given."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import gaussian_kde
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import unbraid
from unbraid import Evaluation, Findings, Scan, Split
from unbraid.base.errors import UsageError
from unbraid.finding.findings import Pair
from unbraid.finding.membership import Cluster
from unbraid.measuring.reference_images import ALIKE, reference_images
from unbraid.measuring.results import Drop, Likeness, Responses
from unbraid.reporting import channel as effects
from unbraid.reporting import charts, view
from unbraid.reporting.channel import concept_views, densities, density
from unbraid.reporting.pictures import Album, Look, to_picture
from unbraid.reporting.words import ABSENT, number, percent, significant

SCRIPT, QUOTES, REVERSED = "<script>x</script>", "\"'><img src=x>&amp;", "\u202egnirts"
NAMES = (SCRIPT, QUOTES, REVERSED, "digital clock, \udcff")  # the last as of a folder's bad name
BROKEN = 5

# --- a small real run -----------------------------------------------------------------------------


class Blobs(Dataset[tuple[Tensor, int]]):
    """Images of four classes; one cannot be read."""

    classes = NAMES

    def __init__(self, n: int, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        bases = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(9))
        self.targets = [n % 4 for n in range(n)]
        self.x = bases[self.targets] + 0.7 * torch.randn(n, 3, 8, 8, generator=noise)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == BROKEN:
            raise OSError("truncated")
        return self.x[index], self.targets[index]


@dataclass
class Run:
    network: nn.Sequential
    images: Blobs
    train_scan: Scan
    scan: Scan
    found: Findings
    split: Split
    evaluation: Evaluation

    def report(self, path: Path, **changed: Any) -> str:
        arguments = {
            "scan": self.scan,
            "found": self.found,
            "split": self.split,
            "evaluation": self.evaluation,
            "train_scan": self.train_scan,
            "dataset": self.images,
        }
        return unbraid.report(path, **{**arguments, **changed}).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    train, val = Blobs(160, 0), Blobs(150, 1)
    optimizer = torch.optim.Adam(network.parameters(), 2e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(network(train.x), torch.tensor(train.targets)).backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("run")
    train_scan = unbraid.scan(network, "2", train, out / "a", skip_broken=True)
    scan = unbraid.scan(network, "2", val, out / "b", skip_broken=True, positions=True)
    found = unbraid.find(train_scan, p=0.5, gamma=0.9)
    assert len(found.concepts) >= 2, "the fixture must find something to report"
    split = unbraid.split(train_scan, found, method="published", rho=0.7)
    network2 = unbraid.apply(network, split)
    output = unbraid.compare_outputs(network, network2, val, tolerance=0.0, skip_broken=True)
    ablation = unbraid.ablate(network2, val, skip_broken=True)
    semantics = unbraid.measure_semantics(split, scan, val, unbraid.Penultimate(network))
    evaluation = unbraid.evaluate(
        split, scan, output=output, ablation=ablation, semantics=semantics
    )
    return Run(network, val, train_scan, scan, found, split, evaluation)


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return run.report(tmp_path_factory.mktemp("page") / "new" / "report.html")


# --- reading a page -------------------------------------------------------------------------------


@dataclass
class Element:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, kind: str = "") -> list[Element]:
        found = (e for e in self.walk() if e.tag == tag)
        return [e for e in found if not kind or kind in e.attributes.get("class", "").split()]

    @property
    def text(self) -> str:
        parts = (child if isinstance(child, str) else child.text for child in self.children)
        return re.sub(r"\s+", " ", "".join(parts)).strip()


class _Reader(HTMLParser):
    VOID = ("meta", "img", "link", "br", "base", "input", "path", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("root")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        # In SVG what closes itself has no content, in HTML it is the tag that decides.
        if tag not in self.VOID or (tag in ("path", "rect") and not self._closes_itself()):
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID or self.open[-1].tag == tag:
            assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def _closes_itself(self) -> bool:
        return (self.get_starttag_text() or "").endswith("/>")


def read(text: str) -> Element:
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert len(reader.open) == 1, f"<{reader.open[-1].tag}> is not closed"
    return reader.open[0]


def shots(row: Element) -> list[Element]:
    """The pictures in a row, without what is laid over them."""
    return [image for image in row.all("img") if image not in row.all("img", "veil")]


def own_text(cell: Element) -> str:
    """What a cell says itself, without the interval below."""
    return "".join(child for child in cell.children if isinstance(child, str)).strip()


def sections(text: str) -> dict[str, Element]:
    return {article.attributes["id"]: article for article in read(text).all("article")}


def assert_harmless(text: str) -> None:
    """Nothing runs but the page's own script, and nothing comes from anywhere else."""
    root = read(text)
    policies = [
        e.attributes["content"]
        for e in root.all("meta")
        if e.attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert "default-src 'none'" in policies[0]
    for kind in ("script", "style"):
        elements = root.all(kind)
        assert len(elements) == 1
        assert elements[0].attributes == {}
        content = "".join(map(str, elements[0].children))
        digest = hashlib.sha256(content.encode()).digest()
        hashed = f"'sha256-{base64.b64encode(digest).decode()}'"
        assert f"{kind}-src {hashed};" in policies[0]
    for element in root.walk():
        assert element.tag not in (
            *("link", "iframe", "object", "embed", "base", "form", "audio", "video"),
            *("use", "image", "foreignobject", "animate", "set"),
        ), element.tag
        if element.tag == "style":
            assert "url(" not in element.text
            assert "@import" not in element.text
        for key, value in element.attributes.items():
            assert not key.startswith("on"), key
            assert key not in ("style", "srcset", "action", "background", "poster"), key
            if key == "src":
                picture = r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+"
                assert re.fullmatch(picture, value), value
            if key.endswith("href"):
                assert value.startswith("#"), value
            assert not re.search(r"https?:|//|url\(", value.split("base64,")[0]), value
    ids = [e.attributes["id"] for e in root.walk() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    for link in root.all("a"):
        assert link.attributes["href"].removeprefix("#") in ids, link.attributes["href"]


# --- the page -------------------------------------------------------------------------------------


def test_page_is_self_contained_and_harmless(page: str) -> None:
    assert_harmless(page)


@pytest.mark.parametrize(
    "harm",
    [
        '<img src="https://example.org/x.png">',
        '<img src="//example.org/x.png">',
        '<img src="x.png">',
        "<script>1</script>",
        '<p onclick="x()"></p>',
        '<link rel="stylesheet">',
        '<a href="javascript:x()"></a>',
        '<a href="#nowhere"></a>',
        "<style>p { background: url(x) }</style>",
        "<style>@import 'x';</style>",
        '<p style="color: red"></p>',
        '<iframe srcdoc="x"></iframe>',
        "<b><i></b></i>",
        '<p id="main"></p>',
    ],
)
def test_checker_sees_harm(page: str, harm: str) -> None:
    with pytest.raises(AssertionError):
        assert_harmless(page.replace("</main>", f"{harm}</main>"))


def test_checker_misses_no_policy(page: str) -> None:
    with pytest.raises(AssertionError):
        assert_harmless(page.replace("default-src 'none'", "default-src *"))


@pytest.mark.parametrize("kind", ["script", "style"])
def test_checker_sees_a_changed_script_or_style(page: str, kind: str) -> None:
    with pytest.raises(AssertionError):
        assert_harmless(page.replace(f"</{kind}>", f" </{kind}>"))


def test_hostile_names_show_as_text(page: str) -> None:
    root = read(page)
    shown = {bdi.text for bdi in root.all("bdi")}
    assert {SCRIPT, QUOTES, REVERSED, "digital clock, \\udcff"} <= shown
    drawn = " ".join(text.text for text in root.all("text"))
    assert all(name in drawn for name in (SCRIPT, QUOTES, REVERSED))


def test_a_name_turns_no_other_text_around(page: str) -> None:
    in_elements = sum(bdi.text.count("\u202e") for bdi in read(page).all("bdi"))
    in_plain_text = len(re.findall("\u2068[^\u2069]*\u202e[^\u2069]*\u2069", page))
    assert in_elements + in_plain_text == page.count("\u202e")


def test_every_channel_has_a_section_and_every_concept_its_images(page: str, run: Run) -> None:
    parts = sections(page)
    assert sorted(parts) == sorted(f"channel-{part.channel}" for part in run.split.channels)
    for part in run.split.channels:
        rows = parts[f"channel-{part.channel}"].all("ol", "shots")
        assert len(rows) == 1 + len(part.concepts)
        assert all(len(shots(row)) == len(row.all("li")) == 8 for row in rows)
        assert all(image.attributes["alt"] for row in rows for image in shots(row))


def test_images_shown_are_the_strongest(page: str, run: Run) -> None:
    part = run.split.channels[0]
    top = reference_images(run.scan, run.split, alike=ALIKE)[part.channel]
    rows = sections(page)[f"channel-{part.channel}"].all("ol", "shots")
    for row, images in zip(rows, (top.original, *top.concepts), strict=True):
        places = [re.search(r"image (\d+)", i.attributes["alt"])[1] for i in shots(row)]
        assert [int(place) for place in places] == images.index.tolist()


def assert_figures(page: str, evaluation: Evaluation) -> None:
    """Every measure stands in its place in the section of its channel."""
    parts = sections(page)
    for channel in evaluation.channels:
        section = parts[f"channel-{channel.channel}"]
        errors = [b.text for b in section.all("p", "errors")[0].all("b")]
        assert errors == [
            number(channel.separation_error),
            number(channel.separation_error_rectified),
        ]
        measures, ratios = (table.all("tbody")[0].all("tr") for table in section.all("table")[:2])
        for concept, row, ratio_row in zip(channel.concepts, measures, ratios, strict=True):
            assert [own_text(cell) for cell in row.all("td")] == [
                str(concept.n_images),
                *map(number, (concept.retention, concept.leakage, concept.mimic_error)),
                *map(number, (concept.silence_error, concept.auroc)),
            ]
            ratios_shown = [cell.text for cell in ratio_row.all("td")]
            assert ratios_shown == [
                f"{number(ratio.mean)} ({number(ratio.median)})" for ratio in concept.ratios
            ]


def test_figures_are_the_evaluations(page: str, run: Run) -> None:
    assert_figures(page, run.evaluation)
    facts = " ".join(fact.text for fact in read(page).all("ul", "facts")[0].all("li"))
    output = run.evaluation.output
    assert output is not None
    assert f"0 largest logit difference top-1 {percent(output.top1_before, 1)} before" in facts
    mean = run.evaluation.summary["published"]["separation_error"]
    assert f"{number(mean)} mean separation error" in facts


def test_checker_sees_a_wrong_figure(page: str, run: Run) -> None:
    channel = run.evaluation.channels[0]
    wrong = replace(channel, separation_error=channel.separation_error + 0.01)
    changed = replace(run.evaluation, channels=(wrong, *run.evaluation.channels[1:]))
    with pytest.raises(AssertionError):
        assert_figures(page, changed)


def assert_effects(page: str, evaluation: Evaluation) -> None:
    """What is lost with each concept channel off stands in its place, by concept and by class."""
    parts = sections(page)
    assert evaluation.ablation is not None
    for channel in evaluation.ablation.channels:
        (table,) = parts[f"channel-{channel.channel}"].all("table", "effects")
        rows = table.all("tbody")[0].all("tr")
        for concept, row in zip(channel.concepts, rows, strict=True):
            own, others, rest = concept.own, concept.others, concept.rest
            assert [cell.text for cell in row.all("td")] == [
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
        place = parts[f"channel-{channel.channel}"].all("table").index(table)
        by_class = parts[f"channel-{channel.channel}"].all("table")[place + 1]
        runs = [channel.whole, *(concept.by_class for concept in channel.concepts)]
        expected = [
            [
                *(f"{number(run.logit[n])} {percent(run.accuracy[n], 1)}" for run in runs),
                str(output.n_images),
            ]
            for n, output in enumerate(evaluation.ablation.classes)
        ]
        shown = [[c.text for c in row.all("td")] for row in by_class.all("tbody")[0].all("tr")]
        assert sorted(shown) == sorted(expected)


def test_what_is_lost_is_the_ablations(page: str, run: Run) -> None:
    assert_effects(page, run.evaluation)


@pytest.mark.parametrize("place", ["own", "others", "rest", "by_class"])
def test_checker_sees_a_wrong_loss(place: str, page: str, run: Run) -> None:
    ablation = run.evaluation.ablation
    assert ablation is not None
    channel, concept = ablation.channels[0], ablation.channels[0].concepts[0]
    figures = getattr(concept, place)
    wrong = (9.0, *figures.logit[1:]) if place == "by_class" else figures.logit + 0.01
    changed = replace(concept, **{place: replace(figures, logit=wrong)})
    channel = replace(channel, concepts=(changed, *channel.concepts[1:]))
    ablation = replace(ablation, channels=(channel, *ablation.channels[1:]))
    with pytest.raises(AssertionError):
        assert_effects(page, replace(run.evaluation, ablation=ablation))


def test_only_the_classes_hit_hardest_are_listed_beside_the_concepts_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ablation = run.evaluation.ablation
    assert ablation is not None
    monkeypatch.setattr(effects, "N_OTHERS", 1)
    for channel in ablation.channels:
        views = concept_views(run.found, [concept.classes for concept in channel.concepts])
        shown = effects.effects(ablation, channel, views)
        own = {label for concept in channel.concepts for label in concept.classes}
        others = [n for n, entry in enumerate(ablation.classes) if entry.label not in own]
        runs = [channel.whole, *(concept.by_class for concept in channel.concepts)]
        hardest = sorted(others, key=lambda n: -max(abs(run.logit[n]) for run in runs))[:1]
        assert len(shown.classes) == len(own) + len(hardest)
        assert [row.name for row in shown.classes[len(own) :]] == [
            ablation.classes[n].name for n in hardest
        ]
        assert shown.n_left_out == len(others) - len(hardest)


def test_channels_that_were_not_switched_off_are_counted(run: Run, tmp_path: Path) -> None:
    ablation = run.evaluation.ablation
    assert ablation is not None
    fewer = replace(ablation, channels=ablation.channels[:1])
    page = run.report(tmp_path / "r.html", evaluation=replace(run.evaluation, ablation=fewer))
    assert_harmless(page)
    assert_effects(page, replace(run.evaluation, ablation=fewer))
    assert f"Only 1 of {len(run.split.channels)} channels" in read(page).all("aside")[0].text
    assert len(read(page).all("table", "effects")) == 1


def test_without_an_ablation_it_is_said(run: Run, tmp_path: Path) -> None:
    page = run.report(tmp_path / "r.html", evaluation=replace(run.evaluation, ablation=None))
    assert "Nothing was switched off" in read(page).all("aside")[0].text
    assert not read(page).all("table", "effects")


def test_groups_without_images_have_a_dash(run: Run, tmp_path: Path) -> None:
    ablation = run.evaluation.ablation
    assert ablation is not None
    channel = ablation.channels[0]
    none = Drop(0, *[math.nan] * 4)
    changed = replace(channel, concepts=tuple(replace(c, own=none) for c in channel.concepts))
    ablation = replace(ablation, channels=(changed, *ablation.channels[1:]))
    evaluation = replace(run.evaluation, ablation=ablation)
    page = run.report(tmp_path / "r.html", evaluation=evaluation)
    assert_harmless(page)
    assert_effects(page, evaluation)
    assert "nan" not in sections(page)[f"channel-{channel.channel}"].text


def assert_likeness(page: str, evaluation: Evaluation) -> None:
    """Scores of the original and of each concept channel, and distances, stand in their places."""
    parts = sections(page)
    assert evaluation.semantics is not None
    for channel, seen in evaluation.semantics.channels.items():
        section = parts[f"channel-{channel}"]
        (table,) = section.all("table", "likeness")
        rows = table.all("tbody")[0].all("tr")
        assert rows[0].all("th")[0].text == f"Original channel {channel}"
        for like, row in zip((seen.original, *seen.concepts), rows, strict=True):
            shown = [cell.text for cell in row.all("td")]
            assert shown == [number(like.monosemanticity), number(like.clarity)]
        (line,) = section.all("p", "distances")
        assert [b.text for b in line.all("b")] == [
            significant(d) for d in (seen.within, seen.between)
        ]
        for told in (seen.encoder, f"{seen.n_images} images", f"the {seen.n_top} strongest"):
            assert told in line.text
        assert ("the parts of images" in line.text) == seen.crops


def test_semantics_are_the_evaluations(page: str, run: Run) -> None:
    assert_likeness(page, run.evaluation)


def test_the_checker_of_semantics_sees_a_wrong_figure(page: str, run: Run) -> None:
    semantics = run.evaluation.semantics
    assert semantics is not None
    (channel, seen), *rest = semantics.channels.items()
    original = seen.original
    wrongs = [
        replace(seen, original=replace(original, clarity=original.clarity - 0.01)),
        replace(seen, concepts=seen.concepts[::-1]),
        replace(seen, between=seen.within),
        replace(seen, crops=not seen.crops),
        replace(seen, n_images=1),
        replace(seen, encoder="another"),
    ]
    for wrong in wrongs:
        changed = replace(semantics, channels={channel: wrong, **dict(rest)})
        with pytest.raises(AssertionError):
            assert_likeness(page, replace(run.evaluation, semantics=changed))


def test_scores_that_are_not_known_have_a_dash(run: Run, tmp_path: Path) -> None:
    semantics = run.evaluation.semantics
    assert semantics is not None
    unknown = Likeness(math.nan, math.nan)
    channels = {
        channel: replace(seen, original=unknown, within=math.nan, encoder=SCRIPT)
        for channel, seen in semantics.channels.items()
    }
    evaluation = replace(run.evaluation, semantics=replace(semantics, channels=channels))
    page = run.report(tmp_path / "r.html", evaluation=evaluation)
    assert_harmless(page)
    assert_likeness(page, evaluation)
    assert "nan" not in " ".join(section.text for section in sections(page).values())


def test_without_semantics_it_is_said(run: Run, tmp_path: Path) -> None:
    page = run.report(tmp_path / "r.html", evaluation=replace(run.evaluation, semantics=None))
    assert "Semantic measures are left out" in read(page).all("aside")[0].text
    assert not read(page).all("table", "likeness")


def test_bars_are_relevances_of_training_images(page: str, run: Run) -> None:
    (records,) = run.train_scan.shards()
    for part in run.split.channels:
        section = sections(page)[f"channel-{part.channel}"]
        titles = {title.text for title in section.all("title")}
        for k, (row, concept) in enumerate(zip(part.rows, part.concepts, strict=True)):
            pooled = records.pooled[torch.isin(records.label, torch.tensor(concept)), 0].double()
            full, kept = ((pooled * r).mean(0).view(8, 9).sum(1) for r in (part.weight, row))
            expected = {
                f"input channel {i}, concept {'ABCD'[k]}: {significant(float(full[i]))} in the "
                f"original channel, {significant(float(kept[i]))} in concept channel {'ABCD'[k]}"
                for i in range(8)
            }
            assert expected <= titles


def interval_text(pair: Pair, gamma: float) -> str:
    certain = pair.high < gamma if pair.cosine < gamma else pair.low >= gamma
    known = not math.isnan(pair.low)
    text = f"{number(pair.low)} to {number(pair.high)}" if known else ABSENT
    return text if certain else f"? {text}"


def assert_pairs_listed(page: str, found: Findings) -> None:
    """Every pair stands in the list, in order, with its figures and how sure they are."""
    (table,) = read(page).all("table", "pairs")
    cells = [[c.text for c in row.all("td")] for row in table.all("tbody")[0].all("tr")]
    assert [(*row[:3], *row[4:6], *row[7:]) for row in cells] == [
        (
            *(str(pair.channel), number(pair.cosine), interval_text(pair, found.gamma)),
            *(percent(pair.use1), number(pair.half1)),
            *(percent(pair.use2), number(pair.half2)),
        )
        for pair in found.pairs
    ]
    n_uncertain = sum("?" in row[2] for row in cells)
    told = re.search(r"\? marks (\d+) uncertain pairs? of", read(page).text)
    assert int(told[1]) == n_uncertain if told else n_uncertain == 0
    overview = {
        row.all("th")[0].text: row.all("td")[1].text
        for row in read(page).all("table", "overview")[0].all("tr")[1:]
    }
    assert overview == {
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
    run: Run, unsure: Findings, tmp_path: Path
) -> None:
    assert_pairs_listed(run.report(tmp_path / "r.html", found=unsure), unsure)


@pytest.mark.parametrize("name", ["low", "high", "half1", "half2", "cosine"])
def test_a_pair_that_is_shown_otherwise_is_seen(
    run: Run, unsure: Findings, name: str, tmp_path: Path
) -> None:
    page = run.report(tmp_path / "r.html", found=unsure)
    *others, last = unsure.pairs
    wrong = replace(unsure, pairs=(*others, replace(last, **{name: getattr(last, name) - 0.01})))
    with pytest.raises(AssertionError):
        assert_pairs_listed(page, wrong)


def test_a_wrong_number_of_uncertain_pairs_is_seen(
    run: Run, unsure: Findings, tmp_path: Path
) -> None:
    page = run.report(tmp_path / "r.html", found=unsure)
    told = f"?</span> marks {sum(map(unsure.uncertain, unsure.pairs))} "
    assert page.count(told) == 1
    with pytest.raises(AssertionError):
        assert_pairs_listed(page.replace(told, "?</span> marks 1 "), unsure)


def test_clusters_have_no_intervals(run: Run, tmp_path: Path) -> None:
    pairs = tuple(replace(pair, low=math.nan, high=math.nan) for pair in run.found.pairs)
    cluster = Cluster(0, 0, torch.eye(2), 0.0)
    clusters = replace(run.found, pairs=pairs, clusters=dict.fromkeys(run.found.classes, cluster))
    page = run.report(tmp_path / "r.html", found=clusters, split=None, evaluation=None)
    (table,) = read(page).all("table", "pairs")
    assert [cell.text for cell in table.all("th")] == [
        *("Channel", "Cosine", "Class", "Use", "Class", "Use"),
    ]
    assert "uncertain" not in read(page).all("main")[0].text


def test_pairs_and_settings_are_listed(page: str, run: Run) -> None:
    root = read(page)
    assert_pairs_listed(page, run.found)
    settings = root.all("dl", "settings")[0].text
    assert run.scan.manifest.weights in settings
    assert run.scan.manifest.data in settings
    assert f"149; 1 broken image left out (places {BROKEN})" in settings


def test_same_run_gives_the_same_page(page: str, run: Run, tmp_path: Path) -> None:
    assert run.report(tmp_path / "again.html") == page


# --- what is missing ------------------------------------------------------------------------------


def test_nothing_found(run: Run, tmp_path: Path) -> None:
    none = unbraid.find(run.train_scan, gamma=-1.0)
    page = run.report(tmp_path / "r.html", found=none, split=None, evaluation=None, title=SCRIPT)
    assert_harmless(page)
    assert none.hint in read(page).text
    assert not sections(page)
    assert read(page).all("h1")[0].text == SCRIPT


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        (("evaluation",), "Measures and the output check are left out"),
        (("train_scan",), "Input channels are left out"),
        (("dataset",), "Pictures are left out"),
        (("split", "evaluation"), "Details of the channels are left out"),
    ],
)
def test_what_is_missing_is_said(
    run: Run, tmp_path: Path, missing: tuple[str, ...], note: str
) -> None:
    page = run.report(tmp_path / "r.html", **dict.fromkeys(missing))
    assert_harmless(page)
    assert note in read(page).all("aside")[0].text


def test_unreadable_image_is_a_box(run: Run, tmp_path: Path) -> None:
    class Half(Blobs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index % 2:
                raise RuntimeError("gone")
            return super().__getitem__(index)

    page = run.report(tmp_path / "r.html", dataset=Half(150, 1))
    assert_harmless(page)
    assert read(page).all("span", "unreadable")
    assert read(page).all("img")


def test_too_many_channels_are_only_listed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view, "MAX_CHANNELS", 1)
    page = run.report(tmp_path / "r.html")
    assert_harmless(page)
    assert list(sections(page)) == [f"channel-{run.found.pairs[0].channel}"]
    assert len(read(page).all("table", "overview")[0].all("tr")) == 1 + len(run.found.concepts)
    assert "only the 1 channel" in read(page).all("aside")[0].text


def test_strangers_are_refused(run: Run, tmp_path: Path) -> None:
    other = replace(run.split, weights="other")
    shorter = replace(run.evaluation, channels=run.evaluation.channels[1:])
    shuffled = Subset(run.images, list(range(150))[::-3] * 3)
    for changed in (
        {"split": other, "evaluation": None},
        {"train_scan": replace(run.scan, manifest=replace(run.scan.manifest, weights="other"))},
        {"evaluation": shorter},
        {"dataset": shuffled},
        {"dataset": Subset(run.images, range(3))},
    ):
        with pytest.raises(UsageError):
            run.report(tmp_path / "r.html", **changed)
    assert not list(tmp_path.iterdir())


# --- reference images, pictures, charts -----------------------------------------------------------


def test_reference_images_are_those_of_brute_force(run: Run) -> None:
    kept = [n for n in range(len(run.images)) if n != BROKEN]
    layer = run.network[2]
    with torch.no_grad():
        x = run.network[:2](run.images.x[kept])
        for channel, top in reference_images(run.scan, run.split, n=7).items():
            part = run.split[channel]
            rows = [(part.weight, top.original), *zip(part.rows, top.concepts, strict=True)]
            for row, images in rows:
                weight = row.view(1, *layer.weight.shape[1:])
                z = F.conv2d(x, weight, layer.bias[[channel]], stride=2, padding=1).sum((1, 2, 3))
                best = z.argsort(descending=True)[:7]
                assert images.index.tolist() == [kept[n] for n in best]
                assert images.label.tolist() == [run.images.targets[kept[n]] for n in best]
                torch.testing.assert_close(images.activation.float(), z[best], rtol=1e-4, atol=1e-4)


def test_reference_images_do_not_depend_on_shards(run: Run, tmp_path: Path) -> None:
    one = unbraid.scan(run.network, "2", run.images, tmp_path / "one", skip_broken=True)
    assert one.manifest.n_shards == 1
    assert run.scan.manifest.n_shards > 1
    for n in (1, 60, 1000):
        here, there = (reference_images(scan, run.split, n=n) for scan in (one, run.scan))
        for channel in here:
            pair = [(r[channel].original, *r[channel].concepts) for r in (here, there)]
            for a, b in zip(*pair, strict=True):
                assert len(a.index) == min(n, 149)
                assert a.index.tolist() == b.index.tolist()


def test_reference_images_refuse_nonsense(run: Run) -> None:
    with pytest.raises(UsageError):
        reference_images(run.scan, run.split, n=0)
    with pytest.raises(UsageError):
        reference_images(run.scan, replace(run.split, weights="other"))


@pytest.mark.parametrize(
    ("shape", "mode"), [((3, 9, 7), "RGB"), ((1, 9, 7), "L"), ((9, 7), "L"), ((5, 9, 7), "L")]
)
def test_tensors_become_pictures(shape: tuple[int, ...], mode: str) -> None:
    picture = to_picture(torch.randn(shape) * torch.randint(1, 1000, (1,)))
    assert (picture.size, picture.mode) == ((7, 9), mode)
    assert picture.convert("L").getextrema()[1] > 0


def test_pictures_come_from_before_the_transform() -> None:
    class Files(Blobs):
        def picture(self, index: int) -> Image.Image:
            return Image.new("RGB", (640, 480), (index, 0, 0))

    album = Album(Subset(Files(20, 0), [3, 4]), [0, 1, 2], side=96)
    assert not album.as_seen  # the tensors are of another size
    made = album.pictures(Look(8, 96, 75))
    assert made[0] is not None
    assert made[0].uri.startswith("data:image/webp;base64,")
    assert made[0] != made[1]
    assert made[2] is None


def test_density_is_scipys() -> None:
    values = np.random.default_rng(0).normal(3, 2, 80)
    grid = np.linspace(-5, 12, 161)
    expected = gaussian_kde(values)(grid)
    np.testing.assert_allclose(density(values, grid), expected / expected.max(), atol=1e-12)


@pytest.mark.parametrize("values", [[0.0] * 4, [7.0] * 4, [1e-30, 0, 0, 0], [-1e12, 0, 1, 1e12]])
def test_any_data_can_be_drawn(values: list[float], run: Run) -> None:
    z = torch.tensor(values, dtype=torch.float64)
    views = concept_views(run.found, [[0], [1]])
    concept = torch.tensor([0, 1, 1, 1])
    answers = Responses(concept, concept, z, z, torch.stack([z, 0 * z], 1), z, None)
    drawn = charts.densities(densities(views, answers), 7)
    assert len(read(drawn).all("path", "curve")) == 6
    assert not re.search(r"\b(nan|inf)\b", drawn)
