"""The findings of an examination as text of 80 columns, and as JSON."""

import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.text import Text

from clm_dist.config.shown import printable
from clm_dist.doctor.examine import Report
from clm_dist.doctor.finding import SEVERITIES, Finding, Severity

_STYLES: dict[Severity, str] = {
    "error": "red",
    "warning": "yellow",
    "unchecked": "yellow",
    "note": "cyan",
    "ok": "green",
}
_COLUMNS = 80
_INDENT = 11


def show_report(report: Report, console: Console) -> None:
    console.print(f"{report.where}: {', '.join(report.nodes)}", soft_wrap=True, markup=False)
    for finding in folded(report.findings):
        for line in lines_of(finding):
            text = Text(line)
            if not line.startswith(" "):
                text.stylize(_STYLES[finding.severity], 0, _INDENT - 1)
            console.print(text, soft_wrap=True)
    console.print(summary(report.findings), soft_wrap=True)


def folded(findings: Sequence[Finding]) -> list[Finding]:
    """What is as it should be on several nodes, with other figures on each, as the first of them."""
    kept: list[Finding] = []
    places: dict[str, int] = {}
    for finding in findings:
        likeness = f"{finding.subject} {re.sub(r'[0-9][0-9.,]*( [KMGT]iB)?', '#', finding.what)}"
        if finding.severity != "ok" or not finding.nodes or likeness not in places:
            places[likeness] = len(kept)
            kept.append(finding)
        else:
            first = kept[places[likeness]]
            kept[places[likeness]] = replace(first, nodes=(*first.nodes, *finding.nodes))
    return [
        replace(finding, nodes=(finding.nodes[0], f"{len(finding.nodes) - 1} more with other figures"))
        if finding.severity == "ok" and len(finding.nodes) > 1
        else finding
        for finding in kept
    ]


def lines_of(finding: Finding) -> Iterator[str]:
    """The lines of a finding: severity and subject, then what, why and what to do."""
    named = f" [{', '.join(finding.nodes)}]" if finding.nodes else ""
    severity = "-" if finding.severity == "unchecked" else finding.severity
    yield from _wrapped(severity, f"{finding.subject}{named}: {finding.what}")
    if finding.severity not in ("ok", "unchecked"):
        if finding.why:
            yield from _wrapped("", f"why: {finding.why}")
        if finding.mend:
            yield from _wrapped("", f"do:  {finding.mend}")


def _wrapped(label: str, text: str) -> list[str]:
    # Neither paths nor commands are cut: they are copied.
    return textwrap.wrap(
        printable(text),
        _COLUMNS,
        initial_indent=label.ljust(_INDENT),
        subsequent_indent=" " * (_INDENT if label else _INDENT + 5),
        break_long_words=False,
        break_on_hyphens=False,
    )


def summary(findings: Sequence[Finding]) -> str:
    """How many findings there are of each severity."""
    names = {"error": "errors", "warning": "warnings", "unchecked": "not checked", "note": "notes", "ok": "ok"}
    counts = {severity: sum(one.severity == severity for one in findings) for severity in SEVERITIES}
    shown = [
        f"{count} {severity if count == 1 and severity in ('error', 'warning', 'note') else names[severity]}"
        for severity, count in counts.items()
        if count
    ]
    return ", ".join(shown)


def report_json(report: Report) -> str:
    """The report as one JSON object."""
    content: dict[str, Any] = {
        "exit_code": report.exit_code,
        "where": report.where,
        "nodes": report.nodes,
        "findings": [asdict(finding) for finding in report.findings],
        "facts": report.facts,
    }
    return json.dumps(to_jsonable_python(content), indent=2)
