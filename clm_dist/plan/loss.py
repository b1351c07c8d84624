"""The eval loss to expect from more training data: a saturating power law through the losses of runs on less.

L(D) = E + A D^-a, with D distinct training tokens, is the form of Kaplan et al. 2020, "Scaling Laws for Neural Language
Models" (section 3, with E = 0) and Hoffmann et al. 2022, "Training Compute-Optimal Large Language Models" (section 3.3,
equation 2; at one number of parameters E has the limit of the model in it). Two or three points do not determine three
parameters. The interval is therefore not that of one fit: it covers all curves that the points allow. It is Bayesian,
with these priors:

- The exponent a is from 0.05 to 1, uniform in its logarithm. Kaplan et al. found 0.095 (equation 1.2), Hoffmann et al.
  0.28 (equation 10).
- For each exponent, the loss at the largest D and the fall since the smallest are uniform; the fall and E are not
  negative.
- Losses have normal errors: that of the eval text, and 0.02 nats between runs that differ only in their seeds (Kaplan
  et al., section 4.2). If no exponent fits, or runs of one size lie further apart, the errors grow by the Birge ratio
  (Birge 1932, "The Calculation of Errors by the Method of Least Squares").

The further the prediction lies from the points, the more the exponents disagree, and the wider is the interval. Two
points leave the exponent open, which the interval shows; they are enough because the exponent has bounds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EXPONENTS = (0.05, 1.0)
SEED_ERROR = 0.02
"""Standard deviation of the loss between runs that differ only in their seeds, nats."""
LEVEL = 0.95
_NUM_EXPONENTS, _NUM_DRAWS = 100, 200
_LEAST_KEPT = 200
"""Draws below which there is no curve."""
_NORMAL = 1.959963984540054
"""Standard deviations on either side of a mean that have `LEVEL` of a normal distribution."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """The final eval loss of a run."""

    tokens: float
    """Distinct training tokens."""
    loss: float
    """Nats per token."""
    error: float = 0.0
    """Standard error, where the eval text differs from that of the other points."""


@dataclass(frozen=True)
class Estimate:
    """A median, and the interval that has 95 % of the probability."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ExpectedLoss:
    """The eval loss to expect."""

    loss: Estimate
    perplexity: Estimate
    exponent: Estimate
    limit: Estimate
    """E: the loss that more data of the same kind does not fall below."""
    misfit: float
    """Factor by which the errors grew because no curve fits the points; 1 where one does."""


def expect_loss(
    points: Sequence[Point], tokens: Estimate, *, text_error: float = 0.0, seed_error: float = SEED_ERROR
) -> ExpectedLoss | str:
    """The eval loss of a run on `tokens` distinct tokens, or why there is none.

    Args:
        points: at least one.
        text_error: standard error of the loss that comes from the eval text of that run.
    """
    sizes, losses = (np.array([getattr(point, name) for point in points]) for name in ("tokens", "loss"))
    largest, smallest = sizes.max(), sizes.min()
    if largest == smallest:
        return "a curve takes runs on at least two sizes of the training data"
    errors = np.hypot([point.error for point in points], seed_error)
    if np.polyfit(np.log(sizes), losses, 1, w=1 / errors)[0] >= 0:
        return "the eval loss does not fall with more data"

    exponents = np.geomspace(*EXPONENTS, _NUM_EXPONENTS)
    # The curve is u + v h(D): u at the largest D, h is 1 at the smallest, 0 at the largest, and lowest without end.
    scale = np.expm1(exponents * math.log(largest / smallest))

    def shape(at: Floats) -> Floats:
        """h for each exponent and each of `at`."""
        values: Floats = np.expm1(-exponents[:, None] * np.log(at / largest)) / scale[:, None]
        return values

    columns = shape(sizes)
    fits = [_fit(column, losses, errors) for column in columns]
    free = len(points) - 3
    misfit = max(1.0, math.sqrt(min(fit.chi2 for fit in fits) / max(1, free)))
    if misfit > 1:
        fits = [_fit(column, losses, errors * misfit) for column in columns]

    random = np.random.default_rng(0)
    evidence = np.array([fit.log_evidence for fit in fits])
    means, roots = (np.stack([getattr(fit, name) for fit in fits]) for name in ("mean", "root"))
    drawn = means[:, None] + np.einsum("aij,adj->adi", roots, random.standard_normal((_NUM_EXPONENTS, _NUM_DRAWS, 2)))
    last, fall = drawn[..., 0], drawn[..., 1]
    limit = last - fall / scale[:, None]
    weights = np.exp(evidence - evidence.max())[:, None] * ((fall >= 0) & (limit >= 0))
    if np.count_nonzero(weights) < _LEAST_KEPT:
        return f"the eval loss falls faster than a power law with an exponent of {EXPONENTS[1]:g}"
    spread = (tokens.high - tokens.low) / 2 / _NORMAL
    at = np.maximum(tokens.value + spread * random.standard_normal(_NUM_DRAWS), 1.0)
    noise = math.hypot(seed_error * misfit, text_error) * random.standard_normal(last.shape)
    loss = _estimate(last + fall * shape(at) + noise, weights)
    return ExpectedLoss(
        loss=loss,
        perplexity=Estimate(*(_perplexity(value) for value in (loss.value, loss.low, loss.high))),
        exponent=_estimate(np.broadcast_to(exponents[:, None], last.shape), weights),
        limit=_estimate(limit, weights),
        misfit=misfit,
    )


@dataclass(frozen=True)
class _Fit:
    """The loss at the largest D and the fall, for one exponent."""

    mean: Floats
    root: Floats
    """A square root of their covariance."""
    chi2: float
    log_evidence: float
    """Logarithm of the probability of the points, but for a constant."""


def _fit(column: Floats, losses: Floats, errors: Floats) -> _Fit:
    design = np.stack([np.ones_like(column), column], axis=1) / errors[:, None]
    scaled = losses / errors
    covariance = np.linalg.inv(design.T @ design)
    mean = covariance @ design.T @ scaled
    chi2 = float(((scaled - design @ mean) ** 2).sum())
    root = np.linalg.cholesky(covariance)
    return _Fit(mean, root, chi2, -chi2 / 2 + float(np.log(np.diag(root)).sum()))


def _estimate(values: Floats, weights: Floats) -> Estimate:
    """Weighted quantiles."""
    flat = values.ravel()
    order = np.argsort(flat)
    total = np.cumsum(weights.ravel()[order])
    places = np.searchsorted(total, np.array([0.5, (1 - LEVEL) / 2, (1 + LEVEL) / 2]) * total[-1])
    return Estimate(*map(float, flat[order][places]))


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf
