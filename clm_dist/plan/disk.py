"""Bytes that a run has on disk at most."""

from dataclasses import dataclass

from clm_dist.config.job import JobConfig

_MOST_UINT16 = 2**16


@dataclass(frozen=True)
class Disk:
    """Bytes on disk, by what they hold."""

    store: float
    """The blocks."""
    while_preparing: float
    """Beside them until they are written."""
    checkpoint: float
    """One checkpoint."""
    checkpoints: float
    """As many as there are at once."""
    model: float
    """The model that is written in the end."""

    @property
    def total(self) -> float:
        return self.store + self.while_preparing + self.checkpoints + self.model


def estimate_disk(
    job: JobConfig, num_parameters: int, *, num_blocks: float = 0, vocabulary: int = 0, is_prepared: bool = True
) -> Disk:
    """The bytes of a job's run and of its blocks, without logs.

    Args:
        num_blocks: of both splits.
        vocabulary: one more than the tokenizer's highest id.
        is_prepared: whether the blocks are there already.
    """
    store = num_blocks * job.data.block_size * (2 if vocabulary <= _MOST_UINT16 else 4)
    # A parameter and the two moments of AdamW, in fp32.
    checkpoint = 12.0 * num_parameters
    # The newest, the best, the one that is being written; and the one with the model that is kept.
    at_once = job.checkpoint.keep + 2 + (job.train.keep == "best")
    is_half = job.train.precision in ("bf16", "fp16") and job.cluster.strategy.startswith("zero")
    return Disk(
        store=store,
        while_preparing=0.0 if is_prepared else store,
        checkpoint=checkpoint,
        checkpoints=at_once * checkpoint,
        model=(2.0 if is_half else 4.0) * num_parameters,
    )
