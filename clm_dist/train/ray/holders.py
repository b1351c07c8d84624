"""Who holds the CPUs and GPUs of a joined Ray that a run's workers wait for."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.state import list_actors

from clm_dist.config.job import ClusterConfig
from clm_dist.train.ray.cluster import alive_nodes

_MOST = 5
"""Holders that are named."""
_TIMEOUT_S = 5


def describe_holders(cluster: ClusterConfig, gpus_each: int) -> str | None:
    """What the workers lack and who has it; None if Ray has room for them, or has placed them already."""
    groups = list(ray.util.placement_group_table().values())
    each = {"GPU": gpus_each, "CPU": cluster.cpus_per_worker}
    if not any(_is_pending(group, each) for group in groups):
        return None
    nodes, free = alive_nodes(), ray.available_resources()
    kind = next((kind for kind in each if free.get(kind, 0) < cluster.min_workers * each[kind]), None)
    if kind is None:
        return None
    needs = f"cluster.workers {cluster.min_workers} x {each[kind]:g} {kind} need {cluster.min_workers * each[kind]:g}"
    total = sum(resources.get(kind, 0) for resources in nodes.values())
    held = [*_groups(groups, kind), *_actors(nodes, kind)]
    if len(held) > _MOST:
        held[_MOST:] = [f"{len(held) - _MOST} others"]
    by = ", ".join(held) or "tasks, or actors that Ray does not list without its dashboard"
    return f"{needs}, and {free.get(kind, 0):g} of {total:g} in the Ray cluster are free; the others are held by {by}"


def _is_pending(group: Mapping[str, Any], each: Mapping[str, float]) -> bool:
    """Whether a placement group is one of workers of this size that has no place yet."""
    bundles = group["bundles"].values()
    return group["state"] == "PENDING" and all(
        bundle.get(kind, 0) == amount for bundle in bundles for kind, amount in each.items()
    )


def _groups(groups: Sequence[Mapping[str, Any]], kind: str) -> Iterator[str]:
    """Placement groups that hold some of a resource."""
    for group in groups:
        amount = sum(bundle.get(kind, 0) for bundle in group["bundles"].values())
        if group["state"] == "CREATED" and amount:
            name = f"placement group {group['name'] or group['placement_group_id'][:8]}"
            yield f"{name} ({amount:g} {kind})"


def _actors(nodes: Mapping[str, object], kind: str) -> Iterator[str]:
    """Actors outside of placement groups that hold some of a resource, by job and class."""
    held: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    with contextlib.suppress(Exception):  # a Ray without a dashboard does not list them
        for actor in list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=_TIMEOUT_S):
            amount = (actor.required_resources or {}).get(kind, 0)
            # Where this Ray has no dashboard, that of another Ray on this host may answer.
            if amount and not actor.placement_group_id and actor.node_id in nodes:
                held[actor.job_id, actor.class_name] += amount
                counts[actor.job_id, actor.class_name] += 1
    for (job, name), amount in held.most_common():
        yield f"job {job}'s {counts[job, name]} {name} ({amount:g} {kind})"
