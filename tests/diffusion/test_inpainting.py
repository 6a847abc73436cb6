"""Conditioning on images: concatenated channels, and masked regions that stay unchanged."""

import pytest
import torch

from triptych.diffusion.guidance import guided
from triptych.diffusion.inpainting import concat_channels, masked
from triptych.diffusion.noise import noise_for
from triptych.diffusion.process import network_denoiser
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import from_strength, spaced_levels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def scene():
    """Known latents, the mask of what to inpaint, and noise to start from."""
    mask = torch.zeros(1, 1, 6, 5)
    mask[..., 2:, 1:4] = 1
    return torch.randn(2, 4, 6, 5), mask, torch.randn(2, 4, 6, 5)


def test_concatenated_channels_reach_the_network():
    x, extra = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 3, 3)
    seen = []
    net = concat_channels(lambda x, t: seen.append(x) or x[:, :4], extra)
    t = torch.zeros(2)
    assert torch.equal(net(x, t), x)
    assert torch.equal(seen[0], torch.cat([x, extra], dim=1))
    # Guidance evaluates both halves in one call.
    net(torch.cat([x, x]), torch.cat([t, t]))
    assert torch.equal(seen[1], torch.cat([seen[0], seen[0]]))
    assert concat_channels(lambda x, t: x, extra)(x.bfloat16(), t).dtype == torch.bfloat16


def test_nine_channels_can_be_guided(net, process):
    extra = torch.randn(2, 5, 3, 3)
    inner = concat_channels(lambda x, t: net(x[:, :4] + x[:, 4:8], t), extra)
    x, t = torch.randn(2, 4, 3, 3), torch.full((2,), 300.0)
    process = process()
    torch.testing.assert_close(
        guided(network_denoiser(inner, process), 3.0)(x, t),
        network_denoiser(inner, process)(x, t),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_mask_nothing_changes(name, net, process, scene):
    known, mask, noise = scene
    process = process()
    levels = spaced_levels(process, 5, "trailing")
    answer = masked(network_denoiser(net, process), process, known, mask, noise)
    *_, last = SAMPLERS[name](answer, noise, levels, noise=noise_for([1, 2], (4, 6, 5)))
    outside = (mask == 0).expand_as(known)
    first = process.level(process.first)
    left = (
        first.sigma / first.alpha if name.startswith(("dpm-fast", "dpm-adapt")) else 0
    )  # noise that these leave
    torch.testing.assert_close(last.x[outside], known[outside], atol=1e-5 + 5 * left, rtol=1e-5)
    assert (last.x - known)[~outside].abs().min() > 0


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize(
    ("name", "scheduler", "spacing"),
    [
        ("ddim", "DDIMScheduler", "leading"),
        ("dpm++2m", "DPMSolverMultistepScheduler", "multistep"),
        ("unipc", "UniPCMultistepScheduler", "multistep"),
        ("ddpm", "DDPMScheduler", "leading"),
    ],
)
def test_inpainting_is_diffusers(name, scheduler, spacing, strength, net, process, scene):
    """diffusers' loop for networks of four channels: after each step the known region is overwritten."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    (known, mask, noise), process = scene, process()
    levels = from_strength(spaced_levels(process, 10, spacing), strength)
    start = noise if strength == 1 else levels[0].noised(known, noise)

    peer = getattr(schedulers, scheduler)(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing={"multistep": "linspace"}.get(spacing, spacing),
        **({"clip_sample": False} if name.startswith("dd") else {}),
    )
    peer.set_timesteps(10)
    times = peer.timesteps[-(len(levels) - 1) :]
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(10 - len(times))
    more = {"generator": torch.Generator().manual_seed(3)} if name == "ddpm" else {}
    theirs = start
    for i, t in enumerate(times):
        theirs = peer.step(net(theirs, t.float().expand(2)), t, theirs, return_dict=False, **more)[0]
        rest = peer.add_noise(known, noise, times[i + 1 : i + 2]) if i + 1 < len(times) else known
        theirs = (1 - mask) * rest + mask * theirs

    generator = torch.Generator().manual_seed(3)
    answer = masked(
        network_denoiser(net, process),
        process,
        known,
        mask,
        noise,
        start=levels[0].t if strength == 1 else None,
    )
    *_, last = SAMPLERS[name](
        answer, start, levels, noise=lambda step: torch.randn(known.shape, generator=generator)
    )
    torch.testing.assert_close(last.x, theirs, atol=1e-5, rtol=1e-5)
