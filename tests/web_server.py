"""A web server on loopback that shows the files of a folder to those who have the key, as pre-signed URLs do."""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


class WebServer:
    """A context manager. Every request must have the query `key`, letter by letter; else it is answered with `refusal`.

    Attributes:
        asked: paths and queries of all requests.
        expires_after: so many more requests for the bytes of files are served; None for all.
    """

    refusal = 403

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        self.asked: list[str] = []
        self.expires_after: int | None = None

    def __enter__(self) -> "WebServer":
        site = self

        class Handler(_Handler):
            server_site = site

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, name: str) -> str:
        """The URL of a file, with the key."""
        return f"{self.url}/{name}?{self.key}"

    def lets_in(self, query: str, method: str) -> bool:
        """Whether a request is served."""
        if self.expires_after is not None and method == "GET":
            self.expires_after -= 1
        return query == self.key and (self.expires_after is None or self.expires_after >= 0)


class _Handler(BaseHTTPRequestHandler):
    server_site: WebServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        asked = urlsplit(self.path)
        self.server_site.asked.append(self.path)
        file = self.server_site.folder / unquote(asked.path).lstrip("/")
        if not self.server_site.lets_in(asked.query, self.command):
            return self.send_error(self.server_site.refusal)
        if not file.is_file():
            return self.send_error(404)
        data = file.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(data) - 1)) if wanted else (0, len(data) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first : last + 1])

    do_GET = do_HEAD = _serve
