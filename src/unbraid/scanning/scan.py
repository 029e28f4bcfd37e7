"""Scans: the only step that runs a network over images, and the layers it can be made of."""

from __future__ import annotations

import inspect
import platform
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack, get_type_hints, overload

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import as_path, whole_number
from unbraid.base.errors import CannotRun, DataError, RunError, UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.team import join_team
from unbraid.images.broken import UNLABELLED, first_readable, largest_readable
from unbraid.images.dataset import class_names_of, labels_of, size_of
from unbraid.images.identity import as_recorded, fingerprint, preprocessing_of, text_of
from unbraid.images.mapped import distinct
from unbraid.images.sample import sample_of
from unbraid.images.several_labels import refuse_several
from unbraid.networks.attention import with_projections
from unbraid.networks.copying import device_of, unwrap
from unbraid.networks.formats import faster_channels_last
from unbraid.networks.layers import (
    LayerName,
    describe,
    is_pattern,
    layer_folder,
    layer_names,
    resolve_layer,
    splittable_layers,
    weight_rows,
)
from unbraid.networks.outputs import as_rows, picks_of, run_network, run_raw
from unbraid.networks.relevance import Cut, cut_at, gradients_at, undisturbed
from unbraid.networks.spec import LayerSpec
from unbraid.networks.weights import hash_weights, refuse_broken_weights
from unbraid.scanning.accuracy import (
    LONG,
    Accuracy,
    describe_fit,
    sampled_accuracy,
    scanned_accuracy,
)
from unbraid.scanning.batch import batch_size_for
from unbraid.scanning.every import as_many_as_fit, tell_rest
from unbraid.scanning.manifest import Manifest, hash_indices, read_manifest
from unbraid.scanning.place_shards import refuse_too_many
from unbraid.scanning.records import Scan, open_one
from unbraid.scanning.scan_options import MAX_PLACES, Options, ScanOptions
from unbraid.scanning.shards import (
    Target,
    claim_together,
    images_per_shard,
    scan_shards,
    take_over,
)
from unbraid.scanning.targets import LABEL, GivenTarget, Scalar, read_target, settled


def _with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show a scan's options in a signature, by name and default, in place of `**options`."""
    signature, usual = inspect.signature(function), ScanOptions()
    *named, _ = signature.parameters.values()
    for name, hint in get_type_hints(Options).items():
        kind, default = inspect.Parameter.KEYWORD_ONLY, getattr(usual, name)
        named.append(inspect.Parameter(name, kind, default=default, annotation=hint))
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


@overload
def scan(  # type: ignore[overload-overlap]  # a name is a sequence too; it comes first
    model: nn.Module,
    layer: LayerName,
    dataset: Dataset[Any],
    out: str | Path,
    **options: Unpack[Options],
) -> Scan: ...


@overload
def scan(
    model: nn.Module,
    layer: Sequence[LayerName],
    dataset: Dataset[Any],
    out: str | Path,
    **options: Unpack[Options],
) -> dict[str, Scan]: ...


@_with_options
@in_plain_modes
def scan(
    model: nn.Module,
    layer: LayerName | Sequence[LayerName],
    dataset: Dataset[Any],
    out: str | Path,
    **options: Unpack[Options],
) -> Scan | dict[str, Scan]:
    """Run a network over images once and keep one small record per image.

    Started again with the same arguments it goes on where it stopped; a finished shard is not
    computed again. Processes that torchrun starts share the work (docs/scale.md). The network is
    used in eval mode, on the device that it is on, and left exactly as it was.

    Args:
        model: gives logits (N, T) for a batch of images, or (N,) or (N, 1) to tell two classes
            apart; `unbraid.with_logits` picks them out of a larger output. With another target it
            may give anything.
        layer: a convolution or fully connected layer, by `named_modules()` name or itself. Several
            layers, as a list, are scanned in the same pass; a pattern such as "layer4.*.conv3",
            alone or in a list, stands for all layers of such names that can be scanned; "all" for
            every layer, or as many, evenly over depth, as 20 GB hold (docs/layers.md).
        dataset: map-style, of (image tensor, label). Its `groups`, one id for each image, may say
            which belong together, such as crops of one photograph; none is then judged by another.
            Its `ids`, a text for each, name images for good, whatever their order (docs/data.md).
        out: folder for the records; of several layers, each has a folder of its name in it.
        labels: "predicted" takes each image for what the network takes it for, whatever the data
            set's label, so data sets without labels will do (any number stands for a label).
            "none", with a target that asks for no class: every image counts as of class 0.
        target: the number of each image whose gradient says which channels matter in it. By default
            the logit of the image's class; or by name "segmentation:CLASS", "detection:CLASS",
            "embedding:FILE", "regression:INDEX" or "multilabel"; or a function from the network's
            output to (N,). None: no number, so no gradient and no share; clusters and groups of
            images can be found all the same (docs/networks.md).
        classes: scan only images with these given labels.
        indices: scan only the images of these indices in the data set.
        positions: also keep the layer's input maps, which the published rho criterion and the
            rectified measures need.
        min_share: the smallest share kept; thresholds below it need a new scan.
        batch_size: images per forward pass; by default that of the scan which goes on, else what
            2 GiB, or a quarter of an accelerator's memory, are sure to hold, at most 32 or 256.
            Halved as long as the device's memory is too small.
        workers: processes that load images, 0 for none.
        skip_broken: leave out images that cannot be read instead of stopping at the first.
        progress: show a progress bar on standard error.
        source: how to find network and images again, kept in the manifest for later commands.
        threads: to compute with, of each process; by default torch's setting, or that of the scan
            which goes on. Records are the same to the last bit with the same number, batch size
            and kind of device, whoever computed them.
        autocast: run the network in bfloat16 where torch sees fit, which is faster where the device
            has it; sums are of float32 all the same.
        channels_last: keep the weights of 2-D convolutions channels last meanwhile; by default as
            the scan which goes on, else where that is known to be faster (docs/scale.md). A network
            that is so already needs no telling.
        places: of each channel, how many places that excite it most to keep; they and some drawn
            evenly are a scan of their own, `Scan.places` (docs/places.md).
        prefix_tokens: tokens before those of the image; by default what the network tells.

    Returns:
        The finished Scan; for a list or pattern, a dictionary of Scans by the layers' names.

    Raises:
        LayerError: a layer does not exist, cannot be split or does not reach the logits, or no
            layer fits a pattern.
        DataError: an image cannot be read, or labels do not fit the network.
        ModelError: the network holds or computes NaN or infinite numbers, or cannot run.
        RunError: the folder belongs to another network, layer or data set, or the disk is full.
        UsageError: an argument is out of range or of another type.

    Source:
        "One layer" in docs/method.md.
    """
    model = unwrap(model)
    out = as_path("out", out)
    if isinstance(layer, (str, nn.Module)) or not isinstance(layer, Iterable):
        asked, one = [layer], not is_pattern(model, layer)
    else:
        asked, one = list(layer), False
    target = read_target(options.get("target", LABEL))
    usable = layer_names(model, asked, partial(usable_in, model, dataset, target))
    places = whole_number("places", options.get("places", 0), 0, MAX_PLACES)
    names, left_out = as_many_as_fit(model, asked, usable, [dataset], places)
    if left_out:
        warnings.warn(tell_rest(names, left_out), stacklevel=4)
    folders = {name: out if one else layer_folder(out, name) for name in names}
    scans = scan_into(model, folders, dataset, **options)
    return scans[names[0]] if one else scans


def scan_into(
    model: nn.Module,
    folders: Mapping[str, Path],
    dataset: Dataset[Any],
    *,
    n_first: int = 0,
    looks: Mapping[str, Path] | None = None,
    **given: Unpack[Options],
) -> dict[str, Scan]:
    """Scan several layers in one pass, each into a folder of its own; the rest is as in `scan`.

    With `n_first`, so many images of a data set that has more come before all others: those of a
    first look. Their records are taken from its scans, `looks` by layer, where these are the same.
    A scan that goes on keeps its order.
    """
    for name in (name for name in given if name not in ScanOptions.__dataclass_fields__):
        near = get_close_matches(name, ScanOptions.__dataclass_fields__, 1)
        instead = f"use {near[0]}" if near else "leave it out"
        raise TypeError(f"scan() takes no argument {name!r}; {instead}.")
    options = settled(ScanOptions(**given).checked())
    model = unwrap(model)
    modules = {name: resolve_layer(model, name)[1] for name in folders}
    specs = {name: describe(name, module) for name, module in modules.items()}
    refuse_broken_weights(model)
    size_of(dataset)
    refuse_several(dataset, options.labels == "given", options.target.name == LABEL)
    labels = labels_of(dataset, needed=options.labels == "given" or options.classes is not None)
    indices = _indices(options, labels)
    begun = next(filter(None, map(read_manifest, folders.values())), None)  # a scan that goes on
    n_first = begun.n_first if begun else n_first
    first: list[int] = []
    if 0 < n_first < len(indices) == len(labels):
        first = sample_of(dataset, n_first, by_class=options.labels == "given")
        others = np.delete(np.arange(len(indices)), first)
        indices = array("q", np.concatenate([first, others]).astype(np.int64).tobytes())
    before = begun or _look_at(specs, looks or {}, hash_weights(model) if looks else "")
    common = _describe_all(model, list(modules.values()), dataset, labels, indices, options, before)
    common |= {"first": hash_indices(first or None), "n_first": len(first)}
    targets = [
        _target(modules[name], specs[name], folder, common) for name, folder in folders.items()
    ]
    team = join_team()
    claim_together(targets, team)
    # Input maps of a part are asked for after a scan of all, which has told how well it fits.
    again = options.positions and not (options.classes is None and options.indices is None)
    classified = options.labels == "given" and options.target.name == LABEL
    tells = classified and team.first and not again
    early = tells and not begun and len(indices) >= LONG
    if early:
        _tell_fit(sampled_accuracy(model, dataset, indices, common["batch_size"]), common, options)
    if looks and team.first:
        take_over(targets, looks, dataset, first, options)
    scan_shards(model, targets, dataset, labels, indices, team, options)
    scans = {name: open_one(folder) for name, folder in folders.items()}
    for done in scans.values():
        if len(done.broken()) == len(indices):
            raise DataError(f"None of the {len(indices)} images could be read; mend the data set.")
    if tells and not early:
        _tell_fit(scanned_accuracy(next(iter(scans.values()))), common, options)
    return scans


def _look_at(
    specs: Mapping[str, LayerSpec], looks: Mapping[str, Path], weights: str
) -> Manifest | None:
    """The manifest of a first look at a layer of this network, None without one to be read."""
    for name, folder in looks.items():
        with suppress(RunError):
            look = read_manifest(folder)
            if look is not None and (look.layer, look.weights) == (specs[name], weights):
                return look
    return None


def _indices(options: ScanOptions, labels: Sequence[int]) -> Sequence[int]:
    """Indices in the data set of the images to scan, in order."""
    if options.labels == "given" and distinct(labels) == {UNLABELLED}:
        other = "" if options.target.of_class else " or labels='none'"
        raise UsageError(f"The data set has no labels; pass labels='predicted'{other}.")
    if options.indices is not None:
        indices = list(options.indices)
        if not indices or indices[0] < 0 or indices[-1] >= len(labels):
            raise UsageError(
                f"indices must name places in the data set, 0 to {len(labels) - 1}, one or more."
            )
        return indices
    if options.classes is None:
        return range(len(labels))
    wanted = set(options.classes)
    if not wanted:
        raise UsageError("classes is empty; name the classes to scan, or None for all.")
    if empty := wanted - distinct(labels):
        raise UsageError(f"classes names {sorted(empty)}, of which the data set has no image.")
    return [index for index, label in enumerate(labels) if label in wanted]


def _describe_all(
    model: nn.Module,
    modules: list[nn.Module],
    dataset: Dataset[Any],
    labels: Sequence[int],
    indices: Sequence[int],
    options: ScanOptions,
    begun: Manifest | None,
) -> dict[str, Any]:
    """What the manifests of all layers have in common; in doubt as in a scan that goes on."""
    weights, data = hash_weights(model), fingerprint(dataset, labels)
    picks = [text_of(pick) if callable(pick) else str(pick) for pick in picks_of(model)]
    told = {"preprocessing": preprocessing_of(dataset), "output": " ".join(picks)}
    if begun:
        usual = {name: getattr(begun, name) for name in ("threads", "batch_size", "channels_last")}
        for name, text in told.items():
            before = getattr(begun, name)
            if as_recorded(text, before):
                what = "a transform's" if name == "preprocessing" else "with_logits'"
                warnings.warn(
                    f"The scan was begun by a version that did not see changes of {what} own "
                    "code; make sure that it is still the same.",
                    stacklevel=3,
                )
                told[name] = before
    else:  # looked at in any case, so that a data set of something else is told first
        looked_for = first_readable if options.batch_size else largest_readable
        image = looked_for(dataset, indices)
        size = options.batch_size or batch_size_for(model, modules, image)
        usual = {
            "threads": torch.get_num_threads(),
            "batch_size": size,
            "channels_last": faster_channels_last(model),
        }
    entries = {own.name for own in fields(Manifest)}
    asked = {name: value for name, value in vars(options).items() if name in entries}
    return {
        **asked,
        **{name: value if asked[name] is None else asked[name] for name, value in usual.items()},
        **told,
        "target": options.target.name,
        "weights": weights,
        "data": data,
        "n_images": len(indices),
        "class_names": ("no label",) if options.labels == "none" else class_names_of(dataset),
        "shard_size": images_per_shard(options.positions),
        "versions": {
            "unbraid": version("unbraid"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "indices": hash_indices(options.indices),
    }


def _target(module: nn.Module, spec: LayerSpec, folder: Path, common: dict[str, Any]) -> Target:
    """A layer to scan; refused where the scan, once finished, would be refused on reading."""
    dtype = str(weight_rows(module).dtype).removeprefix("torch.")
    manifest = Manifest(layer=spec, dtype=dtype, **common)
    try:
        Manifest.from_json(manifest.to_json())
    except ValueError as error:
        raise UsageError(
            f"A scan of layer {spec.name!r} would be too large to work with ({error}); "
            "scan a smaller layer, or images of fewer classes."
        ) from None
    refuse_too_many(spec, manifest.places, 8 if dtype == "float64" else 4)
    return Target(module, manifest, folder)


def _tell_fit(accuracy: Accuracy | None, common: dict[str, Any], options: ScanOptions) -> None:
    """Say how often the network is right, and warn where it does not fit labels or images."""
    if accuracy is None:
        return
    if options.progress:
        console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
        console.print(describe_fit(accuracy, common["preprocessing"]))
    if accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=5)


@in_plain_modes
def usable_layers(
    model: nn.Module, images: Tensor, target: GivenTarget | Scalar = LABEL
) -> list[LayerSpec]:
    """List the layers, in order, that can be split, see images (N, C, H, W) and reach the output.

    Without a target none has to reach it.

    Raises:
        ModelError: the network cannot run on such images.
    """
    model, sought = unwrap(model), read_target(target)
    specs = splittable_layers(model)
    seed = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=seed, dtype=torch.float32).to(images)
    met: list[list[list[Tensor]]] = []  # inputs of each layer, of images and of noise
    with undisturbed(model), torch.no_grad():  # if this fails, it is not for a gradient
        for seen in (images, noise):
            with _cuts(model, specs, Tensor.clone) as cuts:
                run_network(model, seen)
            met.append([cut.inputs for cut in cuts])
    seeing = [
        spec
        for spec, of_images, of_noise in zip(specs, *met, strict=True)
        # What is the same whatever the image are codes of positions and the like.
        if len(of_images) != len(of_noise) or not all(map(torch.equal, of_images, of_noise))
    ]
    return seeing if sought.value is None else _reaching(model, seeing, images, sought)


def usable_in(
    model: nn.Module, dataset: Dataset[Any], target: GivenTarget | Scalar = LABEL
) -> list[LayerSpec]:
    """The same by the first image of a data set that can be read."""
    image = first_readable(dataset, range(size_of(dataset)))
    if image is None:
        raise DataError("None of the first images can be read; mend the data set.")
    # Of two, as some networks lose the dimension of a single one, or take no single one.
    return usable_layers(model, torch.stack([image] * 2).to(device_of(model)), target)


@contextmanager
def _cuts(
    model: nn.Module, specs: list[LayerSpec], keep: Callable[[Tensor], Any]
) -> Iterator[list[Cut[Any]]]:
    with ExitStack() as stack:
        known = dict(with_projections(model))
        layers = [known[spec.name] for spec in specs]
        yield [stack.enter_context(cut_at(layer, keep)) for layer in layers]


def _reaching(
    model: nn.Module, specs: list[LayerSpec], images: Tensor, target: Scalar
) -> list[LayerSpec]:
    """Leave out layers on whose output the target does not depend, or the logits, of a class."""
    try:
        with undisturbed(model), torch.enable_grad(), _cuts(model, specs, id) as cuts:
            output = run_raw(model, images)
            value = None
            if not target.of_class:
                first = torch.zeros(len(images), dtype=torch.int64)
                value = target.of(output, first.to(images.device), first)
            if value is None or not value.requires_grad:  # as of a detector that sees nothing
                value = as_rows(output, len(images))
            for cut in cuts:
                cut.recording = False
            outputs = [output for cut in cuts for output in cut.outputs]
            gradients = iter(gradients_at(outputs, value.sum()) if outputs else ())
            reached = [any([next(gradients) is not None for _ in cut.outputs]) for cut in cuts]
    except (RuntimeError, CannotRun):  # what is written in place leaves no whole graph
        if len(specs) == 1:
            return []
        return [own for spec in specs for own in _reaching(model, [spec], images, target)]
    return [spec for spec, reaches in zip(specs, reached, strict=True) if reaches]
