"""The command line: each command is the thin twin of a function.

torch is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

from unbraid.errors import UnbraidError

if TYPE_CHECKING:
    from unbraid.data import ImageFolder
    from unbraid.models import LoadedModel
    from unbraid.pipeline import Run

app = App(
    name="unbraid",
    help="Find the polysemantic channels of a vision network and split each into one per concept.",
    help_format="markdown",
)
_out = Console()
_err = Console(stderr=True)

Tau = Annotated[float, Parameter(help="Smallest share of a class's relevance that matters.")]
P = Annotated[float, Parameter(help="Fraction of a class's images in which a channel matters.")]
Gamma = Annotated[float, Parameter(help="Cosine below which two classes have different reasons.")]
Rho = Annotated[float | None, Parameter(help="Fix rho instead of choosing it per channel.")]
Model = Annotated[
    str, Parameter(help="torchvision:NAME, timm:NAME or FILE.py:FUNCTION (it returns the network).")
]
Weights = Annotated[
    str | None,
    Parameter(help="A safetensors or torch file, a torchvision weights name, or 'random'."),
]
Layer = Annotated[str, Parameter(help="Name of the layer, as `unbraid layers` lists them.")]
Device = Annotated[str | None, Parameter(help="Such as cpu or cuda:0; an accelerator if there.")]
BatchSize = Annotated[int, Parameter(help="Images per forward pass.")]
Workers = Annotated[int, Parameter(help="Processes that load images.")]
SkipBroken = Annotated[
    bool, Parameter(help="Leave out images that cannot be read, and list them.", negative="")
]
Out = Annotated[Path, Parameter(help="Where to write.")]
ScanPath = Annotated[Path, Parameter(help="Folder of a finished scan.")]


def main() -> None:
    """Run the command line: exit code 2 for a wrong call, 1 for a failure, no traceback."""
    try:
        code = app(exit_on_error=False, print_error=True, result_action="return_value")
    except CycloptsError:
        sys.exit(2)
    except UnbraidError as error:
        _err.print(f"unbraid: {error}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _err.print("\nStopped; start the same command again and it goes on where it was.")
        sys.exit(130)
    sys.exit(code or 0)


@app.command
def demo(*, out: Out) -> None:
    """Split a small network on Fashion-MNIST, offline, in under a minute.

    Everything comes with the package: the network, trained on all of Fashion-MNIST, and a sample
    of its images.
    """
    from unbraid.demo.network import LAYER, load_images, load_network
    from unbraid.pipeline import Loading, Thresholds
    from unbraid.pipeline import run as run_pipeline

    _say("A small network trained on Fashion-MNIST, and a sample of its images.")
    result = run_pipeline(
        load_network(),
        LAYER,
        load_images("train"),
        load_images("test"),
        out,
        thresholds=Thresholds(),
        loading=Loading(batch_size=250),
        source={"demo": True},
        say=_say,
        title="Demo: a small network on Fashion-MNIST",
    )
    _show_run(result)


@app.command
def run(
    *,
    model: Model,
    layer: Layer,
    data: Annotated[Path, Parameter(help="Folder with train/ and val/ of class folders.")],
    out: Out,
    weights: Weights = None,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    rho: Rho = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    skip_broken: SkipBroken = False,
    device: Device = None,
) -> None:
    """Do everything: scan, find, split, check the outputs, evaluate and report.

    Started again, it goes on where it stopped; with other thresholds it does not scan again what
    it has.
    """
    from unbraid.pipeline import Loading, Thresholds
    from unbraid.pipeline import run as run_pipeline

    loaded = _load(model, weights, device)
    _say(f"Network {model}, layer {layer}.")
    result = run_pipeline(
        loaded.model,
        layer,
        _folder(loaded, data / "train"),
        _folder(loaded, data / "val"),
        out,
        thresholds=Thresholds(tau, p, gamma, rho),
        loading=Loading(batch_size, workers, skip_broken),
        source={**loaded.source, "data": str(data.resolve())},
        say=_say,
        title=f"{model} · {layer}",
    )
    _show_run(result)


@app.command
def layers(model: Model, *, weights: Weights = "random") -> None:
    """List the layers of a network that can be split."""
    from unbraid.layers import splittable_layers

    table = Table("layer", "kind", "in", "out", "kernel", "groups", box=None)
    for spec in splittable_layers(_load(model, weights, "cpu").model):
        kernel = "x".join(map(str, spec.kernel)) if not spec.channels_last else ""
        counts = (str(spec.n_in), str(spec.n_out), kernel, str(spec.groups))
        table.add_row(spec.name, spec.kind, *counts)
    _out.print(table)


@app.command
def scan(
    *,
    model: Model,
    layer: Layer,
    data: Annotated[Path, Parameter(help="Folder of class folders.")],
    out: Out,
    weights: Weights = None,
    positions: Annotated[
        bool, Parameter(help="Also keep the layer's input maps (large).", negative="")
    ] = False,
    classes: Annotated[
        list[int] | None, Parameter(help="Only images of these classes.", consume_multiple=True)
    ] = None,
    min_share: Annotated[float, Parameter(help="Smallest share kept.")] = 0.005,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    skip_broken: SkipBroken = False,
    device: Device = None,
) -> None:
    """Run a network over images once and keep a small record of each."""
    import unbraid

    loaded = _load(model, weights, device)
    folder = _folder(loaded, data)
    made = unbraid.scan(
        loaded.model,
        layer,
        folder,
        out,
        classes=classes,
        positions=positions,
        min_share=min_share,
        batch_size=batch_size,
        workers=workers,
        skip_broken=skip_broken,
        progress=True,
        source={**loaded.source, "data": str(data.resolve())},
    )
    _say_broken([folder.samples[index][0] for index in made.broken()])
    _out.print(f"Scanned {made.manifest.n_images} images into {out}", highlight=False)


@app.command
def find(
    scan: ScanPath,
    *,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    out: Annotated[Path | None, Parameter(help="CSV file to write.")] = None,
) -> None:
    """Find the polysemantic channels in a scan of training images."""
    import unbraid

    found = unbraid.find(unbraid.open_scan(scan), tau=tau, p=p, gamma=gamma)
    if out is not None:
        found.to_csv(out)
    _out.print(str(found), markup=False, highlight=False, soft_wrap=True)


@app.command
def split(
    scan: ScanPath,
    *,
    out: Out,
    tau: Tau = 0.03,
    p: P = 0.75,
    gamma: Gamma = 0.5,
    rho: Rho = None,
) -> None:
    """Find and split the polysemantic channels in a scan; choosing rho needs one with positions."""
    import unbraid

    opened = unbraid.open_scan(scan)
    found = unbraid.find(opened, tau=tau, p=p, gamma=gamma)
    divided = unbraid.split(opened, found, rho=rho)
    divided.save(out)
    _out.print(f"Split {len(divided.channels)} channels into {out}", highlight=False)


@app.command
def evaluate(
    split: Annotated[Path, Parameter(help="Split file.")],
    scan: Annotated[Path, Parameter(help="Folder of a scan of validation images.")],
    *,
    out: Annotated[Path | None, Parameter(help="JSON file to write.")] = None,
) -> None:
    """Measure how well a split's concept channels separate their concepts."""
    import unbraid

    result = unbraid.evaluate(unbraid.Split.load(split), unbraid.open_scan(scan))
    if out is not None:
        result.save(out)
    _out.print(str(result), markup=False, highlight=False, soft_wrap=True)


@app.command
def report(run: Annotated[Path, Parameter(help="Folder of a finished run.")]) -> None:
    """Write a run's report again, for instance after an update of unbraid."""
    from unbraid.pipeline import report_again

    _out.print(f"Report: {report_again(run)}", highlight=False, soft_wrap=True)


@app.command
def reproduce(
    *,
    imagenet: Annotated[Path, Parameter(help="ImageNet folder with train/ of class folders.")],
    out: Out,
    weights: Weights = "IMAGENET1K_V1",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = None,
) -> int:
    """Run the published ResNet-50 setting and compare with the published list, pair by pair.

    Exit code 0 if every pair is there with its cosine and no other is, else 1.
    """
    import unbraid
    from unbraid.reproduce import LAYER, MODEL, match_pairs, published_pairs

    loaded = _load(MODEL, weights, device)
    made = unbraid.scan(
        loaded.model,
        LAYER,
        _folder(loaded, imagenet / "train"),
        out / "scan-train",
        batch_size=batch_size,
        workers=workers,
        progress=True,
    )
    found = unbraid.find(made, tau=0.03, p=0.75, gamma=0.5)
    found.to_csv(out / "findings.csv")
    matches = match_pairs(found.pairs, published_pairs())
    table = Table("channel", "class 1", "class 2", "published", "found", "", box=None)
    for match in matches:
        cosines = ["-" if c is None else f"{c:.4f}" for c in (match.published, match.found)]
        table.add_row(*map(str, match.key), *cosines, "agrees" if match.agrees else "differs")
    _out.print(table)
    n_agree = sum(match.agrees for match in matches)
    _out.print(f"{n_agree} of {len(matches)} pairs agree.", highlight=False)
    return 0 if n_agree == len(matches) else 1


def _load(model: str, weights: str | None, device: str | None) -> LoadedModel:
    from unbraid.models import load_model

    return load_model(model, weights, device)


def _folder(loaded: LoadedModel, root: Path) -> ImageFolder:
    """Open a folder of class folders with a network's preprocessing and labels."""
    from unbraid.models import open_folder

    folder, warning = open_folder(loaded, root)
    if warning:
        _err.print(f"Note: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    return folder


def _say(text: str) -> None:
    _err.print(text, markup=False, highlight=False)


def _say_broken(names: list[str]) -> None:
    if names:
        _say(f"Left out {len(names)} images that could not be read:")
    for name in names:
        _say(f"  {name}")


def _show_run(result: Run) -> None:
    """End a run: a short table and where the report is."""
    _say_broken(result.broken)
    _out.print(str(result.found), markup=False, highlight=False, soft_wrap=True)
    if result.evaluation is not None:
        _out.print()
        _out.print(str(result.evaluation), markup=False, highlight=False, soft_wrap=True)
        output = result.evaluation.output
        assert output is not None
        _out.print(
            f"\nLargest logit difference {output.max_abs_logit_diff:g}; accuracy "
            f"{output.top1_before:.2%} before, {output.top1_after:.2%} after.",
            highlight=False,
        )
    _out.print(f"Report: {result.report}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
