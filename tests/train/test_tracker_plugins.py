"""Trackers of other packages: what they receive, that they are left where they fail, and which names are refused."""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.records import append_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.recorder import outlives_start
from clm_dist.train.trackers.check import check_trackers
from clm_dist.train.trackers.processes import tracked
from clm_dist.train.trackers.unsent import Queue
from tests.conftest import ROOT
from tests.support.notes import Notes
from tests.support.plugins import install_package
from tests.train.test_tracker_services import run, step

__all__ = ["run"]

Install = Callable[..., None]
EVAL: Any = {"kind": "eval", "step": 2, "epoch": 1.0, "loss": 1.25, "perplexity": None, "num_tokens": 9}
PHASE: Any = {"kind": "phase", "step": 2, "phase": "Evaluating"}


def start(number: int) -> Any:
    return {"kind": "start", "step": number}


def failure(number: int) -> Any:
    return {"kind": "failure", "step": number, "worker": 1, "error": "it died"}


def checkpoint(number: int, **more: Any) -> Any:
    return {"kind": "checkpoint", "step": number, "name": f"step-{number}", **more}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a package of one module with trackers, also for the processes that are started."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))

    def install(module: str, code: str, **entries: str) -> None:
        install_package(site, module, code, "clm_dist.trackers", **entries)

    return install


@pytest.fixture
def documented() -> str:
    """The module of the worked example."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
    (code,) = (block for block in blocks if "class Webhook" in block)
    return str(code)


@pytest.fixture
def posts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is posted to the address in WEBHOOK_URL."""
    received: list[Any] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *about: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("WEBHOOK_URL", f"http://127.0.0.1:{server.server_address[1]}/run")
    yield received
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_documented_trackers_post_each_record_once_over_two_starts(
    install: Install, documented: str, posts: list[Any], run: RunDir
) -> None:
    install("clm_dist_webhook", documented, webhook="Webhook", alerts="Alerts")
    check_trackers(["webhook", "alerts"])
    notes = Notes()
    with tracked(["webhook"], run, notes):
        append_records(run.metrics, [start(0), step(1), PHASE, EVAL, checkpoint(2), failure(2)])
        write_json(run.result, {"status": "preempted"})
    again = start(2)
    replace_records(run.metrics, [again], keep=outlives_start(2))
    append_records(run.metrics, [step(3)])
    write_json(run.result, {"status": "done"})
    with tracked(["webhook", "alerts"], run, notes):
        pass
    assert notes.notes == []
    webhook, alerts = (read_json(run.tracker_state(name))["id"] for name in ("webhook", "alerts"))
    assert {post["run"] for post in posts} == {"tiny"}
    of_webhook = [post for post in posts if post["id"] == webhook]
    assert [record for post in of_webhook for record in post.get("records", [])] == [
        *(start(0), step(1), EVAL, checkpoint(2), failure(2)),
        *(again, step(3)),
    ]
    assert [post["status"] for post in of_webhook if "status" in post] == ["preempted", "done"]
    of_alerts = [post for post in posts if post["id"] == alerts]
    assert [post.get("records") for post in of_alerts] == [[failure(2)], None]


@pytest.mark.parametrize(
    ("code", "note"),
    [
        (
            "raise ImportError('no such library')",
            "faulty fails (ConfigError: tracking faulty of faulty_tracker cannot be",
        ),
        (
            "class Tracker:\n    def start(self, *of): raise OSError('it is away')",
            "faulty fails (OSError: it is away);",
        ),
        ("import os, signal\ndef Tracker(): os.kill(os.getpid(), signal.SIGSEGV)", "faulty ended by signal 11;"),
        ("import time\ndef Tracker(): time.sleep(600)", "faulty did not take all figures within 0.5 s after the end;"),
    ],
)
def test_no_fault_of_a_tracker_of_a_package_is_one_of_the_run(
    install: Install, run: RunDir, code: str, note: str
) -> None:
    install("faulty_tracker", code, faulty="Tracker")
    check_trackers(["faulty"])  # which does not import it
    append_records(run.metrics, [step(1)])
    notes = Notes()
    # The one that hangs is the only one that lives until the limit.
    with tracked(["faulty"], run, notes, limit_s=0.5 if "sleep" in code else 30) as look:
        while not notes.notes and "sleep" not in code:
            look()
            time.sleep(0.05)
    (said,) = notes.notes
    assert said.startswith(note)


def test_a_name_that_no_package_offers_is_refused_with_those_that_are_known(install: Install) -> None:
    install("some_trackers", "raise SystemExit('it was imported')", webhook="Webhook")
    for name, advice in (("webhok", "did you mean webhook? "), ("tensorbord", "did you mean tensorboard? "), ("q", "")):
        with pytest.raises(ConfigError) as caught:
            check_trackers([name])
        assert caught.value.field == "tracking"
        assert str(caught.value) == (
            f"tracking {name} is offered by no installed package (entry points clm_dist.trackers: webhook; built in: "
            f"tensorboard, wandb, mlflow, trackio, comet, prometheus); {advice}{'Else ' if advice else ''}install the "
            "package that has it in this environment"
        )
    install("more_trackers", "", webhook="Webhook")
    with pytest.raises(ConfigError, match=r"offered by more.trackers and some.trackers; uninstall one of them"):
        check_trackers(["webhook"])


# Which records are new.


def test_what_happens_again_after_a_start_comes_again_and_figures_do_not() -> None:
    first = [start(0), *map(step, range(1, 5)), checkpoint(2), EVAL, checkpoint(4, error="the disk is full")]
    queue = Queue({})
    assert list(queue.unsent(first, is_anew=True)) == first
    # From the checkpoint of step 2: what came of later steps is cut, and made again.
    file = [record for record in [*first, failure(4)] if outlives_start(2)(record)] + [start(2)]
    assert list(queue.unsent(file, is_anew=True)) == [failure(4), start(2)]
    later = [step(3), step(4), checkpoint(4), PHASE, step(5)]
    assert list(queue.unsent(later, is_anew=False)) == [checkpoint(4), step(5)]
    # The same again, by a process that has only what was kept.
    kept = dict(queue.sent)
    assert list(Queue(kept).unsent([*file, *later], is_anew=True)) == []
    # From the beginning, where nothing outlives but starts and failures.
    file = [record for record in [*file, *later, failure(5)] if outlives_start(0)(record)] + [start(0)]
    assert list(Queue(kept).unsent([*file, checkpoint(0), step(1), step(6)], is_anew=True)) == [
        *(failure(5), start(0), checkpoint(0), step(6)),
    ]
