"""Fragments: any cut of the parameters is read from any other, and a save does not see what comes after it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import clm_dist.train.checkpointing.saver
import clm_dist.train.loop
from clm_dist.config.job import JobConfig
from clm_dist.errors import CheckpointError
from clm_dist.files.checkpoints import Checkpoints
from clm_dist.files.markers import Marker, TrainerState
from clm_dist.files.run_dir import RunDir
from clm_dist.train.checkpointing.fragments import Fragment, fetched, load_fragments
from clm_dist.train.checkpointing.saver import Saver, write_safetensors
from tests.conftest import MakeJob
from tests.support.runs import checkpoints_of, evals_of, metrics_of, saved_steps
from tests.support.training import losses_of, train_one

SIZES = {"wte": 1000, "bias": 3, "one": 1, "scale": 64}
STATE = TrainerState(1, 1, 1, "ddp", "blocks", global_size=8, seed=42)


def content(name: str) -> dict[str, Tensor]:
    """A parameter of which every element is another."""
    start = 10_000 * list(SIZES).index(name)
    weight = torch.arange(start, start + SIZES[name], dtype=torch.float32)
    return {"weight": weight, "exp_avg": -weight}


def cut(rng: np.random.Generator, num_ranks: int) -> list[list[Fragment]]:
    """The parameters, cut at random places; some ranks have nothing of some."""
    ranks: list[list[Fragment]] = [[] for _ in range(num_ranks)]
    for name, size in SIZES.items():
        places = np.sort(rng.integers(0, size + 1, num_ranks - 1))
        bounds = [0, *map(int, places), size]
        for rank, (begin, end) in enumerate(itertools.pairwise(bounds)):
            if begin < end:
                parts = {kind: tensor[begin:end].clone() for kind, tensor in content(name).items()}
                ranks[rank].append(Fragment(name, begin, parts))
    return ranks


def save(checkpoints: Checkpoints, ranks: list[list[Fragment]]) -> tuple[str, Marker]:
    shares = []
    for rank, fragments in enumerate(ranks):
        saver = Saver(checkpoints, rank, len(ranks))
        saver.begin("step-1", 1, fragments)
        saver.wait()
        saved = saver.take()
        assert saved
        assert saved.share, saved.error
        shares.append(saved.share)
    marker = Marker(STATE, tuple(shares))
    checkpoints.commit("step-1", marker, 2)
    return "step-1", checkpoints.read("step-1")


def load(checkpoints: Checkpoints, name: str, marker: Marker, fragments: list[Fragment]) -> None:
    with fetched(checkpoints, name, marker, fragments) as files:
        load_fragments(files, marker, fragments)


@pytest.mark.parametrize("seed", range(20))
def test_any_cut_is_read_from_any_other(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    checkpoints = Checkpoints(str(tmp_path))
    name, marker = save(checkpoints, cut(rng, int(rng.integers(1, 6))))
    for fragments in cut(rng, int(rng.integers(1, 6))):
        empty = [
            Fragment(f.parameter, f.start, {k: torch.full_like(t, torch.nan) for k, t in f.tensors.items()})
            for f in fragments
        ]
        load(checkpoints, name, marker, empty)
        for fragment in empty:
            for kind, tensor in fragment.tensors.items():
                assert torch.equal(tensor, content(fragment.parameter)[kind][fragment.start : fragment.stop])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7])
def test_what_all_ranks_hold_is_saved_once(num_ranks: int, tmp_path: Path) -> None:
    whole = [Fragment(name, 0, content(name), replicated=True) for name in SIZES]
    name, marker = save(Checkpoints(str(tmp_path)), [whole] * num_ranks)
    saved = sum(end - begin for share in marker.shares for begin, end in share.fragments.values())
    assert saved == sum(SIZES.values())
    # Each rank writes as much as the others, and most parameters are whole in one file.
    sizes = [sum(end - begin for begin, end in share.fragments.values()) for share in marker.shares]
    assert max(sizes) - min(sizes) <= 1
    assert sum(len(share.fragments) for share in marker.shares) < len(SIZES) + num_ranks
    again = [Fragment(f.parameter, 0, {k: torch.zeros_like(t) for k, t in f.tensors.items()}) for f in whole]
    load(Checkpoints(str(tmp_path)), name, marker, again)
    assert all(torch.equal(f.tensors["weight"], content(f.parameter)["weight"]) for f in again)


def test_a_part_that_no_file_has_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path))
    halves = [[Fragment("wte", 0, {"weight": torch.zeros(400)})], [Fragment("wte", 500, {"weight": torch.zeros(500)})]]
    name, marker = save(checkpoints, halves)
    for start, size in ((0, 1000), (450, 10), (0, 401), (999, 2)):
        with pytest.raises(CheckpointError, match=r"the elements \d+ to \d+ of wte are in no file"):
            load(checkpoints, name, marker, [Fragment("wte", start, {"weight": torch.zeros(size)})])
    with pytest.raises(CheckpointError, match=r"of other are in no file"):
        load(checkpoints, name, marker, [Fragment("other", 0, {"weight": torch.zeros(1)})])


def test_a_file_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(5_000_000, dtype=torch.float32),
        "ü": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "b": torch.tensor([True, False]),
        "c": torch.tensor([1, 2, 3]),
    }
    with (tmp_path / "x.safetensors").open("wb") as file:
        num_bytes, _ = write_safetensors(file, tensors)
    assert (tmp_path / "x.safetensors").stat().st_size == num_bytes
    read = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_a_save_is_of_the_moment_at_which_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that waits for the copy changes nothing in the file, though that is written later."""
    write = write_safetensors

    def write_late(file: Any, tensors: Any) -> tuple[int, str]:
        time.sleep(0.5)
        return write(file, tensors)

    monkeypatch.setattr(clm_dist.train.checkpointing.saver, "write_safetensors", write_late)
    weight = torch.zeros(1000)
    saver = Saver(Checkpoints(str(tmp_path)), 0, 1)
    for step in (1, 2):
        saver.begin(f"step-{step}", step, [Fragment("w", 0, {"weight": weight})])
        saver.await_copy()
        assert not saver.is_written()
        assert saver.take() is None
        weight += 1
        saver.wait()
        saved = saver.take()
        assert saved
        assert saved.seconds > 0.5
        # The training thread waited in `wait` only.
        assert saved.blocked > 0.3
    assert [float(load_file(path)["w:weight"][7]) for path in sorted(tmp_path.rglob("*.safetensors"))] == [0, 1]


def test_a_save_that_fails_says_why(tmp_path: Path) -> None:
    saver = Saver(Checkpoints(str(tmp_path / "x")), 0, 1)
    (tmp_path / "x").write_text("a file where the directory should be")
    saver.begin("step-1", 1, [Fragment("w", 0, {"weight": torch.zeros(3)})])
    saver.wait()
    saved = saver.take()
    assert saved
    assert saved.share is None
    assert "cannot write" in str(saved.error)


Train = Callable[..., RunDir]


@pytest.fixture
def trained(make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path) -> Train:
    """Trains the tiny job to a step in this process; the same run goes on."""

    def train(*settings: str, name: str = "run") -> RunDir:
        job = make_job("checkpoint.every=2", "checkpoint.keep=9", "train.max_steps=8", *settings)
        run = RunDir(tmp_path / name)
        assert train_one(job, run, prepared(job)).status == "done"
        return run

    return train


def test_the_update_waits_for_the_copy(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a copy that takes longer than many steps the files are those of a copy at once."""
    copy = Saver._copy

    def copy_late(self: Saver, parts: list[Fragment]) -> dict[str, Tensor]:
        time.sleep(0.3)
        return copy(self, parts)

    quick = trained()
    monkeypatch.setattr(Saver, "_copy", copy_late)
    late = trained(name="late")
    shares = [[p.read_bytes() for p in sorted(run.checkpoints.rglob("*.safetensors"))] for run in (quick, late)]
    assert len(shares[0]) == 4
    assert shares[0] == shares[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.config.n_embd=16"], r"lm_head.weight|transformer.h.0.attn.c_attn.bias is \(96,\) there and \(48,\)"),
        (["model.config.n_layer=1"], r"transformer.h.1.attn.c_attn.bias is \(96,\) there and missing in the job's"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(trained: Train, settings: list[str], message: str) -> None:
    trained()
    with pytest.raises(CheckpointError, match=message):
        trained(*settings)


@pytest.mark.parametrize("newest", [True, False])
def test_a_damaged_marker_stops_no_run(newest: bool, trained: Train) -> None:
    run = trained()
    whole = losses_of(run.root)
    names = checkpoints_of(run).committed()
    (run.checkpoints / names[-1 if newest else 0] / "committed.json").write_text("{")
    assert losses_of(trained().root) == whole
    starts = [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert starts == [0, 6 if newest else 8]


def test_a_commit_that_fails_is_a_save_that_failed(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, calls = Checkpoints.commit, []

    def fail_second(self: Checkpoints, name: str, marker: Marker, keep: int, **options: Any) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        commit(self, name, marker, keep, **options)

    monkeypatch.setattr(Checkpoints, "commit", fail_second)
    run = trained()
    assert saved_steps(run) == [2, 6, 8]
    (failed,) = [r for r in metrics_of(run.metrics) if r["kind"] == "checkpoint" and "error" in r]
    assert failed["step"] == 4
    assert failed["error"].startswith("its commit: no space left")


def test_old_checkpoints_that_cannot_be_removed_stop_no_run(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Checkpoints, name: str) -> None:
        raise ConnectionError("the storage is away")

    monkeypatch.setattr(Checkpoints, "remove", fail)
    assert saved_steps(trained("checkpoint.keep=2")) == [2, 4, 6, 8]


def test_a_run_that_is_asked_to_stop_in_an_evaluation_owes_it(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.max_steps=8", "eval.every=4", "eval.micro_size=2", "checkpoint.every=100")
    job = make_job(*settings)
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    assert train_one(job, whole, prepared(job)).status == "done"
    evaluating = clm_dist.train.loop._Loop._evaluating

    def ask(self: Any, num_done: int) -> None:
        if self.step in (4, 8) and num_done == 3:
            cut.stop.touch()
            self.reporter.looked = 0.0
        evaluating(self, num_done)

    with monkeypatch.context() as patched:
        patched.setattr(clm_dist.train.loop._Loop, "_evaluating", ask)
        for step in (4, 8):
            outcome = train_one(job, cut, prepared(job))
            assert (outcome.status, outcome.step) == ("preempted", step)
            assert saved_steps(cut)[-1] == step
            cut.stop.unlink()
            patched.setattr(clm_dist.train.loop._Loop, "_evaluating", ask if step == 4 else evaluating)
            if step == 4:
                # The evaluation that it owes is asked for and not interrupted again.
                patched.setattr(
                    clm_dist.train.loop._Loop, "_evaluating", lambda self, n: ask(self, n) if self.step == 8 else None
                )
    assert train_one(job, cut, prepared(job)).status == "done"
    assert evals_of(cut.metrics) == evals_of(whole.metrics)
    assert losses_of(cut.root) == losses_of(whole.root)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(trained: Train) -> None:
    run = trained()
    whole = losses_of(run.root)
    names = checkpoints_of(run).committed()
    for name, step in zip(names[2:], (6, 8), strict=True):
        assert f"-{step:08d}-" in name
        file = run.checkpoints / name / "rank-00000.safetensors"
        damaged = bytearray(file.read_bytes())
        damaged[-1] ^= 1
        file.write_bytes(damaged)
    assert losses_of(trained().root) == whole
    starts = [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "start"]
    assert starts == [0, 4]
    said = [(r["step"], r["error"]) for r in metrics_of(run.metrics) if r["kind"] == "damaged"]
    assert [step for step, _ in said] == [8, 6]
    assert all("rank-00000.safetensors is not as it was written" in error for _, error in said)
    assert saved_steps(run) == [2, 4, 6, 8]
    assert not {names[2], names[3]} & set(checkpoints_of(run).committed())


def test_a_save_that_fails_once_is_said_and_the_run_goes_on(trained: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = write_safetensors, []

    def fail_second(file: Any, tensors: Any) -> tuple[int, str]:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return write(file, tensors)

    monkeypatch.setattr(clm_dist.train.checkpointing.saver, "write_safetensors", fail_second)
    run = trained()
    assert saved_steps(run) == [2, 6, 8]
    failed = [r for r in metrics_of(run.metrics) if r["kind"] == "checkpoint" and "error" in r]
    assert [record["step"] for record in failed] == [4]
    assert "no space left while writing" in failed[0]["error"]
    assert len(list(run.checkpoints.iterdir())) == 3
