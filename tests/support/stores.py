"""Preparation with directories, as most tests look at a store by its files."""

from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.files.stores import Stores
from clm_dist.prepare import pipeline
from clm_dist.prepare.encode import Effort
from clm_dist.progress import Progress


def prepare(
    job: JobConfig, stores: Path, progress: Progress, effort: Effort | None = None, url: str | None = None
) -> Path:
    """The directory of a job's store."""
    return pipeline.prepare(job, Stores(stores, url), progress, effort).local


def find_store(job: JobConfig, stores: Path, url: str | None = None) -> Path | None:
    """The directory of a job's store that is prepared already."""
    store = pipeline.resolve(job, Stores(stores, url)).store
    return store.local if store.fetch() else None
