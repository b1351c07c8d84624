"""The environment in which a worker's libraries start."""

import os

import torch
import torch.distributed as dist

from clm_dist.errors import RunError

CACHE = f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/clm_dist/compiled"
"""Where compiled passes are kept for the next start; the user's own, because it is code."""


def set_up_worker(*, rank: int, world_size: int, use_gpu: bool, num_threads: int, compiles: bool = False) -> None:
    """The one place that sets the environment of torch, Accelerate and DeepSpeed for a worker.

    Args:
        compiles: passes may be compiled.
    """
    torch.set_num_threads(num_threads)
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    if compiles:
        # torch's own place is under /tmp, where anybody may have put something before.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.expanduser(CACHE))  # noqa: PTH111  # it never raises
    if compiles and use_gpu:
        # Without it matrix products are not the same each time where passes are compiled.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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


def forget_accelerate() -> None:
    """Let the next strategy in this process start from no state: Accelerate keeps one a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
