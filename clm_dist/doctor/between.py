"""What is measured between the nodes of a group: connections, clocks, bandwidth, a collective."""

import secrets
from collections.abc import Iterator, Mapping

from clm_dist.doctor.bounded import Deadline
from clm_dist.doctor.clock import judge_clocks
from clm_dist.doctor.collective import Order, Sum, judge_sums
from clm_dist.doctor.finding import Finding, error, on, unchecked
from clm_dist.doctor.group import Group
from clm_dist.doctor.need import Need
from clm_dist.doctor.network import choose_address, judge_interfaces, judge_reach, judge_speeds
from clm_dist.doctor.peer import Peer, Reach, Speed, rounds_of
from clm_dist.doctor.probe import Facts

_REACH_S, _SPEED_S, _COLLECTIVE_S = 6.0, 4.0, 6.0
_ASK_S = 2.0
"""For what takes no time."""
_RESERVED_S = 4.0
"""Kept for the collective while bandwidth is measured."""


class Between:
    """The examination of the network between nodes; its methods are called in their order."""

    def __init__(self, group: Group, need: Need, facts: Mapping[str, Facts], deadline: Deadline) -> None:
        self._group, self._need, self._facts, self._deadline = group, need, facts, deadline
        self._interface = None if group.is_ray else need.cluster.slurm.interface
        self._token = secrets.token_hex(16)
        self._peers: dict[str, Peer] = {}
        self._blocked: set[tuple[str, str]] = set()
        chosen = {
            node: choose_address(one.network, group.hints.get(node, ()), self._interface) for node, one in facts.items()
        }
        self._addresses = {node: address for node, address in chosen.items() if address is not None}

    def begin(self) -> None:
        """Start processes that import torch meanwhile."""
        arguments = {
            node: {"address": address, "in_ray": self._group.is_ray} for node, address in self._addresses.items()
        }
        self._group.ask_all("begin_collective", type(None), _ASK_S, arguments)

    def interfaces(self) -> Iterator[Finding]:
        """The findings of the networks of each node."""
        # Two nodes of Ray may be on one host, where every address will do.
        is_one_host = len({tuple(one.network.reachable) for one in self._facts.values()}) == 1
        for node, one in self._facts.items():
            judged = judge_interfaces(
                one.network, names_interface=not self._group.is_ray, interface=self._interface, is_one_host=is_one_host
            )
            yield from on(node, judged)
            if node not in self._addresses:
                found = error(
                    "network",
                    "the node has no address that another node may reach",
                    "the workers of a run connect to each other",
                    "look at `ip addr` there, and name the network with cluster.slurm.interface",
                )
                yield from on(node, [found])

    def connections(self) -> Iterator[Finding]:
        """Connect all pairs of nodes, and compare their clocks."""
        ports = self._group.ask_all("listen", dict[str, int], _ASK_S, token=self._token)
        self._peers = {
            node: Peer(node, self._addresses[node], found) for node, found in ports.items() if node in self._addresses
        }
        if len(self._peers) < 2:
            yield unchecked("network", "the connections between nodes: fewer than two nodes have an address")
            return
        arguments = {node: {"peers": [one for one in self._peers.values() if one.name != node]} for node in self._peers}
        reaches = self._group.ask_all("reach", list[Reach], self._deadline.left(_REACH_S), arguments)
        yield from judge_reach(reaches, self._addresses)
        # What is measured goes over the port of gloo.
        self._blocked = {
            (node, one.peer)
            for node, found in reaches.items()
            for one in found
            if one.problem and one.port == self._peers[one.peer].ports["any"]
        }
        if reaches:
            first, others = next(iter(reaches)), [node for node in self._facts if node not in list(reaches)[:1]]
            uses_urls = any(place.is_url for place in self._need.places)
            yield from judge_clocks(first, reaches[first], others, uses_urls=uses_urls)

    def bandwidth(self) -> Iterator[Finding]:
        """Measure one stream from each node to each other, as many as there is time for."""
        speeds: list[Speed] = []
        rounds = rounds_of(list(self._peers))
        for one in rounds:
            if not self._deadline.left() > _RESERVED_S:
                break
            open_pairs = [(a, b) for a, b in one if (a, b) not in self._blocked]
            arguments = {a: {"source": a, "peer": self._peers[b]} for a, b in open_pairs}
            speeds += self._group.ask_all("speed", Speed, _SPEED_S, arguments).values()
        blocked = sum(pair in self._blocked for one in rounds for pair in one)
        yield from judge_speeds(speeds, sum(map(len, rounds)) - blocked)

    def collective(self) -> Iterator[Finding]:
        """Sum over all nodes as training does."""
        nodes = list(self._peers)
        if len(nodes) < 2 or self._blocked:
            yield unchecked("network", "an all-reduce over all nodes, because not all of them reach each other")
            return
        left = max(0.0, self._deadline.left() - _ASK_S)
        ready = self._group.ask_all("collective_ready", bool | None, left, {n: {"timeout_s": left} for n in nodes})
        if late := [node for node in nodes if ready.get(node) is not True]:
            why = "no torch, or not in time"
            yield unchecked("network", f"an all-reduce over all nodes: {', '.join(late)} imported {why}")
            return
        port = self._group.ask_all("free_port", int, _ASK_S, {nodes[0]: {}})
        if not port:
            return
        use_gpu = self._need.cluster.gpus_per_worker != 0 and all(map(self._has_gpu, nodes))
        timeout_s = min(_COLLECTIVE_S, max(2.0, self._deadline.left()))
        arguments = {
            node: {
                "order": Order(self._addresses[nodes[0]], port[nodes[0]], rank, len(nodes), use_gpu),
                "timeout_s": timeout_s,
            }
            for rank, node in enumerate(nodes)
        }
        yield from judge_sums(self._group.ask_all("collective", Sum, timeout_s, arguments))

    def _has_gpu(self, node: str) -> bool:
        """Whether torch can use a GPU there. (Ray hides them from the actor that has looked.)"""
        found = self._facts[node].gpus
        return bool(found.gpus if self._group.is_ray else found.usable) and found.torch_problem is None
