"""What the server's port answers to a browser, a load balancer and Prometheus: GET and HEAD, which change nothing.

/              the dashboard, which polls state.json
/state.json    what it shows
/metrics       for Prometheus
/healthz       OK while the process runs, as openpi's server says it; needs no token
/readyz        OK while observations are taken, 503 once the server stops; needs no token

Only plain requests are pages. Whoever asks for a websocket needs the token on every path, and there is one at / alone.
"""

import http
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.protocol import State

from manipi.page import render
from manipi.serve.access import Access
from manipi.serve.state import ServerState

_OPEN = ("/healthz", "/readyz")
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="manipi: any name, the token as password"'}
"""For browsers, which send the token as a password then."""
_LATER = {"Retry-After": "1"}
"""Seconds. A 503 is no refusal: a client tries again, and a robot goes on with what is left of its chunk until then."""


_WITH_BODY = re.compile(
    rb"[A-Z]+ \S+ HTTP/1\.[01]\r\n(?:[^\r\n]+\r\n)*?(?:transfer-encoding:|content-length:(?! *0*\r))", re.IGNORECASE
)
"""The beginning of a request that has a body."""


class Connection(ServerConnection):
    """One that also answers a request with a body, where the library hangs up without a word.

    Args:
        known: gets the connection, also before its handshake.
    """

    def __init__(self, known: "WeakSet[ServerConnection]", *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        known.add(self)

    def data_received(self, data: bytes) -> None:
        if self.protocol.state is State.CONNECTING and _WITH_BODY.match(data):
            refusal = _response(400, "a request must have no body; nothing here can be changed")
            if data.startswith(b"HEAD "):
                refusal.body = b""
            self.transport.write(refusal.serialize())
            self.transport.close()
        else:
            super().data_received(data)


@dataclass(eq=False)
class Pages:
    """Looks at every request first: pages are answered here, and so are handshakes that must not be.

    Args:
        host, address: where the server listens, as it was told and as it was resolved.
        num_waiting: how many observations wait for the policy.
    """

    state: ServerState
    access: Access
    host: str
    address: tuple
    max_clients: int
    num_waiting: Callable[[], int]

    def __post_init__(self) -> None:
        robot = self.state.robot
        title = "manipi serve" if robot is None else f"{robot.name} · manipi serve"
        self._dashboard = render("serve/dashboard.html", title=title).decode()

    async def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """The response, or None for a handshake that may go on."""
        path, headers = request.path.partition("?")[0], request.headers
        method = getattr(request, "method", "GET")  # older releases of websockets let nothing else through
        upgrade = any("websocket" in value.lower() for value in headers.get_all("Upgrade"))
        if not self.access.accepts_host(headers, self.host, self.address):
            response = _response(403, "the Host header is no name of this computer; use localhost, or set a token")
        elif method not in (("GET",) if upgrade else ("GET", "HEAD")):
            response = _response(405, "GET only; nothing here can be changed", Allow="GET, HEAD")
        elif (upgrade or path not in _OPEN) and not self.access.admits(headers):
            response = _response(401, "the token is missing, or another one", **_CHALLENGE)
        elif upgrade:
            response = self._refuse_handshake(path)
        elif path == "/state.json":
            response = _response(200, json.dumps(await self.state.to_json()), "application/json")
        else:
            response = self._page(path)
        if method == "HEAD" and response is not None:
            response.body = b""
        return response

    def _refuse_handshake(self, path: str) -> Response | None:
        if path != "/":
            return _response(404, "policies are at /, the path that clients use unless they are told another one")
        if not self.state.ready:
            return _response(503, "the server is stopping", **_LATER)
        if len(self.state.clients) >= self.max_clients:
            return _response(503, f"busy: {self.max_clients} clients are connected (--limits.max-clients)", **_LATER)
        return None

    def _page(self, path: str) -> Response:
        if path == "/healthz":
            return _response(200, "OK")
        if path == "/readyz":
            return _response(200, "OK") if self.state.ready else _response(503, "stopping", **_LATER)
        if path == "/metrics":
            text = self.state.to_prometheus(clients=len(self.state.clients), waiting=self.num_waiting())
            return _response(200, text, "text/plain; version=0.0.4; charset=utf-8")
        if path == "/":
            return _response(200, self._dashboard, "text/html; charset=utf-8")
        return _response(404, "nothing here; the dashboard is at /")


def _response(code: int, text: str, kind: str = "text/plain; charset=utf-8", **headers: str) -> Response:
    status, body = http.HTTPStatus(code), (text if text.endswith("\n") else text + "\n").encode()
    fields = {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body)), **headers}
    return Response(status.value, status.phrase, Headers(fields), body)
