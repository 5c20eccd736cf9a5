"""A chat endpoint that answers what a test tells it to, on 127.0.0.1: real HTTP, real sockets, and every kind of nonsense."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from types import MappingProxyType
from typing import Any, NamedTuple

from local_server import serve_http


class Request(NamedTuple):
    """What the server was sent, and when."""

    headers: dict[str, str]
    body: dict[str, Any]
    at_s: float

    @property
    def prompt(self) -> str:
        return "".join(part.get("text", "") for part in self.body["messages"][0]["content"])

    @property
    def image_url(self) -> str:
        return self.body["messages"][0]["content"][0]["image_url"]["url"]


class Answer(NamedTuple):
    """What it sends back."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = MappingProxyType({})
    wait_s: float = 0.0
    breaks_off: bool = False


def says(text: Any, **choice: Any) -> Answer:
    """A chat completion with this text."""
    message = {"role": "assistant", "content": text}
    completion = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | choice],
    }
    return Answer(body=json.dumps(completion).encode())


class Endpoint(NamedTuple):
    """A running server: where it is, and what it was asked so far."""

    url: str
    requests: list[Request]


@contextmanager
def serve(answer: Callable[[int, Request], Answer]) -> Iterator[Endpoint]:
    """A server that answers its n-th request (from 0 on) as told, until the block ends."""
    requests: list[Request] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = Request({name.lower(): value for name, value in self.headers.items()}, body, time.monotonic())
            with lock:
                requests.append(request)
                number = len(requests) - 1
            self._send(answer(number, request))

        def _send(self, reply: Answer) -> None:
            time.sleep(reply.wait_s)
            self.send_response(reply.status)
            for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(reply.body) * (2 if reply.breaks_off else 1)))
            self.end_headers()
            self.wfile.write(reply.body)
            if reply.breaks_off:
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            """The requests are kept; a log is not wanted."""

    with serve_http(Handler) as url:
        yield Endpoint(f"{url}/v1", requests)
