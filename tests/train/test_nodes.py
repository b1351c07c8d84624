"""What the driver does about nodes, without any."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.errors import NotReadyError, RunError
from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray import nodes
from clm_dist.train.ray.cluster import Cluster
from clm_dist.train.ray.nodes import NodeWatch
from clm_dist.train.ray.own import RayEndedError
from clm_dist.train.ray.watch import WorkerWatch
from tests.conftest import MakeJob
from tests.support.notes import Notes

TWO_WORKERS = ("cluster.workers=2", "batch.micro_size=4")
ELASTIC = ("cluster.workers=[1,2]", "batch.micro_size=4")
OWN, OTHER = "a" * 56, "b" * 56


class Fakes:
    """A cluster that a test sets up, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive = {OWN: {"CPU": 1.0}, OTHER: {"CPU": 1.0}}
        self.draining: dict[str, int] = {}
        self.told = 0
        self.now = 1000.0
        monkeypatch.setattr(nodes, "alive_nodes", lambda: dict(self.alive))
        monkeypatch.setattr(nodes, "draining_nodes", lambda: dict(self.draining))
        monkeypatch.setattr(nodes, "this_node", lambda: OWN)
        self.held: str | None = None
        monkeypatch.setattr(nodes, "describe_holders", lambda cluster, gpus_each: self.held)
        monkeypatch.setattr(nodes, "tell_of_other_nodes", self._tell)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "time", lambda: self.now)

    def _tell(self) -> None:
        self.told += 1


class Driver:
    """A watch, what it said, and its files."""

    def __init__(self, fakes: Fakes, watch: NodeWatch, run: RunDir, notes: Notes) -> None:
        self.fakes, self.watch, self.run, self.notes = fakes, watch, run, notes

    def look(self, *used: str, after_s: float = 1) -> None:
        self.fakes.now += after_s
        self.watch.look(set(used))

    def asked(self) -> list[str]:
        """What was asked of the workers since the last time."""
        files = [file for file in (self.run.save, self.run.stop) if file.exists()]
        for file in files:
            file.unlink()
        return [file.name for file in files]


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch, make_job: MakeJob, tmp_path: Path) -> Callable[..., Driver]:
    def start(*settings: str) -> Driver:
        fakes, run, notes = Fakes(monkeypatch), RunDir(tmp_path / "run"), Notes()
        run.root.mkdir()
        return Driver(fakes, NodeWatch(make_job(*settings), run, Cluster(0), notes), run, notes)

    return start


def test_a_drained_node_stops_fixed_workers_once(drive: Callable[..., Driver]) -> None:
    driver = drive(*TWO_WORKERS)
    driver.look(OWN)
    driver.fakes.draining = {OTHER: int((driver.fakes.now + 120) * 1000)}
    # Nothing of the run lies there.
    driver.look(OWN)
    assert (driver.asked(), driver.notes.notes) == ([], [])
    for _ in range(130):
        driver.look(OWN, OTHER)
    assert driver.asked() == [driver.run.stop.name]
    assert driver.notes.notes == ["Ray drains the node bbbbbbbb (preempted?): saving a checkpoint, then stopping"]


@pytest.mark.parametrize(("grace_s", "seconds"), [(120, [1, 105]), (10, [1]), (None, [1])])
def test_elastic_workers_save_at_once_and_before_the_node_is_taken_away(
    grace_s: float | None, seconds: list[int], drive: Callable[..., Driver]
) -> None:
    driver = drive(*ELASTIC)
    driver.fakes.draining = {OTHER: 0 if grace_s is None else int((driver.fakes.now + grace_s) * 1000)}
    saves = []
    for second in range(1, 130):
        driver.look(OWN, OTHER)
        if driver.asked() == [driver.run.save.name]:
            saves.append(second)
    assert saves == seconds
    (note,) = driver.notes.notes
    assert "saving a checkpoint, going on with the other nodes" in note


def test_elastic_workers_stop_when_the_drivers_own_node_is_drained(drive: Callable[..., Driver]) -> None:
    driver = drive(*ELASTIC)
    driver.fakes.draining = {OWN: 0}
    driver.look(OTHER)
    assert driver.asked() == [driver.run.stop.name]


def test_a_run_says_what_it_waits_for_and_for_how_long(drive: Callable[..., Driver]) -> None:
    driver = drive(*TWO_WORKERS, "train.start_timeout_s=60")
    driver.look(OWN, OTHER, after_s=500)
    del driver.fakes.alive[OTHER]
    # It trains still, as far as beats tell.
    driver.look(OWN, OTHER)
    assert driver.notes.notes == ["The node bbbbbbbb is gone, and the workers on it"]
    for _ in range(60):
        driver.look()
    assert driver.notes.notes[1:] == [
        "Waiting for nodes: cluster.workers 2 x 1 CPU need 2, the Ray cluster has 1, for 60 s at most "
        "(train.start_timeout_s)"
    ]
    with pytest.raises(RunError, match=r"no worker began to train within train.start_timeout_s \(60 s\): .* has 1\. "):
        driver.look()
    driver.fakes.alive[OTHER] = {"CPU": 1.0}
    with pytest.raises(RunError, match=r"\(60 s\): the resources of the Ray cluster may be in use"):
        driver.look()


def test_under_a_scheduler_another_attempt_may_get_the_nodes(
    drive: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLM_DIST_NODES", "2")
    driver = drive(*TWO_WORKERS, "train.start_timeout_s=60")
    del driver.fakes.alive[OTHER]
    with pytest.raises(NotReadyError, match=r"no worker began to train within train.start_timeout_s \(60 s\)"):
        driver.look(after_s=61)


def test_a_node_that_comes_back_is_enough(drive: Callable[..., Driver]) -> None:
    driver = drive(*TWO_WORKERS, "train.start_timeout_s=60")
    driver.fakes.alive[OTHER] = {"CPU": 0.0}
    for _ in range(5):
        driver.look(after_s=55)
        driver.look(OWN)
    assert len(driver.notes.notes) == 5
    # A node that is given up is none to wait with.
    driver.fakes.alive[OTHER] = {"CPU": 1.0}
    driver.look()
    assert len(driver.notes.notes) == 5
    driver.fakes.draining = {OTHER: 0}
    driver.look()
    assert len(driver.notes.notes) == 6
    assert driver.fakes.told == 0


def test_elastic_workers_wait_for_the_fewest_alone_and_tell_ray_train_of_nodes(drive: Callable[..., Driver]) -> None:
    driver = drive(*ELASTIC)
    driver.look(OWN, OTHER)
    del driver.fakes.alive[OTHER]
    driver.look()
    assert (driver.notes.notes, driver.fakes.told) == (["The node bbbbbbbb is gone, and the workers on it"], 1)
    driver.fakes.alive[OTHER] = {"CPU": 1.0}
    driver.look()
    assert driver.fakes.told == 2


def test_who_holds_the_resources_is_said_soon_and_when_it_changes(drive: Callable[..., Driver]) -> None:
    driver = drive(*TWO_WORKERS, "train.start_timeout_s=60")
    # For a moment, as in every start.
    driver.fakes.held = "2 needed, 0 free, held by a"
    for _ in range(6):
        driver.look()
    driver.fakes.held = None
    for _ in range(6):
        driver.look()
    assert driver.notes.notes == []
    for held in ("2 needed, 0 free, held by a", "2 needed, 1 free, held by b"):
        driver.fakes.held = held
        for _ in range(12):
            driver.look()
    most = ", for 60 s at most (train.start_timeout_s)"
    waits = [f"Waiting for resources: 2 needed, {held}{most}" for held in ("0 free, held by a", "1 free, held by b")]
    assert driver.notes.notes == waits
    with pytest.raises(NotReadyError, match=r"start_timeout_s \(60 s\): 2 needed, 1 free, held by b\. ") as ended:
        driver.look(after_s=60)
    assert ended.value.exit_code == 75
    # Workers that have their place and load their model wait for nobody.
    driver.fakes.held = None
    for _ in range(2):
        with pytest.raises((NotReadyError, RunError)):
            driver.look(after_s=6)
    with pytest.raises(RunError, match="may be in use"):
        driver.look(after_s=61)


def test_a_ray_that_does_not_say_who_holds_what_does_not_prolong_the_wait(
    drive: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    driver = drive(*TWO_WORKERS, "train.start_timeout_s=60")
    monkeypatch.setattr(nodes, "describe_holders", fail)
    with pytest.raises(RunError, match="may be in use"):
        driver.look(after_s=61)


def test_a_ray_whose_process_is_gone_ends_the_run(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Fakes(monkeypatch)
    watch = WorkerWatch(make_job(), RunDir(tmp_path), Cluster(0), Notes())
    watch.look()
    monkeypatch.setattr("clm_dist.train.ray.watch.lost_process", lambda: "raylet")
    with pytest.raises(RayEndedError, match=r"its process raylet is gone"):
        watch.look()
