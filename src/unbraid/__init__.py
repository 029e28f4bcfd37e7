"""Find the polysemantic channels of a vision network and split each into one per concept.

The public names are imported when first used, so that `import unbraid` is instant.
"""

from __future__ import annotations

import importlib
import random
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # as type checkers and editors see the names
    from unbraid.base.errors import UnbraidError as UnbraidError
    from unbraid.base.memory import keep_memory as keep_memory
    from unbraid.finding.find import find as find
    from unbraid.finding.findings import Findings as Findings
    from unbraid.finding.sensitivity import Sensitivity as Sensitivity
    from unbraid.finding.sensitivity import sensitivity as sensitivity
    from unbraid.images.open import from_hugging_face as from_hugging_face
    from unbraid.images.open import open_images as open_images
    from unbraid.images.several_labels import one_per_label as one_per_label
    from unbraid.measuring.ablate import ablate as ablate
    from unbraid.measuring.circuit import Circuit as Circuit
    from unbraid.measuring.circuit import circuit as circuit
    from unbraid.measuring.circuit import circuit_from as circuit_from
    from unbraid.measuring.circuit_graph import CircuitGraph as CircuitGraph
    from unbraid.measuring.circuit_graph import circuit_graph as circuit_graph
    from unbraid.measuring.compare import compare_outputs as compare_outputs
    from unbraid.measuring.encoders import Penultimate as Penultimate
    from unbraid.measuring.evaluate import evaluate as evaluate
    from unbraid.measuring.likeness import Semantics as Semantics
    from unbraid.measuring.results import Ablation as Ablation
    from unbraid.measuring.results import Evaluation as Evaluation
    from unbraid.measuring.semantics import measure_semantics as measure_semantics
    from unbraid.measuring.suggest import Suggestions as Suggestions
    from unbraid.measuring.suggest import suggest as suggest
    from unbraid.networks.layers import heads as heads
    from unbraid.networks.outputs import with_logits as with_logits
    from unbraid.reporting.circuits import circuit_figure as circuit_figure
    from unbraid.reporting.explain import Explanation as Explanation
    from unbraid.reporting.explain import explain as explain
    from unbraid.reporting.figures import density_figure as density_figure
    from unbraid.reporting.figures import save_figure as save_figure
    from unbraid.reporting.figures import source_figure as source_figure
    from unbraid.reporting.figures import teaser_figure as teaser_figure
    from unbraid.reporting.report import report as report
    from unbraid.scanning.many import open_scan as open_scan
    from unbraid.scanning.records import Scan as Scan
    from unbraid.scanning.scan import scan as scan
    from unbraid.splitting.split import split as split
    from unbraid.splitting.splits import Split as Split
    from unbraid.surgery.apply import apply as apply
    from unbraid.surgery.apply import load_split as load_split
    from unbraid.surgery.edit import edit as edit
    from unbraid.surgery.gates import clamp as clamp
    from unbraid.surgery.gates import gate as gate
    from unbraid.visualizing.features import Features as Features
    from unbraid.visualizing.visualize import visualize as visualize

__version__ = _version("unbraid")

_NAMES = {
    "base.errors": "UnbraidError",
    "base.memory": "keep_memory",
    "finding.find": "find",
    "finding.findings": "Findings",
    "finding.sensitivity": "Sensitivity sensitivity",
    "images.open": "from_hugging_face open_images",
    "images.several_labels": "one_per_label",
    "measuring.ablate": "ablate",
    "measuring.circuit": "Circuit circuit circuit_from",
    "measuring.circuit_graph": "CircuitGraph circuit_graph",
    "measuring.compare": "compare_outputs",
    "measuring.encoders": "Penultimate",
    "measuring.evaluate": "evaluate",
    "measuring.likeness": "Semantics",
    "measuring.results": "Ablation Evaluation",
    "measuring.semantics": "measure_semantics",
    "measuring.suggest": "Suggestions suggest",
    "networks.layers": "heads",
    "networks.outputs": "with_logits",
    "reporting.circuits": "circuit_figure",
    "reporting.explain": "Explanation explain",
    "reporting.figures": "density_figure save_figure source_figure teaser_figure",
    "reporting.report": "report",
    "scanning.many": "open_scan",
    "scanning.records": "Scan",
    "scanning.scan": "scan",
    "splitting.split": "split",
    "splitting.splits": "Split",
    "surgery.apply": "apply load_split",
    "surgery.edit": "edit",
    "surgery.gates": "clamp gate",
    "visualizing.features": "Features",
    "visualizing.visualize": "visualize",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name's module when the name is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'unbraid' has no attribute {name!r}")
    state = random.getstate()  # which some libraries move when they are imported
    globals()[name] = getattr(importlib.import_module(f"unbraid.{_HOME[name]}"), name)
    random.setstate(state)
    return globals()[name]


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
