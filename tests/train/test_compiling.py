"""Passes that are compiled: they compute the same, a resume is exact, and what cannot be compiled runs as before."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from clm_dist.config.job import JobConfig
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import flops_per_token
from clm_dist.train import compiling, forward
from clm_dist.train.compile_cost import is_worth_it
from clm_dist.train.loss import next_token_loss
from tests.conftest import MakeJob
from tests.support.architectures import ARCHITECTURES
from tests.support.runs import metrics_of
from tests.support.training import STRATEGIES, leave_only, losses_of, train_one, train_several
from tests.support.workers import run_workers

SETTINGS = ("train.epochs=9", "train.max_steps=8", "checkpoint.every=4", "checkpoint.keep=9")
DROPOUT = ("model.config.resid_pdrop=0.1", "model.config.embd_pdrop=0.1")


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(directory))


def start_of(run: RunDir) -> dict[str, Any]:
    return [record for record in metrics_of(run.metrics) if record["kind"] == "start"][-1]


def evals_of(run: RunDir) -> list[float]:
    return [record["loss"] for record in metrics_of(run.metrics) if record["kind"] == "eval"]


def blocks_of(run: RunDir) -> list[int]:
    return [record["blocks"] for record in metrics_of(run.metrics) if record["kind"] == "step"]


def weights_of(run: RunDir) -> bytes:
    return (run.root / "final.unverified" / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        *((strategy, ()) for strategy in STRATEGIES if strategy != "zero1"),
        ("zero2", DROPOUT),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("zero1", ()), ("ddp", DROPOUT), ("fsdp2", DROPOUT))
        ),
        ("ddp", ("train.precision=bf16", "train.gradient_checkpointing=true", "data.document_mask=true")),
        ("fsdp2", ("train.precision=bf16", "train.gradient_checkpointing=true", "data.document_mask=true")),
    ],
)
def test_a_compiled_run_is_the_same_run_and_its_resume_is_exact(
    strategy: str, settings: tuple[str, ...], make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    cluster = (f"cluster.strategy={strategy}", "cluster.workers=2", "batch.micro_size=2", *settings)
    plain, compiled = (make_job(*SETTINGS, *cluster, f"train.compile={on}") for on in ("false", "true"))
    store = prepared(plain)
    runs = [RunDir(tmp_path / name) for name in ("plain", "compiled", "resumed")]
    run_workers(train_several, 2, [plain, compiled], [run.root for run in runs[:2]], store)
    leave_only(runs[1], step=4, target=runs[2])
    run_workers(train_several, 2, [compiled], [runs[2].root], store)

    rounded = 1e-1 if settings == DROPOUT else 1e-2 if settings else 1e-5
    np.testing.assert_allclose(losses_of(runs[1].root), losses_of(runs[0].root), rtol=rounded)
    assert blocks_of(runs[0]) == blocks_of(runs[1]) == blocks_of(runs[2])
    # Evaluations are not compiled.
    assert evals_of(runs[0])[0] == evals_of(runs[1])[0]
    assert losses_of(runs[1].root) == losses_of(runs[2].root)
    assert weights_of(runs[1]) == weights_of(runs[2])
    start = start_of(runs[1])
    if strategy == "zero3":
        assert start["note"] == "Passes are not compiled: ZeRO-3 gathers weights inside of a pass"
    else:
        assert start["compiled"]
        assert start["note"].startswith("Passes of training are compiled, in ")
        assert "last bit" not in start["note"]


@pytest.mark.slow
def test_every_pass_of_training_is_compiled_in_one_shape_and_a_resume_is_exact(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes of 4 blocks a step; the last step of an epoch is short."""
    job = make_job(*SETTINGS, "train.max_steps=null", "train.epochs=1", "train.compile=true", *DROPOUT)
    store = prepared(job)
    num_steps, last = divmod(len(Blocks(store, "train")), 8)
    assert last
    shapes: list[tuple[bool, int]] = []
    compile_it = forward.compile_function

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = compile_it(function)

        def call(ids_BT: Tensor, end: int | None) -> Any:
            # Else the gradient of an embedding is added up in another order each time.
            assert torch.are_deterministic_algorithms_enabled()
            shapes.append((torch.is_grad_enabled(), len(ids_BT)))
            return compiled(ids_BT, end)

        return call

    monkeypatch.setattr(forward, "compile_function", watched)
    run = RunDir(tmp_path)
    assert train_one(job, run, store).status == "done"
    assert start_of(run)["compiled"], start_of(run)["note"]
    # Four are tried before the first step.
    assert shapes == [(True, 4)] * (4 + 2 * (num_steps + 1))
    monkeypatch.setattr(forward, "compile_function", compile_it)

    # With dropout too, in another process as well, a resume is exact.
    resumed = RunDir(tmp_path / "resumed")
    leave_only(run, step=4, target=resumed)
    run_workers(train_several, 1, [job], [resumed.root], store)
    assert losses_of(resumed.root) == losses_of(run.root)
    assert weights_of(resumed) == weights_of(run)


def compile_with(compiler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "compile_function", compiler)
    monkeypatch.setattr(compiling, "_compile_something", lambda device: None)


class Fake:
    """A compiler that changes what a function computes."""

    def __init__(self, change: Callable[[Tensor, int], Tensor]) -> None:
        self.change, self.calls = change, 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            losses, router_loss = function(*arguments)
            self.calls += 1
            return self.change(losses, self.calls), router_loss

        return call


def fail(losses: Tensor, call: int) -> Tensor:
    raise RuntimeError("no compiler is installed\nand more")


@pytest.mark.parametrize(
    ("on", "change", "compiled", "note"),
    [
        ("true", fail, False, "Passes are not compiled: RuntimeError, no compiler is installed"),
        ("true", lambda losses, _: losses * 1.01, False, "Passes are not compiled: compiled, the first has a loss of"),
        ("true", lambda losses, _: 2 * losses.detach() - losses, False, "or they differ in parts"),
        ("true", lambda losses, _: losses.roll(1), False, "or they differ in parts"),
        ("true", lambda losses, call: losses * (1 + call * 1e-6), True, "They are not the same to the last bit each"),
        ("auto", lambda losses, call: losses * (1 + call * 1e-6), False, "train.compile: true takes that"),
        ("auto", lambda losses, _: losses, True, "Passes of training are compiled, in 0 s"),
    ],
)
def test_what_cannot_be_trusted_is_not_compiled(
    on: str,
    change: Callable[[Tensor, int], Tensor],
    compiled: bool,
    note: str,
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compile_with(Fake(change), monkeypatch)
    monkeypatch.setattr(compiling, "is_worth_it", lambda seconds: True)
    job, plain = (make_job("train.max_steps=2", f"train.compile={value}") for value in (on, "false"))
    store = prepared(job)
    runs = [RunDir(tmp_path / name) for name in ("compiled", "plain")]
    for one, run in zip((job, plain), runs, strict=True):
        assert train_one(one, run, store).status == "done"
    start = start_of(runs[0])
    assert start["compiled"] is compiled
    assert note in start["note"]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not compiled:
        assert losses_of(runs[0].root) == losses_of(runs[1].root)


def train_where_rank_1_cannot(rank: int, world_size: int, job: JobConfig, run: RunDir, store: Path) -> str:
    if rank == 1:
        compiling.compile_function = no_compiler  # type: ignore[attr-defined]
    assert train_one(job, run, store, rank, world_size).status == "done"
    return str(start_of(run)["note"])


def no_compiler(function: Callable[..., Any]) -> Any:
    raise OSError("no compiler on this node")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp2"])
def test_a_worker_that_cannot_compile_holds_up_no_other(
    strategy: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    # With buffers, which DistributedDataParallel exchanges in a forward pass.
    llama = f"model.config={json.dumps({'model_type': 'llama', **ARCHITECTURES['llama']})}"
    job = make_job(
        llama, "train.max_steps=1", "train.compile=true", f"cluster.strategy={strategy}", "cluster.workers=2"
    )
    notes = run_workers(train_where_rank_1_cannot, 2, job, RunDir(tmp_path), prepared(job))
    assert notes == ["Passes are not compiled: another worker cannot compile them"] * 2


def test_a_model_that_breaks_the_graph_runs_as_before(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(logits_BTV: Tensor, ids_BT: Tensor, end: int | None = None) -> Tensor:
        losses = next_token_loss(logits_BTV, ids_BT, end)
        return losses if losses.sum().item() > 0 else losses * 0

    monkeypatch.setattr(forward, "next_token_loss", breaking)
    job = make_job("train.max_steps=1", "train.compile=true")
    assert train_one(job, RunDir(tmp_path), prepared(job)).status == "done"
    note = start_of(RunDir(tmp_path))["note"]
    assert note.startswith("Passes are not compiled: ")
    assert "data-dependent" in note
    assert len(note.splitlines()) == 1


def test_a_resume_says_that_passes_are_computed_otherwise(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_with(lambda function: function, monkeypatch)
    run = RunDir(tmp_path)
    for steps, on, note in (
        (2, "false", None),
        (4, "true", ". Until step 2 passes were not compiled, which rounds otherwise"),
        (6, "false", "Until step 4 passes were compiled, which rounds otherwise"),
    ):
        job = make_job(f"train.max_steps={steps}", f"train.compile={on}", "train.schedule=constant")
        assert train_one(job, run, prepared(job)).status == "done"
        assert str(start_of(run)["note"]).endswith(str(note))


def test_auto_compiles_long_runs_on_known_gpus_alone() -> None:
    # DistilGPT2's shape, 256 x 128 tokens a step, on an H200: 30 s are repaid after about 300 steps.
    a_step = 256 * 128 * flops_per_token(82_000_000, 6, 768, 128) / 989e12
    assert not is_worth_it(200 * a_step)
    assert is_worth_it(400 * a_step)
    assert not is_worth_it(None)


def test_auto_is_decided_by_all_ranks_together(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "is_worth_it", lambda seconds: True)
    asked: list[bool] = []

    def any_rank(found: bool) -> bool:
        asked.append(found)
        return True

    ids = np.zeros((1, 8), np.int64)
    job, strategy = make_job("train.compile=auto"), cast(Any, SimpleNamespace(any_rank=any_rank))
    assert compiling.try_compiling(job, strategy, ids, None, seconds_at_peak=1.0) == compiling.Compilation()
    assert asked == [False]
