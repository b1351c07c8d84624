"""What tests look at in a run's checkpoints."""

from clm_dist.checkpoints import Checkpoints
from clm_dist.run_dir import RunDir


def checkpoints_of(run: RunDir) -> Checkpoints:
    return Checkpoints(str(run.checkpoints.absolute()))


def saved_steps(run: RunDir) -> list[int]:
    """Steps of the committed checkpoints."""
    return [int(name.split("-")[1]) for name in checkpoints_of(run).committed()]
