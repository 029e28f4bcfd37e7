"""Records of a part of a shard, put together batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.errors import DataError
from unbraid.layers import LayerSpec
from unbraid.records import Records


def no_records(spec: LayerSpec, positions: bool) -> Records:
    """Records of no image: what remains of a batch in which every image was broken."""
    none = torch.zeros(0, dtype=torch.int64)
    return Records(
        index=none,
        label=none,
        prediction=none,
        n_positions=none,
        pooled=torch.zeros(0, spec.groups, spec.n_taps, dtype=torch.float32),
        share_start=torch.zeros(1, dtype=torch.int64),
        share_channel=none.to(torch.int32),
        share_value=torch.zeros(0, dtype=torch.float32),
        broken=none,
        input_map=torch.zeros(0, spec.n_in, *(0 for _ in spec.kernel), dtype=torch.float32)
        if positions
        else None,
    )


def join_records(parts: Sequence[Records]) -> Records:
    """Put the records of a shard's batches into one."""
    some = [part for part in parts if len(part)] or list(parts[:1])
    starts = [0]
    for part in some:
        starts += (part.share_start[1:] + starts[-1]).tolist()
    maps = [part.input_map for part in some if part.input_map is not None]

    def cat(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in some])

    try:
        input_map = torch.cat(maps) if maps else None
    except RuntimeError:
        raise DataError(
            "Images of different sizes give input maps of different sizes, which positions=True "
            "cannot keep; bring all to one size in the data set's transform."
        ) from None
    return Records(
        index=cat("index"),
        label=cat("label"),
        prediction=cat("prediction"),
        n_positions=cat("n_positions"),
        pooled=cat("pooled"),
        share_start=torch.tensor(starts, dtype=torch.int64),
        share_channel=cat("share_channel"),
        share_value=cat("share_value"),
        broken=torch.cat([part.broken for part in parts]),
        input_map=input_map,
    )
