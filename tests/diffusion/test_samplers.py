"""Every sampler, step for step, against diffusers' scheduler of the same name."""

import math
from dataclasses import dataclass, field

import pytest
import torch

from triptych.diffusion.config import ADAPTIVE_SAMPLERS
from triptych.diffusion.process import network_denoiser
from triptych.diffusion.samplers import SAMPLERS, ddim, euler, sampler
from triptych.diffusion.schedule import CLEAN, Levels, from_strength, spaced_levels

# diffusers passes a tensor to np.array, about which numpy 2 warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.proves("Samplers", "schedulers of diffusers, step for step", by="diffusers"),
]


STEPS = 10


@dataclass
class Peer:
    scheduler: str
    spacings: dict[str, str]
    """Our name of a table -> theirs."""
    settings: dict = field(default_factory=dict)
    scaled: bool = False
    """Its state is x / alpha."""
    step: dict = field(default_factory=dict)
    noisy: bool = False


EVEN = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
MULTISTEP = {
    "multistep": "linspace",
    "multistep-leading": "leading",
    "trailing": "trailing",
    "karras": "karras",
}
RAMPS = {"karras": "karras", "exponential": "exponential"}
PEERS = {
    "ddpm": Peer("DDPMScheduler", EVEN, {"clip_sample": False}, noisy=True),
    # Its step is T / n whatever the spacing, which misses the next level of linspace.
    "ddim": Peer("DDIMScheduler", {"leading": "leading", "trailing": "trailing"}, {"clip_sample": False}),
    "ddim-eta": Peer(
        "DDIMScheduler", {"leading": "leading"}, {"clip_sample": False}, step={"eta": 0.6}, noisy=True
    ),
    "plms": Peer("PNDMScheduler", {"leading": "leading"}, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "plms-compvis": Peer("PNDMScheduler", {"compvis": "leading"}, {"skip_prk_steps": True}),
    "euler": Peer("EulerDiscreteScheduler", EVEN | RAMPS, scaled=True),
    "euler-ancestral": Peer("EulerAncestralDiscreteScheduler", EVEN, scaled=True, noisy=True),
    "heun": Peer("HeunDiscreteScheduler", EVEN | RAMPS, scaled=True),
    "lms": Peer("LMSDiscreteScheduler", EVEN | RAMPS, scaled=True),
    "dpm++2m": Peer("DPMSolverMultistepScheduler", MULTISTEP),
    "dpm++2m-sde": Peer(
        "DPMSolverMultistepScheduler", MULTISTEP, {"algorithm_type": "sde-dpmsolver++"}, noisy=True
    ),
    "unipc": Peer("UniPCMultistepScheduler", MULTISTEP),
    "lcm": Peer("LCMScheduler", {"lcm": "leading"}, noisy=True),
}
CASES = [(name, spacing) for name, peer in PEERS.items() for spacing in peer.spacings]


def make_scheduler(peer, spacing, prediction, **more):
    schedulers = pytest.importorskip("diffusers.schedulers")
    theirs = peer.spacings[spacing]
    ramp = {f"use_{theirs}_sigmas": True} if theirs in RAMPS else {"timestep_spacing": theirs}
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction],
        "steps_offset": 1,
    }
    return getattr(schedulers, peer.scheduler)(**settings | ramp | peer.settings | more)


def walk(peer, scheduler, net, x, levels):
    """Run their loop and return the state after each step."""
    count = len(levels) - 1
    scheduler.set_timesteps(count)
    times = scheduler.timesteps
    more = dict(peer.step)
    if peer.noisy:
        more["generator"] = torch.Generator().manual_seed(3)
    if peer.scaled:
        x = x / levels[0].alpha
    states = []
    for i, t in enumerate(times):
        # Two of them round the times of Karras' ramp for the network, but not its levels.
        seen = torch.full((len(x),), levels[i].t if len(times) == count else float(t))
        assert (t - seen[0]).abs() < (0.51 if scheduler.config.get("use_karras_sigmas") else 2e-3)
        output = net(scheduler.scale_model_input(x, t), seen)
        x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        states.append(x)
    # Heun calls the network twice in each step but the last, PLMS twice in the first.
    ends = {2 * count - 1: range(1, 2 * count, 2), count + 1: range(1, count + 1), count: range(count)}[
        len(times)
    ]
    states = [states[min(end, len(times) - 1)] for end in ends]
    return [
        state * level.alpha if peer.scaled else state for state, level in zip(states, levels[1:], strict=True)
    ]


def draws_like(x, count=10 * STEPS):
    """Return the noise of step i, drawn from their generator in turn."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(x.shape, generator=generator) for _ in range(count)].__getitem__


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(("name", "spacing"), CASES)
def test_each_step_is_diffusers(name, spacing, prediction, net, process):
    peer, process = PEERS[name], process(prediction=prediction)
    x = torch.randn(2, 4, 6, 5)
    levels = spaced_levels(process, STEPS, spacing)
    their_net, their_prediction = net, prediction
    if name.startswith("plms") and prediction == "v":
        # Theirs averages v over steps; the paper and CompVis average noise, so it gets noise made from the network's v.
        their_prediction = "eps"

        def their_net(x, t):
            alpha, sigma = (v[:, None, None, None] for v in process.at(t))
            return alpha * net(x, t) + sigma * x

    with torch.no_grad():
        theirs = walk(peer, make_scheduler(peer, spacing, their_prediction), their_net, x, levels)
    ours = SAMPLERS[name.removesuffix("-eta").removesuffix("-compvis")]
    steps = list(ours(network_denoiser(net, process), x, levels, noise=draws_like(x), **peer.step))
    for step, state in zip(steps, theirs, strict=True):
        worst = ((step.x - state).abs().max() / state.abs().max()).item()
        assert worst < 1e-5, (step.index, worst)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpm++2m", "dpm++2m-sde", "unipc", "heun"])
def test_image_to_image_starts_in_the_middle_as_diffusers_does(name, net, process):
    peer, process = PEERS[name], process()
    spacing = next(iter(peer.spacings))
    levels = from_strength(spaced_levels(process, STEPS, spacing), 0.55)
    assert len(levels) == 6
    image, eps = torch.randn(2, 2, 4, 6, 5)
    x = levels[0].noised(image, eps)
    scheduler = make_scheduler(peer, spacing, "eps")
    scheduler.set_timesteps(STEPS)
    start = len(scheduler.timesteps) - (9 if name == "heun" else 5)
    times = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    theirs = scheduler.add_noise(image, eps, times[:1])
    torch.testing.assert_close(theirs * (levels[0].alpha if peer.scaled else 1), x, atol=1e-5, rtol=1e-5)
    more = {"generator": torch.Generator().manual_seed(3)} if peer.noisy else {}
    for t in times:
        output = net(scheduler.scale_model_input(theirs, t), torch.full((2,), float(t)))
        theirs = scheduler.step(output, t, theirs, return_dict=False, **more)[0]
    *_, last = sampler(name)(network_denoiser(net, process), x, levels, noise=draws_like(x))
    torch.testing.assert_close(last.x, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize("count", [5, 20])
def test_deis_is_diffusers(count, net, process):
    """Their table ends at the schedule's first level, and up to 14 steps their last one is Euler's."""
    process = process()
    scheduler = make_scheduler(Peer("DEISMultistepScheduler", {"multistep": "linspace"}), "multistep", "eps")
    levels = spaced_levels(process, count, "multistep")
    levels = Levels(process, [*levels[:-1], process.level(process.first)])
    x = torch.randn(2, 4, 6, 5)
    theirs = walk(PEERS["dpm++2m"], scheduler, net, x, levels)
    steps = list(SAMPLERS["deis"](network_denoiser(net, process), x, levels, noise=draws_like(x)))
    for step, state in list(zip(steps, theirs, strict=True))[: count if count > 14 else -1]:
        torch.testing.assert_close(step.x, state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_is_diffusers(name, net, process):
    peer, process = PEERS[name], process(prediction="v", zero_terminal_snr=True)
    x = torch.randn(2, 4, 6, 5)
    levels = spaced_levels(process, STEPS, "trailing")
    assert levels[0].alpha == 0
    theirs = walk(peer, make_scheduler(peer, "trailing", "v", rescale_betas_zero_snr=True), net, x, levels)
    for step, state in zip(
        SAMPLERS[name](network_denoiser(net, process), x, levels, noise=draws_like(x)), theirs, strict=True
    ):
        torch.testing.assert_close(step.x, state, atol=1e-5, rtol=1e-5)


def test_flow_is_diffusers(net, process):
    schedulers = pytest.importorskip("diffusers.schedulers")
    process = process(schedule="flow", prediction="flow")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, STEPS).tolist())
    levels = spaced_levels(process, STEPS, "trailing", shift=3.0)
    x = torch.randn(2, 4, 6, 5)
    theirs = x
    for t, step in zip(scheduler.timesteps, euler(network_denoiser(net, process), x, levels), strict=True):
        theirs = scheduler.step(net(theirs, t.expand(2)), t, theirs, return_dict=False)[0]
        torch.testing.assert_close(step.x, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"prediction": "v", "zero_terminal_snr": True},
        {"prediction": "x0", "zero_terminal_snr": True, "schedule": "cosine"},
        {"prediction": "flow", "schedule": "flow"},
        {"prediction": "eps", "schedule": "cosine"},
    ],
    ids=["zero-snr", "cosine-zero-snr", "flow", "cosine"],
)
def test_no_level_is_too_noisy(name, settings, net, process):
    process, x = process(**settings), torch.randn(1, 4, 4, 4)
    for spacing in ("trailing", "uniform", "karras", "exponential"):
        for count in (1, 2, 7):
            levels = spaced_levels(process, count, spacing)
            for step in SAMPLERS[name](network_denoiser(net, process), x, levels, noise=draws_like(x)):
                assert step.x.isfinite().all(), (spacing, step.index)
                assert step.x0.isfinite().all(), (spacing, step.index)


@pytest.mark.parametrize(
    "name", [name for name in SAMPLERS if not name.startswith(("dpm-fast", "dpm-adapt"))]
)
def test_steps_are_counted_and_can_be_left_undone(name, net, process):
    process, x, calls = process(), torch.randn(2, 4, 4, 4), []
    levels = spaced_levels(process, 5, "trailing")

    def counted(x, t):
        calls.append(t[0].item())
        return network_denoiser(net, process)(x, t)

    steps = SAMPLERS[name](counted, x, levels, noise=draws_like(x))
    assert calls == []
    first = next(steps)
    assert (first.index, first.num_steps, first.level) == (0, 5, levels[1])
    done = len(calls)
    assert done <= (3 if name == "heun++2" else 2)
    *_, last = steps
    assert (last.index, last.level) == (4, CLEAN)
    twice = ("heun", "restart", "dpm2", "dpm2-ancestral", "dpm++2s-ancestral", "dpm++sde")
    assert len(calls) == (9 if name in twice else 12 if name == "heun++2" else 6 if name == "plms" else 5)
    assert min(calls) > 0


@pytest.mark.parametrize("name", ["dpm-fast", "dpm-fast-ancestral", *ADAPTIVE_SAMPLERS])
def test_samplers_with_steps_of_their_own_report_each_call(name, net, process):
    process, x, calls = process(), torch.randn(2, 4, 4, 4), []
    levels = spaced_levels(process, 7, "karras")

    def counted(x, t):
        calls.append(t[0].item())
        return network_denoiser(net, process)(x, t)

    steps = []
    for step in SAMPLERS[name](counted, x, levels, noise=draws_like(x)):
        steps.append(step)
        assert len(calls) == len(steps)
        assert step.x0_level.t == pytest.approx(calls[-1], abs=1e-4)
    assert [step.index for step in steps] == list(range(len(calls)))
    assert (len(steps) == 7) == (name not in ADAPTIVE_SAMPLERS)
    assert steps[-1].level == CLEAN


@pytest.mark.parametrize("name", ADAPTIVE_SAMPLERS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_adaptive_sampler_ends_though_the_network_fails(name, wrong, process):
    x, levels = torch.randn(1, 4, 4, 4), spaced_levels(process(), 7, "karras")
    *_, last = SAMPLERS[name](lambda x, t: torch.full_like(x, wrong), x, levels, noise=draws_like(x))
    assert not last.x.isfinite().any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_state_stays_in_fp32_and_off_the_graph(name, net, process):
    process = process()
    x = torch.randn(2, 4, 4, 4, dtype=torch.bfloat16)
    seen = set()
    weight = torch.ones((), requires_grad=True)

    def half(x, t):
        seen.add(x.dtype)
        return net(x, t).to(torch.bfloat16) * weight

    levels = spaced_levels(process, 3, "trailing")
    for step in SAMPLERS[name](
        network_denoiser(half, process, torch.bfloat16), x, levels, noise=draws_like(x)
    ):
        assert step.x.dtype == step.x0.dtype == torch.float32
        assert not step.x.requires_grad
    assert seen == {torch.bfloat16}
    assert torch.is_grad_enabled()


def test_ddim_at_eta_1_is_ddpm(net, process):
    process, x = process(prediction="v"), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    levels = spaced_levels(process, 6, "trailing")
    for one, other in zip(
        ddim(network_denoiser(net, process), x, levels, noise=draws_like(x), eta=1.0),
        SAMPLERS["ddpm"](network_denoiser(net, process), x, levels, noise=draws_like(x)),
        strict=True,
    ):
        torch.testing.assert_close(one.x, other.x)


def test_eta_needs_noise(net, process):
    process = process()
    levels = spaced_levels(process, 3)
    with pytest.raises(TypeError, match="needs noise"):
        next(ddim(network_denoiser(net, process), torch.randn(1, 4, 4, 4), levels, eta=0.5))
