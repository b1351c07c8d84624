"""The strategy that a job names."""

from clm_dist.config.job import JobConfig
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.ddp import DataParallel
from clm_dist.train.strategies.fsdp2 import FullyShard
from clm_dist.train.strategies.zero import Zero


def build_strategy(job: JobConfig, *, rank: int, world_size: int, use_gpu: bool) -> Strategy:
    """The job's strategy on this rank. Collective."""
    kinds: dict[str, type[Strategy]] = {"ddp": DataParallel, "fsdp2": FullyShard}
    kind = kinds.get(job.cluster.strategy, Zero)
    return kind(job, rank=rank, world_size=world_size, use_gpu=use_gpu)
