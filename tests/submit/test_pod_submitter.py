"""The submitter pod against a fake job server of Ray: what it submits, prints, and gives up on."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clm_dist.errors import SubmitError
from clm_dist.submit.in_pod import submitter as ray_submitter
from clm_dist.submit.in_pod.ray_jobs import RayJobs
from clm_dist.submit.logs import LogFile
from tests.support.ray_head import TOKEN, Head

DRIVER = ("python", "-m", "driver", "a b")


def following(jobs: RayJobs, log: Path, **options: Any) -> tuple[threading.Thread, list[int]]:
    codes: list[int] = []
    file = LogFile(log)
    thread = threading.Thread(
        target=lambda: codes.append(ray_submitter.follow(jobs, "job-1", DRIVER, file, **options)), daemon=True
    )
    thread.start()
    return thread, codes


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_driver_is_submitted_once_and_followed_to_its_end(
    head: Head, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    log.write_text("an earlier attempt\n")
    thread, codes = following(RayJobs(head.url, TOKEN), log)
    wait_until(lambda: head.jobs)
    assert head.jobs["job-1"]["entrypoint"] == "python -m driver 'a b' --ray-job=job-1"
    with log.open("a") as file:
        file.write("step 1\n")
    head.jobs["job-1"] |= {"status": "FAILED", "message": "exit code 1"}
    thread.join(20)
    assert codes == [0]
    said = capsys.readouterr().out
    assert said.index("an earlier attempt") < said.index("step 1") < said.index("has ended: FAILED; exit code 1")
    assert said.count("submitted the driver") == 1


def test_a_head_that_comes_back_empty_gets_the_job_again(head: Head, tmp_path: Path) -> None:
    thread, codes = following(RayJobs(head.url, TOKEN), tmp_path / "log")
    wait_until(lambda: head.jobs)
    head.jobs.clear()
    wait_until(lambda: head.jobs)
    head.jobs["job-1"]["status"] = "SUCCEEDED"
    thread.join(20)
    assert codes == [0]


class Clock:
    """The submitter's clock, which goes on where it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.at: dict[float, Callable[[], None]] = {}
        """What happens while it sleeps, and when."""
        monkeypatch.setattr(ray_submitter, "_POLL_S", 1.0)
        monkeypatch.setattr(ray_submitter, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.at.get(self.now, lambda: None)()


def test_a_submitter_waits_for_its_head_and_gives_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    nobody = RayJobs("http://127.0.0.1:9", TOKEN)
    assert ray_submitter.follow(nobody, "job-1", DRIVER, LogFile(tmp_path / "log"), patience_s=10) == 1
    assert clock.now == 11


def test_patience_begins_with_the_last_answer(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    clock.at[15] = head.close
    jobs = RayJobs(head.url, TOKEN)
    assert ray_submitter.follow(jobs, "job-1", DRIVER, LogFile(tmp_path / "log"), patience_s=10) == 1
    # The last answer came at 14.
    assert clock.now == 25


def test_a_refusal_of_the_head_says_what_it_said(head: Head) -> None:
    with pytest.raises(SubmitError, match=r"401.*who are you"):
        RayJobs(head.url, "another").info("job-1")
    with pytest.raises(SubmitError, match="Connection refused"):
        RayJobs("http://127.0.0.1:9").info("job-1")
