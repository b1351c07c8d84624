"""The driver: starts Ray and the workers, follows the run, and says how it ended."""

import contextlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from filelock import FileLock, Timeout
from ray.train import Checkpoint, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import AutoTokenizer

from clm_dist.checkpoints import Checkpoints, check_state
from clm_dist.config import ClusterConfig, JobConfig
from clm_dist.errors import CheckpointError, ClmDistError, ConfigError, RunError, describe_os_error
from clm_dist.job import differing_fields, job_text, read_saved_job
from clm_dist.progress import Progress
from clm_dist.run_dir import RunDir, make_dir, read_json, write_json, write_text
from clm_dist.shards import Manifest
from clm_dist.train.evaluate import num_eval_tokens
from clm_dist.train.follow import Follower
from clm_dist.train.loader import BatchOrder
from clm_dist.train.model import check_model
from clm_dist.train.record import Recorder
from clm_dist.train.result import accept_export, build_result
from clm_dist.train.worker import WorkerConfig, train_worker

logger = logging.getLogger(__name__)

_POLL_S = 0.25


@dataclass(frozen=True)
class Cluster:
    """The Ray that the run uses."""

    num_gpus_per_worker: int


@contextlib.contextmanager
def start_ray(cluster: ClusterConfig) -> Iterator[Cluster]:
    """The Ray of RAY_ADDRESS, or one of this process's own that ends with it; a running one is used as it is.

    Raises:
        ConfigError: it has fewer CPUs or GPUs than the job's workers take.
    """
    for name, value in {
        # Reports reach the driver within this time; Ray's own 2 s would hold up short runs.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    own = not ray.is_initialized()
    if own:
        address = os.environ.get("RAY_ADDRESS")
        # "local" starts a Ray; nothing at all would join one that happens to run here.
        options = {} if address else {"include_dashboard": False, "object_store_memory": 256 * 2**20}
        logging.getLogger("ray").setLevel(logging.ERROR)
        # Workers speak through reports; what else they print stays in Ray's log files, which errors name.
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield Cluster(_check_resources(cluster, nodes, local=own and "RAY_ADDRESS" not in os.environ))
    finally:
        if own:
            ray.shutdown()


def _check_resources(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]], *, local: bool) -> int:
    """GPUs of a worker. Raises ConfigError where the workers would wait for resources that never come.

    Args:
        nodes: what each node has, `{"CPU": 8.0, "GPU": 1.0}`.
    """
    where = "this machine" if local else "the Ray cluster"
    num_gpus = sum(node.get("GPU", 0) for node in nodes)
    gpus_each = int(num_gpus > 0) if cluster.gpus_per_worker == "auto" else cluster.gpus_per_worker
    workers = cluster.min_workers
    for kind, each in (("GPU", gpus_each), ("CPU", cluster.cpus_per_worker)):
        # A worker lies on one node.
        fitting = sum(int(node.get(kind, 0) // each) for node in nodes) if each else workers
        if fitting < workers:
            available = sum(node.get(kind, 0) for node in nodes)
            advice = [f"set cluster.workers to {fitting} or less"] if fitting else []
            if kind == "CPU" and available:
                advice.append(f"set cluster.cpus_per_worker to {available / workers:.3g} or less")
            spread = f" on {len(nodes)} nodes, which fit {fitting} workers" if len(nodes) > 1 else ""
            raise ConfigError(
                f"cluster.workers {workers} x {each:g} {kind} need {workers * each:g}, {where} has "
                f"{available:g}{spread}; " + " or ".join(advice or [f"use a cluster with {kind}s"]),
                field="cluster.workers",
            )
    return gpus_each


def find_run(job: JobConfig, runs: Path, *, resume: bool = False, overwrite: bool = False) -> tuple[RunDir, bool]:
    """The job's run directory, and whether the run in it is done already. Writes nothing.

    Raises:
        ConfigError: a run of this name exists with another job, and neither `resume` nor `overwrite` says what to do.
    """
    run = RunDir(runs / job.name)
    if overwrite:
        return run, False
    if not run.exists():
        if Checkpoints.of_run(job, run).committed():
            raise ConfigError(
                f"{run.root} has checkpoints, but {run.job.name} is missing, so which job they are of is not known; "
                "restore it, start again with --overwrite, or make another run with --set name=...",
                field="name",
            )
        return run, False
    different = differing_fields(read_saved_job(run.job), job)
    if different and not resume:
        shown = ", ".join(different[:6]) + (", ..." if len(different) > 6 else "")
        raise ConfigError(
            f"the run {run.root} exists with another job (different: {shown}); go on from its last checkpoint with "
            "--resume, start it again with --overwrite, or make another run with --set name=...",
            field="name",
        )
    done = run.result.exists() and read_json(run.result).get("status") == "done"
    return run, done and not different


def check_trackers(job: JobConfig) -> None:
    """Raise ConfigError where a tracker of the job is not installed."""
    if "tensorboard" in job.tracking:
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            raise ConfigError(
                "tracking has tensorboard, but tensorboardX is not installed; pip install 'clm-dist[tensorboard]'",
                field="tracking",
            ) from None


def train(
    job: JobConfig,
    run: RunDir,
    store: Path,
    cluster: Cluster,
    progress: Progress,
    *,
    store_url: str | None = None,
    overwrite: bool = False,
    on_export: Callable[[Path, int], None] = lambda path, step: None,
) -> dict[str, Any]:
    """Train the job on the cluster's workers, from the run's last checkpoint if it has one; gives the result.

    Args:
        store_url: where a node that does not have the store fetches it.
        on_export: called with the directory and the step of every model that is written before the end.

    Raises:
        RunError: workers kept failing, the loss is not finite, or the written model is not the one that was trained.
            The result says `failed` then, and what was committed stays.
        ConfigError, CheckpointError: the run cannot be trained as the job says; nothing was changed.
    """
    manifest = Manifest.read(store / "manifest.json")
    _check(job, run, store, manifest, cluster, overwrite)
    with _only_driver(run):
        _open_run(job, run, overwrite)
        return _train(job, run, store, store_url, manifest, cluster, progress, on_export)


def _train(
    job: JobConfig,
    run: RunDir,
    store: Path,
    store_url: str | None,
    manifest: Manifest,
    cluster: Cluster,
    progress: Progress,
    on_export: Callable[[Path, int], None],
) -> dict[str, Any]:
    recorder = Recorder(
        run,
        Checkpoints.of_run(job, run),
        num_parts=-(-manifest.splits["eval"].num_blocks // job.eval.micro_size),
        num_tokens=num_eval_tokens(manifest, document_mask=job.data.document_mask),
        keep=job.checkpoint.keep,
        tensorboard="tensorboard" in job.tracking,
    )
    trainer = _build_trainer(job, run, store, store_url, cluster, recorder)
    follower = Follower(run, progress, on_export)
    progress.start("Starting workers")
    try:
        with _stop_on_signals(run, progress):
            outcome = _fit(trainer, follower)
        if outcome["status"] == "failed":
            raise RunError(outcome["error"])
        if outcome["status"] == "done":
            accept_export(job, run)
    except ClmDistError as error:
        write_json(run.result, build_result(job, run, manifest, "failed", str(error)))
        raise
    finally:
        run.stop.unlink(missing_ok=True)
    result = build_result(job, run, manifest, outcome["status"])
    write_json(run.result, result)
    return result


def _check(job: JobConfig, run: RunDir, store: Path, manifest: Manifest, cluster: Cluster, overwrite: bool) -> None:
    """Raise here what would fail in every worker: it costs no start of workers, and is not tried again."""
    if job.train.precision == "fp16" and not cluster.num_gpus_per_worker:
        raise ConfigError("train.precision fp16 needs GPUs; use fp32 or bf16 on CPUs", field="train.precision")
    check_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    num_eval_tokens(manifest, document_mask=job.data.document_mask)
    checkpoints = Checkpoints.of_run(job, run)
    if not overwrite and (names := checkpoints.committed()):
        where = checkpoints.where(names[-1])
        state = checkpoints.read(names[-1]).state
        check_state(state, where, job, manifest.fingerprint)
        num_steps = BatchOrder.of_job(job, manifest.splits["train"].num_blocks).num_steps
        if state.step > num_steps:
            raise CheckpointError(
                f"{where} has {state.step} steps, and the job ends after {num_steps}; raise train.max_steps "
                "or train.epochs, or start again with --overwrite or another name"
            )


@contextlib.contextmanager
def _only_driver(run: RunDir) -> Iterator[None]:
    """Hold the run against a second driver; the system lets go of it when this process ends, however it ends."""
    lock = FileLock(make_dir(run.root.parent) / f".{run.root.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"the run {run.root} is being trained by another process; wait for it, or make another run with "
            "--set name=..."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _open_run(job: JobConfig, run: RunDir, overwrite: bool) -> None:
    checkpoints = Checkpoints.of_run(job, run)
    if overwrite:
        checkpoints.remove_all()
        shutil.rmtree(run.root, ignore_errors=True)
    make_dir(run.ray)
    checkpoints.check_access()
    # With the result of an earlier job it would say of itself that it is done.
    run.result.unlink(missing_ok=True)
    write_text(run.job, job_text(job))
    run.stop.unlink(missing_ok=True)
    # Ray would take a run of this name for one to go on with; the markers say where that is.
    for snapshot in run.ray.glob("*.json"):
        snapshot.unlink()
    checkpoints.remove_uncommitted()


def _build_trainer(
    job: JobConfig, run: RunDir, store: Path, store_url: str | None, cluster: Cluster, recorder: Recorder
) -> TorchTrainer:
    config: WorkerConfig = {
        "run": str(run.root),
        "store": str(store),
        "store_url": store_url,
        "use_gpu": cluster.num_gpus_per_worker > 0,
        "num_threads": max(1, int(job.cluster.cpus_per_worker)),
    }
    resources = {"CPU": job.cluster.cpus_per_worker, "GPU": cluster.num_gpus_per_worker}
    return TorchTrainer(
        train_worker,
        train_loop_config=dict(config),
        # Both, since offloaded gradients are reduced on the CPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config["use_gpu"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.cluster.workers,
            use_gpu=cluster.num_gpus_per_worker > 0,
            resources_per_worker={kind: amount for kind, amount in resources.items() if amount},
        ),
        run_config=RunConfig(
            name=run.ray.name,
            storage_path=str(run.root),
            failure_config=FailureConfig(
                max_failures=job.train.max_failures, controller_failure_limit=job.train.max_failures
            ),
            callbacks=[_Receiver(recorder)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


class _Receiver(UserCallback):  # type: ignore[misc]  # ray.train has no types
    """Hands what every rank reported to the recorder; runs in Ray Train's controller, on the driver's node."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def after_report(self, run_context: Any, metrics: list[Any], checkpoint: Checkpoint | None) -> None:
        self._recorder.receive(metrics)


def _fit(trainer: TorchTrainer, follower: Follower) -> dict[str, Any]:
    """Run the trainer in a thread, so that signals and the display stay with this one."""
    ended: dict[str, Any] = {}

    def fit() -> None:
        try:
            ended["value"] = trainer.fit().return_value
        except BaseException as error:  # handed to the thread that waits
            ended["error"] = error

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL_S)
        follower.look()
    if "error" in ended:
        raise _cause(ended["error"]) from ended["error"]
    value: dict[str, Any] = ended["value"]
    return value


def _cause(error: BaseException) -> BaseException:
    """What a person can act on in an error of Ray Train: the worker's own, if it is one of ours."""
    failures = dict(getattr(error, "worker_failures", {}))
    if controller_failure := getattr(error, "controller_failure", None):
        failures[-1] = controller_failure
    causes = {rank: getattr(failure, "_base_exc", failure) for rank, failure in sorted(failures.items())}
    for cause in causes.values():
        if isinstance(cause, ClmDistError):
            return cause
        if isinstance(cause, OSError) and (described := describe_os_error(cause, Path(cause.filename or "/"))):
            return described
    if not causes:
        return error
    rank, cause = next(iter(causes.items()))
    who = "the driver" if rank == -1 else f"worker {rank}"
    lines = str(cause).strip().splitlines() or [""]
    logger.debug("the cause of the failure", exc_info=error)
    return RunError(
        f"{who} failed, and so did every restart (train.max_failures): {type(cause).__name__}: {lines[0]}. The "
        "committed checkpoints are whole; the same command goes on from the last. The workers' logs lie in "
        f"{_log_dir()}"
    )


def _log_dir() -> str:
    try:
        return f"{ray._private.worker._global_node.get_session_dir_path()}/logs"
    except AttributeError:
        return "Ray's session directory on the nodes"


@contextlib.contextmanager
def _stop_on_signals(run: RunDir, progress: Progress) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and the first Ctrl-C save a checkpoint and end the run; the second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: Any) -> None:
        if number == signal.SIGINT and run.stop.exists():
            raise KeyboardInterrupt
        again = " Ctrl-C again stops at once." if number == signal.SIGINT else ""
        progress.note(f"{signal.Signals(number).name}: saving a checkpoint, then stopping.{again}")
        run.stop.touch()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
