"""Run a network again and again with other outputs of one layer, and only what that changes.

What lies before the layer is the same every time. So the first pass keeps the output of every
module that runs before it, and later passes are handed these where the module would compute. The
network's own code between the modules runs anew, whatever it is.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.errors import LayerError, ModelError
from unbraid.in_force import NOT_IN_FORCE
from unbraid.running import run_network


class Replay:
    """A network whose layer can be given other outputs; made by `replaying`."""

    def __init__(self, model: nn.Module) -> None:
        """Keep nothing yet."""
        self.shortened = False  # whether passes after the first leave out what lies before
        self._model = model
        self._kept: defaultdict[nn.Module, list[_Kept | None]] = defaultdict(list)  # call by call
        self._turn: Counter[nn.Module] = Counter()  # calls in this pass
        self._output: Tensor | None = None  # of the layer, in the first pass
        self._given: Tensor | None = None  # what the layer is to put out, None in the first pass
        self._n_reached = 0  # how often the layer ran in this pass
        self._within = False  # inside a module whose output will be kept

    def first(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Run the network on a batch as it is.

        A network may pass values past its modules, in place or by way of attributes. So whether a
        shortened pass computes the same logits, to the last bit, is tried at once; if it does not,
        later passes run in full.

        Returns:
            The logits, (N, T), and the layer's output.

        Raises:
            LayerError: the layer does not run exactly once.
            ModelError: the network cannot run on such images.
        """
        self._kept.clear()
        self._given = self._output = None
        logits = self._run(images)
        if self._n_reached == 0:
            raise LayerError(f"The layer runs 0 times in a forward pass, so {NOT_IN_FORCE}.")
        if self._n_reached != 1 or self._output is None:
            raise LayerError(
                f"The layer runs {self._n_reached} times in a forward pass, so its output is not "
                "one thing; choose a layer that runs once."
            )
        self.shortened = True
        try:
            same = torch.equal(self.again(images, self._output.clone()), logits)
        except ModelError:
            same = False
        self.shortened = same
        for kept in self._all_kept():
            kept.end_trial()
        return logits, self._output

    def again(self, images: Tensor, output: Tensor) -> Tensor:
        """Run the network on the images of `first` with another output of the layer.

        Args:
            images: the same.
            output: of the layer's shape; what follows may write into it.
        """
        self._given = output
        logits = self._run(images)
        # This pass is sound, the next would not be.
        self.shortened = self.shortened and not any(kept.spoilt for kept in self._all_kept())
        return logits

    def _run(self, images: Tensor) -> Tensor:
        self._turn.clear()
        self._n_reached, self._within = 0, False
        return run_network(self._model, images)

    def _all_kept(self) -> Iterator[_Kept]:
        return (kept for calls in self._kept.values() for kept in calls if kept is not None)

    def _at_layer(self, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(compute)
        def forward(*args: Any, **named: Any) -> Tensor:
            self._n_reached += 1
            if self._given is not None:
                return self._given
            output = compute(*args, **named)
            self._output = output.clone()
            return output

        return forward

    def _before_layer(self, module: nn.Module, compute: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute)
        def forward(*args: Any, **named: Any) -> Any:
            if self._n_reached or self._within:
                return compute(*args, **named)
            if self._given is None:
                return self._keep(module, lambda: compute(*args, **named))
            turn, calls = self._turn[module], self._kept[module]
            self._turn[module] += 1
            kept = calls[turn] if self.shortened and turn < len(calls) else None
            return compute(*args, **named) if kept is None else kept.hand_out()

        return forward

    def _keep(self, module: nn.Module, compute: Callable[[], Any]) -> Any:
        """Compute a module's output and keep a copy, since what follows may write into it."""
        self._within = True
        try:
            output = compute()
        finally:
            self._within = False
        if not self._n_reached:
            try:
                self._kept[module].append(_Kept(output))
            except Exception:  # an output of anyone's own kind, which cannot be copied
                self._kept[module].append(None)
        return output


class _Kept:
    """A module's output in the first pass.

    On trial it is handed out as a copy; a tensor that nothing wrote into is then lent as it is,
    which spares later passes the copying.
    """

    def __init__(self, output: Any) -> None:
        self._value = copy.deepcopy(output)
        self._tried: Tensor | None = None
        self._on_trial, self._lent = True, False
        self._version = 0  # torch counts how often a tensor was written into

    def hand_out(self) -> Any:
        if self._lent:
            return self._value
        made = copy.deepcopy(self._value)
        if self._on_trial and isinstance(made, Tensor):
            self._tried, self._version = made, made._version
        return made

    def end_trial(self) -> None:
        self._lent = self._tried is not None and self._tried._version == self._version
        self._tried, self._on_trial = None, False
        if self._lent:
            self._version = self._value._version

    @property
    def spoilt(self) -> bool:
        """Whether it was written into after all."""
        return self._lent and self._value._version != self._version


@contextmanager
def replaying(model: nn.Module, layer: nn.Module) -> Iterator[Replay]:
    """Make it possible to replay a network from a layer on; put everything back afterwards.

    Args:
        model: gives the same logits for the same images, so in eval mode.
        layer: one of its modules, which gives one tensor.
    """
    replay = Replay(model)
    inside = set(layer.modules())
    forwards: dict[nn.Module, Callable[..., Any]] = {layer: replay._at_layer(layer.forward)}
    for module in model.modules():
        if module not in inside and not any(part is layer for part in module.modules()):
            forwards[module] = replay._before_layer(module, module.forward)
    # A hook cannot leave out a module's computation; a `forward` of the instance's own can.
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield replay
    finally:
        for module, before in own.items():
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
