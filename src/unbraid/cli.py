"""The command line: each command is the thin twin of a function.

torch is imported inside the commands, so that help is instant.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unbraid.images.open import Images
    from unbraid.networks.models import LoadedModel


from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from unbraid.base.tables import count, one_line

if TYPE_CHECKING:
    from unbraid.measuring.compare import OutputComparison
    from unbraid.running.run import LayerRuns, Run


import io
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise

from cyclopts import App, CycloptsError

from unbraid.base.errors import UnbraidError
from unbraid.base.tables import align

# Networks and images as the command line names them.


def load(
    model: str,
    weights: str | None,
    device: str | None,
    output: str | None = None,
    names: Path | None = None,
) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out; read names of classes."""
    from unbraid.networks.class_names import Names, read_names
    from unbraid.networks.models import load_model
    from unbraid.networks.outputs import with_logits

    given = Names() if names is None else read_names(names)
    loaded = replace(load_model(model, weights, device), names=given)
    if loaded.note:
        err_console.print(f"Note: {loaded.note}", style="yellow")
    if output is None:
        return loaded
    is_number = re.fullmatch(r"[+-]?\d+", output, re.ASCII)
    picked = with_logits(loaded.model, int(output) if is_number else output)
    return replace(loaded, model=picked, source={**loaded.source, "output": output})


def open_images(loaded: LoadedModel, source: str) -> Images:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images.open import images_for

    images, note = images_for(loaded, source)
    if note:
        err_console.print(f"Note: {note}", style="yellow")
    return images


# The options that commands share, with their help.


Tau = Annotated[
    float | Literal["auto"],
    Parameter(help="Smallest share of an image's relevance that matters; auto: fit to the layer."),
]
P = Annotated[float, Parameter(help="Fraction of a class's images in which a channel matters.")]
Gamma = Annotated[float, Parameter(help="Cosine below which two classes have different reasons.")]
Concepts = Annotated[
    Literal["classes", "clusters"],
    Parameter(help="What concepts are made of; clusters of images need no labels."),
]
Labels = Annotated[
    Literal["given", "predicted"],
    Parameter(help="What each image counts as: its folder's class, or what the network says."),
]
Rho = Annotated[
    float | None, Parameter(help="Fix the published rule's rho instead of choosing it per channel.")
]
Method = Annotated[
    Literal["least_squares", "published"], Parameter(help="How to divide the weights.")
]
Model = Annotated[
    str,
    Parameter(
        help="torchvision:NAME, timm:NAME or FILE.py:FUNCTION, which returns the network, "
        "(network, preprocessing) or (network, preprocessing, output names); without "
        "preprocessing ImageNet's usual one is assumed."
    ),
]
Weights = Annotated[
    str | None,
    Parameter(help="A safetensors or torch file, a torchvision weights name, or 'random'."),
]
Output = Annotated[
    str | None,
    Parameter(help="Key or index of the logits, if the network puts out more (-1: last)."),
]
Layers = Annotated[
    list[str],
    Parameter(
        help="Name of a layer, as `unbraid layers` lists them, or a pattern such as 'layer4.*'; "
        "may be given more than once.",
        negative="",
    ),
]
EncoderName = Annotated[
    str | None,
    Parameter(help="timm:NAME, to tell how alike images are; by default the network itself."),
]
Device = Annotated[str | None, Parameter(help="Such as cpu or cuda:0; an accelerator if there.")]
BatchSize = Annotated[
    int | None, Parameter(help="Images per forward pass; by default what memory surely holds.")
]
Workers = Annotated[int, Parameter(help="Processes that load images.")]
Autocast = Annotated[
    bool, Parameter(help="Run the network in bfloat16 where torch sees fit.", negative="")
]
ChannelsLast = Annotated[
    bool, Parameter(help="Keep convolutions channels last: faster on most devices.", negative="")
]
Compiled = Annotated[
    bool, Parameter(help="Let torch compile the network: faster once it has.", negative="")
]
Threads = Annotated[
    int | None, Parameter(help="Threads to compute with; the same number gives the same bits.")
]
SkipBroken = Annotated[
    bool, Parameter(help="Leave out images that cannot be read, and list them.", negative="")
]
Features = Annotated[
    bool, Parameter(help="Make images that excite each split channel and concept channel.")
]
Overwrite = Annotated[
    bool,
    Parameter(
        help="Put the results, once finished, in the place of a run with other settings in OUT.",
        negative="",
    ),
]
Data = Annotated[
    str,
    Parameter(
        help="Folder of images, in class folders or not; list of them (CSV, Parquet); shards "
        "(FILE.tar, a folder of such, train-{000..012}.tar, a URL); hf:FOLDER."
    ),
]
Names = Annotated[
    Path | None,
    Parameter(
        help="File of names for classes: CSV (folder, WordNet id or output's number; name), JSON, "
        "or a line for each output."
    ),
]
Out = Annotated[Path, Parameter(help="Where to write.")]
ScanPath = Annotated[Path, Parameter(help="Folder of a finished scan.")]


# What the command line says: results on standard output, all else on standard error.


out_console = Console(highlight=False, soft_wrap=True, markup=False)
err_console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def say(text: str) -> None:
    """Tell of a step."""
    err_console.print(text)


def say_broken(names: list[str]) -> None:
    """Count and list images that were left out."""
    if names:
        say(f"Left out {count(len(names), 'image')} that could not be read:")
    for name in names:
        say(f"  {one_line(name)}")


def show_run(result: Run) -> None:
    """End a run: a short table and where the report is."""
    say_broken(result.broken)
    out_console.print(str(result.found))
    if result.evaluation is not None:
        out_console.print()
        out_console.print(str(result.evaluation))
        out_console.print()
        for method, errors in result.evaluation.summary.items():
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value:.3f}"
                for name, value in errors.items()
                if value is not None
            )
            out_console.print(f"{method.replace('_', ' ')}: mean {figures}")
        assert result.evaluation.output is not None
        _show_comparison("Largest logit difference", result.evaluation.output)
    out_console.print(f"Report: {result.page}")


def show_runs(done: LayerRuns) -> None:
    """End a run over one or several layers."""
    for name, result in done.runs.items():
        if len(done.runs) > 1:
            out_console.print(f"\n{name}")
        show_run(result)
    if done.output is not None:
        out_console.print()
        _show_comparison("With all layers split, largest logit difference", done.output)


def _show_comparison(words: str, output: OutputComparison) -> None:
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        text += f"; accuracy {output.top1_before:.2%} before, {output.top1_after:.2%} after"
    out_console.print(f"{text}.")


# The command that draws figures for papers.


def figure(
    run: Annotated[Path, Parameter(help="Folder of a finished run.")],
    *,
    channel: Annotated[int, Parameter(help="A channel that the run split.")],
    out: Annotated[Path, Parameter(help="File to write or replace: .pdf, .png or .svg.")],
    kind: Annotated[
        Literal["teaser", "densities", "sources"],
        Parameter(help="Pictures and densities, densities alone, or what feeds the concepts."),
    ] = "teaser",
) -> None:
    """Draw one channel of a finished run as a figure for a paper."""
    from unbraid.reporting.figures import check_suffix, save_figure
    from unbraid.running.folders import refuse_result
    from unbraid.running.run import Run

    check_suffix(out)
    refuse_result(out)
    save_figure(Run(run).figure(channel, kind), out)
    out_console.print(f"Figure: {out}")


# Commands that do one step.


def layers(model: Model, *, weights: Weights = "random", output: Output = None) -> None:
    """List the layers of a network that can be split.

    The network runs on one blank picture, which tells the layers that reach its logits.
    """
    from PIL import Image

    from unbraid.scanning.scan import usable_layers

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
    from unbraid.images.dataset import name_of
    from unbraid.images.open import absolute, labelled
    from unbraid.scanning.team import is_first

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
    from unbraid.running.folders import refuse_result
    from unbraid.scanning.accuracy import describe_fit, scanned_accuracy

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
    from unbraid.running.folders import refuse_result

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
    from unbraid.running.folders import refuse_result

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
    from unbraid.running.folders import refuse_result

    refuse_result(out)
    result = unbraid.evaluate(unbraid.Split.load(split), unbraid.open_scan(scan))
    if out is not None:
        result.save(out)
    out_console.print(str(result))


# Commands that do a whole job.


def demo(*, out: Out, features: Features = True) -> None:
    """Split a small network on Fashion-MNIST, offline, in under a minute.

    Everything comes with the package: the network, trained on all of Fashion-MNIST, and a sample
    of its images.
    """
    from unbraid.demo.network import LAYER, load_images, load_network
    from unbraid.running.folders import Loading, Thresholds
    from unbraid.running.run import run as run_pipeline

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
    from unbraid.base.errors import UsageError
    from unbraid.images.open import absolute, images_like, labelled, part_of
    from unbraid.running.folders import Loading, Thresholds
    from unbraid.running.run import run_layers
    from unbraid.scanning.team import n_ranks

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
    from unbraid.running.run import Run

    out_console.print(f"Report: {Run(run).report()}")


def check(
    run: Annotated[Path, Parameter(help="Folder of a run or of a scan.")],
) -> int:
    """List what a folder holds, and set damaged files aside so that they are made anew.

    Checksums and records of scans and splits are verified, the form of tables, figures and
    visualisations, and of the report that it is there; what cannot be read is told and left.
    Exit code 0 if everything is whole, else 1.
    """
    from unbraid.running.check import check as check_folder

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
    from unbraid.running.folders import holds_results
    from unbraid.running.reproduce import LAYER, MODEL, match_pairs, published_pairs

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


# The command line: each command is the thin twin of a function.


app = App(
    name="unbraid",
    help="Find the polysemantic channels of a vision network and split each into one per concept.",
    help_format="markdown",
    suppress_keyboard_interrupt=False,
)
_COMMANDS: tuple[Callable[..., int | None], ...] = (
    demo,
    run,
    layers,
    scan,
    find,
    sensitivity,
    split,
    evaluate,
    report,
    figure,
    check,
    reproduce,
)
for place, command in enumerate(_COMMANDS):
    app.command(command, sort_key=place)


class Terminated(KeyboardInterrupt):
    """Asked to end by SIGTERM, which ends as cleanly as ctrl-C."""


def _terminate(_signal: int, _frame: object) -> None:
    raise Terminated


def _empty(arguments: Sequence[str]) -> str | None:
    """Name what has no value, which as a path would be the folder at hand; None if all have one."""
    for before, given in pairwise(arguments):
        if not given:
            return before
        if given.startswith("--") and given.endswith("="):
            return given[:-1]
    return None


def _notes() -> Callable[..., None]:
    """Show what the library warns of, each thing once, without the line of code it came from."""
    shown: set[str] = set()

    def show(message: Warning | str, *_about: object, **_more: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            err_console.print(f"Note: {message}", style="yellow")

    return show


def main() -> None:
    """Run the command line: exit code 2 for a wrong call, 1 for a failure, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of any script, on a terminal of any kind
            stream.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, _terminate)
    warnings.showwarning = _notes()
    empty = _empty(sys.argv)
    if empty is not None:
        text = f"unbraid: {empty} is empty, perhaps a variable without a value; give it one."
        err_console.print(text, style="bold red")
        sys.exit(2)
    try:
        code = app(
            sys.argv[1:], exit_on_error=False, print_error=True, result_action="return_value"
        )
    except CycloptsError:
        sys.exit(2)
    except UnbraidError as error:
        err_console.print(f"unbraid: {error}", style="bold red")
        sys.exit(error.exit_code)
    except OSError as error:  # a path that may not be read, is too long, and so on
        err_console.print(f"unbraid: {error}; name another path.", style="bold red")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        err_console.print("\nStopped; start the same command again and it goes on where it was.")
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    sys.exit(code or 0)
