"""What a check found: its severity, why it matters, what mends it; and the exit code of all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from clm_dist.errors import MendFirstError, TryAgainError

Severity = Literal["error", "warning", "unchecked", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "unchecked", "note", "ok")
"""The worst first."""
Subject = Literal[
    "nodes", "versions", "gpus", "machine", "disk", "network", "clock", "shared storage", "hub", "environment", "job"
]


@dataclass(frozen=True)
class Finding:
    """The answer of one check."""

    subject: Subject
    severity: Severity
    what: str
    why: str = ""
    """Why it matters to a run."""
    mend: str = ""
    """The command or the change that mends it."""
    passes: bool = False
    """Of an error: whether it may pass by itself, so that trying again may help."""
    nodes: tuple[str, ...] = ()
    """The nodes that it is about; empty where it is about all, or about the only one."""


def size(num_bytes: float) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"


def ok(subject: Subject, what: str) -> Finding:
    return Finding(subject, "ok", what)


def note(subject: Subject, what: str, why: str = "", mend: str = "") -> Finding:
    return Finding(subject, "note", what, why, mend)


def warning(subject: Subject, what: str, why: str, mend: str) -> Finding:
    return Finding(subject, "warning", what, why, mend)


def error(subject: Subject, what: str, why: str, mend: str, *, passes: bool = False) -> Finding:
    return Finding(subject, "error", what, why, mend, passes)


def unchecked(subject: Subject, what: str) -> Finding:
    """The finding of a check that could not be made.

    Args:
        what: which check, and what kept it from being made.
    """
    return Finding(subject, "unchecked", f"not checked: {what}")


def on(node: str, findings: Iterable[Finding]) -> list[Finding]:
    """The findings of one node of several."""
    return [replace(finding, nodes=(node,)) for finding in findings]


def merged(findings: Iterable[Finding], num_nodes: int) -> list[Finding]:
    """Equal findings of several nodes as one, and the worst first.

    Args:
        num_nodes: how many nodes were looked at; what is found on all of them names none.
    """
    nodes: dict[Finding, list[str]] = {}
    for finding in findings:
        nodes.setdefault(replace(finding, nodes=()), []).extend(finding.nodes)
    one = [
        replace(finding, nodes=() if len(set(found)) == num_nodes else tuple(dict.fromkeys(found)))
        for finding, found in nodes.items()
    ]
    return sorted(one, key=lambda finding: SEVERITIES.index(finding.severity))


def one_line(finding: Finding) -> str:
    """A finding in a line of a log."""
    return f"{finding.severity}: {finding.what} ({finding.why}); {finding.mend}"


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where nothing is worse than a warning, 2 where a person must mend an error, 75 where it may pass by itself."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return 0
    return TryAgainError.exit_code if all(finding.passes for finding in errors) else MendFirstError.exit_code
