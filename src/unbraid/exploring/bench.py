"""The bench: a channel's images, put into groups by hand, and what becomes of the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from unbraid.base.errors import UsageError
from unbraid.base.tables import one_line
from unbraid.finding.findings import Findings
from unbraid.finding.membership import mean_responses
from unbraid.measuring.evaluate import evaluate
from unbraid.measuring.results import ChannelEvaluation
from unbraid.running.folders import Thresholds
from unbraid.scanning.records import Scan
from unbraid.splitting.split import split as make_split
from unbraid.splitting.splits import ChannelSplit, Split

MOST_GROUPS = 9  # a key for each; more where the channel has more concepts
_LONGEST = 80  # characters of a group's name
_OF_EACH = 12  # images of each concept that the channel's own strongest may lack


@dataclass(frozen=True, eq=False)
class Laid:
    """The images on the bench, strongest first; n of them."""

    index: Tensor  # (n,), in the data set
    label: Tensor  # (n,)
    response: Tensor  # (n,), mean pre-activation of the whole channel
    group: Tensor  # (n,), the concept of the split that each belongs to, -1 for none


def part_of(split: Split | None, channel: int) -> ChannelSplit | None:
    """One channel's division; None where it was not split."""
    return next((p for p in split.channels if p.channel == channel), None) if split else None


def lay_out(scan: Scan, split: Split | None, channel: int, n: int) -> Laid:
    """Choose images of a scan for the bench: the channel's strongest, and some of each concept.

    Args:
        scan: of the images, mostly those for training.
        split: whose concepts of the channel are the groups to begin with; or none.
        channel: any of the layer.
        n: strongest images of the whole channel, or places, of an image one; of each concept some
            more come with them, and of a group that was put together by hand all.

    Raises:
        UsageError: the layer has no such channel.
    """
    check_channel(scan, channel)
    part, columns = part_of(split, channel), []
    for records in scan.light_shards():
        response = mean_responses(scan, records.pooled, records.n_positions, [channel])[:, 0]
        group = torch.full_like(records.label, -1)
        own = torch.zeros(len(records.label), 0, dtype=torch.float64)
        if split is not None and part is not None:
            group = split.members_in(scan).concept_of(records, part.concepts)
            pooled = records.pooled[:, scan.layer.group_of(channel)]
            own = part.pooled_responses(pooled, records.n_positions)[:, 1:-1]
        columns.append((records.index, records.label, response, group, own))
    index, label, response, group, own = map(torch.cat, zip(*columns, strict=True))
    of_places = bool(scan.manifest.places_of)
    image = torch.cat(list(scan.columns("image"))) if of_places else index
    by_hand = _groups_by_hand(scan, split, part)
    wanted = torch.isin(index, torch.tensor(sorted(by_hand), dtype=torch.int64))
    wanted[_one_of_each(image, response.argsort(descending=True, stable=True))[:n]] = True
    for k in range(own.shape[1]):
        members = (group == k).nonzero()[:, 0]
        order = members[own[members, k].argsort(descending=True, stable=True)]
        wanted[_one_of_each(image, order)[:_OF_EACH]] = True
    places = wanted.nonzero()[:, 0]
    places = places[response[places].argsort(descending=True, stable=True)]
    return Laid(index[places], label[places], response[places], group[places])


def _one_of_each(image: Tensor, order: Tensor) -> Tensor:
    """Keep the first of each image, whose other places show the same thing; (n,) of (N,)."""
    _, first = np.unique(image[order].numpy(), return_index=True)
    return order[np.sort(first)]


def _groups_by_hand(scan: Scan, split: Split | None, part: ChannelSplit | None) -> set[int]:
    """Images that a person put into groups of a channel before."""
    if split is None or part is None:
        return set()
    clusters = [split.clusters.get(number) for concept in part.concepts for number in concept]
    return {
        index
        for c in clusters
        if c is not None and c.images is not None and c.data == scan.manifest.data
        for index in c.images.tolist()
    }


def findings_of(split: Split) -> Findings:
    """What a split was made from, as far as it says."""
    tau, p, gamma = (float(split.settings.get(name, 0.0)) for name in ("tau", "p", "gamma"))
    return Findings(
        tau,
        p,
        gamma,
        pairs=(),
        concepts={part.channel: part.concepts for part in split.channels},
        class_names=split.class_names,
        hint="",
        layer=split.layer.name,
        weights=split.weights,
        clusters=split.clusters,
    )


def nothing_found(scan: Scan, thresholds: Thresholds) -> Findings:
    """What parting by hand begins with where nothing was split: no concepts of any channel."""
    return Findings(
        tau=0.0 if thresholds.tau == "auto" else thresholds.tau,  # which is no number before found
        p=thresholds.p,
        gamma=thresholds.gamma,
        pairs=(),
        concepts={},
        class_names=scan.class_names,
        hint="",
        layer=scan.layer.name,
        weights=scan.manifest.weights,
        scan=scan.manifest.scan_id,
    )


def part_by_hand(
    scan: Scan,
    before: Split | Findings,
    channel: int,
    groups: Sequence[Sequence[int]],
    names: Sequence[str] = (),
) -> Split:
    """Divide a channel among groups of images, and leave all other channels as they are.

    Args:
        scan: that the split was made from.
        before: the split to bring up to date; or findings, where there is none yet.
        channel: any of the layer.
        groups: images of each group, by index.
        names: of the groups; "" for one that is named by its classes.

    Raises:
        UsageError: there are less than two groups, or more than nine and than the channel has
            concepts, one is empty, an image is in two, two names are the same, or the layer has no
            such channel.
    """
    check_channel(scan, channel)
    earlier = before if isinstance(before, Split) else None
    found = before if isinstance(before, Findings) else findings_of(before)
    most = max(MOST_GROUPS, len(found.concepts.get(channel, ())))
    if len(groups) > most:
        raise UsageError(f"There are {len(groups)} groups; make at most {most}.")
    if len(groups) < 2 or not all(groups):
        raise UsageError("Put images into two groups or more, none of them empty, then split.")
    told = [one_line(name)[:_LONGEST].strip() for name in names]
    given = [name for name in told if name]
    if len(set(given)) < len(given):
        raise UsageError("Two groups have the same name; give each a name of its own, or none.")
    found = found.correct(scan, channel, groups=groups)
    every = list(found.class_names)
    for (number,), name in zip(found.concepts[channel], told, strict=False):
        every[number] = name or every[number]
    return make_split(scan, replace(found, class_names=tuple(every)), refit=earlier)


def measure(split: Split, scan: Scan, channel: int) -> ChannelEvaluation:
    """Measure one channel on validation images; UsageError if a concept has none of them."""
    (only,) = evaluate(alone(split, channel), scan).channels
    return only


def alone(split: Split, channel: int) -> Split:
    """The split of one of its channels only; KeyError if it is none."""
    return replace(split, channels=(split[channel],))


def check_channel(scan: Scan, channel: int) -> None:
    """Refuse what is no channel of a scan's layer."""
    if not 0 <= channel < scan.layer.n_out:
        raise UsageError(
            f"There is no channel {channel}; layer {scan.layer.name!r} has 0 to "
            f"{scan.layer.n_out - 1}."
        )
