"""The environment in which a worker's libraries start."""

import os

import torch
import torch.distributed as dist

from clm_dist.errors import RunError


def set_up_worker(*, rank: int, world_size: int, use_gpu: bool, num_threads: int) -> None:
    """The one place that sets the environment of torch, Accelerate and DeepSpeed for a worker."""
    torch.set_num_threads(num_threads)
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # The job alone decides; what a shell or `accelerate config` left behind must not.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "PARALLELISM_CONFIG_", "FSDP_"))]:
        del os.environ[name]
    if not use_gpu:
        # DeepSpeed takes a GPU that it sees, whatever the job says.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        if world_size != 1:
            raise RunError(f"worker {rank} of {world_size} has no process group; the launcher must create one")
        store = dist.HashStore()  # type: ignore[attr-defined]  # public in the documentation
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", store=store, rank=0, world_size=1)
