"""A RAY_ADDRESS at which no Ray is."""

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator

import pytest
import ray

from clm_dist.config import ray_address
from clm_dist.config.job import ClusterConfig
from clm_dist.config.ray_address import check_ray_address, host_and_port
from clm_dist.errors import ConfigError, NotReadyError
from clm_dist.prepare.pools import open_pool
from clm_dist.train.ray import cluster, private
from clm_dist.train.ray.cluster import start_ray


def test_a_ray_that_is_not_there_is_said_at_once() -> None:
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS {address}: Connection refused; start that Ray, or unset"):
            check_ray_address(address)
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS no-such-host.invalid:6379: .*; start that Ray"):
        check_ray_address("no-such-host.invalid:6379")
    for address in ("auto", "local"):
        check_ray_address(address)


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("head.cluster:6379", ("head.cluster", 6379)),
        ("[fd00::1]:6379", ("fd00::1", 6379)),
        ("fd00::1:6379", None),
        ("[fd00::1]", None),
        ("head:²", None),
        ("auto", None),
    ],
)
def test_an_address_has_a_host_and_a_port(address: str, parts: tuple[str, int] | None) -> None:
    assert host_and_port(address) == parts


@contextlib.contextmanager
def answering(answer: bytes | None, family: socket.AddressFamily = socket.AF_INET) -> Iterator[int]:
    """The port of a server that answers the first bytes of each caller, and hangs up; None says nothing."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(64)
            if answer is None:
                over.wait()
            else:
                self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        address_family = family

    over = threading.Event()
    with Server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            over.set()
            server.shutdown()


# What a server of gRPC sends first: settings, and that it has seen the caller's.
GRPC = bytes.fromhex("00000c040000000000 000300000064 000400010000 000000040100000000")


def test_an_ipv6_address_is_asked_too() -> None:
    with answering(GRPC, socket.AF_INET6) as port:
        check_ray_address(f"[::1]:{port}")
        check_ray_address(f"ray://[::1]:{port}")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS \[::1\]:\d+: Connection refused; start that Ray"):
        check_ray_address(f"[::1]:{port}")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.2\r\n", None])
def test_another_server_is_no_ray(answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_address, "_ANSWER_S", 0.5)
    with answering(answer) as port:
        what = (
            "what listens there is no Ray" if answer is not None else "it answers nothing within 0.5 s, as no Ray does"
        )
        said = rf"RAY_ADDRESS 127\.0\.0\.1:{port}: {what}.*; start that Ray, or unset RAY_ADDRESS"
        with pytest.raises(ConfigError, match=said):
            check_ray_address(f"127.0.0.1:{port}")
        # Of an encrypted one nothing can be seen.
        monkeypatch.setenv("RAY_USE_TLS", "1")
        check_ray_address(f"127.0.0.1:{port}")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("fd00::1:6379", r"an IPv6 address is in brackets, as in \[fd00::1\]:6379"),
        (f"{'a' * 70}.b:1", "label"),
        ("a..b:1", "label"),
    ],
)
def test_an_address_that_is_none_is_an_error_like_others(address: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS .*{problem}.*; start that Ray, or unset RAY_ADDRESS"):
        check_ray_address(address)


@pytest.mark.parametrize(
    ("address", "problem"), [("127.0.0.1:1", "Connection refused"), ("nowhere", "Invalid address format: nowhere")]
)
def test_both_who_join_a_ray_say_so(address: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    said = f"RAY_ADDRESS {address}: {problem}; start that Ray, or unset RAY_ADDRESS"
    with pytest.raises(ConfigError, match=said), start_ray(ClusterConfig()):
        pass
    if problem == "Connection refused":
        with pytest.raises(ConfigError, match=said), open_pool(None, is_small=False):
            pass


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a token would be forgotten: another test's Ray may run in this process, whose token must stay."""
    forgotten: list[bool] = []
    monkeypatch.setattr(private, "forget_token", lambda: forgotten.append(True))
    return forgotten


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Ray that is started beside this process: its head answers at the third try, and it gets nodes one by one."""
    tries: list[str] = []

    def check(address: str) -> None:
        tries.append(address)
        if len(tries) < 3:
            raise ConfigError(f"RAY_ADDRESS {address}: Connection refused")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")
    monkeypatch.setenv("CLM_DIST_NODES", "3")
    monkeypatch.setattr(cluster, "check_ray_address", check)
    monkeypatch.setattr(cluster, "_POLL_S", 0.01)
    monkeypatch.setattr(cluster, "alive_nodes", lambda: {f"n{i}": {"CPU": 1.0} for i in range(min(3, len(tries) - 2))})
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: len(tries) > 2)
    monkeypatch.setattr(ray, "shutdown", lambda **_: None)
    monkeypatch.setattr(ray._private.worker, "print_to_stdstream", None)
    return tries


def join(address: str, settings: ClusterConfig) -> None:
    with cluster._joined(address, settings, {}):
        pass


def test_nodes_that_are_started_beside_the_driver_are_waited_for(starting: list[str], forgotten: list[bool]) -> None:
    starting += ["", ""]
    assert forgotten == []
    join("10.0.0.1:1", ClusterConfig())
    assert len(starting) == 5
    # That of a Ray that this process had before.
    assert forgotten == [True]


def test_nodes_that_do_not_come_are_a_reason_to_try_again(starting: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_NODES_TIMEOUT_S", 0.1)
    monkeypatch.setattr(cluster, "alive_nodes", lambda: {"n0": {"CPU": 1.0}})
    with pytest.raises(NotReadyError, match=r"10.0.0.1:1 is not complete after 0.1 s: it has 1 of 3 nodes") as said:
        join("10.0.0.1:1", ClusterConfig())
    assert said.value.exit_code == 75
    # Elastic workers begin without the late ones.
    join("10.0.0.1:1", ClusterConfig(workers=(1, 3)))


def test_a_head_that_does_not_come_is_a_reason_to_try_again(
    starting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_NODES_TIMEOUT_S", 0.1)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "check_ray_address", check_ray_address)
    for workers in (1, (1, 3)):
        with pytest.raises(NotReadyError, match="Connection refused"):
            join("127.0.0.1:1", ClusterConfig(workers=workers))
