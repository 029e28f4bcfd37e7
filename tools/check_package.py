"""Check a wheel and an sdist: what they hold, how large they are, what they say of themselves.

    python -m build && python tools/check_package.py dist

Exit code 0 if both are fit to be published, else 1, with a line for each fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
MOST = {"wheel": 6 * MIB, "sdist": 10 * MIB}  # bytes, packed; the demo's images are 3 MB
# What no package holds: caches, results, files of editors and systems.
_STRAY = re.compile(
    r"(^|/)(__pycache__|\.git|\.venv|venv|runs|demo-run|site|dist|build|\.\w+_cache|\.hypothesis)/"
    r"|\.(pyc|pyo|tmp|swp|orig|rej|damaged)$|(^|/)(\.DS_Store|\.coverage)$"
)
_IN_SDIST = (
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "llms.txt"),
    *("src/unbraid/__init__.py", "tests/conftest.py", "docs/index.md", "mkdocs.yml"),
)
# A path of somebody's machine in the metadata or a data file.
_PATH = re.compile(rb"(?<![\w.])/(home|root|Users|work|tmp)/[\w.-]+")
# What leads nowhere on a package index: links and pictures of files beside the README.
_RELATIVE = re.compile(r"\]\((?!https?:)[^)]*\)|<img src=\"(?!https?:)[^\"]*\"")
_READ = {".py", ".md", ".json", ".html", ".csv", ".txt", ".toml", ".safetensors", ""}


def own_files(root: Path = ROOT) -> set[str]:
    """The files of the package's source, as the wheel names them."""
    source = root / "src"
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    return {name for name in files if name.startswith("unbraid/") and not _STRAY.search(name)}


def faults_of_wheel(names: Iterable[str], own: set[str], version: str) -> list[str]:
    """Say what a wheel holds too much and what it lacks, by the names in it."""
    about = f"unbraid-{version}.dist-info/"
    held = {name for name in names if not name.endswith("/")}
    inside = {name for name in held if not name.startswith(about)}
    wanted = {about + name for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")}
    wanted |= {about + f"licenses/{name}" for name in ("LICENSE", "src/unbraid/demo/NOTICE.md")}
    return [
        *(f"the wheel holds {name}" for name in sorted(inside - own)),
        *(f"the wheel lacks {name}" for name in sorted((own - inside) | (wanted - held))),
    ]


def faults_of_sdist(names: Iterable[str], version: str) -> list[str]:
    """Say what an sdist holds too much and what it lacks, by the names in it."""
    top = f"unbraid-{version}/"
    held = set(names)
    inside = {name.removeprefix(top) for name in held}
    return [
        *(f"the sdist holds {name}" for name in sorted(held) if not name.startswith(top)),
        *(f"the sdist holds {name}" for name in sorted(inside) if _STRAY.search(name)),
        *(f"the sdist lacks {name}" for name in _IN_SDIST if name not in inside),
    ]


def faults_of_metadata(text: str, version: str) -> list[str]:
    """Say what the metadata lacks that people search by, and where versions part ways."""
    about = Parser().parsestr(text)
    told = " ".join([about["Summary"], about["Keywords"] or ""]).lower()
    words = ("pytorch", "interpretability", "polysemantic", "vision")
    faults = [f"the metadata does not name {word!r}" for word in words if word not in told]
    if about["Version"] != version:
        faults.append(f"the metadata is of {about['Version']}, not of {version}")
    if about["Description-Content-Type"] != "text/markdown" or not about.get_payload():
        faults.append("the metadata has no description in Markdown")
    description = about.get_payload()
    faults += [
        f"the description holds {one[0]}, which leads nowhere on a package index"
        for one in _RELATIVE.finditer(str(description))
    ]
    if "Typing :: Typed" not in about.get_all("Classifier", []):
        faults.append("the metadata does not say that the package is typed")
    return faults


def faults_of_versions(root: Path = ROOT) -> list[str]:
    """Say where the files of a source tree name another version than pyproject.toml."""
    version = version_of(root)
    faults = []
    for file, pattern in {
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$",
    }.items():
        found = re.search(pattern, (root / file).read_text("utf-8"), re.MULTILINE)
        if found is None or found[1] != version:
            faults.append(f"{file} names {found[1] if found else 'no version'}, not {version}")
    return faults


def faults_of_content(name: str, content: bytes) -> list[str]:
    """Say that a file names a path of somebody's machine."""
    if PurePosixPath(name).suffix not in _READ:
        return []
    return [f"{name} names {path[0].decode()}" for path in _PATH.finditer(content)]


def version_of(root: Path = ROOT) -> str:
    """The version that pyproject.toml gives, the one place that has it."""
    found = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def check(folder: Path) -> list[str]:
    """Say what is wrong with the wheel and the sdist of a folder."""
    version = version_of()
    wheel = folder / f"unbraid-{version}-py3-none-any.whl"
    sdist = folder / f"unbraid-{version}.tar.gz"
    missing = [f"{folder} holds no {file.name}" for file in (wheel, sdist) if not file.exists()]
    if missing:
        return missing
    faults = faults_of_versions()
    for kind, file in (("wheel", wheel), ("sdist", sdist)):
        size = file.stat().st_size
        print(f"{file.name}: {size:,} bytes")
        if size > MOST[kind]:
            faults.append(f"the {kind} has {size:,} bytes, more than {MOST[kind]:,}")
    with zipfile.ZipFile(wheel) as archive:
        faults += faults_of_wheel(archive.namelist(), own_files(), version)
        for name in archive.namelist():
            faults += faults_of_content(name, archive.read(name))
        metadata = archive.read(f"unbraid-{version}.dist-info/METADATA").decode()
        faults += faults_of_metadata(metadata, version)
    with tarfile.open(sdist) as archive:
        faults += faults_of_sdist(archive.getnames(), version)
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    if subprocess.run(command, check=False).returncode:
        faults.append("twine refuses the metadata or the description")
    return faults


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    print("\n".join(found) or "Both are fit to be published.")
    sys.exit(1 if found else 0)
