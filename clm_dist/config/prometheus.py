"""Where a run serves its figures to Prometheus, by environment variables."""

from collections.abc import Mapping

from clm_dist.errors import ConfigError

HOST, PORT = "OTEL_EXPORTER_PROMETHEUS_HOST", "OTEL_EXPORTER_PROMETHEUS_PORT"
"""The names, and the default port, that OpenTelemetry has for this."""
_DEFAULTS = {HOST: "127.0.0.1", PORT: "9464"}


def listen_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """The address and the port to listen at. Raises ConfigError where the port is not one; 0 takes a free one."""
    host, port = (environment.get(name) or default for name, default in _DEFAULTS.items())
    if not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"{PORT} is {port!r}, which is not a port; set it to a number up to 65535", field="tracking")
    return host, int(port)
