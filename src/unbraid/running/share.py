"""A run's split as a folder for others: the split, a card, its measures and the page."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from unbraid.base.errors import RunError, UsageError
from unbraid.base.files import write_whole
from unbraid.base.tables import count, figure, one_line
from unbraid.measuring.results import Evaluation
from unbraid.reporting.report import report
from unbraid.running.finished import Run
from unbraid.running.folders import refuse_folder
from unbraid.scanning.records import Scan
from unbraid.splitting.location import FILE

CARD, MEASURES, PAGE = "README.md", "measures.json", "page.html"
_FILES = (CARD, FILE, MEASURES, PAGE)
_OURS = "library_name: unbraid"  # in a card, so that no other README.md is written over
_MOST = 100  # channels in a card
_ABSOLUTE = r"(?:file://)?(?:/(?!/)|~\w*/|[A-Za-z]:[\\/])"
_PATH = re.compile(
    rf"""(?P<quote>['"])(?P<quoted>(?:{_ABSOLUTE}|\\\\)(?:(?!(?P=quote)).)*)(?P=quote)"""
    rf"""|(?<![\w./\\~])(?P<bare>{_ABSOLUTE}[^\s'",;()<>\[\]{{}}]*[\\/][^\s'",;()<>\[\]{{}}]*)"""
)
_NOT_SAID = "not said"
_ENTITIES = "<>&|~$@"  # not all readers of Markdown take a backslash before these
_MARKUP = re.compile(rf"[{re.escape(_ENTITIES)}\\`*_{{}}\[\]#!]")
_MEANS = {  # of the summary, with what it says
    "separation_error": "separation error: how far concept channels are from answering to their "
    "own images as the whole channel does, and not to other concepts' (0 is ideal; dividing a "
    "channel evenly between two gives 0.5)",
    "r_precision": "R-precision: of the images that excite a concept channel most, as many as its "
    "concept has, the part that are its concept's (1 is ideal)",
    "median_retention": "retention, median: how much of the whole channel's response to its own "
    "images a concept channel keeps (1 is ideal)",
}


def share_run(
    run: Run, out: Path, *, data_name: str = "", license_name: str = "", pictures: bool = False
) -> list[Path]:
    """Write a run's split into a folder that others can load; docs/sharing.md says what is in it.

    The folder holds none of the run's pictures and no path of this machine, unless asked.

    Args:
        run: a finished one.
        out: the folder; files of these names from an earlier share are replaced.
        data_name: what the images are, in words, for the card.
        license_name: of what is shared, such as "mit", for the card.
        pictures: whether the page shows the run's images.

    Raises:
        RunError: the run has no split, is not finished or cannot be read.
        UsageError: the folder holds a run, or files of these names of something else.
        DataError: pictures are asked for, and the run's images are gone.
    """
    if run.evaluation is None:
        raise RunError(f"{run.folder} found nothing to split, so there is nothing to share.")
    refuse_folder(out)
    there = next((name for name in _FILES if os.path.lexists(out / name)), None)
    if there is not None and not _is_shared(out):
        raise UsageError(f"{out} holds a {there} of something else; name another folder.")
    images = run.images if pictures else None
    network = _network(run.settings.source)
    shown: dict[str, Any] = {
        name: _nameless(one, network) if isinstance(one, Scan) else one
        for name, one in run.shown_on_page.items()
    }
    shown["evaluation"] = evaluation = _pathless(run.evaluation)
    card = _card(run, run.evaluation, one_line(data_name), one_line(license_name))
    with TemporaryDirectory() as folder:
        made = Path(folder)
        run.split.save(made / FILE)
        evaluation.save(made / MEASURES)
        title = f"{network}, {run.split.layer.name}"
        report(made / PAGE, title=title, dataset=images, notes=run.doubts, **shown)
        write_whole(made / CARD, card.encode("utf-8", "backslashreplace"))
        _put(made, out)
    return [out / name for name in _FILES]


def _is_shared(out: Path) -> bool:
    """Whether a folder has a card of ours."""
    with suppress(OSError):
        return _OURS in (out / CARD).read_text("utf-8", "replace")
    return False


def _put(made: Path, out: Path) -> None:
    """Copy the files to where they are shared, the card last; an error leaves no new one there."""
    new = [name for name in _FILES if not os.path.lexists(out / name)]
    try:
        for name in reversed(_FILES):
            write_whole(out / name, (made / name).read_bytes())
    except BaseException:
        for name in new:
            with suppress(OSError):
                (out / name).unlink()
        raise


def _card(run: Run, evaluation: Evaluation, data_name: str, license_name: str) -> str:
    split, manifest = run.split, run.train_scan.manifest
    layer = split.layer
    shape = f"{layer.kind}, {layer.n_in:,} inputs, {count(layer.n_out, 'channel')}"
    images = f"{data_name or _NOT_SAID}; {count(manifest.n_images, 'image')} for training, "
    images += f"{run.val_scan.manifest.n_images:,} for validation; labels {manifest.labels}"
    n_concepts = sum(len(part.concepts) for part in split.channels)
    settings = {**split.settings, "method": split.method.replace("_", " ")}
    facts = {
        "network": _network(run.settings.source),
        "fingerprint of its weights": split.weights,
        "layer": f"{layer.name} ({shape})",
        "images": images,
        "target": _without_folders(manifest.target),
        "preprocessing": _without_folders(manifest.preprocessing) or _NOT_SAID,
        "found with": ", ".join(f"{name} {_short(value)}" for name, value in settings.items()),
        "split": f"{count(len(split.channels), 'channel')}, {count(n_concepts, 'concept')}",
        "licence": license_name or _NOT_SAID,
        "made with": ", ".join(f"{name} {own}" for name, own in manifest.versions.items()),
    }
    if manifest.target == "label":  # as usual
        del facts["target"]
    head = ["---", _OURS]
    if license_name:
        head.append(f"license: {json.dumps(license_name)}")  # a text in JSON is one in YAML
    head += ["tags:", "- unbraid", "- interpretability", "- polysemanticity", "- pytorch", "---"]
    return "\n".join(
        [
            *head,
            "",
            f"# Concept channels for {_plain(layer.name)} of {_plain(facts['network'])}",
            "",
            "Some channels of this layer answer to unrelated things. This split divides each into "
            "one channel per concept. The network's outputs stay the same to the last bit.",
            "",
            "```python",
            "import unbraid",
            "",
            'model2 = unbraid.load_split(model, "FOLDER")  # or "hf://OWNER/NAME"',
            "```",
            "",
            "`model` is the network named below, with the very weights that the fingerprint is of; "
            "others are refused. `pip install unbraid` brings what is needed, and "
            '`pip install "unbraid[hub]"` what `hf://` takes.',
            "",
            *_rows(["", ""], [[name, value] for name, value in facts.items()]),
            "",
            "## Measures",
            "",
            "On validation images, which neither found nor fitted anything. "
            f"`{MEASURES}` has all of them, `{PAGE}` shows them.",
            "",
            *_rows(["measure", "value"], _measures(evaluation)),
            "",
            "## Channels",
            "",
            *_channels(evaluation),
            "",
        ]
    )


def _nameless(scan: Scan, network: str) -> Scan:
    """The same scan, but that it does not say where anything lies."""
    own = scan.manifest
    nameless = replace(
        own,
        source={"model": network},
        preprocessing=_without_folders(own.preprocessing),
        target=_without_folders(own.target),
    )
    vars(nameless)["scan_id"] = own.scan_id  # by which its shards are known
    return replace(scan, manifest=nameless)


def _pathless(evaluation: Evaluation) -> Evaluation:
    """The same measures, but that their target, perhaps an object's own text, has no folders."""
    ablation = evaluation.ablation
    if ablation is None:
        return evaluation
    told = replace(ablation, target=_without_folders(ablation.target))
    return replace(evaluation, ablation=told)


def _network(source: dict[str, Any]) -> str:
    """Name a run's network, and its weights, without the folders that they lie in."""
    if "demo" in source:
        return "unbraid's demo network"
    model, weights = (_without_folder(source.get(name)) for name in ("model", "weights"))
    if not model:
        return "a network of the author's own"
    usual = "" if ".py:" in model else ", its usual weights"
    return f"{model}, weights {weights}" if weights else model + usual


def _without_folder(name: object) -> str:
    return re.split(r"[/\\]", name)[-1] if isinstance(name, str) else ""


def _without_folders(text: str) -> str:
    """Leave of each absolute path in a text its last part.

    >>> _without_folders("Mean(path=PosixPath('/data/a b/mean.npy'), by=1/255) at /x/y.py")
    "Mean(path=PosixPath('mean.npy'), by=1/255) at y.py"
    """
    return _PATH.sub(_last_part, text)


def _last_part(found: re.Match[str]) -> str:
    quote = found["quote"] or ""
    parts = [part for part in re.split(r"[/\\]+", found["quoted"] or found["bare"]) if part]
    return f"{quote}{parts[-1] if parts else '/'}{quote}"


def _measures(evaluation: Evaluation) -> list[list[str]]:
    means = evaluation.summary[evaluation.method]
    rows = [
        [words, figure(value)]
        for name, words in _MEANS.items()
        if (value := means.get(name)) is not None
    ]
    output = evaluation.output
    if output is not None:
        rows.append(["largest difference between logits", f"{output.max_abs_logit_diff:g}"])
        if output.top1_before is not None:
            rows.append(["accuracy of the network", figure(output.top1_before)])
    return rows


def _channels(evaluation: Evaluation) -> list[str]:
    """The table of split channels, the best told apart first, and how many it leaves out."""
    by_error = sorted(evaluation.channels, key=lambda c: (c.separation_error, c.channel))
    rows = [
        [
            str(own.channel),
            "; ".join(f"{k}: {concept.name}" for k, concept in enumerate(own.concepts)),
            figure(own.separation_error),
            ", ".join(figure(_known(concept.r_precision)) for concept in own.concepts),
        ]
        for own in by_error[:_MOST]
    ]
    table = _rows(["channel", "concepts", "separation error", "R-precision"], rows)
    n_more = len(by_error) - len(rows)
    return (
        [*table, "", f"And {count(n_more, 'more channel')}, in `{MEASURES}`."] if n_more else table
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rows(heads: list[str], rows: list[list[str]]) -> list[str]:
    """A table in Markdown; cells may hold any text."""
    lines = [heads, ["---"] * len(heads), *([_plain(cell) for cell in row] for row in rows)]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _plain(text: str) -> str:
    r"""Write any text so that Markdown and HTML show it as it is, on one line.

    >>> print(_plain('T-shirt_2, "><b>*x*|'))
    T-shirt\_2, "&#62;&#60;b&#62;\*x\*&#124;
    """
    return re.sub(_MARKUP, _escaped, one_line(text))


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    return f"&#{ord(character)};" if character in _ENTITIES else f"\\{character}"
