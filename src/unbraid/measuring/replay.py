"""Run a network again with other outputs of a layer, without what lies before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.base.errors import LayerError, ModelError
from unbraid.networks.outputs import as_rows, run_raw
from unbraid.surgery.apply import NOT_IN_FORCE


@dataclass
class _Call:
    """What a module before the layer put out in the first pass."""

    module: nn.Module
    output: Tensor | None  # None where it must be computed again
    version: int  # torch counts how often a tensor was written into
    copied: bool  # handed out as a copy, which may be written into

    @property
    def version_now(self) -> int:
        return 0 if self.output is None else self.output._version

    @property
    def written(self) -> bool:
        return self.version_now != self.version


class Replay:
    """A network whose layer can be given other outputs; what lies before it is not run again."""

    def __init__(self, model: nn.Module) -> None:
        """Take a network as `replaying` has prepared it."""
        self._model = model
        self._calls: list[_Call] = []  # before the layer, in the first pass
        self._copied: set[int] = set()  # which of them are kept as copies
        self._place = 0  # among them, in this pass
        self._output: Tensor | None = None  # of the layer, in the first pass
        self.raw: Any = None  # what the network put out in the last pass
        self._given: Tensor | None = None  # what the layer is to put out, None in the first pass
        self._n_reached = 0  # how often the layer ran in this pass
        self._within = False  # inside a module that is one of the calls
        self._shortened = False  # whether passes leave out the calls

    def first(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on a batch as it is; return the logits and the layer's output."""
        # A network may pass values past its modules, in place or by way of attributes. So it is
        # tried whether a shortened pass gives the same logits, to the last bit: with all outputs
        # as they are now, else with copies of those that were written into, as they were before.
        # Else passes run in full.
        logits = self._keep(images)
        raw = self.raw
        written = {place for place, call in enumerate(self._calls) if call.written}
        for place in written:
            self._calls[place].version = self._calls[place].version_now
        if not self._try(images, logits) and written:
            self._copied |= written
            self._try(images, self._keep(images))
        assert self._output is not None
        self.raw = raw  # not that of a pass that was tried
        return logits, self._output

    def _keep(self, images: Tensor) -> Tensor:
        """Run the network in full, and keep what its modules put out."""
        self._calls, self._output, self._shortened = [], None, False
        logits = self.again(images, None)
        if self._output is None:
            raise LayerError(f"The layer runs 0 times in a forward pass, so {NOT_IN_FORCE}.")
        if self._n_reached > 1:
            raise LayerError(
                f"The layer runs {self._n_reached} times in a forward pass, so its output is not "
                "one thing; choose a layer that runs once."
            )
        return logits

    def _try(self, images: Tensor, logits: Tensor) -> bool:
        """Shorten passes from now on, if that gives the same logits."""
        assert self._output is not None
        self._shortened = True
        try:
            same = torch.equal(self.again(images, self._output.clone()), logits)
            same = same and self._n_reached == 1
        except ModelError:
            same = False
        self._shortened = self._shortened and same
        return self._shortened

    def again(self, images: Tensor, output: Tensor | None) -> Tensor:
        """Run the network on the images of `first` with another output of the layer."""
        self._given, self._within = output, False
        self._place = self._n_reached = 0
        self.raw = run_raw(self._model, images)
        logits = as_rows(self.raw, len(images))
        if any(call.written for call in self._calls):
            self._shortened = False  # this pass is sound, the next would not be
        return logits

    def call_layer(self, compute: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
        """Take the place of the layer's forward."""
        self._n_reached += 1
        if self._given is not None:
            return self._given
        output = compute(*args, **named)
        self._output = output.clone()
        return output

    def call(self, module: nn.Module, compute: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Take the place of another module's forward."""
        if self._n_reached or self._within:
            return compute(*args, **named)
        if self._shortened and self._place < len(self._calls):
            call = self._calls[self._place]
            self._place += 1
            if call.module is module and call.output is not None:
                return call.output.clone() if call.copied else call.output
        self._within = True
        try:
            output = compute(*args, **named)
        finally:
            self._within = False
        if self._given is None and not self._n_reached:
            self._calls.append(self._kept(module, output))
        return output

    def _kept(self, module: nn.Module, output: Any) -> _Call:
        if not isinstance(output, Tensor) or output.is_inference():
            return _Call(module, None, 0, copied=False)
        copied = len(self._calls) in self._copied
        kept = output.clone() if copied else output
        return _Call(module, kept, kept._version, copied)


@contextmanager
def replaying(model: nn.Module, layer: nn.Module) -> Iterator[Replay]:
    """Make it possible to replay a network, in eval mode, from a layer on; put all back."""
    replay = Replay(model)
    forwards: dict[nn.Module, Callable[..., Any]] = {
        module: partial(replay.call, module, module.forward)
        for module in set(model.modules()) - set(layer.modules())
        if not any(part is layer for part in module.modules())
    }
    forwards[layer] = partial(replay.call_layer, layer.forward)
    # A hook cannot leave out a module's computation; a `forward` of the instance's own can.
    own = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield replay
    finally:
        for module, before in own.items():
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
