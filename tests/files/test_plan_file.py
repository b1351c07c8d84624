"""plan.json: how it is kept, and one that cannot be read, which makes no report or status fail."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from clm_dist.against_plan import compare_with_plan, describe_time
from clm_dist.files.plan_file import read_plan, write_plan
from clm_dist.files.run_dir import RunDir
from clm_dist.files.standing import Standing
from tests.support.command import clm_dist
from tests.support.disks import mode
from tests.support.plans import plan_of, plan_run

BROKEN = {
    "empty": "",
    "cut short": '{"format": 1, "made": 160',
    "a list": "[]",
    "deep": "[" * 100_000,
    "another format": '{"format": 2}',
    "no field": '{"format": 1}',
    "not UTF-8": "\udcff",
}


WRONG: dict[str, dict[str, Any]] = {
    "of nothing": {"sizes": []},
    "a loss that is no number": {"loss": {"value": math.nan, "low": 1, "high": 2}},
    "a loss without an end": {"loss": {"value": 1, "low": 1, "high": math.inf}},
    "a loss in words": {"loss": {"value": "nan", "low": 1, "high": 2}},
    "an infinite price": {"price": math.inf},
    "an infinite date": {"made": math.inf},
    "no text": {"speed": "\ud800"},
    "an infinite time": {
        "sizes": [
            {"workers": 1, "tokens_per_s": None, "memory_bytes": None}
            | {"seconds": {"value": math.inf, "low": 1, "high": math.inf}}
        ]
    },
}


@pytest.mark.parametrize("broken", [*BROKEN, *WRONG, "a directory"])
def test_no_plan_makes_a_report_or_a_status_fail(
    broken: str, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken == "a directory":
        run.plan.mkdir()
    elif broken in WRONG:
        run.plan.write_text(json.dumps(plan_of(run, **WRONG[broken])))
    else:
        run.plan.write_text(BROKEN[broken], encoding="utf-8", errors="surrogateescape")
    comparison = compare_with_plan(run, Standing())
    assert comparison is not None
    (line,) = comparison.notes
    assert line.startswith(f"{run.plan} cannot be read: ")
    # Only what somebody wrote is written anew.
    assert line.endswith("; `clm-dist plan JOB --save` writes it anew") == (broken != "a directory")
    assert "\n" not in line
    assert describe_time(run) == line
    said = clm_dist(capsys, monkeypatch, "report", run.root)
    assert said.code == 0, said.err
    assert "plan.json cannot be" in said.out.replace("\n", " ")
    assert "plan.json cannot be" in run.report.read_text()
    said = clm_dist(capsys, monkeypatch, "status", "tiny", "--runs", run.root.parent)
    assert (said.code, f"tiny: {line}" in said.out) == (0, True)
    said = clm_dist(capsys, monkeypatch, "report", run.root, run.root)
    assert (said.code, said.out.count(line)) == (0, 2)


def test_another_format_is_named(run: RunDir) -> None:
    run.plan.write_text(BROKEN["another format"])
    assert read_plan(run) == (
        f"{run.plan} cannot be read: it has the format 2, and this version reads 1; `clm-dist plan JOB --save` "
        "writes it anew"
    )


def test_a_plan_is_for_its_user_alone_and_whole(run: RunDir, tmp_path: Path) -> None:
    plan_run(run)
    assert (mode(run.plan), read_plan(run)) == (0o600, plan_of(run))
    new = RunDir(tmp_path / "it's a 'new' run")
    write_plan(new, plan_of(run))
    assert [path.name for path in new.root.iterdir()] == ["plan.json"]
