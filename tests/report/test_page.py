"""The page of a run: what it shows, and that nothing a run says becomes a part of it."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from typing import Any, cast

import pytest

from clm_dist.against_plan import compare_with_plan
from clm_dist.files.blocks import Manifest
from clm_dist.files.records import read_records
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import write_samples
from clm_dist.files.standing import Standing
from clm_dist.report.history import History
from clm_dist.report.page import render_page, write_page
from tests.support.histories import HOSTILE, write_history
from tests.support.plans import plan_run
from tests.support.runs import metrics_of


@pytest.fixture
def result(finished_run: RunDir) -> Any:
    return read_result(finished_run.root)


class Page(HTMLParser):
    """What a browser finds in a page: the scripts, the data of the plots, and everything that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts: list[str] = []
        self.tags: set[str] = set()
        self.said = ""
        self._open: list[str] = []
        self.feed(text)
        self.payload: Any = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.tags.add(tag)
        self.fetched += [str(values[name]) for name in ("src", "href") if name in values]
        self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif not self._open or self._open[-1] != "style":
            self.said += data

    def series(self, chart: str) -> dict[str, Any]:
        """The series of a plot, by their labels."""
        return {one["label"]: one for one in self.chart(chart)["series"]}

    def chart(self, name: str) -> dict[str, Any]:
        (found,) = (one for one in self.payload["charts"] if one["id"] == name)
        return cast(dict[str, Any], found)


def test_the_page_opens_with_no_network_and_plots_every_step(finished_run: RunDir, result: Any) -> None:
    text = render_page(result, History.of(read_records(finished_run.metrics)), finished_run.job.read_text())
    page = Page(text)
    assert page.fetched == []
    # The head of uPlot, a comment, names its home.
    assert "://" not in text.replace("/*! https://github.com/leeoniya/uPlot (v1.6.32) */", "")
    losses = page.series("loss")
    assert [len(losses[name]["y"]) for name in ("training", "evaluation")] == [24, 3]
    steps = [record for record in read_records(finished_run.metrics) if record["kind"] == "step"]
    assert losses["training"]["y"] == [float(f"{step['loss']:.6g}") for step in steps]
    for chart, label in (("lr", "learning rate"), ("tokens_per_s", "throughput"), ("grad_norm", "gradient norm")):
        assert page.series(chart)[label]["x"] == list(range(1, 25))
    assert page.series("memory_bytes")["memory"]["y"][0] > 0.05
    assert "learning_rate: 0.001" in text


def test_nothing_that_a_run_says_becomes_a_part_of_the_page(run: RunDir, result: Any) -> None:
    write_history(run.metrics, 400)
    write_samples(run, {"prompt": HOSTILE, "seed": 1, "before": HOSTILE, "after": f"{HOSTILE}{HOSTILE}"})
    run.job.write_text(run.job.read_text().replace("name: tiny", f"name: tiny\n# {HOSTILE.replace(chr(0x2028), '')}"))
    plan_run(run, version=HOSTILE, speed=HOSTILE, device=HOSTILE)
    write_page(run, result | {"name": HOSTILE, "status": "failed", "error": HOSTILE, "versions": {HOSTILE: HOSTILE}})
    page = Page(run.report.read_text())
    assert "Beside the plan" in page.said
    assert len(page.scripts) == 3
    assert page.fetched == []
    assert "img" not in page.tags
    assert page.said.count("onerror=alert(1)") >= 12
    texts = [mark["text"] for mark in page.payload["marks"]]
    assert any(HOSTILE in text for text in texts)
    # Scripts run by their hashes alone.
    for script in page.scripts[1:]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"sha256-{digest}" in run.report.read_text()


def test_the_page_shows_what_happened_where_it_happened(run: RunDir, result: Any) -> None:
    write_history(run.metrics, 400)
    write_page(run, result)
    page = Page(run.report.read_text())
    steps: dict[str, list[int]] = {}
    for mark in page.payload["marks"]:
        steps.setdefault(mark["kind"], []).append(mark["step"])
    # The step that is left out saves nothing.
    assert steps.pop("checkpoint") == [step for step in range(20, 401, 20) if step != 100]
    assert steps == {"restart": [199], "rollback": [300], "skip": [100], "spike": [133]}
    assert page.series("grad_norm")["gradient norm"]["missing"] == [[step, 1] for step in range(7, 400, 80)]
    assert max(page.series("loss")["training"]["y"]) == 99.0


def test_the_page_shows_the_plan_beside_what_came_and_the_loss_to_expect(run: RunDir, result: Any) -> None:
    write_page(run, result)
    page = Page(run.report.read_text())
    assert "Beside the plan" not in page.said
    assert page.chart("loss")["expected"] is None
    loss = {"value": 4.0, "low": 3.5, "high": 4.5}
    plan_run(run, loss=loss)
    write_page(run, result)
    page = Page(run.report.read_text())
    assert page.chart("loss")["expected"] == loss
    assert all(chart["expected"] is None for chart in page.payload["charts"] if chart["id"] != "loss")
    comparison = compare_with_plan(run, Standing.of(read_records(run.metrics)))
    assert comparison
    assert "steps2424as planned" in page.said
    for row in comparison.rows:
        assert f"{row.name}{row.planned}{row.came}{row.difference}" in page.said
    # The loss to expect of another job is not drawn.
    plan_run(run, loss=loss, job={"train.max_steps": 0})
    write_page(run, result)
    page = Page(run.report.read_text())
    assert page.chart("loss")["expected"] is None
    assert "the plan is of another job than the run, and is not compared with it: train.max_steps differs" in page.said


def test_the_page_of_a_run_that_failed_at_once_says_so(result: Any) -> None:
    failed = result | {"status": "failed", "error": "<b>no & nothing</b>", "baseline": None, "evals": [], "final": None}
    failed["train"] = {"steps": 0, "tokens": 0, "seconds": 0, "tokens_per_s": None}
    text = render_page(failed, History(), "name: a")
    assert "&lt;b&gt;no &amp; nothing&lt;/b&gt;" in text
    assert "No data yet" in text


def test_the_page_has_the_figures_of_the_data_the_samples_and_what_the_job_changes(run: RunDir, result: Any) -> None:
    write_samples(run, {"prompt": "The", "seed": 1, "before": "The of of", "after": "The end"})
    write_page(run, result)
    page = Page(run.report.read_text())
    manifest = Manifest.read(run.data)
    train, evaluated = manifest.splits["train"], manifest.splits["eval"]
    assert manifest.tokens_per_word
    for row in (
        f"records{train.num_records}{evaluated.num_records}",
        f"dropped tokens{train.num_dropped_tokens}{evaluated.num_dropped_tokens}",
        f"blocks of 32{train.num_blocks}{evaluated.num_blocks}",
        f"tokens a word{manifest.tokens_per_word:.2f}",
        "The of of",
        "The end",
        "train.learning_rate0.0012e-05",
    ):
        assert row in page.said
    changed = page.said.split("not at their defaults")[1].split("the whole job file")[0]
    assert "train.seed" not in changed
    assert "seed: 42" in page.said


def test_the_page_of_a_run_of_an_earlier_version_shows_what_there_is(run: RunDir, result: Any) -> None:
    run.data.unlink()
    run.job.write_text("of: another version\n")
    added = ("time", "seconds", "startup", "lost", "memory_bytes", "hosts", "compiled")
    records = [record | {} for record in metrics_of(run.metrics)]
    for record in records:
        for name in added if record["kind"] != "step" else ("memory_bytes",):
            record.pop(name, None)
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_page(run, result)
    page = Page(run.report.read_text())
    assert "Evaluations and starts of an earlier version have no times." in page.said
    assert "of: another version" in page.said
    assert "not at their defaults" not in page.said
    assert len(page.series("loss")["training"]["y"]) == 24
