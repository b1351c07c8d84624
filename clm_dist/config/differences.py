"""The fields in which two jobs differ so that other numbers come out."""

from collections.abc import Iterator, Mapping
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.config.schema import field_values

# What decides where and how fast a run computes, what is kept and where it goes, not what it computes.
_NOT_COMPUTED: Mapping[str, Any] = {
    **dict.fromkeys(("cluster", "hub", "tracking"), True),
    "checkpoint": {"every", "keep"},
    "train": {"max_failures", "hang_timeout_s", "start_timeout_s"},
    "tokenizer": {"engine"},
    "data": {"streaming"},
}
_SHARED_OUT = ("cluster.strategy", "cluster.offload", "cluster.cpus_per_worker")
"""Fields of the cluster on which time and memory of a worker depend."""


def differing_fields(old: JobConfig, new: JobConfig) -> list[str]:
    """Fields that change what a run computes and are not equal in two jobs."""
    a, b = (dict(_leaves(job.model_dump(mode="json", exclude=_NOT_COMPUTED))) for job in (old, new))
    return sorted(field for field in a.keys() | b.keys() if a.get(field) != b.get(field))


def computed_values(job: JobConfig) -> dict[str, Any]:
    """The values of the fields on which steps, time, memory and losses of a run depend, but for its number of workers.

    The name and the seed are not among them.
    """
    values = {}
    for name, value, _ in field_values(job):
        section, _, field = name.partition(".")
        excluded = _NOT_COMPUTED.get(section, set())
        is_computed = excluded is not True and field not in excluded and section != "checkpoint"
        if (is_computed and name not in ("name", "train.seed")) or name in _SHARED_OUT:
            values[name] = value
    return values


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
