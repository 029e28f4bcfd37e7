"""A run's network with concept channels off or scaled: as files, and a page of what changed."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from unbraid.base.errors import OutputChangedError, RunError, UsageError, brief
from unbraid.base.files import write_whole
from unbraid.base.modes import in_plain_modes
from unbraid.base.tables import count
from unbraid.images.broken import first_readable
from unbraid.measuring.before_after import BeforeAfter, compare_before_after
from unbraid.networks.copying import device_of
from unbraid.networks.models import LoadedModel
from unbraid.networks.outputs import as_logits, run_network
from unbraid.reporting.before_after import before_after_page
from unbraid.reporting.pictures import sight_of
from unbraid.running.finished import Run
from unbraid.running.folders import refuse_folder
from unbraid.running.network import load_again, network_images
from unbraid.scanning.scan_options import Loading
from unbraid.surgery.edit import check_edit, edit

MOST_IMAGES = 5000  # spread evenly over the validation images
STATE, PROGRAM, ONNX = "network.safetensors", "network.pt2", "network.onnx"
PAGE, FIGURES = "before_after.html", "edit.json"
_CLOSE = 1e-4  # of the largest logit: what another runtime may round away


@dataclass(frozen=True)
class Edited:
    """What an edit leaves."""

    model: nn.Module
    changes: BeforeAfter
    page: Path
    files: tuple[Path, ...]  # of the network


@in_plain_modes
def edit_run(
    run: Run,
    scales: Mapping[str, float],
    out: Path,
    *,
    loading: Loading,
    everything: bool = False,
    network: LoadedModel | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Edited:
    """Edit a run's network, measure what changed, and write files and page into a folder.

    Args:
        run: a finished one.
        scales: as `unbraid.edit` takes them.
        out: a folder, which gets files of these names again.
        loading: how images go through the network.
        everything: compare on all validation images instead of 5,000.
        network: the run's, by default loaded as the run's folder tells.
        say: told of each step, and of what is left out.
    """
    if run.settings.target != "label":
        raise UsageError(
            f"The page of an edit counts classes, and the run's target {run.settings.target!r} is "
            "of none; unbraid.edit makes the network in Python, unbraid.ablate tells what it loses."
        )
    refuse_folder(out)
    split, loaded = run.split, network or load_again(run.settings.source)
    model, images = loaded.model, network_images(run, loaded)
    edited = edit(model, split, scales)
    every = run.val_scan.manifest.n_images
    chosen = range(0, every, 1 if everything else math.ceil(every / MOST_IMAGES))
    if len(chosen) < every:
        say(
            f"Comparing on {count(len(chosen), 'validation image')} of {every:,}, spread evenly; "
            "--all compares on all."
        )
    first, last = (first_readable(images, own) for own in (chosen, chosen[::-1]))
    if first is None or last is None:
        raise RunError("None of the run's validation images that were tried can be read.")
    example = torch.stack([first, last])
    check_edit(model, split, scales, edited, example)
    options: dict[str, Any] = {**vars(loading), "progress": True}
    options["batch_size"] = loading.batch_size or run.val_scan.manifest.batch_size
    changes = compare_before_after(model, edited, images, indices=chosen, **options)
    contents = _contents(edited, example, say)
    for name in (PAGE, FIGURES, ONNX, PROGRAM, STATE):  # those of an earlier edit
        (out / name).unlink(missing_ok=True)
    for name, content in contents.items():
        write_whole(out / name, content)
    about = {"scales": dict(scales), "split": split.layer.name, **changes.to_dict()}
    write_whole(out / FIGURES, (json.dumps(about, indent=2) + "\n").encode())
    page = before_after_page(
        changes,
        title=run.settings.title,
        edits=describe_scales(run, scales),
        dataset=run.images,
        sight=sight_of(run.images),
        predicted=run.val_scan.manifest.labels == "predicted",
        files=list(contents),
    )
    write_whole(out / PAGE, page.encode("utf-8", "backslashreplace"))
    return Edited(edited, changes, out / PAGE, tuple(out / name for name in contents))


def describe_scales(run: Run, scales: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Of each edit the concept channel, what its concept is, and what was done, in words."""
    told = []
    for name, scale in scales.items():
        channel, _, concept = name.partition(".")
        part = run.split[int(channel)]
        what = (
            "what no concept names"
            if concept == "rest"
            else run.split.name(part.concepts[int(concept)])
        )
        told.append((name, what, "off" if scale == 0 else f"times {scale:g}"))
    return told


def _contents(edited: nn.Module, example: Tensor, say: Callable[[str], None]) -> dict[str, bytes]:
    """The network's files: state dict, exported program, ONNX; what cannot be made is told."""
    state = {k: v.detach().cpu().contiguous().clone() for k, v in _tensors(edited).items()}
    contents = {STATE: safetensors.torch.save(state)}
    try:
        program, images = _export(edited, example)
        _check_same(program.module()(images), edited, images)
    except Exception as error:  # torch's, of any kind, of a network of anyone's own
        say(f"{PROGRAM} and {ONNX} are left out: torch.export fails ({brief(error)}).")
        return contents
    file = io.BytesIO()
    torch.export.save(program, file)
    contents[PROGRAM] = file.getvalue()
    if not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        say(f"{ONNX} is left out, as it takes more; pip install 'unbraid[onnx]'.")
        return contents
    try:
        content = _as_onnx(program)
        _check_same(_run_onnx(content, images), edited, images)
        contents[ONNX] = content
    except Exception as error:  # of exporter or runtime, likewise
        say(f"{ONNX} is left out: {brief(error)}.")
    return contents


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _export(model: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, Tensor]:
    """Export for any number of images, or, where the network allows none, for one; with such."""
    images = example.to(device_of(model))
    try:
        free = ({0: torch.export.Dim.DYNAMIC},)
        return torch.export.export(model.eval(), (images,), dynamic_shapes=free), images
    except Exception:  # as where code asks for the number of images
        return torch.export.export(model.eval(), (images[:1],)), images[:1]


def _as_onnx(program: torch.export.ExportedProgram) -> bytes:
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _run_onnx(content: bytes, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {entry.name: images.cpu().numpy()})[0])


def _check_same(output: Any, edited: nn.Module, images: Tensor) -> None:
    """Raise if logits are not the network's, but for what another runtime may round away."""
    with torch.no_grad():
        expected = run_network(edited, images).cpu()
    found = as_logits(output, len(images)).detach().cpu()
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _CLOSE:
        raise OutputChangedError(f"its logits differ by {difference:.2g} of the largest")
