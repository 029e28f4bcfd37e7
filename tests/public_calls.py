"""Every public function, with sound values for what it must be given."""

import torch

import unbraid
from tiny_networks import SyntheticImages
from unsteady import Small


def sound_calls(folder):
    """Functions and arguments by name; those that write do so into a folder."""
    network, images = Small().eval(), SyntheticImages(17, dtype=torch.float32)
    chosen = {1: [[0], [1]], 2: [[2], [3]]}
    scans = unbraid.scan(network, ["layer", "stem"], images, folder / "scans", positions=True)
    founds = {name: unbraid.find(scan, channels=chosen) for name, scan in scans.items()}
    splits = {name: unbraid.split(scans[name], found) for name, found in founds.items()}
    scan, found, split = scans["layer"], founds["layer"], splits["layer"]
    changed = unbraid.apply(network, split)
    path = folder / "split.safetensors"
    split.save(path)
    data = {"model": network, "dataset": images}
    start, both = {"scan": scan, "found": found}, {"split": split, "scan": scan}
    ends = {"model2": changed, "dataset": images}
    tool = {"model": changed, "layer": "layer", "channel": 1, "concept": 0}
    alike = {**both, "dataset": images, "encoder": unbraid.Penultimate(network)}
    source = {**both, "channel": 1, "concept": 0}
    page = {**start, "split": split, "dataset": images, "path": folder / "page.html"}
    view = {"model": changed, "layer": "layer", "dataset": images, "channels": [1], "steps": 1}
    return {
        "scan": (unbraid.scan, {**data, "layer": "layer", "out": folder / "scan"}),
        "find": (unbraid.find, {"scan": scan}),
        "sensitivity": (unbraid.sensitivity, {"scan": scan}),
        "split": (unbraid.split, start),
        "published": (unbraid.split, {**start, "method": "published"}),
        "save": (split.save, {"path": folder / "again.safetensors"}),
        "evaluate": (unbraid.evaluate, both),
        "apply": (unbraid.apply, {"model": network, "split": split}),
        "plain": (unbraid.apply, {"model": network, "split": split, "form": "plain"}),
        "circuit": (unbraid.circuit, source),
        "circuit_from": (unbraid.circuit_from, {**source, **data, "before": splits["stem"]}),
        "ablate": (unbraid.ablate, ends),
        "explain": (unbraid.explain, {"model2": changed, "images": images, "n": 1}),
        "compare_outputs": (unbraid.compare_outputs, {**ends, "model": network}),
        "measure_semantics": (unbraid.measure_semantics, alike),
        "visualize": (unbraid.visualize, view),
        "gate": (unbraid.gate, {**tool, "value": 0.5}),
        "clamp": (unbraid.clamp, tool),
        "teaser_figure": (unbraid.teaser_figure, {**both, "channel": 1, "dataset": images}),
        "density_figure": (unbraid.density_figure, {**both, "channel": 1}),
        "source_figure": (unbraid.source_figure, {**both, "channel": 1}),
        "open_scan": (unbraid.open_scan, {"path": folder / "scans" / "layer"}),
        "load_split": (unbraid.load_split, {"model": network, "path": path}),
        "report": (unbraid.report, page),
    }


def call(function, **changes):
    """Call a function with some other arguments."""
    return function[0](**{**function[1], **changes})
