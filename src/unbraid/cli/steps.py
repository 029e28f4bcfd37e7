"""Commands that do one step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from unbraid.cli.inputs import load, open_images
from unbraid.cli.options import (
    Autocast,
    BatchSize,
    ChannelsLast,
    Compiled,
    Concepts,
    Data,
    Device,
    Gamma,
    Labels,
    Layers,
    Method,
    Model,
    Names,
    Out,
    Output,
    P,
    Rho,
    ScanPath,
    SkipBroken,
    Tau,
    Threads,
    Weights,
    Workers,
)
from unbraid.cli.output import out_console, say, say_broken
from unbraid.tables import align, count


def layers(model: Model, *, weights: Weights = "random", output: Output = None) -> None:
    """List the layers of a network that can be split.

    The network runs on one blank picture, which tells the layers that reach its logits.
    """
    from PIL import Image

    from unbraid.usable import usable_layers

    rows = [("layer", "kind", "in", "out", "kernel", "groups")]
    loaded = load(model, weights, "cpu", output)
    blank = loaded.transform(Image.new("RGB", (256, 256)))
    for spec in usable_layers(loaded.model, blank[None]):
        kernel = "" if spec.channels_last else "x".join(map(str, spec.kernel))
        counts = (str(spec.n_in), str(spec.n_out), kernel, str(spec.groups))
        rows.append((spec.name, spec.kind, *counts))
    out_console.print(align(rows))


def scan(
    *,
    model: Model,
    layer: Layers,
    data: Data,
    out: Out,
    weights: Weights = None,
    output: Output = None,
    labels: Labels = "given",
    positions: Annotated[
        bool, Parameter(help="Also keep the layer's input maps (large).", negative="")
    ] = False,
    classes: Annotated[
        list[int] | None, Parameter(help="Only images of these classes.", consume_multiple=True)
    ] = None,
    min_share: Annotated[float, Parameter(help="Smallest share kept.")] = 0.005,
    batch_size: BatchSize = None,
    workers: Workers = 0,
    skip_broken: SkipBroken = False,
    threads: Threads = None,
    autocast: Autocast = False,
    channels_last: ChannelsLast = False,
    compiled: Compiled = False,
    device: Device = None,
    names: Names = None,
) -> None:
    """Run a network over images once and keep a small record of each.

    Several layers are scanned in one pass, each into a folder of its name. Started by torchrun,
    all its processes share the work: `torchrun --nproc-per-node 8 -m unbraid scan ...`.
    """
    import unbraid
    from unbraid.data import name_of
    from unbraid.images import labelled
    from unbraid.sources import absolute
    from unbraid.team import is_first

    loaded = load(model, weights, device, output, names)
    folder = open_images(loaded, data)
    made = unbraid.scan(
        loaded.model,
        layer[0] if len(layer) == 1 else layer,
        folder,
        out,
        labels=labels if labelled(folder) else "predicted",
        classes=classes,
        positions=positions,
        min_share=min_share,
        batch_size=batch_size,
        workers=workers,
        skip_broken=skip_broken,
        progress=True,
        source={**loaded.source, "data": absolute(data)},
        threads=threads,
        autocast=autocast,
        channels_last=channels_last,
        compiled=compiled,
    )
    if not is_first():
        return
    one = made if isinstance(made, unbraid.Scan) else next(iter(made.values()))
    say_broken([name_of(folder, index) for index in one.broken()])
    n_scanned = one.manifest.n_images - len(one.broken())
    out_console.print(f"Scanned {count(n_scanned, 'image')} into {out}")


def find(
    scan: ScanPath,
    *,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    concepts: Concepts = "classes",
    out: Annotated[Path | None, Parameter(help="CSV file to write or replace.")] = None,
) -> None:
    """Find the polysemantic channels in a scan of training images."""
    import unbraid
    from unbraid.before_scan import describe_fit, scanned_accuracy
    from unbraid.run_folders import refuse_result

    refuse_result(out)
    opened = unbraid.open_scan(scan)
    accuracy = scanned_accuracy(opened)
    if accuracy is not None:
        say(describe_fit(accuracy, opened.manifest.preprocessing))
    found = unbraid.find(opened, tau=tau, p=p, gamma=gamma, concepts=concepts)
    if out is not None:
        found.to_csv(out)
    out_console.print(str(found))


def sensitivity(
    scan: ScanPath,
    *,
    taus: Annotated[
        list[float] | None, Parameter(help="Smallest shares.", consume_multiple=True)
    ] = None,
    ps: Annotated[
        list[float] | None, Parameter(help="Fractions of images.", consume_multiple=True)
    ] = None,
    gammas: Annotated[list[float] | None, Parameter(help="Cosines.", consume_multiple=True)] = None,
    out: Annotated[Path | None, Parameter(help="CSV file to write or replace.")] = None,
) -> None:
    """Count the polysemantic channels for every combination of thresholds, in seconds."""
    import unbraid
    from unbraid.run_folders import refuse_result

    refuse_result(out)
    counted = unbraid.sensitivity(unbraid.open_scan(scan), taus, ps, gammas)
    if out is not None:
        counted.to_csv(out)
    out_console.print(str(counted))


def split(
    scan: ScanPath,
    *,
    out: Out,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    concepts: Concepts = "classes",
    method: Method = "least_squares",
    rho: Rho = None,
) -> None:
    """Find and split the polysemantic channels in a scan, best one with positions."""
    import unbraid
    from unbraid.run_folders import refuse_result

    refuse_result(out)
    opened = unbraid.open_scan(scan)
    found = unbraid.find(opened, tau=tau, p=p, gamma=gamma, concepts=concepts)
    divided = unbraid.split(opened, found, method=method, rho=rho)
    divided.save(out)
    out_console.print(f"Split {len(divided.channels)} channels into {out}")


def evaluate(
    split: Annotated[Path, Parameter(help="Split file.")],
    scan: Annotated[Path, Parameter(help="Folder of a scan of validation images.")],
    *,
    out: Annotated[Path | None, Parameter(help="JSON file to write or replace.")] = None,
) -> None:
    """Measure how well a split's concept channels separate their concepts."""
    import unbraid
    from unbraid.run_folders import refuse_result

    refuse_result(out)
    result = unbraid.evaluate(unbraid.Split.load(split), unbraid.open_scan(scan))
    if out is not None:
        result.save(out)
    out_console.print(str(result))
