"""A worker's place in the run, and what it sends."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clm_dist.files.run_dir import RunDir
from clm_dist.train.messages import Message

Report = Callable[[Message], None]
"""Send a message to the recorder. Collective."""


@dataclass(frozen=True)
class Session:
    """This worker's place in the run, and how it is heard."""

    rank: int
    world_size: int
    use_gpu: bool
    num_threads: int
    run: RunDir
    store: Path
    report: Report
    asked_to_stop: Callable[[], bool] = lambda: False
    """Whether this worker was told to save a checkpoint and end. Not collective."""
    node: str = ""
    """Id of Ray's node, if Ray runs."""
