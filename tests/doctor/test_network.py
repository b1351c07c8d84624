"""Names of networks, and what is found of connections, clocks and bandwidth."""

import itertools
from dataclasses import replace

import pytest

from clm_dist.doctor.clock import judge_clocks
from clm_dist.doctor.collective import Sum, judge_sums
from clm_dist.doctor.finding import Finding
from clm_dist.doctor.network import (
    Network,
    choose_address,
    judge_interfaces,
    judge_reach,
    judge_speeds,
    read_network,
)
from clm_dist.doctor.peer import USES, Listener, Peer, Reach, Speed, measure_speed, reach_all, rounds_of

NODE = Network("node1", ("10.0.0.1",), {"lo": ("127.0.0.1",), "eth0": ("10.0.0.1",), "ib0": ("10.1.0.1",)}, {})
TRAPPED = replace(NODE, resolved=("127.0.1.1", "10.0.0.1"))
TOKEN = b"a token of this examination"


def with_variable(name: str, value: str) -> Network:
    return replace(NODE, variables={name: value})


def test_this_machine_has_a_loopback_interface() -> None:
    found = read_network(3.0)
    assert ("127.0.0.1",) in [addresses[:1] for addresses in found.addresses.values()]
    assert "127.0.0.1" not in found.reachable


@pytest.mark.parametrize(
    ("network", "hints", "interface", "address"),
    [
        (NODE, (), None, "10.0.0.1"),
        (NODE, ("10.1.0.1",), None, "10.1.0.1"),
        # Of another network, which this node has no address of.
        (NODE, ("192.168.0.1",), None, "10.0.0.1"),
        (with_variable("GLOO_SOCKET_IFNAME", "ib0"), ("10.0.0.1",), None, "10.1.0.1"),
        (NODE, ("10.0.0.1",), "ib0", "10.1.0.1"),
        (replace(NODE, addresses={"lo": ("127.0.0.1",)}), (), None, None),
    ],
)
def test_the_address_is_that_which_a_run_would_use(
    network: Network, hints: tuple[str, ...], interface: str | None, address: str | None
) -> None:
    assert choose_address(network, hints, interface) == address


@pytest.mark.parametrize(
    ("name", "value", "is_wrong"),
    [
        ("GLOO_SOCKET_IFNAME", "eth0", False),
        ("GLOO_SOCKET_IFNAME", "ib9", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib9", True),
        # gloo takes whole names, NCCL also their begin.
        ("GLOO_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "ib9,eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth", True),
        ("NCCL_SOCKET_IFNAME", "^docker", False),
        ("NCCL_SOCKET_IFNAME", "ib9", True),
    ],
)
def test_an_interface_that_a_node_lacks_is_an_error(name: str, value: str, is_wrong: bool) -> None:
    found = list(judge_interfaces(with_variable(name, value), names_interface=True))
    assert [finding.severity for finding in found] == ["error"] * is_wrong
    assert all(f"{name}={value}" in finding.what and "eth0, ib0" in finding.what for finding in found)


def test_an_interface_of_the_job_that_a_node_lacks_is_an_error() -> None:
    (finding,) = judge_interfaces(NODE, names_interface=True, interface="ib9")
    assert "cluster.slurm.interface=ib9" in finding.what


def test_a_name_that_stands_for_loopback_is_an_error_where_nothing_names_the_interface() -> None:
    (finding,) = judge_interfaces(TRAPPED, names_interface=False)
    assert finding.severity == "error"
    assert "stands for 127.0.1.1 there" in finding.what
    (finding,) = judge_interfaces(TRAPPED, names_interface=True)
    assert finding.severity == "note"
    named = replace(TRAPPED, variables={"GLOO_SOCKET_IFNAME": "eth0"})
    assert not list(judge_interfaces(named, names_interface=False))
    assert not list(judge_interfaces(TRAPPED, names_interface=False, is_one_host=True))
    assert not list(judge_interfaces(NODE, names_interface=False))


def test_a_name_without_an_address_is_an_error() -> None:
    (finding,) = judge_interfaces(replace(NODE, resolved=()), names_interface=False)
    assert "stands for no address" in finding.what


# --- connections


def test_two_ends_measure_their_connection() -> None:
    """Both are this process, so the clocks are one."""
    listener = Listener(TOKEN)
    peer = Peer("b", "127.0.0.1", listener.ports)
    assert peer.ports.keys() == USES.keys()
    assert 10002 <= peer.ports["ray-workers"] <= 19999
    reaches = reach_all([peer], TOKEN)
    assert [reach.problem for reach in reaches] == [None] * 3
    for reach in reaches:
        assert reach.rtt_s is not None
        assert abs(reach.offset_s or 0.0) <= reach.rtt_s / 2
    speed = measure_speed("a", peer, TOKEN)
    assert speed.bytes_per_s is not None
    assert speed.bytes_per_s > 1e6
    listener.close()


def test_who_has_another_token_is_not_answered() -> None:
    listener = Listener(TOKEN)
    reaches = reach_all([Peer("b", "127.0.0.1", listener.ports)], b"x" * len(TOKEN))
    assert all(reach.problem for reach in reaches)
    assert measure_speed("a", Peer("b", "127.0.0.1", listener.ports), b"x" * len(TOKEN)).problem
    listener.close()


def test_a_closed_port_is_named() -> None:
    listener = Listener(TOKEN)
    ports = listener.ports
    closed = Listener(TOKEN)
    ports["ray-head"] = closed.ports["ray-head"]
    closed.close()
    reaches = {"a": reach_all([Peer("b", "127.0.0.1", ports)], TOKEN)}
    (finding,) = judge_reach(reaches, {"a": "127.0.0.1", "b": "127.0.0.1"})
    assert (finding.severity, finding.nodes) == ("error", ("a",))
    assert f"port {ports['ray-head']} of b (127.0.0.1) cannot be reached: Connection refused" in finding.what
    assert "20000 to 29999" in finding.mend
    listener.close()


def reach(peer: str, *, problem: str | None = None, rtt_s: float = 1e-4, offset_s: float = 0.0) -> Reach:
    return Reach(peer, 10002, "why", "10002 to 19999", problem, *((None, None) if problem else (rtt_s, offset_s)))


def test_a_node_that_is_not_reached_at_all_is_one_finding() -> None:
    reaches = {"a": [reach("b", problem="no answer")] * 3, "b": [reach("a")] * 3}
    (finding,) = judge_reach(reaches, {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert finding.what.startswith("b (10.0.0.2) cannot be reached at any of the ports")


def test_long_ways_are_told_with_the_pair() -> None:
    (finding,) = judge_reach({"a": [reach("b", rtt_s=0.02)], "b": [reach("a")]}, {"a": "10.0.0.1", "b": "10.0.0.2"})
    assert finding.severity == "warning"
    assert "20.00 ms; the longest is from a to b" in finding.what


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8])
def test_every_pair_has_a_round_and_no_node_is_in_two_pairs_of_it(num: int) -> None:
    names = [f"n{i}" for i in range(num)]
    rounds = rounds_of(names)
    assert sorted(pair for one in rounds for pair in one) == sorted(itertools.permutations(names, 2))
    for one in rounds:
        nodes = [node for pair in one for node in pair]
        assert len(nodes) == len(set(nodes))


def speeds(*rates: float | None) -> list[Speed]:
    return [Speed("a", f"b{i}", rate, None if rate else "timed out") for i, rate in enumerate(rates)]


def judged(*rates: float | None, num_pairs: int | None = None) -> list[Finding]:
    return list(judge_speeds(speeds(*rates), len(rates) if num_pairs is None else num_pairs))


def test_even_bandwidths_are_ok() -> None:
    assert [(one.severity, one.what) for one in judged(1e9, 1.25e9)] == [
        ("ok", "8 to 10 Gbit/s in a stream of TCP (measured 2 ways)")
    ]


def test_a_slow_connection_among_quick_ones_is_named() -> None:
    (finding,) = judged(1e9, 1e9, 1e8, 1e9)
    assert "a to b2: 0.8 Gbit/s, where most pairs have 8" in finding.what


def test_a_slow_network_is_told() -> None:
    assert [one.severity for one in judged(1e7, 1.1e7)] == ["warning"]


def test_what_was_not_measured_is_counted() -> None:
    failed, _ = judged(1e9, None)
    assert (failed.severity, "1 of 2 pairs of nodes: timed out" in failed.what) == ("unchecked", True)
    late, _ = judged(1e9, num_pairs=6)
    assert "5 of 6 pairs of nodes; there was no time" in late.what


# --- clocks, and the collective


def test_a_clock_that_is_off_is_named_with_what_is_uncertain() -> None:
    (finding,) = judge_clocks("a", [reach("b", offset_s=-3600.5, rtt_s=0.002)], ["b"], uses_urls=False)
    assert (finding.severity, finding.nodes) == ("warning", ("b",))
    assert "3,600.500 s behind that of a (give or take 1.00 ms)" in finding.what
    (finding,) = judge_clocks("a", [reach("b", offset_s=3600.5)], ["b"], uses_urls=True)
    assert (finding.severity, "ahead" in finding.what) == ("error", True)


def test_the_quickest_answer_is_the_best_clock() -> None:
    found = [reach("b", offset_s=5.0, rtt_s=9.0), reach("b", offset_s=0.001, rtt_s=0.002)]
    (finding,) = judge_clocks("a", found, ["b"], uses_urls=False)
    assert (finding.severity, "at most 2.00 ms apart" in finding.what) == ("ok", True)


def test_an_offset_within_what_is_uncertain_is_not_told() -> None:
    (finding,) = judge_clocks("a", [reach("b", offset_s=3.0, rtt_s=6.0)], ["b"], uses_urls=False)
    assert finding.severity == "ok"


def test_a_clock_that_cannot_be_seen_is_not_checked() -> None:
    (finding,) = judge_clocks("a", [reach("b", problem="no answer")], ["b"], uses_urls=False)
    assert (finding.severity, "the clocks of b" in finding.what) == ("unchecked", True)


def test_a_collective_that_fails_is_an_error_and_the_slowest_rank_is_its_speed() -> None:
    (finding,) = judge_sums({"a": Sum("gloo", 2e9), "b": Sum("gloo", 1e9)})
    assert (finding.severity, "with 8 Gbit/s" in finding.what) == ("ok", True)
    (finding,) = judge_sums({"a": Sum("gloo", 2e9), "b": Sum(problem="no route")})
    assert (finding.severity, finding.nodes) == ("error", ("b",))
