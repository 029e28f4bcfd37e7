"""The server: this machine alone, its own page alone, every mistake a sentence."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.parse

import pytest

from unbraid.exploring import server
from unbraid.exploring.server import listen

MARK = {"x-unbraid": "1"}


def ask(served, method, path, body=b"", headers=MARK):
    where = urllib.parse.urlsplit(served.address)
    connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_it_listens_to_this_machine_alone_and_takes_a_free_port():
    own = listen(0)
    host, port = own.getsockname()
    other = listen(port)  # which is taken
    assert host == other.getsockname()[0] == "127.0.0.1"
    assert other.getsockname()[1] != port
    for one in (own, other):
        one.close()


@pytest.mark.parametrize("path", ["/", "/app.js", "/explore.css", "/report.css", "/bench.js"])
def test_the_page_comes_with_a_policy_and_names_nothing_elsewhere(served, path):
    response, content = ask(served, "GET", path, headers={})
    assert response.status == 200
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert b"http://" not in content
    assert b"https://" not in content


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", {"host": "evil.example"}),
        ("GET", {"host": "127.0.0.1.evil.example:80"}),
        ("POST", {}),
        ("POST", {**MARK, "origin": "http://evil.example"}),
        ("POST", {**MARK, "origin": "null"}),
        ("POST", {**MARK, "host": "evil.example"}),
    ],
)
def test_pages_from_elsewhere_are_refused(served, method, headers):
    path = "/ask/overview" if method == "POST" else "/"
    response, content = ask(served, method, path, b"{}", headers)
    assert response.status == 403
    assert json.loads(content) == {"error": "This page may not ask here."}


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("/ask/channels", b"{", 400, "reload it"),
        ("/ask/channels", b'{"what": 1}', 400, "reload it"),
        ("/ask/channel", b"{}", 400, "no channel is named"),
        ("/ask/channel", b'{"channel": "x"}', 400, "reload it"),
        ("/ask/channel", b'{"channel": 99}', 400, "not divided"),
        ("/ask/gate", b'{"picture": "val/0", "gates": {"0.0": 1e99}}', 400, "from 0 to 10"),
        ("/ask/nothing", b"{}", 404, "not there"),
        ("/ask/overview", b" " * 2**21, 413, "too large"),
        ("/drop?name=%3Cb%3E", b"junk", 400, "<b> cannot be read"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(served, path, body, status, message):
    response, content = ask(served, "POST", path, body)
    assert response.status == status
    assert message in json.loads(content)["error"]


def test_a_picture_that_is_too_large_is_not_read(served, monkeypatch):
    assert server._MOST_BYTES == 2**26
    monkeypatch.setattr(server, "_MOST_BYTES", 1000)
    for size, status in ((1000, 400), (1001, 413)):
        response, content = ask(served, "POST", "/drop?name=x", b"x" * size)
        assert response.status == status
    assert "too large; 64 MiB are read" in json.loads(content)["error"]


@pytest.mark.parametrize("path", ["/picture/v/96/val/0", "/picture/v/480/train/3"])
def test_pictures_come_in_some_sizes(served, path):
    response, content = ask(served, "GET", path, headers={})
    assert response.headers["Content-Type"] == "image/png"
    assert content.startswith(b"\x89PNG")
    assert ask(served, "GET", path.replace("/9", "/8").replace("480", "9999"))[0].status == 404


@pytest.mark.parametrize("where", ["val/../../settings.json", "etc/passwd", "val/99999", "x"])
def test_no_path_leads_to_other_files(served, where):
    response, content = ask(served, "GET", f"/picture/v/96/{where}", headers={})
    assert response.status in (400, 404)
    assert "error" in json.loads(content)


def test_what_nobody_foresaw_is_a_sentence_too(served, monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(served.explorer, "overview", fail)
    response, content = ask(served, "POST", "/ask/overview", b"{}")
    assert response.status == 500
    assert json.loads(content) == {"error": "Something went wrong (by zero)."}
    assert capsys.readouterr().err == "unbraid explore: ZeroDivisionError: by zero\n"


@pytest.mark.parametrize("answers", [False, True])  # to a browser that then stays connected
def test_the_command_serves_until_it_is_stopped(folder, answers):
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    words = ["explore", str(folder), "--no-open", "--port", port]
    words += ["--model", f"{folder.parent / 'own.py'}:build"]
    process = subprocess.Popen(
        [sys.executable, "-m", "unbraid", *words],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    line = process.stdout.readline()
    assert line.startswith("Explore: http://127.0.0.1:")
    address = line.split()[1]
    assert not address.endswith(f":{port}/")
    if answers:
        where = urllib.parse.urlsplit(address)
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
        connection.request("GET", "/")
        assert connection.getresponse().read().startswith(b"<!DOCTYPE html>")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")
    taken.close()


@pytest.mark.parametrize("name", ["starlette", "uvicorn"])
def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys, tmp_path, name):
    from unbraid import __main__ as main_module
    from unbraid.cli import look

    monkeypatch.setattr(look, "find_spec", lambda one: None if one == name else True)
    monkeypatch.setattr(sys, "argv", ["unbraid", "explore", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main_module.main()
    assert stopped.value.code == 1
    assert (
        capsys.readouterr().err
        == "unbraid: unbraid explore needs starlette and uvicorn; pip install 'unbraid[explore]'.\n"
    )


def test_a_browser_of_the_terminal_is_not_opened(monkeypatch):
    opened = []

    class Windowed(server.webbrowser.BackgroundBrowser):
        def open(self, url, *_):
            opened.append(url)

    for browser in (server.webbrowser.GenericBrowser("lynx"), Windowed("firefox")):
        monkeypatch.setattr(server.webbrowser, "get", lambda browser=browser: browser)
        server._open_browser("http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/"]
