"""The eval loss to expect of a job, from runs on parts of its data: which runs can be compared, and on which text."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from clm_dist.config.data import DataConfig
from clm_dist.config.differences import differing_fields
from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Manifest
from clm_dist.files.eval_losses import EvalLosses, read_eval_losses
from clm_dist.files.result import Result, read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import EvalFigures
from clm_dist.plan.counts import Counts
from clm_dist.plan.loss import SEED_ERROR, Estimate, ExpectedLoss, Point, expect_loss
from clm_dist.train.batches import BatchOrder

_OTHER_LOSSES = r"model\.(?!attention)|tokenizer|data\.(block_size|document_mask|append_eos|eval_path|eval_split)$"
"""Fields that make losses those of another model, or of other predictions or texts."""
_FREE = {
    *("name", "data.split", "eval.every", "train.epochs", "train.max_steps", "train.schedule_steps"),
    *("train.warmup_steps", "train.warmup_ratio", "train.seed"),
}
"""Fields that may differ between a run on a part of the data and one on all of it; epochs are compared as such."""
_SAME_EPOCHS = 0.05
_MANY_GROUPS = 100
_MUCH_MISFIT = 2.0
_BEGINNING = re.compile(r"[\w.]+(\[:[^:]*\])?")
"""A split from its first record on."""


@dataclass(frozen=True)
class LossOfRuns:
    """What runs say of the loss of a job."""

    expected: ExpectedLoss | None
    points: tuple[Point, ...]
    """One for each run, from the least to the most training tokens."""
    tokens: Estimate
    """Distinct training tokens of the job."""
    epochs: float
    blocks: float
    """Distinct training blocks of the job."""
    has_seeds: bool
    """Whether runs on equally many blocks have different seeds, which shows how much a seed changes."""


@dataclass(frozen=True)
class _Trained:
    """A run that is done."""

    path: Path
    job: JobConfig
    result: Result
    figures: EvalFigures
    manifest: Manifest
    losses: EvalLosses | None
    """None where they are not of the evaluation in `figures`."""

    @property
    def blocks(self) -> int:
        """Distinct training blocks."""
        num_blocks = self.manifest.splits["train"].num_blocks
        return min(num_blocks, self.figures["step"] * self.job.batch.global_size)

    @property
    def tokens(self) -> float:
        return float(self.blocks * self.job.data.block_size)

    @property
    def seed(self) -> int:
        return self.job.train.seed

    @property
    def num_eval_blocks(self) -> int:
        return self.manifest.splits["eval"].num_blocks

    @property
    def eval_source(self) -> dict[str, Any]:
        """What the records of the eval split are."""
        source = self.manifest.source
        if self.job.data.has_own_eval:
            return {"eval": source["eval"]}
        records = {name: value for name, value in source["source"].items() if name != "split"}
        return {"source": records, "data": source["data"]}


def loss_of_runs(paths: Sequence[Path], job: JobConfig, counts: Counts) -> tuple[LossOfRuns, list[str]]:
    """The eval loss of a job, from runs that are done, and notes.

    Only runs that are done count: before its last step a run has the loss of a learning rate that has still to
    fall (Hoffmann et al. 2022, section 3.1).

    Raises:
        ConfigError: a run is not done, or has another model or tokenizer than the job or than another run.
    """
    if len(paths) < 2:
        raise ConfigError(
            "--losses takes two or more runs on parts of the data: one loss says nothing of more data; train another "
            "part with --set data.split=... --set name=..., and name it with --losses as well"
        )
    runs = sorted((_trained(path) for path in paths), key=lambda run: run.tokens)
    notes = [note for run in runs for note in _notes_of(run, job)]
    first, last = runs[0], runs[-1]
    for run in runs[1:]:
        if run.manifest.tokenizer_fingerprint != first.manifest.tokenizer_fingerprint:
            raise ConfigError(
                f"--losses {run.path} has another tokenizer than {first.path}, so their losses are of other tokens; "
                "take one for all: prepare the whole job, set tokenizer.path to the directory tokenizer of the store "
                "that `clm-dist prepare` names, and tokenizer.train to null",
                field="tokenizer",
            )
    points, text_error, said = _on_one_text(runs, job, counts)
    notes += said
    order = BatchOrder.of_job(job, max(1, round(counts.train.blocks)))
    epochs = order.num_steps / order.steps_per_epoch
    for run in runs:
        if not math.isclose(run.figures["epoch"], epochs, rel_tol=_SAME_EPOCHS):
            notes.append(f"the loss of {run.path} is after {run.figures['epoch']:.3g} epochs, and not {epochs:.3g}")
    share = min(1.0, epochs)
    size = job.data.block_size
    tokens = Estimate(*(getattr(counts.train, name) * share * size for name in ("blocks", "low", "high")))
    if tokens.value < last.tokens:
        notes.append(f"{last.path} has more training data than the job")
    found = expect_loss(points, tokens, text_error=text_error)
    expected = None if isinstance(found, str) else found
    if isinstance(found, str):
        notes.append(f"no loss is estimated: {found} ({_listed(runs, points)})")
    elif found.misfit > _MUCH_MISFIT:
        notes.append(
            f"the losses lie {found.misfit:.1f} times further from any curve than the assumed errors explain, which "
            f"makes the interval wider ({_listed(runs, points)})"
        )
    has_seeds = any(one.blocks == other.blocks and one.seed != other.seed for one, other in pairwise(runs))
    return LossOfRuns(expected, tuple(points), tokens, epochs, tokens.value / size, has_seeds), notes


def _trained(path: Path) -> _Trained:
    run, result = RunDir(path), read_result(path)
    if result["status"] != "done" or result["final"] is None:
        raise ConfigError(
            f"--losses {path} is not done ({result['status']}), and a loss from the middle of a run is not the one "
            "that it ends with; continue the run, or name another"
        )
    if not run.data.is_file():
        raise ConfigError(f"{run.data} is missing: {path} is of an earlier version; train it again with --overwrite")
    figures, losses = result["final"], read_eval_losses(run)
    if losses is not None and not np.isclose(losses[:, 0].sum() / losses[:, 1].sum(), figures["loss"], rtol=1e-9):
        losses = None
    return _Trained(path, read_saved_job(run.job), result, figures, Manifest.read(run.data), losses)


def _notes_of(run: _Trained, job: JobConfig) -> Iterator[str]:
    """What is to be said of a run alone. Raises ConfigError where its losses are of another model."""
    different = [field for field in differing_fields(run.job, job) if field not in _FREE]
    if other := [field for field in different if re.match(_OTHER_LOSSES, field)]:
        raise ConfigError(
            f"--losses {run.path} differs from the job in {', '.join(other)}, so its loss says nothing of the job's; "
            "name runs of the same model and tokenizer",
            field=other[0],
        )
    if different:
        yield f"{run.path} differs from the job in {', '.join(different)}: the loss is taken not to depend on it"
    lowest = min(run.result["evals"], key=lambda figures: figures["loss"])
    if run.figures["loss"] > lowest["loss"] + SEED_ERROR:
        yield (
            f"the eval loss of {run.path} rose from {lowest['loss']:.4f} at step {lowest['step']:,} to "
            f"{run.figures['loss']:.4f}: it overfits, and a run on more data does so later; take fewer epochs, or "
            "train.keep best"
        )


def _on_one_text(runs: Sequence[_Trained], job: JobConfig, counts: Counts) -> tuple[list[Point], float, list[str]]:
    """The points of runs, on the same eval text where they have one; the error that the job's own text adds; notes."""
    last, of_job = runs[-1], max(1.0, counts.eval.blocks)
    if all(run.eval_source == last.eval_source for run in runs):
        is_of_job = {run.job.data.split for run in runs} == {job.data.split}
        if job.data.has_own_eval or is_of_job:
            return [Point(run.tokens, run.figures["loss"]) for run in runs], 0.0, []
        if (common := _common_losses(runs)) is not None:
            # By how much the common text is easier than all of the last run's.
            shift = last.figures["loss"] - common[-1]
            grown = _text_error(last) * math.sqrt(max(0.0, 1 - last.num_eval_blocks / of_job))
            return [Point(run.tokens, loss + shift) for run, loss in zip(runs, common, strict=True)], grown, []
    points = [Point(run.tokens, run.figures["loss"], _text_error(run)) for run in runs]
    counted = ", ".join(f"{run.num_eval_blocks:,}" for run in runs)
    note = (
        f"the runs were evaluated on different text ({counted} blocks), which makes the interval wider; to compare "
        "them on the same text, set data.eval_split or data.eval_path, or take data.split_method hash and parts of the "
        "data that begin with its first record"
    )
    return points, points[-1].error * math.sqrt(last.num_eval_blocks / of_job), [note]


def _common_losses(runs: Sequence[_Trained]) -> list[float] | None:
    """The loss of each run on the eval blocks that all runs have; None where that is not known.

    By hash, the eval records of a part that begins with the first record are the first ones of a larger part, and so
    are their blocks.
    """
    if not all(_begins_with_the_data(run.job.data) for run in runs):
        return None
    if len({(run.job.eval.micro_size, run.job.data.split.partition("[")[0]) for run in runs}) > 1:
        return None
    losses = [run.losses for run in runs if run.losses is not None]
    if len(losses) < len(runs):
        return None
    num_common = min(map(len, losses))
    # The last micro-batch of a split may be short.
    if len({one[num_common - 1, 1] for one in losses}) > 1:
        num_common -= 1
    if num_common == 0:
        return None
    return [float(one[:num_common, 0].sum() / one[:num_common, 1].sum()) for one in losses]


def _begins_with_the_data(data: DataConfig) -> bool:
    return data.splits_by_hash and data.grouping == "carry" and _BEGINNING.fullmatch(data.split) is not None


def _text_error(run: _Trained) -> float:
    """Standard error of an eval loss, as one of many texts of its kind: a ratio estimate over groups of consecutive
    blocks (Cochran 1977, "Sampling Techniques", chapter 6)."""
    if run.losses is None or len(run.losses) < 2:
        raise ConfigError(
            f"--losses {run.path} has no losses of its last evaluation by micro-batch (eval_losses.npy), or only one, "
            "so the error of its loss is not known; set data.eval_split or data.eval_path to the same for all runs"
        )
    groups = np.array_split(run.losses, min(_MANY_GROUPS, len(run.losses)))
    sums, tokens = np.array([group.sum(axis=0) for group in groups]).T
    residuals = sums - sums.sum() / tokens.sum() * tokens
    return float(np.sqrt((residuals**2).sum() * len(groups) / (len(groups) - 1)) / tokens.sum())


def _listed(runs: Sequence[_Trained], points: Sequence[Point]) -> str:
    pairs = zip(runs, points, strict=True)
    return ", ".join(f"{run.path}: {point.loss:.4f} with {run.blocks:,} blocks" for run, point in pairs)
