"""A run's figures for Prometheus, which comes for them: /metrics on a port, while the run goes on."""

import os
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any

from clm_dist.config.prometheus import HOST, PORT, listen_address
from clm_dist.errors import ConfigError
from clm_dist.files.record_types import Record
from clm_dist.train.trackers.prometheus_metrics import RunMetrics

_ANY = ("0.0.0.0", "::")
_LAST_SCRAPE_S = 20.0
"""Longer than the time between two scrapes usually is, and shorter than trackers have after the end."""
_REQUEST_S = 10.0


class Prometheus:
    """Serves the figures; a client is answered by a thread of its own."""

    live = True

    def start(self, name: str, fields: Mapping[str, Any], directory: Path, run_id: str | None) -> str:
        from prometheus_client import CollectorRegistry, MetricsHandler

        figures = CollectorRegistry()
        self._metrics = RunMetrics(name, figures)
        is_over = self._is_over = threading.Event()
        was_read, has_all = self._was_read, self._has_all = threading.Event(), threading.Event()

        class Handler(MetricsHandler):
            registry = figures
            timeout = _REQUEST_S

            def do_GET(self) -> None:
                is_last = is_over.is_set()
                super().do_GET()
                was_read.set()
                if is_last:
                    has_all.set()

        host, port = listen_address(os.environ)
        try:
            ((family, *_, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)

            class Server(ThreadingTCPServer):
                address_family = family
                allow_reuse_address = daemon_threads = True

            self._server = Server(address, Handler)  # type: ignore[arg-type]  # of the family
        except socket.gaierror as error:
            raise ConfigError(f"{HOST} {host!r} is no address: {error.strerror}; set it to one of this host") from error
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host}:{port}: {error.strerror}; set {PORT} to another port, 0 for a free one"
            ) from error
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        shown = socket.gethostname() if host in _ANY else f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/metrics"
        return name

    def add(self, records: Sequence[Record]) -> None:
        for record in records:
            self._metrics.take(record)

    def finish(self, status: str) -> None:
        # Any other run is to go on, perhaps at once and on this host, where it needs the port.
        if status == "done":
            self._metrics.set_done()
            self._is_over.set()
            if self._was_read.is_set():
                self._has_all.wait(_LAST_SCRAPE_S)
        self._server.shutdown()
        self._server.server_close()
