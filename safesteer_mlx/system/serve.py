"""One page for the browser of this computer's user, and for nobody else: what `--watch` shows.

It listens on the loopback address alone, under a random word that only the printed address holds. A page from elsewhere
that gives itself this address (DNS rebinding) still sends its own name in the Host header, and is refused.
"""

import secrets
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from .screen import UserError

LOOPBACK = "127.0.0.1"
REFRESH = 5  # seconds after which a browser asks again
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves what `draw` returns, a page and whether another will follow, from a thread of its own; use it in `with`. A
    UserError if the port cannot be used."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, draw: Callable[[], tuple[bytes, bool]], port: int = 0):
        self.draw = draw
        self.path = f"/{secrets.token_urlsafe(16)}/"
        self.last_asked = -float("inf")
        self.shown_last = threading.Event()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UserError(
                f"--watch-port {port} cannot be used ({error.strerror}); give another, or 0 for any that is free"
            ) from None

    def server_bind(self) -> None:
        """Bind as TCP alone; HTTPServer would ask a name server for this computer's name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{LOOPBACK}:{self.server_port}{self.path}"

    def __enter__(self) -> "PageServer":
        threading.Thread(target=self.serve_forever, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def let_see_the_end(self) -> None:
        """Wait until a browser that is looking has the last page; it will ask within `REFRESH` seconds."""
        if time.monotonic() - self.last_asked < 2 * REFRESH:
            self.shown_last.wait(2 * REFRESH)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error, and nothing of it belongs on the run's screen."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 10
    server_version, sys_version = "safesteer-mlx", ""

    def do_GET(self) -> None:
        hosts = [host.removesuffix(f":{self.server.server_port}") for host in self.headers.get_all("Host") or []]
        if hosts not in ([LOOPBACK], ["localhost"]):
            return self.send_error(403)
        if not secrets.compare_digest(self.path.encode(), self.server.path.encode()):
            return self.send_error(404)
        page, more = self.server.draw()
        self.server.last_asked = time.monotonic()
        self.send_response(200)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(page)))
        if more:
            self.send_header("Refresh", str(REFRESH))
        self.end_headers()
        self.wfile.write(page)
        if not more:
            self.server.shown_last.set()

    def log_message(self, *_: object) -> None:
        """Requests are not for the run's screen."""
