"""The types of a run's records: the lines of metrics.jsonl, one JSON object each.

A record is a dictionary as it stands in its line, so what is read is what was written. `kind` says which type it has,
and type checkers narrow a `Record` by it. `step` is the number of steps that were trained by then.
"""

from typing import Literal, NotRequired, TypedDict

from clm_dist.metrics import EvalFigures


class StartRecord(TypedDict):
    """Workers begin to train, for the first time or again."""

    kind: Literal["start"]
    step: int
    num_steps: int
    """Steps of the whole run."""
    time: float
    """Seconds since the epoch."""
    pid: int
    """Process of rank 0."""
    workers: int
    strategy: str
    device: str
    owes_evaluation: bool
    """Whether this step is still to be evaluated: the run was stopped while it was."""
    micro_size: NotRequired[int]
    """Blocks of a pass."""
    compiled: NotRequired[bool]
    """Whether passes are compiled."""
    note: NotRequired[str | None]
    """What is to be said of that, and of how the blocks of a pass were found."""
    hosts: NotRequired[list[str]]
    """Host of each rank."""
    startup: NotRequired[float]
    """Seconds in which nothing was trained before it: since the driver began, or since the last word of the workers
    before."""
    lost: NotRequired[float]
    """Seconds of the steps and evaluations that are made again; missing where there are none."""


class StepRecord(TypedDict):
    """An optimizer step."""

    kind: Literal["step"]
    step: int
    epoch: float
    loss: float
    """Mean over the predicted tokens of the global batch, nats."""
    router_loss: NotRequired[float]
    """What a mixture of experts adds to that for its router, with `output_router_logits`; `loss` is without it."""
    lr: float
    grad_norm: float | None
    """2-norm before clipping; None where it is not finite, as fp16 may have it."""
    tokens: int
    seconds: float
    tokens_per_s: float
    mfu: float | None
    data_wait: float
    """Seconds of the step in which rank 0 waited for blocks."""
    blocks: int
    """Checksum of the blocks and their tokens."""
    memory_bytes: NotRequired[int]
    """Memory of rank 0, see `train.memory.Gauge`; about once a second."""


class EvalRecord(EvalFigures):
    """An evaluation of the eval split; `verify` is that of the written model."""

    kind: Literal["eval", "verify"]
    seconds: NotRequired[float]
    """That it took, by the clock of rank 0."""


class PhaseRecord(TypedDict):
    """The phase that begins now, for the display."""

    kind: Literal["phase"]
    step: int
    phase: str
    time: NotRequired[float]
    """Seconds since the epoch."""


class CheckpointRecord(TypedDict):
    """A checkpoint that was committed, or could not be."""

    kind: Literal["checkpoint"]
    step: int
    name: str
    error: NotRequired[str]
    """Why it is not committed."""
    bytes: NotRequired[int]
    seconds: NotRequired[float]
    """From the begin of the save until the last file was on its storage."""
    blocked: NotRequired[float]
    """Seconds of it in which training waited."""


class DamagedRecord(TypedDict):
    """A checkpoint that was passed over because it is not as it was written."""

    kind: Literal["damaged"]
    step: int
    error: str


class FailureRecord(TypedDict):
    """Workers died, and are started again."""

    kind: Literal["failure"]
    step: int
    worker: int
    """The first that failed; -1 for Ray's controller."""
    error: str
    time: float


class OutlierRecord(TypedDict):
    """A step whose loss or gradient is not finite, or whose loss stands out."""

    kind: Literal["nonfinite", "spike"]
    step: int
    loss: float | str
    """A string where it is not finite: JSON has no such number."""
    grad_norm: float | str
    blocks: list[int]
    """The first of the step's blocks, the worst first."""
    action: str
    """The action that was taken: the value of `train.on_nan` or `train.on_spike`."""
    limit: NotRequired[float]
    """The loss above which it stands out."""


class RollbackRecord(TypedDict):
    """The run went back to the weights of the step `to`, and skipped the steps up to `step`."""

    kind: Literal["rollback"]
    step: int
    to: int


class ExportRecord(TypedDict):
    """A model that was written before the end of the run."""

    kind: Literal["export"]
    step: int
    epoch: float
    path: str


class FinalRecord(TypedDict):
    """Training has ended, and the model is written."""

    kind: Literal["final"]
    step: int
    kept: int
    """Step of the weights that are written."""
    stopped_early: bool
    """Whether training ended after `train.stop_after` evaluations without a lower loss."""


Record = (
    StartRecord
    | StepRecord
    | EvalRecord
    | PhaseRecord
    | CheckpointRecord
    | DamagedRecord
    | FailureRecord
    | OutlierRecord
    | RollbackRecord
    | ExportRecord
    | FinalRecord
)
