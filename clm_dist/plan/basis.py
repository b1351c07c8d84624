"""What a plan of a job rests on: the blocks of its data and the architecture of its model."""

from dataclasses import dataclass

from clm_dist.config.job import JobConfig
from clm_dist.files.stores import Stores
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.counts import Counts, count_blocks
from clm_dist.plan.model import model_architecture


@dataclass(frozen=True)
class Basis:
    """The blocks and the architecture of a job."""

    counts: Counts
    architecture: Architecture
    notes: tuple[str, ...]
    """What is to be said of how the architecture is known."""


def basis_of(job: JobConfig, stores: Stores) -> Basis:
    """What a plan of a job rests on. Raises what `count_blocks` and `model_architecture` raise."""
    counts = count_blocks(job, stores)
    architecture, note = model_architecture(job, counts.vocabulary)
    return Basis(counts, architecture, (note,) if note else ())
