"""Ray Train's trainer for a job, and how it is run to its end."""

import threading
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig

from clm_dist.config.job import JobConfig
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.train.ray.cluster import Cluster
from clm_dist.train.ray.failures import cause_of
from clm_dist.train.ray.follow import Follower
from clm_dist.train.ray.private import LeanTrainer
from clm_dist.train.ray.watch import WorkerWatch
from clm_dist.train.ray.worker import WorkerConfig, train_worker

_POLL_S = 0.25
# How often Ray Train looks for nodes to grow onto, with elastic workers.
_RESIZE_INTERVAL_S = 10.0


def build_trainer(job: JobConfig, run: RunDir, store: Store, cluster: Cluster, callbacks: list[Any]) -> LeanTrainer:
    config: WorkerConfig = {
        "run": str(run.root),
        "store": str(store.local),
        "store_url": store.url,
        "use_gpu": cluster.num_gpus_per_worker > 0,
        "num_threads": max(1, int(job.cluster.cpus_per_worker)),
    }
    resources = {"CPU": job.cluster.cpus_per_worker, "GPU": cluster.num_gpus_per_worker}
    return LeanTrainer(
        train_worker,
        alone=cluster.is_own and not job.cluster.elastic,
        train_loop_config=dict(config),
        # Both, since offloaded gradients are reduced on the CPU.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config["use_gpu"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.cluster.workers,
            use_gpu=cluster.num_gpus_per_worker > 0,
            resources_per_worker={kind: amount for kind, amount in resources.items() if amount},
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(
            name=run.ray.name,
            storage_path=str(run.root),
            # What it calls a failure of the controller is a start without nodes, which `NodeWatch` bounds in time, or
            # with workers that end in it, which `Group` counts.
            failure_config=FailureConfig(max_failures=job.train.max_failures, controller_failure_limit=-1),
            callbacks=callbacks,
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )


def fit(trainer: LeanTrainer, follower: Follower, watch: WorkerWatch) -> dict[str, Any]:
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
        if thread.is_alive():
            watch.look()
    if "error" in ended:
        error = ended["error"]
        raise cause_of(error) if isinstance(error, Exception) else error from error
    value: dict[str, Any] = ended["value"]
    return value
