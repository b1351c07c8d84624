"""Figures from sums."""

import math
import random

import evaluate
import pytest

import clm_dist.perplexity
from clm_dist.metrics import MicroLoss, bits_per_byte, combine, flops_per_token, model_flops_utilization, perplexity


def parts(number: int) -> list[MicroLoss]:
    generator = random.Random(0)
    return [MicroLoss(i, generator.uniform(0, 1000), 10 + i % 3, 40) for i in range(number)]


def test_combine_is_equal_to_the_last_bit_in_whatever_order_parts_come() -> None:
    ordered = parts(1000)
    total = sum(part.num_tokens for part in ordered)
    expected = combine(ordered, step=1, epoch=0.5, num_micros=1000, num_tokens=total)
    for seed in range(5):
        shuffled = random.Random(seed).sample(ordered, len(ordered))
        assert combine(shuffled, step=1, epoch=0.5, num_micros=1000, num_tokens=total) == expected
    loss_sum = math.fsum(part.loss_sum for part in ordered)
    assert expected.loss == pytest.approx(loss_sum / total, rel=1e-12)
    assert expected.perplexity == math.exp(expected.loss)
    assert expected.bits_per_byte == pytest.approx(loss_sum / math.log(2) / 40_000)


def test_micro_batches_of_different_sizes_weigh_by_their_tokens() -> None:
    evaluation = combine(
        [MicroLoss(0, 30.0, 10, 1), MicroLoss(1, 2.0, 2, 1)], step=0, epoch=0, num_micros=2, num_tokens=12
    )
    # The mean of means would be 2.0.
    assert evaluation.loss == pytest.approx(32 / 12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (parts(9), "9 micro-batches, the split 10"),
        ([*parts(10), parts(1)[0]], "11 micro-batches, the split 10"),
        ([*parts(9), parts(1)[0]], "10 micro-batches, the split 10"),
        ([*parts(9), MicroLoss(9, 1.0, 999, 1)], "tokens, the split has"),
        ([*parts(9), MicroLoss(9, math.nan, 10, 1)], "eval loss of step 0 is nan"),
    ],
)
def test_parts_that_do_not_add_up_to_the_split_are_refused(wrong: list[MicroLoss], message: str) -> None:
    total = sum(part.num_tokens for part in parts(10))
    with pytest.raises(ValueError, match=message):
        combine(wrong, step=0, epoch=0, num_micros=10, num_tokens=total)


def test_perplexity_of_a_hopeless_model_is_infinite_and_written_as_null() -> None:
    assert perplexity(1e6, 10) == math.inf
    evaluation = combine([MicroLoss(0, 1e6, 10, 0)], step=0, epoch=0, num_micros=1, num_tokens=10)
    assert (evaluation.figures()["perplexity"], evaluation.figures()["bits_per_byte"]) == (None, None)


def test_bits_per_byte_of_a_uniform_model_over_bytes_is_eight() -> None:
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8)


def test_utilization_is_known_only_for_known_devices() -> None:
    flops = flops_per_token(1000, 2, 8, 16)
    assert flops == 6000 + 12 * 2 * 8 * 16
    assert model_flops_utilization(989e12 / flops, flops, "NVIDIA H100 80GB HBM3", 2) == pytest.approx(0.5)
    assert model_flops_utilization(756e12 / flops, flops, "NVIDIA H100 PCIe", 1) == pytest.approx(1)
    assert model_flops_utilization(1.0, flops, "CPU", 1) is None


def test_evaluate_metric_gives_the_same_perplexity() -> None:
    metric = evaluate.load(clm_dist.perplexity.__file__)
    for part in parts(10):
        metric.add(loss_sums=part.loss_sum, num_tokens=part.num_tokens)
    total = sum(part.num_tokens for part in parts(10))
    expected = combine(parts(10), step=0, epoch=0, num_micros=10, num_tokens=total).perplexity
    assert metric.compute()["perplexity"] == pytest.approx(expected, rel=1e-12)
