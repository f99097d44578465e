"""Success rates with intervals."""

from __future__ import annotations

import math

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


def wilson_interval(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of a success rate, in 0..1 (E. B. Wilson, 1927).

    Unlike mean +- z * standard error it stays in 0..1 and does not collapse at 0 and n successes.
    With p = successes / n it is (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n); (0, 1)
    when n is 0.

    Raises:
        ValueError: not 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} episodes")
    if n == 0:
        return 0.0, 1.0
    p, scale = successes / n, 1 + z * z / n
    center = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # Rounding must not push the exact ends past 0 and 1.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == n else center + half
    return low, high


def success_rate(successes: int, n: int) -> dict[str, object]:
    """`{"success": rate, "n": n, "ci": [low, high]}`, the form of every result file."""
    return {"success": successes / n if n else 0.0, "n": n, "ci": [*wilson_interval(successes, n)]}
