"""The driver: starts Ray and the workers, follows the run, and says how it ended."""

import contextlib
import logging
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text, read_saved_job
from clm_dist.config.ray_address import expected_nodes
from clm_dist.errors import (
    CheckpointError,
    ClmDistError,
    ConfigError,
    NotReadyError,
    RunError,
    StorageError,
)
from clm_dist.files.atomic import make_dir, write_json, write_text
from clm_dist.files.blocks import Manifest
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.lease import HeldError, Holder, Lease
from clm_dist.files.markers import check_state
from clm_dist.files.records import append_records, read_records
from clm_dist.files.result import Result, build_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.runs import remove_run
from clm_dist.files.stores import Store
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.progress import Progress
from clm_dist.signals import STOPS, handling
from clm_dist.train.accept import accept_export
from clm_dist.train.batches import BatchOrder
from clm_dist.train.evaluate import num_eval_tokens
from clm_dist.train.micro_size import with_blocks_that_fit
from clm_dist.train.model import check_ids
from clm_dist.train.optim import build_schedule, describe_change
from clm_dist.train.ray.callbacks import Group, Receiver, Signals
from clm_dist.train.ray.cluster import Cluster
from clm_dist.train.ray.failures import WorkersFailedError, failures_of, with_first_death
from clm_dist.train.ray.follow import Follower
from clm_dist.train.ray.resume import check_best, newest_state
from clm_dist.train.ray.trainer import build_trainer, fit
from clm_dist.train.ray.watch import WorkerWatch
from clm_dist.train.recorder import Recorder
from clm_dist.train.trackers.processes import tracked

logger = logging.getLogger(__name__)

_LEASE_TIMEOUT_S = 180


def train(
    job: JobConfig,
    run: RunDir,
    store: Store,
    cluster: Cluster,
    progress: Progress,
    *,
    overwrite: bool = False,
    on_export: Callable[[Path, int], None] = lambda path, step: None,
    on_records: Callable[[], None] = lambda: None,
) -> Result:
    """Train the job on the cluster's workers, from the run's last checkpoint if it has one. Return the result.

    Args:
        store: the job's blocks; a node that does not have them fetches them from its URL.
        on_export: called with the directory and the step of every model that is written before the end.
        on_records: called when there are new records.

    Raises:
        RunError: workers kept failing, the loss is not finite, or the written model is not the one that was trained.
            The result says `failed` then, and what was committed stays.
        StorageError: checkpoints could not be written, and the result says `failed`; or a storage is away at the start.
        ConfigError, CheckpointError: the run cannot be trained as the job says; nothing was changed.
    """
    manifest = store.manifest()
    _check(job, run, store, manifest, cluster, progress, overwrite=overwrite)
    with _only_driver(run, progress):
        _open_run(job, run, overwrite)
        manifest.without_files().write(run.data)
        with tracked(job.tracking, run, progress) as look_at_trackers:

            def look() -> None:
                on_records()
                look_at_trackers()

            return _train(job, run, store, manifest, cluster, progress, on_export, look)


def _train(
    job: JobConfig,
    run: RunDir,
    store: Store,
    manifest: Manifest,
    cluster: Cluster,
    progress: Progress,
    on_export: Callable[[Path, int], None],
    on_records: Callable[[], None],
) -> Result:
    checkpoints = Checkpoints.of_run(job, run)
    recorder = Recorder(
        run,
        checkpoints,
        num_micros=-(-manifest.splits["eval"].num_blocks // job.eval.micro_size),
        num_tokens=num_eval_tokens(manifest, document_mask=job.data.document_mask),
        keep=job.checkpoint.keep,
        keep_best=job.train.keep == "best",
        tensorboard="tensorboard" in job.tracking,
    )
    callbacks = [
        Receiver(recorder),
        Signals(),
        Group(run, checkpoints, elastic=job.cluster.elastic, max_failures=job.train.max_failures),
    ]
    trainer = build_trainer(job, run, store, cluster, callbacks)
    before = Counter(record["kind"] for record in read_records(run.metrics, last_steps=0))
    micro_size = job.batch.micro_size
    named = None if micro_size == "auto" else micro_size
    follower = Follower(run, progress, before["start"], on_export, micro_size=named, on_records=on_records)
    watch = WorkerWatch(job, run, cluster, progress)
    seeking = with_blocks_that_fit(job, run).batch.micro_size == "auto"
    then = ", then trying how many blocks a pass may have" if seeking else ""
    progress.start(f"Starting {_count_workers(job)} (usually 10 to 40 s){then}", kind="start")
    try:
        with _stop_on_signals(run, progress):
            outcome = fit(trainer, follower, watch)
        if outcome["status"] == "failed":
            raise (StorageError if outcome["try_again"] else RunError)(outcome["error"])
        files = accept_export(job, run) if outcome["status"] == "done" else None
    except WorkersFailedError as failed:
        error = with_first_death(failed, failures_of(run)[before["failure"] :])
        _write_failed(job, run, manifest, error)
        raise error from failed
    except ClmDistError as error:
        _write_failed(job, run, manifest, error)
        raise
    finally:
        for file in (run.stop, run.save, run.hang, run.uncommitted):
            file.unlink(missing_ok=True)
        shutil.rmtree(run.beats, ignore_errors=True)
    result = build_result(job, run, manifest, outcome["status"], files=files)
    write_json(run.result, result)
    return result


def _count_workers(job: JobConfig) -> str:
    fewest, most = job.cluster.min_workers, job.cluster.max_workers
    return f"{fewest} to {most} workers" if job.cluster.elastic else f"{most} worker{'s' if most > 1 else ''}"


def _write_failed(job: JobConfig, run: RunDir, manifest: Manifest, error: ClmDistError) -> None:
    """Write the result of a run that failed. What the run failed of counts more than that this cannot be written."""
    try:
        write_json(run.result, build_result(job, run, manifest, "failed", str(error)))
    except ClmDistError as also:
        logger.warning("%s", also)


def _check(
    job: JobConfig,
    run: RunDir,
    store: Store,
    manifest: Manifest,
    cluster: Cluster,
    progress: Progress,
    *,
    overwrite: bool,
) -> None:
    """Raise here what would fail in every worker: it costs no start of workers, and is not tried again."""
    if job.train.precision in ("fp16", "tf32") and not cluster.num_gpus_per_worker:
        raise ConfigError(
            f"train.precision {job.train.precision} needs GPUs; use fp32 or bf16 on CPUs", field="train.precision"
        )
    # What no tokenizer is needed for was checked before anything was prepared.
    tokenizer = load_tokenizer(store.local / "tokenizer")
    check_ids(job, tokenizer, store.local)
    num_eval_tokens(manifest, document_mask=job.data.document_mask)
    num_blocks = manifest.splits["train"].num_blocks
    num_steps = BatchOrder.of_job(job, num_blocks).num_steps
    build_schedule(job.train, num_steps)
    checkpoints = Checkpoints.of_run(job, run)
    if overwrite:
        return
    with checkpoints.reaching():
        newest = newest_state(checkpoints)
        if newest is not None:
            where, state = newest
            check_state(state, where, job, manifest.fingerprint)
            check_best(job, run, checkpoints, state)
    if newest is not None:
        if state.step > num_steps:
            raise CheckpointError(
                f"{where} has {state.step} steps, and the job ends after {num_steps}; raise train.max_steps "
                "or train.epochs, or start again with --overwrite or another name"
            )
        before = read_saved_job(run.job)
        steps_before = BatchOrder.of_job(before, num_blocks).num_steps
        if changed := describe_change(before.train, steps_before, job.train, num_steps, state.step):
            progress.note(changed)


@contextlib.contextmanager
def _only_driver(run: RunDir, progress: Progress) -> Iterator[None]:
    """Hold the run against a second driver."""
    make_dir(run.root.parent)
    lease = Lease(run.root)

    def note_wait(holder: Holder) -> None:
        progress.note(f"Waiting for another driver of the run: {holder}")

    with contextlib.ExitStack() as held:
        try:
            # A driver on a host that a scheduler has given up may hold it until it is ended there.
            timeout_s = _LEASE_TIMEOUT_S if expected_nodes() else 0
            held.enter_context(lease.hold(timeout_s=timeout_s, on_wait=note_wait))
        except HeldError as error:
            if expected_nodes():
                by = f"the run {run.root} is held by another driver ({error.holder})"
                raise NotReadyError(
                    f"{by}, {_LEASE_TIMEOUT_S} s after this one began; where none runs any more, remove {lease.file}"
                ) from None
            raise ConfigError(
                f"the run {run.root} is being trained by another process ({error.holder}); wait for it, or make "
                "another run with --set name=..."
            ) from None
        yield


def _open_run(job: JobConfig, run: RunDir, overwrite: bool) -> None:
    checkpoints = Checkpoints.of_run(job, run)
    if overwrite:
        remove_run(job, run)
    make_dir(run.ray)
    # Of a driver that was killed, like the files below: they would be taken for this one's.
    for directory in (run.beats, run.ray_logs):
        shutil.rmtree(directory, ignore_errors=True)
    checkpoints.check_access()
    # With the result of an earlier job it would say of itself that it is done; what that model wrote is not this one's.
    run.result.unlink(missing_ok=True)
    run.samples.unlink(missing_ok=True)
    write_text(run.job, job_text(job), private=True)
    if run.metrics.exists():
        # What a full disk or a kill left of a record is named here, where a person reads it.
        append_records(run.metrics, [])
    for file in (run.stop, run.save, run.hang, run.uncommitted):
        file.unlink(missing_ok=True)
    # Ray would take a run of this name for one to go on with; the markers say where that is.
    for snapshot in run.ray.glob("*.json"):
        snapshot.unlink()
    with checkpoints.reaching():
        checkpoints.remove_uncommitted()


@contextlib.contextmanager
def _stop_on_signals(run: RunDir, progress: Progress) -> Iterator[None]:
    """Signals and the first Ctrl-C save a checkpoint and end the run; the second Ctrl-C ends it at once."""

    def stop(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and run.stop.exists():
            raise KeyboardInterrupt
        name = signal.Signals(number).name
        try:
            run.stop.touch()
        except OSError as error:  # a full disk: raised here, it would come out of whatever runs now
            progress.note(
                f"{name}: {run.stop} cannot be written ({error.strerror}), so the run goes on; free some space"
            )
            return
        again = " Ctrl-C again stops at once." if number == signal.SIGINT else ""
        progress.note(f"{name}: saving a checkpoint, then stopping.{again}")

    with handling((*STOPS, signal.SIGINT), stop):
        yield
