"""Which layers of a network can be scanned: seen by running it once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, cast, get_args, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.arguments import (
    MAX_WORKERS,
    as_path,
    flag,
    real_number,
    whole_number,
    whole_numbers,
)
from unbraid.base.errors import DataError, ModelError, UsageError, brief
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import say
from unbraid.base.schema import parse_json
from unbraid.images.dataset import UNLABELLED, class_names_of, first_readable, labels_of, size_of
from unbraid.images.identity import as_recorded, fingerprint, preprocessing_of
from unbraid.networks.copying import device_of, unwrap
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
from unbraid.networks.outputs import picked_by, run_network
from unbraid.networks.relevance import cut_at, gradients_at, undisturbed
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
from unbraid.scanning.manifest import MAX_THREADS, Manifest, hash_places, read_manifest
from unbraid.scanning.records import Scan, open_scan
from unbraid.scanning.shards import Target, claim_together, library_versions, scan_shards
from unbraid.scanning.team import team as gather_team

# What a scan is asked for: its options, checked and in plain types before anything is run.


Labels = Literal["given", "predicted"]

MIN_SHARE = 0.005  # with shares adding up to one, at most 200 an image; a few dozen in practice


class Options(TypedDict, total=False):
    """The options of `unbraid.scan`, which tells what they mean."""

    labels: Labels
    classes: Sequence[int] | None
    indices: Sequence[int] | None
    positions: bool
    min_share: float
    batch_size: int | None
    workers: int
    skip_broken: bool
    progress: bool
    source: dict[str, Any] | None
    threads: int | None
    autocast: bool
    channels_last: bool


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of a scan in plain types, which a manifest can hold."""

    labels: Labels = "given"
    classes: tuple[int, ...] | None = None  # in order, each once, as are the following
    indices: tuple[int, ...] | None = None
    positions: bool = False
    min_share: float = MIN_SHARE
    batch_size: int | None = None
    workers: int = 0
    skip_broken: bool = False
    progress: bool = False
    source: dict[str, Any] | None = None
    threads: int | None = None
    autocast: bool = False
    channels_last: bool = False


_FLAGS = ("positions", "skip_broken", "progress", "autocast", "channels_last")


def settle(**options: Unpack[Options]) -> Asked:
    """Check options, all by themselves, and bring them to plain types.

    Raises:
        UsageError: one is out of range or of another type, or two exclude each other.
    """
    asked = Asked(**cast(dict[str, Any], options))  # as it was given
    classes, indices = asked.classes, asked.indices
    batch_size, threads = asked.batch_size, asked.threads
    if asked.labels not in get_args(Labels):
        known = " or ".join(map(repr, get_args(Labels)))
        raise UsageError(f"labels is {asked.labels!r}; use {known}.")
    min_share = real_number("min_share", asked.min_share)
    if not 0 < min_share < 1:
        raise UsageError(f"min_share is {min_share}; it must lie between 0 and 1.")
    if classes is not None and indices is not None:
        raise UsageError("classes and indices both say what to scan; pass one of them.")
    flags: dict[str, Any] = {name: flag(name, getattr(asked, name)) for name in _FLAGS}
    return replace(
        asked,
        classes=None if classes is None else _in_order(whole_numbers("classes", classes)),
        indices=None if indices is None else _in_order(whole_numbers("indices", indices)),
        min_share=min_share,
        batch_size=None if batch_size is None else whole_number("batch_size", batch_size, 1),
        workers=whole_number("workers", asked.workers, 0, MAX_WORKERS),
        source=_as_json(asked.source),
        threads=None if threads is None else whole_number("threads", threads, 1, MAX_THREADS),
        **flags,
    )


def _in_order(numbers: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(set(numbers)))


def _as_json(source: Any) -> dict[str, Any]:
    """What comes back from a manifest that holds it."""
    try:
        plain = {} if source is None else parse_json(json.dumps(source, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"source cannot be written as JSON ({brief(error)}); give a dictionary of texts, "
            "numbers, and lists and dictionaries of them."
        ) from None
    if not isinstance(plain, dict):
        raise UsageError(f"source is a {type(source).__name__}; give a dictionary, or None.")
    return plain


def places_of(asked: Asked, labels: Sequence[int]) -> list[int]:
    """Places in the data set of the images to scan, in order.

    Args:
        asked: options.
        labels: given ones of all images, `UNLABELLED` for none.

    Raises:
        UsageError: there is no such place or no image of such a class, or labels are to be taken as
            given where there are none.
    """
    if asked.labels == "given" and set(labels) == {UNLABELLED}:
        raise UsageError("The data set has no labels; pass labels='predicted'.")
    if asked.indices is not None:
        places = list(asked.indices)
        if not places or places[0] < 0 or places[-1] >= len(labels):
            raise UsageError(
                f"indices must name places in the data set, 0 to {len(labels) - 1}, one or more."
            )
        return places
    if asked.classes is None:
        return list(range(len(labels)))
    wanted = set(asked.classes)
    empty = wanted - set(labels)
    if not wanted:
        raise UsageError("classes is empty; name the classes to scan, or None for all.")
    if empty:
        raise UsageError(f"classes names {sorted(empty)}, of which the data set has no image.")
    return [index for index, label in enumerate(labels) if label in wanted]


def refuse_impossible(manifest: Manifest) -> None:
    """Raise where the scan, once finished, would be refused on reading.

    Raises:
        UsageError: it would be.
    """
    try:
        Manifest.from_json(manifest.to_json())
    except ValueError as error:
        raise UsageError(
            f"A scan of layer {manifest.layer.name!r} would be too large to work with ({error}); "
            "scan a smaller layer, or images of fewer classes."
        ) from None


# One pass of a network over images: the only step that runs it over the data.


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


@in_plain_modes
def scan(
    model: nn.Module,
    layer: LayerName | Sequence[LayerName],
    dataset: Dataset[Any],
    out: str | Path,
    *,
    labels: Labels = "given",
    classes: Sequence[int] | None = None,
    indices: Sequence[int] | None = None,
    positions: bool = False,
    min_share: float = MIN_SHARE,
    batch_size: int | None = None,
    workers: int = 0,
    skip_broken: bool = False,
    progress: bool = False,
    source: dict[str, Any] | None = None,
    threads: int | None = None,
    autocast: bool = False,
    channels_last: bool = False,
) -> Scan | dict[str, Scan]:
    """Run a network over images once and keep one small record per image.

    Started again with the same arguments it goes on where it stopped; a finished shard is not
    computed again. Processes that torchrun starts share the work (docs/scale.md). The network is
    used in eval mode, on the device that it is on, and left exactly as it was.

    Args:
        model: gives logits (N, T) for a batch of images, or (N,) or (N, 1) to tell two classes
            apart; `unbraid.with_logits` picks them out of a larger output.
        layer: a convolution or fully connected layer, by `named_modules()` name or itself. Several
            layers, as a list, are scanned in the same pass; a pattern such as "layer4.*.conv3",
            alone or in a list, stands for all layers of such names that can be scanned.
        dataset: map-style, of (image tensor, label). Its `groups`, one id for each image, may say
            which belong together, such as crops of one photograph; none is then judged by another.
            Its `ids`, a text for each, name images for good, whatever their order (docs/data.md).
        out: folder for the records; of several layers, each has a folder of its name in it.
        labels: "predicted" takes each image for what the network takes it for, whatever the data
            set's label, so data sets without labels will do (any number stands for a label).
        classes: scan only images with these given labels.
        indices: scan only the images at these places in the data set.
        positions: also keep the layer's input maps, which the published rho criterion and the
            rectified measures need.
        min_share: the smallest share kept; thresholds below it need a new scan.
        batch_size: images per forward pass; by default that of the scan which goes on, else what
            2 GiB, or a quarter of an accelerator's memory, are sure to hold, at most 64 or 256.
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
        channels_last: keep the weights of 2-D convolutions channels last meanwhile, which is
            faster on most devices; a network that is so already needs no telling.

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
        METHOD.md sections 2 and 4.
    """
    model = unwrap(model)
    out = as_path("out", out)
    if isinstance(layer, (str, nn.Module)) or not isinstance(layer, Iterable):
        asked, one = [layer], not is_pattern(model, layer)
    else:
        asked, one = list(layer), False
    names = layer_names(model, asked, partial(usable_in, model, dataset))
    scans = scan_into(
        model,
        {name: out if one else layer_folder(out, name) for name in names},
        dataset,
        labels=labels,
        classes=classes,
        indices=indices,
        positions=positions,
        min_share=min_share,
        batch_size=batch_size,
        workers=workers,
        skip_broken=skip_broken,
        progress=progress,
        source=source,
        threads=threads,
        autocast=autocast,
        channels_last=channels_last,
    )
    return scans[names[0]] if one else scans


def scan_into(
    model: nn.Module,
    folders: Mapping[str, Path],
    dataset: Dataset[Any],
    **options: Unpack[Options],
) -> dict[str, Scan]:
    """Scan several layers in one pass, each into a folder of its own; the rest is as in `scan`."""
    asked = settle(**options)
    model = unwrap(model)
    modules = {name: resolve_layer(model, name)[1] for name in folders}
    specs = {name: describe(name, module) for name, module in modules.items()}
    refuse_broken_weights(model)
    size_of(dataset)
    given = labels_of(dataset, needed=asked.labels == "given" or asked.classes is not None)
    places = places_of(asked, given)
    weights, data = hash_weights(model), fingerprint(dataset, given)
    begun = next(filter(None, map(read_manifest, folders.values())), None)  # a scan that goes on
    threads, batch_size = asked.threads, asked.batch_size
    if threads is None:
        threads = begun.threads if begun else torch.get_num_threads()
    # So that a data set of something else is told before anything is written.
    image = first_readable(dataset, places) if begun is None else None
    if batch_size is None and begun:
        batch_size = begun.batch_size
    elif batch_size is None:
        batch_size = batch_size_for(model, list(modules.values()), image)
    names, preprocessing = class_names_of(dataset), preprocessing_of(dataset)
    if begun and as_recorded(preprocessing, begun.preprocessing):
        warnings.warn(
            "The scan was begun by a version that did not see changes of a transform's own code; "
            "make sure that it is still the same.",
            stacklevel=2,
        )
        preprocessing = begun.preprocessing
    targets = []
    for name, folder in folders.items():
        manifest = Manifest(
            weights=weights,
            layer=specs[name],
            data=data,
            n_images=len(places),
            class_names=names,
            preprocessing=preprocessing,
            dtype=str(weight_rows(modules[name]).dtype).removeprefix("torch."),
            min_share=asked.min_share,
            classes=asked.classes,
            positions=asked.positions,
            # Input maps are large, pooled inputs are not.
            shard_size=128 if asked.positions else 1024,
            batch_size=batch_size,
            skip_broken=asked.skip_broken,
            source=asked.source or {},
            versions=library_versions(),
            labels=asked.labels,
            indices=hash_places(asked.indices),
            output=picked_by(model),
            threads=threads,
            autocast=asked.autocast,
            channels_last=asked.channels_last,
        )
        refuse_impossible(manifest)
        targets.append(Target(modules[name], manifest, folder))
    team = gather_team()
    claim_together(targets, team)
    tell = partial(_tell_fit, preprocessing=targets[0].manifest.preprocessing, aloud=asked.progress)
    part = asked.classes is not None or asked.indices is not None
    # Input maps of a part are asked for after a scan of all, which has told.
    tells = asked.labels == "given" and team.first and not (asked.positions and part)
    at_start = tells and not begun and len(places) >= LONG
    if at_start:
        tell(sampled_accuracy(model, dataset, places, batch_size))
    work: dict[str, Any] = {"team": team, "workers": asked.workers, "progress": asked.progress}
    scan_shards(model, targets, dataset, given, places, **work)
    finished = {name: open_scan(folder) for name, folder in folders.items()}
    for done in finished.values():
        if len(done.broken()) == len(places):
            raise DataError(f"None of the {len(places)} images could be read; mend the data set.")
    if tells and not at_start:
        tell(scanned_accuracy(next(iter(finished.values()))))
    return finished


def _tell_fit(accuracy: Accuracy | None, preprocessing: str, *, aloud: bool) -> None:
    """Say how often the network is right, and warn where it does not fit labels or images."""
    if accuracy is None:
        return
    if aloud:
        say(describe_fit(accuracy, preprocessing))
    if accuracy.warning:
        warnings.warn(accuracy.warning, stacklevel=5)


# Which layers of a network can be scanned: seen by running it once.


@in_plain_modes
def usable_layers(model: nn.Module, images: Tensor) -> list[LayerSpec]:
    """List the layers that can be split, see these images, and reach the logits.

    Args:
        model: as `unbraid.scan` takes it.
        images: (N, C, H, W), on the network's device; one will do.

    Returns:
        The layers in the network's order.

    Raises:
        ModelError: the network cannot run on such images, or gives no logits.
    """
    model = unwrap(model)
    specs = splittable_layers(model)
    with undisturbed(model), torch.no_grad():
        specs = _seeing(model, specs, images)  # if this fails, it is not for a gradient
    try:
        return _reaching(model, specs, images)
    except (RuntimeError, ModelError):  # what is written in place leaves no whole graph
        return [spec for spec in specs if _reaches(model, spec, images)]


def _seeing(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> list[LayerSpec]:
    """Leave out layers that meet the same whatever the image, such as for codes of positions."""
    noise = torch.randn(
        images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(images)
    met, met_too = _inputs(model, specs, images), _inputs(model, specs, noise)
    return [spec for spec in specs if not _same(met[spec.name], met_too[spec.name])]


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(torch.equal(*pair) for pair in pairs)


def _inputs(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> dict[str, list[Tensor]]:
    """What each layer meets, run by run."""
    met: dict[str, list[Tensor]] = {spec.name: [] for spec in specs}

    def keep(name: str, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        met[name].append((args[0] if args else next(iter(named.values()))).clone())

    with ExitStack() as stack:
        for name in met:
            module = model.get_submodule(name)
            hook = module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
            stack.callback(hook.remove)
        run_network(model, images)
    return met


def usable_in(model: nn.Module, dataset: Dataset[Any]) -> list[LayerSpec]:
    """List the layers that can be scanned, by the first image of a data set that can be read.

    Raises:
        DataError: none of the first images can be read.
        ModelError: the network cannot run on it, or gives no logits.
    """
    image = first_readable(dataset, range(size_of(dataset)))
    if image is None:
        raise DataError("None of the first images can be read; mend the data set.")
    # Of two, as some networks lose the dimension of a single one, or take no single one.
    return usable_layers(model, torch.stack([image] * 2).to(device_of(model)))


def _reaches(model: nn.Module, spec: LayerSpec, images: Tensor) -> bool:
    try:
        return bool(_reaching(model, [spec], images))
    except (RuntimeError, ModelError):
        return False


def _reaching(model: nn.Module, specs: list[LayerSpec], images: Tensor) -> list[LayerSpec]:
    with ExitStack() as stack, torch.inference_mode(False), torch.enable_grad():
        stack.enter_context(undisturbed(model))
        cuts = [
            stack.enter_context(cut_at(model.get_submodule(spec.name), lambda _: None))
            for spec in specs
        ]
        logits = run_network(model, images)
        for cut in cuts:
            cut.recording = False
        outputs = [output for cut in cuts for output in cut.outputs]
        gradients = iter(gradients_at(outputs, logits.sum()) if outputs else ())
        reached = [any([next(gradients) is not None for _ in cut.outputs]) for cut in cuts]
    return [spec for spec, reaches in zip(specs, reached, strict=True) if reaches]
