"""What is said of a Ray whose CPUs and GPUs others hold."""

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from clm_dist.config.job import ClusterConfig
from clm_dist.train.ray import holders
from clm_dist.train.ray.holders import describe_holders

OURS = {"state": "PENDING", "name": "", "placement_group_id": "c" * 36, "bundles": {0: {"CPU": 1.0, "GPU": 1.0}}}
TWO = ClusterConfig(workers=2)


def group(state: str, *, name: str = "", **amounts: float) -> dict[str, Any]:
    return {"state": state, "name": name, "placement_group_id": "d" * 36, "bundles": {0: amounts, 1: amounts}}


def actor(name: str, *, node: str = "n1", job: str = "07000000", group: str | None = None, **takes: float) -> Any:
    return SimpleNamespace(
        job_id=job, class_name=name, node_id=node, required_resources=takes, placement_group_id=group
    )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(groups=[OURS], free={"CPU": 8.0}, actors=[])
    monkeypatch.setattr(ray.util, "placement_group_table", lambda: dict(enumerate(found.groups)))
    monkeypatch.setattr(ray, "available_resources", lambda: found.free)
    monkeypatch.setattr(holders, "alive_nodes", lambda: {"n1": {"CPU": 8.0, "GPU": 4.0}, "n2": {"CPU": 8.0}})
    monkeypatch.setattr(holders, "list_actors", lambda **_: found.actors)
    return found


def test_groups_and_actors_that_hold_what_is_missing_are_named(fakes: SimpleNamespace) -> None:
    fakes.groups += [group("CREATED", name="sweep", GPU=1), group("CREATED", CPU=1), group("REMOVED", GPU=1)]
    fakes.actors = [
        *[actor("Engine", GPU=1.0) for _ in range(2)],
        actor("OfAGroup", GPU=1.0, group="d" * 36),
        actor("OnACpu", CPU=1.0),
        actor("OfAnotherRay", node="elsewhere", GPU=1.0),
    ]
    assert describe_holders(TWO, 1) == (
        "cluster.workers 2 x 1 GPU need 2, and 0 of 4 in the Ray cluster are free; the others are held by "
        "placement group sweep (2 GPU), job 07000000's 2 Engine (2 GPU)"
    )
    fakes.actors = [actor(f"A{number}", GPU=1.0) for number in range(9)]
    said = describe_holders(TWO, 1)
    assert said is not None
    assert said.endswith("job 07000000's 1 A3 (1 GPU), 5 others")


def test_a_ray_without_a_dashboard_does_not_tell_all(fakes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(holders, "list_actors", away)
    fakes.free = {"CPU": 1.0, "GPU": 4.0}
    assert describe_holders(TWO, 1) == (
        "cluster.workers 2 x 1 CPU need 2, and 1 of 16 in the Ray cluster are free; the others are held by tasks, or "
        "actors that Ray does not list without its dashboard"
    )


def test_workers_that_have_their_place_lack_nothing(fakes: SimpleNamespace) -> None:
    fakes.free = {"CPU": 8.0, "GPU": 2.0}
    assert describe_holders(TWO, 1) is None
    fakes.free = {}
    fakes.groups = [{**OURS, "state": "CREATED"}]
    assert describe_holders(TWO, 1) is None
    # Others wait, too.
    fakes.groups += [group("PENDING", CPU=16.0)]
    assert describe_holders(TWO, 1) is None
