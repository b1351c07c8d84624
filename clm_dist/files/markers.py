"""The marker of a committed checkpoint, and whether a job can go on from it; no torch."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError

FORMAT_VERSION = 2


@dataclass(frozen=True)
class RankFile:
    """The file that one rank wrote of a checkpoint."""

    file: str
    num_bytes: int
    sha256: str
    fragments: Mapping[str, tuple[int, int]]
    """For each parameter, the first element in the file and the one after the last; parameters are flat."""


@dataclass(frozen=True)
class BestEval:
    """The evaluation with the lowest loss since the first step was trained; of equal ones the first."""

    step: int
    loss: float
    """Nats a token."""
    num_since: int = 0
    """Evaluations after it."""
    last: int = 0
    """Step of the last evaluation."""

    @staticmethod
    def with_next(best: "BestEval | None", step: int, loss: float) -> "BestEval":
        """The best after one more evaluation, at `step`."""
        if best is None or loss < best.loss:
            return BestEval(step, loss, last=step)
        return replace(best, num_since=best.num_since + 1, last=step)


@dataclass(frozen=True)
class TrainerState:
    """The state of a run at a checkpoint, without its weights and optimizer, which are beside it."""

    step: int
    num_updates: int
    """Updates that the optimizer made; fewer than steps where steps were skipped."""
    world_size: int
    strategy: str
    fingerprint: str
    """Fingerprint of the blocks that it was trained on."""
    global_size: int
    seed: int
    """With the batch size it says which blocks the next step takes."""
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shape of every parameter and buffer of the model."""
    scaler: Mapping[str, float] = field(default_factory=dict)
    """State of the loss scaler, in fp16."""
    recent_losses: tuple[float, ...] = ()
    """Losses of the last steps, with which the next loss is compared."""
    num_left_out: int = 0
    """Steps without an update in a row, the last among them."""
    owes_evaluation: bool = False
    """Whether the run was stopped before it had evaluated at this step, as it should."""
    compiled: bool = False
    """Whether passes were compiled, which rounds otherwise."""
    best: BestEval | None = None
    """The best evaluation until then; None before the first."""
    optimizer: str = "adamw"
    """`train.optimizer`, whose state is beside it."""


@dataclass(frozen=True)
class Marker:
    """The content of a committed checkpoint's marker."""

    state: TrainerState
    shares: tuple[RankFile, ...]
    eval_loss: float | None = None
    """Nats a token, where the eval split was evaluated at this step."""
    time: float = 0.0
    """Time of the commit, seconds since the epoch."""
    format_version: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        return sum(share.num_bytes for share in self.shares)


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; the one before it may be."""


def checkpoint_name(step: int) -> str:
    """A name that was never used, because a killed save may have left files of this step behind."""
    return f"step-{step:08d}-{secrets.token_hex(4)}"


def best_of(markers: Mapping[str, Marker]) -> str | None:
    """The checkpoint with the lowest eval loss since the first step was trained, the first of equal ones; None where
    none was evaluated."""
    trained = {name: marker for name, marker in markers.items() if marker.state.step > 0}
    losses = {name: marker.eval_loss for name, marker in trained.items() if marker.eval_loss is not None}
    return min(sorted(losses), key=lambda name: losses[name], default=None)


def checkpoint_of(best: BestEval, markers: Mapping[str, Marker]) -> str | None:
    """The checkpoint with the weights of the best evaluation; None where there is none."""
    found = (
        name for name, marker in markers.items() if (marker.state.step, marker.eval_loss) == (best.step, best.loss)
    )
    return next(found, None)


def check_parameters(state: TrainerState, where: str, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError where a checkpoint is of another model.

    Args:
        parameters: shape of every parameter and buffer of the job's model.
    """
    saved = state.parameters
    others = [name for name in saved.keys() | parameters.keys() if saved.get(name) != parameters.get(name)]
    if not others:
        return
    there, here = (shapes.get(min(others), "missing") for shapes in (saved, parameters))
    raise CheckpointError(
        f"{where} is of another model: {min(others)} is {there} there and {here} in the job's; set model and "
        "tokenizer to what they were, or start again with --overwrite or another name"
    )


def check_state(state: TrainerState, where: str, job: JobConfig, fingerprint: str) -> None:
    """Raise CheckpointError where a job cannot go on from a checkpoint's state.

    Args:
        where: the checkpoint, for people.
        fingerprint: of the job's blocks.
    """
    again = "or start again with --overwrite or another name"
    for name, saved, now in (
        ("batch.global_size", state.global_size, job.batch.global_size),
        ("train.seed", state.seed, job.train.seed),
    ):
        if saved != now:
            raise CheckpointError(
                f"{where} was saved with {name} {saved}, the job has {now}: after {state.step} steps it would go "
                f"on with other blocks than those it has not seen; resume with --set {name}={saved}, {again}"
            )
    if state.optimizer != job.train.optimizer:
        raise CheckpointError(
            f"{where} was saved with train.optimizer {state.optimizer}, the job has {job.train.optimizer}, which keeps "
            f"another state; resume with --set train.optimizer={state.optimizer}, {again}"
        )
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{where} was trained on the blocks {state.fingerprint}, the job's are {fingerprint}: the data or the "
            "tokenizer changed since; restore them (a Hub data set: --resume --set data.revision=COMMIT, which is in "
            f"the manifest.json of those blocks), {again}"
        )
