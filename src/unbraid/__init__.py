"""Find the polysemantic channels of a vision network and split each into one per concept.

The public names are imported when first used, so that `import unbraid` is instant.
"""

from __future__ import annotations

import importlib
import random
import sys
from importlib.metadata import version as _version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unbraid.ablate import ablate as ablate
    from unbraid.ablation import Ablation as Ablation
    from unbraid.circuit import Circuit as Circuit
    from unbraid.circuit import circuit as circuit
    from unbraid.circuit_from import circuit_from as circuit_from
    from unbraid.encoders import Penultimate as Penultimate
    from unbraid.errors import UnbraidError as UnbraidError
    from unbraid.evaluate import evaluate as evaluate
    from unbraid.evaluation import Evaluation as Evaluation
    from unbraid.figures import density_figure as density_figure
    from unbraid.figures import save_figure as save_figure
    from unbraid.figures import source_figure as source_figure
    from unbraid.figures import teaser_figure as teaser_figure
    from unbraid.find import find as find
    from unbraid.findings import Findings as Findings
    from unbraid.measure_semantics import measure_semantics as measure_semantics
    from unbraid.networks import with_logits as with_logits
    from unbraid.output import compare_outputs as compare_outputs
    from unbraid.records import Scan as Scan
    from unbraid.records import open_scan as open_scan
    from unbraid.report import report as report
    from unbraid.scan import scan as scan
    from unbraid.semantics import Semantics as Semantics
    from unbraid.sensitivity import Sensitivity as Sensitivity
    from unbraid.sensitivity import sensitivity as sensitivity
    from unbraid.sources import open_images as open_images
    from unbraid.sources.hugging import from_hugging_face as from_hugging_face
    from unbraid.split import split as split
    from unbraid.splits import Split as Split
    from unbraid.surgery import apply as apply
    from unbraid.surgery import clamp as clamp
    from unbraid.surgery import gate as gate
    from unbraid.surgery import load_split as load_split
    from unbraid.visualize import visualize as visualize
    from unbraid.visualize.features import Features as Features

__version__ = _version("unbraid")

_HOME = {
    "scan": "scan",
    "open_images": "sources",
    "from_hugging_face": "sources.hugging",
    "open_scan": "records",
    "Scan": "records",
    "find": "find",
    "Findings": "findings",
    "sensitivity": "sensitivity",
    "Sensitivity": "sensitivity",
    "split": "split",
    "Split": "splits",
    "apply": "surgery",
    "gate": "surgery",
    "clamp": "surgery",
    "circuit": "circuit",
    "Circuit": "circuit",
    "circuit_from": "circuit_from",
    "load_split": "surgery",
    "with_logits": "networks",
    "compare_outputs": "output",
    "ablate": "ablate",
    "Ablation": "ablation",
    "measure_semantics": "measure_semantics",
    "Penultimate": "encoders",
    "Semantics": "semantics",
    "evaluate": "evaluate",
    "Evaluation": "evaluation",
    "report": "report",
    "teaser_figure": "figures",
    "density_figure": "figures",
    "source_figure": "figures",
    "save_figure": "figures",
    "visualize": "visualize",
    "Features": "visualize.features",
    "UnbraidError": "errors",
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


class _Package(ModuleType):
    """Lets `unbraid.scan` be the function although a submodule of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Put the public name in place of the submodule that the import system would put there."""
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
