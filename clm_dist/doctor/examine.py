"""An examination from begin to end: which nodes, what they tell of themselves, what is between them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

from clm_dist.config.job import JobConfig
from clm_dist.doctor.between import Between
from clm_dist.doctor.bounded import Deadline, begin
from clm_dist.doctor.disk import Disk, judge_disk
from clm_dist.doctor.environment import Surroundings, judge_environment, read_environment
from clm_dist.doctor.finding import Finding, exit_code, merged, on, unchecked
from clm_dist.doctor.gpus import judge_gpus
from clm_dist.doctor.group import Group, find_group
from clm_dist.doctor.hub_reach import Answer, check_push, judge_answers
from clm_dist.doctor.machine import judge_amounts, judge_machine
from clm_dist.doctor.meetings import Meetings
from clm_dist.doctor.model_size import Size, estimate_disk_needs, find_size, judge_size
from clm_dist.doctor.need import Need
from clm_dist.doctor.probe import Facts
from clm_dist.doctor.versions import compare_versions, judge_versions
from clm_dist.errors import first_line
from clm_dist.files.stores import Stores
from clm_dist.plan.disk import estimate_disk

TIME_S = 15.0
"""An examination ends within this time, unless another is given."""
_FACTS_SHARE = 0.55
"""Of the time: the longest that nodes have to start and to tell of themselves."""
_LAST_S = 1.0
"""Kept to end what was started."""
_ASK_S = 2.0
_HUB_S = 4.0
_END_S = 0.5
DiskNeeds = Callable[[JobConfig, int], Mapping[str, int]]
"""Bytes that the run of a job with so many parameters writes, by the names of places (`runs`, `checkpoints`)."""


@dataclass(frozen=True)
class Report:
    """What an examination found."""

    nodes: tuple[str, ...]
    where: str
    """What the nodes are, for people."""
    findings: list[Finding]
    """The worst first."""
    facts: dict[str, Facts] = field(default_factory=dict)
    """What each node told of itself."""

    @property
    def exit_code(self) -> int:
        return exit_code(self.findings)


def examine(
    job: JobConfig | None,
    runs: Path,
    stores: Stores,
    *,
    disk_needs: DiskNeeds = estimate_disk_needs,
    time_s: float = TIME_S,
) -> Report:
    """Examine the nodes that a run of this shell would use, for a job or for any.

    Args:
        disk_needs: what a run needs on disk.
        time_s: what is not looked at within this time is said.
    """
    deadline = Deadline(time_s - _LAST_S)
    need = Need.of(job, runs, stores)
    size = begin(find_size, job, time_s - _LAST_S - _ASK_S) if job else None
    push = begin(lambda: list(check_push(job, read_environment()))) if job and need.pushes else None
    with find_group() as group:
        nodes = tuple(group.names)
        directories = [place.where for place in need.places if not place.is_url]
        facts = group.ask_all("facts", Facts, _FACTS_SHARE * time_s, directories=directories)
        disks = {node: one.disks for node, one in facts.items()}
        if need.models or need.dataset:
            group.ask_all("begin_hub", type(None), _ASK_S, models=need.models, dataset=need.dataset)
        findings = _judge_nodes(facts, need, group)
        meetings = Meetings(group, need, disks, deadline)
        if len(facts) > 1:
            between = Between(group, need, facts, deadline)
            # In this order: torch is imported, and leases wait for each other, while connections are made.
            between.begin()
            findings += [*between.interfaces(), *meetings.files(), *between.connections(), *meetings.leases()]
            findings += [*between.bandwidth(), *between.collective()]
        findings += meetings.objects()
        if need.models or need.dataset:
            answers = group.ask_all("hub", list[Answer] | None, deadline.left(_HUB_S), timeout_s=deadline.left(_HUB_S))
            findings += _of_hub(answers, group)
        findings += _of_size(job, size, need, disks, meetings, disk_needs, deadline)
        findings += _of_push(push, deadline) if push else []
        findings += group.findings
    return Report(nodes, group.where, merged(findings, len(nodes)), facts)


def _judge_nodes(facts: Mapping[str, Facts], need: Need, group: Group) -> list[Finding]:
    """The findings of what each node tells of itself, but for its disks."""
    findings: list[Finding] = []
    amounts = group.amounts(facts)
    num_workers = -(-need.cluster.min_workers // max(1, len(amounts)))
    wants = None if need.cluster.gpus_per_worker == "auto" else need.cluster.gpus_per_worker > 0
    for node, one in facts.items():
        # Ray hides all GPUs from the actor that has looked.
        gpus = replace(one.gpus, visible=None) if group.is_ray else one.gpus
        surroundings = Surroundings(joins=group.joins, has_gpus=bool(one.gpus.gpus))
        found = [
            *judge_versions(one.versions),
            *judge_gpus(gpus, wants_gpus=wants, granted=(group.known or {}).get(node, {}).get("GPU", 0)),
            *judge_machine(one.machine, need.cluster.cpus_per_worker, num_workers=num_workers),
            *judge_environment(one.variables, need, surroundings),
        ]
        findings += on(node, found)
    findings += compare_versions({node: one.versions for node, one in facts.items()})
    if need.has_job and facts:
        findings += judge_amounts(amounts, need.cluster, group.where)
    return findings


def _of_hub(answers: Mapping[str, list[Answer] | None], group: Group) -> Iterator[Finding]:
    for node, found in answers.items():
        if found is None:
            yield from on(node, [unchecked("hub", "what the job names on the Hub, which did not answer in time")])
        else:
            yield from on(node, judge_answers(found))


def _of_size(
    job: JobConfig | None,
    pending: "Future[Size | None] | None",
    need: Need,
    disks: Mapping[str, Mapping[str, Disk]],
    meetings: Meetings,
    disk_needs: DiskNeeds,
    deadline: Deadline,
) -> Iterator[Finding]:
    """The findings of disks, which depend on the size of the model."""
    size = None
    if job is not None and pending is not None:
        with contextlib.suppress(TimeoutError):
            size = pending.result(timeout=max(0.0, deadline.left() - _ASK_S))
        yield from judge_size(size)
    num = size.num_parameters if size else None
    needed = disk_needs(job, num) if job and num else {}
    for node, found in disks.items():
        for place in need.places:
            if place.is_url:
                continue
            if place.where in found:
                yield from on(node, judge_disk(place, found[place.where], needed.get(place.name)))
            else:
                said = f"{place.name} ({place.where}), which did not answer in time; is its server away?"
                yield from on(node, [unchecked("disk", said)])
    checkpoint = int(estimate_disk(job, num).checkpoint) if job and num else None
    yield from meetings.speed(checkpoint, need.cluster.slurm.signal_s)


def _of_push(pending: "Future[list[Finding]]", deadline: Deadline) -> Iterator[Finding]:
    try:
        yield from pending.result(timeout=max(_END_S, deadline.left()))
    except TimeoutError:
        yield unchecked("hub", "whether the token may push, because the Hub did not answer in time")
    except Exception as problem:  # a library's own
        yield unchecked("hub", f"whether the token may push: {first_line(problem)}")
