"""How much memory training takes."""

import mmap
import os
import time
from pathlib import Path

import pytest
import torch

from clm_dist.train import memory
from clm_dist.train.memory import Gauge, Peak, free_bytes


def test_a_process_on_cpus_has_what_it_holds_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_READ_INTERVAL_S", 0.0)
    gauge = Gauge(torch.device("cpu"))
    before = gauge.read()
    # Pages of its own: of the process's heap some may be free, and held already.
    with mmap.mmap(-1, 2**26) as held:
        for page in range(0, 2**26, mmap.PAGESIZE):
            held[page] = 1
        after = gauge.read()
    assert before and after
    assert after - before > 0.9 * 2**26
    assert after % os.sysconf("SC_PAGE_SIZE") == 0


def test_it_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 10.5, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    gauge = Gauge(torch.device("cpu"))
    assert [gauge.read() is None for _ in range(3)] == [False, True, False]


def test_a_gpu_has_the_most_that_tensors_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 if device.type == "cuda" else 0)
    assert Gauge(torch.device("cuda")).read() == 7


def test_the_most_is_that_since_the_last_reset() -> None:
    peak = Peak(torch.device("cpu"))
    with mmap.mmap(-1, 2**27) as held:
        for page in range(0, 2**27, mmap.PAGESIZE):
            held[page] = 1
    before = peak.read()
    peak.reset()
    after = peak.read()
    assert before and after
    # What the process had, and has no longer.
    assert before - after > 0.9 * 2**27


def test_what_is_free_is_shared_by_the_workers_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Gauge(torch.device("cpu")).read()
    free = []
    for workers in ("1", "4"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", workers)
        found = free_bytes(torch.device("cpu"))
        assert own and found
        free.append(found - own)
    # Others take and give memory meanwhile.
    assert free[0] / 4 == pytest.approx(free[1], rel=0.2)


def test_a_gpu_gives_what_is_free_and_what_it_has_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    assert free_bytes(torch.device("cuda")) == 50


def test_a_system_that_does_not_say_it_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATM", Path("/nowhere/statm"))
    monkeypatch.setattr(memory, "_STATUS", Path("/nowhere/status"))
    assert Gauge(torch.device("cpu")).read() is None
    assert Peak(torch.device("cpu")).read() is None
    assert free_bytes(torch.device("cpu")) is None
