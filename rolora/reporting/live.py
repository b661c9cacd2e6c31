"""A page that is made anew whenever it is asked for, to this machine alone."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from rolora.errors import BadInput

HOST = "127.0.0.1"
_NAMES = ("localhost", HOST)
EVERY = 2000  # milliseconds between a page's questions
# Replaces what has changed; what a person has opened or closed stays so.
SCRIPT = f"""
let before = null;
async function look() {{
  try {{
    const answer = await fetch(location.pathname, {{ cache: "no-store" }});
    const mark = answer.headers.get("ETag");
    if (answer.ok && mark !== before) {{
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const open = new Map(
        [...document.querySelectorAll("details")].map((part) => [part.id, part.open]));
      document.querySelector("main").replaceWith(page.querySelector("main"));
      for (const part of document.querySelectorAll("details")) {{
        if (open.has(part.id)) part.open = open.get(part.id);
      }}
      before = mark;
    }}
    document.title = "RoLoRA report";
  }} catch (error) {{
    document.title = "RoLoRA report (no answer)";
  }}
  setTimeout(look, {EVERY});
}}
setTimeout(look, {EVERY});
"""


class Server(ThreadingHTTPServer):
    """Answers `/` with `page()` and `/live.js`, and nothing else; no file is served."""

    daemon_threads = True

    def __init__(self, port: int, page: Callable[[], str]):
        super().__init__((HOST, port), _Handler)
        self.page, self.making = page, Lock()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = (self.headers.get("Host") or "").rpartition(":")[0] or self.headers.get("Host")
        if name not in _NAMES:  # a name of elsewhere that was made to lead here
            self.send_error(403)
        elif self.path == "/":
            with self.server.making:  # matplotlib draws one picture at a time
                page = self.server.page()
            self._answer(page, "text/html; charset=utf-8")
        elif self.path == "/live.js":
            self._answer(SCRIPT, "text/javascript; charset=utf-8")
        else:
            self.send_error(404)

    def _answer(self, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing of each question."""

    def log_error(self, format: str, *args: object) -> None:
        """Nor of those that were refused."""


def serve(port: int, page: Callable[[], str]) -> None:
    """Until it is interrupted. Raises BadInput where the port cannot be had."""
    try:
        server = Server(port, page)
    except OSError as error:
        raise BadInput(
            f"--port {port} cannot be used ({error.strerror}): give another, or 0 for any"
        ) from None
    with server:
        print(f"http://{HOST}:{server.server_address[1]}/ until Ctrl-C", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print(file=sys.stderr)
