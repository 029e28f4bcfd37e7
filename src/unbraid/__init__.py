"""Find the polysemantic channels of a vision network and split each into one per concept.

The public names are imported when first used, so that `import unbraid` is instant.
"""

from __future__ import annotations

import importlib
import random
import sys
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbraid.base.errors import UnbraidError as UnbraidError
    from unbraid.finding.find import find as find
    from unbraid.finding.findings import Findings as Findings
    from unbraid.finding.thresholds import Sensitivity as Sensitivity
    from unbraid.finding.thresholds import sensitivity as sensitivity
    from unbraid.images.open import from_hugging_face as from_hugging_face
    from unbraid.images.open import open_images as open_images
    from unbraid.measuring.ablate import ablate as ablate
    from unbraid.measuring.circuit import Circuit as Circuit
    from unbraid.measuring.circuit import circuit as circuit
    from unbraid.measuring.circuit import circuit_from as circuit_from
    from unbraid.measuring.compare import compare_outputs as compare_outputs
    from unbraid.measuring.encoders import Penultimate as Penultimate
    from unbraid.measuring.evaluate import evaluate as evaluate
    from unbraid.measuring.results import Ablation as Ablation
    from unbraid.measuring.results import Evaluation as Evaluation
    from unbraid.measuring.results import Semantics as Semantics
    from unbraid.measuring.semantics import measure_semantics as measure_semantics
    from unbraid.networks.outputs import with_logits as with_logits
    from unbraid.reporting.figures import density_figure as density_figure
    from unbraid.reporting.figures import save_figure as save_figure
    from unbraid.reporting.figures import source_figure as source_figure
    from unbraid.reporting.figures import teaser_figure as teaser_figure
    from unbraid.reporting.report import report as report
    from unbraid.scanning.records import Scan as Scan
    from unbraid.scanning.records import open_scan as open_scan
    from unbraid.scanning.scan import scan as scan
    from unbraid.splitting.split import split as split
    from unbraid.splitting.splits import Split as Split
    from unbraid.surgery.apply import apply as apply
    from unbraid.surgery.apply import clamp as clamp
    from unbraid.surgery.apply import gate as gate
    from unbraid.surgery.apply import load_split as load_split
    from unbraid.visualizing.features import Features as Features
    from unbraid.visualizing.visualize import visualize as visualize

__version__ = _version("unbraid")

_HOME = {
    "scan": "scanning.scan",
    "open_images": "images.open",
    "from_hugging_face": "images.open",
    "open_scan": "scanning.records",
    "Scan": "scanning.records",
    "find": "finding.find",
    "Findings": "finding.findings",
    "sensitivity": "finding.thresholds",
    "Sensitivity": "finding.thresholds",
    "split": "splitting.split",
    "Split": "splitting.splits",
    "apply": "surgery.apply",
    "gate": "surgery.apply",
    "clamp": "surgery.apply",
    "circuit": "measuring.circuit",
    "Circuit": "measuring.circuit",
    "circuit_from": "measuring.circuit",
    "load_split": "surgery.apply",
    "with_logits": "networks.outputs",
    "compare_outputs": "measuring.compare",
    "ablate": "measuring.ablate",
    "Ablation": "measuring.results",
    "measure_semantics": "measuring.semantics",
    "Penultimate": "measuring.encoders",
    "Semantics": "measuring.results",
    "evaluate": "measuring.evaluate",
    "Evaluation": "measuring.results",
    "report": "reporting.report",
    "teaser_figure": "reporting.figures",
    "density_figure": "reporting.figures",
    "source_figure": "reporting.figures",
    "save_figure": "reporting.figures",
    "visualize": "visualizing.visualize",
    "Features": "visualizing.features",
    "UnbraidError": "base.errors",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
    state = random.getstate()  # which some libraries move when they are imported
    value = getattr(importlib.import_module(f"unbraid.{_HOME[name]}"), name)
    random.setstate(state)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
