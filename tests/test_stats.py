"""The Wilson interval against the definition it comes from and published values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diwa.stats import Z95, success_rate, wilson_interval


@pytest.mark.parametrize(
    "successes, n, low, high",
    [
        # Newcombe (1998), table I, method 3, to four places.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_ends_solve_the_score_equation(case):
    successes, n = case
    p = successes / n
    for end in wilson_interval(successes, n):
        assert 0 <= end <= 1
        # The ends are where the score test statistic equals its quantile; relative rounding only.
        assert abs(p - end) == pytest.approx(
            Z95 * math.sqrt(end * (1 - end) / n), rel=1e-6, abs=1e-7
        )


@given(st.integers(1, 500), st.integers(0, 500))
def test_mirror(n, successes):
    successes = min(successes, n)
    low, high = wilson_interval(successes, n)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(n - successes, n), abs=1e-12)


def test_no_episodes_and_impossible_counts():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for bad in ((-1, 5), (6, 5)):
        with pytest.raises(ValueError):
            wilson_interval(*bad)


def test_success_rate_form():
    assert success_rate(3, 4) == {"success": 0.75, "n": 4, "ci": [*wilson_interval(3, 4)]}
