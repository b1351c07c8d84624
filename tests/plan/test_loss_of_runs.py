"""Which runs can be compared, on which text, and what is said of them."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.plan.counts import Count, Counts
from clm_dist.plan.loss_of_runs import LossOfRuns, loss_of_runs
from tests.conftest import MakeJob

Prepared = Callable[[JobConfig], Path]
MakeRun = Callable[..., Path]
HASH = ("data.split_method=hash", "data.eval_fraction=0.3", "data.block_size=16", "eval.micro_size=1")
PARTS = (16, 30, 40)
CURVE = {16: 3.4, 30: 3.2, 40: 3.05}


@pytest.fixture
def job_of(make_job: MakeJob, prepared: Prepared) -> MakeJob:
    """The tiny job with a tokenizer that does not depend on the part of the data."""
    tokenizer = prepared(make_job()) / "tokenizer"
    own = ("tokenizer.train=null", f"tokenizer.path={tokenizer}", "train.max_steps=null")
    return lambda *settings: make_job(*own, *settings)


@pytest.fixture
def make_run(job_of: MakeJob, prepared: Prepared, tmp_path: Path) -> MakeRun:
    """A run that is done, on the first `part` records, with the losses of CURVE; some blocks are harder than others."""

    def make(part: int, *settings: str, loss: float | None = None, **changes: Any) -> Path:
        job = job_of(f"name=part-{part}", f"data.split=train[:{part}]", *settings)
        manifest = Manifest.read(prepared(job) / "manifest.json")
        run = RunDir(tmp_path / "runs" / job.name)
        run.root.mkdir(parents=True)
        run.job.write_text(yaml.safe_dump(job.model_dump(mode="json")))
        manifest.without_files().write(run.data)
        num_tokens = job.data.block_size - 1
        hardness = np.random.default_rng(1).normal(0, 0.5, 1000)[: manifest.splits["eval"].num_blocks]
        losses = (CURVE[part] if loss is None else loss) + hardness
        np.save(run.eval_losses, np.stack([losses * num_tokens, np.full_like(losses, num_tokens)], axis=1))
        steps = job.train.epochs * -(-manifest.splits["train"].num_blocks // job.batch.global_size)
        mean = float(losses.mean())
        figures: dict[str, Any] = {
            "step": steps,
            "epoch": float(job.train.epochs),
            "loss": mean,
            "perplexity": math.exp(mean),
        }
        figures |= {"bits_per_byte": 1.0, "num_tokens": len(losses) * num_tokens}
        training: dict[str, Any] = {"steps": steps, "tokens": 1, "seconds": 1.0, "tokens_per_s": 1.0}
        result: dict[str, Any] = {
            "name": job.name,
            "status": "done",
            "baseline": None,
            "evals": [figures],
            "final": figures,
        }
        result |= {"train": training, "workers": 1, "strategy": "ddp", "restarts": 0, "data": manifest.fingerprint}
        result |= {"versions": {}, "hardware": {"device": None, "machine": "x", "cpus": 1}, "finished": "now"}
        write_json(run.result, result | changes)
        return run.root

    return make


def _counts(train: float = 200, evaluated: float = 60) -> Counts:
    train_count, eval_count = (Count(number, number, number) for number in (train, evaluated))
    return Counts(train_count, eval_count, True, False, "counted", 300)


def _loss_of(path: Path) -> float:
    return float(read_json(path / "result.json")["final"]["loss"])


def _width(found: LossOfRuns) -> float:
    assert found.expected is not None
    return found.expected.loss.high - found.expected.loss.low


def test_by_hash_the_eval_blocks_of_a_part_are_the_first_of_a_larger_part(job_of: MakeJob, prepared: Prepared) -> None:
    blocks = [Blocks(prepared(job_of(f"data.split=train[:{part}]", *HASH)), "eval") for part in PARTS]
    for one, other in pairwise(blocks):
        assert 0 < len(one) < len(other)
        assert np.array_equal(one[np.arange(len(one))], other[np.arange(len(one))])


def test_runs_by_hash_are_compared_on_the_text_that_all_have(job_of: MakeJob, make_run: MakeRun) -> None:
    """The differences between the runs are those of the curve, whatever blocks each was evaluated on."""
    paths = [make_run(part, *HASH) for part in PARTS]
    found, notes = loss_of_runs(paths[::-1], job_of(*HASH), _counts())
    assert notes == []
    losses = [point.loss for point in found.points]
    assert np.diff(losses) == pytest.approx(np.diff(list(CURVE.values())))
    assert losses[-1] == pytest.approx(_loss_of(paths[-1]))
    assert [point.error for point in found.points] == [0, 0, 0]
    tokens = [Manifest.read(path / "data.json").splits["train"].num_blocks * 16 for path in paths]
    assert [point.tokens for point in found.points] == tokens
    assert (found.tokens.value, found.blocks) == (200 * 16, 200)
    # The text of the job's eval split that no run has seen makes the interval wider.
    num_blocks = Manifest.read(paths[-1] / "data.json").splits["eval"].num_blocks
    same, _ = loss_of_runs(paths, job_of(*HASH), _counts(evaluated=num_blocks))
    assert _width(found) > _width(same)


def test_runs_with_random_splits_are_compared_with_the_errors_of_their_texts(
    job_of: MakeJob, make_run: MakeRun
) -> None:
    settings = ("data.split_method=random", *HASH[1:])
    paths = [make_run(part, *settings) for part in PARTS]
    found, (note,) = loss_of_runs(paths, job_of(*settings), _counts())
    assert "were evaluated on different text" in note
    for point, path in zip(found.points, paths, strict=True):
        losses = np.load(path / "eval_losses.npy")[:, 0] / 15
        assert point.loss == pytest.approx(losses.mean())
        assert point.error == pytest.approx(losses.std(ddof=1) / math.sqrt(len(losses)))
    assert _width(found) > 0.3


def test_an_eval_split_of_its_own_is_one_text(job_of: MakeJob, make_run: MakeRun) -> None:
    settings = ("data.eval_split=train[40:]", "data.block_size=16", "eval.micro_size=2")
    job = job_of("data.split=train[:40]", *settings)
    paths = [make_run(part, *settings) for part in PARTS]
    found, notes = loss_of_runs(paths, job, _counts(300))
    assert notes == []
    assert [point.error for point in found.points] == [0, 0, 0]
    assert [point.loss for point in found.points] == pytest.approx([_loss_of(path) for path in paths])
    other = job_of("data.split=train[:40]", "data.eval_split=train[41:]", *settings[1:])
    with pytest.raises(ConfigError, match=r"part-16 differs from the job in data\.eval_split"):
        loss_of_runs(paths, other, _counts(300))


def test_a_part_is_what_a_run_trained_on(job_of: MakeJob, make_run: MakeRun) -> None:
    """With fewer steps than an epoch has, as much of the data as the steps take, and for the job too."""
    settings = (*HASH, "train.epochs=1", "batch.global_size=4")
    paths = [make_run(part, *settings) for part in PARTS]
    result = read_json(paths[0] / "result.json")
    result["final"] |= {"step": 3, "epoch": 0.1}
    write_json(paths[0] / "result.json", result)
    found, notes = loss_of_runs(paths, job_of(*settings, "train.max_steps=25"), _counts())
    assert found.points[0].tokens == 3 * 4 * 16
    assert (found.epochs, found.blocks) == (0.5, 100)
    assert f"the loss of {paths[0]} is after 0.1 epochs, and not 0.5" in notes


def test_what_differs_is_said_or_refused(job_of: MakeJob, make_run: MakeRun) -> None:
    paths = [make_run(part, *HASH) for part in PARTS]
    _, notes = loss_of_runs(paths, job_of(*HASH, "train.learning_rate=0.5"), _counts())
    assert notes == [
        f"{path} differs from the job in train.learning_rate: the loss is taken not to depend on it" for path in paths
    ]
    for setting, field in (
        ("model.config.n_layer=7", r"model\.config\.n_layer"),
        ("data.block_size=8", "data.block_size"),
    ):
        with pytest.raises(ConfigError, match=f"differs from the job in {field}"):
            loss_of_runs(paths, job_of(*HASH, setting), _counts())


def test_another_seed_shows_how_much_it_changes(job_of: MakeJob, make_run: MakeRun) -> None:
    job, paths = job_of(*HASH), [make_run(part, *HASH) for part in PARTS]
    assumed, _ = loss_of_runs(paths, job, _counts())
    assert not assumed.has_seeds
    again = make_run(16, *HASH, "name=again", "train.seed=7", loss=CURVE[16] + 0.2)
    measured, notes = loss_of_runs([*paths, again], job, _counts())
    assert measured.has_seeds
    assert assumed.expected
    assert measured.expected
    # Of two that lie 0.2 apart, each is 0.1 from the curve.
    assert measured.expected.misfit == pytest.approx(math.sqrt(2 * 0.1**2) / 0.02, rel=0.1)
    assert _width(measured) > 3 * _width(assumed)
    assert "from any curve than the assumed errors explain" in notes[-1]


def test_a_tokenizer_for_each_part_is_refused(job_of: MakeJob, make_run: MakeRun) -> None:
    settings = (*HASH, "tokenizer.path=null", "tokenizer.train={vocab_size: 280}", "model.config.vocab_size=300")
    paths = [make_run(part, *settings) for part in PARTS]
    with pytest.raises(ConfigError, match="has another tokenizer than"):
        loss_of_runs(paths, job_of(*settings), _counts())


def test_losses_that_rise_are_said(job_of: MakeJob, make_run: MakeRun) -> None:
    paths = [make_run(part, *HASH, loss=3 + part / 100) for part in PARTS]
    found, (note,) = loss_of_runs(paths, job_of(*HASH), _counts())
    assert found.expected is None
    assert note.startswith("no loss is estimated: the eval loss does not fall with more data (")
    assert all(f"{path}: " in note for path in paths)
    result = read_json(paths[0] / "result.json")
    result["evals"].insert(0, result["final"] | {"step": 1, "loss": result["final"]["loss"] - 0.1})
    write_json(paths[0] / "result.json", result)
    _, notes = loss_of_runs(paths, job_of(*HASH), _counts())
    assert f"the eval loss of {paths[0]} rose from " in notes[0]
    assert "it overfits" in notes[0]


def test_runs_that_say_nothing_are_refused(job_of: MakeJob, make_run: MakeRun) -> None:
    job, done, failed = job_of(*HASH), make_run(16, *HASH), make_run(30, *HASH, status="failed", final=None)
    with pytest.raises(ConfigError, match="--losses takes two or more runs"):
        loss_of_runs([done], job, _counts())
    with pytest.raises(ConfigError, match=r"part-30 is not done \(failed\)"):
        loss_of_runs([done, failed], job, _counts())
    with pytest.raises(ConfigError, match="is no run directory"):
        loss_of_runs([done, Path("nowhere")], job, _counts())
    found, notes = loss_of_runs([done, done], job, _counts())
    assert found.expected is None
    assert "at least two sizes" in notes[-1]
