"""The checks that take no time, which `run` and `train` make before they load anything."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.doctor.bounded import Deadline, begin
from clm_dist.doctor.disk import judge_disk, read_disk
from clm_dist.doctor.environment import Surroundings, judge_environment, read_environment
from clm_dist.doctor.finding import Finding, merged
from clm_dist.doctor.machine import judge_machine
from clm_dist.doctor.need import Need
from clm_dist.doctor.versions import judge_versions, read_versions
from clm_dist.errors import first_line
from clm_dist.files.stores import Stores
from clm_dist.machine import read_machine

logger = logging.getLogger(__name__)

_DISKS_S = 1.0


def examine_quickly(job: JobConfig, runs: Path, stores: Stores) -> list[Finding]:
    """The warnings and errors of this machine that are found without a network, torch or Ray.

    The command goes on whatever they are: what is an error here fails it later.
    """
    try:
        found = merged(_examine(job, Need.of(job, runs, stores)), 1)
    except Exception as error:  # whatever this machine has that no other had: no run ends because it was looked at
        logger.warning("this machine could not be examined: %s: %s", type(error).__name__, first_line(error))
        return []
    return [finding for finding in found if finding.severity in ("error", "warning")]


def _examine(job: JobConfig, need: Need) -> Iterator[Finding]:
    reads = {place: begin(read_disk, place.where) for place in need.places if not place.is_url}
    joins = bool(os.environ.get("RAY_ADDRESS"))
    yield from judge_versions(read_versions())
    yield from judge_environment(read_environment(), need, Surroundings(joins, has_gpus=False))
    if not joins:
        # Else the workers may be on other machines.
        yield from judge_machine(read_machine(), job.cluster.cpus_per_worker, num_workers=job.cluster.min_workers)
    deadline = Deadline(_DISKS_S)
    for place, read in reads.items():
        try:
            disk = read.result(timeout=deadline.left())
        except (TimeoutError, OSError):
            continue
        # Of a directory that cannot be written the stage that needs it says so.
        if not disk.problem:
            yield from judge_disk(place, disk, None)
