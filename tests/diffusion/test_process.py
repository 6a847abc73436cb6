"""Tables of alpha and sigma, the parametrizations of predictions, and checks of configs."""

import math
import subprocess
import sys

import pytest
import torch

from triptych.config import from_json, to_json
from triptych.diffusion.config import (
    COMPVIS_SCHEDULES,
    DIFFUSERS_SCHEDULES,
    SAMPLERS,
    SPACINGS,
    ProcessConfig,
    usual_spacing,
)
from triptych.diffusion.process import Process, betas, from_x0, network_denoiser, target, to_x0
from triptych.diffusion.samplers import SAMPLERS as FUNCTIONS
from triptych.diffusion.samplers import sampler
from triptych.errors import ConfigError, require_known

SETTINGS = [
    {"prediction": "eps"},
    {"prediction": "v", "zero_terminal_snr": True},
    {"prediction": "x0", "schedule": "cosine"},
    {"prediction": "flow", "schedule": "flow"},
    {"prediction": "flow", "schedule": "linear"},
    {"prediction": "v", "schedule": "flow"},
]


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-snr"])
@pytest.mark.parametrize("theirs", DIFFUSERS_SCHEDULES)
def test_tables_are_diffusers(theirs, zero):
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DDIMScheduler(
        beta_schedule=theirs, beta_start=0.0015, beta_end=0.0195, rescale_betas_zero_snr=zero
    )
    config = ProcessConfig(
        schedule=DIFFUSERS_SCHEDULES[theirs],
        beta_start=0.0015,
        beta_end=0.0195,
        zero_terminal_snr=zero,
        prediction="v",
    )
    torch.testing.assert_close(
        torch.tensor(betas(config)), peer.betas, atol=1e-6, rtol=2e-4 if zero else 1e-5
    )
    ours = torch.tensor(Process(config).alphas)
    # Theirs is a product of a thousand roundings to fp32.
    torch.testing.assert_close(ours, peer.alphas_cumprod.sqrt(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "table"),
    [
        ("linear", lambda: torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2),
        ("sqrt_linear", lambda: torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)),
    ],
)
def test_compvis_calls_linear_what_diffusers_calls_scaled(theirs, table):
    ours = betas(ProcessConfig(schedule=COMPVIS_SCHEDULES[theirs]))
    torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), table())


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_variance_is_preserved_and_noise_grows(schedule, process):
    process = process(schedule=schedule)
    assert len(process.alphas) == len(process.sigmas) == 1000
    assert all(a**2 + s**2 == pytest.approx(1) for a, s in zip(process.alphas, process.sigmas, strict=True))
    assert list(process.sigmas) == sorted(process.sigmas)


def test_zero_terminal_snr_keeps_the_start_and_empties_the_end(process):
    plain, rescaled = process(), process(zero_terminal_snr=True, prediction="v")
    assert rescaled.alphas[0] == pytest.approx(plain.alphas[0])
    assert (rescaled.alphas[-1], rescaled.sigmas[-1]) == (0, 1)
    assert rescaled.snr(torch.tensor([0, 998, 999])).isfinite().all()
    assert rescaled.snr(torch.tensor(999)) == 0


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_levels_and_times_are_each_others_inverse(settings, process):
    process = process(**settings)
    times = [process.first, process.first + 0.3, 17, 400.25, 997.9, process.last]
    for t in times:
        level = process.level(t)
        alpha, sigma = process.at(torch.tensor([t], dtype=torch.float64))
        assert (alpha.item(), sigma.item()) == pytest.approx((level.alpha, level.sigma))
        ratio = level.sigma / level.alpha if level.alpha else math.inf
        assert process.time(ratio) == pytest.approx(t)
    assert process.time(0.0) == (0 if process.config.schedule == "flow" else process.first)
    assert process.time(math.inf) == process.last
    at_integers = process.at(torch.tensor([1, 500]))
    assert all(
        torch.equal(values, process.at(torch.tensor([1.0, 500.0]))[i]) for i, values in enumerate(at_integers)
    )
    assert at_integers[0].dtype == torch.float32


def test_between_whole_times_the_log_ratio_is_even(process):
    process = process()
    ratios = [process.level(t).sigma / process.level(t).alpha for t in (0, 0.5, 1)]
    assert ratios[1] == pytest.approx(math.sqrt(ratios[0] * ratios[2]))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_what_is_predicted_gives_the_data_back(settings, process):
    process = process(**settings)
    x0, eps = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    t = torch.tensor([process.first, 3.5, 250, 800, process.last], dtype=torch.float64)
    x = process.noised(x0, eps, t)
    alpha, sigma = (values[:, None, None, None] for values in process.at(t))
    torch.testing.assert_close(x, alpha * x0 + sigma * eps)
    output = process.target(x0, eps, t)
    torch.testing.assert_close(process.to_x0(x, output, t), x0)
    torch.testing.assert_close(process.from_x0(x, x0, t), output)
    torch.testing.assert_close(network_denoiser(lambda x, t: output, process)(x, t), x0)


def test_targets_are_the_papers():
    x0, eps, alpha, sigma = torch.randn(4, 3)
    assert torch.equal(target("eps", x0, eps, alpha, sigma), eps)
    assert torch.equal(target("x0", x0, eps, alpha, sigma), x0)
    torch.testing.assert_close(target("v", x0, eps, alpha, sigma), alpha * eps - sigma * x0)
    torch.testing.assert_close(target("flow", x0, eps, alpha, sigma), eps - x0)


@pytest.mark.parametrize("prediction", ["v", "x0", "flow"])
def test_pure_noise_divides_by_nothing(prediction):
    x, output, zero, one = torch.randn(3), torch.randn(3), torch.zeros(()), torch.ones(())
    x0 = to_x0(prediction, x, output, zero, one)
    assert x0.isfinite().all()
    torch.testing.assert_close(from_x0(prediction, x, x0, zero, one), output)


def test_the_network_computes_in_its_own_type(process):
    seen = []

    def net(x, t):
        seen.append((x.dtype, t.dtype))
        return x

    answer = network_denoiser(net, process(), torch.bfloat16)(
        torch.randn(2, 4, 3, 3), torch.full((2,), 999.0)
    )
    assert seen == [(torch.bfloat16, torch.float32)]
    assert answer.dtype == torch.float32


def test_tables_live_where_times_do():
    with torch.device("meta"):
        process = Process(ProcessConfig())
        assert process.noised(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)).is_meta
    with torch.inference_mode():
        process.at(torch.tensor([3.0]))
    x0 = torch.randn(1, 3, requires_grad=True)
    process.noised(x0, torch.randn(1, 3), torch.tensor([3.0])).sum().backward()
    assert x0.grad is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"schedule": "sqrt_linear"}, "scaled_linear"),
        ({"prediction": "epsilon"}, "eps"),
        ({"num_timesteps": 1}, "num_timesteps is 1, which must be from 2 to"),
        ({"beta_start": 0.02}, "in this order"),
        ({"beta_end": 1.5}, "between 0 and 1"),
        ({"zero_terminal_snr": True}, "use 'v'"),
        ({"schedule": "flow"}, "use 'v'"),
        (
            {"schedule": "flow", "prediction": "flow", "zero_terminal_snr": True},
            "leave zero_terminal_snr out",
        ),
    ],
)
def test_a_config_that_cannot_be_is_one_line(settings, words):
    with pytest.raises(ConfigError, match=words) as raised:
        ProcessConfig(**settings)
    assert "\n" not in str(raised.value)


def test_configs_come_back_from_json():
    config = ProcessConfig(schedule="cosine", prediction="v", zero_terminal_snr=True)
    assert from_json(ProcessConfig, to_json(config)) == config


def test_every_name_has_its_function():
    assert list(SAMPLERS) == list(FUNCTIONS)
    assert all(sampler(name) is FUNCTIONS[name] for name in SAMPLERS)
    for name in SAMPLERS:
        assert usual_spacing(name, ProcessConfig()) in SPACINGS
        assert usual_spacing(name, ProcessConfig(schedule="flow", prediction="flow")) in ("trailing", "lcm")


def test_a_schedule_that_ends_in_noise_is_entered_there():
    sd2 = ProcessConfig(prediction="v")
    assert [usual_spacing(name, sd2) for name in ("plms", "euler", "dpm++2m")] == [
        "compvis",
        "uniform",
        "multistep",
    ]
    rescaled = ProcessConfig(prediction="v", zero_terminal_snr=True)
    assert {usual_spacing(name, rescaled) for name in SAMPLERS if name != "lcm"} == {"trailing"}


@pytest.mark.parametrize(
    ("name", "near"),
    [("dpm++ 2m", "dpm++2m"), ("euler_a", "euler-ancestral"), ("DDIM", "ddim"), ("???", "there are ddpm")],
)
def test_an_unknown_sampler_names_the_near_ones(name, near):
    with pytest.raises(ConfigError) as raised:
        sampler(name)
    assert near in str(raised.value)
    assert repr(name) in str(raised.value)
    with pytest.raises(ConfigError):
        usual_spacing(name, ProcessConfig())
    assert require_known("ddim", SAMPLERS, "sampler") == "ddim"


def test_the_names_need_no_torch():
    code = "import sys, triptych.diffusion.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
