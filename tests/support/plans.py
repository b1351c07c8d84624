"""Plans of runs, as tests change them."""

from typing import Any

from clm_dist.config.differences import computed_values
from clm_dist.config.load import read_saved_job
from clm_dist.files.plan_file import PlanFile, write_plan
from clm_dist.files.run_dir import RunDir


def plan_of(run: RunDir, **changes: Any) -> PlanFile:
    """A plan of a run's job for one worker on a CPU."""
    size = {
        "workers": 1,
        "seconds": {"value": 100.0, "low": 90.0, "high": 120.0},
        "tokens_per_s": {"value": 1000.0, "low": 900.0, "high": 1100.0},
        "memory_bytes": {"value": 2.0**30, "low": 0.9 * 2**30, "high": 1.1 * 2**30},
    }
    values: Any = {
        "format": 1,
        "made": 1_600_000_000.0,
        "version": "0.1.0",
        "job": computed_values(read_saved_job(run.job)),
        "device": "CPU",
        "workers": 1,
        "price": None,
        "steps": {"value": 24, "low": 24, "high": 24},
        "evaluations": 4,
        "sizes": [size],
        "speed": "measured here in 9 steps on 1 x CPU",
        "loss": None,
        "plan": {},
    }
    return values | changes  # type: ignore[no-any-return]


def plan_run(run: RunDir, **changes: Any) -> None:
    """Write the plan of a run."""
    write_plan(run, plan_of(run, **changes))
