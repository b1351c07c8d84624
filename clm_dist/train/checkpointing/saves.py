"""A run's saves on one rank, from their begin to the commit, and the checkpoint that it goes on from."""

import contextlib
import time

import torch.distributed as dist

from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError, ConfigError, StorageError
from clm_dist.files.atomic import read_json
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import (
    BestEval,
    DamagedError,
    Marker,
    TrainerState,
    check_parameters,
    check_state,
    checkpoint_name,
    checkpoint_of,
)
from clm_dist.files.record_types import DamagedRecord
from clm_dist.files.run_dir import RunDir
from clm_dist.train.checkpointing.fragments import Fragment, fetched, load_fragments
from clm_dist.train.checkpointing.reporter import Reporter
from clm_dist.train.checkpointing.saver import Saver
from clm_dist.train.heartbeat import Heart
from clm_dist.train.strategies.base import Strategy

_COMMIT_POLL_S = 0.05


class NotSavedError(StorageError):
    """Checkpoints cannot be written. Raised on every rank in the same step."""


class Saves:
    """Begins saves, sees to their commit, and loads what was committed.

    Args:
        fingerprint: of the job's blocks.
    """

    def __init__(
        self,
        job: JobConfig,
        run: RunDir,
        fingerprint: str,
        *,
        strategy: Strategy,
        saver: Saver,
        reporter: Reporter,
        heart: Heart,
    ) -> None:
        self._job, self._run, self._fingerprint = job, run, fingerprint
        self._checkpoints = Checkpoints.of_run(job, run)
        self._strategy, self._saver, self._reporter, self._heart = strategy, saver, reporter, heart
        self._num_failed = 0
        self._needed = False
        self.saved_step = 0
        """Step of the save that was begun last, or loaded since."""
        self.damages: list[DamagedRecord] = []
        """Records of checkpoints that were not whole."""

    def begin(self, state: TrainerState, *, needed: bool = False) -> None:
        """Begin to save; the copy and the writing go on while training does. Collective.

        Args:
            needed: the run cannot do without it, so `conclude` raises where it could not be written.

        Raises:
            NotSavedError: see `conclude`, of the save before.
        """
        self.conclude()
        names = [checkpoint_name(state.step)]
        if self._strategy.world_size > 1:
            dist.broadcast_object_list(names)
        self.saved_step, self._needed = state.step, needed
        self._reporter.state = state
        self._saver.begin(names[0], state.step, self._strategy.fragments())

    def await_copy(self) -> None:
        """Wait until weights and optimizer may change."""
        self._saver.await_copy()

    def conclude(self) -> str | None:
        """Wait until the save that was begun is committed. Return the reason if it could not be. Collective.

        Raises:
            NotSavedError: the one before it failed as well, or this one was needed.
        """
        self._saver.wait(lambda: self._heart.goes_on("waiting for the checkpoint's file"))
        saved = self._reporter.conclude_save()
        if saved is None:
            return None
        errors = self._strategy.gather(saved.error)
        error = next((f"worker {rank}: {error}" for rank, error in enumerate(errors) if error), None)
        if error is None:
            committed = [self._await_commit(saved.name) if self._strategy.rank == 0 else None]
            dist.broadcast_object_list(committed)
            error = committed[0]
        if error is None:
            self._num_failed = 0
            return None
        self._num_failed += 1
        problem = f"the checkpoint of step {saved.step} could not be written: {error}"
        if self._needed:
            raise NotSavedError(
                f"{problem}. train.keep best needs it, because no evaluation before was better; the same command "
                "goes on from the checkpoint before"
            )
        if self._num_failed > 1:
            raise NotSavedError(f"{problem}, and neither could the one before it. What was committed is whole")
        return problem

    def _await_commit(self, name: str) -> str | None:
        """Wait for the driver's commit. Return the reason if it could not be made. Not collective."""
        # No progress: a commit that does not come is a worker that hangs, whose report is missing.
        self._heart.goes_on("waiting for the checkpoint's commit")
        while True:
            with contextlib.suppress(Exception):  # a storage that is away for a moment
                if self._checkpoints.is_committed(name):
                    return None
            with contextlib.suppress(OSError, ConfigError):
                refused = read_json(self._run.uncommitted)
                if refused["name"] == name:
                    return str(refused["error"])
            time.sleep(_COMMIT_POLL_S)

    def load_newest(self) -> TrainerState | None:
        """Take weights and optimizer of the newest checkpoint that is whole, and give its state; None where there is
        no checkpoint. Collective.

        Raises:
            CheckpointError: the job cannot go on from it, or there are some and none is whole.
        """
        names = [self._checkpoints.committed() if self._strategy.rank == 0 else []]
        dist.broadcast_object_list(names)
        fragments, shapes = self._strategy.fragments(), self._strategy.shapes()
        damaged: list[str] = []
        for name in reversed(names[0]):
            marker = self._read_marker(name)
            if isinstance(marker, Marker):
                where = self._checkpoints.where(name)
                check_state(marker.state, where, self._job, self._fingerprint)
                check_parameters(marker.state, where, shapes)
                if self._load(name, marker, fragments):
                    if self._strategy.rank == 0:
                        # They would be kept as the newest, in the place of whole ones.
                        for other in damaged:
                            self._checkpoints.set_aside(other)
                    self.saved_step = marker.state.step
                    return marker.state
            damaged.append(name)
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self._checkpoints.root} is whole; restore them, or start "
                "again with --overwrite or another name"
            )
        return None

    def load_best(self, best: BestEval) -> None:
        """Take the weights of the best evaluation. Collective.

        Raises:
            CheckpointError: their checkpoint is missing or damaged.
        """
        rank_0 = self._strategy.rank == 0
        names = [checkpoint_of(best, self._checkpoints.readable()) if rank_0 else None]
        dist.broadcast_object_list(names)
        name = names[0]
        marker = self._read_marker(name) if name else None
        if not (name and marker and self._load(name, marker, self._strategy.fragments())):
            problem = self.damages[-1]["error"] if name else f"none in {self._checkpoints.root} has it"
            raise CheckpointError(
                f"the weights of step {best.step}, which have the lowest eval loss ({best.loss:.4f}), cannot be read: "
                f"{problem}; restore them, or write the model of the last step with --resume --set train.keep=last"
            )

    def _read_marker(self, name: str) -> Marker | None:
        """A checkpoint's marker as rank 0 sees it, since other nodes may not see it yet; None where it is damaged.
        Collective."""
        found: list[Marker | str | None] = [None]
        if self._strategy.rank == 0:
            try:
                found[0] = self._checkpoints.read(name)
            except DamagedError as error:
                found[0] = str(error)
        dist.broadcast_object_list(found)
        if isinstance(found[0], str):
            self.damages.append({"kind": "damaged", "step": int(name.split("-")[1]), "error": found[0]})
        return found[0] if isinstance(found[0], Marker) else None

    def _load(self, name: str, marker: Marker, fragments: list[Fragment]) -> bool:
        """Load a checkpoint; false, and nothing is changed, where a file of it is not as it was written. Collective."""
        problem = None
        with contextlib.ExitStack() as stack:
            try:
                files = stack.enter_context(fetched(self._checkpoints, name, marker, fragments))
            except DamagedError as error:
                problem = str(error)
            if problem := next((p for p in self._strategy.gather(problem) if p), None):
                self.damages.append({"kind": "damaged", "step": marker.state.step, "error": problem})
                return False
            load_fragments(files, marker, fragments)
        self._strategy.apply_fragments(marker.state.num_updates, marker.state.scaler)
        return True
