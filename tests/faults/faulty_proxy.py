"""A proxy in front of an S3 server that can be told to refuse everything for a while, to be slow, or to cut uploads off."""

from __future__ import annotations

import http.client
import math
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

NOT_FORWARDED = ("connection", "keep-alive", "transfer-encoding", "expect")
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a socket that is closed at once answers with a reset
LEAST_CUT_BYTES = 256  # an upload that is cut off has at least so many


class Refusal(NamedTuple):
    """What an S3 server answers instead of doing it."""

    status: int
    code: str
    message: str

    def body(self) -> bytes:
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()


SLOW_DOWN = Refusal(503, "SlowDown", "Please reduce your request rate.")  # AWS's, for too many requests
EXPIRED = Refusal(400, "ExpiredToken", "The provided token has expired.")  # AWS's, for temporary keys


class FaultyProxy:
    """Forwards to `port` of this machine; `endpoint` is its own address. `counts` what was `refused`, `delayed`, `reset`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.counts: Counter[str] = Counter()
        self.delay_s = 0.0  # of every answer
        self.num_resets_left = 0
        self.refusal, self.refuses_until_s = SLOW_DOWN, 0.0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, self))
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def refuse_for(self, seconds: float, refusal: Refusal = SLOW_DOWN) -> None:
        self.refusal, self.refuses_until_s = refusal, time.monotonic() + seconds

    def refuse_from_now_on(self, refusal: Refusal) -> None:
        self.refuse_for(math.inf, refusal)

    def answer_again(self) -> None:
        self.refuses_until_s, self.delay_s, self.num_resets_left = 0.0, 0.0, 0

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Asks the server for one client, or does what the proxy was told to do instead."""

    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: FaultyProxy, *arguments: Any) -> None:
        self.proxy = proxy
        super().__init__(*arguments)  # which handles the connection

    def handle(self) -> None:
        with suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def forward(self) -> None:
        num_bytes = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT" and num_bytes >= LEAST_CUT_BYTES and self.proxy.num_resets_left > 0:
            self.proxy.num_resets_left -= 1
            self.cut_off(num_bytes)
            return
        body = self.rfile.read(num_bytes)
        if self.proxy.delay_s:
            self.proxy.counts["delayed"] += 1
            time.sleep(self.proxy.delay_s)
        if time.monotonic() < self.proxy.refuses_until_s:
            self.proxy.counts["refused"] += 1
            self.answer(self.proxy.refusal.status, [("Content-Type", "application/xml")], self.proxy.refusal.body())
            return
        try:
            self.answer(*self.ask(body))
        except OSError:  # the server is away: the client sees what it would see without a proxy
            self.close_connection = True

    def cut_off(self, num_bytes: int) -> None:
        """Take half of an upload, then reset the connection."""
        self.rfile.read(num_bytes // 2)
        self.proxy.counts["reset"] += 1
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.connection.close()

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.port, timeout=60)
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
