"""The published procedure for splitting polysemantic channels, as a plain script would do it.

The baseline for unbraid: Hesse et al. 2025 (arXiv:2504.12939), written without unbraid's code, with
its costs: the whole graph down to the image, one file per image, one backward pass per batch and
channel, one pass through the network per rho. A cost that the paper leaves open is kept low.

Datasets are map-style, of (image, int label), with a list `targets`; a label is also the index of
its logit. Layers are `nn.Conv2d` or `nn.Linear`. Models are in eval mode.
Needs nothing but unbraid.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from types import SimpleNamespace as Seen
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

Users = dict[int, list[int]]  # class -> the channels that it uses
Arvs = dict[tuple[int, int], Tensor]  # (channel, class) -> (C_in,), zero outside the group


class Pair(NamedTuple):
    """A channel that is polysemantic for two classes."""

    channel: int
    class1: int
    class2: int
    cosine: float


@dataclass
class PublishedResult:
    """What a run found; `rhos` and `tables` belong to the first `max_pairs` pairs."""

    pairs: list[Pair]
    rhos: list[float]
    tables: list[Tensor]  # (2, 3), per class the mean ratios of new 1, 2, residual; NaN for none
    seconds: dict[str, float]  # by step
    bytes_written: int


class _Reached(Exception):
    """Ends a forward pass at the layer."""


@contextmanager
def _watch(layer: nn.Module, beside: nn.Module | None = None, stop: bool = False) -> Iterator[Seen]:
    """Record the layer's input and output, and what `beside` makes of the same input."""
    seen = Seen()

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.x, seen.z = inputs[0], output
        if beside is not None:
            seen.beside = beside(inputs[0].detach())
        if stop:
            raise _Reached
        return output.clone()  # the next module may work in place

    with layer.register_forward_hook(hook), suppress(_Reached):
        yield seen


def _by_channel(layer: nn.Module, values: Tensor) -> Tensor:
    """Bring an input or output of the layer to (N, C, P)."""
    if isinstance(layer, nn.Linear):
        return values.reshape(len(values), -1, values.shape[-1]).transpose(1, 2)
    return values.flatten(2)


@dataclass
class Images:
    """Images, the network that sees them, and how it is run."""

    model: nn.Module
    layer_name: str
    dataset: Dataset
    batch_size: int
    save_views: bool

    @property
    def layer(self) -> nn.Module:
        """The layer that is looked at."""
        return self.model.get_submodule(self.layer_name)

    def batches(self, label: int | None = None) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield indices, images and labels, of one class where a label is given."""
        device, size = next(self.model.parameters()).device, self.batch_size
        indices = [i for i, t in enumerate(self.dataset.targets) if label is None or t == label]
        loader = DataLoader(Subset(self.dataset, indices), batch_size=size)
        for start, (images, labels) in zip(range(0, len(indices), size), loader, strict=True):
            yield indices[start : start + size], images.to(device), labels.to(device)


def _save(values: Tensor, indices: list[int], folder: Path, save_views: bool) -> int:
    """Save one file per image; a saved view takes the storage of its whole batch along."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:08d}.pt" for index in indices]
    for path, row in zip(paths, values, strict=True):
        torch.save(row if save_views else row.clone(), path)
    return sum(path.stat().st_size for path in paths)


def published_image_step(
    model: nn.Module, layer: nn.Module, images: Tensor, labels: Tensor
) -> Tensor:
    """Compute channel shares (N, C_out) of a batch, with the whole graph down to the image."""
    images = images.detach().clone().requires_grad_()
    with _watch(layer) as seen:
        target = model(images).gather(1, labels[:, None]).sum()
    gradient, _ = torch.autograd.grad(target, (seen.z, images))
    relevance = _by_channel(layer, seen.z.detach() * gradient).sum(2)  # over positions
    return relevance / relevance.clamp(min=0).sum(1, keepdim=True)


def scan_shares(train: Images, folder: Path) -> int:
    """Save the channel shares of every image to `folder`, and return the bytes written."""
    n_bytes = 0
    for indices, images, labels in train.batches():
        shares = published_image_step(train.model, train.layer, images, labels).cpu()
        n_bytes += _save(shares, indices, folder, train.save_views)
    return n_bytes


def find_users(folder: Path, targets: list[int], *, tau: float, p: float) -> Users:
    """Read the saved shares; a class uses a channel with share >= tau in >= p of its images."""
    matters: dict[int, list[Tensor]] = {label: [] for label in sorted(set(targets))}
    for index, label in enumerate(targets):
        shares = torch.load(folder / f"{index:08d}.pt", weights_only=True)
        matters[label].append(shares.double() >= tau)
    fractions = {label: torch.stack(rows).double().mean(0) for label, rows in matters.items()}
    return {label: (f >= p).nonzero().flatten().tolist() for label, f in fractions.items()}


def input_relevances(train: Images, users: Users, folder: Path) -> tuple[Arvs, int]:
    """Save each image's input relevances for its class's channels; return ARVs and bytes."""
    layer, arvs, n_bytes = train.layer, {}, 0
    for label, channels in filter(lambda item: item[1], users.items()):
        totals = dict.fromkeys(channels, 0.0)
        for indices, images, _ in train.batches(label):
            with _watch(layer, stop=True) as seen:
                train.model(images.requires_grad_())
            pooled = _by_channel(layer, seen.z).sum(2)
            for channel in channels:
                total = pooled[:, channel].sum()
                (gradient,) = torch.autograd.grad(total, seen.x, retain_graph=True)
                values = _by_channel(layer, seen.x.detach() * gradient).sum(2).cpu()
                n_bytes += _save(values, indices, folder / str(channel), train.save_views)
                totals[channel] += values.to(gradient.dtype).sum(0)
        for channel, total in totals.items():
            arvs[channel, label] = total / list(train.dataset.targets).count(label)
    return arvs, n_bytes


def find_pairs(arvs: Arvs, *, gamma: float) -> list[Pair]:
    """Find pairs of classes with a cosine below gamma; what was published lacks negative ones."""
    pairs = []
    for channel, keys in groupby(sorted(arvs), key=lambda key: key[0]):
        for key1, key2 in combinations(keys, 2):
            cosine = torch.cosine_similarity(arvs[key1], arvs[key2], dim=0).item()
            if cosine < gamma:
                pairs.append(Pair(channel, key1[1], key2[1], cosine))
    return pairs


def split_layer(layer: nn.Module, pair: Pair, arvs: Arvs, rho: float) -> nn.Module:
    """Make a layer of four rows: original, new channel 1, new channel 2, residual."""
    v1, v2 = arvs[pair.channel, pair.class1], arvs[pair.channel, pair.class2]
    set1 = rho * v1 > v2
    set2 = (rho * v2 > v1) & ~set1
    weight = layer.weight.detach()
    first = pair.channel * getattr(layer, "groups", 1) // len(weight) * weight.shape[1]
    rows = weight.new_zeros(4, len(v1), *weight.shape[2:])
    rows[:, first : first + weight.shape[1]] = weight[pair.channel]
    for row, emptied in enumerate((set2, set1, set1 | set2), start=1):
        rows[row, emptied] = 0
    new = copy.deepcopy(layer)
    new.weight = nn.Parameter(rows, requires_grad=False)
    new.groups = 1  # inputs of other groups have weight zero
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach()[pair.channel].repeat(4), requires_grad=False)
    return new


def choose_rho(train: Images, pair: Pair, arvs: Arvs) -> float:
    """Return the rho with the largest criterion."""
    rhos, criteria = [round(0.05 * step, 2) for step in range(1, 21)], []
    for rho in rhos:
        rows = split_layer(train.layer, pair, arvs, rho)
        criteria.append(0.0)
        for own, label in enumerate((pair.class1, pair.class2), start=1):
            ratios = []
            for _, images, _ in train.batches(label):
                with torch.no_grad(), _watch(train.layer, rows, stop=True) as seen:
                    train.model(images)
                rectified = _by_channel(train.layer, seen.beside).clamp(min=0).sum(2)
                ratios.append(rectified[:, own] / (rectified[:, 3 - own] + 1e-5))
            criteria[-1] += torch.cat(ratios).mean().item()
    return rhos[criteria.index(max(criteria))]


def evaluate_pair(val: Images, pair: Pair, arvs: Arvs, rho: float, tau: float) -> Tensor:
    """Measure the split on validation images, as a table of mean ratios (2, 3)."""
    rows = split_layer(val.layer, pair, arvs, rho)
    table = torch.empty(2, 3)
    for row, label in enumerate((pair.class1, pair.class2)):
        pooled, shares = [], []
        for _, images, labels in val.batches(label):
            with _watch(val.layer, rows) as seen:
                share = published_image_step(val.model, val.layer, images, labels)
            shares.append(share[:, pair.channel].cpu())
            pooled.append(_by_channel(val.layer, seen.beside).sum(2).cpu())
        sums, share = torch.cat(pooled), torch.cat(shares)
        table[row] = (sums[:, 1:] / sums[:, :1])[share >= tau].mean(0)
    return table


def run(
    model: nn.Module,
    layer_name: str,
    train_set: Dataset,
    val_set: Dataset,
    folder: str | Path,
    *,
    tau: float,
    p: float,
    gamma: float,
    batch_size: int,
    save_views: bool = True,
    max_pairs: int | None = None,
) -> PublishedResult:
    """Run the whole procedure, and time its steps."""
    model.eval()
    train, val = (
        Images(model, layer_name, images, batch_size, save_views) for images in (train_set, val_set)
    )
    seconds: dict[str, float] = {}

    def timed(step: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        answer = function(*args, **options)
        seconds[step] = seconds.get(step, 0.0) + time.perf_counter() - start
        return answer

    shares, inputs = Path(folder, "shares"), Path(folder, "relevances")
    n_bytes = timed("scan", scan_shares, train, shares)
    users = timed("users", find_users, shares, train_set.targets, tau=tau, p=p)
    arvs, n_more = timed("relevances", input_relevances, train, users, inputs)
    pairs = timed("pairs", find_pairs, arvs, gamma=gamma)
    rhos = [timed("rho", choose_rho, train, pair, arvs) for pair in pairs[:max_pairs]]
    tables = [
        timed("evaluate", evaluate_pair, val, pair, arvs, rho, tau)
        for pair, rho in zip(pairs, rhos, strict=False)
    ]
    return PublishedResult(pairs, rhos, tables, seconds, n_bytes + n_more)
