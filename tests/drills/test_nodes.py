"""Nodes that are drained, lost and come back: what the run does, what it loses, and that no number changes."""

from pathlib import Path

import pytest

from clm_dist.files.atomic import read_json
from tests.drills import nodes
from tests.drills.nodes import NUM_STEPS, Command
from tests.support.runs import compare, saved_steps

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Two workers, with dropout."""
    return nodes.untouched(tmp_path_factory.mktemp("untouched") / "fixed", *nodes.FIXED)


@pytest.fixture(scope="module")
def untouched_elastic(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Two workers, without dropout."""
    return nodes.untouched(tmp_path_factory.mktemp("untouched") / "elastic", *nodes.UNTOUCHED_ELASTIC)


def test_a_drained_node_ends_a_run_with_a_checkpoint_and_the_same_command_goes_on(
    untouched: Command, tmp_path: Path
) -> None:
    seen = nodes.drain(tmp_path / "drain", grace_s=20)
    assert seen.codes == (75, 0)
    (_, (resumed, _)) = seen.command.starts()
    # What was on disk is not lost, nor any step after that: the checkpoint is that of the last.
    assert seen.step <= resumed < NUM_STEPS
    assert f"Resuming from the checkpoint of step {resumed}" in seen.command.said()
    assert compare(seen.command, untouched).same_weights


def test_elastic_workers_shrink_when_a_node_is_lost_and_grow_when_one_comes(
    untouched_elastic: Command, tmp_path: Path
) -> None:
    seen = nodes.shrink_and_grow(tmp_path / "elastic")
    assert seen.codes == (0,)
    starts = seen.command.starts()
    assert [workers for _, workers in starts] == [2, 1, 2]
    lost, grown = starts[1][0], starts[2][0]
    assert lost % 50 == 0
    # Before it grows it saves, wherever it is.
    assert lost < grown < NUM_STEPS
    found = compare(seen.command, untouched_elastic)
    assert found.same_blocks
    assert found.loss_deviation < 1e-5
    result = read_json(seen.command.run.result)
    assert (result["workers"], result["restarts"]) == (2, 2)
    assert saved_steps(seen.command.run)[-1] == NUM_STEPS


def test_a_run_waits_for_a_lost_node_and_goes_on_with_another(untouched: Command, tmp_path: Path) -> None:
    # Longer than the start of workers is waited for once.
    seen = nodes.lose(tmp_path / "lose", away_s=40)
    assert seen.codes == (0,)
    assert "Waiting for nodes: cluster.workers 2 x 1 CPU need 2, the Ray cluster has 1" in seen.command.said()
    # What Ray has to say of it stays in the log.
    assert "aylet" not in seen.command.said()
    (_, (resumed, _)) = seen.command.starts()
    # The last commit before the loss, or one that was about to come.
    assert seen.step - 50 < resumed
    assert resumed % 50 == 0
    assert compare(seen.command, untouched).same_weights


def test_elastic_workers_save_at_a_drain_and_go_on_with_the_rest(untouched_elastic: Command, tmp_path: Path) -> None:
    seen = nodes.drain_elastic(tmp_path / "drained", grace_s=10)
    assert seen.codes == (0,)
    starts = seen.command.starts()
    assert [workers for _, workers in starts] == [2, 1]
    assert seen.step <= starts[1][0] < NUM_STEPS
    found = compare(seen.command, untouched_elastic)
    assert found.same_blocks
    assert found.loss_deviation < 1e-5
