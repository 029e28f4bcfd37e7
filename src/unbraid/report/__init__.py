"""The report: one self-contained page on the channels that were found and split."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unbraid.doors import in_plain_modes

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from unbraid.evaluation import Evaluation
    from unbraid.findings import Findings
    from unbraid.records import Scan
    from unbraid.sensitivity import Sensitivity
    from unbraid.splits import Split
    from unbraid.visualize.features import Features


@in_plain_modes
def report(
    path: str | Path,
    *,
    scan: Scan,
    found: Findings,
    split: Split | None = None,
    evaluation: Evaluation | None = None,
    train_scan: Scan | None = None,
    sensitivity: Sensitivity | None = None,
    maps: Scan | None = None,
    features: Features | None = None,
    dataset: Dataset[Any] | None = None,
    title: str | None = None,
) -> Path:
    """Write one HTML file that shows what was found, how it was split and how well.

    The file has at most 10 MB: of many channels it shows fewer and smaller pictures, or not all
    channels in full, and says so. It holds all it needs, pictures included, and asks nothing of any
    network. What an argument left out would have contributed is left out, and the page says so.

    Args:
        path: the file to write; a folder that is missing is made.
        scan: of the validation images; reference images are chosen from it.
        found: the polysemantic channels, perhaps none.
        split: their concept channels, None if there are none.
        evaluation: the split's measures on validation images.
        train_scan: of the training images, for the input channels that feed each concept.
        sensitivity: what other thresholds would find.
        maps: of the same images as `scan`, or some of them, with positions: for where in its
            reference images a channel answers. Not needed if `scan` itself has positions.
        features: images made to excite the channels, from `unbraid.visualize`.
        dataset: the images that `scan` was made of, for their pictures; where it has ids, their
            order may have changed.
        title: the page's heading; by default it names the layer.

    Returns:
        The path of the file.

    Raises:
        UsageError: scans, split, evaluation, features and data set do not belong together.
        RunError: the file cannot be written, or a scan is damaged.
    """
    from unbraid.as_scanned import as_scanned
    from unbraid.files import write_whole
    from unbraid.findings import Findings
    from unbraid.given import as_kind, as_path
    from unbraid.records import Scan
    from unbraid.report.material import Material
    from unbraid.report.page import render  # jinja2, only when a page is made

    file = as_path("path", path)
    as_kind("scan", scan, Scan)
    as_kind("found", found, Findings)
    material = Material(scan, found, split, evaluation, train_scan, sensitivity, features, maps)
    material.refuse_strangers()
    images = None if dataset is None else as_scanned(dataset, scan)
    page = render(material, dataset=images, title=title)
    # A folder's name may hold bytes that are no text; they are spelt out, not fatal.
    write_whole(file, page.encode("utf-8", "backslashreplace"))
    return file
