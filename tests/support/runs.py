"""What tests look at in a run's checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.records import read_records
from clm_dist.files.run_dir import RunDir


def checkpoints_of(run: RunDir) -> Checkpoints:
    return Checkpoints(str(run.checkpoints.absolute()))


def saved_steps(run: RunDir) -> list[int]:
    """Steps of the committed checkpoints."""
    return [int(name.split("-")[1]) for name in checkpoints_of(run).committed()]


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, as tests compare them with what they expect."""
    return cast(list[dict[str, Any]], list(read_records(path)))


def evals_of(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a metrics file, without the time that each took."""
    evals = [record for record in metrics_of(path) if record["kind"] == "eval"]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in evals]


class RunView:
    """A run as its files show it, also while it is trained."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def records(self, kind: str) -> list[dict[str, Any]]:
        return [record for record in metrics_of(self.run.metrics) if record["kind"] == kind]

    def last_step(self) -> int:
        """The last step that is on disk."""
        return max((record["step"] for record in self.records("step")), default=0)

    def starts(self) -> list[tuple[int, int]]:
        """After which step, and with how many workers."""
        return [(record["step"], record["workers"]) for record in self.records("start")]

    def has_step_of_start(self, number: int) -> bool:
        """Whether a step is finished since the workers started for the so many-th time."""
        starts = self.starts()
        return len(starts) >= number and self.last_step() > starts[number - 1][0]

    def weights(self) -> bytes:
        return (self.run.final / "model.safetensors").read_bytes()


@dataclass(frozen=True)
class Comparison:
    """A run held against one that nobody touched."""

    same_weights: bool
    same_blocks: bool
    """Every step once, in order, and computed from the same blocks."""
    loss_deviation: float
    """The largest of a step, relative."""


def compare(one: RunView, other: RunView) -> Comparison:
    steps, others = one.records("step"), other.records("step")
    pairs = list(zip(steps, others, strict=False))
    return Comparison(
        same_weights=one.weights() == other.weights(),
        same_blocks=[(s["step"], s["blocks"]) for s in steps] == [(s["step"], s["blocks"]) for s in others],
        loss_deviation=max(abs(a["loss"] / b["loss"] - 1) for a, b in pairs),
    )
