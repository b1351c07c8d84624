"""Every strategy computes what one plain process computes, and none can train without sharing gradients."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import MicroLoss, combine
from clm_dist.train.batches import BatchOrder
from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss
from clm_dist.train.loop import Outcome
from clm_dist.train.model import load_model
from clm_dist.train.strategies.ddp import DataParallel
from tests.conftest import MakeJob
from tests.support.runs import metrics_of, saved_steps
from tests.support.training import (
    SOME_SLOW,
    STRATEGIES,
    forget_after,
    leave_only,
    losses_of,
    train_one,
    train_one_here,
    train_several,
)
from tests.support.workers import run_workers

STEPS = 20
# An epoch has fewer than 20 steps, so its last, short batch is among them.
SETTINGS = ("train.max_steps=20", "train.epochs=9", "checkpoint.every=1000")


@pytest.fixture
def few_blocks(make_job: MakeJob, prepared: Any) -> Path:
    store: Path = prepared(make_job(*SETTINGS))
    return store


def plain_losses(job: JobConfig, store: Path) -> list[float]:
    """The losses of a loop in plain torch: the whole global batch in one pass, transformers' own loss."""
    blocks = Blocks(store, "train")
    order = BatchOrder.of_job(job, len(blocks))
    model = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.learning_rate, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = job.train.learning_rate * (1 - step / STEPS)
        ids = torch.from_numpy(blocks[order.global_batch(step)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    """The plain losses, computed once."""
    return {}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_curve_is_that_of_one_plain_process(
    strategy: str,
    world_size: int,
    make_job: MakeJob,
    few_blocks: Path,
    tmp_path: Path,
    reference: dict[str, list[float]],
) -> None:
    cluster = (f"cluster.workers={world_size}", f"cluster.strategy={strategy}")
    # Accumulation 1 and 4.
    jobs = [make_job(*SETTINGS, *cluster, f"batch.micro_size={8 // (world_size * passes)}") for passes in (1, 4)]
    assert [job.batch.passes_per_step(world_size) for job in jobs] == [1, 4]
    runs = [tmp_path / "1", tmp_path / "4"]
    if "plain" not in reference:
        reference["plain"] = plain_losses(jobs[0], few_blocks)
        sizes = [len(BatchOrder.of_job(jobs[0], len(Blocks(few_blocks, "train"))).global_batch(i)) for i in range(20)]
        assert min(sizes) < 8, "no short batch among the steps"
    outcomes = run_workers(train_several, world_size, jobs, runs, few_blocks)[0]
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    for run in runs:
        assert len(losses_of(run)) == STEPS
        np.testing.assert_allclose(losses_of(run), reference["plain"], rtol=1e-5)
        check_export(run, jobs[0], few_blocks)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "fsdp2"])
def test_ranks_without_a_micro_batch_left_change_no_evaluation(
    strategy: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    cluster = (f"cluster.strategy={strategy}", "cluster.workers=3", "batch.global_size=9", "batch.micro_size=3")
    job = make_job(*SETTINGS, *cluster, "eval.micro_size=2", "train.max_steps=2")
    split = EvalSplit.of_store(few_blocks, job.eval.micro_size)
    assert split.num_micros % 3 != 0
    run_workers(train_several, 3, [job], [tmp_path / "run"], few_blocks)
    model = load_model(job, AutoTokenizer.from_pretrained(few_blocks / "tokenizer"))
    parts = evaluate_micros(WithLoss(model), split, device=torch.device("cpu"))
    alone = combine(parts, step=0, epoch=0, num_micros=split.num_micros, num_tokens=split.num_tokens)
    baseline = next(r for r in metrics_of(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "eval")
    assert baseline["loss"] == alone.loss
    check_export(tmp_path / "run", job, few_blocks)


def check_export(run: Path, job: JobConfig, store: Path) -> None:
    """The written weights, read by plain transformers, evaluate to the loss of the trained model."""
    model = AutoModelForCausalLM.from_pretrained(run / "final.unverified")
    assert not any(p.is_meta for p in model.parameters())
    with safe_open(run / "final.unverified" / "model.safetensors", "pt") as file:
        # Tied to the embedding, so it is written once.
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # no mapping
    split = EvalSplit.of_store(store, job.eval.micro_size)
    parts: list[MicroLoss] = evaluate_micros(WithLoss(model), split, device=torch.device("cpu"))
    loss = combine(parts, step=0, epoch=0, num_micros=split.num_micros, num_tokens=split.num_tokens).loss
    records = metrics_of(run / "metrics.jsonl")
    for kind in ("eval", "verify"):
        assert [r for r in records if r["kind"] == kind][-1]["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "precision"), [*((strategy, "fp32") for strategy in STRATEGIES), ("zero2", "bf16"), ("zero3", "bf16")]
)
def test_resume_from_a_checkpoint_is_exact_with_dropout(
    strategy: str, precision: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    settings = (
        *SETTINGS,
        f"train.precision={precision}",
        "cluster.workers=2",
        f"cluster.strategy={strategy}",
        "batch.micro_size=2",
        "checkpoint.every=4",
        "checkpoint.keep=9",
        "model.config.resid_pdrop=0.2",
        "model.config.attn_pdrop=0.2",
    )
    job = make_job(*settings, "train.max_steps=8")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_workers(train_and_resume, 2, job, whole, cut, few_blocks)
    assert losses_of(cut) == losses_of(whole)
    assert (cut / "final.unverified" / "model.safetensors").read_bytes() == (
        whole / "final.unverified" / "model.safetensors"
    ).read_bytes()


def train_and_resume(rank: int, world_size: int, job: JobConfig, whole: Path, cut: Path, store: Path) -> None:
    """Train to the end; then once more from the checkpoint of step 4, in another run."""
    train_one(job, RunDir(whole), store, rank, world_size)
    if rank == 0:
        leave_only(RunDir(whole), step=4, target=RunDir(cut))
    torch.distributed.barrier()
    assert train_one(job, RunDir(cut), store, rank, world_size).status == "done"


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_resumes_with_other_numbers_of_workers_change_nothing(
    strategy: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    """2 -> 1 -> 3 -> 2 workers, three steps each, against 2 workers that nobody stopped; the last part sharded anew."""
    settings = (*SETTINGS, "train.max_steps=12", "checkpoint.every=3", "checkpoint.keep=9", "batch.global_size=6")
    job = make_job(*settings, "batch.micro_size=2", f"cluster.strategy={strategy}", "cluster.workers=2")
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    run_workers(train_one_here, 2, job, whole, few_blocks)
    leave_only(whole, step=3, target=cut)
    for step, world_size in ((3, 1), (6, 3), (9, 2)):
        forget_after(cut, step)
        job = job.model_copy(update={"cluster": job.cluster.model_copy(update={"workers": world_size})})
        assert run_workers(train_one_here, world_size, job, cut, few_blocks)[0].status == "done"
    starts = [(r["step"], r["workers"]) for r in metrics_of(cut.metrics) if r["kind"] == "start"]
    assert starts == [(0, 2), (3, 1), (6, 3), (9, 2)]
    np.testing.assert_allclose(losses_of(cut.root), losses_of(whole.root), rtol=1e-5)
    blocks = [[r["blocks"] for r in metrics_of(run.metrics) if r["kind"] == "step"] for run in (cut, whole)]
    assert blocks[0] == blocks[1]
    assert len(set(blocks[0])) == 12


@pytest.mark.slow
def test_resumes_with_other_strategies_change_nothing(make_job: MakeJob, few_blocks: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.max_steps=15", "checkpoint.every=3", "checkpoint.keep=9", "batch.micro_size=4")
    jobs = [make_job(*settings, "cluster.workers=2", f"cluster.strategy={strategy}") for strategy in STRATEGIES]
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    run_workers(train_one_here, 2, jobs[0], whole, few_blocks)
    leave_only(whole, step=3, target=cut)
    for step, job in zip((3, 6, 9, 12), jobs[1:], strict=True):
        forget_after(cut, step)
        assert run_workers(train_one_here, 2, job, cut, few_blocks)[0].status == "done"
    assert [r["strategy"] for r in metrics_of(cut.metrics) if r["kind"] == "start"] == list(STRATEGIES)
    np.testing.assert_allclose(losses_of(cut.root), losses_of(whole.root), rtol=1e-5)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
def test_the_comparison_of_loss_curves_sees_a_part_that_was_not_loaded(
    kind: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, "train.max_steps=12", "checkpoint.every=6", "checkpoint.keep=9")
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    run_workers(train_one_here, 1, job, whole, few_blocks)
    leave_only(whole, step=6, target=cut)
    run_workers(train_without, 1, kind, job, cut, few_blocks)
    assert max(abs(a / b - 1) for a, b in zip(losses_of(cut.root), losses_of(whole.root), strict=True)) > 1e-4


def train_without(rank: int, world_size: int, kind: str, job: JobConfig, run: RunDir, store: Path) -> Outcome:
    """Train with a strategy that forgets to show a part of what it holds; so the part is not loaded."""
    fragments = DataParallel.fragments

    def some(self: DataParallel) -> list[Fragment]:
        return [
            dataclasses.replace(f, tensors={k: t for k, t in f.tensors.items() if k != kind}) for f in fragments(self)
        ]

    DataParallel.fragments = some  # type: ignore[method-assign, assignment]
    return train_one(job, run, store, rank, world_size)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_bf16_trains_close_to_fp32(strategy: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path) -> None:
    cluster = ("cluster.workers=2", f"cluster.strategy={strategy}", "train.max_steps=6")
    jobs = [make_job(*SETTINGS, *cluster, f"train.precision={precision}") for precision in ("fp32", "bf16")]
    runs = [tmp_path / "fp32", tmp_path / "bf16"]
    outcomes = run_workers(train_several, 2, jobs, runs, few_blocks)[0]
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    fp32, bf16 = (losses_of(run) for run in runs)
    np.testing.assert_allclose(bf16, fp32, rtol=1e-3)
    assert bf16 != fp32
    evaluations = {r["kind"]: r["loss"] for r in metrics_of(runs[1] / "metrics.jsonl") if "perplexity" in r}
    assert evaluations["verify"] == pytest.approx(evaluations["eval"], rel=1e-3)


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        ("zero2", ("cluster.offload=optimizer",)),
        ("zero3", ("cluster.offload=all", "train.gradient_checkpointing=true")),
        ("fsdp2", ("cluster.offload=all", "train.gradient_checkpointing=true")),
        ("ddp", ("train.gradient_checkpointing=true", "train.max_grad_norm=null")),
    ],
)
def test_offload_and_recomputation_change_no_number(
    strategy: str, settings: tuple[str, ...], make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    cluster = ("cluster.workers=2", f"cluster.strategy={strategy}", "train.max_steps=6", "train.max_grad_norm=null")
    jobs = [make_job(*SETTINGS, *cluster), make_job(*SETTINGS, *cluster, *settings)]
    runs = [tmp_path / "plain", tmp_path / "changed"]
    outcomes = run_workers(train_several, 2, jobs, runs, few_blocks)[0]
    assert [outcome.status for outcome in outcomes] == ["done", "done"]
    np.testing.assert_allclose(losses_of(runs[1]), losses_of(runs[0]), rtol=1e-6)


def test_biases_and_norms_without_decay_are_the_same_parameters_under_every_strategy(
    make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    settings = (
        *SETTINGS,
        "cluster.workers=2",
        "train.max_steps=6",
        "train.weight_decay=0.9",
        "train.learning_rate=0.1",
    )
    jobs = [make_job(*settings, "cluster.strategy=ddp")]
    jobs += [
        make_job(*settings, "train.decay_bias_and_norm=false", f"cluster.strategy={strategy}")
        for strategy in ("ddp", "fsdp2", "zero1", "zero3")
    ]
    runs = [tmp_path / str(number) for number in range(len(jobs))]
    run_workers(train_several, 2, jobs, runs, few_blocks)
    plain, *chosen = (losses_of(run) for run in runs)
    # The setting changes the numbers, and every strategy by as much.
    assert abs(plain[-1] / chosen[0][-1] - 1) > 1e-3
    for losses in chosen[1:]:
        np.testing.assert_allclose(losses, chosen[0], rtol=1e-4)


def sabotaged(rank: int, world_size: int, kind: str, job: JobConfig, run: Path, store: Path) -> tuple[str, str]:
    """Train with ranks that keep their gradients to themselves; what the loop says, or what it raises."""
    SABOTAGES[kind]()
    try:
        outcome = train_one(job, RunDir(run), store, rank, world_size)
    except RunError as error:
        return "raised", str(error)
    return outcome.status, str(outcome.error)


def ddp_never_syncs() -> None:
    @contextlib.contextmanager
    def alone(self: DataParallel, *, last: bool) -> Iterator[Any]:
        with self.accelerator.no_sync(self.model):
            yield self.model

    DataParallel.one_pass = alone  # type: ignore[method-assign]


def ddp_stops_to_sync() -> None:
    """After the check before the first step, and another one."""
    one_pass = DataParallel.one_pass
    count = itertools.count()

    @contextlib.contextmanager
    def alone_later(self: DataParallel, *, last: bool) -> Iterator[Any]:
        with one_pass(self, last=last and next(count) < 3) as model:
            yield model

    DataParallel.one_pass = alone_later  # type: ignore[method-assign]


def ddp_has_a_norm_of_its_own() -> None:
    """One rank's gradient is not finite, so that it alone would leave the step out."""
    from accelerate import Accelerator

    clip = Accelerator.clip_grad_norm_

    def clip_here(self: Any, *arguments: Any, **options: Any) -> Any:
        norm = clip(self, *arguments, **options)
        return norm * math.nan if torch.distributed.get_rank() == 1 else norm

    Accelerator.clip_grad_norm_ = clip_here


def accelerate_without_cpu() -> None:
    from accelerate import Accelerator

    DataParallel._build_accelerator = lambda self: Accelerator()  # type: ignore[method-assign]


def zero_1_and_2_never_reduce() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    DeepSpeedZeroOptimizer.average_tensor = lambda *_, **__: None


def zero_3_never_reduces() -> None:
    from deepspeed.runtime.comm import coalesced_collectives

    coalesced_collectives._torch_reduce_scatter_fn = lambda *_, **__: None


def fsdp2_never_reduces() -> None:
    def own_part(output: Any, input: Any, op: Any = None, group: Any = None, async_op: bool = False) -> None:  # noqa: A002
        start = torch.distributed.get_rank(group) * output.numel()
        output.copy_(input.view(-1)[start : start + output.numel()].view_as(output))

    torch.distributed.reduce_scatter_single = own_part


def ddp_divides_gradients() -> None:
    """As Accelerate does for ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4."""
    DataParallel.backward = lambda self, loss: self.accelerator.backward(loss / 4)  # type: ignore[method-assign]


def weights_are_broken() -> None:
    prepare = DataParallel.prepare

    def prepare_broken(self: DataParallel, model: Any, make_optimizer: Any) -> None:
        model.model.transformer.wpe.weight.data[0, 0] = float("nan")
        prepare(self, model, make_optimizer)

    DataParallel.prepare = prepare_broken  # type: ignore[method-assign]


SABOTAGES: dict[str, Callable[[], None]] = {
    sabotage.__name__: sabotage
    for sabotage in (
        ddp_never_syncs,
        ddp_stops_to_sync,
        accelerate_without_cpu,
        ddp_divides_gradients,
        ddp_has_a_norm_of_its_own,
        zero_1_and_2_never_reduce,
        zero_3_never_reduces,
        fsdp2_never_reduces,
        weights_are_broken,
    )
}


@pytest.mark.parametrize(
    ("kind", "strategy", "message"),
    [
        ("ddp_never_syncs", "ddp", "the ranks do not share their gradients: one rank's"),
        ("ddp_stops_to_sync", "ddp", "the ranks do not share their gradients any more"),
        ("ddp_divides_gradients", "ddp", "in plain torch: something scales it"),
        ("ddp_has_a_norm_of_its_own", "ddp", "the ranks do not share their gradients any more"),
        ("accelerate_without_cpu", "ddp", "sees itself as process 0 of 1"),
        ("zero_1_and_2_never_reduce", "zero1", "the ranks do not share their gradients: one rank's"),
        ("zero_1_and_2_never_reduce", "zero2", "the ranks do not share their gradients: one rank's"),
        ("zero_3_never_reduces", "zero3", "the ranks do not share their gradients: one rank's"),
        ("fsdp2_never_reduces", "fsdp2", "the ranks do not share their gradients: one rank's"),
        ("weights_are_broken", "ddp", "the weights of the model are broken"),
    ],
)
def test_a_run_whose_ranks_do_not_share_gradients_is_impossible(
    kind: str, strategy: str, message: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, "cluster.workers=2", f"cluster.strategy={strategy}", "train.max_steps=3")
    for status, said in run_workers(sabotaged, 2, kind, job, tmp_path / "run", few_blocks):
        assert message in said
        assert status in ("failed", "raised")
    assert not saved_steps(RunDir(tmp_path / "run"))


@pytest.mark.parametrize("setting", ["checkpoint.every=1", "eval.every=1", "train.max_steps=1"])
def test_what_ranks_do_not_share_is_neither_saved_nor_evaluated(
    setting: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, "cluster.workers=2", "train.max_steps=3", setting)
    run = RunDir(tmp_path / "run")
    for _, said in run_workers(sabotaged, 2, "ddp_stops_to_sync", job, run.root, few_blocks):
        assert "the ranks do not share their gradients any more" in said
    assert not saved_steps(run)
    assert all(record["kind"] != "step" for record in metrics_of(run.metrics))


def kind_of_model(rank: int, world_size: int, job: JobConfig) -> str:
    from clm_dist.train.strategies.environment import set_up_worker

    set_up_worker(rank=rank, world_size=world_size, use_gpu=False, num_threads=1)
    strategy = DataParallel(job, rank=rank, world_size=world_size, use_gpu=False)
    strategy.prepare(WithLoss(torch.nn.Linear(2, 2)), lambda model: torch.optim.AdamW(model.parameters()))
    return type(strategy.model).__name__


@pytest.mark.parametrize(("world_size", "kind"), [(1, "WithLoss"), (2, "DistributedDataParallel")])
def test_one_worker_averages_its_gradients_with_nobody(world_size: int, kind: str, make_job: MakeJob) -> None:
    assert run_workers(kind_of_model, world_size, make_job(*SETTINGS)) == [kind] * world_size


LEFT_IN_A_SHELL = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    "FSDP_OFFLOAD_PARAMS": "true",
}


def test_what_a_shell_left_behind_changes_nothing(
    make_job: MakeJob, few_blocks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(*SETTINGS, "train.max_steps=3")
    train_one(job, RunDir(tmp_path / "clean"), few_blocks)
    for name, value in LEFT_IN_A_SHELL.items():
        monkeypatch.setenv(name, value)
    train_one(job, RunDir(tmp_path / "left"), few_blocks)
    assert losses_of(tmp_path / "left") == losses_of(tmp_path / "clean")
