"""A network whose parts torch compiles for the time of a scan.

Compiled are the largest parts that hold no layer to be recorded, so that nothing is cut or read
inside of what is compiled; what lies around them runs as written. And only batches of one size run
compiled, so that what is computed of an image depends on its batch alone, not on what a process
happened to meet before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.base.errors import ModelError

# Parts of a kind share their code, and each kind and size of input is compiled for itself; torch
# would give up after eight, quietly, and which eight would depend on who came first.
_SETTINGS: dict[str, Any] = {
    "recompile_limit": 2**16,
    "accumulated_recompile_limit": 2**16,
    "fail_on_recompile_limit_hit": True,
    "suppress_errors": False,  # else what cannot be compiled would quietly run as written
}


class Compiled(nn.Module):
    """A network that runs its compiled parts as such for batches of one size."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        """Wrap a network with compiled parts."""
        super().__init__()
        self.model, self._batch_size = model, batch_size

    def forward(self, images: Tensor) -> Any:
        """Compute what the network puts out.

        Raises:
            ModelError: torch cannot compile a part here.
        """
        whole = len(images) == self._batch_size
        try:
            with torch.compiler.set_stance("default" if whole else "force_eager"):
                return self.model(images)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ModelError(
                f"The network cannot be compiled here ({_first_line(error)}); scan it without "
                "compiling."
            ) from None


def _first_line(error: BaseException) -> str:
    """What a compiler's error says before it explains itself."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def compiled(model: nn.Module, layers: Sequence[nn.Module], batch_size: int) -> Iterator[nn.Module]:
    """Give the network with parts compiled; put everything back afterwards.

    What torch had compiled before, of whatever network, it compiles anew when it is used again.

    Args:
        model: in the state in which it is to run.
        layers: that are recorded.
        batch_size: of the batches to compile for.

    Raises:
        ModelError: the network holds parts that `torch.compile` made.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo import reset
    from torch._functorch import config as functorch

    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise ModelError(
                f"The network's {name!r} is compiled already; pass the network as it was before."
            )
    before = {module: vars(module).get("_compiled_call_impl") for module in model.modules()}
    reset()
    try:
        for module in before:
            module._compiled_call_impl = None
        for part in _parts(model, set(layers)):
            part.compile(dynamic=False)
        # Gradients are asked for more than once, so what they need is not to be written over.
        with dynamo.patch(**_SETTINGS), functorch.patch(donated_buffer=False):
            yield Compiled(model, batch_size)
    finally:
        for module, own in before.items():
            vars(module).pop("_compiled_call_impl", None)
            if own is not None:
                module._compiled_call_impl = own
        reset()


def _parts(module: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts of a network that are made of others and hold none of the layers."""
    for child in module.children():
        if next(child.children(), None) is None or isinstance(child, torch.jit.ScriptModule):
            continue
        called = type(child).forward is not nn.Module.forward  # as that of a list of modules is
        if called and layers.isdisjoint(child.modules()):
            yield child
        else:
            yield from _parts(child, layers)
