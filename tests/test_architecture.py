"""Importing is light, and every public name is there."""

import json
import subprocess
import sys

import pytest

import unbraid


@pytest.mark.parametrize("statement", ["import unbraid", "import unbraid.cli"])
def test_importing_does_not_import_torch(statement):
    code = f"import sys; {statement}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there_and_is_no_module_and_no_other():
    code = (
        "import json, types, unbraid, unbraid.cli, unbraid.running.run\n"
        "names = {n: getattr(unbraid, n) for n in unbraid.__all__}\n"
        "print(json.dumps([n for n, v in names.items() if isinstance(v, types.ModuleType)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    contract = {"scan", "open_scan", "find", "split", "apply", "evaluate", "report"}
    assert contract | {"compare_outputs", "Split"} <= set(unbraid.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        unbraid.nonsense  # noqa: B018
