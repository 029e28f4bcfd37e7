"""What commands share: options with their help, networks and images, and what is said of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console

from unbraid.base.tables import count, one_line

if TYPE_CHECKING:
    from unbraid.images.listing import ListedImages
    from unbraid.measuring.compare import OutputComparison
    from unbraid.networks.models import LoadedModel
    from unbraid.running.run import Run

# Results go to standard output, all else to standard error.
out_console, err_console = (
    Console(stderr=stderr, highlight=False, soft_wrap=True, markup=False)
    for stderr in (False, True)
)

# The options that commands share, with their help; that of others stands in docstrings.

Layers = Annotated[
    list[str],
    Parameter(
        help="Name of a layer, as `unbraid layers` lists them, or a pattern such as 'layer4.*'; "
        "may be given more than once.",
        negative="",
    ),
]
Features = Annotated[
    bool,
    Parameter(
        help="Make images that excite each split channel and concept channel.",
        negative="--no-features",
    ),
]
Out = Annotated[Path, Parameter(help="Where to write.")]
Table = Annotated[Path | None, Parameter(help="CSV file to write or replace.")]
ScanPath = Annotated[Path, Parameter(help="Folder of a finished scan.")]
RunPath = Annotated[Path, Parameter(help="Folder of a finished run.")]
Grid = Annotated[list[float] | None, Parameter(consume_multiple=True)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Network:
    """A network as the command line names it.

    Args:
        model: torchvision:NAME, timm:NAME or FILE.py:FUNCTION, which returns the network, (network,
            preprocessing) or (network, preprocessing, output names); without preprocessing
            ImageNet's usual one is assumed.
        weights: A safetensors or torch file, a torchvision weights name, or 'random'.
        output: Key or index of the logits, if the network puts out more (-1: last).
        device: Such as cpu or cuda:0; an accelerator if there.
        names: File of names for classes: CSV (folder, WordNet id or output's number; name), JSON,
            or a line for each output.
    """

    model: str
    weights: str | None = None
    output: str | None = None
    device: str | None = None
    names: Path | None = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Finding:
    """The arguments of `unbraid.find`.

    Args:
        tau: Smallest share of an image's relevance that matters; auto: fit to the layer.
        p: Fraction of a class's images in which a channel matters.
        gamma: Cosine below which two classes have different reasons.
        concepts: What concepts are made of; clusters of images need no labels.
    """

    tau: float | Literal["auto"] = 0.03
    p: float = 0.75
    gamma: float = 0.5
    concepts: Literal["classes", "clusters"] = "classes"


def load(network: Network) -> LoadedModel:
    """Load a network, and pick the logits out of what it puts out; read names of classes."""
    from unbraid.networks.class_names import Names, read_names
    from unbraid.networks.models import load_model
    from unbraid.networks.outputs import with_logits

    names = Names() if network.names is None else read_names(network.names)
    loaded = load_model(network.model, network.weights, network.device)
    loaded, output = replace(loaded, names=names), network.output
    note(loaded.note)
    if output is None:
        return loaded
    is_number = re.fullmatch(r"[+-]?\d+", output, re.ASCII)
    picked = with_logits(loaded.model, int(output) if is_number else output)
    return replace(loaded, model=picked, source={**loaded.source, "output": output})


def open_images(loaded: LoadedModel, source: str) -> ListedImages:
    """Open images from any source, with a network's preprocessing and labels."""
    from unbraid.images.open import images_for

    images, assumed = images_for(loaded, source)
    note(assumed)
    return images


def say(text: str) -> None:
    """Tell of a step."""
    err_console.print(text)


def note(text: str) -> None:
    """Tell of something to know, if it is something."""
    if text:
        err_console.print(f"Note: {text}", style="yellow")


def show_broken(names: list[str]) -> None:
    """Count and list images that were left out."""
    if names:
        say(f"Left out {count(len(names), 'image')} that could not be read:")
    for name in names:
        say(f"  {one_line(name)}")


def show_run(result: Run) -> None:
    """End a run: a short table and where the report is."""
    show_broken(result.broken)
    out_console.print(str(result.found))
    if result.evaluation is not None:
        out_console.print(f"\n{result.evaluation}\n")
        for method, errors in result.evaluation.summary.items():
            known = {name: value for name, value in errors.items() if value is not None}
            figures = ", ".join(f"{name} {value:.3f}" for name, value in known.items())
            out_console.print(f"{method}: mean {figures}".replace("_", " "))
        assert result.evaluation.output is not None
        show_comparison("Largest logit difference", result.evaluation.output)
    out_console.print(f"Report: {result.page}")


def show_comparison(words: str, output: OutputComparison) -> None:
    """Say how much splitting changed the outputs."""
    text = f"{words} {output.max_abs_logit_diff:g}"
    if output.top1_before is not None and output.top1_after is not None:
        text += f"; accuracy {output.top1_before:.2%} before, {output.top1_after:.2%} after"
    out_console.print(f"{text}.")
