"""What commands share: options with their help, how results are printed; no torch at import."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console

import unbraid
from unbraid.base.errors import UsageError
from unbraid.base.tables import Table, Tabular, count, one_line
from unbraid.scanning.scan_options import Labels, in_command_words

if TYPE_CHECKING:
    from unbraid.images.listing import ListedImages
    from unbraid.networks.models import LoadedModel
    from unbraid.running.finished import Run
    from unbraid.running.several import LayerRuns

# Results go to standard output, all else to standard error.
show, say = (
    Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False).print
    for stderr in (False, True)
)

# The options that commands share, with their help; that of others stands in docstrings.
_LAYERS = "A layer that `unbraid layers` lists, a pattern such as 'layer4.*', or all. Repeatable."
_MODEL = (
    "torchvision:NAME, timm:NAME or FILE.py:FUNCTION. The function returns the network, (network, "
    "preprocessing) or (network, preprocessing, output names). Without preprocessing, unbraid uses "
    "that of ImageNet for pictures, and gives tensors as they are."
)
_WEIGHTS = "A safetensors or torch file, a name of torchvision weights, or 'random'."
_OUTPUT = "Key or index of the logits, if the network returns more than logits (-1: the last)."
_TARGET = (
    "Whose gradient says which channels matter: label (the logit of the image's class), "
    "segmentation:CLASS, detection:CLASS, embedding:FILE, regression:INDEX, multilabel, or none."
)
_NAMES = (
    "File of class names: CSV (folder, WordNet id or output number; name), JSON, or one per line."
)
_OWN_DATA = (
    "The run's images: needed if they come from your own code, FILE.py:FUNCTION, or have moved."
)
_BANDS = "Bands to draw, counted from 0: 3,2,1 for red, green and blue, or one for grey."
_FEATURES = "Make images that excite each split channel and concept channel."
Layers = Annotated[list[str], Parameter(help=_LAYERS, negative="")]
Features = Annotated[bool, Parameter(help=_FEATURES, negative="--no-features")]
Model = Annotated[str, Parameter(help=_MODEL)]
Weights = Annotated[str | None, Parameter(help=_WEIGHTS)]
Output = Annotated[str | None, Parameter(help=_OUTPUT)]
Target = Annotated[str, Parameter(help=_TARGET)]
_DEVICE = "Where to compute, such as cpu or cuda:0. By default an accelerator, if there is one."
Device = Annotated[str | None, Parameter(help=_DEVICE)]
Names = Annotated[Path | None, Parameter(help=_NAMES)]
Out = Annotated[Path, Parameter(help="Where to write.")]
OwnData = Annotated[str | None, Parameter(help=_OWN_DATA)]
Bands = Annotated[str | None, Parameter(help=_BANDS)]
CsvFile = Annotated[Path | None, Parameter(help="CSV file to write or replace.")]
_SCANS = "Folder of a finished scan. Several, or a pattern such as 'scan-*', count as one scan."
ScanPaths = Annotated[list[Path], Parameter(help=_SCANS, negative="")]
RunPath = Annotated[Path, Parameter(help="Folder of a finished run.")]
_TAU = "Smallest share of an image's relevance that matters, or auto."
Tau = Annotated[float | Literal["auto"], Parameter(help=_TAU)]
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
    if network.output is not None:
        picked = with_logits(loaded.model, network.output)
        loaded = replace(loaded, model=picked, source={**loaded.source, "output": network.output})
    return loaded


def open_images(
    loaded: LoadedModel, source: str, listed: Path | None = None, *, of_outputs: bool = True
) -> ListedImages:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.base.progress import waiting
    from unbraid.images.open import images_for

    with waiting("Listing images"):
        images, assumed = images_for(loaded, source, listed, of_outputs=of_outputs)
    note(assumed)
    return images


def read_bands(text: str | None) -> tuple[int, ...] | None:
    """Read the bands to draw, "3,2,1" or "0"; UsageError if they are something else."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (1, 3) or not all(part.strip().isdecimal() for part in parts):
        raise UsageError(
            f"--bands {text} is not as in 3,2,1, three numbers of bands from 0, or one for grey."
        )
    return tuple(map(int, parts))


def labels_for(labels: Labels, images: ListedImages, *, of_outputs: bool) -> Labels:
    """What images count as: as asked, or, of images without labels, what there is to go by."""
    from unbraid.images.open import labelled

    if labelled(images) or labels != "given":
        return labels
    return "predicted" if of_outputs else "none"


def source_of(loaded: LoadedModel, images: ListedImages, source: str) -> dict[str, Any]:
    """How to find network and images again, and how the images were divided if they were."""
    from unbraid.images.open import absolute

    told: dict[str, Any] = {"divided": images.divided} if images.divided else {}
    told |= {"tensors": True} if images.of_tensors else {}
    return {**loaded.source, "data": absolute(source), **told}


def noted(assumed: str, images: ListedImages) -> dict[str, str]:
    """What was assumed of images, kept for a run's page, which tells their division anyway."""
    words = " ".join(assumed.replace(images.divided, "").split())
    return {"assumed": words} if words else {}


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
