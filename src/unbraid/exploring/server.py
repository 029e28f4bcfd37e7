"""The app's server: it listens on this machine alone, and answers its own page alone.

All that is computed, is computed by one thread, a request after the other.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
import webbrowser
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from unbraid.base.errors import UnbraidError, brief
from unbraid.exploring.explorer import RUN, Explorer
from unbraid.scanning.scan_options import in_command_words

HOST = "127.0.0.1"
_OWN_HOSTS = (HOST, "localhost")
_MARK = "x-unbraid"  # a header that a page from elsewhere cannot send without being asked first
_MOST_BYTES = 2**26  # of a picture, 64 MiB
_MOST_ASKED = 2**20  # bytes of anything else
_SIDES = (96, 192, 480)  # pixels of a picture's longer side
_FILES = {  # of the page, and what they are
    "/": ("unbraid.exploring", "page/index.html", "text/html"),
    "/report.css": ("unbraid.reporting", "style.css", "text/css"),
    **{
        f"/{name}": ("unbraid.exploring", f"page/{name}", kind)
        for kind, names in (
            ("text/css", ("explore.css",)),
            ("text/javascript", ("app.js", "common.js", "channel.js", "bench.js", "picture.js")),
        )
        for name in names
    },
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SERVING: dict[str, Any] = {
    "log_level": "critical",  # errors are told by _fail
    "access_log": False,
    "lifespan": "off",
    "ws": "none",
    "http": "h11",
    "loop": "asyncio",
    "server_header": False,
    "timeout_graceful_shutdown": 1,
}
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Group(msgspec.Struct, forbid_unknown_fields=True):
    """Images that a person has put together."""

    images: list[int]
    name: str = ""


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """What a page asks; each question needs some of it."""

    split: str = RUN
    picture: str = ""
    channel: int | None = None
    n: int = 0
    gates: dict[str, float] = {}
    groups: list[Group] = []
    name: str = ""


def _channel(asked: Asked) -> int:
    if asked.channel is None:
        raise msgspec.ValidationError("no channel is named")
    return asked.channel


_ANSWERS: dict[str, Callable[[Explorer, Asked], Any]] = {
    "overview": lambda e, a: e.overview(),
    "channels": lambda e, a: e.channels(a.split),
    "thumbs": lambda e, a: e.thumbs(a.split),
    "channel": lambda e, a: e.channel(a.split, _channel(a)),
    "explain": lambda e, a: e.explain(a.split, a.picture, a.channel),
    "gate": lambda e, a: e.gate(a.split, a.picture, a.gates),
    "bench": lambda e, a: e.bench(a.split, _channel(a), a.n),
    "part": lambda e, a: e.part(
        a.split, _channel(a), [g.images for g in a.groups], [g.name for g in a.groups]
    ),
    "save": lambda e, a: e.save(a.split, a.name),
}


def make_app(explorer: Explorer) -> Starlette:
    """Put an explorer behind a page."""
    desk = ThreadPoolExecutor(1)  # torch, scans and archives of images are not for several threads

    async def at_desk(work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(desk, work)

    async def answer(request: Request) -> Response:
        give = _ANSWERS.get(request.path_params["what"])
        if give is None:
            raise HTTPException(404)
        asked = msgspec.json.decode(await _body(request, _MOST_ASKED), type=Asked)
        return _as_json(await at_desk(lambda: give(explorer, asked)))

    async def drop(request: Request) -> Response:
        content = await _body(request, _MOST_BYTES)
        name = request.query_params.get("name", "")
        return _as_json(await at_desk(lambda: explorer.drop(content, name)))

    async def picture(request: Request) -> Response:
        where, side = request.path_params["where"], request.path_params["side"]
        if side not in _SIDES:
            raise HTTPException(404)
        content, kind = await at_desk(lambda: explorer.picture_file(where, side))
        kept = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(content, media_type=kind, headers=kept)

    routes = [Route(path, _send(*file)) for path, file in _FILES.items()]
    routes.append(Route("/ask/{what}", answer, methods=["POST"]))
    routes.append(Route("/drop", drop, methods=["POST"]))
    routes.append(Route("/picture/{version}/{side:int}/{where:path}", picture))
    return Starlette(
        routes=routes,
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard)],
        exception_handlers={
            UnbraidError: _tell,
            OSError: _tell,
            msgspec.MsgspecError: _tell,
            HTTPException: _refuse,
            Exception: _fail,
        },
    )


def _send(package: str, name: str, kind: str) -> Callable[[Request], Awaitable[Response]]:
    content = resources.files(package).joinpath(name).read_bytes()

    async def send(_request: Request) -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return send


def _as_json(value: Any, status: int = 200) -> Response:
    """JSON in ASCII, since a file's name may hold bytes that are no text."""
    content = json.dumps(value, allow_nan=False).encode("ascii")
    return Response(content, status, {"Cache-Control": "no-store"}, "application/json")


async def _body(request: Request, most: int) -> bytes:
    """Read what was sent, unless it is too much."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise HTTPException(413)
        parts.append(part)
    return b"".join(parts)


async def _guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
    """Let in the page itself alone: not those from elsewhere, by whatever name they call us."""
    host = request.headers.get("host", "").rsplit(":", 1)[0]
    origin = request.headers.get("origin")
    foreign = origin is not None and origin != f"http://{request.headers.get('host', '')}"
    unmarked = request.method != "GET" and _MARK not in request.headers
    if host not in _OWN_HOSTS or foreign or unmarked:
        response = _as_json({"error": "This page may not ask here."}, 403)
    else:
        response = await go_on(request)
    response.headers.update(_HEADERS)
    return response


async def _tell(_request: Request, error: Exception) -> Response:
    """Say in a sentence what is wrong with a request."""
    if isinstance(error, msgspec.MsgspecError):
        text = f"The page asked for what this version does not know ({brief(error)}); reload it."
    else:
        text = in_command_words(str(error))
    return _as_json({"error": text}, 400)


async def _refuse(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    text = "This is not there." if status != 413 else "This file is too large; 64 MiB are read."
    return _as_json({"error": text}, status)


async def _fail(_request: Request, error: Exception) -> Response:
    if not isinstance(error, ClientDisconnect):
        print(f"unbraid explore: {type(error).__name__}: {brief(error)}", file=sys.stderr)
    return _as_json({"error": f"Something went wrong ({brief(error)})."}, 500)


def listen(port: int) -> socket.socket:
    """Listen on this machine's own address alone, at a port or, if it is taken, at a free one."""
    for wanted in (port, 0):
        own = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        if sys.platform != "win32":  # there it would take a port that is in use
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind((HOST, wanted))
            own.listen(128)
        except OSError:
            own.close()
            if not wanted:
                raise
        else:
            return own
    raise AssertionError  # the second try returns or raises


def serve(explorer: Explorer, port: int, *, opens: bool, tell: Callable[[str], object]) -> None:
    """Serve the page until ctrl-C.

    Args:
        explorer: of the run.
        port: to listen at; if it is taken, another one.
        opens: whether the browser is to open the page.
        tell: told where the page is.
    """
    own = listen(port)
    address = f"http://{HOST}:{own.getsockname()[1]}/"
    try:
        tell(f"Explore: {address} (ctrl-C ends it)")
        if opens:
            threading.Thread(target=_open_browser, args=(address,), daemon=True).start()
        config = uvicorn.Config(make_app(explorer), **_SERVING)
        uvicorn.Server(config).run(sockets=[own])
    except KeyboardInterrupt as stop:
        if stop.args:  # SIGTERM
            raise


def _open_browser(address: str) -> None:
    """Open the page in a browser with windows; one of the terminal would take that over."""
    try:
        browser = webbrowser.get()
    except webbrowser.Error:
        return
    if type(browser) is not webbrowser.GenericBrowser:
        browser.open(address)
