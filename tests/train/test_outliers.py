"""Losses and gradients that are not finite, and losses that stand out: caught before any weight changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import clm_dist.train.forward
from clm_dist.config.job import JobConfig, TrainConfig
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import spike_limit
from clm_dist.train.batches import BatchOrder
from clm_dist.train.loop import Outcome
from clm_dist.train.loss import next_token_loss
from clm_dist.train.outliers import Outliers
from tests.conftest import MakeJob
from tests.support.runs import checkpoints_of, evals_of, metrics_of, saved_steps
from tests.support.training import SOME_SLOW, leave_only, losses_of, train_one
from tests.support.workers import run_workers

SETTINGS = ("train.max_steps=8", "train.epochs=9", "cluster.workers=2", "batch.micro_size=2", "checkpoint.every=2")


class _BrokenGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def spoil(store: Path, kind: str, wrong: dict[int, float]) -> None:
    """Make the losses of some blocks wrong in this process: `loss` (times a factor) or `gradient` (not finite)."""
    blocks = Blocks(store, "train")
    rows = {blocks[np.array([block])].tobytes(): factor for block, factor in wrong.items()}

    def spoiled(logits_BTV: Tensor, ids_BT: Tensor, end: int | None = None) -> Tensor:
        losses = next_token_loss(logits_BTV, ids_BT, end)
        factors = torch.tensor([rows.get(row.numpy().tobytes(), 1.0) for row in ids_BT])
        if not (factors != 1).any() or not torch.is_grad_enabled():
            return losses
        return _BrokenGradient.apply(losses) if kind == "gradient" else losses * factors[:, None]  # type: ignore[no-untyped-call]

    clm_dist.train.forward.next_token_loss = spoiled  # type: ignore[assignment, attr-defined]


Spoiled = tuple[JobConfig, Path, str, dict[int, float]]
"""A job, its run, and what `spoil` takes."""


def train_spoiled(rank: int, world_size: int, runs: list[Spoiled], store: Path) -> list[Outcome]:
    """The runs one after the other; one that comes twice goes on with what it left."""
    outcomes = []
    for job, run, kind, wrong in runs:
        spoil(store, kind, wrong)
        outcomes.append(train_one(job, RunDir(run), store, rank, world_size))
    return outcomes


def train_all(store: Path, *runs: Spoiled) -> list[Outcome]:
    """What two workers say of the runs; they must say the same."""
    first, second = run_workers(train_spoiled, 2, list(runs), store)
    assert first == second
    return list(first)


@pytest.fixture
def store(make_job: MakeJob, prepared: Callable[[JobConfig], Path]) -> Path:
    return prepared(make_job(*SETTINGS))


def block_of(job: JobConfig, store: Path, step: int) -> int:
    """A block of a step (the first is 1) that rank 1 computes."""
    order = BatchOrder.of_job(job, len(Blocks(store, "train")))
    (_, micro) = order.micro_batches(order.global_batch(step - 1), 1, 2)
    return int(micro.blocks[-1])


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in metrics_of(run / "metrics.jsonl") if record["kind"] == kind]


NAN = float("nan")


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_a_step_that_is_not_finite_can_be_left_out(
    strategy: str, make_job: MakeJob, store: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, f"cluster.strategy={strategy}", "train.on_nan=skip", "train.max_steps=6")
    block = block_of(job, store, 5)
    runs: list[Spoiled] = [(job, tmp_path / kind, kind, {block: NAN}) for kind in ("loss", "gradient")]
    right: Spoiled = (job, tmp_path / "right", "loss", {})
    assert [outcome.status for outcome in train_all(store, *runs, right)] == ["done"] * 3
    for _, run, kind, _ in runs:
        assert [record["step"] for record in of_kind(run, "step")] == [1, 2, 3, 4, 6]
        # The step after it has the weights of the one before.
        assert losses_of(run)[:4] == losses_of(right[1])[:4]
        assert np.isfinite(losses_of(run)).all()
        (record,) = of_kind(run, "nonfinite")
        assert (record["step"], record["action"]) == (5, "skip")
        if kind == "loss":
            # Of the four blocks of two ranks the one with the wrong loss.
            assert (record["blocks"], record["loss"]) == ([block], "nan")
        assert block in record["blocks"]
        written = json.loads(RunDir(run).outlier(5).read_text())
        texts = {row["block"]: row["text"] for row in written["blocks"]}
        tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
        assert texts[block] == tokenizer.decode(Blocks(store, "train")[np.array([block])][0])
        # An update that was left out is none.
        state = [marker.state for marker in checkpoints_of(RunDir(run)).readable().values()][-1]
        assert (state.step, state.num_updates) == (6, 5)


def test_stop_names_the_blocks_and_so_does_the_same_command(make_job: MakeJob, store: Path, tmp_path: Path) -> None:
    job = make_job(*SETTINGS, "train.on_nan=stop")
    block = block_of(job, store, 5)
    run: Spoiled = (job, tmp_path / "run", "loss", {block: float("inf")})
    for outcome in train_all(store, run, run):
        assert outcome.status == "failed"
        assert outcome.error
        assert "the loss of step 5 is inf; the weights are still those of step 4. It was comp" in outcome.error
        assert f"on blocks {block}, whose text is in" in outcome.error
        assert str(RunDir(run[1]).outlier(5)) in outcome.error
    assert saved_steps(RunDir(run[1])) == [2, 4]


def test_rollback_goes_back_to_the_last_commit_and_leaves_out_the_steps_since(
    make_job: MakeJob, store: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, "train.on_nan=rollback", "checkpoint.every=3", "checkpoint.keep=9")
    run = RunDir(tmp_path / "run")
    (outcome,) = train_all(store, (job, run.root, "loss", {block_of(job, store, 5): NAN}))
    assert outcome.status == "done"
    (record,) = of_kind(run.root, "rollback")
    assert (record["step"], record["to"]) == (5, 3)
    # A commit of the first weights, so that there is always one; and one of the step from which it goes on.
    assert saved_steps(run) == [0, 3, 5, 6, 8]
    shares = {path.parent.name[5:13]: path.read_bytes() for path in run.checkpoints.glob("*/rank-00000.*")}
    assert shares["00000005"] == shares["00000003"] != shares["00000000"]
    assert [record["step"] for record in of_kind(run.root, "step")] == [1, 2, 3, 4, 6, 7, 8]


def test_a_run_that_is_killed_after_it_went_back_makes_the_evaluation_that_was_due(
    make_job: MakeJob, store: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "train.on_nan=rollback", "checkpoint.every=3", "checkpoint.keep=9", "eval.every=5")
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    job = make_job(*settings)
    wrong = {block_of(job, store, 5): NAN}
    train_all(store, (job, whole.root, "loss", wrong))
    leave_only(whole, step=5, target=cut)
    records = [record for record in metrics_of(whole.metrics) if (record["kind"], record["step"]) != ("eval", 5)]
    cut.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    train_all(store, (job, cut.root, "loss", wrong))
    assert of_kind(cut.root, "start")[-1]["step"] == 5
    evals = evals_of(whole.metrics)
    assert [record["step"] for record in evals] == [0, 5, 8]
    assert evals_of(cut.metrics) == evals


def test_a_run_that_only_leaves_out_steps_ends(make_job: MakeJob, store: Path, tmp_path: Path) -> None:
    # The first block must be right: with it the ranks try whether they share their gradients.
    everything = dict.fromkeys(range(1, len(Blocks(store, "train"))), NAN)
    settings = (*SETTINGS, "train.max_steps=20", "checkpoint.every=1000")
    runs: list[Spoiled] = [
        (make_job(*settings, f"train.on_nan={action}"), tmp_path / action, "loss", everything)
        for action in ("skip", "rollback")
    ]
    for outcome in train_all(store, *runs):
        assert outcome.status == "failed"
        assert outcome.error
        assert "and so were 10 before it, left out with train.on_nan=" in outcome.error


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_loss_that_stands_out_is_reported_and_skipped_if_asked(
    strategy: str, make_job: MakeJob, store: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, "train.max_steps=44", f"cluster.strategy={strategy}", "checkpoint.every=20")
    jobs = {
        action: make_job(*settings, "train.learning_rate=1e-5", f"train.on_spike={action}", "checkpoint.keep=9")
        for action in ("report", "skip")
    }
    block = block_of(jobs["skip"], store, 40)
    runs: list[Spoiled] = [(job, tmp_path / action, "loss", {block: 50.0}) for action, job in jobs.items()]
    assert [outcome.status for outcome in train_all(store, *runs)] == ["done", "done"]
    for action in jobs:
        (record,) = [record for record in of_kind(tmp_path / action, "spike") if record["step"] == 40]
        assert record["blocks"][0] == block
        assert (record["action"], record["loss"] > record["limit"]) == (action, True)
        steps = [record["step"] for record in of_kind(tmp_path / action, "step")]
        assert (40 in steps) == (action == "report")
    # What a loss is held against comes back with a checkpoint.
    cut = tmp_path / "cut"
    leave_only(RunDir(tmp_path / "skip"), step=20, target=RunDir(cut))
    train_all(store, (jobs["skip"], cut, "loss", {block: 50.0}))
    assert losses_of(cut) == losses_of(tmp_path / "skip")
    assert of_kind(cut, "spike") == of_kind(tmp_path / "skip", "spike")


def test_the_limit_of_a_loss() -> None:
    rng = np.random.default_rng(0)
    losses = list(3 + 0.1 * rng.standard_normal(128))
    assert spike_limit(losses) == pytest.approx(3.6, abs=0.1)
    # A spike among them, however high, hides no other.
    assert spike_limit([*losses[:-5], *[1e6] * 5]) == pytest.approx(3.6, abs=0.1)
    # Of normal noise one step in 10^9 stands out; a falling loss never does.
    assert sum(loss > spike_limit(losses) for loss in 3 + 0.1 * rng.standard_normal(100_000)) == 0
    assert spike_limit(losses[:31]) == np.inf
    assert spike_limit([2.0] * 100) == np.inf


@pytest.mark.parametrize(
    ("settings", "loss", "grad_norm", "drops", "kind", "action"),
    [
        ({}, 1.0, 1.0, False, None, "train"),
        ({}, NAN, NAN, True, "nonfinite", "stop"),
        ({"on_nan": "skip"}, 1.0, NAN, False, "nonfinite", "skip"),
        ({"precision": "fp16"}, 1.0, NAN, False, None, "train"),
        ({"on_nan": "rollback"}, float("inf"), 1.0, True, "nonfinite", "rollback"),
        ({}, 9.0, 1.0, False, "spike", "report"),
        ({"on_spike": "skip"}, 9.0, 1.0, True, "spike", "skip"),
    ],
)
def test_the_verdict_on_a_step(
    settings: dict[str, Any], loss: float, grad_norm: float, drops: bool, kind: str | None, action: str
) -> None:
    outliers = Outliers(TrainConfig(**settings))
    for number in range(64):
        outliers.judge(1.0 + number % 2 / 10, 1.0, outliers.limit())
    limit = outliers.limit()
    assert 1.1 < limit < 9.0
    assert outliers.drops(loss, limit) is drops
    verdict = outliers.judge(loss, grad_norm, limit)
    assert (verdict.kind, verdict.action) == (kind, action)
    assert outliers.num_left_out == (kind == "nonfinite")
