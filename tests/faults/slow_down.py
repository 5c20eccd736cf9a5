"""A proxy in front of an S3 server that can be told to refuse everything for a while, as AWS does with too many requests."""

from __future__ import annotations

import http.client
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REFUSAL = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
NOT_FORWARDED = ("connection", "keep-alive", "transfer-encoding", "expect")


class SlowDownProxy:
    """Forwards to `port` of this machine; `endpoint` is its own address. `num_refused` requests have been refused."""

    def __init__(self, port: int) -> None:
        self.num_refused = 0
        self._refuses_until_s = 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler(port))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def refuse_for(self, seconds: float) -> None:
        self._refuses_until_s = time.monotonic() + seconds

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self, port: int) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if time.monotonic() < proxy._refuses_until_s:
                    proxy.num_refused += 1
                    self.answer(503, [("Content-Type", "application/xml")], REFUSAL)
                    return
                try:
                    self.answer(*self.ask(body))
                except OSError:  # the server is away: the client sees what it would see without a proxy
                    self.close_connection = True

            def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():  # the host as well: it is signed
                    if name.lower() not in NOT_FORWARDED:
                        connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                data = response.read()
                connection.close()
                return response.status, response.getheaders(), data

            def answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
                self.send_response_only(status)
                sizes = [value for name, value in headers if name.lower() == "content-length"]
                for name, value in headers:
                    if name.lower() not in (*NOT_FORWARDED, "content-length"):
                        self.send_header(name, value)
                is_head = self.command == "HEAD"
                if status not in (204, 304):
                    self.send_header("Content-Length", sizes[0] if is_head and sizes else str(len(data)))
                self.end_headers()
                if not is_head:
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward  # noqa: N815 http.server's names

            def log_message(self, *arguments: Any) -> None:
                """Nothing: what matters is counted."""

        return Handler
