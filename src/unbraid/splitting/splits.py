"""What `split` returns: new rows per channel, kept in one safetensors file."""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.base.arguments import as_path
from unbraid.base.errors import UsageError
from unbraid.base.files import read_tensors, write_tensors
from unbraid.base.modes import in_plain_modes
from unbraid.base.schema import build, check_schema, in_range, unread
from unbraid.base.tables import Table, Tabular, count, percent
from unbraid.finding.findings import Concept
from unbraid.finding.membership import ClusterEntry, Clusters, Members, name_of, pack, unpack
from unbraid.networks.spec import LayerSpec, respond, widen
from unbraid.scanning.fields import sound_figures
from unbraid.scanning.manifest import MAX_CLASSES, most_classes
from unbraid.scanning.records import Scan

SCHEMA = 1
N_QUANTILES = 201  # one every half percent, from the smallest to the largest


@dataclass(frozen=True, eq=False)
class ChannelSplit:
    """One channel's division among its concepts."""

    channel: int
    concepts: tuple[Concept, ...]
    masks: Tensor  # (K, J), in [0, 1]: how much of each tap a concept channel keeps
    weight: Tensor  # (J,), the original row
    bias: float  # stands in every row
    info: dict[str, Any]  # how the masks were chosen
    # (K + 1, N_QUANTILES), of the mean pre-activations of the original, then the concept channels,
    # among the images of the scan; None in splits of earlier versions
    quantiles: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """(K, J), the concept channels' weights."""
        return self.masks * self.weight

    @property
    def residual_row(self) -> Tensor:
        """(J,), what is subtracted so that the concept channels add up to the original."""
        return self.rows.sum(0) - self.weight

    @property
    def rest_row(self) -> Tensor:
        """(J,), the rest channel's weights: what no concept channel keeps of the original."""
        return -self.residual_row

    def pooled_responses(self, pooled: Tensor, n_positions: Tensor) -> Tensor:
        """Pooled pre-activations of original, concepts, residual: (N, J) to (N, K + 2)."""
        rows = torch.cat([self.weight[None], self.rows, self.residual_row[None]]).double()
        biases = [self.bias] * (len(rows) - 1) + [self.residual_bias]
        bias = torch.tensor(biases, dtype=widen(self.weight).dtype).double()
        return pooled.double() @ rows.T + n_positions[:, None] * bias

    def response_maps(self, layer: LayerSpec, input_map: Tensor) -> Tensor:
        """Pre-activations of original and concepts: (N, C_in, ...) to (N, K + 1, ...)."""
        rows = torch.cat([self.weight[None], self.rows]).double()
        bias = torch.full((len(rows),), self.bias, dtype=torch.float64)
        return respond(layer, input_map.double(), rows, bias, [self.channel] * len(rows))

    @property
    def residual_bias(self) -> float:
        """(K - 1) times the bias, since it stands in every row."""
        return (len(self.concepts) - 1) * self.bias

    @property
    def rest_bias(self) -> float:
        """1 - K times the bias: concept channels and rest channel add up to the original."""
        return -self.residual_bias


@dataclass(frozen=True, eq=False)
class Split(Tabular):
    """Concept channels for one layer of one network.

    `split[1660]` is one channel: its concepts, `masks` (K, J) in [0, 1], `rows` (K, J), `rest_row`
    (J,) and their biases. `save` keeps it in a file, `Split.load` reads that.

    Attributes:
        layer: what the layer computes.
        weights: hash of the network that it was made for.
        method: "least_squares" or "published".
        settings: thresholds and options that it was made with.
        class_names: by number.
        channels: the split channels.
        clusters: by number, where they stand for classes.
        scans: ids of the scans that it was made from; earlier versions noted none.
    """

    layer: LayerSpec
    weights: str  # hash of the network that it was made for
    method: str
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    channels: tuple[ChannelSplit, ...]
    clusters: Clusters = field(default_factory=dict)  # by number, where they stand for classes
    scans: tuple[str, ...] = ()  # `scan_id` of what it was made from; earlier versions noted none

    def __getitem__(self, channel: int) -> ChannelSplit:
        """Return the division of one channel; KeyError if it was not split."""
        for part in self.channels:
            if part.channel == channel:
                return part
        raise KeyError(f"channel {channel} was not split")

    def members_in(self, scan: Scan) -> Members:
        """Say which images of a scan of this layer belong to which class or cluster."""
        return Members(scan, self.clusters)

    def require(self, scan: Scan) -> None:
        """Refuse, with a UsageError, a scan of another network or layer."""
        if scan.manifest.weights != self.weights or scan.layer != self.layer:
            raise UsageError(
                "The scan is of another network or layer than the split; scan the images with the "
                "network and layer that were split."
            )

    def name(self, concept: Concept) -> str:
        """Name a concept by its classes."""
        return ", ".join(name_of(self.class_names, number) for number in concept)

    def table(self) -> Table:
        """Show of each concept channel how much of the original's absolute weight it keeps."""
        rows: list[tuple[str, ...]] = [("channel", "concept", "classes", "weight kept")]
        for part in self.channels:
            whole = float(part.weight.abs().sum())
            for k, concept in enumerate(part.concepts):
                kept = float(part.rows[k].abs().sum()) / (whole or 1.0)
                rows.append((str(part.channel), str(k), self.name(concept), percent(kept)))
        n_channels = count(len(self.channels), "channel")
        title = f"{self.method} split of {n_channels} of {self.layer.name}"
        return Table(rows, title, all_in="Split.channels has all")

    @in_plain_modes
    def save(self, path: str | Path) -> None:
        """Write the split to one safetensors file (docs/format.md).

        Raises:
            RunError: the disk is full or may not be written.
        """
        parts = self.channels
        tensors = {f"masks.{part.channel}": part.masks for part in parts}
        tensors["weight"] = torch.stack([part.weight for part in parts])
        tensors["bias"] = torch.tensor([part.bias for part in parts], dtype=torch.float64)
        tensors |= {
            f"quantiles.{part.channel}": part.quantiles
            for part in parts
            if part.quantiles is not None
        }
        of_clusters, clusters = pack(self.clusters)
        tensors |= of_clusters
        about = {
            "schema": SCHEMA,
            "layer": asdict(self.layer),
            "weights": self.weights,
            "method": self.method,
            "settings": self.settings,
            "class_names": self.class_names,
            "channels": [
                {"channel": p.channel, "concepts": p.concepts, "info": p.info} for p in parts
            ],
            "clusters": clusters,
            "scans": self.scans,
        }
        write_tensors(as_path("path", path), tensors, about)

    @classmethod
    @in_plain_modes
    def load(cls, path: str | Path) -> Split:
        """Read a split from its file.

        Raises:
            RunError: the file is missing, damaged or not a split.
        """
        tensors, about = read_tensors(as_path("path", path))
        try:
            check_schema(about, SCHEMA)
            return _put_together(build(_About, about), tensors)
        except (KeyError, ValueError) as error:
            raise unread(error, f"{path} is not a split that can be read ({error}).") from None


@dataclass(frozen=True)
class _ChannelEntry:
    channel: int
    concepts: tuple[Concept, ...]
    info: dict[str, float]


@dataclass(frozen=True)
class _About:
    schema: int
    layer: LayerSpec
    weights: str
    method: str
    settings: dict[str, float]
    class_names: tuple[str, ...]
    channels: tuple[_ChannelEntry, ...]
    clusters: dict[int, ClusterEntry] = field(default_factory=dict)
    scans: tuple[str, ...] = ()
    crc32: dict[str, int] = field(default_factory=dict)


def _put_together(about: _About, tensors: dict[str, Tensor]) -> Split:
    """Make a Split of a file's description and tensors; ValueError or KeyError if it cannot be."""
    spec, n_names = about.layer, len(about.class_names)
    spec.check()
    for name, tensor in tensors.items():
        if not name.startswith("images.") and not sound_figures(tensor):
            raise ValueError(f"{reprlib.repr(name)} is not of finite numbers")
    weight, bias, n_channels = tensors["weight"], tensors["bias"], len(about.channels)
    if (weight.shape, bias.shape) != ((n_channels, spec.n_taps), (n_channels,)):
        raise ValueError("weight and bias do not fit the layer")
    if len({entry.channel for entry in about.channels}) < n_channels:
        raise ValueError("a channel stands there twice")
    in_range("the number of class_names", n_names, 0, most_classes(spec))
    in_range("tau", about.settings.get("tau", math.inf), 0, 1)
    channels = []
    for entry, row, own_bias in zip(about.channels, weight, bias.tolist(), strict=True):
        o, concepts, masks = entry.channel, entry.concepts, tensors[f"masks.{entry.channel}"]
        in_range("a channel", o, 0, spec.n_out - 1)
        numbers = [number for concept in concepts for number in concept]
        if len(concepts) < 2 or not all(concepts) or len(set(numbers)) < len(numbers):
            raise ValueError(f"the concepts of channel {o} are not two or more groups")
        for number in numbers:
            in_range("a class", number, 0, MAX_CLASSES - 1)
        if masks.shape != (len(concepts), spec.n_taps) or masks.min() < 0 or masks.max() > 1:
            raise ValueError(f"the masks of channel {o} do not fit its layer")
        quantiles = tensors.get(f"quantiles.{o}")
        if quantiles is not None and (
            quantiles.shape != (len(concepts) + 1, N_QUANTILES) or (quantiles.diff() < 0).any()
        ):
            raise ValueError(f"the quantiles of channel {o} do not fit it")
        channels.append(ChannelSplit(o, concepts, masks, row, own_bias, entry.info, quantiles))
    for number, own in about.clusters.items():
        in_range("a cluster's number", number, 0, n_names - 1)  # named like classes
        in_range("a cluster's channel", own.channel, 0, spec.n_out - 1)
    return Split(
        layer=spec,
        weights=about.weights,
        method=about.method,
        settings=about.settings,
        class_names=about.class_names,
        channels=tuple(channels),
        clusters=unpack(about.clusters, tensors, spec.n_in_per_group),
        scans=about.scans,
    )
