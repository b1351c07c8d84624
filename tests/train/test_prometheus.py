"""What Prometheus reads of a run while it goes on, and that the dashboard asks for that."""

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import Request, urlopen

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_client.samples import Sample

from clm_dist.config.prometheus import HOST, PORT
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import write_json
from clm_dist.files.records import append_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.recorder import outlives_start
from clm_dist.train.trackers.check import check_trackers
from clm_dist.train.trackers.processes import tracked
from tests.conftest import ROOT
from tests.support.notes import Notes
from tests.train.test_tracker_services import run

__all__ = ["run"]


def start(number: int) -> Any:
    return {"kind": "start", "step": number, "num_steps": 9, "workers": 2}


def step(number: int, **more: Any) -> Any:
    figures = {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100, "seconds": 0.5, "tokens_per_s": 200.0}
    return {"kind": "step", "step": number, "epoch": 0.5, **figures, "mfu": None, "data_wait": 0.25, **more}


def evaluation(number: int, perplexity: float | None) -> Any:
    figures = {"loss": 1.5, "perplexity": perplexity, "bits_per_byte": 0.75, "num_tokens": 9}
    return {"kind": "eval", "step": number, "epoch": 1.0, **figures}


CHECKPOINT: Any = {"kind": "checkpoint", "step": 2, "name": "a", "bytes": 1024, "seconds": 2.5, "blocked": 0.125}
FAILED: Any = {"kind": "checkpoint", "step": 3, "name": "b", "error": "the disk is full"}
FAILURE: Any = {"kind": "failure", "step": 4, "worker": 1, "error": "it died", "time": 1.0}
SPIKE: Any = {"kind": "spike", "step": 4, "loss": 9.0, "grad_norm": 1.0, "blocks": [1], "action": "report"}
ALL = [
    *(start(0), evaluation(0, 20.0), step(1, mfu=0.4, memory_bytes=2**20), step(2), evaluation(2, 4.5), CHECKPOINT),
    *(step(3), FAILED, SPIKE, step(4, loss=3.5, grad_norm=None), FAILURE),
]


@pytest.fixture
def served(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Serves the run at a free port, and gives the address."""
    monkeypatch.setenv(PORT, "0")

    @contextlib.contextmanager
    def served(notes: Notes) -> Iterator[str]:
        with tracked(["prometheus"], run, notes) as look:
            while not notes.notes:
                look()
                time.sleep(0.05)
            yield notes.notes[0].removeprefix("prometheus: ")
            if not run.result.exists():
                # After which it waits for nobody.
                write_json(run.result, {"status": "preempted"})

    return served


def scraped(url: str) -> dict[str, float]:
    """The figures of the run, by their names."""
    with urlopen(url, timeout=30) as answer:
        families = list(parse(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if not is_state(sample)]
    assert all(sample.labels == {"run": "tiny"} for sample in samples)
    return {sample.name: sample.value for sample in samples}


def is_state(sample: Sample) -> bool:
    return sample.name == "clm_dist_state"


def scraped_when(url: str, name: str, value: float) -> dict[str, float]:
    """The figures once one of them has a value."""
    while (figures := scraped(url)).get(name) != value:
        time.sleep(0.05)
    return figures


def test_a_scrape_has_the_figures_of_the_records(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    append_records(run.metrics, [start(0)])
    with served(Notes()) as url:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/metrics", url)
        # What there is nothing to say of is not there, and not 0.
        assert not {"clm_dist_train_loss", "clm_dist_eval_perplexity"} & scraped(url).keys()
        append_records(run.metrics, ALL[1:])
        figures = scraped_when(url, "clm_dist_worker_failures_total", 1)
        assert math.isnan(figures.pop("clm_dist_grad_norm"))
        assert figures == {
            "clm_dist_step": 4,
            "clm_dist_planned_steps": 9,
            "clm_dist_workers": 2,
            "clm_dist_epoch": 0.5,
            "clm_dist_train_loss": 3.5,
            "clm_dist_learning_rate": 1e-3,
            "clm_dist_tokens_per_second": 200,
            "clm_dist_mfu_ratio": 0.4,
            "clm_dist_memory_bytes": 2**20,
            "clm_dist_eval_step": 2,
            "clm_dist_eval_loss": 1.5,
            "clm_dist_eval_perplexity": 4.5,
            "clm_dist_eval_bits_per_byte": 0.75,
            "clm_dist_checkpoint_step": 2,
            "clm_dist_checkpoint_size_bytes": 1024,
            "clm_dist_checkpoint_duration_seconds": 2.5,
            "clm_dist_checkpoint_blocked_seconds": 0.125,
            "clm_dist_steps_total": 4,
            "clm_dist_tokens_total": 400,
            "clm_dist_step_seconds_total": 2,
            "clm_dist_data_wait_seconds_total": 1,
            "clm_dist_restarts_total": 0,
            "clm_dist_worker_failures_total": 1,
            "clm_dist_checkpoints_total": 1,
            "clm_dist_checkpoint_failures_total": 1,
            "clm_dist_outliers_total": 1,
        }
        append_records(run.metrics, [evaluation(5, None)])
        assert scraped_when(url, "clm_dist_eval_step", 5)["clm_dist_eval_perplexity"] == math.inf


def test_gauges_go_back_with_the_run_and_counters_do_not(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    append_records(run.metrics, ALL)
    with served(Notes()) as url:
        scraped_when(url, "clm_dist_step", 4)
        replace_records(run.metrics, [start(2)], keep=outlives_start(2))
        figures = scraped_when(url, "clm_dist_step", 2)
        assert (figures["clm_dist_restarts_total"], figures["clm_dist_tokens_total"]) == (1, 400)
        append_records(run.metrics, [step(3, loss=1.25)])
        figures = scraped_when(url, "clm_dist_step", 3)
        assert (figures["clm_dist_train_loss"], figures["clm_dist_tokens_total"]) == (1.25, 400)
        append_records(run.metrics, [step(4), step(5)])
        assert scraped_when(url, "clm_dist_step", 5)["clm_dist_tokens_total"] == 500
    # The next start of the run, on this machine or another, has all of it again.
    with served(Notes()) as url:
        figures = scraped_when(url, "clm_dist_step", 5)
    assert (figures["clm_dist_restarts_total"], figures["clm_dist_tokens_total"]) == (1, 500)
    assert figures["clm_dist_eval_perplexity"] == 4.5


def test_names_units_and_types_are_as_prometheus_asks(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    append_records(run.metrics, ALL)
    with served(Notes()) as url:
        scraped_when(url, "clm_dist_step", 4)
        request = Request(url, headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        with urlopen(request, timeout=30) as answer:
            assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
            # Which is strict about names, types and the order of lines.
            parsed = parse_openmetrics(answer.read().decode())  # type: ignore[no-untyped-call]
    families = {family.name: family for family in parsed}
    assert {family.type for family in families.values()} == {"gauge", "counter", "stateset"}
    for name, family in families.items():
        assert re.fullmatch(r"clm_dist_[a-z]+(_[a-z]+)*", name)
        assert family.documentation.endswith(".")
        # A base unit is the end of a name, before _total.
        assert not re.search(r"_(total|count|sum|bucket|ms|mib|percent|gauge|counter)$", name)
        assert family.type != "counter" or all(sample.name == f"{name}_total" for sample in family.samples)


@pytest.mark.parametrize("status", ["done", "failed", "preempted"])
def test_a_run_that_is_done_waits_for_a_scraper_that_came_before(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]], status: str
) -> None:
    last: dict[str, float] = {}
    append_records(run.metrics, [start(0), step(1)])
    notes = Notes()
    with served(notes) as url:
        scraped(url)
        append_records(run.metrics, [step(2)])
        write_json(run.result, {"status": status})

        def come_again() -> None:
            while not notes.stages:  # the driver waits for trackers
                time.sleep(0.01)
            with contextlib.suppress(OSError):
                while last.get("done") != 1:
                    with urlopen(url, timeout=30) as answer:
                        samples = [s for family in parse(answer.read().decode()) for s in family.samples]
                    states = {s.labels["clm_dist_state"]: s.value for s in samples if is_state(s)}
                    last.update(states, step=next(s.value for s in samples if s.name == "clm_dist_step"))
                    time.sleep(0.05)

        thread = threading.Thread(target=come_again)
        thread.start()
    thread.join()
    assert notes.notes[1:] == []
    if status == "done":
        assert (last["done"], last["running"], last["step"]) == (1, 0, 2)
    else:
        assert last.get("done", 0) == 0
    # Its address is of nobody now.
    assert not run.tracker_state("prometheus").exists()
    with pytest.raises(OSError):
        scraped(url)


def test_a_port_that_is_taken_is_told_and_the_run_goes_on(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv(PORT, str(port))
        notes = Notes()
        with tracked(["prometheus"], run, notes) as look:
            while not notes.notes:
                look()
                time.sleep(0.05)
    (said,) = notes.notes
    assert said.startswith(
        f"prometheus fails (ConfigError: cannot listen at 127.0.0.1:{port}: Address already in use; set {PORT} to "
        "another port, 0 for a free one); the run does without it"
    )


def test_another_address_is_shown_by_the_name_of_the_host(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(HOST, "0.0.0.0")
    append_records(run.metrics, [start(0)])
    with served(Notes()) as url:
        assert url.startswith(f"http://{socket.gethostname()}:")
        assert scraped(url.replace(socket.gethostname(), "127.0.0.1"))


def test_a_port_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("x", "65536", "-1", "²"):
        monkeypatch.setenv(PORT, port)
        with pytest.raises(ConfigError, match=f"{PORT} is '{port}', which is not a port") as caught:
            check_trackers(["prometheus"])
        assert caught.value.field == "tracking"
    monkeypatch.setenv(PORT, "")
    check_trackers(["prometheus"])


# The dashboard.


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads((ROOT / "docs" / "grafana.json").read_text())


def test_the_dashboard_asks_for_metrics_that_a_run_has(
    dashboard: Any, run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    append_records(run.metrics, ALL)
    with served(Notes()) as url:
        exported = scraped_when(url, "clm_dist_step", 4).keys() | {"clm_dist_state"}
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [one["definition"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    named = {name for expression in asked for name in re.findall(r"\bclm_dist_\w+", expression)}
    assert named <= exported
    assert named >= {
        *("clm_dist_train_loss", "clm_dist_eval_perplexity", "clm_dist_tokens_per_second", "clm_dist_mfu_ratio"),
        *("clm_dist_memory_bytes", "clm_dist_restarts_total", "clm_dist_checkpoint_step"),
    }


def test_grafana_can_import_the_dashboard(dashboard: Any) -> None:
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    assert isinstance(dashboard["schemaVersion"], int)
    assert dashboard["title"]
    # It has no id: Grafana gives one.
    assert "id" not in dashboard
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert variables["run"]["datasource"] == source
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["datasource"] == source
        assert all(target["datasource"] == source and target["refId"] for target in panel["targets"])
        assert all('{run=~"$run"}' in target["expr"] for target in panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_page_names_the_metrics_that_a_run_has(
    run: RunDir, served: Callable[..., contextlib.AbstractContextManager[str]]
) -> None:
    append_records(run.metrics, ALL)
    with served(Notes()) as url:
        exported = scraped_when(url, "clm_dist_step", 4).keys() | {"clm_dist_state"}
    section = (ROOT / "docs" / "trackers.md").read_text().partition("## Prometheus")[2]
    (table,) = re.findall(r"\| metric \| what \|\n.*?\n((?:\|.*\n)+)", section)
    named = {name for row in table.splitlines() for name in re.findall(r"`([a-z_]+)`", row.split("|")[1])}
    assert {f"clm_dist_{name.removeprefix('clm_dist_')}" for name in named} == exported
