"""The curve through the losses of runs: what it predicts, how wide its interval is, and when there is none."""

import numpy as np
import pytest

from clm_dist.plan.loss import Estimate, ExpectedLoss, Point, expect_loss

ERROR = 0.02


def _at(tokens: float) -> Estimate:
    return Estimate(tokens, tokens, tokens)


def _curve(tokens: float, limit: float, scale: float, exponent: float) -> float:
    return float(limit + scale * (tokens / 1e6) ** -exponent)


def _points(sizes: list[float], limit: float, scale: float, exponent: float) -> list[Point]:
    return [Point(size * 1e6, _curve(size * 1e6, limit, scale, exponent)) for size in sizes]


def _expect(points: list[Point], tokens: float, **options: float) -> ExpectedLoss:
    found = expect_loss(points, _at(tokens), **options)
    assert isinstance(found, ExpectedLoss), found
    return found


@pytest.mark.parametrize("exponent", [0.095, 0.28, 0.7])
def test_many_exact_points_give_the_curve_itself(exponent: float) -> None:
    points = _points([1, 2, 4, 8, 16, 32], 2.0, 1.5, exponent)
    found = _expect(points, 64e6, seed_error=1e-3)
    assert found.loss.value == pytest.approx(_curve(64e6, 2.0, 1.5, exponent), abs=0.002)
    assert found.exponent.value == pytest.approx(exponent, rel=0.05)
    assert found.limit.value == pytest.approx(2.0, abs=0.1)
    assert found.loss.high - found.loss.low < 0.01
    assert found.perplexity.value == pytest.approx(np.exp(found.loss.value))


@pytest.mark.parametrize(("sizes", "full"), [([1, 2, 4], 8), ([1, 2, 4], 32), ([1, 4], 8), ([1, 2, 4, 8, 16], 32)])
def test_the_interval_has_the_loss_about_as_often_as_it_says(sizes: list[float], full: float) -> None:
    """Over curves that lie all over what is plausible: 95 %, with a standard deviation of 1.5 over 200 of them."""
    random = np.random.default_rng(0)
    hits = []
    for _ in range(200):
        curve = (random.uniform(1, 3), random.uniform(0.3, 2), 0.05 * 20 ** random.uniform())
        points = [Point(p.tokens, p.loss + ERROR * random.standard_normal()) for p in _points(sizes, *curve)]
        found = expect_loss(points, _at(full * 1e6))
        if isinstance(found, ExpectedLoss):
            loss = _curve(full * 1e6, *curve) + ERROR * random.standard_normal()
            hits.append(found.loss.low <= loss <= found.loss.high)
    assert len(hits) >= 190
    assert 0.92 <= np.mean(hits) <= 0.995


def test_the_interval_grows_with_the_distance_and_with_fewer_points() -> None:
    points = _points([1, 2, 4], 1.7, 2.0, 0.28)
    widths = [(found := _expect(points, size * 1e6).loss).high - found.low for size in (4, 8, 16, 64)]
    assert widths == sorted(widths)
    assert widths[-1] > 3 * widths[0]
    two = _expect([points[0], points[2]], 64e6).loss
    assert two.high - two.low > widths[-1]
    more = _expect(_points([1, 2, 4, 8], 1.7, 2.0, 0.28), 64e6).loss
    assert more.high - more.low < widths[-1]


def test_errors_of_the_text_and_of_the_number_of_tokens_are_in_the_interval() -> None:
    points = _points([1, 2, 4], 1.7, 2.0, 0.28)

    def width(found: ExpectedLoss | str) -> float:
        assert isinstance(found, ExpectedLoss)
        return found.loss.high - found.loss.low

    known = width(expect_loss(points, _at(8e6)))
    assert width(expect_loss(points, _at(8e6), text_error=0.1)) > known + 0.1
    assert width(expect_loss(points, Estimate(8e6, 4e6, 12e6))) > known
    others = [Point(point.tokens, point.loss, 0.1) for point in points]
    assert width(expect_loss(others, _at(8e6))) > 2 * known


def test_points_off_every_curve_make_the_interval_wider() -> None:
    exact = _points([1, 2, 4, 8], 2.0, 1.0, 0.3)
    off = [exact[0], Point(exact[1].tokens, exact[1].loss + 0.3), *exact[2:]]
    one, other = _expect(exact, 16e6), _expect(off, 16e6)
    assert one.misfit == 1
    assert other.misfit > 3
    assert other.loss.high - other.loss.low > 2 * (one.loss.high - one.loss.low)


def test_there_is_no_curve_without_a_fall() -> None:
    rising = [Point(1e6, 3.0), Point(2e6, 3.1), Point(4e6, 3.2)]
    assert expect_loss(rising, _at(8e6)) == "the eval loss does not fall with more data"
    assert "two sizes" in str(expect_loss([Point(1e6, 3.0), Point(1e6, 3.1)], _at(8e6)))
    # It would be below 0 before the data ends.
    steep = [Point(1e6, 8.0), Point(2e6, 0.5)]
    assert "faster than a power law" in str(expect_loss(steep, _at(8e6)))
