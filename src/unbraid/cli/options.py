"""The options that commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

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
