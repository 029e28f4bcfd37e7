"""What a run asks of the network after its scans, on one sample of the validation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from unbraid.base.errors import ModelError
from unbraid.base.tables import count
from unbraid.finding.findings import Findings
from unbraid.images.broken import UNLABELLED, first_readable
from unbraid.images.dataset import size_of
from unbraid.measuring.compare import OutputComparison, compare_outputs
from unbraid.measuring.encoders import Encoder, Penultimate, name_of_encoder
from unbraid.measuring.likeness import Semantics
from unbraid.measuring.one_pass import pass_once
from unbraid.measuring.semantics import look, measure_semantics
from unbraid.networks.copying import device_of, tensors_in, unwrap
from unbraid.networks.formats import kept_channels_last
from unbraid.networks.outputs import run_network
from unbraid.networks.relevance import undisturbed
from unbraid.running.folders import as_labelled, labels_as_scanned
from unbraid.running.sample import by_cosine, draw_sample
from unbraid.scanning.records import Scan
from unbraid.scanning.targets import Scalar
from unbraid.splitting.splits import Split
from unbraid.surgery.split_layer import SplitLayer

MAX_ABLATED = 32  # channels; each takes a pass from the layer on per concept, and two more
MAX_EMBEDDINGS = 20_000  # kept in memory; more are made in a pass of their own
MAX_PASSES = 5.0  # of the whole network for each image, which all of these may amount to


@dataclass(frozen=True)
class Networks:
    """A network, the same split, and what embeds images."""

    model: nn.Module
    model2: nn.Module
    encoder: Encoder


@dataclass(frozen=True)
class Measured:
    """What was found and split, and on which images it is measured."""

    found: Findings
    split: Split
    scan: Scan  # of all validation images
    images: Dataset[Any]  # these
    everything: bool  # on all of them, or on a sample
    target: Scalar  # of the scan
    places: Scan | None = None  # of these images, where the concepts are of places


def measure(
    nets: Networks, measured: Measured, say: Callable[[str], None], loading: dict[str, Any]
) -> dict[str, Any]:
    """Compare outputs, switch channels off and embed images: further arguments of `evaluate`."""
    scan, found = measured.scan, measured.found
    if measured.places is not None:
        return {"output": _compare(nets, measured, say, loading)}
    drawn = None if measured.everything else draw_sample(scan, found)
    indices: Sequence[int] = range(scan.manifest.n_images) if drawn is None else drawn
    if drawn is not None:
        switching = "" if measured.target.value is None else ", switching channels off"
        say(
            f"Comparing outputs{switching} and embedding on a sample of {len(drawn):,} of "
            f"{count(scan.manifest.n_images, 'validation image')}; --all takes all."
        )
    channels = by_cosine(found) if measured.everything else _affordable(nets.model2, measured)
    if measured.target.value is None:
        say("Without a target nothing is switched off.")
    elif len(channels) < len(found.concepts):
        say(
            f"Switching off only {count(len(channels), 'channel')} of {len(found.concepts):,}, "
            "those with the lowest cosines; --all takes all."
        )
    own: Penultimate | None = None  # whose embeddings come of the same pass
    if isinstance(nets.encoder, Penultimate) and len(indices) <= MAX_EMBEDDINGS:
        own = nets.encoder
    passed = pass_once(
        nets.model,
        nets.model2,
        measured.images,
        indices,
        encoder=own,
        channels=channels,
        scan=scan if found.clusters else None,
        labels=labels_as_scanned(scan),
        target=measured.target,
        progress=True,
        **loading,
    )
    output = passed.output if drawn is None else of_all(passed.output, scan)
    measures: dict[str, Any] = {"output": output, "ablation": passed.ablation}
    if passed.fault:
        say(f"Semantic measures are left out: {passed.fault}")
    elif own is not None:
        measures["semantics"] = _judge(measured, passed.index, passed.embeddings, own)
    else:
        del loading["skip_broken"]
        asked = (measured.split, scan, as_labelled(measured.images, scan), nets.encoder)
        try:
            semantics = measure_semantics(*asked, indices=drawn, progress=True, **loading)
            measures["semantics"] = semantics
        except ModelError as error:  # a network may have no features of its own
            if not isinstance(nets.encoder, Penultimate):
                raise
            say(f"Semantic measures are left out: {error}")
    return measures


def _compare(
    nets: Networks, measured: Measured, say: Callable[[str], None], loading: dict[str, Any]
) -> OutputComparison:
    """Compare outputs, which is all that can be done in whole images where concepts are not."""
    scan = measured.scan
    drawn = None
    if not measured.everything:
        drawn = draw_sample(scan, measured.found, measured.places)
    told = "From places nothing is switched off, and no semantic measures are taken."
    if drawn is not None:
        n = f"{len(drawn):,} of {count(scan.manifest.n_images, 'validation image')}"
        told = f"Comparing outputs on a sample of {n}; --all takes all. {told}"
    say(told)
    images = as_labelled(measured.images, scan)
    loading |= {"indices": drawn, "tolerance": 0.0, "target": measured.target, "progress": True}
    output = compare_outputs(nets.model, nets.model2, images, **loading)
    return output if drawn is None else of_all(output, scan)


def _judge(
    measured: Measured, index: Sequence[int], embeddings: Sequence[Tensor], encoder: Encoder
) -> Semantics:
    """Take semantic measures from embeddings of images of these indices."""
    looked = look(measured.split, measured.scan, index)
    # In the scan's order, which begins with a first look's images.
    by_index = dict(zip(index, embeddings, strict=True))
    rows = (by_index[image] for own in looked.shards() for image in own)
    scores, whole = looked.embed(rows)
    return looked.judge(name_of_encoder(encoder), scores, whole, {})


@contextmanager
def formatted_as(scan: Scan, *networks: nn.Module) -> Iterator[None]:
    """Run networks in the memory format of a scan, so that they are as fast as it was."""
    with ExitStack() as stack:
        for network in networks if scan.manifest.channels_last else ():
            stack.enter_context(kept_channels_last(unwrap(network)))
        yield


def of_all(output: OutputComparison, scan: Scan) -> OutputComparison:
    """Put the accuracy on all images, as scanned, in the place of that on a sample.

    The split network's is the same, since its outputs are the same bit for bit.
    """
    if not scan.manifest.is_classified:
        return output
    n_known = n_right = 0
    for own in scan.tensors("label", "prediction"):
        known = own["label"] != UNLABELLED
        n_known += int(known.sum())
        n_right += int((own["label"] == own["prediction"])[known].sum())
    if not n_known:
        return output
    return replace(output, top1_before=n_right / n_known, top1_after=n_right / n_known)


def _affordable(model2: nn.Module, measured: Measured) -> list[int]:
    """The channels to be switched off, lowest cosine first: at least one, and as many as fit."""
    image = first_readable(measured.images, range(size_of(measured.images)))
    each = 0.0 if image is None else part_behind(model2, image)
    chosen: list[int] = []
    spent = 0.0
    for channel in by_cosine(measured.found)[:MAX_ABLATED]:
        spent += each * (2 + len(measured.found.concepts[channel]))
        if chosen and spent > MAX_PASSES:
            break
        chosen.append(channel)
    return chosen


def part_behind(model2: nn.Module, image: Tensor) -> float:
    """What part of a network's work comes behind its split layer, by products and outputs."""
    work = [0, 0]  # before the layer ends, and behind
    behind = False

    def count_work(module: nn.Module, _: Any, output: Any) -> None:
        nonlocal behind
        if isinstance(module, SplitLayer):
            behind = True
            return
        weight = getattr(module, "weight", None)
        taps = weight[0].numel() if isinstance(weight, Tensor) and weight.dim() > 1 else 1
        work[behind] += taps * sum(tensor.numel() for tensor in tensors_in(output))

    modules = [*model2.modules()]
    with undisturbed(model2), ExitStack() as stack:
        for module in modules:
            scripted = isinstance(module, torch.jit.ScriptModule)  # which takes no hooks
            leaf = next(module.children(), None) is None
            if isinstance(module, SplitLayer) or (leaf and not scripted):
                stack.callback(module.register_forward_hook(count_work).remove)
        with torch.no_grad():
            run_network(model2, torch.stack([image] * 2).to(device_of(model2)))
    return work[True] / max(1, sum(work))
