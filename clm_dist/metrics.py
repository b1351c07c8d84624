"""Figures of a language model and of its training; no torch."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import TypedDict  # as in files.result

from clm_dist.devices import device_of

# Of a bootstrap: as many as take a few seconds.
_LEAST_DRAWS, _MOST_DRAWS, _DRAWN_DOCUMENTS = 200, 2000, 10**8
_MOST_GROUPS, _DRAWN_AT_ONCE = 10**5, 10**6


def perplexity(loss_sum: float, num_tokens: int) -> float:
    """exp of the mean loss of a token, in nats; infinite where a float cannot hold it."""
    mean = loss_sum / num_tokens
    return math.exp(mean) if mean < 709 else math.inf


def bootstrap_interval(
    loss_sums: npt.NDArray[Any], num_tokens: npt.NDArray[Any], *, level: float = 0.95, num_shares: int = 1
) -> tuple[float, float] | None:
    """Interval of the mean loss of a token, from drawing documents again, with replacement; None for fewer than two.

    The percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13) of a ratio of
    sums. Documents are drawn and not tokens, because the tokens of one are alike. The draws are the same every time.

    Args:
        loss_sums: of each document, nats.
        num_tokens: predicted tokens of each document.
        num_shares: of how many intervals this is one, which share a few seconds.
    """
    if len(loss_sums) > _MOST_GROUPS:
        # Of many documents groups are drawn, of which each has some from all over the text.
        group = np.arange(len(loss_sums)) % _MOST_GROUPS
        loss_sums, num_tokens = (np.bincount(group, values) for values in (loss_sums, num_tokens))
    size = len(loss_sums)
    if size < 2:
        return None
    generator = np.random.default_rng(0)
    num_draws = max(_LEAST_DRAWS, min(_MOST_DRAWS, _DRAWN_DOCUMENTS // (size * num_shares)))
    at_once = max(1, _DRAWN_AT_ONCE // size)
    means = []
    for start in range(0, num_draws, at_once):
        drawn = generator.integers(size, size=(min(at_once, num_draws - start), size))
        means.append(loss_sums[drawn].sum(axis=1) / num_tokens[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bits_per_byte(loss_sum: float, num_bytes: int) -> float:
    """Bits that the model needs for a byte of text: comparable between tokenizers."""
    return loss_sum / math.log(2) / num_bytes


def flops_per_token(num_parameters: int, num_layers: int, hidden_size: int, block_size: int) -> float:
    """Floating point operations to train on one token: 6N + 12LTd (Chowdhery et al. 2022, PaLM, appendix B)."""
    return 6 * num_parameters + 12 * num_layers * hidden_size * block_size


def model_flops_utilization(
    tokens_per_s: float, flops_a_token: float, device_name: str, num_devices: int
) -> float | None:
    """Share of the devices' peak that training uses; None where the device's peak is not known."""
    device = device_of(device_name)
    return None if device is None else tokens_per_s * flops_a_token / (device.half_flops * num_devices)


SPIKE_WINDOW = 128
_SPIKE_SIGMAS = 6.0
_SPIKE_LEAST = 32


def spike_limit(recent: Sequence[float]) -> float:
    """The training loss above which a step stands out from those before it; infinite while there are few.

    The median plus 6 standard deviations, these estimated as 1.4826 median absolute deviations, so that one spike does
    not hide the next (the Hampel identifier; Davies and Gather 1993, "The identification of multiple outliers"). The
    128 steps and the 6 are those of OLMo 2's rule (OLMo team 2025, "2 OLMo 2 Furious").

    Args:
        recent: losses of the last SPIKE_WINDOW steps, in any order.
    """
    if len(recent) < _SPIKE_LEAST:
        return math.inf
    median = statistics.median(recent)
    deviation = statistics.median(abs(loss - median) for loss in recent)
    return median + _SPIKE_SIGMAS * 1.4826 * deviation if deviation else math.inf


@dataclass(frozen=True)
class MicroLoss:
    """One micro-batch of an evaluation."""

    index: int
    loss_sum: float
    """Nats, summed in float64."""
    num_tokens: int
    """Predicted tokens."""
    num_bytes: int
    """Bytes of text of the predicted tokens."""


class EvalFigures(TypedDict):
    """The figures of an evaluation as files hold them; see `Evaluation`."""

    step: int
    epoch: float
    loss: float
    perplexity: float | None
    """None where a float cannot hold it."""
    bits_per_byte: float | None
    num_tokens: int


@dataclass(frozen=True)
class Evaluation:
    """The eval split's figures after a step. Step 0 is the untouched model."""

    step: int
    epoch: float
    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int

    def figures(self) -> EvalFigures:
        return {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "perplexity": None if self.perplexity == math.inf else self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "num_tokens": self.num_tokens,
        }


def combine(micros: Sequence[MicroLoss], *, step: int, epoch: float, num_micros: int, num_tokens: int) -> Evaluation:
    """The evaluation of a whole split from its micro-batches, whichever ranks ran them, in whatever order.

    Adding in the order of the micro-batches makes the sum the same to the last bit at every number of workers.

    Raises:
        ValueError: a micro-batch is missing or counted twice, the tokens do not add up to the split, or the loss is
            not finite.
    """
    ordered = sorted(micros, key=lambda micro: micro.index)
    if [micro.index for micro in ordered] != list(range(num_micros)):
        raise ValueError(f"the evaluation of step {step} has {len(ordered)} micro-batches, the split {num_micros}")
    tokens = sum(micro.num_tokens for micro in ordered)
    if tokens != num_tokens:
        raise ValueError(f"the evaluation of step {step} covers {tokens} tokens, the split has {num_tokens}")
    loss_sum = 0.0
    for micro in ordered:
        loss_sum += micro.loss_sum
    if not math.isfinite(loss_sum):
        raise ValueError(f"the eval loss of step {step} is {loss_sum}")
    num_bytes = sum(micro.num_bytes for micro in ordered)
    return Evaluation(
        step=step,
        epoch=epoch,
        loss=loss_sum / tokens,
        perplexity=perplexity(loss_sum, tokens),
        bits_per_byte=bits_per_byte(loss_sum, num_bytes) if num_bytes else None,
        num_tokens=tokens,
    )
