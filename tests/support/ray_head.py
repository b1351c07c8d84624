"""A fake job server of a Ray head."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from clm_dist.submit.in_pod import submitter as ray_submitter

TOKEN = "a-token"


class Head:
    """A head of Ray with its API of jobs, and what a test makes of it."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.stopped: list[str] = []
        head = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def answer(self, code: int, body: Any) -> None:
                data = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                job = head.jobs.get(self.path.rpartition("/")[2])
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    return self.answer(401, "who are you?")
                return self.answer(200, job) if job else self.answer(404, "no such job")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path.endswith("/stop"):
                    head.stopped.append(self.path.split("/")[-2])
                else:
                    head.jobs[body["submission_id"]] = {"status": "RUNNING", "entrypoint": body["entrypoint"]}
                self.answer(200, {})

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    monkeypatch.setattr(ray_submitter, "_POLL_S", 0.05)
    # Pods are not asked through the proxy for the outside.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    one = Head()
    yield one
    one.close()
