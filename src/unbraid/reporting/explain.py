"""Explain images by concept channels, and show it: tables, pictures with overlays, JSON."""

from __future__ import annotations

import base64
import io
import json
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from unbraid.base.arguments import as_path, flag, whole_number
from unbraid.base.errors import DataError, UsageError
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.base.names import file_names
from unbraid.base.tables import Tabular, one_line
from unbraid.images.batches import in_batches, load
from unbraid.images.broken import plain
from unbraid.images.dataset import class_names_of, size_of
from unbraid.images.which import name_of
from unbraid.measuring.explain import ImageExplanation, Response, explain_images
from unbraid.networks.copying import unwrap
from unbraid.networks.given import as_batch
from unbraid.reporting.drawing import as_drawn, bands_of, to_picture
from unbraid.reporting.pictures import open_picture, sight_of
from unbraid.scanning.targets import LABEL, GivenTarget, Scalar, read_target
from unbraid.surgery.split_layer import split_layer_of

_TILE, _GAP, _LEFT = 168, 10, 250  # pixels: a picture, between pictures, for words
_SMALL = 64  # a picture's pixels are shown as they are up to this size
_LIGHT = (255, 138, 0)  # where a channel answers
_DARKENED = 0.55  # of the picture beneath
_PAPER, _INK, _FAINT = "white", (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True, eq=False)
class Explanation(Tabular):
    """What the concept channels of a layer do in some images; see docs/explain.md.

    `explained[0]` is the first image, `explained[0][900]` its channel 900: the whole channel, its
    concept channels and its rest, each with response (mean pre-activation over positions),
    relevance (in units of the logit) and share (of all positive relevance in the layer).

    Attributes:
        images: what was found of each image.
        pictures: the images, as the network sees them.
    """

    images: tuple[ImageExplanation, ...]
    pictures: tuple[Image.Image, ...]  # of the images, as the network sees them

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> ImageExplanation:
        """Return what was found of one image."""
        return self.images[index]

    def __str__(self) -> str:
        """Show a table for each image."""
        return "\n\n".join(map(str, self.images))

    def _repr_html_(self) -> str:
        return "\n".join(
            f'{own.table().html()}<img alt="{escape(own.title, quote=True)}" '
            f'style="max-width:100%" src="data:image/png;base64,'
            f'{base64.b64encode(_png(draw_image(own, picture))).decode()}">'
            for own, picture in zip(self.images, self.pictures, strict=True)
        )

    @in_plain_modes
    def save(self, folder: str | Path) -> list[Path]:
        """Write `NAME.png` and `NAME.json` for each image, in place of those of the same names.

        The picture shows where concept channels answer, the JSON has all figures (docs/format.md).

        Returns:
            The files.

        Raises:
            RunError: the disk is full or may not be written.
        """
        folder, files = as_path("folder", folder), []
        names = file_names([own.image for own in self.images])
        for name, own, picture in zip(names, self.images, self.pictures, strict=True):
            text = json.dumps(own.to_dict(), indent=1) + "\n"
            contents = {".png": _png(draw_image(own, picture)), ".json": text.encode()}
            for ending, content in contents.items():
                files.append(folder / f"{name}{ending}")
                write_whole(files[-1], content)
        return files


@in_plain_modes
def explain(
    model2: nn.Module,
    images: Tensor | Dataset[Any],
    *,
    layer: str | None = None,
    classes: Sequence[int | str] = (),
    n: int = 8,
    heatmaps: bool = True,
    target: GivenTarget | Scalar = LABEL,
) -> Explanation:
    """Say which concept channels of a split network some images use, how much and where.

    Each image is run by itself. A channel's relevance for the predicted class, gradient x
    activation, divides exactly among its concept channels and its rest. The network is used in eval
    mode, on its device, and left as it was; gates and clamps in force count.

    Args:
        model2: from `unbraid.apply` in the exact form.
        images: as the network takes them, (N, C, H, W) or (C, H, W), signals (N, C, L) or (C, L),
            clips or volumes (N, C, D, H, W) or (C, D, H, W); or a map-style data set of (image,
            label). What a tensor of three or four dimensions is, is told by the network.
        layer: name of the split layer, needed where several are split.
        classes: names or numbers of more outputs to explain, beside the predicted one.
        n: concept channels to show of each image, those with the largest shares; figures are there
            of all.
        heatmaps: compute for those which pixels they answer to.
        target: another number of an image than the predicted class's logit, as `unbraid.scan` takes
            it; then there are no classes.

    Returns:
        An Explanation: printed as tables, shown with pictures in notebooks, saved by `save`. Its
        images, such as `explained[0]`, hold all channels, `explained[0][900]` is channel 900.

    Raises:
        UsageError: there is no such layer or class, there is no image, or no target.
        DataError: an image cannot be read.
        ModelError: the network cannot run, or computes NaN or infinite numbers.
        LayerError: the layer does not reach the logits.

    Source:
        "Explain" in docs/method.md.
    """
    model2 = unwrap(model2)
    split_layer = split_layer_of(model2, layer, "explain images by")
    n, heatmaps = whole_number("n", n, 1), flag("heatmaps", heatmaps)
    if isinstance(classes, (str, bytes, int)):
        raise UsageError(f"classes is {classes!r}; give a list of names or numbers.")
    names: tuple[str, ...] = ()
    if isinstance(images, (str, bytes, Path)):
        raise UsageError(
            f"images is {reprlib.repr(images)}; give images as the network takes them, or a data "
            "set, such as unbraid.open_images makes."
        )
    if isinstance(images, Tensor):
        read = _of_tensor(images, model2)
    else:
        names = class_names_of(images)
        read = _of_dataset(images)
    known = [
        "" if number in split_layer.clusters else name
        for number, name in enumerate(split_layer.class_names)
    ]
    pictures: list[Image.Image] = []

    def shown() -> Iterator[tuple[str, Tensor]]:
        for name, image, picture in read:
            pictures.append(picture)
            yield name, image

    options: dict[str, Any] = {"classes": list(classes), "class_names": names or known}
    options["target"] = read_target(target)
    if classes and not options["target"].of_class:
        raise UsageError("classes go with the target 'label' alone; leave one of them out.")
    found = explain_images(model2, split_layer, shown(), **options, n=n, heatmaps=heatmaps)
    return Explanation(tuple(found), tuple(pictures))


_Named = Iterator[tuple[str, Tensor, Image.Image]]  # of each image its name, itself, its picture


def _of_tensor(images: Tensor, model2: nn.Module) -> _Named:
    for index, image in enumerate(as_batch(images, model2)):
        own = plain(image, TensorDataset(images), index)
        yield f"image {index}", own, to_picture(own)


def _of_dataset(images: Dataset[Any]) -> _Named:
    batches = in_batches(range(size_of(images)), 1)
    sight = sight_of(images)
    for (item,) in load(images, batches, workers=0):
        if item.fault is not None:
            raise DataError(f"{item.fault} Mend it, or leave it out.")
        if sight is None:
            seen = to_picture(item.image, bands_of(images, item.index))
        else:
            seen = sight(open_picture(images, item.index))
        yield name_of(images, item.index), item.image, seen


def draw_image(explained: ImageExplanation, picture: Image.Image) -> Image.Image:
    """Draw an image, and over it where the strongest concept channels answer, in rows."""
    shown = explained.strongest
    heads = ("image", "whole channel", "concept channel", "pixels it answers to")
    columns = heads if any(c.heatmap is not None for c, _ in shown) else heads[:-1]
    width = _LEFT + len(columns) * (_TILE + _GAP)
    tile = _fitted(picture)
    top, step = 64, tile.height + _GAP
    sheet = Image.new("RGB", (width, top + max(1, len(shown)) * step + 34), _PAPER)
    pen, large, small = (
        ImageDraw.Draw(sheet),
        ImageFont.load_default(15),
        ImageFont.load_default(12),
    )
    pen.text((_GAP, _GAP), _clipped(explained.title, large, width - 2 * _GAP), _INK, large)
    for place, head in enumerate(columns):
        pen.text((_LEFT + place * (_TILE + _GAP), 40), head, _FAINT, small)
    for row, (concept, whole) in enumerate(shown):
        y = top + row * step
        for line, text in enumerate(_lines(concept)):
            font = large if line == 0 else small
            pen.text((_GAP, y + 22 * line), _clipped(text, font, _LEFT - 2 * _GAP), _INK, font)
        strongest = max([float(m.max()) for m in (whole.map, concept.map) if m is not None] or [0])
        shades = [(whole.map, strongest), (concept.map, strongest), (concept.heatmap, None)]
        sheet.paste(tile, (_LEFT, y))
        for place, (values, most) in enumerate(shades[: len(columns) - 1], start=1):
            at = (_LEFT + place * (_TILE + _GAP), y)
            if values is None:
                pen.text((at[0], y), "not known", _FAINT, small)
            else:
                sheet.paste(light_up(tile, as_drawn(values, explained.sizes), most), at)
    _draw_legend(sheet, pen, small)
    return sheet


def light_up(picture: Image.Image, values: Tensor, strongest: float | None = None) -> Image.Image:
    """Darken a picture but where values, (h, w), are above zero, which are lit up.

    `strongest` is what is lit up most, by default the largest of the values.
    """
    most = float(values.max()) if strongest is None else strongest
    shade = (values / most).clamp(0, 1) if most > 0 else torch.zeros_like(values)
    lit = Image.fromarray(shade.float().numpy()).resize(picture.size, Image.Resampling.BILINEAR)
    alpha = np.asarray(lit)[..., None]
    under = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32) * _DARKENED
    mixed = under * (1 - 0.8 * alpha) + np.array(_LIGHT, dtype=np.float32) * 0.8 * alpha
    return Image.fromarray(mixed.round().astype(np.uint8))


def _fitted(picture: Image.Image) -> Image.Image:
    """Bring a picture to a tile's width, at most twice as high."""
    height = max(8, min(2 * _TILE, round(_TILE * picture.height / picture.width)))
    few = max(picture.size) <= _SMALL
    how = Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((_TILE, height), how)


def _lines(concept: Response) -> list[str]:
    known = f"percentile {concept.percentile:.1f}, " if concept.percentile >= 0 else ""
    return [concept.name, concept.concept, f"{known}share {concept.share[0]:.1%}"]


def _draw_legend(sheet: Image.Image, pen: ImageDraw.ImageDraw, font: Any) -> None:
    y = sheet.height - 26
    ramp = torch.linspace(0, 1, 120)[None].expand(14, 120)
    sheet.paste(light_up(Image.new("RGB", (120, 14), (128, 128, 128)), ramp, 1.0), (_LEFT, y))
    words = "zero or below, up to the strongest place of the whole or the concept channel"
    pen.text((_LEFT + 128, y), words, _FAINT, font)


def _clipped(text: str, font: Any, width: int) -> str:
    """Cut a text to a number of pixels."""
    line = one_line(text.encode("utf-8", "backslashreplace").decode())
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line}…"


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
