"""The page of a run that is not finished."""

import json
import time

import pytest

from clm_dist.files.blocks import Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.report import live
from clm_dist.report.live import LivePage, read_progress
from tests.support.command import clm_dist
from tests.support.histories import history, write_history


@pytest.fixture
def begun(run: RunDir) -> RunDir:
    """A run that is being trained, or whose driver was killed: it has trained 150 of 200 steps."""
    run.result.unlink()
    run.report.unlink(missing_ok=True)
    records = [json.dumps(record) for record in history(200, events=False) if record["step"] <= 150]
    run.metrics.write_text("\n".join(records) + '\n{"kind": "st')
    return run


def test_a_run_that_is_not_finished_has_a_page(
    begun: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = clm_dist(capsys, monkeypatch, "report", begun.root)
    assert said.code == 0
    assert "tiny: not finished" in said.out
    page = begun.report.read_text()
    assert "150 of 200 steps" in page
    assert "not finished" in page
    # This process's versions are not those of the workers.
    assert "transformers" not in page.split("Versions and hardware")[1].split("<script")[0]
    result = read_progress(begun.root)
    assert (result["status"], result["train"]["steps"]) == ("running", 150)
    assert result["data"] == Manifest.read(begun.data).fingerprint
    assert len(result["evals"]) == 7


def test_a_run_that_never_began_says_so(
    begun: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for remove in (begun.metrics, begun.data):
        text = remove.read_text()
        remove.unlink()
        said = clm_dist(capsys, monkeypatch, "report", begun.root)
        assert said.code == 2
        assert said.err.startswith(f"error: {begun.root} has no result yet, and no worker of it has begun to train; ")
        assert not begun.report.exists()
        remove.write_text(text)
    assert clm_dist(capsys, monkeypatch, "report", begun.root).code == 0


def test_it_is_written_now_and_then_and_once_at_the_end(begun: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    written: list[float] = []

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += 3.0  # so long does it take

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(live, "write_page", write)
    page = LivePage(begun, lambda text: pytest.fail(text))
    page.finish()  # of a run that has not trained
    assert written == []
    page.look()
    for _ in range(200):
        now[0] += 1.0
        page.look()
    # Every 20 times 3 seconds, and not when there is nothing new.
    assert [at - written[0] for at in written] == [0, 63, 126, 189]
    page.finish()
    assert len(written) == 5


def test_what_hinders_it_is_told_once_and_ends_nothing(begun: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(live, "_INTERVAL_S", 0.0)
    monkeypatch.setattr(live, "_SHARE", 0)
    begun.report.mkdir()
    page = LivePage(begun, told.append)
    for _ in range(3):
        page.look()
    page.finish()
    (text,) = told
    assert f"{begun.report} cannot be written (" in text
    assert "the run goes on" in text
    begun.report.rmdir()
    page.look()
    assert begun.report.is_file()


def test_the_page_of_a_long_run_is_written_from_its_records_alone(begun: RunDir) -> None:
    write_history(begun.metrics, 1000)
    LivePage(begun, lambda text: pytest.fail(text)).look()
    assert "workers started again" in begun.report.read_text()
