"""A network compiled by torch for the time of a scan, hooks and all.

Only batches of one size run compiled, all others as they are written. So what is computed of an
image depends on its batch alone, not on which sizes a process happened to meet before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.errors import ModelError, brief

# The parts of a network that are alike share compiled code. Unless hooks are looked at, the part
# with the layer would run the code of one that has no hook, and nothing would be recorded.
_SETTINGS: dict[str, Any] = {
    "skip_nnmodule_hook_guards": False,
    # A part for each place that it has in the network; torch gives up after eight, and quietly.
    "recompile_limit": 2**16,
    "accumulated_recompile_limit": 2**16,
    "fail_on_recompile_limit_hit": True,
}


class Compiled(nn.Module):
    """A network that runs batches of one size compiled."""

    def __init__(self, model: nn.Module, batch_size: int) -> None:
        """Wrap a network; nothing is compiled before the first batch of that size."""
        super().__init__()
        self.model, self._batch_size = model, batch_size
        # Not as a part of this module, which would have every weight twice.
        self._run = [torch.compile(model, dynamic=False)]

    def forward(self, images: Tensor) -> Any:
        """Compute what the network puts out.

        Raises:
            ModelError: torch cannot compile the network here.
        """
        if len(images) != self._batch_size:
            return self.model(images)
        try:
            with torch.compiler.set_stance("default"):
                return self._run[0](images)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ModelError(
                f"The network cannot be compiled here ({brief(error)}); scan it without compiling."
            ) from None


@contextmanager
def compiled(model: nn.Module, batch_size: int) -> Iterator[nn.Module]:
    """Give the network with batches of one size compiled; what was compiled is forgotten after.

    Args:
        model: in the state in which it is to run, under `undisturbed`.
        batch_size: of the batches to compile for.
    """
    from torch._dynamo import config as dynamo
    from torch._dynamo import reset
    from torch._functorch import config as functorch

    reset()  # what was compiled before knows nothing of hooks
    try:
        # Gradients are asked for more than once, so buffers are not to be used for something else.
        with dynamo.patch(**_SETTINGS), functorch.patch(donated_buffer=False):
            yield Compiled(model, batch_size)
    finally:
        reset()
