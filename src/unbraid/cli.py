"""Commands, thin twins of functions; what needs torch is imported inside, so help is instant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.console import Console

import unbraid
from unbraid.base.errors import UsageError
from unbraid.base.tables import align, count, one_line
from unbraid.scanning.scan_options import Labels, Loading, ScanOptions

if TYPE_CHECKING:
    from unbraid.images.listing import ListedImages
    from unbraid.measuring.compare import OutputComparison
    from unbraid.networks.models import LoadedModel
    from unbraid.running.run import Run
    from unbraid.running.several import LayerRuns

# Results go to standard output, all else to standard error.
show, say = (
    Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False).print
    for stderr in (False, True)
)

# The options that commands share, with their help; that of others stands in docstrings.
_LAYERS = "A layer of `unbraid layers`, a pattern such as 'layer4.*', or all; may be repeated."
_MODEL = (
    "torchvision:NAME, timm:NAME or FILE.py:FUNCTION, which returns the network, (network, "
    "preprocessing) or (network, preprocessing, output names); without preprocessing ImageNet's "
    "usual one is assumed."
)
_WEIGHTS = "A safetensors or torch file, a torchvision weights name, or 'random'."
_OUTPUT = "Key or index of the logits, if the network puts out more (-1: last)."
_NAMES = "Names of classes: CSV (folder, WordNet id or output's number; name), JSON, or one a line."
_FEATURES = "Make images that excite each split channel and concept channel."
Layers = Annotated[list[str], Parameter(help=_LAYERS, negative="")]
Features = Annotated[bool, Parameter(help=_FEATURES, negative="--no-features")]
Model = Annotated[str, Parameter(help=_MODEL)]
Weights = Annotated[str | None, Parameter(help=_WEIGHTS)]
Output = Annotated[str | None, Parameter(help=_OUTPUT)]
Device = Annotated[str | None, Parameter(help="Such as cpu or cuda:0; an accelerator if there.")]
Names = Annotated[Path | None, Parameter(help=_NAMES)]
Out = Annotated[Path, Parameter(help="Where to write.")]
Table = Annotated[Path | None, Parameter(help="CSV file to write or replace.")]
ScanPath = Annotated[Path, Parameter(help="Folder of a finished scan.")]
RunPath = Annotated[Path, Parameter(help="Folder of a finished run.")]
FigureKind = Literal["teaser", "densities", "sources"]
Tau = Annotated[float | Literal["auto"], Parameter(help="Smallest share that matters, or auto.")]
Grid = Annotated[list[float] | None, Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as the command line names it."""

    model: Model
    weights: Weights = None
    output: Output = None
    device: Device = None
    names: Names = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Finding:
    """The arguments of `unbraid.find` but tau.

    Args:
        p: Fraction of a class's images in which a channel matters.
        gamma: Cosine below which two classes have different reasons.
        concepts: What concepts are made of; clusters of images need no labels; whole: classes, and
            clusters of what else excites a channel.
    """

    p: float = 0.75
    gamma: float = 0.5
    concepts: Literal["classes", "clusters", "whole"] = "classes"


def load(network: Network) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out; read names of classes."""
    from unbraid.networks.class_names import read_names
    from unbraid.networks.models import load_model
    from unbraid.networks.outputs import with_logits

    loaded = load_model(network.model, network.weights, network.device)
    if network.names is not None:
        loaded = replace(loaded, names=read_names(network.names))
    note(loaded.note)
    if network.output is not None:
        picked = with_logits(loaded.model, network.output)
        loaded = replace(loaded, model=picked, source={**loaded.source, "output": network.output})
    return loaded


def open_images(loaded: LoadedModel, source: str) -> ListedImages:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images.open import images_for

    images, assumed = images_for(loaded, source)
    note(assumed)
    return images


def refuse_result(file: Path | None) -> None:
    """Refuse to write a file that belongs to a run or scan."""
    from unbraid.running import folders

    folders.refuse_result(file)


def note(text: str) -> None:
    """Tell of something to know, if it is something."""
    if text:
        say(f"Note: {text}", style="yellow")


def show_broken(names: list[str]) -> None:
    """Count and list images that were left out."""
    if names:
        listed = "".join(f"\n  {one_line(name)}" for name in names)
        say(f"Left out {count(len(names), 'image')} that could not be read:{listed}")


def show_run(result: Run) -> None:
    """End a run: a short table and where the report is."""
    show_broken(result.broken)
    show(str(result.found))
    if result.evaluation is not None:
        show(f"\n{result.evaluation}\n")
        show(f"{result.evaluation.summary_table()}\n")
        assert result.evaluation.output is not None
        show_comparison("Largest logit difference", result.evaluation.output)
    show(f"Report: {result.page}")


def show_runs(done: LayerRuns) -> None:
    """End a run over one layer or several; of all layers, only how they compare."""
    show_broken(list(done.broken))
    for name, result in () if done.searched else done.runs.items():
        if len(done.runs) > 1:
            show(f"\n{name}")
        show_run(result)
    if done.output is not None:
        show()
        show_comparison("With all layers split, largest logit difference", done.output)
    if done.layers is not None:
        show(f"\n{done.layers}\nReport: {done.index}")


def show_comparison(words: str, output: OutputComparison) -> None:
    """Say how much splitting changed the outputs."""
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        text += f"; accuracy {output.top1_before:.2%} before, {output.top1_after:.2%} after"
    show(f"{text}.")


def demo(*, out: Out, layer: Layers | None = None, features: Features = True) -> None:
    """Split a small network on Fashion-MNIST, offline; all comes with the package."""
    from unbraid.running.demo import run_demo

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
    rho: float | None = None,
    encoder: str | None = None,
    features: Features = True,
    overwrite: bool = False,
    loading: Loading = Loading(),
) -> None:
    """Do everything: scan, find, split, check the outputs, evaluate and report.

    Several layers are scanned in one pass, and each has its results in a folder of its name.
    Started again, it goes on where it stopped. With other settings, its results go into
    OUT/settings-2 and so on, beside those that are there; scans are shared.

    Args:
        data: Folder with train and val, each a folder of images, in class folders or not, a list
            (train.csv, train.parquet) or a shard (train.tar); or hf:FOLDER, saved likewise.
        labels: What each image counts as: its folder's class, or what the network says.
        rho: Fix the published rule's rho instead of choosing it per channel.
        encoder: timm:NAME, to tell how alike images are; by default the network itself.
        overwrite: Put the results, once finished, in the place of a run with other settings in OUT.
    """
    from unbraid.images.open import absolute, images_like, labelled, part_of
    from unbraid.running.folders import Thresholds
    from unbraid.running.several import run_layers
    from unbraid.scanning.shards import n_ranks

    if n_ranks() > 1:
        raise UsageError(
            "Several processes can share a scan only; use torchrun with `unbraid scan` into "
            "OUT/scan-train and OUT/scan-val, then start `unbraid run` alone, which goes on there."
        )
    loaded = load(network)
    say(f"Network {network.model}, layer {', '.join(layer)}.")
    train = open_images(loaded, part_of(data, "train"))
    done = run_layers(
        loaded.model,
        layer,
        train,
        images_like(train, part_of(data, "val")),
        out,
        thresholds=Thresholds(tau=tau, rho=rho, **vars(finding)),
        loading=loading,
        source={**loaded.source, "data": absolute(data), "class_folders": labelled(train)},
        say=say,
        title=network.model,
        encoder=encoder,
        labels=labels if labelled(train) else "predicted",
        features=features,
        overwrite=overwrite,
    )
    show_runs(done)


def layers(model: Model, *, weights: Weights = "random", output: Output = None) -> None:
    """List the layers of a network that can be split.

    The network runs on one blank picture, which tells the layers that reach its logits.
    """
    from PIL import Image

    from unbraid.scanning.scan import usable_layers

    rows = [["layer", "kind", "in", "out", "kernel", "groups"]]
    loaded = load(Network(model=model, weights=weights, output=output, device="cpu"))
    blank = loaded.transform(Image.new("RGB", (256, 256)))
    for spec in usable_layers(loaded.model, blank[None]):
        kernel = "" if spec.channels_last else "x".join(map(str, spec.kernel))
        cells = (spec.name, spec.kind, spec.n_in, spec.n_out, kernel, spec.groups)
        rows.append(list(map(str, cells)))
    show(align(rows))


def scan(
    *, network: Network, layer: Layers, data: str, out: Out, options: ScanOptions = ScanOptions()
) -> None:
    """Run a network over images once and keep a small record of each.

    Several layers are scanned in one pass, each into a folder of its name. Started by torchrun,
    all its processes share the work: `torchrun --nproc-per-node 8 -m unbraid scan ...`.

    Args:
        data: Folder of images, in class folders or not; list of them (CSV, Parquet); shards
            (FILE.tar, a folder of such, train-{000..012}.tar, a URL); hf:FOLDER.
    """
    from unbraid.images.dataset import name_of
    from unbraid.images.open import absolute, labelled
    from unbraid.scanning.shards import is_first

    loaded = load(network)
    images = open_images(loaded, data)
    options = replace(
        options,
        labels=options.labels if labelled(images) else "predicted",
        progress=True,
        source={**loaded.source, "data": absolute(data)},
    )
    asked = layer[0] if len(layer) == 1 else layer
    made = unbraid.scan(loaded.model, asked, images, out, **vars(options))
    if not is_first():
        return
    one = made if isinstance(made, unbraid.Scan) else next(iter(made.values()))
    broken = one.broken()
    show_broken([name_of(images, index) for index in broken])
    show(f"Scanned {count(one.manifest.n_images - len(broken), 'image')} into {out}")


def find(
    scan: ScanPath, *, tau: Tau = 0.03, finding: Finding = Finding(), out: Table = None
) -> None:
    """Find the polysemantic channels in a scan of training images."""
    from unbraid.scanning.accuracy import describe_fit, scanned_accuracy

    refuse_result(out)
    opened = unbraid.open_scan(scan)
    if (accuracy := scanned_accuracy(opened)) is not None:
        say(describe_fit(accuracy, opened.manifest.preprocessing))
    found = unbraid.find(opened, tau=tau, **vars(finding))
    if out is not None:
        found.to_csv(out)
    show(str(found))


def sensitivity(
    scan: ScanPath, *, taus: Grid = None, ps: Grid = None, gammas: Grid = None, out: Table = None
) -> None:
    """Count the polysemantic channels for every combination of thresholds, in seconds.

    Args:
        taus: Smallest shares.
        ps: Fractions of images.
        gammas: Cosines.
    """
    refuse_result(out)
    counted = unbraid.sensitivity(unbraid.open_scan(scan), taus, ps, gammas)
    if out is not None:
        counted.to_csv(out)
    show(str(counted))


def split(
    scan: ScanPath,
    *,
    out: Out,
    tau: Tau = 0.03,
    finding: Finding = Finding(),
    method: Literal["least_squares", "published"] = "least_squares",
    rho: float | None = None,
) -> None:
    """Find and split the polysemantic channels in a scan, best one with positions.

    Args:
        method: How to divide the weights.
        rho: Fix the published rule's rho instead of choosing it per channel.
    """
    refuse_result(out)
    opened = unbraid.open_scan(scan)
    found = unbraid.find(opened, tau=tau, **vars(finding))
    divided = unbraid.split(opened, found, method=method, rho=rho)
    divided.save(out)
    show(f"Split {len(divided.channels)} channels into {out}")


def evaluate(split: Path, scan: Path, *, out: Path | None = None) -> None:
    """Measure how well a split's concept channels separate their concepts.

    Args:
        split: Split file.
        scan: Folder of a scan of validation images.
        out: JSON file to write or replace.
    """
    refuse_result(out)
    result = unbraid.evaluate(unbraid.Split.load(split), unbraid.open_scan(scan))
    if out is not None:
        result.save(out)
    show(str(result))


def report(run: RunPath) -> None:
    """Write a run's report again, for instance after an update of unbraid."""
    from unbraid.running.run import Run

    show(f"Report: {Run(run).report()}")


def figure(run: RunPath, *, channel: int, out: Path, kind: FigureKind = "teaser") -> None:
    """Draw one channel of a finished run as a figure for a paper.

    Args:
        channel: A channel that the run split.
        out: File to write or replace: .pdf, .png or .svg.
        kind: Pictures and densities, densities alone, or what feeds the concepts.
    """
    from unbraid.reporting.figures import check_suffix, save_figure
    from unbraid.running.run import Run

    check_suffix(out)
    refuse_result(out)
    save_figure(Run(run).figure(channel, kind), out)
    show(f"Figure: {out}")


def check(run: Path) -> int:
    """List what a folder holds, and set damaged files aside so that they are made anew.

    What cannot be read is told and left. Exit code 0 if everything is whole, else 1.

    Args:
        run: Folder of a run or of a scan.
    """
    from unbraid.running.check import check as check_folder

    found = check_folder(run)
    show("\n".join([*map(one_line, found.holds), str(found)]))
    return 0 if found.whole else 1


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

    Exit code 0 if every pair is there with its cosine and no other is, else 1.

    Args:
        imagenet: ImageNet folder with train/ of class folders.
        batch_size: Images per forward pass; by default what memory surely holds.
        workers: Processes that load images.
    """
    from unbraid.running import reproduce
    from unbraid.running.folders import holds_results

    loaded = load(Network(model=reproduce.MODEL, weights=weights, device=device, names=names))
    images = open_images(loaded, str(imagenet / "train"))
    loading = ScanOptions(batch_size=batch_size, workers=workers, progress=True)
    made = unbraid.scan(loaded.model, reproduce.LAYER, images, out / "scan-train", **vars(loading))
    found = unbraid.find(made, tau=0.03, p=0.75, gamma=0.5)
    # Those of a run in the same folder, with thresholds of its own, stay.
    table = "reproduced.csv" if holds_results(out) else "findings.csv"
    found.to_csv(out / table)
    matches = reproduce.match_pairs(found.pairs, reproduce.published_pairs())
    show(reproduce.show_matches(matches))
    return 0 if all(match.agrees for match in matches) else 1


app = App(
    name="unbraid",
    help="Find the polysemantic channels of a vision network and split each into one per concept.",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
    default_parameter=Parameter(negative_bool=()),
)
_COMMANDS: list[Callable[..., int | None]] = [demo, run, layers, scan, find, sensitivity, split]
_COMMANDS += [evaluate, report, figure, check, reproduce]
for n, command in enumerate(_COMMANDS):
    app.command(command, sort_key=n)
