"""What a plan keeps of itself for its run."""

from dataclasses import replace
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.files.plan_file import Interval, PlanFile, read_plan, write_plan
from clm_dist.files.run_dir import RunDir
from clm_dist.plan.counts import Count, Counts
from clm_dist.plan.loss import Estimate, ExpectedLoss
from clm_dist.plan.loss_of_runs import LossOfRuns
from clm_dist.plan.plan import OUTSIDE_S, make_plan
from clm_dist.plan.saved import plan_file
from clm_dist.plan.speed import Speed
from clm_dist.plan.target import MeasuredSpeed, Target
from tests.plan.test_plan import H100, _counts, _gpt2, _job

JOB = _job(cluster={"workers": 8})
SPEED = Speed(9_000, 11_000, "measured", start_s=20.0, memory_bytes=5e9)


def _saved(
    target: Target,
    *,
    speed: Speed | None = None,
    counts: Counts | None = None,
    loss: LossOfRuns | None = None,
    name: str = "CPU",
    workers: int = 8,
    job: JobConfig = JOB,
) -> PlanFile:
    plan = make_plan(job, _gpt2(), counts or _counts(), target, speed=speed, loss=loss)
    measured = MeasuredSpeed(speed, target.device, target.is_gpu, name, workers, workers, ()) if speed else None
    return plan_file(job, plan, target, measured)


def test_figures_are_those_of_the_plan_as_a_run_records_them() -> None:
    target = Target(H100, 8, (1, 2), 12.5e9, price=2.0)
    plan = make_plan(JOB, _gpt2(), _counts(), target)
    saved = _saved(target)
    assert [size["workers"] for size in saved["sizes"]] == [8, 16]
    for size, scale in zip(saved["sizes"], plan.scales, strict=True):
        assert size["seconds"] and size["tokens_per_s"] and size["memory_bytes"]
        low, high = scale.seconds
        assert low < scale.middle_s < high
        ends = {"value": scale.middle_s, "low": max(OUTSIDE_S, low - 10), "high": high + 28}
        assert size["seconds"] == pytest.approx({name: seconds - OUTSIDE_S for name, seconds in ends.items()})
        assert scale.speeds[0] < scale.tokens_per_s < scale.speeds[1]
        assert list(size["tokens_per_s"].values()) == [scale.tokens_per_s, *scale.speeds]
        # Tensors alone, without CUDA's own memory.
        assert size["memory_bytes"]["value"] == scale.memory.total - 2**30
    assert (saved["device"], saved["price"], saved["workers"], saved["evaluations"]) == ("h100-80", 2.0, 8, 5)
    assert saved["speed"] and saved["speed"].startswith("10 to 20 % of the peak")
    assert saved["plan"]["steps"] == saved["steps"]["value"] == 120


def test_a_start_that_was_measured_widens_the_time_less() -> None:
    target = Target(None, 8, (1,), 12.5e9)
    assumed, measured = (
        _saved(target, speed=replace(SPEED, start_s=start_s))["sizes"][0]["seconds"] for start_s in (None, 20.0)
    )
    assert assumed and measured
    # A start of 25 s is assumed, and 20 s are measured besides 12 s around them.
    assert assumed["value"] - measured["value"] == pytest.approx(25 - 32)
    assert (assumed["high"] - 28) - (measured["high"] - 5) == pytest.approx(25 - 32)
    assert (assumed["low"] + 10) - (measured["low"] + 5) == pytest.approx(25 - 32)


def test_on_a_cpu_memory_is_what_was_measured_on_as_many_workers() -> None:
    target = Target(None, 8, (1,), 12.5e9)
    (same,), (other,), (unknown,) = (
        _saved(target, speed=speed, workers=workers)["sizes"]
        for speed, workers in ((SPEED, 8), (SPEED, 4), (replace(SPEED, memory_bytes=None), 8))
    )
    assert same["memory_bytes"] == pytest.approx({"value": 5e9, "low": 4.5e9, "high": 5.5e9})
    assert other["memory_bytes"] is unknown["memory_bytes"] is None


def test_with_another_optimizer_memory_is_what_was_measured() -> None:
    target, job = Target(H100, 8, (1,), 12.5e9), _job(cluster={"workers": 8}, train={"optimizer": "lion"})
    assert [size["memory_bytes"] for size in _saved(target, job=job)["sizes"]] == [None]
    without_speed = _saved(replace(target, device=None, is_other_gpu=True), job=job)["sizes"]
    assert [size["memory_bytes"] for size in without_speed] == [None]
    (measured,) = _saved(target, job=job, speed=SPEED)["sizes"]
    assert measured["memory_bytes"] and measured["memory_bytes"]["value"] == 5e9


@pytest.mark.parametrize(
    ("target", "speed", "device"),
    [
        (Target(None, 8, (1,), 1e9), None, "CPU"),
        (Target(None, 8, (1,), 1e9), SPEED, "NVIDIA X1"),
        (Target(replace(H100, name="this GPU"), 8, (1,), 1e9), None, "this GPU"),
    ],
)
def test_a_plan_names_its_device(target: Target, speed: Speed | None, device: str) -> None:
    assert _saved(target, speed=speed, name=device)["device"] == device


def test_without_a_speed_memory_and_steps_stay() -> None:
    saved = _saved(Target(None, 8, (1, 2), 1e9))
    assert saved["sizes"] == [{"workers": 8, "seconds": None, "tokens_per_s": None, "memory_bytes": None}]
    assert (saved["speed"], saved["steps"]["value"]) == (None, 120)


def test_an_estimated_number_of_blocks_is_an_interval_of_the_steps() -> None:
    counts = replace(_counts(), train=Count(10_000, 9_000, 12_000))
    # 256 blocks a step, three epochs.
    assert _saved(Target(None, 8, (1,), 1e9), counts=counts)["steps"] == {"value": 120, "low": 108, "high": 141}


def test_a_time_is_that_of_the_fewest_and_of_the_most_steps() -> None:
    """Of the same speed, the ends are those of plans of as many blocks as the ends of the interval of the count."""
    target, job = Target(None, 8, (1,), 1e9), _job(cluster={"workers": 8}, eval={"every": 10_000})

    def seconds(train: Count) -> Interval:
        (size,) = _saved(target, speed=SPEED, counts=replace(_counts(), train=train), job=job)["sizes"]
        assert size["seconds"]
        return size["seconds"]

    fewest, known, most = (seconds(Count(number, number, number)) for number in (9_000, 10_000, 12_000))
    estimated = seconds(Count(10_000, 9_000, 12_000))
    assert estimated["value"] == known["value"]
    assert estimated["low"] < known["low"]
    assert known["high"] < estimated["high"]
    # Three evaluations are counted with the steps, though their number does not grow with them here.
    assert estimated["low"] == pytest.approx(fewest["low"], rel=0.02)
    assert estimated["high"] == pytest.approx(most["high"], rel=0.02)


def test_the_expected_loss_is_kept(tmp_path: Path) -> None:
    one = Estimate(4.2, 4.1, 4.3)
    loss = LossOfRuns(ExpectedLoss(one, one, one, one, 1.0), (), one, 1.0, 100.0, False)
    saved = _saved(Target(None, 8, (1,), 1e9), loss=loss)
    assert saved["loss"] == {"value": 4.2, "low": 4.1, "high": 4.3}
    assert _saved(Target(None, 8, (1,), 1e9), loss=replace(loss, expected=None))["loss"] is None
    run = RunDir(tmp_path / "run")
    write_plan(run, saved)
    read = read_plan(run)
    assert isinstance(read, dict)
    assert {name: read[name] for name in read if name != "plan"} == {n: saved[n] for n in saved if n != "plan"}  # type: ignore[literal-required]
