"""The loss of a denoiser: closed forms of its weights, one loss in four parametrizations, times and noise."""

import numpy as np
import pytest
import torch

from triptych.diffusion.config import NoiseConfig, ProcessConfig
from triptych.diffusion.loss import diffusion_loss, draw_noise, draw_times, min_snr_weight, prediction_error
from triptych.diffusion.process import Process
from triptych.errors import ConfigError

PREDICTIONS = ("eps", "v", "x0", "flow")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_closed_forms(gamma):
    """Hang et al. 2023, Section 3.4, and for v the footnote of Salimans and Ho 2022: SNR + 1."""
    process = Process(ProcessConfig())
    alpha, sigma = process.at(torch.arange(1000))
    snr = (alpha.double() / sigma) ** 2
    bounded = snr.clamp(max=gamma)
    wanted = {"eps": bounded / snr, "v": bounded / (snr + 1), "x0": bounded}
    for prediction, weight in wanted.items():
        weights = min_snr_weight(prediction, alpha, sigma, gamma)
        torch.testing.assert_close(weights.double(), weight, rtol=1e-4, atol=1e-7)


def test_min_snr_weight_of_a_flow():
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.1, 0.5, 0.9])
    weights = min_snr_weight("flow", alpha, sigma, 5.0)
    wanted = (alpha / sigma).square().clamp(max=5.0) * sigma**2  # alpha + sigma = 1
    torch.testing.assert_close(weights, wanted)


@pytest.mark.parametrize("schedule", ["scaled_linear", "cosine", "flow"])
@pytest.mark.parametrize("gamma", [2.0, 5.0])
def test_the_loss_does_not_depend_on_the_parametrization(schedule, gamma):
    """The same x_0 in four parametrizations: the weighted error must not depend on the choice."""
    x0, eps, seen = torch.randn(3, 6, 4, 5, 5, dtype=torch.float64)
    t = torch.tensor([1.0, 40, 200, 500, 800, 990])
    predictions = PREDICTIONS[1:] if schedule == "flow" else PREDICTIONS
    losses = {}
    for prediction in predictions:
        process = Process(ProcessConfig(schedule=schedule, prediction=prediction))
        output = process.from_x0(process.noised(x0, eps, t), seen, t)
        losses[prediction] = prediction_error(
            output.double(), x0, eps, t, process, NoiseConfig(min_snr=gamma)
        ).item()
    alpha, sigma = process.at(t.double())
    wanted = ((alpha / sigma) ** 2).clamp(max=gamma) * (seen - x0).square().flatten(1).mean(1)
    for loss in losses.values():
        assert loss == pytest.approx(wanted.mean().item(), rel=2e-4)


def test_without_weights_it_is_the_mean_squared_error_of_the_prediction():
    process = Process(ProcessConfig(prediction="v"))
    x0, eps = torch.randn(2, 4, 3, 5, 5)
    t = torch.tensor([3.0, 400, 700, 999])
    output = torch.randn(4, 3, 5, 5)
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in process.at(t))
    error = prediction_error(output, x0, eps, t, process, NoiseConfig())
    torch.testing.assert_close(error, (output - alpha * eps + sigma * x0).square().mean())


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_weights_stay_finite_where_no_signal_is_left(prediction):
    process = Process(ProcessConfig(zero_terminal_snr=True, prediction=prediction))
    x0, eps = torch.randn(2, 2, 3, 4, 4)
    output = torch.randn(2, 3, 4, 4, requires_grad=True)
    t = torch.tensor([999.0, 999.0])
    loss = prediction_error(output, x0, eps, t, process, NoiseConfig(min_snr=5.0))
    loss.backward()
    assert loss.isfinite()
    assert output.grad.isfinite().all()
    assert prediction_error(output, x0, eps, t, process, NoiseConfig()) > 0


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "flow"])
def test_times_have_the_distribution_that_is_asked_for(times, schedule):
    process = Process(ProcessConfig(schedule=schedule, prediction="v"))
    noise = NoiseConfig(times=times, logit_mean=0.5, logit_std=0.8)
    t = torch.cat([draw_times(7, process, noise, seeded(i)) for i in range(600)]).double().numpy() / 1000
    if schedule == "flow":
        assert t.min() > 0
        assert t.max() <= 1
    else:
        assert set(t * 1000) <= set(range(1000))
    quantiles = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    if times == "uniform":
        wanted = quantiles
    else:
        normal = np.array([-1.2816, -0.6745, 0.0, 0.6745, 1.2816])
        wanted = 1 / (1 + np.exp(-(0.5 + 0.8 * normal)))
    np.testing.assert_allclose(np.quantile(t, quantiles), wanted, atol=0.02)


def test_the_times_of_a_batch_are_spread_evenly():
    process = Process(ProcessConfig())
    t = draw_times(10, process, NoiseConfig(), seeded(3))
    assert sorted((t // 100).tolist()) == list(range(10))
    assert t.tolist() != sorted(t.tolist())  # but unordered: neighbors in a batch are independent


def test_offset_noise_moves_whole_channels():
    x0 = torch.zeros(400, 3, 8, 8)
    plain = draw_noise(x0, NoiseConfig(), seeded())
    offset = draw_noise(x0, NoiseConfig(offset=0.5), seeded())
    moved = offset - plain
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-6)
    assert moved[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.08)
    assert offset.mean((2, 3)).var().item() == pytest.approx(0.25 + 1 / 64, rel=0.15)


def test_the_loss_is_a_function_of_its_generator():
    process, x0 = Process(ProcessConfig(prediction="v")), torch.randn(4, 2, 3, 3)
    losses = [
        diffusion_loss(
            lambda x, t: x * t.view(-1, 1, 1, 1) / 1000, x0, process, NoiseConfig(), seeded(s)
        ).item()
        for s in (1, 1, 2)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_a_perfect_network_has_no_loss():
    process, x0 = Process(ProcessConfig(schedule="flow", prediction="flow")), torch.randn(5, 2, 3, 3)

    def knows(x, t):
        return process.from_x0(x, x0, t)

    assert diffusion_loss(knows, x0, process, NoiseConfig(times="logit_normal"), seeded()).item() < 1e-6


def test_a_bad_config_is_one_line():
    with pytest.raises(ConfigError, match=r"NoiseConfig.min_snr is -1.0, which must be at least 0"):
        NoiseConfig(min_snr=-1.0)
    with pytest.raises(ConfigError, match=r"NoiseConfig.times is 'cosine', which must be one of"):
        NoiseConfig(times="cosine")
