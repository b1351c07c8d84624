"""The trackers themselves: how their libraries are called, what they keep offline, and which are refused."""

import importlib.util
import json
import os
import sqlite3
import sys
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import ANY, MagicMock, call

import pytest

from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json, write_text
from clm_dist.files.records import append_records
from clm_dist.files.run_dir import RunDir
from clm_dist.train.trackers.check import check_trackers
from clm_dist.train.trackers.processes import tracked
from clm_dist.train.trackers.services import TRACKERS
from tests.conftest import MakeJob
from tests.support.notes import Notes


def step(number: int, loss: float = 1.5) -> Any:
    return {"kind": "step", "step": number, "epoch": 0.5, "loss": loss, "grad_norm": None, "blocks": 99}


@pytest.fixture
def run(tmp_path: Path, make_job: MakeJob) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.trackers.mkdir(parents=True)
    write_text(run.job, job_text(make_job("data.path=/private/place/text.jsonl", "data.source=files")))
    return run


# The services, as their libraries are called.


def started(service: str, library: MagicMock, monkeypatch: pytest.MonkeyPatch, run_id: str | None = None) -> Any:
    module = {"comet": "comet_ml"}.get(service, service)
    monkeypatch.setitem(sys.modules, module, library)
    if service == "mlflow":
        monkeypatch.setitem(sys.modules, "mlflow.entities", library.entities)
    tracker = TRACKERS[service]()
    return tracker, tracker.start("tiny", {"train.epochs": 2}, Path("/there"), run_id)


RECORDS: list[Any] = [
    {"kind": "start", "step": 0, "time": 1.0},
    {"kind": "step", "step": 1, "loss": 1.5, "blocks": 99},
    {"kind": "eval", "step": 1, "loss": 1.25, "perplexity": None},
]


def test_wandb_goes_on_with_a_run_and_counts_the_steps_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "answers")
    library = MagicMock()
    tracker, _ = started("wandb", library, monkeypatch, run_id="old")
    asked = library.init.call_args.kwargs
    assert (asked["id"], asked["resume"], asked["name"], asked["project"]) == ("old", "allow", "tiny", "answers")
    assert (asked["config"], asked["dir"]) == ({"train.epochs": 2}, "/there")
    tracker.add(RECORDS)
    tracker.finish("preempted")
    called = [one for one in library.init.return_value.mock_calls if not one[0].startswith("id")]
    assert called == [
        call.define_metric("*", step_metric="global_step"),
        call.log({"global_step": 1, "step/loss": 1.5}),
        call.log({"global_step": 1, "eval/loss": 1.25}),
        call.mark_preempting(),
        call.finish(exit_code=1),
    ]
    started("wandb", library, monkeypatch)
    assert len(library.init.call_args.kwargs["id"]) == 32


def test_mlflow_gets_a_batch_in_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    library = MagicMock()
    library.entities.Metric = lambda *of: of
    library.entities.Param = lambda *of: of
    client = library.MlflowClient.return_value
    client.get_experiment_by_name.return_value = None
    client.create_run.return_value.info.run_id = "made"
    tracker, made = started("mlflow", library, monkeypatch)
    assert made == "made"
    assert client.create_run.call_args == call(client.create_experiment.return_value, run_name="tiny", tags=ANY)
    client.log_batch.assert_called_once_with("made", params=[("train.epochs", "2")])
    client.reset_mock()
    tracker.add(RECORDS)
    tracker.finish("failed")
    assert client.mock_calls == [
        call.log_batch("made", metrics=[("step/loss", 1.5, ANY, 1), ("eval/loss", 1.25, ANY, 1)]),
        call.set_terminated("made", "FAILED"),
    ]
    client.reset_mock()
    assert started("mlflow", library, monkeypatch, run_id="old")[1] == "old"
    # Parameters cannot be changed, so they are not sent again.
    assert client.mock_calls == [call.update_run("old", status="RUNNING")]


def test_trackio_finds_a_run_again_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    library = MagicMock()
    tracker, made = started("trackio", library, monkeypatch)
    assert made.startswith("tiny-")
    tracker.add(RECORDS)
    tracker.finish("done")
    assert library.init.return_value.mock_calls == [
        call.log({"step/loss": 1.5}, step=1),
        call.log({"eval/loss": 1.25}, step=1),
        call.finish(),
    ]
    started("trackio", library, monkeypatch, run_id=made)
    first, second = (asked.kwargs for asked in library.init.call_args_list)
    assert first == second
    assert (first["name"], first["resume"], first["config"]) == (made, "allow", {"train.epochs": 2})


def test_comet_goes_on_with_the_experiment_of_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    library = MagicMock()
    tracker, made = started("comet", library, monkeypatch, run_id="old")
    asked = library.start.call_args.kwargs
    assert (made, asked["experiment_key"], asked["mode"]) == ("old", "old", "get_or_create")
    tracker.add(RECORDS)
    tracker.finish("done")
    assert library.start.return_value.mock_calls == [
        call.log_parameters({"train.epochs": 2}),
        call.log_metrics({"step/loss": 1.5}, step=1),
        call.log_metrics({"eval/loss": 1.25}, step=1),
        call.log_other("status", "done"),
        call.end(),
    ]


# The libraries themselves, offline.


def mlflow_steps(run: RunDir) -> list[int]:
    (file,) = run.root.glob("store/*/*/metrics/step/loss")
    return [int(line.split()[2]) for line in file.read_text().splitlines()]


def trackio_steps(run: RunDir) -> list[int]:
    with sqlite3.connect(run.root / "store" / "clm-dist.db") as database:
        rows = database.execute("SELECT step, metrics, run_id FROM metrics ORDER BY step").fetchall()
    database.close()
    assert len({run_id for *_, run_id in rows}) == 1
    return [number for number, metrics, _ in rows if "step/loss" in json.loads(metrics)]


def wandb_steps(run: RunDir) -> list[int]:
    files = list(run.trackers.glob("wandb/offline-run-*/*.wandb"))
    # Its format is private; two starts of one run are two files with one id.
    assert {file.stem for file in files} == {f"run-{read_json(run.tracker_state('wandb'))['id']}"}
    assert all(b"step/loss" in file.read_bytes() for file in files)
    return list(range(1, 3 * len(files) + 1))


def comet_steps(run: RunDir) -> list[int]:
    steps = []
    for file in run.trackers.glob("*.zip"):
        messages = zipfile.ZipFile(file).read("messages.json").decode().splitlines()
        metrics = [json.loads(message)["payload"].get("metric") or {} for message in messages]
        steps += [metric["step"] for metric in metrics if metric.get("metricName") == "step/loss"]
    return sorted(steps)


REAL = {"wandb": wandb_steps, "mlflow": mlflow_steps, "trackio": trackio_steps, "comet": comet_steps}
SECRET = "5ecret0123456789012345678901234567890123"


@pytest.mark.parametrize("service", REAL)
def test_two_starts_of_a_run_are_one_at_the_tracker(service: str, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    module = {"comet": "comet_ml"}.get(service, service)
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'clm-dist[{service}]'")
    for name, value in {
        "WANDB_MODE": "offline",
        "COMET_START_ONLINE": "0",
        "MLFLOW_TRACKING_URI": f"file:{run.root}/store",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": f"{run.root}/store",
        **dict.fromkeys(("WANDB_API_KEY", "COMET_API_KEY", "HF_TOKEN", "MY_PASSWORD"), SECRET),
    }.items():
        monkeypatch.setenv(name, value)
    check_trackers([service])
    for first in (1, 4):
        notes = Notes()
        with tracked([service], run, notes):
            append_records(run.metrics, [step(number) for number in range(first, first + 3)])
            write_json(run.result, {"status": "done"})
        assert notes.notes == []
    assert REAL[service](run) == [1, 2, 3, 4, 5, 6]
    for file in run.root.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


# What is refused before Ray is started.


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user who has logged in nowhere, with every tracker installed."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "COMET_", "MLFLOW_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "sqlalchemy" else name)
    return home


def refusal(service: str) -> str | None:
    try:
        check_trackers([service])
    except ConfigError as error:
        assert error.field == "tracking"
        return str(error)
    return None


@pytest.mark.parametrize(
    ("service", "message"),
    [
        (
            "wandb",
            "there is no login for api.wandb.ai; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline",
        ),
        ("mlflow", "MLFLOW_TRACKING_URI is not set"),
        ("comet", "there is no API key; run `comet login`, set COMET_API_KEY, or set COMET_START_ONLINE=0"),
    ],
)
def test_a_tracker_without_a_login_is_refused(nobody: Path, service: str, message: str) -> None:
    assert (refusal(service) or "").startswith(f"tracking has {service}, but {message}")


@pytest.mark.parametrize(
    ("service", "variable", "value"),
    [
        ("wandb", "WANDB_API_KEY", "x"),
        ("wandb", "WANDB_MODE", "offline"),
        ("mlflow", "MLFLOW_TRACKING_URI", "http://127.0.0.1:5000"),
        ("comet", "COMET_API_KEY", "x"),
        ("comet", "COMET_START_ONLINE", "0"),
        ("trackio", "UNUSED", ""),
    ],
)
def test_a_variable_is_a_login(
    nobody: Path, service: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert refusal(service) is None


@pytest.mark.parametrize(
    ("service", "file", "text"),
    [
        ("wandb", ".netrc", "machine api.wandb.ai login user password x\n"),
        ("wandb", "wandb/settings", "[default]\nmode = offline\n"),
        ("comet", ".comet.config", "[comet]\napi_key = x\n"),
    ],
)
def test_a_file_of_the_tracker_s_own_tool_is_a_login(nobody: Path, service: str, file: str, text: str) -> None:
    (nobody / file).parent.mkdir(exist_ok=True)
    (nobody / file).write_text(text.replace("api.wandb.ai", "elsewhere").replace("api_key", "workspace"))
    if "mode" not in text:
        assert refusal(service)
    (nobody / file).write_text(text)
    assert refusal(service) is None


def test_a_database_of_mlflow_needs_the_whole_of_it(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg2://somewhere/db")
    assert "mlflow-skinny is not enough; pip install mlflow" in (refusal("mlflow") or "")


@pytest.mark.parametrize("service", ["tensorboard", *TRACKERS])
def test_every_tracker_that_is_not_installed_names_its_extra(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert (refusal(service) or "").endswith(f"is not installed; pip install 'clm-dist[{service}]'")
