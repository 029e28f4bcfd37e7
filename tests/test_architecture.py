"""The house rules that a machine can hold: imports run one way, importing is light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import unbraid

ROOT = Path(__file__).parent.parent


def lint_imports(configuration: Path) -> subprocess.CompletedProcess[str]:
    command = Path(sys.executable).with_name("lint-imports")
    arguments = [str(command), "--config", str(configuration), "--no-cache"]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, check=False)


def test_imports_run_one_way():
    result = lint_imports(ROOT / "pyproject.toml")
    assert result.returncode == 0, result.stdout


def test_the_import_contract_can_fail(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    turned = text.replace('  "cli",\n', "").replace('  "base",\n', '  "base",\n  "cli",\n')
    assert turned != text
    (tmp_path / "pyproject.toml").write_text(turned)
    assert lint_imports(tmp_path / "pyproject.toml").returncode != 0


@pytest.mark.parametrize("statement", ["import unbraid", "import unbraid.cli"])
def test_importing_does_not_import_torch(statement):
    code = f"import sys; {statement}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_public_name_is_there_and_is_no_module():
    code = (
        "import json, types, unbraid, unbraid.cli, unbraid.running.run\n"
        "names = {n: getattr(unbraid, n) for n in unbraid.__all__}\n"
        "print(json.dumps([n for n, v in names.items() if isinstance(v, types.ModuleType)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
    contract = {"scan", "open_scan", "find", "split", "apply", "evaluate", "report"}
    assert contract | {"compare_outputs", "Split"} <= set(unbraid.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        unbraid.nonsense  # noqa: B018
