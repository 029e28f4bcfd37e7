"""Try unbraid with the lowest, or the newest, versions of what it depends on.

    python tools/ranges.py lowest DIR tests/scanning tests/surgery
    python tools/ranges.py newest DIR

pip installs a wheel of this source into a virtual environment in DIR (with torch 3 to 6 GB); one
that is there only gets a new wheel. Lowest are the versions at which the ranges of pyproject.toml
begin, of what unbraid needs and of its extras, but for those of tests and of the docs. There a new
user's steps (first_steps.py) are taken, and tests run. What stands behind DIR goes to pytest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

import first_steps

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


def asked_of_pip(project: dict[str, object], wheel: Path) -> list[str]:
    """What to install: a wheel of unbraid with the extras of users, and what its tests run on."""
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    own = ",".join(sorted(extras.keys() - TOOLS))
    return [f"{wheel}[{own}]", *(x for x in extras["test"] if not x.startswith(LEFT_OUT))]


def installed(python: Path, names: list[str]) -> str:
    """What versions an environment has, in words."""
    code = "import sys; from importlib.metadata import version as v\n"
    code += "print(', '.join(f'{n} {v(n)}' for n in sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def install(python: Path, project: dict[str, object], pins: dict[str, str]) -> None:
    """Build a wheel of this source, and install it with these versions, if it is not yet there."""
    folder = python.parents[1]
    pip = [str(python), "-m", "pip"]
    done = folder / "installed.txt"  # so that an install that was broken off is made again
    new = not done.exists()
    if new:
        venv.create(folder, with_pip=True)
    with TemporaryDirectory() as built:
        subprocess.run([*pip, "wheel", "--no-deps", "-w", built, str(ROOT)], check=True)
        (wheel,) = Path(built).glob("unbraid-*.whl")
        if new:
            (folder / "pins.txt").write_text("".join(f"{n}=={one}\n" for n, one in pins.items()))
            asked = [*asked_of_pip(project, wheel), "-c", str(folder / "pins.txt")]
            subprocess.run([*pip, "install", *asked], check=True)
            done.touch()
        else:
            again = ["install", "--no-deps", "--force-reinstall", str(wheel)]
            subprocess.run([*pip, *again], check=True)


def main(which: str, folder: Path, tests: list[str]) -> int:
    """Make the environment, take a new user's steps in it, then run tests; 0 if all is well."""
    assert which in ("lowest", "newest"), which
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = lowest_versions(project)
    python = folder / "bin" / "python"
    install(python, project, lowest if which == "lowest" else {})
    print(installed(python, list(lowest)), flush=True)
    with TemporaryDirectory() as steps:
        n_wrong = first_steps.main(python.parent, Path(steps))
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or ["tests"])]
    return subprocess.run(command, cwd=ROOT, check=False).returncode or int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).absolute(), sys.argv[3:]))
