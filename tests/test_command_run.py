"""`clm-dist run` as a user has it: in a process of its own, with a Ray that it starts and stops."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clm_dist.files.atomic import read_json
from clm_dist.files.result import Result, read_result
from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.support.command import clm_dist
from tests.support.processes import descendants, running
from tests.support.runs import metrics_of, saved_steps
from tests.support.training import losses_of

TIMEOUT_S = 300


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the command; what still runs at the end of the test is killed with all that it started."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "clm_dist", *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
            process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def wait_for_commit(process: subprocess.Popen[str], run: RunDir, after: int) -> None:
    """Until a checkpoint beyond a step is committed."""
    deadline = time.monotonic() + TIMEOUT_S
    while not any(step > after for step in saved_steps(run)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def last_commit(run: RunDir) -> int:
    return saved_steps(run)[-1]


def writes_runs(pid: int) -> bool:
    """Whether a process is a worker or Ray Train's controller."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"RayTrainWorker" in name or b"TrainController" in name


def seconds(clock: tuple[str, str]) -> int:
    return 60 * int(clock[0]) + int(clock[1])


@pytest.mark.slow
def test_quickstart_goes_from_nothing_to_a_perplexity(start: Start, tmp_path: Path) -> None:
    """The README's first command, apart from its installation."""
    process = start("run", "quickstart", "--runs", tmp_path, "--store", tmp_path / "store")
    deadline = time.monotonic() + TIMEOUT_S
    while not (tmp_path / "quickstart" / "metrics.jsonl").exists():  # which workers that train write
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started = descendants(process.pid)
    assert len(started) > 3
    code, out, err = finish(process)
    assert code == 0, err
    result = read_json(tmp_path / "quickstart" / "result.json")
    assert result["baseline"]["perplexity"] / result["final"]["perplexity"] > 20
    assert result["evals"][-1]["epoch"] == 8
    # A table, two samples, and lines for a log file instead of a moving display.
    assert "baseline" in out
    assert "The model's text after the prompt 'The':" in out
    whole, *parts = re.findall(r"(\d+):(\d\d)", out[out.index("time:   ") :])
    assert seconds(whole) == sum(map(seconds, parts))
    assert {"starting", "training"} <= set(re.findall(r"[(,] ?([a-z ]+) \d", out))
    # A fast machine is done with an epoch before a line within it is due; test_progress.py has such lines.
    assert re.search(r"^\d+-\d+-\d+ \d+:\d+:\d+ Training$", err, re.MULTILINE)
    assert "\x1b" not in out + err
    # Its Ray is gone with it.
    while running(started):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def long_job(write_job: WriteJob) -> Path:
    return write_job(
        "train.max_steps=400",
        "train.epochs=999",
        "checkpoint.every=20",
        "eval.every=100",
        "cluster.workers=2",
        "model.config.resid_pdrop=0.1",
    )


@pytest.mark.long
def test_the_same_command_goes_on_after_a_signal_and_after_a_kill(start: Start, long_job: Path, tmp_path: Path) -> None:
    def command(runs: Path) -> list[object]:
        return ["run", long_job, "--runs", runs, "--store", tmp_path / "store"]

    aside = start(*command(tmp_path / "untouched"))
    run = RunDir(tmp_path / "cut" / "tiny")

    # An announced end, as `timeout` and service managers tell it to a whole group: a checkpoint, and the exit code that
    # asks to be run again.
    process = start(*command(tmp_path / "cut"))
    wait_for_commit(process, run, after=0)
    os.killpg(process.pid, signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert "SIGTERM: saving a checkpoint, then stopping" in err
    assert "the same command goes on from it" in err
    result = read_json(run.result)
    assert (result["status"], result["final"]) == ("preempted", None)
    assert '<span class="badge preempted">' in run.report.read_text()
    stopped_at = result["train"]["steps"]
    assert stopped_at == last_commit(run)
    assert stopped_at < 400
    assert not run.stop.exists()

    # A kill of the driver, which takes its Ray and its workers with it.
    process = start(*command(tmp_path / "cut"))
    wait_for_commit(process, run, after=stopped_at)
    started = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    killed_at = last_commit(run)
    # Nothing that writes into the run may outlive it for long; Ray's own agents wait a minute for its return.
    deadline = time.monotonic() + 10
    while left := [pid for pid in running(started) if writes_runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.1)
    (run.checkpoints / "step-00000399-torn").mkdir()

    process = start(*command(tmp_path / "cut"))
    code, out, err = finish(process)
    assert code == 0, err
    assert f"Resuming from the checkpoint of step {last_start(run)}" in err
    assert last_start(run) >= killed_at
    assert not (run.checkpoints / "step-00000399-torn").exists()
    assert finish(aside)[0] == 0
    untouched = RunDir(tmp_path / "untouched" / "tiny")
    assert losses_of(run.root) == losses_of(untouched.root)
    weights = [directory.final / "model.safetensors" for directory in (run, untouched)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert read_json(run.result)["evals"] == read_json(untouched.result)["evals"]
    assert read_json(run.result)["restarts"] == 2
    assert "baseline" in out


def last_start(run: RunDir) -> int:
    steps: list[int] = [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "start"]
    return steps[-1]


def test_a_run_takes_the_directory_of_its_plan_and_ends_with_both(
    start: Start, write_job: WriteJob, tmp_path: Path, stores: Path
) -> None:
    """A run that is planned with the speed of a probe."""
    job = write_job()
    places = ("--runs", tmp_path / "the runs", "--store", stores)
    run = RunDir(tmp_path / "the runs" / "tiny")
    code, _, err = finish(start("plan", job, "--probe", "2", "--save", *places))
    assert code == 0, err
    code, out, err = finish(start("run", job, *places))
    assert code == 0, err
    for figure in ("time", "tokens/s", "memory of a worker", "worker-hours"):
        assert re.search(rf"^  {figure}  .* (in|out)side the interval", out, re.MULTILINE), figure
    assert re.search(r"^  steps +6 +6 +as planned", out, re.MULTILINE)
    assert "Beside the plan" in run.report.read_text()


def test_a_run_that_is_done_is_not_trained_again(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = clm_dist(capsys, monkeypatch, "run", run.job, "--runs", run.root.parent)
    assert (said.code, "is done; --overwrite starts it again" in said.err) == (0, True)
    assert "baseline" in said.out
    assert "has changed since" not in said.err


def test_a_run_ends_with_its_samples_and_where_the_time_went(
    run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("run", run.job, "--runs", run.root.parent)
    time_line = r"\ntime:   0:\d\d \(.*\)\n\Z"

    def train(*_: object, **__: object) -> Result:
        time.sleep(1)
        return read_result(run.root)

    with monkeypatch.context() as patched:
        patched.setattr("clm_dist.run.find_run", lambda *_, **__: (run, False))
        patched.setattr("clm_dist.run._train", train)
        trained_only = clm_dist(capsys, patched, "train", *command[1:])
        assert not run.samples.exists()
        trained = clm_dist(capsys, patched, *command)
    assert trained.code == 0
    assert re.search(r"\n  before training  The", trained.out)
    assert re.search(r"\n  after training   The", trained.out)
    assert re.search(time_line, trained.out)
    assert "after training" not in trained_only.out
    assert re.search(time_line, trained_only.out)
    # What is not done again takes no time, and what was written is shown.
    again = clm_dist(capsys, monkeypatch, *command)
    assert "is done; --overwrite starts it again" in again.err
    assert "  after training   The" in again.out
    assert "time:" not in again.out
    run.samples.unlink()
    assert "\nsample: clm-dist generate " in clm_dist(capsys, monkeypatch, *command).out
    assert not run.samples.exists()


def test_a_run_that_is_done_says_if_its_data_has_changed_since(
    run: RunDir, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    doubled = tmp_path / "corpus.jsonl"
    doubled.write_text(corpus.read_text() * 2)
    job = run.job.read_text()
    assert str(corpus) in job
    run.job.write_text(job.replace(str(corpus), str(doubled)))
    said = clm_dist(capsys, monkeypatch, "run", run.job, "--runs", run.root.parent, "--store", tmp_path / "stores")
    assert (said.code, "is done; --overwrite starts it again" in said.err) == (0, True)
    assert "The data or the tokenizer has changed since, or how clm-dist reads them: these are the figures" in said.err
    doubled.unlink()
    said = clm_dist(capsys, monkeypatch, "run", run.job, "--runs", run.root.parent, "--store", tmp_path / "stores")
    assert (said.code, "has changed since" in said.err) == (0, False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_training_is_a_reason_to_try_again(
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_job: WriteJob,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("clm_dist.run.run_job", lambda *_, **__: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    said = clm_dist(capsys, monkeypatch, "run", write_job(), "--runs", tmp_path)
    assert (said.code, said.err) == (75, f"stopped by {number.name}; the same command goes on with what is left\n")
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([], "stopped before the first checkpoint; the same command starts again\n"),
        (["step-7"], "stopped after step 7 with a checkpoint saved; the same command goes on from it\n"),
    ],
)
def test_a_checkpoint_is_said_to_be_saved_where_it_is(
    saved: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    write_job: WriteJob,
    tmp_path: Path,
) -> None:
    result = {"status": "preempted", "train": {"steps": 7}}
    monkeypatch.setattr("clm_dist.run.run_job", lambda *_, **__: result)
    monkeypatch.setattr("clm_dist.files.checkpoints.Checkpoints.committed", lambda _: saved)
    said = clm_dist(capsys, monkeypatch, "run", write_job(), "--runs", tmp_path)
    assert (said.code, said.err) == (75, words)


@pytest.mark.slow
def test_two_interrupts_end_a_run_at_once(start: Start, long_job: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "tiny")
    process = start("run", long_job, "--runs", tmp_path, "--store", tmp_path / "store")
    wait_for_commit(process, run, after=0)
    started = descendants(process.pid)
    process.send_signal(signal.SIGSTOP)  # so that the second comes before the first is done
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code in (75, 130), err
    assert "Ctrl-C again stops at once" in err
    assert "the same command goes on" in err
    deadline = time.monotonic() + 60
    while running(started):
        assert time.monotonic() < deadline
        time.sleep(0.2)
