"""What `split` returns: new rows per channel, kept in one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.clustering import Cluster, Clusters
from unbraid.errors import RunError
from unbraid.files import read_tensors, write_tensors
from unbraid.findings import Concept
from unbraid.layers import LayerSpec, respond
from unbraid.notebook import Shown, html_table
from unbraid.tables import align, count

SCHEMA = 1


@dataclass(frozen=True, eq=False)
class ChannelSplit:
    """One channel's division among its concepts."""

    channel: int
    concepts: tuple[Concept, ...]
    masks: Tensor  # (K, J), in [0, 1]: how much of each tap a concept channel keeps
    weight: Tensor  # (J,), the original row
    bias: float  # stands in every row
    info: dict[str, Any]  # how the masks were chosen

    @property
    def rows(self) -> Tensor:
        """(K, J), the concept channels' weights."""
        return self.masks * self.weight

    @property
    def residual_row(self) -> Tensor:
        """(J,), what is subtracted so that the concept channels add up to the original."""
        return self.rows.sum(0) - self.weight

    def pooled_responses(self, pooled: Tensor, n_positions: Tensor) -> Tensor:
        """Compute pooled pre-activations from pooled inputs alone.

        Args:
            pooled: (N, J), of the channel's group.
            n_positions: (N,), output positions summed over.

        Returns:
            (N, K + 2), float64: the original channel, the concept channels, the residual channel.
        """
        rows = torch.cat([self.weight[None], self.rows, self.residual_row[None]]).double()
        bias = torch.tensor([self.bias] * (len(rows) - 1) + [self.residual_bias]).double()
        return pooled.double() @ rows.T + n_positions[:, None] * bias

    def response_maps(self, layer: LayerSpec, input_map: Tensor) -> Tensor:
        """Compute pre-activations position by position.

        Args:
            layer: the layer that was split.
            input_map: (N, C_in, positions ...), its input.

        Returns:
            (N, K + 1, positions ...), float64: the original channel, the concept channels.
        """
        rows = torch.cat([self.weight[None], self.rows]).double()
        bias = torch.full((len(rows),), self.bias).double()
        return respond(layer, input_map.double(), rows, bias, [self.channel] * len(rows))

    @property
    def residual_bias(self) -> float:
        """(K - 1) times the bias, since it stands in every row."""
        return (len(self.concepts) - 1) * self.bias


@dataclass(frozen=True, eq=False)
class Split(Shown):
    """Concept channels for one layer of one network."""

    layer: LayerSpec
    weights: str  # hash of the network that it was made for
    method: str
    settings: dict[str, Any]
    class_names: tuple[str, ...]
    channels: tuple[ChannelSplit, ...]
    clusters: Clusters = field(default_factory=dict)  # by number, where they stand for classes

    def __getitem__(self, channel: int) -> ChannelSplit:
        """Return the division of one channel.

        Raises:
            KeyError: the channel was not split.
        """
        for part in self.channels:
            if part.channel == channel:
                return part
        raise KeyError(f"channel {channel} was not split")

    def name(self, concept: Concept) -> str:
        """Name a concept by its classes."""
        known = self.class_names
        return ", ".join(known[c] if c < len(known) and known[c] else str(c) for c in concept)

    def __str__(self) -> str:
        """Show the concept channels as a table."""
        return f"{self._title}\n{align(self._rows())}"

    def _repr_html_(self) -> str:
        return html_table(self._rows(), title=self._title)

    @property
    def _title(self) -> str:
        return f"{self.method} split of {count(len(self.channels), 'channel')} of {self.layer.name}"

    def _rows(self) -> list[tuple[str, ...]]:
        """One row per concept channel: how much of the original's absolute weight it keeps."""
        rows: list[tuple[str, ...]] = [("channel", "concept", "classes", "weight kept")]
        for part in self.channels:
            whole = float(part.weight.abs().sum())
            for k, concept in enumerate(part.concepts):
                kept = float(part.rows[k].abs().sum()) / (whole or 1.0)
                rows.append((str(part.channel), str(k), self.name(concept), f"{kept:.0%}"))
        return rows

    def save(self, path: str | Path) -> None:
        """Write the split to one safetensors file; `docs/format.md` specifies it.

        Raises:
            RunError: the disk is full or may not be written.
        """
        tensors = {f"masks.{part.channel}": part.masks for part in self.channels}
        tensors["weight"] = torch.stack([part.weight for part in self.channels])
        tensors["bias"] = torch.tensor([part.bias for part in self.channels], dtype=torch.float64)
        for cluster in self.clusters.values():  # of one channel they share their centres
            tensors[f"centres.{cluster.channel}"] = cluster.centres
        about = {
            "schema": SCHEMA,
            "layer": self.layer.to_dict(),
            "weights": self.weights,
            "method": self.method,
            "settings": self.settings,
            "class_names": self.class_names,
            "channels": [
                {"channel": part.channel, "concepts": part.concepts, "info": part.info}
                for part in self.channels
            ],
            "clusters": {
                number: {"channel": c.channel, "place": c.place, "least": c.least}
                for number, c in self.clusters.items()
            },
        }
        write_tensors(Path(path), tensors, about)

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read a split from its file.

        Raises:
            RunError: the file is missing, damaged or not a split.
        """
        tensors, about = read_tensors(Path(path))
        try:
            if about["schema"] != SCHEMA:
                raise ValueError(f"schema {about['schema']}, this version reads {SCHEMA}")
            spec = LayerSpec.from_dict(about["layer"])
            channels = tuple(
                ChannelSplit(
                    channel=entry["channel"],
                    concepts=tuple(tuple(concept) for concept in entry["concepts"]),
                    masks=tensors[f"masks.{entry['channel']}"],
                    weight=tensors["weight"][n],
                    bias=float(tensors["bias"][n]),
                    info=entry["info"],
                )
                for n, entry in enumerate(about["channels"])
            )
            _check_shapes(spec, channels)
            clusters = {
                int(number): Cluster(**entry, centres=tensors[f"centres.{entry['channel']}"])
                for number, entry in about.get("clusters", {}).items()
            }
            return cls(
                layer=spec,
                weights=about["weights"],
                method=about["method"],
                settings=about["settings"],
                class_names=tuple(about["class_names"]),
                channels=channels,
                clusters=clusters,
            )
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise RunError(f"{path} is not a split that can be read ({error}).") from None


def _check_shapes(spec: LayerSpec, channels: tuple[ChannelSplit, ...]) -> None:
    for part in channels:
        masks, row = (len(part.concepts), spec.n_taps), (spec.n_taps,)
        there = part.channel in range(spec.n_out)
        if not there or part.masks.shape != masks or part.weight.shape != row:
            raise ValueError(f"channel {part.channel} does not fit its layer")
