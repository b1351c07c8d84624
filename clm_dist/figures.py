"""Figures of a model on documents: of all of them, and of each category."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clm_dist.metrics import bits_per_byte, bootstrap_interval, perplexity


def figures_of(
    sums: Sequence[npt.NDArray[Any]], num_bytes: int | None, *, loss_sum: float | None = None, num_shares: int = 1
) -> dict[str, Any]:
    """The figures of some documents; those that need a predicted token are None where there is none.

    Args:
        sums: the loss of each, its predicted tokens, and those that the model found likeliest.
        num_bytes: of text of the predicted tokens; None where it is not known.
        loss_sum: where it was added up in another order.
        num_shares: of how many figures this is one, which share the time for intervals.
    """
    loss_sums, num_tokens, num_correct = (values[sums[1] > 0] for values in sums)
    loss_sum = float(loss_sums.sum()) if loss_sum is None else loss_sum
    total = int(num_tokens.sum())
    interval: Mapping[str, Any] | None = None
    if (found := bootstrap_interval(loss_sums, num_tokens, num_shares=num_shares)) is not None:
        interval = {"level": 0.95, "loss": list(found), "perplexity": [_finite(perplexity(end, 1)) for end in found]}
    return {
        "loss": loss_sum / total if total else None,
        "perplexity": _finite(perplexity(loss_sum, total)) if total else None,
        "bits_per_byte": bits_per_byte(loss_sum, num_bytes) if num_bytes else None,
        "num_tokens": total,
        "accuracy": int(num_correct.sum()) / total if total else None,
        "num_documents": len(loss_sums),
        "interval": interval,
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def figures_by_category(
    of_documents: Sequence[str], sums: Sequence[npt.NDArray[Any]], num_bytes: npt.NDArray[np.int64] | None
) -> dict[str, dict[str, Any]]:
    """The figures of each category, most predicted tokens first."""
    numbers: dict[str, int] = {}
    of_document = np.array([numbers.setdefault(name, len(numbers)) for name in of_documents])
    order = np.argsort(of_document, kind="stable")
    ends = np.cumsum(np.bincount(of_document))
    figures = {}
    for name, number in numbers.items():
        chosen = order[ends[number - 1] if number else 0 : ends[number]]
        of_category = None if num_bytes is None else int(num_bytes[chosen].sum())
        figures[name] = figures_of([values[chosen] for values in sums], of_category, num_shares=len(numbers))
    return dict(sorted(figures.items(), key=lambda item: -item[1]["num_tokens"]))
