"""The quantile function of the beta distribution, without scipy."""

import math

_PRECISION = 1e-15
_MOST_TERMS = 1000


def beta_quantile(probability: float, a: float, b: float) -> float:
    """Return x in [0, 1] with P(X <= x) = `probability` for X ~ Beta(a, b), found by bisection.

    Args:
        probability: from 0 to 1.
        a: first shape, above 0.
        b: second shape, above 0.
    """
    if probability > 0.5:  # floats are denser at 0 than at 1
        return 1 - _lower_quantile(1 - probability, b, a)
    return _lower_quantile(probability, a, b)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return P(X <= x) for X ~ Beta(a, b): the regularized incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the continued fraction converges slowly
        return 1 - beta_cdf(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x) - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b)
    return math.exp(log_front) / a * _continued_fraction(x, a, b)


def _lower_quantile(probability: float, a: float, b: float) -> float:
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        if beta_cdf(middle, a, b) < probability:
            low = middle
        else:
            high = middle
    return high if probability > 0 else 0.0


def _continued_fraction(x: float, a: float, b: float) -> float:
    """Return 1 / (1 + d_1 / (1 + d_2 / (1 + ...))) (DLMF, Equation 8.17.22), evaluated by Lentz's method: the ratio of
    two successive numerators is `c`, that of two denominators is 1 / `d`."""
    value, c, d = 1.0, 1.0, 0.0
    for n in range(1, _MOST_TERMS):
        m = n // 2
        if n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        c, d = 1 + term / c, 1 / (1 + term * d)
        value *= c * d
        if abs(c * d - 1) < _PRECISION:
            break
    return 1 / value
