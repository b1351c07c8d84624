"""The search for the blocks of a pass, where `batch.micro_size` is `auto`."""

import json
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clm_dist.config.job import BatchConfig, JobConfig
from clm_dist.config.load import job_text
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.train import micro_search
from clm_dist.train.forward import WithLoss
from clm_dist.train.heartbeat import Beat, Heart, read_beats
from clm_dist.train.memory import PassTooLargeError
from clm_dist.train.micro_search import Found, Searched, next_size
from clm_dist.train.micro_size import halve_micro_size, with_blocks_that_fit, write_blocks_that_fit
from clm_dist.train.rehearsal import Rehearsal, Tried
from tests.conftest import MakeJob
from tests.support.runs import metrics_of
from tests.support.training import SOME_SLOW, forget_after, losses_of, train_one
from tests.support.workers import run_workers

AUTO = ("batch.micro_size=auto", "batch.global_size=12", "train.max_steps=6", "checkpoint.every=3", "checkpoint.keep=9")
DROPOUT = ("model.config.resid_pdrop=0.2", "model.config.attn_pdrop=0.2")


def search(
    memory_of: Callable[[int], float], *, most: int, device: float = 1000, speed_of: Any = None, on_gpu: bool = True
) -> Found:
    """What is tried where a step of so many blocks takes so much memory, of a device that has 1,000."""
    found: Found = {}
    size: int | None = 1
    while size is not None:
        memory = memory_of(size)
        assert on_gpu or memory <= device, "on a CPU the process is killed"
        fits = memory <= device
        found[size] = Tried(speed_of(size) if speed_of else 1.0, int(memory)) if fits else None
        size = next_size(found, most, 0.9 * device, on_gpu=on_gpu)
    return found


def searched(found: Found, *, in_step: int = 10_000, on_gpu: bool = True) -> Searched:
    return Searched(found, in_step, 900, on_gpu)


@pytest.mark.parametrize("each", [0.5, 3, 20, 120, 500])
def test_on_a_gpu_the_most_that_fit_are_found_with_few_tries(each: float) -> None:
    found = search(lambda size: 100 + each * size, most=10_000)
    # A tenth of the memory is left.
    largest = max(1, int(800 / each))
    best = searched(found).best
    assert best is not None
    assert largest - largest // 8 <= best <= largest
    assert len(found) <= 5
    # Nothing is known of a second block before it is tried.
    assert (None in found.values()) == (largest == 1)


def test_no_more_are_tried_than_a_step_has() -> None:
    found = search(lambda size: 100 + size, most=24)
    assert list(found) == [1, 2, 24]
    assert list(search(lambda size: 100 + size, most=1)) == [1]


def test_what_does_not_fit_is_halved() -> None:
    # Above 20 blocks it takes a buffer that the first tries do not show.
    found = search(lambda size: 100 + size + (900 if size > 20 else 0), most=1000)
    assert found[32] is None
    best = searched(found).best
    assert best is not None and 18 <= best <= 20
    assert len(found) <= 8
    nothing = search(lambda size: 2000, most=8)
    assert (nothing, searched(nothing).best) == ({1: None}, None)


def test_on_a_cpu_the_fastest_is_taken_and_no_memory_risked() -> None:
    speeds = {1: 10.0, 2: 18.0, 4: 25.0, 8: 25.5, 16: 40.0}
    found = search(lambda size: size, most=100, speed_of=speeds.__getitem__, on_gpu=False)
    # It does not look for what comes after a step that is no faster.
    assert list(found) == [1, 2, 4, 8]
    assert searched(found, on_gpu=False).best == 8
    slower = search(lambda size: size, most=100, speed_of=lambda size: -abs(size - 4), on_gpu=False)
    assert (list(slower), searched(slower, on_gpu=False).best) == ([1, 2, 4, 8], 4)
    risky = search(lambda size: 100 + 100 * size, most=100, speed_of=float, on_gpu=False)
    assert list(risky) == [1, 2, 4]
    assert searched(risky, on_gpu=False).describe(4).endswith("4 blocks, as many as memory allows; tried 1, 2, 4")


def test_the_line_says_why() -> None:
    def line(sizes: dict[int, bool], size: int, **options: Any) -> str:
        found = {each: Tried(float(each), each) if fits else None for each, fits in sizes.items()}
        return searched(found, **options).describe(size).removeprefix("batch.micro_size: ")

    fit = {1: True, 2: True, 32: False, 17: True}
    assert line(fit, 17) == "a pass has 17 blocks, the most that fit; tried 1, 2, 32 (does not fit), 17"
    assert line({1: True, 2: True}, 2, in_step=2) == "a pass has 2 blocks, all that a worker has in a step; tried 1, 2"
    even = "a pass has 6 blocks, of 8, the fastest, to have as few passes; tried 1, 2, 4, 8"
    assert line({1: True, 2: True, 4: True, 8: True}, 6, on_gpu=False) == even
    assert line({1: True, 2: False}, 1) == "a pass has 1 block, the most that fit; tried 1, 2 (does not fit)"


def test_a_step_has_no_more_passes_than_needed_and_they_are_even() -> None:
    batch = BatchConfig(global_size=24, micro_size="auto")
    # One pass of each of two workers; two of 6; three of 4, where five fit; and so on.
    assert [batch.even_micro_size(most, 2) for most in (12, 8, 6, 5, 4, 3, 2, 1)] == [12, 6, 6, 4, 4, 3, 2, 1]
    for most in range(1, 13):
        even = batch.even_micro_size(most, 2)
        passes = [batch.model_copy(update={"micro_size": size}).passes_per_step(2) for size in (most, even)]
        assert even <= most
        assert passes[0] == passes[1]


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


def test_a_search_may_take_as_long_as_a_start(tmp_path: Path) -> None:
    heart = Heart(tmp_path, 0, "", 10.0)
    try:
        heart.starts("trying passes of 4 blocks")
        assert _beat(tmp_path, "trying passes of 4 blocks").is_starting
        heart.at(1, "pass 1 of 2")
        assert not _beat(tmp_path, "pass 1 of 2").is_starting
    finally:
        heart.stop()


def _beat(directory: Path, doing: str) -> Beat:
    while True:
        for beat in read_beats(directory):
            if beat.doing == doing:
                return beat
        time.sleep(0.05)


def test_it_needs_a_block_for_every_worker(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"batch\.global_size 2 is 2 x 1 blocks, too few for 3 workers; set"):
        make_job("batch.micro_size=auto", "batch.global_size=2", "cluster.workers=3")
    with pytest.raises(ConfigError, match=r"batch\.micro_size"):
        make_job("batch.micro_size=largest")
