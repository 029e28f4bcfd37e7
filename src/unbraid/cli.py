"""Commands, thin twins of functions; what needs torch is imported inside, so help is instant."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter
from rich.console import Console

import unbraid
from unbraid.base.errors import UsageError
from unbraid.base.tables import Table, Tabular, align, count, one_line
from unbraid.finding.find_options import Finding
from unbraid.scanning.scan_options import Labels, Loading, ScanOptions, in_command_words

if TYPE_CHECKING:
    from unbraid.images.listing import ListedImages
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
_BFLOAT16 = (
    "This processor has bfloat16: with --autocast, into a folder of its own, the scan is faster; "
    "compare what is found on some classes before you rely on it."
)
_FEATURES = "Make images that excite each split channel and concept channel."
Layers = Annotated[list[str], Parameter(help=_LAYERS, negative="")]
Features = Annotated[bool, Parameter(help=_FEATURES, negative="--no-features")]
Model = Annotated[str, Parameter(help=_MODEL)]
Weights = Annotated[str | None, Parameter(help=_WEIGHTS)]
Output = Annotated[str | None, Parameter(help=_OUTPUT)]
Device = Annotated[str | None, Parameter(help="Such as cpu or cuda:0; an accelerator if there.")]
Names = Annotated[Path | None, Parameter(help=_NAMES)]
Out = Annotated[Path, Parameter(help="Where to write.")]
CsvFile = Annotated[Path | None, Parameter(help="CSV file to write or replace.")]
_SCANS = "Folder of a finished scan; several, or a pattern such as 'scan-*', are read as one."
ScanPaths = Annotated[list[Path], Parameter(help=_SCANS, negative="")]
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


def load(network: Network) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out; read names of classes."""
    from unbraid.networks.class_names import read_names
    from unbraid.networks.models import load_model
    from unbraid.networks.outputs import with_logits

    unbraid.keep_memory()
    loaded = load_model(network.model, network.weights, network.device)
    if network.names is not None:
        loaded = replace(loaded, names=read_names(network.names))
    note(loaded.note)
    if network.output is not None:
        picked = with_logits(loaded.model, network.output)
        loaded = replace(loaded, model=picked, source={**loaded.source, "output": network.output})
    return loaded


def open_images(loaded: LoadedModel, source: str, listed: Path | None = None) -> ListedImages:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images.open import images_for

    images, assumed = images_for(loaded, source, listed)
    note(assumed)
    return images


def source_of(loaded: LoadedModel, images: ListedImages, source: str) -> dict[str, Any]:
    """How to find network and images again, and how the images were divided if they were."""
    from unbraid.images.open import absolute

    divided = {"divided": images.divided} if images.divided else {}
    return {**loaded.source, "data": absolute(source), **divided}


def show_table(result: Tabular | Table) -> None:
    """Print a result, on a terminal as wide as that is."""
    table = result.table() if isinstance(result, Tabular) else result
    width = get_terminal_size().columns if sys.stdout.isatty() else None
    show(in_command_words(table.fitted(width) if width else str(table)))


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
    from unbraid.running.told import told

    show_broken(result.broken)
    for part in told(result):
        if isinstance(part, str):
            show(part)
        else:
            show_table(part)


def show_runs(done: LayerRuns) -> None:
    """End a run over one layer or several; of all layers, only how they compare."""
    from unbraid.running.told import compared

    show_broken(list(done.broken))
    for name, result in () if done.searched else done.runs.items():
        if len(done.runs) > 1:
            show(f"\n{name}")
        show_run(result)
    if done.output is not None:
        show(f"\n{compared('With all layers split, largest logit difference', done.output)}")
    if done.layers is not None:
        show()
        show_table(done.layers)
        show(f"Report: {done.index}")


def demo(*, out: Out, layer: Layers | None = None, features: Features = True) -> None:
    """Split a small network on Fashion-MNIST, offline; all comes with the package."""
    from unbraid.demo.network import LAYER, load_images, load_network
    from unbraid.running.folders import Thresholds
    from unbraid.running.several import run_layers

    unbraid.keep_memory()
    say("A small network trained on Fashion-MNIST, and a sample of its images.")
    done = run_layers(
        load_network(),
        layer or [LAYER],
        load_images("train"),
        load_images("test"),
        out,
        # Without a layer those of the docs, and of the published runs.
        thresholds=Thresholds() if layer else Thresholds(tau=0.03),
        loading=Loading(batch_size=250),
        source={"demo": True},
        say=say,
        title="Demo: a small network on Fashion-MNIST",
        everything=True,  # it is quick
        features=features,
    )
    show_runs(done)


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
    everything: Annotated[bool, Parameter("--all")] = False,
    features: Features = True,
    overwrite: bool = False,
    quick: Annotated[bool | None, Parameter(negative="--no-quick")] = None,
    loading: Loading = Loading(),
) -> None:
    """Do everything: scan, find, split, check the outputs, evaluate and report.

    Several layers are scanned in one pass, and each has its results in a folder of its name.
    Started again, it goes on where it stopped. With other settings, its results go into
    OUT/settings-2 and so on, beside those that are there; scans are shared.

    Args:
        data: Folder with train and val, each a folder of images, in class folders or not, a list
            (train.csv, train.parquet) or a shard (train.tar); or hf:FOLDER, saved likewise. Any
            other images, as for `unbraid scan`, are divided, a fifth for validation.
        labels: What each image counts as: its folder's class, or what the network says.
        rho: Fix the published rule's rho instead of choosing it per channel.
        encoder: timm:NAME, to tell how alike images are; by default the network itself.
        everything: Measure on all images, and all channels, instead of a sample (docs/scale.md).
        overwrite: Put the results, once finished, in the place of a run with other settings in OUT.
        quick: Only a first look, at some thousand images, into OUT/quick; the same command without
            goes on from there. From 20,000 images on, a run begins with it, unless --no-quick.
    """
    from unbraid.base.team import n_ranks
    from unbraid.images.open import images_like, labelled, part_of
    from unbraid.running.first_look import run_in_turn
    from unbraid.running.folders import Thresholds

    if n_ranks() > 1:
        raise UsageError(
            "Several processes can share a scan only; use torchrun with `unbraid scan` into "
            "OUT/scan-train and OUT/scan-val, then start `unbraid run` alone, which goes on there."
        )
    loaded = load(network)
    say(f"Network {network.model}, layer {', '.join(layer)}.")
    train = open_images(loaded, part_of(data, "train"))
    asked = finding.asked(labelled=labelled(train) or labels == "predicted")
    if asked["concepts"] != (finding.concepts or "classes"):
        say("Concepts are clusters of images; --labels predicted makes them of predicted classes.")
    for done in run_in_turn(
        loaded.model,
        layer,
        train,
        images_like(train, part_of(data, "val")),
        out,
        quick=quick,
        command=shlex.join(
            ["unbraid", *(word for word in sys.argv[1:] if not word.startswith("--quick"))]
        ),
        thresholds=Thresholds(tau=tau, rho=rho, **asked),
        loading=loading,
        source=source_of(loaded, train, data) | {"class_folders": labelled(train)},
        say=say,
        title=network.model,
        encoder=encoder,
        labels=labels if labelled(train) else "predicted",
        everything=everything,
        features=features,
        overwrite=overwrite,
    ):
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
    from unbraid.base.team import is_first
    from unbraid.images.dataset import name_of
    from unbraid.images.kept import LISTED, tentative
    from unbraid.images.open import labelled
    from unbraid.networks.formats import faster_in_bfloat16
    from unbraid.scanning.accuracy import LONG

    loaded = load(network)
    with tentative(out / LISTED):
        images = open_images(loaded, data, out / LISTED)
        options = replace(
            options,
            labels=options.labels if labelled(images) else "predicted",
            progress=True,
            source=source_of(loaded, images, data),
        )
        suggested = not options.autocast and len(images) >= LONG and is_first()
        if suggested and faster_in_bfloat16(loaded.model):
            say(_BFLOAT16)
        asked = layer[0] if len(layer) == 1 else layer
        made = unbraid.scan(loaded.model, asked, images, out, **vars(options))
    if not is_first():
        return
    one = made if isinstance(made, unbraid.Scan) else next(iter(made.values()))
    broken = one.broken()
    show_broken([name_of(images, index) for index in broken])
    show(f"Scanned {count(one.manifest.n_images - len(broken), 'image')} into {out}")


def find(
    scan: ScanPaths, *, tau: Tau = 0.03, finding: Finding = Finding(), out: CsvFile = None
) -> None:
    """Find the polysemantic channels in a scan of training images."""
    from unbraid.scanning.accuracy import describe_fit, scanned_accuracy

    refuse_result(out)
    opened = unbraid.open_scan(scan)
    if (accuracy := scanned_accuracy(opened)) is not None:
        say(describe_fit(accuracy, opened.manifest.preprocessing))
    found = unbraid.find(opened, tau=tau, **finding.asked())
    if out is not None:
        found.to_csv(out)
    show_table(found)


def sensitivity(
    scan: ScanPaths, *, taus: Grid = None, ps: Grid = None, gammas: Grid = None, out: CsvFile = None
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
    scan: ScanPaths,
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
    found = unbraid.find(opened, tau=tau, **finding.asked())
    divided = unbraid.split(opened, found, method=method, rho=rho)
    divided.save(out)
    show(f"Split {len(divided.channels)} channels into {out}")


def evaluate(split: Path, scan: ScanPaths, *, out: Path | None = None) -> None:
    """Measure how well a split's concept channels separate their concepts.

    Args:
        split: Split file.
        out: JSON file to write or replace.
    """
    refuse_result(out)
    result = unbraid.evaluate(unbraid.Split.load(split), unbraid.open_scan(scan))
    if out is not None:
        result.save(out)
    show_table(result)


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
