"""The nodes that are examined together: this one, those of a Slurm job, or those of a Ray."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from clm_dist.doctor.bounded import Deadline, begin
from clm_dist.doctor.finding import Finding, error, on, unchecked
from clm_dist.doctor.link import AskError, Here, Link, question, value_of
from clm_dist.doctor.probe import Facts, Probe
from clm_dist.doctor.slurm import Allocation, is_inside, read_allocation, start_probe
from clm_dist.errors import ClmDistError

_CLOSE_S = 3.0
_GRACE_S = 1.0
"""How much longer an answer may take than the work behind it."""


@dataclass
class Group:
    """Nodes, and what did not work with them."""

    links: dict[str, Link]
    where: str
    """What they are, for people."""
    is_ray: bool
    """Whether they are those of a Ray that was started by others, who may name a network interface or not."""
    joins: bool
    """Whether a run uses a Ray that is not its own."""
    hints: dict[str, list[str]] = field(default_factory=dict)
    """Addresses that Slurm or Ray has of each node."""
    known: dict[str, dict[str, float]] | None = None
    """CPUs and GPUs that Slurm granted, or that Ray has; None takes what is there."""
    findings: list[Finding] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return list(self.links)

    def ask_all(
        self,
        ask: str,
        kind: Any,
        within_s: float,
        arguments: Mapping[str, Mapping[str, Any]] | None = None,
        **same: Any,
    ) -> dict[str, Any]:
        """The answers of all nodes, which work at the same time. Nodes that do not answer are asked no more.

        Args:
            ask: a method of `Probe`; `kind` is the type of its value.
            arguments: of some nodes, which alone are asked; None asks all.
            same: arguments for every node.
        """
        asked = {
            node: self.links[node].ask(question(ask, **(arguments or {}).get(node, {}), **same))
            for node in (self.names if arguments is None else arguments)
            if node in self.links
        }
        deadline = Deadline(within_s + _GRACE_S)
        values = {}
        for node, answer in asked.items():
            try:
                values[node] = value_of(answer, kind, deadline.left())
            except AskError as problem:
                if answer.done() and answer.exception() is None:
                    self.findings += on(node, [unchecked("nodes", f"{ask.replace('_', ' ')}: {problem}")])
                else:
                    self._give_up(node, str(problem))
        return values

    def _give_up(self, node: str, problem: str) -> None:
        found = error(
            "nodes",
            f"the node does not answer: {problem}",
            "a run needs every node that it is given",
            "look at the node; is clm-dist installed there in the same place? Is it overloaded, or its network away?",
            passes=True,
        )
        self.findings += on(node, [found])
        begin(self.links.pop(node).close)

    def amounts(self, facts: Mapping[str, Facts]) -> dict[str, dict[str, float]]:
        """CPUs and GPUs of each node, as a run counts them."""
        if self.known is not None:
            return self.known
        return {node: {"CPU": one.machine.cpus, "GPU": one.gpus.usable} for node, one in facts.items()}

    def close(self) -> None:
        """End all probes, at once."""
        for ending in [begin(link.close) for link in self.links.values()]:
            with contextlib.suppress(TimeoutError):
                ending.result(timeout=_CLOSE_S)


@contextlib.contextmanager
def find_group(environment: Mapping[str, str] = os.environ) -> Iterator[Group]:
    """The nodes that a run of this shell would use, each with a probe that waits for questions."""
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        group = _of_ray(environment, findings, stack) or _of_slurm(environment, findings) or _of_this_machine()
        group.findings += findings
        try:
            yield group
        finally:
            group.close()


def _of_this_machine() -> Group:
    return Group({socket.gethostname(): Here()}, "this machine", is_ray=False, joins=False)


def _of_ray(environment: Mapping[str, str], findings: list[Finding], stack: contextlib.ExitStack) -> Group | None:
    if not (address := environment.get("RAY_ADDRESS")):
        return None
    from clm_dist.train.ray.everywhere import on_every_node

    try:
        nodes = stack.enter_context(on_every_node(address, Probe))
    except ClmDistError as problem:
        findings.append(
            error(
                "nodes",
                str(problem),
                "a run joins the Ray of RAY_ADDRESS, and is refused without it",
                "see the message",
            )
        )
        return None
    return Group(
        {node.name: node for node in nodes},
        f"the {len(nodes)} nodes of the Ray at {address}",
        is_ray=True,
        joins=True,
        hints={node.name: [node.address] for node in nodes},
        known={node.name: node.resources for node in nodes},
    )


def _of_slurm(environment: Mapping[str, str], findings: list[Finding]) -> Group | None:
    if not is_inside(environment):
        return None
    try:
        return _of_allocation(read_allocation(environment), environment)
    except (OSError, KeyError, ValueError) as problem:
        said = f"{problem} is not set" if isinstance(problem, KeyError) else str(problem)
        findings.append(
            unchecked(
                "nodes",
                f"the nodes of Slurm's job {environment['SLURM_JOB_ID']}, which SLURM_JOB_ID names: {said}; unset "
                "SLURM_JOB_ID if this shell is not that job's",
            )
        )
        return None


def _of_allocation(found: Allocation, environment: Mapping[str, str]) -> Group:
    nodes: Sequence[str] = found.nodes
    return Group(
        {node: start_probe(found, node, environment) for node in nodes},
        f"the {len(nodes)} nodes of Slurm's job {found.job_id}",
        is_ray=False,
        joins=True,
        hints=dict(found.hints),
        known={node: {"CPU": found.cpus.get(node, 1.0), "GPU": found.gpus} for node in nodes},
    )
