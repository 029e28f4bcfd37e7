"""Whether a scan in bfloat16 would come to much the same: both formats on a few images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from unbraid.base.modes import drawing_alike, in_plain_modes
from unbraid.images.broken import Readable, sort_out
from unbraid.images.dataset import size_of, spaced
from unbraid.networks.copying import unwrap
from unbraid.networks.layers import describe, resolve_layer
from unbraid.networks.relevance import undisturbed
from unbraid.scanning.batch import Place, scan_batch
from unbraid.scanning.fields import Records
from unbraid.scanning.targets import LABEL, read_target

TAU = 0.03  # the smallest share that matters, as `find` takes it unless told otherwise


@in_plain_modes
def part_alike(model: nn.Module, layers: Sequence[str], dataset: Dataset[Any]) -> float | None:
    """Say what part of the uses of channels is the same in bfloat16 and as the network is.

    A use is an image and a channel that matters there, with a share of 0.03 or more of the
    predicted class; counted are those in either format, on some sixteen evenly spaced images. None
    where none of these can be read or nothing matters.
    """
    model, readable = unwrap(model), Readable(dataset)
    with drawing_alike():
        items = [readable[index] for index in spaced(size_of(dataset))]
    good, _ = sort_out(items, skip_broken=True)
    of_class: dict[str, Any] = {"labels": "predicted", "target": read_target(LABEL)}
    with undisturbed(model), torch.enable_grad():
        modules = dict(resolve_layer(model, name) for name in layers)
        places = [Place(module, describe(name, module)) for name, module in modules.items()]
        run = partial(scan_batch, model, places, good, positions=False, check=False, **of_class)
        as_it_is, in_bfloat16 = (
            [_uses(records) for records in run(min_share=TAU, autocast=autocast)]
            for autocast in (False, True)
        )
    pairs = list(zip(as_it_is, in_bfloat16, strict=True))
    n_either = sum(len(some | others) for some, others in pairs)
    return sum(len(some & others) for some, others in pairs) / n_either if n_either else None


def _uses(records: Records) -> set[tuple[int, int]]:
    """Images and channels of all shares."""
    image = records.index.repeat_interleave(records.share_start.diff())
    return set(zip(image.tolist(), records.share_channel.tolist(), strict=True))
