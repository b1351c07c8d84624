"""A run beside its plan: what was planned, what came, and whether that is inside the interval of the plan.

No plan makes a report or a status fail: what cannot be compared is said in a line.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from clm_dist.config.differences import computed_values
from clm_dist.config.load import read_saved_job
from clm_dist.devices import device_of
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.atomic import read_json
from clm_dist.files.lease import holder_of
from clm_dist.files.plan_file import Interval, PlanFile, PlannedSize, read_plan
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.files.standing import Standing
from clm_dist.quantities import show_amount, show_bytes, show_number, show_range, show_time

_MOST_FIELDS = 4
ANY_GPU = "this GPU"
"""Device of a plan for a GPU that is described by its memory and its peak."""


@dataclass(frozen=True)
class Row:
    """A figure that was planned, as text."""

    name: str
    planned: str
    came: str
    difference: str


@dataclass(frozen=True)
class Comparison:
    """A run beside its plan, as text."""

    about: str
    """When and for what the plan was made; empty where it cannot be read."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    loss: Interval | None
    """The eval loss to expect; None where the plan has none, or is of another job."""


def compare_with_plan(run: RunDir, standing: Standing) -> Comparison | None:
    """A run beside its plan; None where it has none."""
    try:
        plan = read_plan(run)
        if plan is None or isinstance(plan, str):
            return None if plan is None else Comparison("", (), (plan,), None)
        return _compare(plan, run, standing)
    except Exception as error:  # whatever a file has that somebody edited
        return Comparison("", (), (_not_compared(run, error),), None)


def describe_time(run: RunDir, *, trains: bool | None = None, since: float = 0.0) -> str | None:
    """The time that was planned for a run beside the time that it takes, in a line; None where it has no plan.

    Args:
        trains: whether it trains now; None asks its lease, which tells only of a process on this host.
        since: when it was submitted, seconds since the epoch; what an earlier start left is not compared.
    """
    try:
        plan = read_plan(run)
        if plan is None or isinstance(plan, str):
            return plan
        # A driver writes the job when it begins, and removes the result of an earlier one.
        if not run.exists() or run.job.stat().st_mtime < since:
            return _planned(_size_of_job(plan))
        return _describe_time(plan, run, _trains(run) if trains is None else trains)
    except Exception as error:  # like above
        return _not_compared(run, error)


def why_of_another_job(run: RunDir) -> str | None:
    """Why the plan of a run that has begun is not compared with it; None where it is one of its job."""
    plan = read_plan(run)
    return plan if plan is None or isinstance(plan, str) else _of_another_job(plan, run)


def _not_compared(run: RunDir, error: Exception) -> str:
    return f"{run.plan} cannot be compared: {first_line(error)}"


def _describe_time(plan: PlanFile, run: RunDir, trains: bool) -> str:
    standing = Standing.of(read_records(run.metrics))
    if why := _of_another_job(plan, run):
        return why
    size = _size(plan, standing) if standing.machines else _size_of_job(plan)
    said = _planned(size)
    if isinstance(size, str) or (planned := size["seconds"]) is None:
        return said
    if not standing.spent.is_whole:
        return f"{said}; {_NOT_WHOLE}"
    if _status(run) == "done":
        came = _joined(show_time(standing.seconds), _verdict(planned, standing.seconds))
        return "; ".join(filter(None, (said, f"took {came}", _early_stop(standing))))
    left = standing.seconds_left(plan["evaluations"])
    if left is None:
        return said
    end = f"done in {show_time(left)}" if trains else f"of which {show_time(left)} are left"
    return f"{said}; at this speed {show_time(standing.seconds + left)}, {end}"


def _planned(size: PlannedSize | str) -> str:
    """The time that is planned, in words."""
    if isinstance(size, str):
        return size
    return _NO_TIME if size["seconds"] is None else f"planned {_show(size['seconds'], show_time)}"


def _compare(plan: PlanFile, run: RunDir, standing: Standing) -> Comparison:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(plan["made"]))
    about = f"Made {when} by clm-dist {plan['version']} for {_devices(plan)}"
    if plan["speed"]:
        about += f"; speed: {plan['speed']}"
    if why := _of_another_job(plan, run):
        return Comparison(about, (), (why,), None)
    status = _status(run)
    size = _size(plan, standing)
    rows = list(_rows(plan, size, standing, is_done=status == "done"))
    return Comparison(about, tuple(rows), tuple(_notes(plan, size, run, standing, status)), plan["loss"])


def _rows(plan: PlanFile, size: PlannedSize | str, standing: Standing, *, is_done: bool) -> Iterator[Row]:
    if not isinstance(size, str):
        yield from _rows_of_size(plan, size, standing, is_done=is_done)
    if steps := standing.step if is_done else standing.num_steps:
        came = f"{steps:,}" if is_done else f"{steps:,}, {standing.step:,} so far"
        yield _row("steps", plan["steps"], lambda value: f"{value:,.0f}", steps, came, is_count=True)
    if (loss := plan["loss"]) is not None and (last := standing.last_eval) is not None:
        planned, came = _show(loss, lambda value: f"{value:.4f}"), f"{last:.4f}{'' if is_done else ' so far'}"
        difference = _joined(f"{last - loss['value']:+.4f}", _verdict(loss, last)) if is_done else ""
        yield Row("eval loss", planned, came, difference)


def _rows_of_size(plan: PlanFile, size: PlannedSize, standing: Standing, *, is_done: bool) -> Iterator[Row]:
    left = 0.0 if is_done else standing.seconds_left(plan["evaluations"])
    seconds = size["seconds"]

    def row(name: str, each: float, show: Callable[[float], str]) -> Row:
        """A figure that grows with the time."""
        assert seconds
        planned: Interval = {
            "value": seconds["value"] * each,
            "low": seconds["low"] * each,
            "high": seconds["high"] * each,
        }
        so_far = f"{show(standing.seconds * each)} so far" if standing.seconds else "-"
        if left is None:
            return Row(name, _show(planned, show), so_far, "")
        total = (standing.seconds + left) * each
        return _row(name, planned, show, total, show(total) if is_done else f"{so_far}, {show(total)} at this speed")

    if not standing.spent.is_whole:
        seconds = None
    if seconds is not None:
        yield row("time", 1, show_time)
    if (speed := size["tokens_per_s"]) is not None and standing.step_seconds:
        came = standing.tokens / standing.step_seconds
        yield _row("tokens/s", speed, show_number, came, show_number(came))
    if (memory := size["memory_bytes"]) is not None and standing.peak_memory:
        came = standing.peak_memory
        yield _row("memory of a worker", memory, show_bytes, came, show_bytes(came))
    if seconds is not None:
        hours = size["workers"] / 3600
        yield row("worker-hours" if plan["device"] == "CPU" else "GPU-hours", hours, show_amount)
        if plan["price"] is not None:
            yield row("cost", hours * plan["price"], show_amount)


def _notes(
    plan: PlanFile, size: PlannedSize | str, run: RunDir, standing: Standing, status: str | None
) -> Iterator[str]:
    if isinstance(size, str):
        yield size
    elif size["seconds"] is None:
        yield _NO_TIME
    elif not standing.spent.is_whole:
        yield _NOT_WHOLE
    if early_stop := _early_stop(standing):
        yield early_stop
    if plan["device"] == ANY_GPU and not isinstance(size, str):
        yield "the plan is for a GPU that was described; whether the run's is the same is not known"
    if standing.began is not None and plan["made"] > standing.began:
        yield "the plan was made after the run had begun"
    left = standing.seconds_left(plan["evaluations"])
    if status != "done" and left is not None and standing.spent.is_whole:
        # The clock of the run is that of its last record.
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.metrics.stat().st_mtime + left))
        until = f", which ends it about {end}" if _trains(run) else ""
        yield f"{show_time(left)} of the run are left at this speed{until}"


_NO_TIME = "the plan has no time, because it was made without a speed; `clm-dist plan` says how to give one"
_NOT_WHOLE = (
    "time, hours and cost are not compared: an earlier version trained the run, and recorded no time of evaluations"
)


def _early_stop(standing: Standing) -> str:
    return f"training stopped early, after step {standing.step:,}" if standing.stopped_early else ""


def _of_another_job(plan: PlanFile, run: RunDir) -> str | None:
    """Why a plan is not one of the run's job; None where it is, or where there is no run yet."""
    if not run.exists():
        return None
    try:
        values = computed_values(read_saved_job(run.job))
    except ConfigError as error:  # of another version
        return f"the plan is not compared, because the job of the run cannot be read: {first_line(error)}"
    # A field that only one of them has is of another version.
    different = sorted(name for name in values.keys() & plan["job"].keys() if values[name] != plan["job"][name])
    if not different:
        return None
    shown = ", ".join(different[:_MOST_FIELDS]) + (", ..." if len(different) > _MOST_FIELDS else "")
    differs = f"{shown} differ{'s' if len(different) == 1 else ''}"
    return f"the plan is of another job than the run, and is not compared with it: {differs}"


def _size(plan: PlanFile, standing: Standing) -> PlannedSize | str:
    """What is planned for the workers of a run, or why nothing is."""
    machines = sorted(standing.machines)
    if not machines:
        return "no worker of the run has begun to train"
    (workers, device), *others = machines
    ran = " and ".join(f"{number} x {name}" for number, name in machines)
    if not others and _is_device(plan["device"], device):
        for size in plan["sizes"]:
            if size["workers"] == workers:
                return size
    return f"the plan is for {_devices(plan)}, and the run was on {ran}: time and memory are not compared"


def _size_of_job(plan: PlanFile) -> PlannedSize | str:
    """What is planned for a run that has not begun."""
    sizes: Sequence[PlannedSize] = plan["sizes"]
    found = next((size for size in sizes if size["workers"] == plan["workers"]), None)
    workers = f"{plan['workers']} worker{'s' if plan['workers'] != 1 else ''}"
    return found or f"the plan is for {_devices(plan)}, and the job has {workers}"


def _is_device(planned: str, driver_name: str) -> bool:
    if planned == ANY_GPU:
        return driver_name != "CPU"
    known = device_of(driver_name)
    return planned in (driver_name, known and known.name)


def _devices(plan: PlanFile) -> str:
    numbers = [str(size["workers"]) for size in plan["sizes"]]
    return f"{' or '.join(filter(None, [', '.join(numbers[:-1]), numbers[-1]]))} x {plan['device']}"


def _status(run: RunDir) -> str | None:
    """How a run ended; None where it has not."""
    return str(read_json(run.result).get("status")) if run.result.is_file() else None


def _trains(run: RunDir) -> bool:
    """Whether a process of this host trains the run."""
    held = holder_of(run.root)
    return held is not None and held.holder.runs() is True


def _row(
    name: str, planned: Interval, show: Callable[[float], str], value: float, came: str, *, is_count: bool = False
) -> Row:
    is_equal = value == planned["value"] or not planned["value"]
    difference = "" if is_equal else f"{(value / planned['value'] - 1) * 100:+.1f} %"
    return Row(name, _show(planned, show), came, _joined(difference, _verdict(planned, value, is_count=is_count)))


def _verdict(planned: Interval, value: float, *, is_count: bool = False) -> str:
    """Whether a figure is inside the interval of its plan, in words.

    Of an interval that is a point only a count is judged, because no measured figure is equal to another.
    """
    if planned["low"] == planned["high"]:
        return ("as planned" if value == planned["value"] else "not as planned") if is_count else ""
    return f"{'inside' if planned['low'] <= value <= planned['high'] else 'outside'} the interval"


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _show(planned: Interval, show: Callable[[float], str]) -> str:
    value, ends = show(planned["value"]), show_range(planned["low"], planned["high"], show)
    return value if value == ends else f"{value} ({ends})"
