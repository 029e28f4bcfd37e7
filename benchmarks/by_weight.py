"""Find layers whose weights a network uses without running them, in every family of networks.

    python benchmarks/by_weight.py

Of each family of timm and torchvision the smallest network (as in zoo.py), with random weights, on
the smallest images that it takes; of torchvision's video networks a short clip. Printed are those
whose fully connected or convolutional layers are used by a torch function outside of their own
`forward`: which, by which function, and whether `unbraid layers` lists them all the same.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import warnings
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import zoo
from unbraid.networks.layers import PLAIN_LAYERS
from unbraid.scanning.scan import usable_layers

CLIP = (1, 3, 8, 56, 56)
BARE = {"__get__", "size", "dim", "is_floating_point", "numel", "to", "type"}  # that ask, or copy


class Uses(TorchFunctionMode):
    """Notes functions that take a layer's weight outside of its own forward."""

    def __init__(self, model: nn.Module) -> None:
        """Find the weights."""
        super().__init__()
        self.names, self.inside, self.ran = {}, [], set()
        self.found: dict[str, set[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, PLAIN_LAYERS):
                module.register_forward_pre_hook(self.enter)
                module.register_forward_hook(self.leave)
                self.names[id(module.weight)] = name

    def enter(self, module: nn.Module, _: Any) -> None:
        """A layer begins to run."""
        self.inside.append(module)
        self.ran.add(id(module.weight))

    def leave(self, *_: Any) -> None:
        """It has run."""
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what a function takes."""
        name = getattr(func, "__name__", str(func))
        for value in (*args, *(kwargs or {}).values()):
            known = self.names.get(id(value)) if isinstance(value, Tensor) else None
            if known is not None and not self.inside and name not in BARE:
                self.found.setdefault(known, set()).add(name)
        return func(*args, **(kwargs or {}))


def look(library: str, names: list[str]) -> list[str]:
    """Look at the smallest network of a family; say of each kind of such layers what there is."""
    name = min(names, key=zoo.size_of)
    torch.manual_seed(0)
    model = zoo.build(library, name)
    is_clip = name in torchvision.models.list_models(module=torchvision.models.video)
    size = CLIP if is_clip else (1, 3, *[zoo.smallest_size(model)] * 2)
    images = torch.randn(size)
    listed = {spec.name for spec in usable_layers(model, images)}
    uses = Uses(model)
    with torch.no_grad(), uses:
        model(images)
    never = {name for key, name in uses.names.items() if key not in uses.ran}
    told: dict[str, list[bool]] = {}
    for layer in dict.fromkeys([*uses.found, *never]):
        by = ", ".join(sorted(uses.found.get(layer, {"nothing"})))
        ran = "also runs" if layer not in never else "never runs"
        key = f"{name} {re.sub('[0-9]+', 'N', layer)}: {by}; {ran}"
        told.setdefault(key, []).append(layer in listed)
    return [f"{key}; listed {sum(found)} of {len(found)}" for key, found in told.items()]


def work(send: Any, library: str, names: list[str]) -> None:
    """Do it in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        send.send(look(library, names))
    except Exception as error:
        send.send([zoo.one_line(error)])


def main() -> None:
    """Go through all families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="families")
    parser.add_argument("--seconds", type=int, default=60, help="limit for one family")
    options = parser.parse_args()
    clips = torchvision.models.list_models(module=torchvision.models.video)
    known = {"timm": zoo.families("timm"), "torchvision": zoo.families("torchvision")}
    for name in clips:
        known["torchvision"][f"video {name}"] = [name]
    n_tried = 0
    for library, found in known.items():
        for family, names in found.items():
            if options.only and family not in options.only:
                continue
            n_tried += 1
            real = [name for name in names if not name.startswith("test_")]
            receive, send = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("fork").Process(
                target=work, args=(send, library, real)
            )
            process.start()
            send.close()
            try:
                rows = receive.recv() if receive.poll(options.seconds) else ["not done in time"]
            except EOFError:
                rows = ["killed"]
            process.kill()
            process.join()
            for row in rows:
                print(f"{library} {family}: {row}", flush=True)
    print(f"{n_tried} families")


if __name__ == "__main__":
    main()
