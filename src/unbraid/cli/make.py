"""Commands that scan, find, split and measure, one step at a time or all at once."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

import unbraid
from unbraid.base.arguments import whole_number
from unbraid.base.errors import CannotRun, UnbraidError, UsageError
from unbraid.base.tables import Table, count, percent
from unbraid.cli.shared import (
    Bands,
    CsvFile,
    Device,
    Features,
    Grid,
    Layers,
    Model,
    Names,
    Network,
    Out,
    Output,
    ScanPaths,
    Target,
    Tau,
    Weights,
    labels_for,
    load,
    note,
    noted,
    open_images,
    read_bands,
    refuse_result,
    say,
    show,
    show_broken,
    show_runs,
    show_table,
    source_of,
)
from unbraid.finding.find_options import Finding, check_rho, plain_thresholds
from unbraid.scanning.scan_options import MAX_PLACES, MIN_SHARE, Labels, Loading, ScanOptions

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

ALIKE = 0.8  # of what matters in a few images, from which on bfloat16 is suggested


def demo(*, out: Out, layer: Layers | None = None, features: Features = True) -> None:
    """Split a small network and see its report. Needs no data and no internet: all is included."""
    from unbraid.running.demo import run_demo

    unbraid.keep_memory()
    show_runs(run_demo(out, layer, features=features, say=say))


def run(
    *,
    network: Network,
    layer: Layers,
    data: str,
    out: Out,
    tau: Tau = "auto",
    finding: Finding = Finding(),
    labels: Labels = "given",
    target: Target = "label",
    rho: float | None = None,
    encoder: str | None = None,
    places: int = 0,
    everything: Annotated[bool, Parameter("--all")] = False,
    features: Features = True,
    overwrite: bool = False,
    quick: Annotated[bool | None, Parameter(negative="--no-quick")] = None,
    bands: Bands = None,
    loading: Loading = Loading(),
) -> None:
    """Do everything: scan, find, split, check the outputs, evaluate and report.

    One pass scans all layers. With several layers, each has its results in a folder of its name.
    If a run stops, the same command goes on where it stopped. A run with other thresholds,
    concepts or encoder keeps what is there, shares its scans and writes its results into
    OUT/settings-2 and so on.

    Args:
        data: Folder with train and val. Each is a folder of images, with or without class folders
            (pictures, or tensors as .npy, .pt, .safetensors or TIFFs of several bands), a list
            (train.csv, train.parquet) or a shard (train.tar). hf:FOLDER holds both likewise, and
            FILE.py:FUNCTION returns data sets of tensors (docs/data.md). All else that
            `unbraid scan` takes is divided: a fifth of the images becomes validation.
        labels: What gives an image its class: its folder (given), the network (predicted) or
            nothing (none).
        rho: Use this rho for the published rule, instead of one chosen per channel.
        encoder: timm:NAME, a network that says how alike images are. By default your own network.
        places: Make concepts of places in images instead of whole images: of each channel, this
            many places that excite it most (docs/places.md). 0 means none.
        everything: Measure on all images and all channels instead of a sample (docs/scale.md).
        overwrite: Replace a run with other settings in OUT, once the new one is finished.
        quick: Take a first look only, at some 2,000 training and 1,000 validation images, in
            OUT/quick. The same command without --quick goes on from there. With 20,000 images or
            more, every run begins with a first look unless you say --no-quick.
    """
    drawn = read_bands(bands)
    plain_thresholds(tau, finding.p, finding.gamma, MIN_SHARE)
    check_rho(rho)
    loading, places = loading.checked(), whole_number("places", places, 0, MAX_PLACES)
    from unbraid.base.progress import waiting
    from unbraid.base.team import n_ranks
    from unbraid.images.kept import LISTED_PARTS, tentative
    from unbraid.images.open import images_of_run, labelled
    from unbraid.images.sources import refuse_source
    from unbraid.reporting.drawing import draw_by
    from unbraid.running.first_look import run_in_turn
    from unbraid.running.folders import Thresholds, home_of
    from unbraid.scanning.targets import found_again, read_target

    if n_ranks() > 1:
        raise UsageError(
            "Several processes can share a scan, not a run; use torchrun with `unbraid scan` into "
            "OUT/scan-train and OUT/scan-val, then start `unbraid run` alone, which goes on there."
        )
    sought = read_target(target)
    refuse_source(data, out, in_parts=True)
    loaded = load(network)
    say(f"Network {network.model}, layer {', '.join(layer)}.")
    with tentative(home_of(out), *LISTED_PARTS.values()) as lists:
        kept = dict(zip(LISTED_PARTS, lists, strict=False))
        with waiting("Listing images"):
            train, val, assumed = images_of_run(loaded, data, kept, of_outputs=sought.of_class)
        note(assumed)
        for images in (train, val):
            draw_by(images, drawn)
        classified = labels == "predicted" or (labelled(train) and labels == "given")
        asked = finding.asked(labelled=classified and sought.value is not None and not places)
        if places > 0:
            say(f"Concepts are clusters of places, {places:,} of each channel at most.")
        elif asked["concepts"] != (finding.concepts or "classes"):
            other = "; --labels predicted makes them of predicted classes"
            say(f"Concepts are clusters of images{'' if sought.value is None else other}.")
        for done in run_in_turn(
            loaded.model,
            layer,
            train,
            val,
            out,
            quick=quick,
            command=shlex.join(
                ["unbraid", *(word for word in sys.argv[1:] if not word.startswith("--quick"))]
            ),
            thresholds=Thresholds(tau=tau, rho=rho, **asked),
            loading=loading,
            source=source_of(loaded, train, data)
            | noted(assumed, train)
            | {"class_folders": labelled(train)}
            | ({} if target == "label" else {"target": found_again(target)})
            | ({} if drawn is None else {"bands": [*drawn]}),
            say=say,
            title=network.model,
            encoder=encoder,
            labels=labels_for(labels, train, of_outputs=sought.of_class),
            target=sought,
            places=places,
            everything=everything,
            features=features,
            overwrite=overwrite,
        ):
            show_runs(done)


def layers(
    model: Model, *, weights: Weights = "random", output: Output = None, data: str | None = None
) -> None:
    """List the layers of a network that can be split.

    The network runs on one blank picture, to see which layers reach its logits.

    Args:
        data: Run it on the first image of this instead, as `unbraid scan` takes it: needed if the
            network takes no pictures of three colours (FILE.py:FUNCTION).
    """
    from PIL import Image

    from unbraid.images.sources import refuse_absent
    from unbraid.networks.layers import no_layers
    from unbraid.scanning.scan import usable_in, usable_layers

    if data is not None:
        refuse_absent(data)
    rows = [["layer", "kind", "in", "out", "kernel", "groups"]]
    loaded = load(Network(model=model, weights=weights, output=output, device="cpu"))
    if data is None:
        blank = loaded.transform(Image.new("RGB", (256, 256)))
        try:
            specs = usable_layers(loaded.model, blank[None])
        except CannotRun as error:
            raise CannotRun(
                f"{str(error).removesuffix('.')}, or give it images of its own by --data."
            ) from error
        note(loaded.note)  # once the network is seen to take such a picture
    else:
        specs = usable_in(loaded.model, open_images(loaded, data, of_outputs=False))
    if not specs:
        raise no_layers(loaded.model)
    for spec in specs:
        kernel = "" if spec.channels_last else "x".join(map(str, spec.kernel))
        cells = (spec.name, spec.kind, spec.n_in, spec.n_out, kernel, spec.groups)
        rows.append(list(map(str, cells)))
    show_table(Table(rows))


def scan(
    *,
    network: Network,
    layer: Layers,
    data: str,
    out: Out,
    target: Target = "label",
    options: ScanOptions = ScanOptions(),
) -> None:
    """Run a network over images once and keep a small record of each image.

    One pass scans all layers. With several layers, each has its scan in a folder of its name.
    Several processes share the work with `torchrun --nproc-per-node 8 -m unbraid scan ...`.

    Args:
        data: Folder of images (pictures, or tensors as .npy, .pt, .safetensors or TIFFs of several
            bands), with or without class folders; a list of images (CSV, Parquet);
            shards (FILE.tar, a folder of them, train-{000..012}.tar, a URL); hf:FOLDER; or
            FILE.py:FUNCTION.
    """
    options = options.checked()
    from unbraid.base.team import is_first
    from unbraid.images.kept import LISTED, tentative
    from unbraid.images.sources import refuse_source
    from unbraid.images.which import name_of
    from unbraid.scanning.accuracy import LONG
    from unbraid.scanning.targets import read_target

    sought = read_target(target)
    refuse_source(data, out, in_parts=False)
    loaded = load(network)
    with tentative(out, LISTED) as lists:
        images = open_images(loaded, data, next(iter(lists), None), of_outputs=sought.of_class)
        options = replace(
            options,
            labels=labels_for(options.labels, images, of_outputs=sought.of_class),
            target=sought,
            progress=True,
            source=source_of(loaded, images, data),
        )
        begun = next(out.glob("**/manifest.json"), None)  # in one of both formats
        of_class = target == "label" and not (begun or options.autocast)
        if of_class and len(images) >= LONG and is_first():
            _suggest_bfloat16(loaded.model, layer, images)
        asked = layer[0] if len(layer) == 1 else layer
        made = unbraid.scan(loaded.model, asked, images, out, **vars(options))
    if not is_first():
        return
    one = made if isinstance(made, unbraid.Scan) else next(iter(made.values()))
    broken = one.broken()
    show_broken([name_of(images, index) for index in broken])
    show(f"Scanned {count(one.manifest.n_images - len(broken), 'image')} into {out}")
    if options.places:
        scans = [made] if isinstance(made, unbraid.Scan) else list(made.values())
        for own in scans:
            show(f"{own.places.manifest.n_images:,} places into {own.places.path}")


def _suggest_bfloat16(model: nn.Module, layers: Sequence[str], images: Dataset[Any]) -> None:
    """Suggest bfloat16 where it is faster and a few images come to the same in it."""
    from unbraid.networks.formats import faster_in_bfloat16
    from unbraid.networks.layers import is_pattern
    from unbraid.scanning.bfloat16 import part_alike

    named = [name for name in layers if not is_pattern(model, name)]
    if not (named and faster_in_bfloat16(model)):
        return
    part = None
    with suppress(UnbraidError):  # which the scan will tell
        part = part_alike(model, named, images)
    if part is not None and part >= ALIKE:
        say(
            f"With --autocast, into a folder of its own, this scan would be faster: the processor "
            f"has bfloat16, and {percent(part)} of the channels that matter in a few of the images "
            "are the same in it."
        )


def find(
    scan: ScanPaths, *, tau: Tau = 0.03, finding: Finding = Finding(), out: CsvFile = None
) -> None:
    """Find the polysemantic channels in a scan of training images."""
    plain_thresholds(tau, finding.p, finding.gamma)
    from unbraid.scanning.accuracy import describe_fit, scanned_accuracy

    refuse_result(out)
    opened = unbraid.open_scan(scan)
    if (accuracy := scanned_accuracy(opened)) is not None:
        say(describe_fit(accuracy, opened.manifest.preprocessing))
    found = unbraid.find(opened, tau=tau, **finding.asked(), progress=True)
    if out is not None:
        found.to_csv(out)
    show_table(found.table().kept_in(out))


def sensitivity(
    scan: ScanPaths, *, taus: Grid = None, ps: Grid = None, gammas: Grid = None, out: CsvFile = None
) -> None:
    """Count the polysemantic channels for many combinations of thresholds, in seconds.

    Args:
        taus: Values of tau to try.
        ps: Values of p to try.
        gammas: Values of gamma to try.
    """
    refuse_result(out)
    counted = unbraid.sensitivity(unbraid.open_scan(scan), taus, ps, gammas)
    if out is not None:
        counted.to_csv(out)
    for k, table in enumerate(counted.tables()):
        if k:
            show()
        show_table(table)


def split(
    scan: ScanPaths,
    *,
    out: Out,
    tau: Tau = 0.03,
    finding: Finding = Finding(),
    method: Literal["least_squares", "published"] = "least_squares",
    rho: float | None = None,
) -> None:
    """Find the polysemantic channels in a scan and split them.

    Args:
        method: How to divide the weights.
        rho: Use this rho for the published rule. Without it, rho is chosen per channel, which takes
            a scan with --positions.
    """
    plain_thresholds(tau, finding.p, finding.gamma)
    check_rho(rho)
    refuse_result(out)
    opened = unbraid.open_scan(scan)
    found = unbraid.find(opened, tau=tau, **finding.asked(), progress=True)
    divided = unbraid.split(opened, found, method=method, rho=rho, progress=True)
    divided.save(out)
    show(f"Split {len(divided.channels)} channels into {out}")


def evaluate(split: Path, scan: ScanPaths, *, out: Path | None = None) -> None:
    """Measure how well a split's concept channels separate their concepts.

    Args:
        split: Split file.
        out: JSON file to write or replace.
    """
    refuse_result(out)
    opened = unbraid.open_scan(scan)
    result = unbraid.evaluate(unbraid.Split.load(split), opened, progress=True)
    if out is not None:
        result.save(out)
    show_table(result.table().kept_in(out))


def reproduce(
    *,
    imagenet: Path,
    out: Out,
    weights: Weights = "IMAGENET1K_V1",
    batch_size: int | None = None,
    workers: int = 0,
    device: Device = None,
    names: Names = None,
) -> int:
    """Run the published ResNet-50 setting and compare with the published list, pair by pair.

    The exit code is 0 if all published pairs, and no others, are found with their cosines, else 1.

    Args:
        imagenet: ImageNet folder that holds train/ with class folders.
        batch_size: Images per forward pass. By default as many as memory holds for sure.
        workers: Processes that load images.
    """
    loading = ScanOptions(batch_size=batch_size, workers=workers, progress=True).checked()
    from unbraid.images.sources import refuse_source
    from unbraid.running import reproduce
    from unbraid.running.folders import holds_results

    refuse_source(str(imagenet / "train"), out / "scan-train", in_parts=False)
    loaded = load(Network(model=reproduce.MODEL, weights=weights, device=device, names=names))
    images = open_images(loaded, str(imagenet / "train"))
    made = unbraid.scan(loaded.model, reproduce.LAYER, images, out / "scan-train", **vars(loading))
    found = unbraid.find(made, tau=0.03, p=0.75, gamma=0.5)
    # Those of a run in the same folder, with thresholds of its own, stay.
    table = "reproduced.csv" if holds_results(out) else "findings.csv"
    found.to_csv(out / table)
    matches = reproduce.match_pairs(found.pairs, reproduce.published_pairs())
    show(reproduce.show_matches(matches))
    return 0 if all(match.agrees for match in matches) else 1
