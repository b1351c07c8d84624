"""Whether one run is better than another."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clm_dist.errors import ConfigError
from clm_dist.files.atomic import write_json
from clm_dist.files.eval_losses import EvalLosses, read_eval_losses, write_eval_losses
from clm_dist.files.result import last_figures, read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import MicroLoss
from clm_dist.report import better
from clm_dist.report.better import paired_bootstrap, verdicts
from tests.support.command import clm_dist

TOKENS = 100
"""Predicted tokens of a micro-batch."""


def losses(means: Any) -> EvalLosses:
    """Losses of micro-batches whose tokens have these mean losses."""
    values = np.asarray(means, dtype=np.float64)
    return np.stack([values * TOKENS, np.full(len(values), float(TOKENS))], axis=1)


def test_a_difference_that_every_group_has_excludes_zero() -> None:
    base = np.random.default_rng(0).normal(3, 1, 400)
    found = paired_bootstrap(losses(base), losses(base - 0.01), least_tokens=TOKENS)
    assert found
    assert (found.low, found.difference, found.high) == pytest.approx((-0.01, -0.01, -0.01))
    assert found.num_groups == 400


@pytest.mark.parametrize(("micros_in_a_group", "fewest", "most"), [(10, 0, 9), (1, 30, 70)])
def test_chance_is_called_better_as_rarely_as_it_says_where_groups_are_documents(
    micros_in_a_group: int, fewest: int, most: int
) -> None:
    """Documents of ten micro-batches; with groups of one, chance would be called better much more often."""
    random = np.random.default_rng(1)
    called = 0
    for _ in range(100):
        of_documents = np.repeat(random.normal(0, 1, 60), 10) + random.normal(0, 0.3, 600)
        found = paired_bootstrap(
            losses(np.full(600, 3.0)), losses(3 + of_documents), least_tokens=TOKENS * micros_in_a_group
        )
        assert found
        called += not found.low <= 0 <= found.high
    assert fewest <= called <= most


def test_the_interval_is_that_of_the_mean_over_tokens() -> None:
    """Against the normal approximation, with micro-batches of unequal sizes."""
    random = np.random.default_rng(2)
    tokens = random.integers(50, 150, 500).astype(float)
    difference = random.normal(0.02, 0.1, 500)
    first = np.stack([3 * tokens, tokens], axis=1)
    second = np.stack([(3 + difference) * tokens, tokens], axis=1)
    found = paired_bootstrap(first, second, least_tokens=1)
    assert found
    mean = (difference * tokens).sum() / tokens.sum()
    error = np.sqrt((((difference - mean) * tokens) ** 2).sum()) / tokens.sum()
    assert found.difference == pytest.approx(mean)
    assert (found.low, found.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_few_groups_say_nothing_and_many_are_joined() -> None:
    base = np.full(49, 3.0)
    assert paired_bootstrap(losses(base), losses(base - 1), least_tokens=TOKENS) is None
    assert paired_bootstrap(losses(np.full(400, 3.0)), losses(np.full(400, 2.0)), least_tokens=TOKENS * 40) is None
    many = np.full(50_000, 3.0)
    found = paired_bootstrap(losses(many), losses(many), least_tokens=1)
    assert found and found.num_groups == 1000


@pytest.fixture
def pair(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDir, RunDir]:
    """Two runs that were evaluated on the same blocks; the second has lower losses, by 0.1 in each micro-batch."""
    monkeypatch.setattr(better, "_LEAST_GROUPS", 2)
    monkeypatch.setattr(better, "_MOST_DOCUMENTS", 0.0)
    other = RunDir(Path(shutil.copytree(run.root, run.root.parent / "other")))
    found = read_eval_losses(run)
    assert found is not None
    rows = [MicroLoss(n, nats - 0.1 * tokens, int(tokens), 0) for n, (nats, tokens) in enumerate(found)]
    write_eval_losses(other, rows[::-1])
    result: Any = read_result(other.root)
    result["final"]["loss"] = sum(row.loss_sum for row in rows) / sum(row.num_tokens for row in rows)
    write_json(other.result, result | {"name": "other"})
    return run, other


def said_of(*runs: RunDir) -> list[str]:
    results = [read_result(run.root) for run in runs]
    return verdicts(runs, [result["name"] for result in results], results)


def test_a_run_leaves_the_losses_of_its_last_evaluation(finished_run: RunDir) -> None:
    found = read_eval_losses(finished_run)
    figures = last_figures(read_result(finished_run.root))
    assert found is not None and figures
    assert found[:, 1].sum() == figures["num_tokens"]
    assert found[:, 0].sum() / found[:, 1].sum() == pytest.approx(figures["loss"], rel=1e-12)


def test_better_is_said_of_what_is_better_whichever_is_named_first(
    pair: tuple[RunDir, RunDir], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for runs in (pair, pair[::-1]):
        (text,) = said_of(*runs)
        assert text.startswith(
            "other is better than tiny: its eval loss is lower by 0.1000 nats per token (95 %: 0.1000 to "
        )
    said = clm_dist(capsys, monkeypatch, "report", *(run.root for run in pair))
    assert "other is better than tiny" in said.out
    assert "other is better than tiny" in (pair[0].root.parent / "comparison.html").read_text()


def test_runs_that_differ_by_chance_are_not_called_better(pair: tuple[RunDir, RunDir]) -> None:
    one, other = pair
    shutil.copy(one.eval_losses, other.eval_losses)
    write_json(other.result, dict(read_result(one.root)) | {"name": "other"})
    (text,) = said_of(one, other)
    assert text.startswith("other and tiny do not differ by more than chance: +0.0000 to +0.0000 nats per token")


def test_what_cannot_be_compared_is_said_with_the_reason(pair: tuple[RunDir, RunDir]) -> None:
    one, other = pair
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(better, "_LEAST_GROUPS", 20)
        assert said_of(one, other) == ["other and tiny are not compared: the eval split is too short for an interval."]
    data = one.data.read_text()
    one.data.unlink()
    assert "has no counts of its data" in said_of(one, other)[0]
    one.data.write_text(data)
    found = read_eval_losses(other)
    assert found is not None
    halves = [
        MicroLoss(2 * n + half, nats / 2, (int(tokens) + half) // 2, 0)
        for n, (nats, tokens) in enumerate(found)
        for half in (0, 1)
    ]
    write_eval_losses(other, halves)
    assert "in other micro-batches (eval.micro_size" in said_of(one, other)[0]
    write_eval_losses(other, halves[1:])
    assert "eval_losses.npy of other is not of the evaluation" in said_of(one, other)[0]
    other.eval_losses.unlink()
    assert "other has no losses of its last evaluation" in said_of(one, other)[0]
    write_json(other.result, dict(read_result(other.root)) | {"data": "ffff"})
    assert said_of(one, other) == []


def test_a_damaged_file_is_named(run: RunDir) -> None:
    for content in (b"", b"x", run.eval_losses.read_bytes()[:-1]):
        run.eval_losses.write_bytes(content)
        with pytest.raises(ConfigError, match=r"eval_losses\.npy is damaged"):
            read_eval_losses(run)
    np.save(run.eval_losses, np.zeros(3))
    with pytest.raises(ConfigError, match="is damaged: it has float64 of shape"):
        read_eval_losses(run)
