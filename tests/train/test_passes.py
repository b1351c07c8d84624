"""What a pass and a step count, and where dropout is on."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import MicroLoss
from clm_dist.train.batches import pass_seed
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss
from clm_dist.train.memory import PassTooLargeError
from clm_dist.train.model import load_model
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.fsdp2 import shard
from tests.conftest import MakeJob
from tests.support.runs import metrics_of
from tests.support.training import train_one

DROPOUT = ("model.config.resid_pdrop=0.5", "model.config.embd_pdrop=0.5", "model.config.attn_pdrop=0.5")


def test_every_pass_has_a_seed_of_its_own() -> None:
    places = list(itertools.product((0, 1, 42), range(4), range(4)))
    assert len({pass_seed(*place) for place in places}) == len(places)


def test_passes_are_seeded_by_step_and_micro_batch(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    seed_pass = Strategy.seed

    def record(self: Strategy, seed: int) -> None:
        seeds.append(seed)
        seed_pass(self, seed)
        drawn = torch.rand(8)
        torch.manual_seed(seed)
        assert torch.equal(drawn, torch.rand(8))

    monkeypatch.setattr(Strategy, "seed", record)
    job = make_job("train.max_steps=2", "train.seed=7")
    assert train_one(job, RunDir(tmp_path), prepared(job)).status == "done"
    expected = [pass_seed(7, step, micro_batch) for step in range(2) for micro_batch in range(2)]
    assert seeds == expected


def test_dropout_is_off_in_an_evaluation_alone(make_job: MakeJob, prepared: Callable[[JobConfig], Path]) -> None:
    plain, dropping = make_job(), make_job(*DROPOUT)
    store = prepared(plain)
    split = EvalSplit.of_store(store, plain.eval.micro_size)
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")

    def evaluate(job: JobConfig) -> list[MicroLoss]:
        model = load_model(job, tokenizer)
        model.train()
        parts = evaluate_micros(WithLoss(model), split, device=torch.device("cpu"))
        assert all(module.training for module in model.modules())
        return parts

    assert evaluate(dropping) == evaluate(plain)


def test_an_epoch_counts_the_tokens_of_its_blocks_once(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job("train.max_steps=null", "train.epochs=1", "batch.global_size=7", "checkpoint.every=1000")
    store = prepared(job)
    num_blocks = len(Blocks(store, "train"))
    assert num_blocks % 7, "no short batch"
    assert train_one(job, RunDir(tmp_path), store).status == "done"
    steps = [record for record in metrics_of(RunDir(tmp_path).metrics) if record["kind"] == "step"]
    assert sum(record["tokens"] for record in steps) == num_blocks * job.data.block_size
    for record in steps:
        assert record["tokens_per_s"] * record["seconds"] == pytest.approx(record["tokens"])


class _Block(nn.Linear):
    """The unit that FSDP2 shards."""


class _Model(nn.Module):
    _no_split_modules = ("_Block",)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(2, 2), _Block(2, 2)])


@pytest.mark.parametrize("bf16", [False, True])
def test_fsdp2_computes_in_bf16_and_reduces_in_fp32(bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sharded: list[tuple[str, Any]] = []

    def record(module: nn.Module, *, mesh: Any, mp_policy: Any = None) -> None:
        sharded.append((type(module).__name__, mp_policy))

    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", record)
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    shard(_Model(), torch.device("cpu"), 1, bf16=bf16)
    assert [name for name, _ in sharded] == ["_Block", "_Block", "_Model"]
    for _, policy in sharded:
        if bf16:
            assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        else:
            assert policy is None


def test_matrix_products_keep_all_bits_unless_the_job_says_otherwise(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    for precision, kept in (("tf32", "high"), ("fp32", "highest")):
        job = make_job("train.max_steps=1", f"train.precision={precision}")
        assert train_one(job, RunDir(tmp_path / precision), prepared(job)).status == "done"
        assert torch.get_float32_matmul_precision() == kept


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.parametrize("evaluating", [False, True])
def test_too_little_memory_is_said_of_the_pass_that_it_was_too_little_for(
    evaluating: bool,
    error: Exception,
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = WithLoss.forward

    def too_large(self: WithLoss, *arguments: Any, **options: Any) -> Any:
        if len(arguments[0]) > 2 and torch.is_grad_enabled() != evaluating:
            raise error
        return forward(self, *arguments, **options)

    monkeypatch.setattr(WithLoss, "forward", too_large)
    job = make_job("train.max_steps=1", "eval.micro_size=3")
    message = "eval.micro_size: an evaluation of 3 blocks at a time does not fit" if evaluating else str(error)
    with pytest.raises(ConfigError if evaluating else PassTooLargeError, match=re.escape(message)):
        train_one(job, RunDir(tmp_path), prepared(job))
