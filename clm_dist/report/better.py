"""Whether one run is better than another on the same eval split, or they differ by chance alone.

Both runs have a loss for each stretch of the eval split, so the differences are paired. Losses within a document are
correlated: the bootstrap draws groups of consecutive blocks, each at least as long as most documents, and not single
blocks (a block bootstrap; Künsch 1989, "The jackknife and the bootstrap for general stationary observations").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clm_dist.errors import ConfigError, DataError
from clm_dist.files.blocks import Manifest, Split
from clm_dist.files.eval_losses import EvalLosses, read_eval_losses
from clm_dist.files.result import Result, last_figures
from clm_dist.files.run_dir import RunDir

# Of fewer the interval is too narrow: of 20 or 40 groups that differ by chance, 7 to 8 % are called better, not 5 %.
_LEAST_GROUPS, _MOST_GROUPS = 50, 1000
_NUM_DRAWS, _CHUNK = 4000, 200
_MOST_DOCUMENTS = 0.95
"""A group is as long as this share of the documents."""


@dataclass(frozen=True)
class Interval:
    """By how much the loss of the second of two runs is higher, in nats per token."""

    difference: float
    low: float
    high: float
    """95 % of the draws are from `low` to `high`."""
    num_groups: int


def verdicts(runs: Sequence[RunDir], labels: Sequence[str], results: Sequence[Result]) -> list[str]:
    """What can be said of each run against the first, in words; nothing of runs with other blocks than the first."""
    said = []
    for run, label, result in list(zip(runs, labels, results, strict=True))[1:]:
        if result["data"] != results[0]["data"]:
            continue
        pair = f"{label} and {labels[0]}"
        found = _compare(runs[0], results[0], run, result)
        if isinstance(found, str):
            said.append(f"{pair} are not compared: {found}.")
            continue
        better, worse = (label, labels[0]) if found.difference < 0 else (labels[0], label)
        low, high = sorted((abs(found.low), abs(found.high)))
        drawn = f"paired bootstrap over {found.num_groups:,} groups of consecutive eval blocks"
        if found.low <= 0 <= found.high:
            size = f"{found.low:+.4f} to {found.high:+.4f} nats per token (95 %; {drawn})"
            said.append(f"{pair} do not differ by more than chance: {size}.")
        else:
            size = f"{abs(found.difference):.4f} nats per token (95 %: {low:.4f} to {high:.4f}; {drawn})"
            said.append(f"{better} is better than {worse}: its eval loss is lower by {size}.")
    return said


def paired_bootstrap(first: EvalLosses, second: EvalLosses, *, least_tokens: int) -> Interval | None:
    """The interval of the difference of two evaluations of the same tokens; None where there are too few groups.

    Args:
        least_tokens: of a group.
    """
    differences, tokens = second[:, 0] - first[:, 0], first[:, 1]
    size = max(least_tokens, tokens.sum() / _MOST_GROUPS)
    _, groups = np.unique((np.cumsum(tokens) - tokens) // size, return_inverse=True)
    sums, counts = np.bincount(groups, differences), np.bincount(groups, tokens)
    num_groups = len(sums)
    if num_groups < _LEAST_GROUPS:
        return None
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(_NUM_DRAWS // _CHUNK):
        times = random.multinomial(num_groups, np.full(num_groups, 1 / num_groups), size=_CHUNK)
        drawn.append((times @ sums) / (times @ counts))
    low, high = np.quantile(np.concatenate(drawn), (0.025, 0.975))
    return Interval(float(differences.sum() / tokens.sum()), float(low), float(high), num_groups)


def _compare(one: RunDir, result: Result, other: RunDir, other_result: Result) -> Interval | str:
    """The interval, or why there is none."""
    losses = []
    for run, figures in ((one, last_figures(result)), (other, last_figures(other_result))):
        try:
            found = read_eval_losses(run)
        except ConfigError as error:
            return str(error)
        if found is None or figures is None:
            return f"{run.root.name} has no losses of its last evaluation by micro-batch (eval_losses.npy)"
        if not np.isclose(found[:, 0].sum() / found[:, 1].sum(), figures["loss"], rtol=1e-9):
            return f"eval_losses.npy of {run.root.name} is not of the evaluation in its result"
        losses.append(found)
    if not np.array_equal(losses[0][:, 1], losses[1][:, 1]):
        return "they were evaluated in other micro-batches (eval.micro_size, data.document_mask)"
    try:
        split = Manifest.read(one.data).splits["eval"]
    except (FileNotFoundError, DataError):
        return f"{one.root.name} has no counts of its data (data.json)"
    interval = paired_bootstrap(losses[0], losses[1], least_tokens=_length_of_most(split))
    return interval or "the eval split is too short for an interval"


def _length_of_most(split: Split) -> int:
    """Tokens that most documents do not exceed."""
    covered = 0
    for length in sorted(map(int, split.document_lengths)):
        covered += split.document_lengths[str(length)]
        if covered >= _MOST_DOCUMENTS * split.num_documents:
            return length
    return 1
