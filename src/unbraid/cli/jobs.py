"""Commands that do a whole job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unbraid.cli.inputs import load, open_images
from unbraid.cli.options import (
    BatchSize,
    Concepts,
    Device,
    EncoderName,
    Features,
    Gamma,
    Labels,
    Layers,
    Model,
    Names,
    Out,
    Output,
    Overwrite,
    P,
    Rho,
    SkipBroken,
    Tau,
    Weights,
    Workers,
)
from unbraid.cli.output import out_console, say, show_run, show_runs
from unbraid.tables import align, one_line


def demo(*, out: Out, features: Features = True) -> None:
    """Split a small network on Fashion-MNIST, offline, in under a minute.

    Everything comes with the package: the network, trained on all of Fashion-MNIST, and a sample
    of its images.
    """
    from unbraid.demo.network import LAYER, load_images, load_network
    from unbraid.pipeline import run as run_pipeline
    from unbraid.settings import Loading, Thresholds

    say("A small network trained on Fashion-MNIST, and a sample of its images.")
    result = run_pipeline(
        load_network(),
        LAYER,
        load_images("train"),
        load_images("test"),
        out,
        thresholds=Thresholds(),
        loading=Loading(batch_size=250),
        source={"demo": True},
        say=say,
        title="Demo: a small network on Fashion-MNIST",
        features=features,
    )
    show_run(result)


def run(
    *,
    model: Model,
    layer: Layers,
    data: Annotated[
        str,
        Parameter(
            help="Folder with train and val, each a folder of images, in class folders or not, a "
            "list (train.csv, train.parquet) or a shard (train.tar); or hf:FOLDER, saved likewise."
        ),
    ],
    out: Out,
    weights: Weights = None,
    output: Output = None,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    concepts: Concepts = "classes",
    labels: Labels = "given",
    rho: Rho = None,
    encoder: EncoderName = None,
    features: Features = True,
    overwrite: Overwrite = False,
    batch_size: BatchSize = None,
    workers: Workers = 0,
    skip_broken: SkipBroken = False,
    device: Device = None,
    names: Names = None,
) -> None:
    """Do everything: scan, find, split, check the outputs, evaluate and report.

    Several layers are scanned in one pass, and each has its results in a folder of its name.
    Started again, it goes on where it stopped. With other settings, such as thresholds, its results
    go into OUT/settings-2 and so on, beside those that are there; scans are shared.
    """
    from unbraid.errors import UsageError
    from unbraid.images import images_like, labelled
    from unbraid.run_layers import run_layers
    from unbraid.settings import Loading, Thresholds
    from unbraid.sources import absolute, part_of
    from unbraid.team import n_ranks

    if n_ranks() > 1:
        raise UsageError(
            "Several processes can share a scan only; use torchrun with `unbraid scan` into "
            "OUT/scan-train and OUT/scan-val, then start `unbraid run` alone, which goes on there."
        )
    loaded = load(model, weights, device, output, names)
    say(f"Network {model}, layer {', '.join(layer)}.")
    train = open_images(loaded, part_of(data, "train"))
    source = {**loaded.source, "data": absolute(data), "class_folders": labelled(train)}
    done = run_layers(
        loaded.model,
        layer,
        train,
        images_like(train, part_of(data, "val")),
        out,
        thresholds=Thresholds(tau, p, gamma, rho, concepts),
        loading=Loading(batch_size, workers, skip_broken),
        source=source,
        say=say,
        title=model,
        encoder=encoder,
        labels=labels if labelled(train) else "predicted",
        features=features,
        overwrite=overwrite,
    )
    show_runs(done)


def report(run: Annotated[Path, Parameter(help="Folder of a finished run.")]) -> None:
    """Write a run's report again, for instance after an update of unbraid."""
    from unbraid.again import report_again

    out_console.print(f"Report: {report_again(run)}")


def check(
    run: Annotated[Path, Parameter(help="Folder of a run or of a scan.")],
) -> int:
    """List what a folder holds, and set damaged files aside so that they are made anew.

    Checksums and records of scans and splits are verified, the form of tables, figures and
    visualisations, and of the report that it is there; what cannot be read is told and left.
    Exit code 0 if everything is whole, else 1.
    """
    from unbraid.check import check as check_folder

    found = check_folder(run)
    for line in found.holds:
        out_console.print(one_line(line))
    out_console.print(str(found))
    return 0 if found.whole else 1


def reproduce(
    *,
    imagenet: Annotated[Path, Parameter(help="ImageNet folder with train/ of class folders.")],
    out: Out,
    weights: Weights = "IMAGENET1K_V1",
    batch_size: BatchSize = None,
    workers: Workers = 0,
    device: Device = None,
    names: Names = None,
) -> int:
    """Run the published ResNet-50 setting and compare with the published list, pair by pair.

    Exit code 0 if every pair is there with its cosine and no other is, else 1.
    """
    import unbraid
    from unbraid.reproduce import LAYER, MODEL, match_pairs, published_pairs
    from unbraid.run_folders import holds_results

    loaded = load(MODEL, weights, device, names=names)
    made = unbraid.scan(
        loaded.model,
        LAYER,
        open_images(loaded, str(imagenet / "train")),
        out / "scan-train",
        batch_size=batch_size,
        workers=workers,
        progress=True,
    )
    found = unbraid.find(made, tau=0.03, p=0.75, gamma=0.5)
    # Those of a run in the same folder, with thresholds of its own, stay.
    table = "reproduced.csv" if holds_results(out) else "findings.csv"
    found.to_csv(out / table)
    matches = match_pairs(found.pairs, published_pairs())
    rows: list[tuple[str, ...]] = [("channel", "class 1", "class 2", "published", "found", "")]
    for match in matches:
        cosines = ["-" if c is None else f"{c:.4f}" for c in (match.published, match.found)]
        verdict = "agrees" if match.agrees else "differs"
        rows.append((*map(str, match.key), *cosines, verdict))
    out_console.print(align(rows))
    n_agree = sum(match.agrees for match in matches)
    out_console.print(f"{n_agree} of {len(matches)} pairs agree.")
    return 0 if n_agree == len(matches) else 1
