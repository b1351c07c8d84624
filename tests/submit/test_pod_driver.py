"""The driver in a pod: when it runs again, ends, and gives way."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.load import load_job
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.in_pod import driver as pod_driver
from clm_dist.submit.in_pod.pod import RAY_SETTINGS, Pod
from clm_dist.submit.training import Training
from tests.conftest import ROOT, WriteJob
from tests.submit.test_pod_submitter import wait_until
from tests.support.processes import running
from tests.support.ray_head import Head


def test_how_far_training_is_stands_in_the_log_while_it_goes_on(tmp_path: Path) -> None:
    step = '{"kind": "step", "step": %d, "loss": %s, "seconds": 2.0}'
    put = f"put() {{ printf '{step}\\n' $1 $2 >>$run/metrics.jsonl; }}"
    wrapper = drive(
        tmp_path, f"{put}; {_START}; put 1 5.5; while [ ! -e {tmp_path}/go ]; do sleep 0.1; done; put 2 NaN"
    )
    wait_until(lambda: Training.of_lines(log_of(tmp_path).splitlines()) == Training(1, 9, 5.5, 16.0))
    (tmp_path / "go").touch()
    wrapper.communicate(timeout=30)
    last = Training.of_lines(log_of(tmp_path).splitlines())
    assert last
    assert (last.step, last.num_steps, str(last.loss), last.seconds_left) == (2, 9, "nan", 14.0)


def a_pod(directory: Path, number: str) -> Pod:
    return Pod("pod-1", "127.0.0.1", directory / "state", 60, number)


_DRIVE = """
import sys
from pathlib import Path
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.in_pod import driver as pod_driver
from clm_dist.submit.in_pod.pod import Pod
pod_driver._POLL_S = pod_driver._PAUSE_S = pod_driver._TELL_S = 0.1
pod_driver._MOST_IDLE = 3
state, number, script, run = Path(sys.argv[1]), sys.argv[2], sys.argv[3], RunDir(Path(sys.argv[4]))
pod = Pod("pod-1", "127.0.0.1", state, 60, number)
sys.exit(pod_driver.PodDriver(pod, run, ["bash", "-c", script], gives_up=sys.argv[5] == "True").run())
"""


_SAVE = """echo '{"kind": "checkpoint", "step": '$(wc -l <$run/metrics.jsonl)', "name": "x"}' >>$run/metrics.jsonl"""
_START = """echo '{"kind": "start", "step": 0, "num_steps": 9}' >>$run/metrics.jsonl"""


def drive(directory: Path, script: str, number: str = "1", *, gives_up: bool = True) -> "subprocess.Popen[str]":
    """The wrapper around a script, in a process of its own, because it takes signals; `$run` is the run's directory."""
    run = directory / "run"
    run.mkdir(exist_ok=True)
    script = f"run={run}; {script}"
    command = [sys.executable, "-c", _DRIVE, str(directory / "state"), number, script, str(run), str(gives_up)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def log_of(directory: Path, number: str = "1") -> str:
    path = directory / "state" / f"log-{number}"
    return path.read_text() if path.exists() else ""


def test_a_run_that_saved_because_another_pod_ends_goes_on(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"echo out; echo err >&2; echo x >>{count}; {_START}; {_SAVE}; [ $(wc -l <{count}) -eq 6 ] || exit 75"
    wrapper = drive(tmp_path, script)
    said, _ = wrapper.communicate(timeout=30)
    assert wrapper.returncode == 0
    log = log_of(tmp_path)
    # Ray's own log of the job has it, too.
    assert said == log
    assert [line for line in log.splitlines() if line in ("out", "err")] == ["out", "err"] * 6
    assert log.count("the driver has ended with 75") == 5
    assert Training.of_lines(log.splitlines()) == Training(0, 9)


@pytest.mark.parametrize(("script", "code"), [("exit 1", 1), ("exit 2", 2), ("kill -9 $$", 137)])
def test_what_is_no_wish_to_go_on_ends_the_attempt(tmp_path: Path, script: str, code: int) -> None:
    wrapper = drive(tmp_path, script)
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == code


def test_a_pod_that_ends_tells_the_run_which_does_not_go_on_here(tmp_path: Path) -> None:
    wrapper = drive(tmp_path, "trap 'echo saved; exit 75' TERM; echo begun; while :; do sleep 0.1; done")
    wait_until(lambda: "begun" in log_of(tmp_path))
    wrapper.send_signal(signal.SIGTERM)
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 75
    assert "saved" in log_of(tmp_path)
    assert "goes on" not in log_of(tmp_path)


def test_an_attempt_gives_way_to_a_later_one(tmp_path: Path) -> None:
    wrapper = drive(tmp_path, "echo $$; exec sleep 60")
    attempt = tmp_path / "state" / "attempt"
    wait_until(lambda: len(log_of(tmp_path).splitlines()) == 2)
    pid = int(log_of(tmp_path).splitlines()[-1])
    # A file that is being written is nobody's.
    first = attempt.read_text()
    attempt.write_text("")
    time.sleep(0.5)
    assert wrapper.poll() is None
    attempt.write_text(first)
    attempt.write_text("pod-2.5\n")
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 1
    assert running([pid]) == []
    assert "the attempt pod-2.5 has begun" in (tmp_path / "state" / "nodes" / "pod-1.log").read_text()


def test_what_was_told_to_end_saves_though_a_later_attempt_has_begun(tmp_path: Path) -> None:
    wrapper = drive(tmp_path, "trap 'sleep 1; echo saved; exit 75' TERM; echo begun; while :; do sleep 0.1; done")
    wait_until(lambda: "begun" in log_of(tmp_path))
    wrapper.send_signal(signal.SIGTERM)
    (tmp_path / "state" / "attempt").write_text("pod-2.5\n")
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 75
    assert "saved" in log_of(tmp_path)


def test_rays_job_is_kept_for_the_head_that_replaces_this_one(
    tmp_path: Path, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_driver, "JOB_DIR", str(write_job(name="job.yaml").parent))
    monkeypatch.setattr(Pod, "this", lambda: a_pod(tmp_path, "1"))
    monkeypatch.setenv("CLM_DIST_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(pod_driver.PodDriver, "run", lambda *_: 75)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for told, kept in ((False, []), (True, [60])):
        monkeypatch.setattr(pod_driver.PodDriver, "told", told)
        waits.clear()
        assert pod_driver.main(["--ray-job=job-1"]) == 75
        assert waits == kept
    # In a plain job the pod ends, and is replaced.
    waits.clear()
    assert pod_driver.main([]) == 75
    assert waits == []


def test_a_full_disk_ends_no_run(tmp_path: Path) -> None:
    wrapper = drive(tmp_path, "echo said")
    (tmp_path / "state").mkdir(exist_ok=True)
    (tmp_path / "state" / "log-1").symlink_to("/dev/full")
    said, _ = wrapper.communicate(timeout=30)
    assert wrapper.returncode == 0
    assert "said" in said


def test_pods_in_which_no_worker_begins_are_given_up_in_the_end(tmp_path: Path) -> None:
    count = tmp_path / "count"
    wrapper = drive(tmp_path, f"echo x >>{count}; [ $(wc -l <{count}) -gt 2 ] || {_START}; exit 75")
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 1
    assert len(count.read_text().split()) == 5
    assert "no worker has begun to train 3 times in a row" in log_of(tmp_path)


@pytest.mark.parametrize("gives_up", [True, False])
def test_a_run_that_starts_and_saves_nothing_further_is_given_up(tmp_path: Path, gives_up: bool) -> None:
    count = tmp_path / "count"
    wrapper = drive(tmp_path, f"echo x >>{count}; {_START}; exit 75", gives_up=gives_up)
    wrapper.communicate(timeout=60)
    assert wrapper.returncode == 1
    assert len(count.read_text().split()) == 5
    assert "workers have begun 5 times and saved nothing further" in log_of(tmp_path)


def test_a_plain_job_waits_for_its_pods_as_long_as_it_takes(tmp_path: Path) -> None:
    count = tmp_path / "count"
    wrapper = drive(tmp_path, f"echo x >>{count}; [ $(wc -l <{count}) -gt 6 ] || exit 75", gives_up=False)
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 0


@pytest.mark.parametrize("when", ["while it starts", "in the pause"])
def test_a_signal_at_any_time_asks_to_go_on_elsewhere(tmp_path: Path, when: str) -> None:
    # What a process that has no handler yet ends with.
    script = "echo begun; sleep 30" if when == "while it starts" else f"{_START}; exit 75"
    wrapper = drive(tmp_path, script)
    wait_until(lambda: ("begun" if when == "while it starts" else "it goes on here") in log_of(tmp_path))
    wrapper.send_signal(signal.SIGTERM)
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 75


def test_what_a_person_must_mend_is_not_tried_again_though_it_has_trained(tmp_path: Path) -> None:
    wrapper = drive(tmp_path, f"{_START}; exit 2")
    wrapper.communicate(timeout=30)
    assert wrapper.returncode == 2


def test_every_submission_has_a_log_of_its_own(tmp_path: Path) -> None:
    for number, script in (("1", "echo one"), ("1", "echo two"), ("2", "echo three")):
        drive(tmp_path, script, number).communicate(timeout=30)
    assert "three" in log_of(tmp_path, "2")
    assert "two" not in log_of(tmp_path, "2")
    assert log_of(tmp_path).index("one") < log_of(tmp_path).index("two")


def test_a_run_is_overwritten_once_for_a_submission(
    tmp_path: Path, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    job_file = write_job()
    job = load_job(job_file).config
    run = RunDir(tmp_path / "runs" / job.name)
    for number, left in (("1", False), ("1", True), ("2", False)):
        run.root.mkdir(parents=True, exist_ok=True)
        run.job.write_text(job_file.read_text())
        pod_driver.PodDriver(a_pod(tmp_path, number), run, ["true"], gives_up=True).run(job)
        assert run.exists() is left


def test_a_fault_of_the_job_file_stops_rays_job_which_is_not_tried_again(
    tmp_path: Path, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_driver, "DASHBOARD_PORT", int(head.url.rpartition(":")[2]))
    monkeypatch.setattr(pod_driver, "JOB_DIR", str(tmp_path / "absent"))
    monkeypatch.setattr(Pod, "this", lambda: Pod("pod-1", "127.0.0.1", tmp_path / "state", 0.1, "1"))
    signals: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda *which: signals.append(which))
    assert pod_driver.main(["--ray-job=job-1"]) == 2
    assert head.stopped == ["job-1"]
    # By which it ends, and lets go of its pods.
    assert signals[-1] == (signal.SIGTERM, signal.SIG_DFL)
    assert "absent/job.yaml" in (tmp_path / "state" / "nodes" / "pod-1.log").read_text()


def test_a_lost_host_is_given_up_as_soon_as_on_slurm() -> None:
    assert RAY_SETTINGS["RAY_health_check_period_ms"] == "2000"
