"""The blocks of a pass that a run finds and keeps, where `batch.micro_size` is `auto`."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.train import micro_search
from clm_dist.train.forward import WithLoss
from clm_dist.train.memory import PassTooLargeError, Peak
from clm_dist.train.micro_size import halve_micro_size, with_blocks_that_fit, write_blocks_that_fit
from clm_dist.train.rehearsal import Rehearsal, Tried
from clm_dist.train.strategies.ddp import DataParallel
from tests.conftest import MakeJob
from tests.support.runs import metrics_of
from tests.support.training import SOME_SLOW, forget_after, losses_of, train_one
from tests.support.workers import run_workers

AUTO = ("batch.micro_size=auto", "batch.global_size=12", "train.max_steps=6", "checkpoint.every=3", "checkpoint.keep=9")
DROPOUT = ("model.config.resid_pdrop=0.2", "model.config.attn_pdrop=0.2")


def train_found(rank: int, world_size: int, job: JobConfig, run: RunDir, same: RunDir, store: Path) -> None:
    train_one(job, run, store, rank, world_size)
    fits = json.loads(run.micro_size.read_text())["fits"]
    train_one(job.with_micro_size(fits), same, store, rank, world_size)
    torch.distributed.barrier()
    if rank == 0:
        forget_after(run, 3)
    torch.distributed.barrier()
    train_one(job, run, store, rank, world_size)


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_a_run_is_that_of_the_blocks_that_were_found_to_the_last_bit_and_keeps_them(
    strategy: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job(*AUTO, *DROPOUT, f"cluster.strategy={strategy}", "cluster.workers=2")
    run, same = RunDir(tmp_path / "run"), RunDir(tmp_path / "same")
    run_workers(train_found, 2, job, run, same, prepared(job))
    searched, resumed = [record for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert (searched["step"], resumed["step"]) == (0, 3)
    assert searched["micro_size"] == resumed["micro_size"] in (1, 2, 3, 6)
    assert f"a pass has {searched['micro_size']} block" in searched["note"]
    assert "; tried 1, 2" in searched["note"]
    # What was found is not looked for again.
    assert resumed["note"] is None
    assert losses_of(run.root)[-6:] == losses_of(same.root)
    weights = [(each.root / "final.unverified" / "model.safetensors").read_bytes() for each in (run, same)]
    assert weights[0] == weights[1]


def test_a_step_may_have_more_blocks_than_the_data(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_search, "_BETTER", 0.0)
    sizes: list[int] = []
    forward = WithLoss.forward

    def see(self: WithLoss, ids_BT: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(ids_BT))
        return forward(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(WithLoss, "forward", see)
    store = prepared(make_job())
    num_blocks = len(Blocks(store, "train"))
    job = make_job("batch.micro_size=auto", f"batch.global_size={2 * num_blocks}", "train.max_steps=1")
    run = RunDir(tmp_path / "run")
    assert train_one(job, run, store).status == "done"
    (start,) = [record for record in metrics_of(run.metrics) if record["kind"] == "start"]
    # Else there would be as many passes as the data goes into a step, most of them for nothing.
    assert start["note"].endswith(f", {2 * num_blocks}")
    assert max(sizes) == 2 * num_blocks


def test_what_updates_take_is_no_memory_of_a_pass(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_updates = 0
    update = DataParallel.step

    def count(self: DataParallel, *args: Any, **kwargs: Any) -> float:
        nonlocal num_updates
        num_updates += 1
        return update(self, *args, **kwargs)

    def reset(_: Peak) -> None:
        nonlocal num_updates
        num_updates = 0

    monkeypatch.setattr(DataParallel, "step", count)
    monkeypatch.setattr(Peak, "reset", reset)
    monkeypatch.setattr(Peak, "read", lambda _: num_updates)
    found: list[Tried | None] = []
    try_step = Rehearsal.try_step

    def keep(*given: Any) -> Tried | None:
        found.append(try_step(*given))
        return found[-1]

    monkeypatch.setattr(Rehearsal, "try_step", keep)
    job = make_job(*AUTO, "train.max_steps=1")
    assert train_one(job, RunDir(tmp_path / "run"), prepared(job)).status == "done"
    assert len(found) > 1
    assert {tried.memory_bytes for tried in found if tried} == {0}


def test_gradients_of_an_earlier_pass_are_there_where_a_step_has_several(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(micro_search, "_BETTER", 0.0)
    tried: list[tuple[int, int]] = []
    try_step = Rehearsal.try_step

    def see(self: Rehearsal, size: int, num_passes: int) -> Tried | None:
        tried.append((size, num_passes))
        return try_step(self, size, num_passes)

    monkeypatch.setattr(Rehearsal, "try_step", see)
    job = make_job("batch.micro_size=auto", "batch.global_size=8", "train.max_steps=1")
    assert train_one(job, RunDir(tmp_path / "even"), prepared(job)).status == "done"
    assert tried == [(1, 2), (2, 2), (4, 2), (8, 1)]
    # Two workers may have at most four of nine blocks in a pass, so one of them has two passes.
    tried.clear()
    job = make_job("batch.micro_size=auto", "batch.global_size=9", "train.max_steps=1", "cluster.workers=2")
    assert train_one(job, RunDir(tmp_path / "odd"), prepared(job)).status == "done"
    assert tried == [(1, 2), (2, 2), (4, 2)]


def test_a_pass_that_does_not_fit_is_tried_smaller_in_the_same_worker(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = WithLoss.forward

    def with_memory_for_three(self: WithLoss, ids_BT: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(ids_BT) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(WithLoss, "forward", with_memory_for_three)
    # The second size is faster, however this machine is loaded.
    monkeypatch.setattr("clm_dist.train.micro_search._BETTER", 0.0)
    job = make_job(*AUTO, "eval.micro_size=2")
    run = RunDir(tmp_path / "run")
    assert train_one(job, run, prepared(job)).status == "done"
    (start,) = [record for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert "tried 1, 2, 4 (does not fit), 3" in start["note"]
    assert start["micro_size"] <= 3


def fit_three(rank: int, world_size: int, job: JobConfig, run: RunDir, store: Path) -> None:
    """Train where a pass of more than three blocks ends in the middle of its backward pass."""
    forward = WithLoss.forward

    def fail(_: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def fail_in_backward(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        if len(output) > 3 and output.requires_grad:
            # All layers have their gradients by then.
            output.register_hook(fail)  # type: ignore[no-untyped-call]

    def with_memory_for_three(self: WithLoss, *args: Any, **kwargs: Any) -> Any:
        embedding = self.model.get_input_embeddings()  # type: ignore[operator]  # of transformers
        hook = embedding.register_forward_hook(fail_in_backward)
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    # In a process of its own.
    WithLoss.forward = with_memory_for_three  # type: ignore[method-assign]
    micro_search._BETTER = 0.0
    train_one(job, run, store)


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_a_pass_that_breaks_off_leaves_nothing_behind(
    strategy: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job(*AUTO, f"cluster.strategy={strategy}", "eval.micro_size=2")
    run = RunDir(tmp_path / "run")
    run_workers(fit_three, 1, job, run, prepared(job))
    (start,) = [record for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert "tried 1, 2, 4 (does not fit), 3" in start["note"]
    assert len(losses_of(run.root)) == 6


def test_a_model_that_does_not_fit_at_all_says_so(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rehearsal, "step", lambda *_: _raise_too_large())
    job = make_job(*AUTO)
    run = RunDir(tmp_path / "run")
    with pytest.raises(PassTooLargeError, match=r"^CUDA out of memory\. Tried to allocate 1 GiB$") as failed:
        train_one(job, run, prepared(job))
    save(job, run)
    # As it comes from another process.
    error = pickle.loads(pickle.dumps(failed.value))
    with pytest.raises(ConfigError, match=r"a pass of one block does not fit into memory; set train\.gradient"):
        halve_micro_size(run, error.blocks)


def _raise_too_large() -> float:
    raise PassTooLargeError("CUDA out of memory. Tried to allocate 1 GiB")


def save(job: JobConfig, run: RunDir) -> None:
    run.root.mkdir(exist_ok=True)
    run.job.write_text(job_text(job))


@pytest.mark.parametrize(("failed", "tried"), [(4, "tried 1, 2"), (2, "tried 1"), (3, "tried 1")])
def test_what_did_not_fit_is_not_tried_again(
    failed: int,
    tried: str,
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clm_dist.train.micro_search._BETTER", 0.0)
    job = make_job(*AUTO)
    run = RunDir(tmp_path / "run")
    save(job, run)
    halve_micro_size(run, failed)
    assert with_blocks_that_fit(job, run).batch.micro_size == "auto"
    assert train_one(job, run, prepared(job)).status == "done"
    (start,) = [record for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert start["note"].endswith(tried)


def test_what_was_found_is_of_a_pass_and_not_of_the_length_of_a_run(make_job: MakeJob, tmp_path: Path) -> None:
    job, run = make_job(*AUTO), RunDir(tmp_path / "run")
    save(job, run)
    run.micro_size.write_text(json.dumps({"of": "of another", "fits": 2}))
    assert with_blocks_that_fit(job, run) == job
    write_blocks_that_fit(job, run, 4, "CPU")
    same = (
        "cluster.cpus_per_worker=2",
        "train.epochs=9",
        "train.learning_rate=1e-4",
        "train.seed=7",
        "data.split=train",
        "eval.every=2",
    )
    for setting in same:
        assert with_blocks_that_fit(make_job(*AUTO, setting), run).batch.micro_size == 4
    for setting in ("train.precision=bf16", "data.block_size=16", "cluster.strategy=zero2", "model.config.n_embd=48"):
        assert with_blocks_that_fit(make_job(*AUTO, setting), run).batch.micro_size == "auto"


def test_what_was_found_is_of_a_device(make_job: MakeJob, tmp_path: Path) -> None:
    job, run = make_job(*AUTO), RunDir(tmp_path / "run")
    save(job, run)
    write_blocks_that_fit(job, run, 4, "CPU")
    assert with_blocks_that_fit(job, run, "CPU").batch.micro_size == 4
    assert with_blocks_that_fit(job, run, "NVIDIA H200").batch.micro_size == "auto"
    # What was halved since is less on any.
    halve_micro_size(run, None)
    assert with_blocks_that_fit(job, run, "NVIDIA H200").batch.micro_size == 2


def test_a_run_that_is_asked_to_stop_stops_in_the_search(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run = make_job(*AUTO), RunDir(tmp_path / "run")
    try_step = Rehearsal.try_step

    def stop(self: Rehearsal, size: int, num_passes: int) -> Tried | None:
        run.stop.touch()
        return try_step(self, size, num_passes)

    monkeypatch.setattr(Rehearsal, "try_step", stop)
    ended = train_one(job, run, prepared(job))
    assert (ended.status, ended.step) == ("preempted", 0)
    assert not run.micro_size.exists()
    run.stop.unlink()
    monkeypatch.undo()
    assert train_one(job, run, prepared(job)).status == "done"


def test_it_needs_a_block_for_every_worker(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_size 2 is 2 x 1 blocks, too few for 3 workers; set"):
        make_job("batch.micro_size=auto", "batch.global_size=2", "cluster.workers=3")
    with pytest.raises(ConfigError, match=r"batch\.micro_size"):
        make_job("batch.micro_size=largest")
