"""What a run looks like on a terminal and as a card."""

import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from clm_dist.files.atomic import write_json
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import EvalFigures
from clm_dist.report.table import change, checkpoint_table, result_table, rows
from tests.support.command import assert_starts_at_once, clm_dist, modules_of
from tests.support.disks import mode
from tests.support.runs import checkpoints_of


@pytest.fixture
def result(finished_run: RunDir) -> Any:
    return read_result(finished_run.root)


def printed(table: Any) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_table_has_the_baseline_every_epoch_and_the_final_model(result: Any) -> None:
    assert [cells[0] for cells in rows(result)] == ["baseline", "epoch 1", "final"]
    text = printed(result_table(result))
    for evaluation in (result["baseline"], *result["evals"]):
        assert f"{evaluation['perplexity']:.2f}" in text
    assert change(result["baseline"], result["final"]) in text


def figures(values: Any) -> EvalFigures:
    return cast(EvalFigures, values)


def test_changes_are_percent_or_factors() -> None:
    first: Any = {"perplexity": 100.0}
    assert change(first, figures({"perplexity": 50.0})) == "-50.0 %"
    assert change(first, figures({"perplexity": 125.0})) == "+25.0 %"
    assert change(first, figures({"perplexity": 8.0})) == "÷ 12.5"
    assert change(first, figures({"perplexity": None})) == change(None, first) == change(first, first) == ""


def test_report_writes_the_page_and_compares_runs(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = clm_dist(capsys, monkeypatch, "report", run.root)
    assert (said.code, mode(run.report)) == (0, 0o600)
    assert "baseline" in said.out
    other = RunDir(tmp_path / "other")
    other.root.mkdir()
    other.job.write_bytes(run.job.read_bytes())
    write_json(other.result, json.loads(run.result.read_text()) | {"name": "other", "data": "ffff"})
    said = clm_dist(capsys, monkeypatch, "report", run.root, other.root)
    assert "not comparable" in said.out


def test_a_report_loads_nothing_that_is_heavy(run: RunDir) -> None:
    out, modules = modules_of("report", run.root)
    assert "baseline" in out
    assert_starts_at_once(modules)


@pytest.mark.parametrize("command", ["report", "push"])
def test_a_run_with_a_damaged_or_missing_file(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def said() -> str:
        said = clm_dist(capsys, monkeypatch, command, run.root)
        assert said.code == 2
        assert not run.hub.exists()
        return said.err

    monkeypatch.setenv("HF_TOKEN", "hf_none")
    for path in ("~nouser/x", "x" * 5000):
        impossible = clm_dist(capsys, monkeypatch, command, path)
        assert (impossible.code, impossible.err.startswith(f"error: RUN {path[:80]}")) == (2, True)
    result = json.loads(run.result.read_text())
    again = "; remove it, and the command that wrote it writes it again\n"
    for text, reason in (
        ("{", "Expecting property name"),
        ("[]", "it is not a JSON object"),
        (json.dumps({k: v for k, v in result.items() if k != "train"}), "train: Field required"),
        (json.dumps(result | {"baseline": {"step": 0}}), "baseline.epoch: Field required"),
    ):
        run.result.write_text(text)
        assert said().startswith(f"error: {run.result} is damaged: {reason}")
        assert said().endswith(again)
    write_json(run.result, result)
    run.job.unlink()
    assert said() == f"error: {run.job} is missing; restore it, or train again with --overwrite\n"


def test_a_run_with_a_bad_line_in_its_metrics(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.metrics.write_text(run.metrics.read_text() + "spilt\n")
    number = len(run.metrics.read_text().splitlines())
    said = clm_dist(capsys, monkeypatch, "report", run.root)
    assert (said.code, said.err) == (2, f"error: {run.metrics}:{number}: not a record of a run; remove this line\n")


def test_a_push_with_a_damaged_hub_json(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("{", "{}", "[]", '{"pushed": [3]}', '{"pushed": [{"step": 24}]}'):
        run.hub.write_text(text)
        said = clm_dist(capsys, monkeypatch, "push", run.root)
        assert said.code == 2
        assert said.err.startswith(f"error: {run.hub} is damaged: ")
        assert "remove it, and the command that wrote it writes it again" in said.err
        assert run.hub.read_text() == text


def test_the_checkpoints_are_listed_with_the_best_and_what_cannot_be_read(run: RunDir) -> None:
    checkpoints = checkpoints_of(run)
    text = printed(checkpoint_table(checkpoints))
    names = checkpoints.committed()
    assert [int(name.split("-")[1]) for name in names] == [22, 24]
    for name in names:
        assert name in text
    (line,) = (line for line in text.splitlines() if names[-1] in line)
    best = checkpoints.read(names[-1])
    assert f"{best.eval_loss:.4f}" in line
    assert f"{best.num_bytes / 2**20:,.1f}" in line
    assert "resumed from, best" in line
    (run.checkpoints / names[0] / "committed.json").write_text('{"format_version": 1}')
    assert "of another version, or damaged" in printed(checkpoint_table(checkpoints))
    checkpoints.remove_all()
    assert checkpoint_table(checkpoints) is None


def test_a_report_goes_on_where_the_checkpoints_cannot_be_listed(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run.job.write_text(run.job.read_text().replace("path: null\ncluster", "path: nosuch://x\ncluster"))
    said = clm_dist(capsys, monkeypatch, "report", run.root)
    assert said.code == 0
    assert "the checkpoints cannot be listed: checkpoint.path nosuch://x/tiny: " in said.err
    assert "report.html" in said.out
