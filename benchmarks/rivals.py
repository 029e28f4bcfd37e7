"""Other ways to get one unit per concept from a layer, to be measured beside splitting.

A linear probe on the layer's pooled inputs (the ceiling of anything linear), PURE's clusters of
reference images (arXiv:2404.06453), and a sparse autoencoder on the layer's outputs. The probe and
PURE need scikit-learn, the autoencoder `overcomplete`. Shapes: N images, J taps, P positions,
K concepts, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.finding.findings import Concept, Findings
from unbraid.finding.membership import relevance_for_channel
from unbraid.measuring.formulas import auroc
from unbraid.networks.spec import tap_inputs
from unbraid.scanning.records import Scan
from unbraid.splitting.splits import Split

N_REFERENCE = 100  # images of a channel that PURE clusters
N_POSITIONS, N_EPOCHS, BATCH, RATE = 50_000, 5, 1024, 1e-3  # of training the autoencoder
_ALPHAS = tuple(10.0**e for e in range(-1, 6))  # among which the probe chooses


@dataclass(frozen=True)
class Images:
    """What a layer without groups meets in all images of a scan with positions."""

    scan: Scan
    label: Tensor  # (N,)
    pooled: Tensor  # (N, J), float64
    n_positions: Tensor  # (N,), float64
    taps: Tensor  # (N, J, P)
    grid: tuple[int, ...]  # output positions along each side

    @classmethod
    def of(cls, scan: Scan) -> Images:
        """Read them."""
        assert scan.layer.groups == 1
        parts = [records for records in scan.shards() if len(records)]
        maps = [r.input_map for r in parts if r.input_map is not None]
        taps = torch.cat([tap_inputs(scan.layer, m, 0) for m in maps])
        side = round(taps.shape[2] ** 0.5)
        square = len(scan.layer.kernel) == 2 and side**2 == taps.shape[2]
        return cls(
            scan,
            torch.cat([r.label for r in parts]),
            torch.cat([r.pooled[:, 0] for r in parts]).double(),
            torch.cat([r.n_positions for r in parts]).double(),
            taps,
            (side, side) if square else (taps.shape[2],),
        )

    def response(self, channel: int) -> Tensor:
        """Pooled pre-activations of a whole channel, (N,)."""
        row, bias = self.scan.weight[channel].double(), float(self.scan.bias[channel])
        return self.pooled @ row + self.n_positions * bias

    def concept(self, concepts: Sequence[Concept]) -> Tensor:
        """Which concept each image belongs to, (N,), -1 for none."""
        concept = torch.full_like(self.label, -1)
        for k, classes in enumerate(concepts):
            concept[torch.isin(self.label, torch.tensor(classes))] = k
        return concept

    def outputs(self, chosen: slice | Tensor) -> Tensor:
        """The layer's outputs in some images, (n, C_out, P)."""
        weight, bias = self.scan.weight.float(), self.scan.bias.float()
        return torch.einsum("njp,oj->nop", self.taps[chosen], weight) + bias[:, None]


@dataclass(frozen=True)
class Linear:
    """Units that are rows of their own on the layer's inputs."""

    rows: dict[int, Tensor]  # by channel, (K, J), float64
    bias: dict[int, Tensor]  # (K,), at every position
    n_bytes: int  # of what is kept
    split: Split | None = None
    in_units: bool = True  # whether answers are parts of the channel's own response

    def pooled(self, channel: int, images: Images) -> Tensor:
        """Answers summed over positions, (N, K)."""
        constant = images.n_positions[:, None] * self.bias[channel]
        return images.pooled @ self.rows[channel].T + constant

    def maps(self, channel: int, images: Images) -> Tensor:
        """Answers at positions, (N, K, P)."""
        z = torch.einsum("njp,kj->nkp", images.taps, self.rows[channel].float())
        return z + self.bias[channel].float()[:, None]


def of_masks(
    scan: Scan, masks: dict[int, Tensor], n_bytes: int, split: Split | None = None
) -> Linear:
    """Units that keep a part of a channel's weights."""
    rows = {o: m.double() * scan.weight[o].double() for o, m in masks.items()}
    bias = {o: scan.bias[o].double().expand(len(m)) for o, m in masks.items()}
    return Linear(rows, bias, n_bytes, split)


def fit_probe(train: Images, found: Findings) -> Linear:
    """One ridge regression per concept on the layer's pooled inputs, at its own strength."""
    from sklearn.linear_model import RidgeCV

    mean, spread = train.pooled.mean(0), train.pooled.std(0).clamp(min=1e-12)
    channels = sorted(found.concepts)
    wanted = torch.cat([_indicators(train, found.concepts[o]) for o in channels], 1)
    probe = RidgeCV(_ALPHAS, alpha_per_target=True)
    probe.fit(((train.pooled - mean) / spread).numpy(), wanted.numpy())
    rows = torch.from_numpy(probe.coef_) / spread
    constant = torch.from_numpy(probe.intercept_) - rows @ mean
    sizes = [len(found.concepts[o]) for o in channels]
    bias = (constant / train.n_positions.mean()).split(sizes)
    own = dict(zip(channels, rows.split(sizes), strict=True))
    n_bytes = 4 * (rows.numel() + len(rows))
    return Linear(own, dict(zip(channels, bias, strict=True)), n_bytes, in_units=False)


def _indicators(images: Images, concepts: Sequence[Concept]) -> Tensor:
    concept = images.concept(concepts)
    return (concept[:, None] == torch.arange(len(concepts))).double()


def best_units(scores: Tensor, concept: Tensor, n_concepts: int) -> list[int]:
    """For each concept (N,), the unit (N, U) that tells it best from all other images."""
    values = [[auroc(unit, concept == k) for unit in scores.T] for k in range(n_concepts)]
    return [int(np.argmax(own)) for own in values]


@dataclass(frozen=True)
class Pure:
    """Virtual channels: the channel's response where an image's nearest centre is the unit's."""

    centres: dict[int, Tensor]  # by channel, (K, C_in)
    chosen: dict[int, list[int]]  # the centre of each concept
    n_bytes: int
    split: None = None
    in_units: bool = True

    def pooled(self, channel: int, images: Images) -> Tensor:
        """Answers summed over positions, (N, K)."""
        return images.response(channel)[:, None] * self._here(channel, images)

    def maps(self, channel: int, images: Images) -> Tensor:
        """Answers at positions, (N, K, P)."""
        row, bias = images.scan.weight[channel].float(), float(images.scan.bias[channel])
        z = torch.einsum("njp,j->np", images.taps, row) + bias
        return z[:, None] * self._here(channel, images)[..., None]

    def _here(self, channel: int, images: Images) -> Tensor:
        near = nearest(images, channel, self.centres[channel])
        return near[:, None] == torch.tensor(self.chosen[channel])


def nearest(images: Images, channel: int, centres: Tensor) -> Tensor:
    """Which centre (K, C_in) is nearest to what fed the channel in each image, (N,)."""
    relevance = relevance_for_channel(images.scan, images.pooled, channel)
    return torch.cdist(relevance, centres).argmin(1)


def cluster_references(train: Images, found: Findings) -> dict[int, Tensor]:
    """Cluster what fed each channel in the images that excite it most, as many as concepts."""
    from sklearn.cluster import KMeans

    centres = {}
    for channel, concepts in found.concepts.items():
        order = train.response(channel).sort(descending=True, stable=True).indices[:N_REFERENCE]
        relevance = relevance_for_channel(train.scan, train.pooled[order], channel)
        means = KMeans(len(concepts), n_init=10, random_state=0).fit(relevance.numpy())
        centres[channel] = torch.from_numpy(means.cluster_centers_).double()
    return centres


def match_clusters(train: Images, found: Findings, centres: dict[int, Tensor]) -> Pure:
    """Give each concept the virtual channel that tells it best on the training images."""
    chosen = {}
    for channel, concepts in found.concepts.items():
        near = nearest(train, channel, centres[channel])
        here = near[:, None] == torch.arange(len(centres[channel]))
        scores = train.response(channel)[:, None] * here
        chosen[channel] = best_units(scores, train.concept(concepts), len(concepts))
    return Pure(centres, chosen, sum(4 * c.numel() for c in centres.values()))


@dataclass
class Autoencoder:
    """A trained TopK autoencoder, and the codes of image sets, few of which are not zero."""

    network: nn.Module
    scale: float
    n_units: int
    top_k: int
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def n_bytes(self) -> int:
        """Of its parameters."""
        return sum(p.numel() * p.element_size() for p in self.network.parameters())

    def codes(self, images: Images) -> tuple[Tensor, Tensor]:
        """Values and units of the codes that are kept, (N, P, k)."""
        if id(images) not in self.kept:
            parts = []
            with torch.no_grad():
                for start in range(0, len(images.label), 100):
                    x = images.outputs(slice(start, start + 100)).movedim(1, 2)
                    codes = self.network.encode(x.flatten(0, 1) / self.scale)[1]
                    parts.append([t.view(*x.shape[:2], -1) for t in codes.topk(self.top_k)])
            values, units = zip(*parts, strict=True)
            self.kept[id(images)] = torch.cat(values), torch.cat(units).short()
        return self.kept[id(images)]

    def pooled_codes(self, images: Images) -> Tensor:
        """Codes of all units summed over positions, (N, U)."""
        values, units = (t.flatten(1) for t in self.codes(images))
        return torch.zeros(len(values), self.n_units).scatter_add(1, units.long(), values)

    def reconstruct(self, outputs: Tensor) -> Tensor:
        """What is left of the layer's outputs, (n, C_out), behind the code."""
        return self.network(outputs / self.scale)[2] * self.scale


def train_autoencoder(train: Images, n_units: int, top_k: int) -> Autoencoder:
    """Train one on outputs at positions drawn at random from the images.

    Raises:
        ImportError: `overcomplete` is not installed.
    """
    import matplotlib

    if not hasattr(
        matplotlib.cm, "get_cmap"
    ):  # which overcomplete 0.3 asks of matplotlib below 3.9
        import matplotlib.pyplot as plt

        matplotlib.cm.get_cmap = plt.get_cmap
    from overcomplete.sae import TopKSAE, train_sae
    from torch.utils.data import DataLoader, TensorDataset

    draw = torch.Generator().manual_seed(0)
    n_each = max(1, N_POSITIONS // len(train.label))
    parts = []
    for start in range(0, len(train.label), 100):
        outputs = train.outputs(slice(start, start + 100)).movedim(1, 2)
        chosen = torch.rand(outputs.shape[:2], generator=draw).argsort(1)[:, :n_each]
        parts.append(outputs.gather(1, chosen[..., None].expand(-1, -1, outputs.shape[2])))
    x = torch.cat(parts).flatten(0, 1)
    scale = float(x.square().mean().sqrt())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = TopKSAE(x.shape[1], nb_concepts=n_units, top_k=top_k)
        loader = DataLoader(TensorDataset(x / scale), batch_size=BATCH, shuffle=True)
        optimiser = torch.optim.Adam(network.parameters(), lr=RATE)
        train_sae(network, loader, _squared_error, optimiser, nb_epochs=N_EPOCHS, monitoring=0)
    return Autoencoder(network.eval(), scale, n_units, top_k)


def _squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
    return (x - x_hat).square().mean()


@dataclass(frozen=True)
class Sparse:
    """Units of an autoencoder, one per concept."""

    autoencoder: Autoencoder
    chosen: dict[int, list[int]]
    n_bytes: int
    split: None = None
    in_units: bool = False

    def pooled(self, channel: int, images: Images) -> Tensor:
        """Answers summed over positions, (N, K)."""
        return self.maps(channel, images).sum(2, dtype=torch.float64)

    def maps(self, channel: int, images: Images) -> Tensor:
        """Answers at positions, (N, K, P)."""
        values, units = self.autoencoder.codes(images)
        own = [torch.where(units == u, values, 0).sum(2) for u in self.chosen[channel]]
        return torch.stack(own, 1)


def match_units(train: Images, found: Findings, autoencoder: Autoencoder) -> Sparse:
    """Give each concept the unit that tells it best on the training images."""
    scores = autoencoder.pooled_codes(train)
    rank = ranks(scores)  # once for all concepts
    chosen = {}
    for channel, concepts in found.concepts.items():
        concept = train.concept(concepts)
        of_concepts = [rank[concept == k].mean(0) for k in range(len(concepts))]
        chosen[channel] = [int(own.argmax()) for own in of_concepts]
    return Sparse(autoencoder, chosen, autoencoder.n_bytes)


def ranks(scores: Tensor) -> Tensor:
    """Mean rank of each image (N, U) among all; its mean over a concept orders units by AUROC."""
    from scipy.stats import rankdata

    return torch.from_numpy(rankdata(scores.numpy(), axis=0))


Fitted = Linear | Pure | Sparse
