"""Several runs side by side, on a terminal and as a page."""

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clm_dist.files.atomic import write_json
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.report.compare import comparability, comparison_table, labels_of
from clm_dist.report.compare_page import write_comparison
from tests.report.test_page import Page
from tests.support.command import clm_dist
from tests.support.disks import mode
from tests.support.histories import HOSTILE, write_history

NAMES = ("eli5-guide-lr-2e-5-seed-42-wsd", "eli5-guide-lr-5e-5-seed-42-wsd")


@pytest.fixture
def result(finished_run: RunDir) -> Any:
    return read_result(finished_run.root)


@pytest.fixture
def runs(run: RunDir) -> list[RunDir]:
    """Two runs whose jobs differ in two fields; the second has twice the steps of the first."""
    other = RunDir(Path(shutil.copytree(run.root, run.root.parent / "other")))
    write_history(run.metrics, 300)
    write_history(other.metrics, 600, seed=1)
    write_json(other.result, dict(read_result(other.root)) | {"name": "other"})
    job = (
        other.job.read_text()
        .replace("name: tiny", "name: other")
        .replace("learning_rate: 0.001", "learning_rate: 0.01")
    )
    other.job.write_text(job.replace("weight_decay: 0.01", "weight_decay: 0.1"))
    return [run, other]


def printed(labels: list[str], results: list[Any], width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(labels, results, width))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    return [line.rstrip() for line in lines]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_every_width_has_whole_names_and_the_perplexities(result: Any, width: int) -> None:
    other = result | {"strategy": "zero2", "workers": 16, "train": result["train"] | {"steps": 123456}}
    lines = printed(list(NAMES), [result, other], width)
    for name in NAMES:
        (line,) = (line for line in lines if name in line)
        assert f"{result['final']['perplexity']:.2f}" in line
    assert len([line for line in lines if "zero2" in line]) == (1 if width >= 80 else 0)


def test_what_is_equal_and_what_is_left_out_is_said(result: Any) -> None:
    other = result | {"strategy": "zero2", "workers": 16}
    text = " ".join(printed(list(NAMES), [result, other], 80))
    assert f"The same in all: status done, data {result['data'][:8]}, steps 24," in text
    narrow = " ".join(printed(list(NAMES), [result, other], 60))
    assert "Left out, as the terminal is narrow: strategy." in narrow
    wide = " ".join(printed(list(NAMES), [result, other], 150))
    assert "The same in all" not in wide
    assert "Left out" not in wide


def test_runs_of_one_name_are_told_apart_by_their_directories(result: Any) -> None:
    paths = [Path("a/tiny"), Path("b/tiny")]
    assert labels_of(paths, [result, result]) == ["a/tiny", "b/tiny"]
    assert labels_of(paths, [result, result | {"name": "other"}]) == ["tiny", "other"]


def test_runs_on_other_blocks_are_not_compared_by_perplexity(result: Any) -> None:
    assert comparability([result, result]) is None
    assert "perplexities are not comparable" in str(comparability([result, result | {"data": "0123"}]))


def test_the_page_has_the_curves_of_all_runs_and_what_differs_in_their_jobs(
    runs: list[RunDir], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = clm_dist(capsys, monkeypatch, "report", *(run.root for run in runs))
    assert said.code == 0
    file = runs[0].root.parent / "comparison.html"
    assert said.out.splitlines()[-1] == f"report: {file}"
    assert mode(file) == 0o600
    text = file.read_text()
    page = Page(text)
    assert page.fetched == []
    for chart, sizes in (("loss", [299, 599]), ("eval", [11, 11]), ("lr", [299, 599])):
        series = page.series(chart)
        assert {name: len(one["x"]) for name, one in series.items()} == dict(zip(("tiny", "other"), sizes, strict=True))
        assert len({one["colour"] for one in series.values()}) == 2
    differing = text.split("What differs in the jobs")[1].split("</table>")[0]
    cells = [cell.split("<")[0] for cell in differing.split('<td class="text">')[1:]]
    assert cells == ["train.learning_rate", "0.001", "0.01", "train.weight_decay", "0.01", "0.1"]
    for run in runs:
        assert not run.report.exists()
    elsewhere = tmp_path / "else where" / "page.html"
    for wrong, reason in ((elsewhere, f"there is no directory {elsewhere.parent}"), (tmp_path, "is a directory")):
        said = clm_dist(capsys, monkeypatch, "report", *(run.root for run in runs), "--output", wrong)
        assert (said.code, reason in said.err) == (2, True)
    elsewhere.parent.mkdir()
    said = clm_dist(capsys, monkeypatch, "report", *(run.root for run in runs), "--output", elsewhere)
    assert (said.code, elsewhere.is_file()) == (0, True)
    single = clm_dist(capsys, monkeypatch, "report", runs[0].root, "--output", tmp_path / "one.html")
    assert (single.code, (tmp_path / "one.html").is_file(), runs[0].report.exists()) == (0, True, False)


def test_names_stay_text_and_a_job_that_is_not_read_is_said(runs: list[RunDir], result: Any, tmp_path: Path) -> None:
    runs[1].job.write_text("of: another version\n")
    labels = [HOSTILE, "other"]
    write_comparison(tmp_path / "page.html", runs, labels, [result, result], [HOSTILE])
    page = Page((tmp_path / "page.html").read_text())
    assert (len(page.scripts), page.fetched, "img" in page.tags) == (3, [], False)
    assert list(page.series("loss")) == labels
    assert "The jobs of other are of another version, which this one does not read." in page.said
    assert "Nothing but the name" not in page.said
    write_comparison(tmp_path / "page.html", [runs[0], runs[0]], ["a", "b"], [result, result], [])
    assert "Nothing but the name." in Page((tmp_path / "page.html").read_text()).said
