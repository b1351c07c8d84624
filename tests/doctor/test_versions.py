"""Versions against those that are tested, and between nodes."""

from dataclasses import replace

from clm_dist.doctor.finding import Finding
from clm_dist.doctor.versions import Versions, compare_versions, judge_versions, read_versions

TESTED = Versions(
    python="3.11.9",
    own="0.1.0",
    packages={"ray": "2.60.0", "torch": "2.13.0+cu130", "numpy": "2.4.1"},
    tested={"ray": "<2.61,>=2.60", "torch": "<2.14,>=2.11", "numpy": ">=2"},
    tested_python=">=3.11",
)


def judged(**packages: str | None) -> list[Finding]:
    return list(judge_versions(replace(TESTED, packages=TESTED.packages | packages)))


def test_this_environment_is_as_tested() -> None:
    found = read_versions()
    assert found.tested is not None
    assert found.tested.keys() == found.packages.keys()
    assert [finding.severity for finding in judge_versions(found)] == ["ok"]


def test_a_version_that_is_not_tested_is_named_with_what_is() -> None:
    (finding,) = judged(torch="2.15.0")
    assert (finding.severity, finding.mend) == ("warning", "pip install 'torch<2.14,>=2.11'")
    assert "torch 2.15.0" in finding.what


def test_a_build_of_a_tested_version_is_tested() -> None:
    assert [finding.severity for finding in judged(torch="2.13.0+cpu")] == ["ok"]
    assert [finding.severity for finding in judged(torch="2.12.0rc1")] == ["ok"]


def test_a_library_that_is_missing_is_an_error() -> None:
    assert [finding.severity for finding in judged(ray=None)] == ["error", "ok"]


def test_a_source_without_metadata_is_not_checked() -> None:
    (finding,) = judge_versions(replace(TESTED, tested=None))
    assert finding.severity == "unchecked"


def test_an_older_python_is_named() -> None:
    (finding, _) = judge_versions(replace(TESTED, python="3.10.2"))
    assert "3.10.2" in finding.what


def test_the_node_with_another_version_is_named_and_not_the_others() -> None:
    other = replace(TESTED, packages=TESTED.packages | {"numpy": "2.0.0"})
    (finding,) = compare_versions({"a": TESTED, "b": other, "c": TESTED})
    assert (finding.nodes, finding.severity) == (("b",), "warning")
    assert "numpy is 2.0.0 here, and 2.4.1 on most nodes" in finding.what


def test_of_two_nodes_the_first_is_the_measure() -> None:
    (finding,) = compare_versions({"a": TESTED, "b": replace(TESTED, python="3.12.1")})
    assert (finding.nodes, finding.severity) == (("b",), "error")


def test_a_patch_of_python_is_no_difference() -> None:
    (finding,) = compare_versions({"a": TESTED, "b": replace(TESTED, python="3.11.2")})
    assert finding.severity == "ok"


def test_a_library_that_one_node_lacks_is_named() -> None:
    other = replace(TESTED, packages=TESTED.packages | {"ray": None})
    (finding,) = compare_versions({"a": TESTED, "b": other})
    assert finding.what.startswith("ray is not installed here")
