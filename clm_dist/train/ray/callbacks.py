"""Callbacks of Ray Train: in its controller, on the driver's node, and in each worker before training."""

import logging
import shutil
import time
from typing import Any

from ray.train import UserCallback

from clm_dist.errors import ConfigError, DataError, RunError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.run_dir import RunDir
from clm_dist.train.memory import PassTooLargeError
from clm_dist.train.micro_size import halve_micro_size
from clm_dist.train.ray import signals
from clm_dist.train.ray.failures import causes_of, reason_of
from clm_dist.train.ray.own import log_dir
from clm_dist.train.ray.private import ControllerCallback, WorkerCallback, WorkerGroupCallback, tell_of_other_nodes
from clm_dist.train.recorder import Recorder

logger = logging.getLogger(__name__)


_SAVE_TIMEOUT_S = 60.0
_CACHE_S = 1.0


class Receiver(UserCallback):  # type: ignore[misc]  # ray.train has no types
    """Hands what the ranks report, and why they died, to the recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Any) -> None:
        self._recorder.receive(metrics)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._recorder.receive_failure(*reason_of(worker_exceptions))


class Signals(WorkerCallback):  # type: ignore[misc]
    """Lets SIGTERM and SIGUSR1 to a worker ask for a checkpoint. Called in a worker's main thread, which alone may."""

    def after_init_train_context(self) -> None:
        signals.install()

    def before_worker_shutdown(self) -> None:
        signals.uninstall()


class Group(WorkerGroupCallback, ControllerCallback):  # type: ignore[misc]
    """Sees groups of workers begin and end, and ends the run where a person must mend something first.

    With elastic workers it saves before a group that is well is replaced.

    Args:
        max_failures: the number of groups in a row that may end before they train.
    """

    def __init__(self, run: RunDir, checkpoints: Checkpoints, *, elastic: bool, max_failures: int) -> None:
        self._run, self._checkpoints, self._elastic = run, checkpoints, elastic
        self._max_failures = max_failures
        self._running: Any = None
        self._placed = False
        self._num_unborn = 0
        self._mend_first: ConfigError | None = None
        self._too_large: PassTooLargeError | None = None

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._forget_workers()

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        self._placed = True
        return {}

    def after_worker_group_training_start(self, worker_group: Any) -> None:
        self._running = worker_group
        self._placed, self._num_unborn = False, 0

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        causes = list(causes_of(worker_group_status.errors).values())
        # A store or a checkpoint may be damaged on one node alone, and other workers do without it.
        ours = (cause for cause in causes if isinstance(cause, ConfigError) and not isinstance(cause, DataError))
        self._mend_first = next(ours, None)
        self._too_large = next((cause for cause in causes if isinstance(cause, PassTooLargeError)), None)

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        self._running = None

    def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:
        self._running = None
        self._forget_workers()
        if self._mend_first:
            raise self._mend_first
        if self._too_large:
            failed, self._too_large = self._too_large.blocks, None
            halve_micro_size(self._run, failed)
        self._num_unborn += self._placed
        self._placed = False
        if self._num_unborn > self._max_failures:
            raise RunError(
                f"workers end before they train, {self._num_unborn} times in a row; see that clm-dist is installed on "
                f"every node. Ray's logs lie in {log_dir()}"
            )
        if self._elastic:
            # Ray Train keeps what it knows of the nodes for this time.
            time.sleep(_CACHE_S)
            tell_of_other_nodes()

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Ray Train ends a group at once to start another: what it has done since the last commit would be lost."""
        if self._running is None or not self._elastic:
            return
        self._run.save.touch()
        try:
            before = self._checkpoints.committed()[-1:]
            deadline = time.monotonic() + _SAVE_TIMEOUT_S
            while self._checkpoints.committed()[-1:] == before and time.monotonic() < deadline:
                # The controller waits here, and reports come with its own polls.
                status = self._running.poll_status(timeout=0.2)
                if status.errors or status.finished:
                    break
        except Exception as error:  # a storage that is away: then the steps since the last commit are trained again
            logger.warning("nothing could be saved before other workers start", exc_info=error)
        finally:
            self._run.save.unlink(missing_ok=True)

    def _forget_workers(self) -> None:
        """Remove the beats of workers that are gone: their silence means nothing."""
        shutil.rmtree(self._run.beats, ignore_errors=True)
