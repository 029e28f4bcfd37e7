"""Choose new rows for polysemantic channels: one concept channel per concept.

Shapes: K concepts, J taps; see METHOD.md sections 3 to 5.
"""

from __future__ import annotations

from typing import Literal

from unbraid.errors import UsageError
from unbraid.find import averaged_relevance, class_sums, concept_mean
from unbraid.findings import Findings
from unbraid.published import choose_rho, published_masks
from unbraid.records import Scan
from unbraid.splits import ChannelSplit, Split

Method = Literal["published"]


def split(
    scan: Scan,
    found: Findings,
    *,
    method: Method = "published",
    rho: float | None = None,
) -> Split:
    """Divide the incoming weights of every polysemantic channel among its concepts.

    Args:
        scan: of the training images. To choose rho it must have been made with
            `positions=True` (of `found.classes` is enough); with `rho` given any scan will do.
        found: channels and their concepts.
        method: "published" is the rule of Hesse et al. 2025: an input channel is taken from
            concept k if it is more relevant for another by a factor 1 / rho.
        rho: one value in (0, 1] for all channels; by default the published criterion chooses one
            per channel.

    Returns:
        A Split for `unbraid.apply` and `unbraid.evaluate`.

    Raises:
        UsageError: nothing was found, rho is out of range or cannot be chosen from this scan, or
            the scan lacks images of a concept.

    Source:
        METHOD.md section 3; for more than two concepts see `published.published_masks`.
    """
    if method != "published":
        raise UsageError(f"There is no method {method!r}; use method='published'.")
    if not found.concepts:
        raise UsageError(f"There is nothing to split: no channel was found. {found.hint}".strip())
    if rho is not None and not 0 < rho <= 1:
        raise UsageError(f"rho is {rho:g}; it must lie above 0 and not above 1.")
    if rho is None and not scan.positions:
        raise UsageError(
            "The published criterion for rho needs positions: scan the training images again with "
            "positions=True, classes=found.classes and pass that scan, or give rho=0.7."
        )
    if max(found.channels) >= scan.layer.n_out:
        raise UsageError(
            f"Layer {scan.layer.name!r} has no channel {max(found.channels)}, which the findings "
            "name; pass the scan that they were made from."
        )
    sums = class_sums(scan, [])
    for label in found.classes:
        if label >= len(sums.n_images) or sums.n_images[label] == 0:
            raise UsageError(
                f"The scan has no image of class {found.name(label)}, which a concept names; pass "
                "the scan that the findings were made from."
            )
    arvs = {
        o: [averaged_relevance(scan, o, concept_mean(sums, concept)) for concept in concepts]
        for o, concepts in found.concepts.items()
    }
    rhos = dict.fromkeys(arvs, rho) if rho is not None else choose_rho(scan, found.concepts, arvs)
    taps = scan.layer.taps_per_input
    channels = tuple(
        ChannelSplit(
            channel=o,
            concepts=found.concepts[o],
            masks=published_masks(arvs[o], rhos[o], taps).to(scan.weight.dtype),
            weight=scan.weight[o],
            bias=float(scan.bias[o]),
            info={"rho": rhos[o]},
        )
        for o in found.channels
    )
    return Split(
        layer=scan.layer,
        weights=scan.manifest.weights,
        method=method,
        settings={"tau": found.tau, "p": found.p, "gamma": found.gamma},
        class_names=found.class_names,
        channels=channels,
    )
