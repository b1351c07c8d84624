"""Early stopping, and the model of the best evaluation: which steps are trained, and whose weights are written."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clm_dist.train.loop
from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError, StorageError
from clm_dist.files.blocks import Manifest
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.eval_losses import read_eval_losses
from clm_dist.files.markers import BestEval
from clm_dist.files.result import Result, build_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.progress import Silent
from clm_dist.report.table import rows
from clm_dist.train.accept import accept_export
from clm_dist.train.checkpointing.saver import write_safetensors
from clm_dist.train.ray.cluster import Cluster
from clm_dist.train.ray.driver import train as train_with_ray
from clm_dist.train.ray.resume import check_best
from tests.conftest import MakeJob
from tests.support.runs import checkpoints_of, evals_of, metrics_of, saved_steps
from tests.support.training import SOME_SLOW, forget_after, train_one, train_several
from tests.support.workers import run_workers

# The rate rises until training diverges. Eval losses after the steps 1 to 8: 5.70, 5.10, 4.57, 5.07, 6.17, 6.91, 4.89,
# 11.20, so the third is the best and none of the five after it is better.
DIVERGES = (
    *("train.max_steps=8", "train.learning_rate=0.5", "train.schedule=constant", "train.warmup_steps=8"),
    *("eval.every=1", "checkpoint.every=1000"),
)
BEST, STOP_AFTER = 3, 2

Train = Callable[..., RunDir]


@pytest.fixture
def train(make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path) -> Train:
    """Trains a job that diverges in this process; the same run goes on."""

    def train(name: str, *settings: str) -> RunDir:
        job = make_job(*DIVERGES, *settings)
        run = RunDir(tmp_path / name)
        assert train_one(job, run, prepared(job)).status == "done"
        return run

    return train


def written(run: RunDir) -> bytes:
    """The weights of the model that a run of `train_one` has written."""
    return (run.root / "final.unverified" / "model.safetensors").read_bytes()


def of_kind(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [record for record in metrics_of(run.metrics) if record["kind"] == kind]


def result_of(run: RunDir, job: JobConfig, store: Path) -> Result:
    return build_result(job, run, Manifest.read(store / "manifest.json"), "done")


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_the_model_of_the_best_evaluation_is_that_of_a_run_that_ends_there(
    strategy: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    settings = (*DIVERGES, f"cluster.strategy={strategy}", "cluster.workers=2")
    jobs = [make_job(*settings, "train.keep=best"), make_job(*settings, f"train.max_steps={BEST}")]
    kept, ended = RunDir(tmp_path / "kept"), RunDir(tmp_path / "ended")
    run_workers(train_several, 2, jobs, [kept.root, ended.root], prepared(jobs[0]))
    assert written(kept) == written(ended)
    assert [(end["step"], end["kept"], end["stopped_early"]) for end in of_kind(kept, "final")] == [(8, BEST, False)]
    # Evaluated again as it was written, and by the same arithmetic.
    evaluated = next(record for record in of_kind(kept, "eval") if record["step"] == BEST)
    (verified,) = of_kind(kept, "verify")
    assert verified["step"] == BEST
    assert verified["loss"] == pytest.approx(evaluated["loss"], rel=1e-6)
    # Every rank computed the loss that the driver wrote, to the last bit.
    markers = checkpoints_of(kept).readable().values()
    assert [marker.state.best for marker in markers if marker.state.step == BEST] == [
        BestEval(BEST, evaluated["loss"], last=BEST)
    ]


def test_the_result_says_which_model_was_kept(
    train: Train, make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    job = make_job(*DIVERGES, "train.keep=best")
    run = train("run", "train.keep=best", "checkpoint.every=4", "checkpoint.keep=9")
    result = result_of(run, job, prepared(job))
    losses = [evaluation["loss"] for evaluation in result["evals"]]
    # What the model is compared by with that of another run.
    kept = read_eval_losses(run)
    assert kept is not None
    assert kept[:, 0].sum() / kept[:, 1].sum() == pytest.approx(losses[BEST - 1], rel=1e-12)
    forget_after(run, 4)
    train("run", "train.keep=best", "checkpoint.every=4", "checkpoint.keep=9")
    assert np.array_equal(read_eval_losses(run), kept)  # type: ignore[arg-type]
    assert result["final"] == result["evals"][BEST - 1]
    assert min(losses) == losses[BEST - 1]
    assert (result["keep"], result["stopped_early"], result["train"]["steps"]) == ("best", False, 8)
    names = [cells[0] for cells in rows(result)]
    assert [name for name in names if "final" in name] == [names[BEST]] != ["final"]


def test_training_ends_after_evaluations_that_are_no_better(
    train: Train, make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    job = make_job(*DIVERGES)
    last, best = (train(keep, f"train.keep={keep}", f"train.stop_after={STOP_AFTER}") for keep in ("last", "best"))
    for run in (last, best):
        assert [record["step"] for record in of_kind(run, "step")] == [1, 2, 3, 4, 5]
        assert result_of(run, job, prepared(job))["stopped_early"]
        assert saved_steps(run)[-1] == 5
    assert written(last) == written(train("ended", "train.max_steps=5"))
    assert written(best) == written(train("kept", f"train.max_steps={BEST}"))
    # Five are worse than the third.
    assert not of_kind(train("on", "train.stop_after=6"), "final")[0]["stopped_early"]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_that_is_resumed_keeps_and_ends_as_if_it_had_never_stopped(step: int, train: Train) -> None:
    settings = ("train.keep=best", f"train.stop_after={STOP_AFTER}", "checkpoint.every=1", "checkpoint.keep=9")
    run = train("run", *settings)
    weights, evals = written(run), evals_of(run.metrics)
    forget_after(run, step)
    train("run", *settings)
    assert of_kind(run, "start")[-1]["step"] == step
    assert written(run) == weights
    assert evals_of(run.metrics) == evals
    assert of_kind(run, "final")[-1] == {"kind": "final", "step": 5, "kept": BEST, "stopped_early": True}


def test_the_best_is_saved_and_stays_whatever_is_due(train: Train) -> None:
    run = train("run", "train.keep=best", "checkpoint.every=3", "checkpoint.keep=2")
    # 3 is the best, 6 and 8 are due.
    assert saved_steps(run) == [3, 6, 8]
    # Without it, no evaluation saves.
    assert saved_steps(train("last", "checkpoint.every=3", "checkpoint.keep=9")) == [3, 6, 8]
    assert saved_steps(train("all", "train.keep=best", "checkpoint.every=8", "checkpoint.keep=9")) == [1, 2, 3, 8]


def test_a_best_evaluation_that_a_stop_interrupted_is_made_and_kept(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(*DIVERGES, "train.keep=best")
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert train_one(job, whole, prepared(job)).status == "done"
    evaluating = clm_dist.train.loop._Loop._evaluating

    def ask(self: Any, num_done: int) -> None:
        if self.step == BEST:
            cut.stop.touch()
            self.reporter.looked = 0.0
        evaluating(self, num_done)

    with monkeypatch.context() as patched:
        patched.setattr(clm_dist.train.loop._Loop, "_evaluating", ask)
        outcome = train_one(job, cut, prepared(job))
        assert (outcome.status, outcome.step) == ("preempted", BEST)
    cut.stop.unlink()
    assert train_one(job, cut, prepared(job)).status == "done"
    assert evals_of(cut.metrics) == evals_of(whole.metrics)
    assert written(cut) == written(whole)


def test_a_best_that_cannot_be_saved_ends_the_run_which_goes_on_from_before(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(*DIVERGES, "train.keep=best")
    whole, failing = RunDir(tmp_path / "whole"), RunDir(tmp_path / "failing")
    assert train_one(job, whole, prepared(job)).status == "done"

    def write(file: Any, tensors: Any) -> tuple[int, str]:
        if f"step-{BEST:08d}" in file.name:
            raise OSError(28, "No space left on device")
        return write_safetensors(file, tensors)

    with monkeypatch.context() as patched:
        patched.setattr("clm_dist.train.checkpointing.saver.write_safetensors", write)
        outcome = train_one(job, failing, prepared(job))
    assert (outcome.status, outcome.try_again) == ("failed", True)
    assert f"checkpoint of step {BEST} could not be written" in str(outcome.error)
    assert "train.keep best needs it" in str(outcome.error)
    assert saved_steps(failing) == [1, 2]
    assert train_one(job, failing, prepared(job)).status == "done"
    assert written(failing) == written(whole)


def test_a_best_whose_checkpoint_is_damaged_is_not_replaced_by_another_model(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("run", "train.keep=best")
    (name,) = (name for name in checkpoints_of(run).committed() if f"-{BEST:08d}-" in name)
    with (run.checkpoints / name / "rank-00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    job = make_job(*DIVERGES, "train.keep=best")
    with pytest.raises(
        CheckpointError,
        match=rf"step {BEST}, which have the lowest .*rank-00000.safetensors is not as it was .* train.keep=last",
    ):
        train_one(job, run, prepared(job))
    assert written(train("run", "train.keep=last")) == written(train("ended", "train.max_steps=8"))


def test_a_run_that_did_not_save_its_best_cannot_keep_it(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train
) -> None:
    run = train("tiny", "checkpoint.every=4")
    job = make_job(*DIVERGES, "train.keep=best")
    with pytest.raises(CheckpointError, match=rf"of step {BEST}, is not in .*--resume --set train.keep=last"):
        train_with_ray(job, run, Store(prepared(job)), Cluster(0), Silent())


def test_of_equal_evaluations_the_first_is_the_best() -> None:
    best, found = None, []
    for step, loss in enumerate((2.0, 1.0, 1.0, math.nan, 0.5), 1):
        best = BestEval.with_next(best, step, loss)
        found.append((best.step, best.num_since))
    assert found == [(1, 0), (2, 0), (2, 1), (2, 2), (5, 0)]


def test_a_limit_that_a_resumed_run_is_given_holds_from_its_next_evaluation(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train
) -> None:
    settings = ("eval.every=2", "checkpoint.every=1", "checkpoint.keep=20")
    run = train("run", *settings)
    # The third step is not evaluated; those after 4 and 6 are worse than that after 4, the best.
    forget_after(run, 7)
    train("run", *settings, "train.stop_after=1")
    assert [record["step"] for record in evals_of(run.metrics)] == [0, 2, 4, 6, 8]
    accept_export(make_job(*DIVERGES), run)


def test_a_run_that_is_to_end_where_it_was_saved_is_evaluated_there(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train
) -> None:
    settings = ("eval.every=4", "checkpoint.every=1", "checkpoint.keep=20")
    run = train("run", *settings)
    forget_after(run, 7)
    train("run", *settings, "train.max_steps=7")
    assert [record["step"] for record in evals_of(run.metrics)] == [0, 4, 7]
    accept_export(make_job(*DIVERGES), run)
    assert written(train("ended", "train.max_steps=7")) == (run.final / "model.safetensors").read_bytes()


def test_a_run_that_falls_back_has_the_best_of_the_checkpoint_that_it_takes(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train
) -> None:
    settings = ("eval.every=2", "checkpoint.every=1", "checkpoint.keep=2", "train.keep=best", "train.max_steps=4")
    run = train("tiny", *settings)
    whole = written(run)
    # The fourth is the best; the second is that of the checkpoint after the third.
    assert saved_steps(run) == [2, 3, 4]
    newest = checkpoints_of(run).committed()[-1]
    (run.checkpoints / newest / "committed.json").write_text("{")
    job = make_job(*DIVERGES, *settings)
    state = [marker.state for marker in checkpoints_of(run).readable().values()][-1]
    assert state.best
    assert (state.step, state.best.step) == (3, 2)
    check_best(job, run, checkpoints_of(run), state)
    train("tiny", *settings)
    assert written(run) == whole


def without_best(run: RunDir) -> None:
    """Make the checkpoints those of a version that did not note it."""
    for marker in run.checkpoints.glob("*/committed.json"):
        content = json.loads(marker.read_text())
        del content["state"]["best"]
        marker.write_text(json.dumps(content))


@pytest.mark.parametrize("setting", ["train.keep=best", "train.stop_after=1"])
def test_checkpoints_that_do_not_know_the_best_are_refused_where_it_counts(
    setting: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train
) -> None:
    run = train("tiny", "checkpoint.every=4")
    without_best(run)
    job = make_job(*DIVERGES, setting)
    with pytest.raises(CheckpointError, match=r"is of an earlier version of clm-dist, which did not note the best"):
        train_with_ray(job, run, Store(prepared(job)), Cluster(0), Silent())
    # Otherwise such a run goes on; one that is at its end is evaluated again there.
    train("tiny", "checkpoint.every=4")
    assert [record["step"] for record in evals_of(run.metrics)] == list(range(9))


def test_a_storage_that_is_away_is_said_while_the_best_is_looked_for(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("tiny", "train.keep=best")
    job = make_job(*DIVERGES, "train.keep=best")

    def away(_: object) -> None:
        raise ConnectionError("the endpoint is away")

    monkeypatch.setattr(Checkpoints, "readable", away)
    with pytest.raises(StorageError, match="the endpoint is away"):
        train_with_ray(job, run, Store(prepared(job)), Cluster(0), Silent())


@pytest.mark.parametrize("keep", ["best", "last"])
def test_a_stop_while_the_written_model_is_evaluated_saves_nothing(
    keep: str, train: Train, make_job: MakeJob, prepared: Callable[[JobConfig], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("run", f"train.keep={keep}")
    weights, saved = written(run), saved_steps(run)
    evaluating = clm_dist.train.loop._Loop._evaluating

    def ask(self: Any, num_done: int) -> None:
        run.stop.touch()
        self.reporter.looked = 0.0
        evaluating(self, num_done)

    # Started again at its last step, the run has only its model to write.
    job = make_job(*DIVERGES, f"train.keep={keep}")
    with monkeypatch.context() as patched:
        patched.setattr(clm_dist.train.loop._Loop, "_evaluating", ask)
        outcome = train_one(job, run, prepared(job))
    assert (outcome.status, outcome.step) == ("preempted", 8)
    run.stop.unlink()
    assert saved_steps(run) == saved
    train("run", f"train.keep={keep}")
    assert written(run) == weights
