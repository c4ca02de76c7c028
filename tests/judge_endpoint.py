"""An OpenAI-compatible endpoint on this machine, for judges and simulated users."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "TRIMTAB_TEST_KEY"


class Endpoint:
    """An OpenAI-compatible server on this machine: ``answer`` gets the judge's prompt and how often it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int], tuple[int, Any]] = lambda prompt, count: (200, "3")
        self.asked: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.keys.add(self.headers.get("Authorization"))
                endpoint.requests.append({"path": self.path, **body})
                prompt = body["messages"][-1]["content"]
                endpoint.asked.append(prompt)
                status, reply = endpoint.answer(prompt, endpoint.asked.count(prompt))
                if isinstance(reply, str):
                    reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
