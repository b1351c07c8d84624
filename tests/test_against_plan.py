"""A run beside its plan: what is compared, what is not, and that no plan makes a report or a status fail."""

import json
import os
import time
from typing import Any

import pytest

from clm_dist.against_plan import ANY_GPU, Comparison, compare_with_plan, describe_time
from clm_dist.files.atomic import write_json
from clm_dist.files.lease import Lease
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.standing import Standing
from tests.support.leases import leased_elsewhere
from tests.support.plans import plan_of, plan_run

LOSS = {"value": 3.0, "low": 2.9, "high": 3.1}


def start(**values: Any) -> dict[str, Any]:
    record = {"kind": "start", "step": 0, "num_steps": 100, "time": 1_700_000_000.0, "startup": 20.0, "workers": 1}
    return record | {"device": "CPU"} | values


def step(number: int, seconds: float = 1.0, **values: Any) -> dict[str, Any]:
    figures = {"epoch": number / 50, "loss": 5.0, "tokens": 1000, "seconds": seconds, "data_wait": 0.0}
    return {"kind": "step", "step": number, **figures, **values}


def evaluation(number: int, loss: float = 3.05, kind: str = "eval") -> dict[str, Any]:
    return {"kind": kind, "step": number, "epoch": 0.0, "loss": loss, "seconds": 2.0}


WHOLE = [start(), evaluation(0), *map(step, range(1, 101)), evaluation(100), evaluation(100, kind="verify")]


@pytest.fixture
def begun(run: RunDir) -> RunDir:
    """A run that is not finished."""
    run.result.unlink()
    return run


def record(run: RunDir, *records: dict[str, Any], status: str | None = None) -> None:
    run.metrics.write_text("".join(json.dumps(one) + "\n" for one in records))
    if status:
        write_json(run.result, {"status": status})


def compared(run: RunDir) -> Comparison:
    found = compare_with_plan(run, Standing.of(read_records(run.metrics)))
    assert found is not None
    return found


def rows(run: RunDir) -> dict[str, tuple[str, str, str]]:
    return {row.name: (row.planned, row.came, row.difference) for row in compared(run).rows}


def test_a_run_without_a_plan_has_none(run: RunDir) -> None:
    assert compare_with_plan(run, Standing()) is None
    assert describe_time(run) is None


def test_every_figure_of_a_run_that_is_done_stands_beside_its_plan(begun: RunDir) -> None:
    record(begun, start(), *WHOLE[1:50], step(50, memory_bytes=2**30), *WHOLE[51:], status="done")
    plan_run(begun, price=3600.0, loss=LOSS, steps={"value": 100, "low": 95, "high": 105})
    assert rows(begun) == {
        # 20 s until the first step, 100 steps, three evaluations.
        "time": ("1 min 40 s (1 min 30 s to 2 min)", "2 min 6 s", "+26.0 %, outside the interval"),
        "tokens/s": ("1,000 (900 to 1,100)", "1,000", "inside the interval"),
        "memory of a worker": ("1 GiB (922 MiB to 1.1 GiB)", "1 GiB", "inside the interval"),
        "worker-hours": ("0.028 (0.025 to 0.033)", "0.035", "+26.0 %, outside the interval"),
        "cost": ("100.00 (90.00 to 120.00)", "126.00", "+26.0 %, outside the interval"),
        "steps": ("100 (95 to 105)", "100", "inside the interval"),
        "eval loss": ("3.0000 (2.9000 to 3.1000)", "3.0500", "+0.0500, inside the interval"),
    }


def test_the_loss_is_that_of_the_weights_that_are_kept(begun: RunDir) -> None:
    kept = {"kind": "final", "step": 100, "kept": 50, "stopped_early": False}
    record(begun, *WHOLE[:52], evaluation(50, 2.95), *WHOLE[52:-1], kept, WHOLE[-1], status="done")
    plan_run(begun, loss=LOSS)
    assert rows(begun)["eval loss"] == ("3.0000 (2.9000 to 3.1000)", "2.9500", "-0.0500, inside the interval")


def test_a_run_that_goes_on_is_judged_by_the_end_that_its_speed_leads_to(begun: RunDir) -> None:
    """Ten steps of a second, then fifty of two, which tell what is left: forty steps and three evaluations."""
    steps = [*map(step, range(1, 11)), *(step(number, 2.0) for number in range(11, 61))]
    record(begun, start(), evaluation(0), *steps)
    plan_run(begun, loss=LOSS, steps={"value": 100, "low": 100, "high": 100})
    so_far, left = 20 + 2 + 10 + 100, 40 * 2 + 3 * 2
    assert (so_far, left) == (132, 86)
    found = rows(begun)
    assert found["time"][1:] == (
        "2 min 12 s so far, 3 min 38 s at this speed",
        "+118.0 %, outside the interval",
    )
    assert found["worker-hours"][1] == "0.037 so far, 0.061 at this speed"
    assert found["steps"] == ("100", "100, 60 so far", "as planned")
    assert found["eval loss"] == ("3.0000 (2.9000 to 3.1000)", "3.0500 so far", "")
    # No process has the run, so nobody knows when it ends.
    assert compared(begun).notes == ("86 s of the run are left at this speed",)
    assert describe_time(begun) == (
        "planned 1 min 40 s (1 min 30 s to 2 min); at this speed 3 min 38 s, of which 86 s are left"
    )
    os.utime(begun.metrics, (1_700_000_000, 1_700_000_000))
    end = time.strftime("%Y-%m-%d %H:%M", time.localtime(1_700_000_086))
    with Lease(begun.root).hold(timeout_s=0):
        assert compared(begun).notes == (f"86 s of the run are left at this speed, which ends it about {end}",)
        assert str(describe_time(begun)).endswith("at this speed 3 min 38 s, done in 86 s")
    # A process on another host may have ended.
    with leased_elsewhere(begun.root):
        assert compared(begun).notes == ("86 s of the run are left at this speed",)
        assert str(describe_time(begun)).endswith("at this speed 3 min 38 s, of which 86 s are left")
        # A cluster knows.
        assert str(describe_time(begun, trains=True)).endswith("at this speed 3 min 38 s, done in 86 s")
    # What was preempted goes on some day.
    record(begun, start(), evaluation(0), *steps, status="preempted")
    assert compared(begun).notes == ("86 s of the run are left at this speed",)
    assert rows(begun) == found


def test_of_a_run_that_was_submitted_again_only_the_plan_counts_until_it_begins(begun: RunDir) -> None:
    record(begun, start(), *WHOLE[1:50], status="failed")
    plan_run(begun)
    os.utime(begun.job, (1_700_000_000, 1_700_000_000))
    planned = "planned 1 min 40 s (1 min 30 s to 2 min)"
    assert describe_time(begun, since=1_700_000_001.0) == planned
    assert str(describe_time(begun, since=1_700_000_000.0)).startswith(f"{planned}; at this speed ")


def test_a_run_that_is_done_says_how_long_it_took(begun: RunDir) -> None:
    record(begun, *WHOLE, status="done")
    plan_run(begun)
    assert describe_time(begun) == "planned 1 min 40 s (1 min 30 s to 2 min); took 2 min 6 s, outside the interval"


def test_before_its_first_step_a_run_has_only_what_was_planned(begun: RunDir) -> None:
    plan_run(begun, loss=LOSS)
    planned = "planned 1 min 40 s (1 min 30 s to 2 min)"
    record(begun)
    assert describe_time(begun) == planned
    assert (compared(begun).rows, compared(begun).notes) == ((), ("no worker of the run has begun to train",))
    for workers, said in ((2, "2 workers"), (1, "1 worker")):
        plan_run(begun, workers=workers, sizes=[plan_of(begun)["sizes"][0] | {"workers": 4}])
        assert describe_time(begun) == f"the plan is for 4 x CPU, and the job has {said}"
    plan_run(begun)
    record(begun, start())
    assert describe_time(begun) == planned
    assert rows(begun)["time"] == ("1 min 40 s (1 min 30 s to 2 min)", "20 s so far", "")
    # Also after a restart.
    record(begun, start(), *WHOLE[1:12], start(step=10, startup=5.0))
    assert rows(begun)["time"][1:] == ("37 s so far", "")
    assert rows(begun)["worker-hours"][1:] == ("0.01 so far", "")


def test_a_figure_that_is_planned_as_a_point_is_shown_beside_it_and_a_count_is_judged(begun: RunDir) -> None:
    size = plan_of(begun)["sizes"][0] | {"tokens_per_s": {"value": 1001.0, "low": 1001.0, "high": 1001.0}}
    record(begun, *WHOLE, status="done")
    plan_run(begun, sizes=[size], steps={"value": 200, "low": 200, "high": 200})
    assert rows(begun)["tokens/s"] == ("1,001", "1,000", "-0.1 %")
    assert rows(begun)["steps"] == ("200", "100", "-50.0 %, not as planned")


def test_an_early_stop_is_said(begun: RunDir) -> None:
    end = {"kind": "final", "step": 50, "kept": 50, "stopped_early": True}
    record(begun, *WHOLE[:52], end, evaluation(50, kind="verify"), status="done")
    plan_run(begun)
    why = "training stopped early, after step 50"
    assert compared(begun).notes == (why,)
    assert str(describe_time(begun)).endswith(f"; took 74 s, outside the interval; {why}")
    # With a later stop it goes on.
    record(begun, *WHOLE[:52], end, start(step=50), *WHOLE[52:], status="done")
    assert compared(begun).notes == ()


def test_records_without_times_of_an_earlier_version_are_not_compared_in_time(begun: RunDir) -> None:
    old = [{name: value for name, value in one.items() if name not in ("startup", "time")} for one in WHOLE]
    for one in old:
        if one["kind"] != "step":
            one.pop("seconds", None)
    plan_run(begun, price=1.0)
    why = (
        "time, hours and cost are not compared: an earlier version trained the run, and recorded no time of evaluations"
    )
    for records, status in ((old, "done"), (old[:50], None)):
        begun.result.unlink(missing_ok=True)
        record(begun, *records, status=status)
        assert list(rows(begun)) == ["tokens/s", "steps"]
        assert compared(begun).notes == (why,)
        assert describe_time(begun) == f"planned 1 min 40 s (1 min 30 s to 2 min); {why}"


@pytest.mark.parametrize(
    ("starts", "ran"),
    [
        ([start(workers=2)], "2 x CPU"),
        ([start(device="NVIDIA H200")], "1 x NVIDIA H200"),
        ([start(), start(workers=2)], "1 x CPU and 2 x CPU"),
    ],
)
def test_other_workers_and_devices_are_said_and_not_compared(
    begun: RunDir, starts: list[dict[str, Any]], ran: str
) -> None:
    record(begun, *starts, *WHOLE[1:], status="done")
    plan_run(begun, loss=LOSS, steps={"value": 100, "low": 100, "high": 100})
    why = f"the plan is for 1 x CPU, and the run was on {ran}: time and memory are not compared"
    assert compared(begun).notes == (why,)
    assert describe_time(begun) == why
    # What does not depend on them is compared.
    assert list(rows(begun)) == ["steps", "eval loss"]


def test_the_plan_for_the_number_of_workers_of_the_run_is_taken(begun: RunDir) -> None:
    (size,) = plan_of(begun)["sizes"]
    assert size["seconds"]
    other = size | {"workers": 2, "seconds": {"value": 500.0, "low": 400.0, "high": 600.0}}
    record(begun, start(workers=2, device="NVIDIA H100 80GB HBM3"), *WHOLE[1:], status="done")
    plan_run(begun, sizes=[size, other], device="h100-80")
    assert rows(begun)["time"][0] == "8 min 20 s (6 min 40 s to 10 min)"
    assert "GPU-hours" in rows(begun)
    assert " for 1 or 2 x h100-80; speed: " in compared(begun).about


def test_a_gpu_that_was_described_is_taken_to_be_that_of_the_run(begun: RunDir) -> None:
    plan_run(begun, device=ANY_GPU)
    record(begun, start(device="NVIDIA X1"), *WHOLE[1:], status="done")
    (note,) = compared(begun).notes
    assert note == "the plan is for a GPU that was described; whether the run's is the same is not known"
    assert "time" in rows(begun)
    record(begun, *WHOLE, status="done")
    assert "time" not in rows(begun)


def test_a_plan_of_another_job_is_shown_as_such(begun: RunDir) -> None:
    record(begun, *WHOLE, status="done")
    plan_run(begun, loss=LOSS)
    plan = plan_of(begun, loss=LOSS)
    for changes, said in (
        ({"train.max_steps": 7}, "train.max_steps differs"),
        ({"model.config": {}, "cluster.strategy": "zero2"}, "cluster.strategy, model.config differ"),
    ):
        plan_run(begun, job=plan["job"] | changes, loss=LOSS)
        why = f"the plan is of another job than the run, and is not compared with it: {said}"
        found = compared(begun)
        assert (found.rows, found.notes, found.loss, describe_time(begun)) == ((), (why,), None, why)
    # A later version has another field; neither the name nor the seed changes a plan.
    assert not {"name", "train.seed", "checkpoint.every"} & plan["job"].keys()
    plan_run(begun, job=plan["job"] | {"train.later": 1})
    assert "time" in rows(begun)


def test_a_plan_without_a_speed_says_so(begun: RunDir) -> None:
    record(begun, *WHOLE, status="done")
    size = plan_of(begun)["sizes"][0] | {"seconds": None, "tokens_per_s": None, "memory_bytes": None}
    plan_run(begun, sizes=[size], speed=None)
    why = "the plan has no time, because it was made without a speed; `clm-dist plan` says how to give one"
    assert (compared(begun).notes, describe_time(begun)) == ((why,), why)
    assert list(rows(begun)) == ["steps"]
    assert compared(begun).about.endswith(" by clm-dist 0.1.0 for 1 x CPU")


def test_a_plan_that_is_made_after_the_run_has_begun_says_so(begun: RunDir) -> None:
    record(begun, *WHOLE, status="done")
    plan_run(begun, made=1_700_000_001.0)
    assert compared(begun).notes == ("the plan was made after the run had begun",)


def test_a_job_that_this_version_does_not_read_is_not_compared(begun: RunDir) -> None:
    record(begun, *WHOLE, status="done")
    plan_run(begun)
    begun.job.write_text("of: another version\n")
    (why,) = compared(begun).notes
    assert why.startswith("the plan is not compared, because the job of the run cannot be read: ")
    assert describe_time(begun) == why
