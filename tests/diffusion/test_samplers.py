"""Every sampler, step for step, beside diffusers' scheduler of the same name."""

from typing import NamedTuple

import pytest
import torch

from triptych.diffusion.levels import CLEAN, from_strength, spaced_levels
from triptych.diffusion.process import denoiser
from triptych.diffusion.samplers import SAMPLERS, ddim, euler, sampler

# diffusers hands a tensor to np.array, which numpy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 10


class Peer(NamedTuple):
    scheduler: str
    spacings: dict[str, str]
    """Ours -> its name for the same table."""
    settings: dict = {}
    scaled: bool = False
    """Its state is x / alpha."""
    step: dict = {}
    noisy: bool = False


EVEN = {"leading": "leading", "trailing": "trailing", "linspace": "linspace"}
MULTISTEP = {"multistep": "linspace", "multistep-leading": "leading", "trailing": "trailing", "karras": "karras"}
RAMPS = {"karras": "karras", "exponential": "exponential"}
PEERS = {
    "ddpm": Peer("DDPMScheduler", EVEN, {"clip_sample": False}, noisy=True),
    # Its step is T / n whatever the spacing, which misses the next level of linspace.
    "ddim": Peer("DDIMScheduler", {"leading": "leading", "trailing": "trailing"}, {"clip_sample": False}),
    "ddim-eta": Peer("DDIMScheduler", {"leading": "leading"}, {"clip_sample": False}, step={"eta": 0.6}, noisy=True),
    "plms": Peer("PNDMScheduler", {"leading": "leading"}, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "plms-compvis": Peer("PNDMScheduler", {"compvis": "leading"}, {"skip_prk_steps": True}),
    "euler": Peer("EulerDiscreteScheduler", EVEN | RAMPS, scaled=True),
    "euler-ancestral": Peer("EulerAncestralDiscreteScheduler", EVEN, scaled=True, noisy=True),
    "heun": Peer("HeunDiscreteScheduler", EVEN | RAMPS, scaled=True),
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
    """Their loop: the state at the end of each step."""
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
        # Two of them round the times of Karras' ramp for the network, yet not its levels.
        seen = torch.full((len(x),), levels[i].t if len(times) == count else float(t))
        assert (t - seen[0]).abs() < (0.51 if scheduler.config.get("use_karras_sigmas") else 2e-3)
        output = net(scheduler.scale_model_input(x, t), seen)
        x = scheduler.step(output, t, x, return_dict=False, **more)[0]
        states.append(x)
    # Heun calls twice a step but for the last, PLMS twice in the first.
    ends = {2 * count - 1: range(1, 2 * count, 2), count + 1: range(1, count + 1), count: range(count)}[len(times)]
    states = [states[min(end, len(times) - 1)] for end in ends]
    return [state * level.alpha if peer.scaled else state for state, level in zip(states, levels[1:], strict=True)]


def draws_like(x, count=STEPS):
    """The noise of step i: what their generator draws in turn."""
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
        # It averages v over steps, the paper and CompVis average noise: it is handed noise, of the network's v.
        their_prediction = "eps"

        def their_net(x, t):
            alpha, sigma = (v[:, None, None, None] for v in process.at(t))
            return alpha * net(x, t) + sigma * x

    with torch.no_grad():
        theirs = walk(peer, make_scheduler(peer, spacing, their_prediction), their_net, x, levels)
    ours = SAMPLERS[name.removesuffix("-eta").removesuffix("-compvis")]
    steps = list(ours(denoiser(net, process), x, levels, noise=draws_like(x), **peer.step))
    for step, state in zip(steps, theirs, strict=True):
        worst = ((step.x - state).abs().max() / state.abs().max()).item()
        print(name, spacing, prediction, step.index, f"{worst:.1e}")
        assert worst < 1e-5, (step.index, worst)
