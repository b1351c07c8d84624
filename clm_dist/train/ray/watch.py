"""The driver's watch over workers and nodes."""

import contextlib
import logging

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, StorageError
from clm_dist.files.atomic import write_text
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Progress
from clm_dist.train.heartbeat import Watch
from clm_dist.train.ray.cluster import Cluster, kill_worker
from clm_dist.train.ray.nodes import NodeWatch
from clm_dist.train.ray.own import RayEndedError
from clm_dist.train.ray.private import lost_process

logger = logging.getLogger(__name__)


class WorkerWatch:
    """Watches workers that hang, and the nodes that workers are on, while they train."""

    def __init__(self, job: JobConfig, run: RunDir, cluster: Cluster, progress: Progress) -> None:
        self._run, self._progress = run, progress
        self._workers = Watch(run.beats, job.train.hang_timeout_s)
        self._nodes = NodeWatch(job, run, cluster, progress)

    def look(self) -> None:
        """Do what is to be done now. Raises RayEndedError; RunError, NotReadyError: see `NodeWatch`."""
        if lost := lost_process():
            raise RayEndedError.because(f"its process {lost} is gone")
        if hang := self._workers.look():
            # On a full disk the workers end without the reason.
            with contextlib.suppress(StorageError):
                write_text(self._run.hang, hang.reason)
            self._progress.note(f"{hang.reason}. It is ended, and the workers start again from the last checkpoint")
            for beat in hang.beats:
                kill_worker(beat.node, beat.pid)
        try:
            self._nodes.look(self._workers.nodes())
        except ClmDistError:
            raise
        except Exception as error:
            # Ray may be away for a moment; whether it comes back is what the run itself sees.
            logger.debug("the nodes could not be looked at", exc_info=error)
