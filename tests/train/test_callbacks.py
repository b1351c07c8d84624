"""What Ray Train's controller calls."""

from pathlib import Path

import pytest

from clm_dist.errors import RunError
from clm_dist.run_dir import RunDir
from clm_dist.train.callbacks import Group
from tests.runs import checkpoints_of


def test_workers_that_end_before_they_train_are_started_so_often_and_those_without_nodes_for_ever(
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path)
    group = Group(run, checkpoints_of(run), elastic=False, max_failures=2)

    def start(*, placed: bool, trains: bool = False) -> None:
        group.before_worker_group_start(None)
        if placed:
            assert group.before_init_train_context([]) == {}
        if trains:
            group.after_worker_group_training_start(object())
        group.before_controller_execute_failure_decision("RETRY")

    for _ in range(9):
        start(placed=False)
        start(placed=True)
        start(placed=True, trains=True)
    start(placed=True)
    start(placed=False)
    start(placed=True)
    with pytest.raises(RunError, match=r"workers end before they train, 3 times in a row; see that clm-dist is inst"):
        start(placed=True)
