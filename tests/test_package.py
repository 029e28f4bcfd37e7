"""What is published: the checker of wheel and sdist can fail, and versions agree."""

import os
import sys
import tomllib
from pathlib import Path

import pytest

import first_steps
import ranges
from check_package import (
    ROOT,
    faults_of_content,
    faults_of_metadata,
    faults_of_sdist,
    faults_of_versions,
    faults_of_wheel,
    own_files,
    version_of,
)
from first_steps import Step, take
from ranges import asked_of_pip, lowest_versions

VERSION = version_of()
ABOUT = f"unbraid-{VERSION}.dist-info"
WHEEL = own_files() | {
    f"{ABOUT}/{name}"
    for name in (
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt"),
        *("licenses/LICENSE", "licenses/src/unbraid/demo/NOTICE.md"),
    )
}
SDIST = {
    f"unbraid-{VERSION}/{name}"
    for name in (
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "llms.txt"),
        *("src/unbraid/__init__.py", "tests/conftest.py", "docs/index.md", "mkdocs.yml"),
    )
}
METADATA = f"""Metadata-Version: 2.4
Name: unbraid
Version: {VERSION}
Summary: PyTorch interpretability of vision networks
Keywords: polysemantic
Classifier: Typing :: Typed
Description-Content-Type: text/markdown

# unbraid
[paper](https://arxiv.org/abs/2504.12939) <img src="https://example.org/a.png">
"""


def test_what_is_right_has_no_faults():
    assert faults_of_wheel(WHEEL, own_files(), VERSION) == []
    assert faults_of_sdist(SDIST, VERSION) == []
    assert faults_of_metadata(METADATA, VERSION) == []
    assert faults_of_versions() == []
    assert faults_of_content("unbraid/a.py", b"https://arxiv.org/home/x and runs/home/x") == []


@pytest.mark.parametrize(
    "name",
    [
        *("tests/test_cli.py", "unbraid/__pycache__/x.pyc", "unbraid/demo/notes.txt"),
        *("unbraid/base/x.tmp", "docs/index.md"),
    ],
)
def test_a_wheel_that_holds_too_much_is_told(name):
    assert faults_of_wheel(WHEEL | {name}, own_files(), VERSION) == [f"the wheel holds {name}"]


@pytest.mark.parametrize(
    "name",
    [
        *("unbraid/py.typed", "unbraid/demo/images.npz", "unbraid/demo/split/split.safetensors"),
        *("unbraid/reporting/templates/page.html.j2", "unbraid/reporting/style.css"),
        *(f"{ABOUT}/licenses/LICENSE", f"{ABOUT}/entry_points.txt"),
    ],
)
def test_a_wheel_that_lacks_something_is_told(name):
    assert name in WHEEL
    assert faults_of_wheel(WHEEL - {name}, own_files(), VERSION) == [f"the wheel lacks {name}"]


def test_an_sdist_that_holds_too_much_or_lacks_something_is_told():
    for stray in ("src/x/__pycache__/a.pyc", ".hypothesis/a", "site/index.html", "runs/a/b.html"):
        faults = faults_of_sdist(SDIST | {f"unbraid-{VERSION}/{stray}"}, VERSION)
        assert faults == [f"the sdist holds {stray}"]
    assert faults_of_sdist(SDIST | {"else/a"}, VERSION) == ["the sdist holds else/a"]
    lacking = SDIST - {f"unbraid-{VERSION}/LICENSE"}
    assert faults_of_sdist(lacking, VERSION) == ["the sdist lacks LICENSE"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("PyTorch", "Torch", "'pytorch'"),
        ("Keywords: polysemantic\n", "", "'polysemantic'"),
        (f"Version: {VERSION}", "Version: 9", "is of 9"),
        ("text/markdown", "text/plain", "no description in Markdown"),
        ("Classifier: Typing :: Typed\n", "", "typed"),
        ("# unbraid", "# [unbraid](docs/index.md)", "](docs/index.md), which leads nowhere"),
        ("# unbraid", '<img src="docs/a.png">', '<img src="docs/a.png", which leads nowhere'),
    ],
)
def test_metadata_that_lack_something_are_told(before, after, told):
    assert before in METADATA
    [fault] = faults_of_metadata(METADATA.replace(before, after), VERSION)
    assert told in fault


def test_a_path_of_a_machine_is_told():
    path = b"/ho" + b"me/somebody/net.py"
    assert faults_of_content("unbraid/a.json", b'{"model": "' + path + b'"}') != []
    assert faults_of_content("unbraid/a.npz", path) == []


def test_versions_that_part_ways_are_told(tmp_path):
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    project = (tmp_path / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project.replace(f'"{VERSION}"', '"9.9"', 1))
    faults = faults_of_versions(tmp_path)
    assert faults == [f"{n} names {VERSION}, not 9.9" for n in ("CITATION.cff", "CHANGELOG.md")]


def test_every_range_of_users_has_a_beginning():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = lowest_versions(project)
    assert {"torch", "torchvision", "numpy", "pillow", "timm", "onnx"} <= lowest.keys()
    assert "pytest" not in lowest
    with pytest.raises(AssertionError):
        lowest_versions({"dependencies": ["torch"]})


def test_the_wheel_is_installed_with_what_users_may_ask_for_and_tests_need():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first, *more = asked_of_pip(project, ROOT / "x.whl")
    assert first.startswith(f"{ROOT}/x.whl[")
    assert "timm" in first
    assert "docs" not in first
    assert any(one.startswith("pytest") for one in more)
    assert not any(one.startswith(("ruff", "unbraid")) for one in more)


@pytest.mark.parametrize(
    ("code", "says", "exit_code", "right"),
    [
        ("print('yes')", "^yes", 0, True),
        ("print('no')", "^yes", 0, False),
        ("print('yes');exit(1)", "^yes", 0, False),
        ("print('yes');exit(1)", "^yes", 1, True),
        ("print('yes');1/0", "yes", 1, False),  # a traceback
    ],
)
def test_a_step_that_ends_or_speaks_otherwise_is_told(code, says, exit_code, right, tmp_path):
    (tmp_path / "step.py").write_text(code)
    wrong = take(Step(f"{sys.executable} step.py", says, exit_code), tmp_path)
    assert (wrong == "") == right


APP = """#!{python}
import sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{page}")

server = HTTPServer(("127.0.0.1", 0), Page)
print("{said}", file=sys.stderr)
print(f"{word}127.0.0.1:{{server.server_port}}/", flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    {end}
"""
RIGHT = {"page": "<!DOCTYPE html>", "said": "", "word": "http://", "end": "pass"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, ""),
        ({"page": "nothing"}, "is no page"),
        ({"said": "Traceback of something"}, "it says what no step may say:\nTraceback"),
        ({"word": "at "}, "no address is named"),
        ({"end": "sys.exit(3)"}, "exit code 3, not 0"),
        ({"end": "time.sleep(600)"}, "it does not stop in 10 seconds"),
    ],
)
def test_an_app_that_is_wrong_is_told(wrong, told, tmp_path, monkeypatch):
    monkeypatch.setattr(first_steps, "PATIENCE", 10.0 if "no" in told else 100.0)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "unbraid").write_text(APP.format(python=sys.executable, **RIGHT | wrong))
    (tmp_path / "unbraid").chmod(0o755)
    found = first_steps.explore(tmp_path)
    assert told in found
    assert bool(told) == bool(found)


def test_an_install_that_was_broken_off_is_made_again(tmp_path, monkeypatch):
    asked, python = [], tmp_path / "bin" / "python"

    def run(command, **_):
        asked.append(command)
        if "wheel" in command:
            (Path(command[-2]) / "unbraid-1.whl").touch()
        elif len(asked) == 2:
            raise KeyboardInterrupt

    def create(folder, **_):
        python.parent.mkdir(exist_ok=True)
        python.touch()

    monkeypatch.setattr(ranges.subprocess, "run", run)
    monkeypatch.setattr(ranges.venv, "create", create)
    project = {"optional-dependencies": {"test": ["pytest"]}}
    with pytest.raises(KeyboardInterrupt):
        ranges.install(python, project, {})
    for _ in range(2):
        ranges.install(python, project, {})
    whole = ["--force-reinstall" not in command for command in asked if "install" in command]
    assert whole == [True, True, False]
