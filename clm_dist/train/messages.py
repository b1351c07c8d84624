"""The messages of ranks to the recorder."""

from typing import Literal, NotRequired, TypedDict

from clm_dist.files.markers import TrainerState
from clm_dist.files.record_types import Record
from clm_dist.train.checkpointing.saver import Saved


class EvalMessage(TypedDict):
    """The micro-batches of an evaluation that a rank ran."""

    kind: Literal["eval", "verify"]
    """`eval`, or `verify` for the evaluation of the written model."""
    step: int
    epoch: float
    micros: list[tuple[int, float, int, int]]
    seconds: NotRequired[float]
    """That the evaluation took on this rank."""


class Message(TypedDict, total=False):
    """A message of a rank; every rank sends equally many."""

    host: str
    """The host that the rank runs on."""
    records: list[Record]
    evaluation: EvalMessage
    saved: Saved
    """How this rank's file of a save ended."""
    state: TrainerState
    """State of the checkpoint in `saved`; only rank 0's message has it."""
