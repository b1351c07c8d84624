"""The demonstrations in benchmarks/ run from the repository alone, hold their bounds, and would see them broken."""

import importlib
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clm_dist.metrics import MicroLoss

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run_short(name: str, report: Path) -> str:
    command = [sys.executable, str(BENCHMARKS / name), "--short", "--report", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=report.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return report.read_text()


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_the_eval_loss_is_one_at_every_number_of_workers_and_under_every_strategy(tmp_path: Path) -> None:
    text = run_short("one_eval_loss.py", tmp_path / "report.md")
    assert "Every bound is kept" in text
    assert text.count(" micro-batches, the split ") == 3
    rows = rows_of(text)
    by_workers = {row[0]: row[2] for row in rows if row[0].isdigit()}
    by_strategy = {(row[0], row[1]): row[3] for row in rows if row[0] in ("ddp", "fsdp2")}
    assert by_workers.keys() == {"1", "2", "3"}
    assert len(by_strategy) == 4
    assert len({*by_workers.values(), *by_strategy.values()}) == 1
    # The ranks have unequally many tokens, so a mean of their means is another number.
    means = {row[0]: row[4] for row in rows if row[0].isdigit()}
    assert len(set(means.values())) == 3


@pytest.mark.slow
def test_workers_micro_batch_and_accumulation_change_no_loss_curve(tmp_path: Path) -> None:
    text = run_short("same_curve.py", tmp_path / "report.md")
    assert "Every bound is kept" in text
    figures = [row for row in rows_of(text) if " x " in row[0] and row[0][0].isdigit()]
    assert len(figures) == 4
    for row in figures:
        assert max(float(row[2]), float(row[3])) <= 1e-5
        assert (float(row[4]) > 1e-5) == (row[6] == "yes")


@pytest.fixture
def one_eval_loss(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("one_eval_loss")


def test_a_broken_bound_of_the_eval_loss_is_named(one_eval_loss: Any) -> None:
    one = one_eval_loss.Measured(1, "ddp", 6, 3.5, 3.5, 100, (MicroLoss(0, 350.0, 100, 400),))
    two = replace(one, workers=2, strategy="zero3", loss=math.nextafter(3.5, 4))
    near, far = replace(one, micro_size=5, loss=3.5 * (1 + 1e-7)), replace(one, micro_size=32, loss=3.5 * (1 + 1e-5))
    nan = replace(one, micro_size=1, loss=math.nan)
    assert one_eval_loss.out_of_bounds([one, one], [near], [("missing", "refused")]) == []
    found = one_eval_loss.out_of_bounds([one, two], [near, far, nan], [("missing", None), ("twice", "refused")])
    assert found == ["2 workers, zero3", "micro-batches of 32", "micro-batches of 1", "missing"]


@pytest.mark.parametrize("name", ["one_eval_loss.md", "same_curve.md"])
def test_the_reports_are_of_runs_that_kept_their_bounds(name: str) -> None:
    text = (BENCHMARKS / name).read_text()
    assert "Every bound is kept" in text
    assert "Out of bounds" not in text
