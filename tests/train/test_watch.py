"""Who is named when no worker comes forward."""

import dataclasses
import json
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from clm_dist.train import heartbeat as watch
from clm_dist.train.heartbeat import Beat, Heart, Watch, read_beats
from tests.support.workers import run_workers

TIMEOUT_S = 10.0
FIRST = Beat(
    0, 100, "host", "node", 1, 1, False, 7, "pass 1 of 2", "gloo:all_reduce number 5", True, ("loop.py:1 train",)
)


class Story:
    """Beats that two workers write, second by second, and the watch that reads them."""

    def __init__(self, directory: Path, timeout_s: float | None = TIMEOUT_S) -> None:
        self.directory, self.now = directory, 0.0
        self.watch = Watch(directory, timeout_s, lambda: self.now)
        self.beats = {rank: dataclasses.replace(FIRST, rank=rank, pid=100 + rank) for rank in (0, 1)}

    def second(self, *, alive: tuple[int, ...] = (0, 1), forward: tuple[int, ...] = ()) -> str | None:
        """A second in which some workers give signs of life and some come forward; what the watch says then."""
        self.now += 1
        for rank in alive:
            beat = self.beats[rank]
            self.beats[rank] = dataclasses.replace(
                beat, count=beat.count + 1, progress=beat.progress + (rank in forward)
            )
            (self.directory / f"rank-{rank:05d}.json").write_text(json.dumps(asdict(self.beats[rank])))
        hang = self.watch.look()
        return None if hang is None else f"{[beat.rank for beat in hang.beats]} {hang.reason}"

    def until_named(self, **second: tuple[int, ...]) -> tuple[float, str]:
        began = self.now
        while (said := self.second(**second)) is None:
            assert self.now - began < 100
        return self.now - began, said


def test_a_worker_without_signs_of_life_is_named_in_time(tmp_path: Path) -> None:
    story = Story(tmp_path)
    for _ in range(30):
        assert story.second(forward=(0, 1)) is None
    took, said = story.until_named(alive=(0,))
    assert took < TIMEOUT_S
    assert said.startswith("[1] no progress within train.hang_timeout_s (10 s): worker 1 gives no sign of life")
    assert "worker 1 (pid 101 on host) at step 7, pass 1 of 2, waiting in gloo:all_reduce number 5, in loop.py" in said


def test_a_worker_that_is_somewhere_else_than_the_others_is_named(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.beats[0] = dataclasses.replace(FIRST, waiting=False, stack=("data.py:9 read",))
    _, said = story.until_named()
    assert said.startswith("[0] ")
    assert "worker 0 does not come forward" in said
    assert "last collective gloo:all_reduce number 5, in data.py:9 read" in said


def test_where_all_wait_all_are_told(tmp_path: Path) -> None:
    _, said = Story(tmp_path).until_named()
    assert said.startswith("[0, 1] ")
    assert "the network between them may be at fault" in said


def test_one_worker_that_comes_forward_is_enough(tmp_path: Path) -> None:
    story = Story(tmp_path)
    assert [story.second(forward=(1,)) for _ in range(60)] == [None] * 60


def test_no_workers_and_new_workers_are_no_hang(tmp_path: Path) -> None:
    story = Story(tmp_path)
    assert [story.second(alive=()) for _ in range(60)] == [None] * 60
    for pid in range(10):
        for rank in (0, 1):
            story.beats[rank] = dataclasses.replace(FIRST, rank=rank, pid=1000 + pid)
        assert [story.second() for _ in range(5)] == [None] * 5


def test_workers_that_start_have_more_time(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.beats = {rank: dataclasses.replace(beat, is_starting=True) for rank, beat in story.beats.items()}
    assert [story.second() for _ in range(90)] == [None] * 90


def test_a_hang_is_told_once(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.until_named()
    assert story.second() is None


def test_without_a_timeout_nobody_is_named(tmp_path: Path) -> None:
    story = Story(tmp_path, None)
    assert [story.second() for _ in range(60)] == [None] * 60
    assert story.watch.nodes() == {"node"}


def test_a_beat_that_is_half_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-00000.json").write_text('{"rank": 0')
    (tmp_path / "rank-00001.json").write_text(json.dumps(asdict(FIRST) | {"rank": 1}))
    assert [beat.rank for beat in read_beats(tmp_path)] == [1]


def wait_for_rank_1(rank: int, world_size: int, directory: Path) -> Beat:
    """Rank 0 is in a collective that rank 1 has not come to; gives the beat of that time."""
    heart = Heart(directory, rank, "node", 2.0)
    heart.at(3, "waiting")
    dist.barrier()
    if rank == 1:
        time.sleep(1.5)
        beat = next(beat for beat in read_beats(directory) if beat.rank == 0)
    dist.all_reduce(torch.ones(3))
    heart.stop()
    return beat if rank == 1 else FIRST


def test_a_beat_tells_the_collective_and_the_stack(tmp_path: Path) -> None:
    beat = run_workers(wait_for_rank_1, 2, tmp_path)[1]
    assert (beat.rank, beat.step, beat.doing, beat.node) == (0, 3, "waiting", "node")
    assert beat.waiting
    assert beat.collective
    assert beat.collective.startswith("gloo:all_reduce number ")
    assert any("test_watch.py" in call and call.endswith("wait_for_rank_1") for call in beat.stack)


def test_a_recorder_that_torch_has_changed_stops_no_beat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise KeyError("collective_seq_id")

    monkeypatch.setattr("clm_dist.train.heartbeat.last_collective", fail)
    heart = Heart(tmp_path, 0, "", 2.0)
    time.sleep(0.7)
    (beat,) = read_beats(tmp_path)
    heart.stop()
    assert beat.count > 1
    assert beat.collective is None


@pytest.mark.parametrize("timeout_s", [None, 1000.0])
def test_a_heart_stops_when_it_is_told(
    tmp_path: Path, timeout_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whose interval would keep it in its sleep for the rest of the tests.
    monkeypatch.setattr(watch, "_MOST_INTERVAL_S", 1e6)
    Heart(tmp_path / "new", 0, "", timeout_s).stop()
    assert not any(thread.name == "heart" for thread in threading.enumerate())
    assert not list((tmp_path / "new").iterdir())


def test_the_loop_is_named_however_deep_in_a_library_a_worker_stands() -> None:
    def layers(depth: int) -> tuple[str, ...]:
        return layers(depth - 1) if depth else watch._stack(threading.get_ident())

    scope: dict[str, Any] = {}
    code = "def train(inner):\n    return inner(20)"
    exec(compile(code, str(Path(watch.__file__).with_name("loop.py")), "exec"), scope)
    stack = scope["train"](layers)
    assert stack[0] == "loop.py:2 train"
    assert len(stack) == 1 + watch._SHOWN_FRAMES
    assert stack[-2].endswith(" layers")


def test_a_search_may_take_as_long_as_a_start(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, "", 10.0)
    try:
        heart.starts("trying passes of 4 blocks")
        assert _beat(tmp_path, "trying passes of 4 blocks").is_starting
        heart.at(1, "pass 1 of 2")
        assert not _beat(tmp_path, "pass 1 of 2").is_starting
    finally:
        heart.stop()


def _beat(directory: Path, doing: str) -> Beat:
    while True:
        for beat in read_beats(directory):
            if beat.doing == doing:
                return beat
        time.sleep(0.05)
