"""A run's own Ray starts while the job is checked."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm_dist.config.job import ClusterConfig
from clm_dist.errors import ConfigError, NotReadyError
from clm_dist.signals import handling
from clm_dist.train.ray import cluster
from clm_dist.train.ray.cluster import Cluster, starting_ray


class Start:
    """A start of Ray that goes on until it is let go, and what became of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()
        self.said: list[str] = []
        self.error: Exception | None = None
        monkeypatch.setattr(cluster, "start_ray", self._start)
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)

    @contextlib.contextmanager
    def _start(self, config: ClusterConfig, logs: Path | None) -> Iterator[Cluster]:
        self.begun.set()
        assert self.may_go_on.wait(10)
        if self.error:
            raise self.error
        self.said.append("started")
        try:
            yield Cluster(0)
        except Exception as error:
            self.said.append(f"ended by {error}")
            raise
        self.said.append("ended")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    return Start(monkeypatch)


def test_ray_starts_while_the_job_is_checked(start: Start) -> None:
    with starting_ray(ClusterConfig()) as started:
        assert start.begun.wait(10)
        assert start.said == []
        start.may_go_on.set()
        assert started() == Cluster(0)
        assert start.said == ["started"]
    assert start.said == ["started", "ended"]


def test_a_wrong_job_is_said_and_the_ray_that_was_starting_ends(start: Start) -> None:
    with pytest.raises(ConfigError, match="wrong"), starting_ray(ClusterConfig()):
        threading.Timer(0.2, start.may_go_on.set).start()
        raise ConfigError("wrong")
    # Not of the error: the logs of an earlier run that failed would make way for those of this start.
    assert start.said == ["started", "ended"]
    with pytest.raises(ConfigError, match="wrong"), starting_ray(ClusterConfig()) as started:
        started()
        raise ConfigError("wrong")
    assert start.said[2:] == ["started", "ended by wrong"]


def test_interrupts_lose_nothing_that_has_begun(start: Start) -> None:
    """The start goes on in a thread, and what it made must be removed, however often Ctrl-C is pressed."""

    main = threading.main_thread().ident
    assert main

    def interrupt() -> None:
        for _ in range(3):
            time.sleep(0.1)
            signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        start.may_go_on.set()

    interrupting = threading.Thread(target=interrupt)
    with handling((signal.SIGINT,), signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt), starting_ray(ClusterConfig()):
            interrupting.start()
            time.sleep(10)
        interrupting.join()
    assert start.said == ["started", "ended"]


def test_of_a_wrong_job_and_a_ray_that_does_not_start_the_job_is_said(start: Start) -> None:
    start.error = NotReadyError("no Ray")
    start.may_go_on.set()
    with pytest.raises(ConfigError, match="wrong"), starting_ray(ClusterConfig()):
        raise ConfigError("wrong")
    with pytest.raises(NotReadyError, match="no Ray"), starting_ray(ClusterConfig()) as started:
        started()


def test_a_ray_of_others_is_joined_when_the_job_is_right(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes may take minutes to come, and what is wrong with the job must not wait for them."""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    start.may_go_on.set()
    with pytest.raises(ConfigError, match="wrong"), starting_ray(ClusterConfig()):
        raise ConfigError("wrong")
    assert not start.begun.is_set()
    with starting_ray(ClusterConfig()) as started:
        assert not start.begun.is_set()
        assert started() == Cluster(0)
    assert start.said == ["started", "ended"]


def test_many_workers_are_asked_less_often() -> None:
    """Ray's controller asks each of them, and one process makes a few thousand calls a second."""
    assert [cluster.poll_interval_s(number) for number in (1, 8, 200)] == [0.2, 0.2, 0.2]
    assert 1024 / cluster.poll_interval_s(1024) == pytest.approx(1000)
