"""An OpenAI-compatible endpoint on this machine, for judges and simulated users: a real server whose behaviour is scripted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "TRIMTAB_TEST_KEY"


def completion(content: Any, finish: str | None = "stop", **message: Any) -> bytes:
    """A chat completion as a body, with a reason why it ended and further fields of the message."""
    said = {"role": "assistant", "content": content, **message}
    return json.dumps({"choices": [{"message": said, "finish_reason": finish}]}).encode()


def refusal(message: str, **more: Any) -> bytes:
    """The body of an error."""
    return json.dumps({"error": {"message": message, **more}}).encode()


def dripping(body: bytes, pause: float) -> Iterator[bytes]:
    """A body byte by byte."""
    for i in range(len(body)):
        time.sleep(pause)
        yield body[i : i + 1]


class Endpoint:
    """An OpenAI-compatible server on this machine.

    ``answer`` gets the judge's prompt and how often it was asked, and gives (status, reply) or (status, reply, headers). A reply
    is words, a whole body, or parts of a body, one after another.
    """

    def __init__(self) -> None:
        self.answer: Callable[[str, int], tuple[Any, ...]] = lambda prompt, count: (200, "3")
        self.asked: list[str] = []
        self.times: list[float] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        at_once = 0
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal at_once
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, at_once)
                    endpoint.keys.add(self.headers.get("Authorization"))
                    endpoint.requests.append({"path": self.path, **body})
                    endpoint.asked.append(prompt)
                    endpoint.times.append(time.monotonic())
                    count = endpoint.asked.count(prompt)
                try:
                    self._reply(*endpoint.answer(prompt, count))
                finally:
                    with lock:
                        at_once -= 1

            def _reply(self, status: int, reply: Any, headers: dict[str, str] | None = None) -> None:
                parts = (
                    [completion(reply)] if isinstance(reply, str) else [reply] if isinstance(reply, bytes) else reply
                )
                with contextlib.suppress(ConnectionError):  # who asked may have gone
                    self.send_response(status)
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.end_headers()  # of HTTP/1.0: the body ends with the connection
                    for part in parts:
                        self.wfile.write(part)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
