"""Choose new rows for polysemantic channels: one concept channel per concept."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from statistics import median_low
from typing import Any, Literal, get_args

from torch import Tensor

from unbraid.base.arguments import as_kind
from unbraid.base.errors import UsageError
from unbraid.base.modes import in_plain_modes
from unbraid.base.progress import Progress
from unbraid.base.tables import count
from unbraid.finding.arv import averaged_relevance, class_sums, concept_mean
from unbraid.finding.find_options import check_rho
from unbraid.finding.findings import Findings
from unbraid.finding.membership import Members, same_clusters
from unbraid.scanning.records import Scan
from unbraid.splitting.cross_validation import choose_weights
from unbraid.splitting.least_squares import Weights, fit_least_squares
from unbraid.splitting.objective import UNSOLVED
from unbraid.splitting.published import choose_rho, published_masks
from unbraid.splitting.quantiles import with_quantiles
from unbraid.splitting.silence import choose_rest
from unbraid.splitting.splits import ChannelSplit, Split

Method = Literal["least_squares", "published"]
_Chosen = dict[int, tuple[Tensor, dict[str, Any]]]  # per channel, masks and how they were chosen


@in_plain_modes
def split(
    scan: Scan,
    found: Findings,
    *,
    method: Method = "least_squares",
    rho: float | None = None,
    start: Split | None = None,
    everything: Scan | None = None,
    refit: Split | None = None,
    progress: bool = False,
) -> Split:
    """Divide the incoming weights of every polysemantic channel among its concepts.

    Args:
        scan: of the training images. With `positions=True` (of `found.classes` is enough) least
            squares fits rectified responses too, and the published method can choose rho.
        found: channels and their concepts.
        method: "least_squares" fits how much of each tap to keep for each concept; "published" is
            the rule of Hesse et al. 2025.
        rho: for the published method, in (0, 1]; by default chosen per channel.
        start: for least squares, an earlier split of this layer to begin with; saves time.
        everything: a scan of all training images, where `scan` is of some. The published rule then
            takes from `scan` rho alone; channels of whose concepts it has no image take the median
            of the others' rho, with a warning. Quantiles of responses are of all these images.
        refit: for least squares, an earlier split made from this scan (and `everything`), to be
            brought up to date in a moment: channels whose concepts are as they were are taken from
            it, and all others are fitted with its lambda and omega in place of cross-validation.
            A split of another scan, such as that of a first look, is refused; one of an earlier
            version, which noted no scan, is taken with a warning.
        progress: show, on standard error, how far steps are that take longer than a moment.

    Returns:
        A Split for `unbraid.apply` and `unbraid.evaluate`.

    Raises:
        UsageError: nothing was found, rho is out of range, misplaced or cannot be chosen from this
            scan, the scan lacks images of a concept, `start` or `refit` is of another layer, or
            `refit` of another scan.
        DataError: what feeds a channel has numbers too far apart in size for least squares.

    Source:
        "Split" in docs/method.md.
    """
    as_kind("scan", scan, Scan)
    as_kind("found", found, Findings)
    if method not in get_args(Method):
        raise UsageError(f"There is no method {method!r}; use {' or '.join(get_args(Method))}.")
    if rho is not None and method != "published":
        raise UsageError("rho belongs to the published method; pass method='published' with it.")
    for name, earlier in {"start": start, "refit": refit}.items():
        if earlier is not None and method != "least_squares":
            raise UsageError(
                f"{name} belongs to least squares; leave it out for the published method."
            )
    rho = check_rho(rho)
    if method == "published" and rho is None and not scan.positions:
        raise UsageError(
            "The published criterion for rho needs positions: scan the training images again "
            "(those of the classes found will do) with positions=True and pass that scan, or give "
            "rho=0.7."
        )
    scans = [scan]
    if everything is not None:
        scans.append(as_kind("everything", everything, Scan))
    for own in scans:
        _check_layer(own, found)
    made_from = tuple(dict.fromkeys(own.manifest.scan_id for own in scans))
    weights, kept = (None, ()) if refit is None else _kept(scan, found, refit, made_from)
    done = {part.channel for part in kept}
    again = replace(found, concepts={o: own for o, own in found.concepts.items() if o not in done})
    for own in scans if method == "least_squares" else scans[-1:]:
        _check_images(own, again)
    members = again.members_in(scan)
    chosen: _Chosen = {}
    told = Progress(progress)
    if method == "published":
        chosen = _published(members, again, rho, scans[-1], told)
    elif again.concepts:
        chosen = _least_squares(members, again, scans[-1], start, weights, told)
    made = [
        ChannelSplit(
            channel=o,
            concepts=found.concepts[o],
            masks=masks.to(scan.weight.dtype),
            weight=scan.weight[o],
            bias=float(scan.bias[o]),
            info=info,
        )
        for o, (masks, info) in chosen.items()
    ]
    # What is kept keeps its quantiles; those of an older version have none yet, or have of places.
    stale = bool(scans[-1].manifest.places_of)
    known = [part for part in kept if part.quantiles is not None and not stale]
    made += [part for part in kept if part.quantiles is None or stale]
    parts = sorted([*known, *with_quantiles(scans[-1], made, told)], key=lambda part: part.channel)
    return Split(
        layer=scan.layer,
        weights=scan.manifest.weights,
        method=method,
        settings={"tau": found.tau, "p": found.p, "gamma": found.gamma},
        class_names=found.class_names,
        clusters=found.clusters,
        channels=tuple(parts),
        scans=made_from,
    )


def _kept(
    scan: Scan, found: Findings, earlier: Split, scans: tuple[str, ...]
) -> tuple[Weights, tuple[ChannelSplit, ...]]:
    """The weights of an earlier split, and its channels whose concepts are as they were."""
    as_kind("refit", earlier, Split).require(scan)
    # Masks, quantiles and weights of another scan would stand beside those of this one.
    if earlier.scans and earlier.scans != scans:
        raise UsageError(
            "refit is a split made from another scan, such as a first look; pass it as start, "
            "which begins there and fits all again."
        )
    if not earlier.scans:
        warnings.warn(
            "refit is a split of an earlier version, which did not note its scan; make sure that "
            "it was made from this one, or split again.",
            stacklevel=4,
        )
    # A channel of few images has a larger lambda than the layer's, hence the least.
    penalty = min((part.info.get("lambda", 0.0) for part in earlier.channels), default=0.0)
    silence = min((part.info.get("omega", 0.0) for part in earlier.channels), default=0.0)
    if not (0 < penalty < math.inf and 0 < silence < math.inf):
        raise UsageError(
            "refit is a split without lambda and omega; pass one by least squares, or none."
        )

    def is_same(part: ChannelSplit) -> bool:
        numbers = {number for concept in part.concepts for number in concept}
        before, now = (
            {n: c[n] for n in numbers & c.keys()} for c in (earlier.clusters, found.clusters)
        )
        return part.concepts == found.concepts.get(part.channel) and same_clusters(before, now)

    kept = tuple(part for part in earlier.channels if is_same(part))
    return Weights(penalty, silence), kept


def _check_layer(scan: Scan, found: Findings) -> None:
    """Raise unless something was found, in the layer of a scan."""
    if not found.concepts:
        raise UsageError(f"There is nothing to split: no channel was found. {found.hint}".strip())
    if (found.weights, found.layer) != (scan.manifest.weights, scan.layer.name):
        raise UsageError(
            f"The channels were found in layer {found.layer!r} of a network that this scan, of "
            f"layer {scan.layer.name!r}, is not of; pass a scan of the same network and layer."
        )


def _check_images(scan: Scan, found: Findings) -> None:
    """Raise unless a scan has images of all concepts."""
    for number, n_images in found.members_in(scan).count(found.classes).items():
        if not n_images:
            name = f"{'' if number in found.clusters else 'class '}{found.name(number)}"
            raise UsageError(
                f"The scan has no image of {name}, which a concept names; pass the scan that the "
                "findings were made from."
            )


def _published(
    members: Members,
    found: Findings,
    rho: float | None,
    everything: Scan,
    progress: Progress,
) -> _Chosen:
    scan, concepts = members.scan, found.concepts
    sums = class_sums(everything, [], found.clusters, progress)
    arvs = {
        o: [averaged_relevance(scan, o, concept_mean(sums, concept)) for concept in own]
        for o, own in concepts.items()
    }
    rhos = (
        choose_rho(members, concepts, arvs, progress) if rho is None else dict.fromkeys(arvs, rho)
    )
    if missing := arvs.keys() - rhos.keys():
        if not rhos:
            raise UsageError(
                "The scan with positions has no channel with images of all its concepts; scan more "
                "images, or give rho=0.7."
            )
        warnings.warn(
            f"The scan with positions lacks images of concepts of {count(len(missing), 'channel')},"
            " which take the median rho of the others; scan more images with positions.",
            stacklevel=3,
        )
        rhos |= dict.fromkeys(missing, median_low(rhos.values()))
    taps = scan.layer.taps_per_input
    return {o: (published_masks(arvs[o], rhos[o], taps), {"rho": rhos[o]}) for o in arvs}


def _least_squares(
    members: Members,
    found: Findings,
    everything: Scan,
    start: Split | None,
    weights: Weights | None,
    progress: Progress,
) -> _Chosen:
    scan, concepts = members.scan, found.concepts
    begin: dict[int, Tensor] = {}
    if start is not None:
        as_kind("start", start, Split)
        if (start.layer.name, start.layer.n_taps) != (scan.layer.name, scan.layer.n_taps):
            raise UsageError(
                f"start is a split of layer {start.layer.name!r}, the scan of "
                f"{scan.layer.name!r}; pass an earlier split of the same layer, or none."
            )
        parts = [p for p in start.channels if len(p.concepts) == len(concepts.get(p.channel, ()))]
        begin = {part.channel: part.masks for part in parts}
    others = found.members_in(everything)
    rest = (others, choose_rest(others, concepts, progress))
    weights = weights or choose_weights(members, concepts, rest, progress)
    fits = fit_least_squares(members, concepts, weights, rest, begin, progress)
    unsolved = [o for o, fit in fits.items() if fit.kkt_residual > UNSOLVED]
    if unsolved:
        warnings.warn(
            f"Masks of {count(len(unsolved), 'channel')}, such as {unsolved[0]}, are not the best "
            "ones: what feeds them is too small beside their biases, or too far apart in size, to "
            "compute with.",
            stacklevel=4,  # `split`, and what runs it in plain modes
        )
    return {
        o: (
            fit.masks,
            {
                "lambda": fit.weights.penalty,
                "omega": fit.weights.silence,
                "shrinkage": fit.shrinkage,
                "kkt_residual": fit.kkt_residual,
            },
        )
        for o, fit in fits.items()
    }
