"""Images that cannot be reached are told from broken ones, whatever library's error says so."""

from __future__ import annotations

import errno
import http.client
import http.server
import io
import os
import socket
import struct
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from PIL import Image, UnidentifiedImageError

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import DataError, OutOfReach, out_of_reach

Read = Callable[[], Any]


class Failing(SyntheticImages):
    """From the sixth image on, reading does what it is told."""

    def __init__(self, read: Read) -> None:
        super().__init__(9)
        self.read = read
        self.ids, self.sizes = [*range(9)], [1] * 9  # so that none is read for a fingerprint

    def __getitem__(self, index: int) -> Any:
        return self.read() if index >= 5 else super().__getitem__(index)


def scanned(read: Read, out: Path, **options: Any) -> unbraid.Scan:
    return unbraid.scan(
        build("3x3"), "layer", Failing(read), out, batch_size=4, skip_broken=True, **options
    )


def judged(read: Read) -> OutOfReach | None:
    try:
        read()
    except Exception as error:
        return out_of_reach("It", error)
    pytest.fail("it can be read")


def assert_broken(read: Read) -> None:
    """An image counts as broken."""
    away = judged(read)
    assert away is None, str(away)


# --- errors as libraries build them ---------------------------------------------------------------


class Wrapped(OSError):
    """As of requests: an OSError without a number."""


class Reasoned(Exception):
    """As of urllib3: no OSError, and it keeps what happened under `reason`."""

    def __init__(self, reason: Any) -> None:
        super().__init__("given up")
        self.reason = reason


class Refused(Exception):
    """As of httpx and requests where a server refuses."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.response = type("Response", (), {"status_code": status})()


class Answered(Exception):
    """As of aiohttp where a server refuses."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


def by_cause(error: Exception) -> None:
    try:
        raise error
    except type(error) as caught:
        raise Wrapped("cannot be fetched") from caught


def by_context(error: Exception) -> None:
    try:
        raise error
    except type(error):
        raise ValueError("cannot be fetched")  # noqa: B904


def by_hidden_context(error: Exception) -> None:
    try:
        raise error
    except type(error):
        raise ValueError("cannot be fetched") from None


def by_argument(error: Exception) -> None:
    raise Wrapped("aborted", error)


def by_reason(error: Exception) -> None:
    raise Wrapped(Reasoned(error))


def by_group(error: Exception) -> None:
    raise ExceptionGroup("all failed", [KeyError("a"), error])


def by_three(error: Exception) -> None:
    try:
        by_cause(error)
    except Wrapped:
        raise Reasoned("too often") from None


class Stored(Exception):
    """As botocore tells what a store answered."""

    def __init__(self, status: int) -> None:
        super().__init__("An error occurred (SlowDown)")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class Coded(Exception):
    """As google.api_core does."""

    def __init__(self, status: int) -> None:
        super().__init__("no answer")
        self.code = http.HTTPStatus(status)


WAYS = (by_cause, by_context, by_hidden_context, by_argument, by_reason, by_group, by_three)
OF_SYSTEM = (
    OSError(errno.EIO, "it fails"),
    OSError(errno.EMFILE, "it fails"),
    ConnectionResetError("by peer"),
    http.client.RemoteDisconnected("no answer"),
    TimeoutError(),
    PermissionError("Access Denied"),
    socket.gaierror(errno.ENOENT, "no such host"),  # some systems number these from 1 on
    socket.herror(errno.ENOENT, "no such host"),
    URLError("no host given"),
    URLError(OSError("tunnel failed")),
    HTTPError("http://a", 503, "away", http.client.HTTPMessage(), None),
    http.client.IncompleteRead(b"a", 2),
    Refused(503),
    Answered(429),
    FileNotFoundError(errno.ENOENT, "No such file", "/no/such/folder/a.png"),
    MemoryError(),
    RuntimeError("read_file, read_write_file.cpp:78, [Errno 5] Input/output error: 'a.png'"),
    Exception(f"/data/lmdb: {os.strerror(errno.EMFILE)}"),
    RuntimeError(f"unable to open file </torch_1_2>: {os.strerror(errno.EMFILE)} (24)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("can't start new thread"),
    Stored(503),
    Coded(503),
    OutOfReach("Image a cannot be reached (it fails)."),
)
OF_IMAGE = (
    OSError("image file is truncated (3 bytes not processed)"),
    OSError("broken data stream when reading image file"),
    OSError(errno.EINVAL, "Invalid argument"),
    UnidentifiedImageError("cannot identify image file"),
    SyntaxError("broken PNG file (chunk b'IDAT')"),
    struct.error("unpack requires a buffer of 4 bytes"),
    EOFError("no more images"),
    FileNotFoundError(errno.ENOENT, "No such file", f"{__file__}.png"),
    FileNotFoundError("http://a/b.png"),
    URLError(FileNotFoundError(errno.ENOENT, "No such file", f"{__file__}.png")),
    HTTPError("http://a", 404, "Not Found", http.client.HTTPMessage(), None),
    http.client.InvalidURL("control characters"),
    Refused(404),
    Refused(200),
    Answered(410),
    Stored(404),
    Coded(404),
    OSError(-2, "decoder error -2"),
    OSError(99999, "no such number"),
    RuntimeError("read_file, read_write_file.cpp:78, [Errno 2] No such file or directory: 'a'"),
    Exception(f"/data/lmdb: {os.strerror(errno.EISDIR)}"),
    DataError("Image a cannot be read (truncated)."),
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", OF_SYSTEM, ids=repr)
def test_what_an_error_was_made_of_is_looked_at(error, way):
    away = judged(lambda: way(error))
    assert away is not None
    assert "\n" not in str(away)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", OF_IMAGE, ids=repr)
def test_what_is_made_of_an_images_own_fault_is_broken(error, way):
    assert_broken(lambda: way(error))


@pytest.mark.parametrize("error", OF_SYSTEM, ids=repr)
def test_an_image_that_counts_as_broken_and_is_not_is_noticed(error):
    with pytest.raises(AssertionError, match="cannot be reached"):
        assert_broken(lambda: by_cause(error))


@pytest.mark.parametrize(("way", "workers"), [*((way, 0) for way in WAYS), (by_reason, 2)])
def test_a_server_that_is_away_stops_a_scan_that_skips_broken_images(way, workers, tmp_path):
    def read() -> None:
        way(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"))

    with pytest.raises(DataError, match=r"^Image 5 of .* cannot be reached \(.*refused\); mend"):
        scanned(read, tmp_path, workers=workers)
    assert not list(tmp_path.glob("shard-*"))


@pytest.mark.parametrize("way", WAYS)
def test_the_same_errors_made_of_a_damaged_image_are_skipped(way, tmp_path):
    assert scanned(lambda: way(OSError("truncated")), tmp_path).broken() == [5, 6, 7, 8]


def test_a_real_lack_of_memory_is_told_from_a_broken_image():
    for lacking in (lambda: torch.empty(2**48), lambda: np.empty(2**48)):
        assert "memory is full" in str(judged(lacking))


def test_what_was_handled_before_an_image_was_read_is_no_cause(tmp_path):
    """As where a program scans anew because something else had failed."""

    def read() -> None:
        by_context(OSError("truncated"))

    for error in (ConnectionRefusedError("away"), MemoryError(), FileNotFoundError(2, "", "/no/a")):
        try:
            raise error
        except type(error):
            assert scanned(read, tmp_path / type(error).__name__).broken() == [5, 6, 7, 8]


def test_a_second_attempt_after_a_missing_file_is_judged_by_itself():
    """As where a cache has a folder for each image; but not where what failed is said again."""

    def cached() -> None:
        try:
            Path("/no/such/cache/a.png").read_bytes()
        except FileNotFoundError:
            Image.open(io.BytesIO(b"no picture"))

    def fetched() -> None:
        try:
            raise TimeoutError
        except TimeoutError:
            Image.open(io.BytesIO(b"no picture"))

    assert_broken(cached)
    assert judged(fetched) is not None
    said_again = judged(lambda: by_context(FileNotFoundError(2, "", "/no/such/data/a.png")))
    assert "folder /no/such/data is gone or empty" in str(said_again)


def test_causes_that_go_round_in_circles_or_on_and_on_have_an_end():
    first, last = ValueError("first"), ValueError("last")
    first.__cause__, last.__cause__ = last, first
    assert out_of_reach("It", first) is None
    last.args = (first, OSError(errno.EIO, "it fails"))
    assert out_of_reach("It", first) is not None
    long = first = ValueError("0")
    for _ in range(10_000):
        long.__cause__ = long = ValueError("more")
    long.__cause__ = OSError(errno.EIO, "too far away to be looked for")
    assert out_of_reach("It", first) is None


# --- a server -------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        what = self.path.strip("/")
        if what == "slow":
            time.sleep(0.6)
        elif what == "junk":
            self.wfile.write(b"hello\r\n\r\n")
        elif what != "nothing":
            self.send_response(int(what) if what.isdecimal() else 200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * (1000 if what == "no-picture" else 10))
        if what == "reset":
            now = struct.pack("ii", 1, 0)  # without the usual goodbye
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def fetch(url: str) -> Image.Image:
    with urllib.request.urlopen(url, timeout=0.3) as answer:
        return Image.open(io.BytesIO(answer.read()))


@pytest.mark.parametrize(
    "what", ["slow", "junk", "nothing", "cut", "reset", "401", "403", "429", "500", "503"]
)
def test_what_a_server_fails_to_give_is_out_of_reach(what, address):
    assert judged(lambda: fetch(f"{address}/{what}")) is not None


@pytest.mark.parametrize("what", ["404", "410", "no-picture"])
def test_what_a_server_says_is_not_there_or_is_no_picture_is_broken(what, address):
    assert_broken(lambda: fetch(f"{address}/{what}"))


def test_a_server_that_is_gone_is_out_of_reach():
    away = judged(lambda: fetch(f"http://127.0.0.1:{closed_port()}/a.png"))
    assert "refused" in str(away)


def test_a_file_behind_a_url_is_judged_as_a_file(tmp_path):
    (tmp_path / "a.png").touch()
    assert_broken(lambda: fetch((tmp_path / "b.png").as_uri()))
    assert_broken(lambda: fetch((tmp_path / "a.png").as_uri()))


# --- damaged pictures -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_pictures_that_are_cut_off_or_damaged_are_broken(kind):
    """As their library itself fails, outside of this one's reader."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(file, kind)
    whole = file.getvalue()
    n_broken = 0
    for cut in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        for content in (whole[:cut], whole[:cut] + b"\xff\0\x7f" + whole[cut + 3 :]):
            try:
                Image.open(io.BytesIO(content)).load()
            except Exception as error:
                away = out_of_reach("It", error)
                assert away is None, str(away)
                n_broken += 1
    assert n_broken > 20
