"""A run's network again, from what its folder says of it, with what feeds it pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from unbraid.base.errors import DataError, RunError, UsageError
from unbraid.images.broken import UNLABELLED, first_readable
from unbraid.images.dataset import size_of
from unbraid.images.listing import Items, ListedImages, Listing, files_at
from unbraid.images.own import is_own
from unbraid.images.tensors import AsFloat32, hold_tensors, read_tensor, read_tensor_file
from unbraid.images.tiff import TIFF
from unbraid.networks.given import as_batch
from unbraid.networks.models import LoadedModel, load_model
from unbraid.networks.outputs import numbers_in, with_logits
from unbraid.reporting.drawing import draw_by
from unbraid.running.finished import Run


def load_again(
    source: dict[str, Any],
    model: str | None = None,
    weights: str | None = None,
    device: str | None = None,
) -> LoadedModel:
    """Load a run's network, as its settings' `source` tells or as it is named now.

    Networks of torchvision and timm are loaded as the folder names them. Code is run only where it
    is named now, since a folder may come from anyone.
    """
    if model is None and "demo" in source:
        from unbraid.demo.network import CLASSES, load_network, preprocess

        return LoadedModel(load_network(), preprocess, CLASSES, {"demo": True})
    told = {name: source.get(name) for name in ("model", "weights", "output")}
    if not all(value is None or isinstance(value, str) for value in told.values()):
        raise RunError("The run does not say in words which network it is of; make it again.")
    named = told["model"]
    if model is None and named is None:
        raise UsageError("The run does not say which network it is of; name it with --model.")
    if model is None and ".py:" in str(named):
        raise UsageError(
            f"The run's network is your own code, {named}, which runs only if you name it; add "
            f"--model {named}."
        )
    loaded = load_model(str(model or named), weights or told["weights"], device)
    if told["output"] is not None:
        loaded = replace(loaded, model=with_logits(loaded.model, told["output"]))
    return loaded


def prepared_otherwise(source: dict[str, Any]) -> str:
    """Say what a run over tensors did not do with its images; "" for other runs."""
    if not source.get("tensors") and not is_own(str(source.get("data", ""))):
        return ""
    return (
        "A picture goes through the network's usual preprocessing, which the run's own tensors did "
        "not, so its percentiles among the scan's images may mean little."
    )


def is_tensor_file(path: Path) -> bool:
    """Whether a file holds tensors, by its name or, of a TIFF, by what is in it."""
    return hold_tensors([str(path)])


def open_pictures(
    paths: Sequence[Path],
    loaded: LoadedModel,
    bands: Sequence[int] | None = None,
    *,
    as_in_files: bool = False,
) -> ListedImages:
    """Open picture files in a network's preprocessing, or files of tensors; without labels.

    Tensors are as the network takes them, or, `as_in_files`, those that its preprocessing takes.
    """
    folder = next((path for path in paths if path.is_dir()), None)
    if folder is not None:
        raise UsageError(
            f"explain takes pictures, and {folder} is a folder; name the files in it, such as "
            f"{folder / '*.png'}."
        )
    names = [str(path) for path in paths]
    n_of_tensors = sum(map(is_tensor_file, paths))
    if 0 < n_of_tensors < len(paths):
        raise UsageError("There are both pictures and tensors; explain them one after the other.")
    if not n_of_tensors or (as_in_files and loaded.tensor_transform is not None):
        unlabelled = [UNLABELLED] * len(names)
        listing = Listing("The images", names, files_at(names), [], unlabelled)
        images = ListedImages(
            listing, loaded.tensor_transform if n_of_tensors else loaded.transform
        )
    else:
        images = _of_tensors(paths, loaded, AsFloat32() if as_in_files else lambda tensor: tensor)
    draw_by(images, bands)
    return images


def _of_tensors(
    paths: Sequence[Path], loaded: LoadedModel, prepare: Callable[[Tensor], Tensor]
) -> ListedImages:
    """Images of files that hold a tensor each, of one image or several."""
    items: list[tuple[Tensor, int]] = []
    names: list[str] = []
    for path in paths:
        if not path.is_file():
            raise DataError(f"There is no file {path}; name files of tensors or pictures.")
        is_tiff = path.suffix.lower() in TIFF
        held = [read_tensor(str(path))] if is_tiff else numbers_in(read_tensor_file(path))
        if len(held) != 1:
            raise DataError(f"{path} holds {len(held)} tensors; give a file with one.")
        batch = as_batch(prepare(held[0]), loaded.model)
        items += [(image, UNLABELLED) for image in batch]
        several = len(batch) > 1
        names += [f"{path} {k}" if several else str(path) for k in range(len(batch))]
    labels = [UNLABELLED] * len(items)
    return ListedImages(Listing("The images", names, Items(cast(Any, items)), [], labels))


def network_images(run: Run, loaded: LoadedModel) -> Dataset[Any]:
    """A run's validation images as its network takes them, labelled as they were scanned.

    Raises a RunError if the run does not say where they are, a DataError if they are gone.
    """
    if changes_tensors(run, loaded):
        return run.images_of("val", loaded)
    try:
        first_readable(run.images, range(size_of(run.images)))
    except DataError:  # they are there to be looked at, without the network's preprocessing
        return run.images_of("val", loaded)
    return run.images


def changes_tensors(run: Run, loaded: LoadedModel | None) -> bool:
    """Whether a run's images are files of tensors that a network's preprocessing changes."""
    return bool(run.settings.source.get("tensors")) and bool(loaded and loaded.tensor_transform)
