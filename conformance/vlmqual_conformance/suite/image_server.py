"""Images that a library can fetch from an address on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from typing import Any

import PIL.Image

from vlmqual_contract.subject import RemoteLibrary
from vlmqual_contract.target import Array


@contextmanager
def served(library: RemoteLibrary, pixels: Array) -> Iterator[str]:
    """Address of a PNG file with these pixels, which the library's worker reaches without a proxy."""
    for name in ("NO_PROXY", "no_proxy"):
        library.call("os:environ.__setitem__", name, "127.0.0.1")
    buffer = BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    body = buffer.getvalue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "image/png")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/image.png"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
