"""A first look: a run over a sample of the images, minutes long, before the run over all of them.

The sample is the same every time, and comes first in the scans of the run over all images. So these
take over its records, and are the same to the last byte as without a first look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset, Subset

from unbraid.base.tables import count
from unbraid.images.dataset import listed_labels, size_of
from unbraid.images.mapped import distinct
from unbraid.images.sample import SIZES, sample_of
from unbraid.images.several_labels import refuse_several
from unbraid.running.folders import FIRST_LOOK, home_of
from unbraid.running.several import LayerRuns, run_layers
from unbraid.scanning.targets import LABEL, read_target

LARGE = 20_000  # training images, from which on a run begins with a first look by itself


def run_in_turn(
    model: nn.Module,
    layers: Sequence[str],
    train: Dataset[Any],
    val: Dataset[Any],
    out: Path,
    *,
    quick: bool | None,
    command: str,
    **options: Any,
) -> Iterator[LayerRuns]:
    """Do everything for some images, in OUT/quick, then for all of them; yield each when done.

    Args:
        model: as for `run_layers`, and so are all other arguments.
        layers: names or patterns.
        train: images to find and split with.
        val: images to evaluate on.
        out: the run's folder.
        quick: only the first look (True) or none (False); None: both if there are 20,000 training
            images or more, and neither is there yet.
        command: what makes the run over all images, for people.
        options: the other fields of `Job`.
    """
    say: Callable[[str], None] = options["say"]
    home = home_of(out)
    is_sample = size_of(train) > SIZES["train"] or size_of(val) > SIZES["val"]
    if quick and not is_sample:
        n = f"{size_of(train):,} training and {size_of(val):,} validation images"
        say(f"A first look is at no fewer than these {n}, so this is the full run.")
    large = size_of(train) >= LARGE and not _begun(home)
    if is_sample and (quick or (quick is None and large)):
        for images in (train, val):  # what the run over all of them would refuse only later
            named = read_target(options.get("target", LABEL)).name
            refuse_several(images, options["labels"] == "given", named == LABEL)
        by_class = options["labels"] == "given"
        parts = {
            kind: Subset(images, sample_of(images, SIZES[kind], by_class=by_class))
            for kind, images in (("train", train), ("val", val))
        }
        told = (
            f"{_of(parts['train'], train)} training and {_of(parts['val'], val)} validation images"
        )
        n_seen, n_all = (
            len(distinct(listed_labels(images) or ()) if by_class else ())
            for images in (parts["train"], train)
        )
        if n_seen < n_all:
            told += f", of {n_seen:,} of {count(n_all, 'class', 'classes')}"
        after = "" if quick else " The run over all images follows."
        say(f"First look at {told}; its results go into {home / FIRST_LOOK}.{after}")
        own = {
            "title": f"{options['title']} · first look",
            "source": options["source"] | {"first_look": {"images": told, "command": command}},
        }
        asked = (model, layers, parts["train"], parts["val"], home / FIRST_LOOK)
        yield run_layers(*asked, **options | own, command=command)
        if quick:
            return
        say("Now all images.")
    options |= {"first_look": home / FIRST_LOOK, "command": command}
    yield run_layers(model, layers, train, val, out, **options)


def _of(part: Dataset[Any], whole: Dataset[Any]) -> str:
    return f"{size_of(part):,} of {size_of(whole):,}"


def _begun(home: Path) -> bool:
    """Whether a first look has its page, or a scan of all images was begun, of any layer."""
    manifests = (*home.glob("scan-*/manifest.json"), *home.glob("*/scan-*/manifest.json"))
    pages = (home / FIRST_LOOK).glob("**/report.html")
    return any(path.parent.parent.name != FIRST_LOOK for path in manifests) or any(pages)
