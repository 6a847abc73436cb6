"""Samplers against a closed form: data that are Gaussian, whose x_0 and whose paths are known.

For x_0 ~ N(m, s^2), x_t is N(alpha m, alpha^2 s^2 + sigma^2), the best guess of x_0 at x_t is linear in x_t, and the
ODE carries quantiles along. Tables end above the clean image, so that halving the steps halves every step.
"""

import itertools
import math

import pytest
import torch

from triptych.diffusion.process import NoiseLevel
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import Levels

MEAN, SPREAD = 0.7, 0.4


def denoise(x, t):
    """E[x_0 | x_t = x]; t is the angle of (alpha, sigma)."""
    alpha, sigma = torch.cos(t)[:, None], torch.sin(t)[:, None]
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN)


def spread(level):
    return math.hypot(level.alpha * SPREAD, level.sigma)


def at(angle):
    return NoiseLevel(math.cos(angle) if angle < math.pi / 2 else 0.0, math.sin(angle), angle)


class Angles:
    """The process of these levels, as samplers need it."""

    level = staticmethod(at)
    time = staticmethod(math.atan)


def even(count, start=0.95):
    """Angles from `start` to 0.1 of a quarter turn."""
    angles = (math.pi / 2 * (start + (0.1 - start) * i / count) for i in range(count + 1))
    return Levels(Angles, map(at, angles))


def falls(errors):
    """Return how many times the error halves when the number of steps doubles."""
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


@pytest.mark.parametrize("start", [0.95, 1.0], ids=["from-noisy", "from-pure-noise"])
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddim", 1),
        ("euler", 1),
        ("heun", 2),
        ("heun++2", 1),
        ("plms", 2),
        ("lms", 2),
        ("dpm2", 2),
        ("deis", 2),
        ("dpm++2m", 2),
        ("unipc", 3),
    ],
)
def test_the_error_falls_at_the_methods_order(name, order, start):
    x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    errors = []
    for count in (80, 160, 320):
        levels = even(count, start)
        errors.append(error_of(name, x, levels))
    assert min(falls(errors)) > order - 0.4
    assert errors[-1] < {1: 5e-3, 2: 5e-5, 3: 5e-6}[order]


@pytest.mark.parametrize(("counts", "order"), [((79, 160, 319), 2), ((80, 161, 323), 3)])
def test_dpm_fast_is_of_order_3_and_its_last_step_of_the_rest(counts, order):
    """A last step of order 1 costs an order."""
    x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    errors = [error_of("dpm-fast", x, even(count)) for count in counts]
    assert min(falls(errors)) > order - 0.4
    assert errors[-1] < 1e-4


def test_dpm_adaptive_keeps_to_its_tolerance():
    x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    error = error_of("dpm-adaptive", x, even(5))
    assert error < 0.05  # the relative tolerance of a step
    assert error_of("dpm-adaptive", x, even(50)) == pytest.approx(error)  # only the ends of the table count


def error_of(name, x, levels):
    *_, last = SAMPLERS[name](denoise, x, levels, noise=None)
    first, end = levels[0], levels[-1]
    exact = end.alpha * MEAN + spread(end) / spread(first) * (x - first.alpha * MEAN)
    return (last.x - exact).abs().max().item()


@pytest.mark.parametrize("start", [0.95, 1.0], ids=["from-noisy", "from-pure-noise"])
@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("ddpm", 1),
        ("euler-ancestral", 1),
        ("dpm2-ancestral", 1),
        ("dpm++2s-ancestral", 1),
        ("dpm++sde", 1),
        ("dpm++2m-sde", 2),
        ("dpm++2m-sde-heun", 2),
        ("dpm++3m-sde", 2),
    ],
)
def test_the_spread_of_noisy_samples_falls_in_place(name, order, start):
    """Everything is linear, so the variance is exact: squared responses to the independent noises, summed."""
    errors = []
    for count in (40, 80, 160):
        levels = even(count, start)
        # Row i < 2 count has draw i alone (some samplers draw twice), then a start of 1, the last row nothing.
        x = torch.zeros(2 * count + 2, 1, dtype=torch.float64)
        x[2 * count] = 1
        *_, last = SAMPLERS[name](
            denoise, x, levels, noise=lambda i, x=x: torch.eye(len(x), dtype=x.dtype)[:, i : i + 1]
        )
        response = last.x[:-1, 0] - last.x[-1, 0]
        variance = response[:-1].square().sum() + response[-1] ** 2 * spread(levels[0]) ** 2
        mean = last.x[-1, 0] + response[-1] * levels[0].alpha * MEAN
        assert mean.item() == pytest.approx(levels[-1].alpha * MEAN)
        errors.append(abs(variance.item() - spread(levels[-1]) ** 2))
    assert min(falls(errors)) > order - 0.3


def test_lcm_draws_from_the_data_if_the_network_is_consistent():
    """For a perfectly consistent network, which predicts the end of the path, any number of steps is exact."""

    def consistent(x, t):
        alpha, sigma = torch.cos(t)[:, None], torch.sin(t)[:, None]
        return MEAN + SPREAD / (alpha**2 * SPREAD**2 + sigma**2).sqrt() * (x - alpha * MEAN)

    for count in (1, 2, 5):
        levels = (*(at(math.pi / 2 * (1 - i / count)) for i in range(count)), NoiseLevel(1.0, 0.0, 0.0))
        # Times of a network; LCM mixes in x itself near 0.
        timed = tuple(level._replace(t=level.t * 1e4) for level in levels)
        x = torch.zeros(count + 2, 1, dtype=torch.float64)
        x[count] = 1
        *_, last = SAMPLERS["lcm"](
            lambda x, t: consistent(x, t / 1e4),
            x,
            timed,
            noise=lambda i, x=x: torch.eye(len(x), dtype=x.dtype)[:, i : i + 1],
        )
        response = last.x[:-1, 0] - last.x[-1, 0]
        assert response.square().sum().item() == pytest.approx(SPREAD**2, rel=1e-6)
        assert last.x[-1, 0].item() == pytest.approx(MEAN, rel=1e-6)
