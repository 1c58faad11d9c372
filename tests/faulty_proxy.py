"""A bad day between a program and an HTTP server: a proxy on loopback that refuses, stalls and cuts, by a seed.

Every fault is one that object stores and networks show: `503 SlowDown`; an answer whose connection ends in the middle of its
body; a request that was carried out and whose answer never came; a request whose body never arrives whole; seconds of silence.
"""

import http.client
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass(frozen=True)
class Faults:
    """How often what goes wrong: shares of all requests, drawn in the order in which they come."""

    slow_down: float = 0.0
    """Answered with 503 SlowDown, and not passed on."""
    cut: float = 0.0
    """The connection ends inside the body: of the answer to a GET, of the request of a PUT or POST."""
    lost: float = 0.0
    """Passed on and carried out, and the connection ends before a byte of the answer."""
    stall: float = 0.0
    """Answered after `stall_seconds`."""
    stall_seconds: float = 2.0
    conditions: bool = True
    """Whether If-None-Match is known at all; else 501."""
    seed: int = 0


@dataclass
class FaultyProxy:
    """Passes requests on to a server on loopback, but for the faults. A context manager.

    `seen` counts requests by method, `done` the faults by name; `most_at_once` were under way together.
    """

    target: int
    """The server's port."""
    faults: Faults = field(default_factory=Faults)
    refuse: Callable[[str, str], tuple[int, str] | None] = lambda method, path: None
    """Status and error code of requests that are not passed on, by their method and path."""
    seen: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0

    def __enter__(self) -> "FaultyProxy":
        proxy = self

        class Handler(_Handler):
            plan = proxy

        self._random, self._lock, self._now = random.Random(self.faults.seed), threading.Lock(), 0
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str) -> str:
        """What happens to the next request; empty for nothing."""
        with self._lock:
            self.seen[method] += 1
            point = self._random.random()
        for name in ("slow_down", "cut", "lost", "stall"):
            point -= getattr(self.faults, name)
            if point < 0:
                return name
        return ""

    def note(self, fault: str) -> None:
        with self._lock:
            self.done[fault] += 1

    @contextmanager
    def under_way(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    plan: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        with self.plan.under_way():
            self._respond(self.plan, self.plan.draw(self.command))

    def _respond(self, plan: FaultyProxy, fault: str) -> None:
        if fault == "cut" and self.command in ("PUT", "POST") and int(self.headers.get("Content-Length", 0)) > 1:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            plan.note("cut")
            return self._hang_up()
        body = self._body()
        if fault == "slow_down":
            plan.note("slow_down")
            return self._refuse(503, "SlowDown")
        if refusal := plan.refuse(self.command, self.path):
            return self._refuse(*refusal)
        if not plan.faults.conditions and "If-None-Match" in self.headers:
            return self._refuse(501, "NotImplemented")
        if fault == "stall":
            plan.note("stall")
            time.sleep(plan.faults.stall_seconds)
        status, headers, content, length = self._passed_on(body)
        if fault == "lost":
            plan.note("lost")
            return self._hang_up()
        if fault == "cut" and self.command == "GET" and len(content) > 1:
            plan.note("cut")
            return self._answer(status, headers, content[: len(content) // 2], whole=len(content))
        self._answer(status, headers, content, whole=length)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _passed_on(self, body: bytes) -> tuple[int, dict[str, str], bytes, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.plan.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        content = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP}
        connection.close()
        return answer.status, kept, content, int(answer.getheader("Content-Length") or len(content))

    def _answer(self, status: int, headers: dict[str, str], content: bytes, whole: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        whole = len(content) if whole is None else whole
        if status != 204:
            self.send_header("Content-Length", str(whole))
        self.end_headers()
        self.wfile.write(content)
        if self.command != "HEAD" and len(content) < whole:
            self._hang_up()

    def _refuse(self, status: int, code: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>not now</Message></Error>'
        self._answer(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text.encode())

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def at_port(url: str, port: int) -> str:
    """An S3 URL at an endpoint of this machine: the server's own, or a proxy's."""
    return f"{url}?endpoint_override=127.0.0.1%3A{port}&scheme=http&region=us-east-1"
