"""What a rank sends; every rank sends equally many messages."""

from typing import Literal, TypedDict

from clm_dist.files.markers import TrainerState
from clm_dist.files.records import Record
from clm_dist.train.checkpointing.saver import Saved


class EvalMessage(TypedDict):
    """A rank's share of an evaluation."""

    kind: Literal["eval", "verify"]
    """`eval`, or `verify` for the evaluation of the written model."""
    step: int
    epoch: float
    micros: list[tuple[int, float, int, int]]


class Message(TypedDict, total=False):
    """What a rank sends; every rank sends equally many."""

    host: str
    """The host that the rank runs on."""
    records: list[Record]
    evaluation: EvalMessage
    saved: Saved
    """How this rank's part of a save ended."""
    state: TrainerState
    """Of the checkpoint in `saved`; rank 0's message has it."""
