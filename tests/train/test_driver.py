"""Runs under Ray Train: what they leave, and what a killed worker costs."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import CheckpointError, ConfigError, NotReadyError, RunError, StorageError
from clm_dist.files.atomic import read_json
from clm_dist.files.blocks import Manifest
from clm_dist.files.lease import Lease
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import find_run
from clm_dist.files.samples import read_samples, write_samples
from clm_dist.files.stores import Store
from clm_dist.progress import Silent
from clm_dist.train.memory import PassTooLargeError
from clm_dist.train.micro_size import with_blocks_that_fit
from clm_dist.train.ray import driver
from clm_dist.train.ray.cluster import Cluster
from clm_dist.train.ray.worker import train_worker
from clm_dist.train.rehearsal import Rehearsal
from tests.conftest import MakeJob
from tests.support.disks import mode, mounted
from tests.support.fake_trackio import write_fake_trackio
from tests.support.notes import Notes
from tests.support.runs import checkpoints_of, metrics_of, saved_steps
from tests.support.training import losses_of, train_one

TWO_WORKERS = ("cluster.workers=2", "batch.micro_size=4")


@pytest.fixture
def fit(cluster: Cluster, prepared: Callable[[JobConfig], Path]) -> Callable[..., dict[str, Any]]:
    def run(job: JobConfig, directory: Path, **options: Any) -> dict[str, Any]:
        progress = options.pop("progress", Silent())
        return dict(driver.train(job, RunDir(directory), Store(prepared(job)), cluster, progress, **options))

    return run


def test_a_run_leaves_what_the_design_promises(
    fit: Callable[..., dict[str, Any]],
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make_job(*TWO_WORKERS, "train.max_steps=24", "tracking=[tensorboard, trackio]", "hub.push=epoch")
    calls = write_fake_trackio(tmp_path / "fake", monkeypatch)
    exported: list[tuple[Path, int]] = []
    progress = Notes()
    seen: list[int] = []
    result = fit(
        job,
        tmp_path / "run",
        on_export=lambda path, step: exported.append((path, step)),
        on_records=lambda: seen.append(len(metrics_of(tmp_path / "run" / "metrics.jsonl"))),
        progress=progress,
    )

    run = RunDir(tmp_path / "run")
    assert result == read_json(run.result)
    assert (result["status"], result["workers"], result["strategy"], result["restarts"]) == ("done", 2, "ddp", 0)
    assert Manifest.read(run.data) == Manifest.read(prepared(job) / "manifest.json").without_files()
    assert '.arrow"' not in run.data.read_text()
    assert result["train"]["steps"] == 24
    assert result["data"] == prepared(job).name
    records = metrics_of(run.metrics)
    # The last records may come when the workers have ended, and result.json has them.
    assert seen == sorted(set(seen))
    assert 0 < seen[0] < seen[-1] <= len(records)
    steps = [record for record in records if record["kind"] == "step"]
    assert [record["step"] for record in steps] == list(range(1, 25))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait"} <= steps[0].keys()
    assert result["train"]["tokens"] == sum(record["tokens"] for record in steps)
    # The untouched model, after each epoch of 12 steps; the last is the final one.
    assert [result["baseline"]["step"], *(e["step"] for e in result["evals"])] == [0, 12, 24]
    assert result["final"] == result["evals"][-1]
    assert result["final"]["loss"] < result["baseline"]["loss"]
    private = {path for path in run.root.rglob("*") if path.is_file() and not mode(path) & 0o044}
    assert private == {run.job, run.tracker_state("trackio")}
    assert {path.name for path in run.final.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert not (run.root / "final.unverified").exists()
    assert saved_steps(run) == [22, 24]
    assert exported == [(run.exports / "step-00000012", 12)]
    assert (exported[0][0] / "model.safetensors").is_file()
    assert any(run.tensorboard.iterdir())
    sent = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [call[1] for call in sent if call[0] == "log" and "step/loss" in call[2]] == list(range(1, 25))
    assert [call[1] for call in sent if call[0] == "log" and "eval/loss" in call[2]] == [0, 12, 24]
    assert any("Step 24, epoch 2.00: eval loss" in note for note in progress.notes)
    assert progress.stages[:2] == ["Starting 2 workers (usually 10 to 40 s)", "Evaluating the untouched model"]
    assert progress.stages[-3:] == ["Writing the model", "Evaluating the written model", "Waiting for trackers"]

    # The same numbers without Ray, in one process: the evaluation of equal weights to the last bit.
    (tmp_path / "alone").mkdir()
    alone = make_job("train.max_steps=24")
    assert train_one(alone, RunDir(tmp_path / "alone"), prepared(alone)).status == "done"
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-6)
    evals = [r for r in metrics_of(tmp_path / "alone" / "metrics.jsonl") if r["kind"] == "eval"]
    assert evals[0]["loss"] == result["baseline"]["loss"]


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_commit_and_changes_nothing(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path
) -> None:
    settings = (*TWO_WORKERS, "train.max_steps=60", "train.epochs=99", "eval.every=20", "checkpoint.every=10")
    job = make_job(*settings, "model.config.resid_pdrop=0.1", "cluster.strategy=zero2")
    untouched = fit(job, tmp_path / "untouched")
    run = RunDir(tmp_path / "killed")
    killed: list[int] = []

    def kill_rank_0_after_a_commit() -> None:
        while not saved_steps(run):
            time.sleep(0.02)
        pid = next(record["pid"] for record in metrics_of(run.metrics) if record["kind"] == "start")
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill_rank_0_after_a_commit)
    killer.start()
    progress = Notes()
    result = fit(job, run.root, progress=progress)
    killer.join()
    assert killed
    assert (result["status"], result["restarts"]) == ("done", 1)
    starts = [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert starts[0] == 0
    assert starts[1] >= 10
    assert any(f"Resuming from the checkpoint of step {starts[1]}" in note for note in progress.notes)
    assert losses_of(run.root) == losses_of(tmp_path / "untouched")
    assert result["evals"] == untouched["evals"]
    weights = [directory / "final" / "model.safetensors" for directory in (run.root, tmp_path / "untouched")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_a_pass_that_does_not_fit_into_memory_is_halved_and_the_steps_stay(
    fit: Callable[..., dict[str, Any]],
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train_where_two_blocks_fit(config: Any) -> Any:
        # Ray brings it to the workers as it is.
        run = RunDir(Path(config["run"]))
        if with_blocks_that_fit(read_saved_job(run.job), run).batch.known_micro_size > 2:
            raise PassTooLargeError("CUDA out of memory. Tried to allocate 1 GiB")
        return train_worker(config)

    monkeypatch.setattr("clm_dist.train.ray.trainer.train_worker", train_where_two_blocks_fit)
    progress = Notes()
    result = fit(make_job("batch.micro_size=8", "train.max_steps=2"), tmp_path / "halved", progress=progress)
    assert result["status"] == "done"
    records = metrics_of(tmp_path / "halved" / "metrics.jsonl")
    assert sum(r["kind"] == "failure" for r in records) == 2
    assert [r["micro_size"] for r in records if r["kind"] == "start"] == [2]
    assert any("PassTooLargeError: CUDA out of memory" in note for note in progress.notes)
    assert "A pass has 2 blocks now, not 8; a step has the same blocks" in progress.notes
    small = make_job("batch.micro_size=2", "train.max_steps=2")
    assert train_one(small, RunDir(tmp_path / "small"), prepared(small)).status == "done"
    assert losses_of(tmp_path / "halved") == pytest.approx(losses_of(tmp_path / "small"), rel=1e-6)


@pytest.mark.slow
def test_where_others_would_wait_new_workers_try_half(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_where_two_blocks_fit(config: Any) -> Any:
        # Ray brings it to the workers as it is.
        step = Rehearsal.step

        def fail(self: Rehearsal, sizes: Sequence[int]) -> float:
            if max(sizes) > 2 and self.strategy.rank == 1:
                raise PassTooLargeError("CUDA out of memory. Tried to allocate 1 GiB")
            step(self, sizes)
            # As long for each size, so the largest that fits is the fastest on a busy machine too.
            return 1.0

        Rehearsal.step = fail  # type: ignore[method-assign]
        return train_worker(config)

    monkeypatch.setattr("clm_dist.train.ray.trainer.train_worker", train_where_two_blocks_fit)
    progress = Notes()
    job = make_job("batch.micro_size=auto", "batch.global_size=16", "cluster.workers=2", "train.max_steps=2")
    assert fit(job, tmp_path / "run", progress=progress)["status"] == "done"
    assert read_saved_job(tmp_path / "run" / "job.yaml").batch.micro_size == "auto"
    records = metrics_of(tmp_path / "run" / "metrics.jsonl")
    assert [r["micro_size"] for r in records if r["kind"] == "start"] == [2]
    assert sum(r["kind"] == "failure" for r in records) == 1
    assert any("a pass has 2 blocks, the fastest; tried 1, 2" in note for note in progress.notes)


def test_a_run_that_is_cut_is_not_done_for_what_it_was_before(run: RunDir, make_job: MakeJob) -> None:
    job = make_job("train.max_steps=24", "model.config.n_positions=128")
    assert find_run(job, run.root.parent) == (run, True)
    longer = make_job("train.max_steps=36", "train.epochs=3", "model.config.n_positions=128")
    assert find_run(longer, run.root.parent, resume=True) == (run, False)
    write_samples(run, {"prompt": "The", "seed": 42, "after": "The end."})
    driver._open_run(longer, run, overwrite=False)
    # What the model wrote whose training goes on is not what the longer one's writes.
    assert read_samples(run) is None
    # Here the power fails.
    assert find_run(longer, run.root.parent) == (run, False)


def test_a_record_that_was_cut_is_named_when_the_run_goes_on(
    run: RunDir, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run.metrics.read_bytes()
    run.metrics.write_bytes(whole + b'{"kind": "st')
    driver._open_run(make_job(), run, overwrite=False)
    assert run.metrics.read_bytes() == whole
    assert f"{run.metrics} ends in the middle of a record" in caplog.text


def test_checkpoints_of_an_unknown_job_are_not_taken_over(run: RunDir, make_job: MakeJob) -> None:
    run.job.unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints, but .*job.yaml is missing"):
        find_run(make_job(), run.root.parent)
    driver._open_run(make_job(), run, overwrite=True)
    assert not saved_steps(run)


def test_a_job_that_ends_before_the_checkpoint(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, run: RunDir
) -> None:
    job = make_job("train.max_steps=10", "model.config.n_positions=128")
    with pytest.raises(CheckpointError, match=r"has 24 steps, and the job ends after 10; raise train.max_steps"):
        fit(job, run.root)
    assert "max_steps: 24" in run.job.read_text()


def test_a_resume_with_another_schedule_says_so(
    run: RunDir, cluster: Cluster, prepared: Callable[[JobConfig], Path]
) -> None:
    saved, notes = read_saved_job(run.job), Notes()
    store = Store(prepared(saved))

    def check(max_steps: int) -> None:
        job = saved.model_copy(update={"train": saved.train.model_copy(update={"max_steps": max_steps})})
        driver._check(job, run, store, store.manifest(), cluster, notes, overwrite=False)

    check(24)
    assert notes.notes == []
    check(48)
    (said,) = notes.notes
    assert said.startswith("The learning rate goes on from step 24 with ")


def test_a_run_has_one_driver(fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path) -> None:
    with (
        Lease(tmp_path / "run").hold(timeout_s=0),
        pytest.raises(
            ConfigError,
            match=rf"the run .*run is being trained by another process \(process {os.getpid()} on .*\); wait for it",
        ),
    ):
        fit(make_job(), tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run").exists()


def test_a_driver_that_a_scheduler_restarts_waits_for_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLM_DIST_NODES", "2")
    before, ended, notes = contextlib.ExitStack(), threading.Event(), Notes()
    before.enter_context(Lease(tmp_path / "run").hold(timeout_s=0))

    def end() -> None:
        ended.set()
        before.close()

    threading.Timer(0.5, end).start()
    with driver._only_driver(RunDir(tmp_path / "run"), notes):
        assert ended.is_set()
    (note,) = notes.notes
    assert note.startswith(f"Waiting for another driver of the run: process {os.getpid()} on ")


def test_a_driver_does_not_wait_for_ever_for_the_one_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLM_DIST_NODES", "2")
    monkeypatch.setattr(driver, "_LEASE_TIMEOUT_S", 0.3)
    with (
        Lease(tmp_path / "run").hold(timeout_s=0),
        pytest.raises(NotReadyError, match=r"held by another driver \(process .*, 0.3 s .*, remove .*\.run\.lease$"),
        driver._only_driver(RunDir(tmp_path / "run"), Silent()),
    ):
        pass


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_blocks(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job(*TWO_WORKERS, "train.learning_rate=1e30", "train.max_grad_norm=null", "checkpoint.every=1")
    with pytest.raises(RunError, match=r"the loss of step 2 is nan; .* computed on blocks \d+, \d+"):
        fit(job, tmp_path / "run")
    result = read_json(tmp_path / "run" / "result.json")
    assert (result["status"], result["final"], result["restarts"]) == ("failed", None, 0)
    assert "of step" in result["error"]
    assert not (tmp_path / "run" / "final").exists()
    assert json.dumps(result, allow_nan=False)


def test_a_result_that_cannot_be_written_does_not_hide_why_the_run_failed(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RunError("the ranks disagree")

    def full(*_: Any) -> None:
        raise StorageError("no space left")

    monkeypatch.setattr(driver, "fit", fail)
    monkeypatch.setattr(driver, "write_json", full)
    with pytest.raises(RunError, match="the ranks disagree"):
        fit(make_job(), tmp_path / "run")


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_says_so_and_keeps_what_was_committed(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path
) -> None:
    job = make_job("train.max_steps=40", "train.epochs=9", "checkpoint.every=2", "train.max_failures=0")
    with mounted(tmp_path / "disk", "size=1200k") as disk:
        run = RunDir(disk / "run")
        with pytest.raises(
            StorageError, match=r"checkpoint of step \d+ could not be written: .*no space left .*, and neither"
        ):
            fit(job, run.root)
        (*_, name) = checkpoints_of(run).committed()
        (share,) = checkpoints_of(run).read(name).shares
        with checkpoints_of(run).reading(name, share) as path:
            assert load_file(path)


def test_logs_of_an_attempt_that_failed_are_gone_with_the_next(run: RunDir) -> None:
    run.ray_logs.mkdir()
    driver._open_run(read_saved_job(run.job), run, overwrite=False)
    assert not run.ray_logs.exists()


def test_checkpoints_that_the_job_looks_for_elsewhere_are_not_forgotten(run: RunDir, tmp_path: Path) -> None:
    job = read_saved_job(run.job)
    moved = job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"path": str(tmp_path / "new")})})
    with pytest.raises(ConfigError, match=r"checkpoints of the run .* lie in .*checkpoints, and the job has"):
        find_run(moved, run.root.parent, resume=True)
    assert find_run(moved, run.root.parent, overwrite=True) == (run, False)


def test_a_run_of_an_earlier_version_is_read(run: RunDir) -> None:
    text = run.job.read_text().replace("keep: 2", "keep: 1").replace("cluster:", "cluster:\n  max_restarts: 7")
    run.job.write_text(text)
    job = read_saved_job(run.job)
    assert (job.checkpoint.keep, job.train.max_failures) == (2, 3)
    assert find_run(job, run.root.parent) == (run, True)
