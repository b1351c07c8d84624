"""The function that a Ray Train worker runs."""

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypedDict

import ray
import ray.train
from ray.train import CheckpointUploadMode

from clm_dist.config.load import read_saved_job
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.train.loop import train
from clm_dist.train.messages import Message
from clm_dist.train.ray import signals
from clm_dist.train.session import Session


class WorkerConfig(TypedDict):
    """The settings that the driver passes to a worker; the job itself is read from the run directory."""

    run: str
    store: str
    store_url: str | None
    """Where a node that does not have the store fetches it."""
    use_gpu: bool
    num_threads: int


def train_worker(config: WorkerConfig) -> dict[str, Any]:
    """Train as one rank of a Ray Train run. Return the fields of the loop's Outcome."""
    quieten_libraries()
    run = RunDir(Path(config["run"]))
    Store(Path(config["store"]), config["store_url"]).fetch()
    context = ray.train.get_context()

    def report(message: Message) -> None:
        ray.train.report(dict(message), checkpoint_upload_mode=CheckpointUploadMode.ASYNC)

    session = Session(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        use_gpu=config["use_gpu"],
        num_threads=config["num_threads"],
        run=run,
        store=Path(config["store"]),
        report=report,
        asked_to_stop=signals.asked_to_stop,
        node=ray.get_runtime_context().get_node_id(),
    )
    return dataclasses.asdict(train(read_saved_job(run.job), session))


def quieten_libraries() -> None:
    """Warnings only, and no bars: many workers share one terminal."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    for name in ("accelerate", "deepspeed", "DeepSpeed", "transformers", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
