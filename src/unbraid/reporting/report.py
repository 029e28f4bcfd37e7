"""The report: one self-contained page on the channels that were found and split."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from unbraid.base.arguments import as_kind, as_path
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import count
from unbraid.finding.findings import Findings
from unbraid.measuring.circuit_graph import N_DRAWN
from unbraid.reporting import charts, words
from unbraid.reporting.channel import concept_views
from unbraid.reporting.circuits import draw_edges, edges_from, layer_before
from unbraid.reporting.crops import Crops
from unbraid.reporting.pictures import take_pictures
from unbraid.reporting.view import MAX_TEXT, Material, build_page, output_word
from unbraid.scanning.as_scanned import as_scanned
from unbraid.scanning.records import Scan

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from unbraid.finding.sensitivity import Sensitivity
    from unbraid.measuring.circuit_graph import CircuitGraph
    from unbraid.measuring.results import Evaluation
    from unbraid.splitting.splits import Split
    from unbraid.visualizing.features import Features

Item = TypeVar("Item")

# Bytes of the file that the sections of channels and each of the two lists may have. All else on
# the page is bounded, so it has less than 10 MB.
SECTIONS, LIST = 7_200_000, 800_000
N_UNFOLDED = 3  # channels, where there are more than a few: a page of 89 is 200,000 pixels long
_FEW = 8
_MAX_CHIPS = 26  # concepts of a channel in the list
_MAX_WORDS = 4000  # characters of names that a channel is found by
_HERE = Path(__file__).parent


@in_plain_modes
def report(
    path: str | Path,
    *,
    scan: Scan,
    found: Findings,
    split: Split | None = None,
    evaluation: Evaluation | None = None,
    train_scan: Scan | None = None,
    sensitivity: Sensitivity | None = None,
    maps: Scan | None = None,
    features: Features | None = None,
    dataset: Dataset[Any] | None = None,
    title: str | None = None,
    lead: str = "",
    circuits: Sequence[CircuitGraph] = (),
    command: str | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write one HTML file that shows what was found, how it was split and how well.

    The file has at most 10 MB: where many channels were split, pictures are smaller, or not all
    channels are shown in full, and it says so. It holds all it needs, pictures included, and asks
    nothing of any network. What an argument left out would have contributed is left out, and the
    page says so.

    Args:
        path: the file to write; a folder that is missing is made.
        scan: of the validation images; reference images are chosen from it.
        found: the polysemantic channels, perhaps none.
        split: their concept channels, None if there are none.
        evaluation: the split's measures on validation images.
        train_scan: of the training images, for the input channels that feed each concept.
        sensitivity: what other thresholds would find.
        maps: of the same images as `scan`, or some of them, with positions: for where in its
            reference images a channel responds. Not needed if `scan` itself has positions.
        features: images made to excite the channels, from `unbraid.visualize`.
        dataset: the images that `scan` was made of, for their pictures; where it has ids, their
            order may have changed.
        title: the page's heading; by default it names the layer.
        lead: what to know before all else, such as how few images were looked at.
        circuits: through earlier layers, from `unbraid.circuit_graph`, shown with their channels.
        command: what made the run that the page is of, for its own commands to copy; empty where
            that is not known, None of a page that is of no run.
        notes: what to beware of, such as labels that were guessed, beside what the page finds.

    Returns:
        The path of the file.

    Raises:
        UsageError: scans, split, evaluation, features and data set do not belong together.
        RunError: the file cannot be written, or a scan is damaged.
    """
    file = as_path("path", path)
    as_kind("scan", scan, Scan)
    as_kind("found", found, Findings)
    made = (split, evaluation, train_scan, sensitivity, features, maps)
    material = Material(scan, found, *made, tuple(circuits), command)
    material.refuse_strangers()
    images = None
    if dataset is not None:
        images = Crops(dataset, scan) if scan.manifest.places_of else as_scanned(dataset, scan)
    page = render(material, dataset=images, title=title, lead=lead, given=notes)
    # A folder's name may hold bytes that are no text; they are spelt out, not fatal.
    write_whole(file, page.encode("utf-8", "backslashreplace"))
    return file


def render(
    material: Material,
    *,
    dataset: Dataset[Any] | None,
    title: str | None,
    lead: str = "",
    given: Sequence[str] = (),
) -> str:
    """Return the page; arguments as in `unbraid.report`, whose notes are `given`."""
    page, found = build_page(material, has_images=dataset is not None, title=title), material.found
    pictures = take_pictures(page, material, dataset)
    environment = page_environment()
    environment.globals |= {
        "page": page,
        "material": material,
        "found": found,
        "pictures": pictures,
        "of_clusters": found.sides != "classes",
        "judged": bool(found.pairs) and found.sides == "classes",
        "predicted": material.scan.manifest.labels == "predicted",
        "target": material.scan.manifest.target,
        "output_word": output_word(material.scan),
        "n_images": material.n_images,
    }
    section = environment.get_template("channel.html.j2")
    unfolded = {channel.number for channel in page.channels[:N_UNFOLDED]}
    if len(page.channels) <= _FEW:
        unfolded = {channel.number for channel in page.channels}
    sections = _within(
        SECTIONS,
        page.channels,
        lambda channel: section.render(channel=channel, folded=channel.number not in unfolded),
    )
    in_full = {channel.number for channel in page.channels[: len(sections)]}
    environment.globals["in_full"] = in_full
    lines: Any = environment.get_template("lines.html.j2").module

    def channel_line(channel: int) -> str:
        views = concept_views(found, material.concepts[channel][:_MAX_CHIPS])
        names = " ".join(words.isolate(name) for concept in views for name in concept.names)
        return str(lines.channel_line(channel, views, names[:_MAX_WORDS]))

    # What has a section is listed in any case.
    first = sorted(material.concepts, key=lambda c: (c not in in_full, material.rank(c)))
    rows = dict(zip(first, _within(LIST, first, channel_line), strict=False))
    nearest = sorted(found.pairs, key=lambda pair: (math.isnan(pair.cosine), pair.cosine))
    pairs = _within(LIST, nearest, lines.pair_line)
    style, script = map(read_part, ("style.css", "script.js"))
    left_out = _left_out(material, len(sections), len(rows), len(pairs))
    notes = [words.bounded(note, MAX_TEXT) for note in given]
    return environment.get_template("page.html.j2").render(
        lead=lead,
        sections=sections,
        rows=[rows[channel] for channel in sorted(rows, key=material.rank)],
        pairs=pairs,
        n_uncertain=sum(map(found.uncertain, nearest[: len(pairs)])),
        notes=[*notes, *page.notes, *filter(None, [pictures.note]), *left_out],
        style=style,
        script=script,
        style_hash=hash_of(style),
        script_hash=hash_of(script),
    )


def _within(limit: int, items: Iterable[Item], write: Callable[[Item], str]) -> list[Markup]:
    """Write items one after the other, as many as there are bytes for."""
    written: list[Markup] = []
    for item in items:
        text = write(item)
        limit -= len(text.encode("utf-8", "backslashreplace"))
        if limit < 0:
            break
        written.append(Markup(text))
    return written


def _left_out(material: Material, n_sections: int, n_rows: int, n_pairs: int) -> list[str]:
    """Say what of sections and lists is left out to keep the file small."""
    notes = []
    n_split, n_found, n_all = map(len, (material.parts, material.concepts, material.found.pairs))
    if n_sections < n_split:
        which = f"only the {count(n_sections, 'channel')} with the lowest cosines"
        notes.append(
            f"To keep the file small, {which if n_sections else 'none'} of {n_split:,} "
            f"{'are' if n_sections > 1 else 'is'} shown in full."
        )
    if n_rows < n_found:
        notes.append(
            f"The list of channels has {n_rows:,} of {n_found:,}, those shown in full and then "
            "those with the lowest cosines."
        )
    if n_pairs < n_all:
        notes.append(
            f"The list of pairs has the {n_pairs:,} with the lowest cosines of {n_all:,}; the "
            f"other {n_all - n_pairs:,} are in findings.csv, which a run leaves beside its report "
            "and Findings.to_csv writes."
        )
    return notes


def page_environment() -> Environment:
    """What a template of a page can use."""
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("number", "value", "significant", "ordinal", "percent", "isolate", "bounded"):
        environment.filters[name] = getattr(words, name)
    for name in ("densities", "bars", "ridges", "scatter", "masks", "thresholds"):
        environment.globals[f"draw_{name}"] = getattr(charts, f"draw_{name}")
    environment.globals |= {"draw_edges": draw_edges, "drawn_from": edges_from}
    environment.globals |= {"with_options": words.with_options, "n_drawn": N_DRAWN}
    environment.globals["before_of"] = layer_before
    environment.globals |= {"count": count, "absent": words.ABSENT, "max_text": MAX_TEXT}
    environment.globals["glossary"] = words.GLOSSARY
    return environment


def read_part(name: str) -> Markup:
    """Read a style or script, which become part of a page."""
    return Markup((_HERE / name).read_text("utf-8"))


def hash_of(content: str) -> str:
    """Name a style or script in a Content-Security-Policy, so that no other one is let in."""
    digest = hashlib.sha256(content.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
