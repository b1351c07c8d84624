"""Findings together: which are one, their order, their text, and the exit code."""

import json

import pytest
from rich.console import Console

from clm_dist.doctor.examine import Report
from clm_dist.doctor.finding import Finding, error, exit_code, merged, note, ok, on, one_line, unchecked, warning
from clm_dist.doctor.show import folded, lines_of, report_json, show_report, summary

MEND, PASSES = error("disk", "a", "b", "c"), error("hub", "a", "b", "c", passes=True)
WARNING = warning("network", "the way is slow", "steps wait", "look at the cable")


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        ([], 0),
        ([ok("disk", "a"), note("disk", "b"), WARNING, unchecked("hub", "c")], 0),
        ([MEND], 2),
        ([PASSES, WARNING], 75),
        ([PASSES, MEND], 2),
    ],
)
def test_the_exit_code_is_that_of_who_must_act(findings: list[Finding], code: int) -> None:
    assert exit_code(findings) == code


def test_equal_findings_of_nodes_are_one_and_the_worst_come_first() -> None:
    found = [*on("a", [ok("disk", "x"), WARNING]), *on("b", [ok("disk", "x")]), *on("c", [ok("disk", "x"), MEND])]
    first, second, third = merged(found, 3)
    assert (first.severity, first.nodes) == ("error", ("c",))
    assert (second.severity, second.nodes) == ("warning", ("a",))
    # Of all nodes none is named.
    assert (third.severity, third.nodes) == ("ok", ())


def test_a_finding_has_what_why_and_what_to_do_in_80_columns() -> None:
    (finding,) = on("node7", [warning("disk", "a" * 30 + " b" * 40, "w" * 20 + " x" * 40, "c" * 90)])
    lines = list(lines_of(finding))
    assert lines[0].startswith("warning    disk [node7]: aaa")
    # What is to be copied is not cut.
    assert f"           do:  {'c' * 90}" in lines or f"                {'c' * 90}" in lines
    assert all(len(line) <= 80 for line in lines if "ccc" not in line)
    assert any(line.startswith("           why: www") for line in lines)


def test_what_is_as_it_should_be_has_one_line_for_nodes_with_other_figures() -> None:
    found = [*on("a", [ok("disk", "runs: 1.5 GiB free")]), *on("b", [ok("disk", "runs: 900.0 MiB free")])]
    found += on("c", [ok("disk", "store: 2.0 GiB free")])
    first, second = folded(found)
    assert (first.what, first.nodes) == ("runs: 1.5 GiB free", ("a", "1 more with other figures"))
    assert second.nodes == ("c",)
    # What is wrong is told of each.
    wrong = [*on("a", [warning("disk", "1 GiB", "w", "m")]), *on("b", [warning("disk", "2 GiB", "w", "m")])]
    assert folded(wrong) == wrong


def test_a_report_is_shown_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(("a", "b"), "the 2 nodes of Slurm's job 7", merged([MEND, WARNING, unchecked("hub", "x")], 2))
    show_report(report, Console(width=80))
    out = capsys.readouterr().out
    assert out.startswith(
        "the 2 nodes of Slurm's job 7: a, b\nerror      disk: a\n           why: b\n           do:  c\n"
    )
    assert "-          hub: not checked: x" in out
    assert out.endswith("1 error, 1 warning, 1 not checked\n")
    assert summary([WARNING, WARNING]) == "2 warnings"


def test_the_json_has_the_findings_and_the_exit_code() -> None:
    found = json.loads(report_json(Report(("a",), "this machine", [PASSES])))
    assert (found["exit_code"], found["nodes"]) == (75, ["a"])
    assert found["findings"][0]["severity"] == "error"


def test_a_line_of_a_log_has_all_of_it() -> None:
    assert one_line(WARNING) == "warning: the way is slow (steps wait); look at the cable"
