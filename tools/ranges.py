"""Run tests with the lowest, or the newest, versions of what unbraid depends on.

    python tools/ranges.py lowest DIR tests/scanning tests/surgery
    python tools/ranges.py newest DIR

DIR gets a virtual environment (with torch 3 to 6 GB); one that is there is used as it is. Lowest
are the versions at which the ranges of pyproject.toml begin, of what unbraid needs and of its
extras, but for those of tests and of the docs. What stands behind DIR goes to pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = {"test", "docs", "benchmarks"}  # extras whose versions are no matter of users
LEFT_OUT = ("unbraid[", "ruff", "mypy", "import-linter", "build", "twine")  # of the tests' own
_RANGE = re.compile(r"^(?P<name>[\w.-]+)(\[[\w,]+\])?\s*>=\s*(?P<lowest>[\w.]+)")


def lowest_versions(project: dict[str, object]) -> dict[str, str]:
    """The version at which the range of each dependency begins, by name; of a `project` table.

    >>> lowest_versions({"dependencies": ["torch>=2.6"], "optional-dependencies": {"x": ["a>=1"]}})
    {'torch': '2.6', 'a': '1'}
    """
    extras = project.get("optional-dependencies", {})
    assert isinstance(extras, dict)
    needed = [*project["dependencies"]]  # type: ignore[misc]
    needed += [one for extra, ones in extras.items() if extra not in TOOLS for one in ones]
    found = [_RANGE.match(one) for one in needed if not one.startswith("unbraid")]
    assert all(found), "a range without a beginning"
    return {one["name"]: one["lowest"] for one in found if one}


def asked_of_pip(project: dict[str, object]) -> list[str]:
    """What to install: unbraid with the extras of users, and what its tests run on."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    own = ",".join(sorted(extras.keys() - TOOLS))
    return [*("-e", f"{ROOT}[{own}]"), *(x for x in extras["test"] if not x.startswith(LEFT_OUT))]


def installed(python: Path, names: list[str]) -> str:
    """What versions an environment has, in words."""
    code = "import sys; from importlib.metadata import version as v\n"
    code += "print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def main(which: str, folder: Path, tests: list[str]) -> int:
    """Make the environment unless it is there, run tests in it; pytest's exit code."""
    assert which in ("lowest", "newest"), which
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = lowest_versions(project)
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        command = [str(python), "-m", "pip", "install", *asked_of_pip(project)]
        if which == "lowest":
            pins = folder / "lowest.txt"
            pins.write_text("".join(f"{name}=={one}\n" for name, one in lowest.items()))
            command += ["-c", str(pins)]
        subprocess.run(command, check=True)
    print(installed(python, list(lowest)))
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or ["tests"])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[3:]))
