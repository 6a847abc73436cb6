"""Noise depends on an image's own seed and on the step, and on nothing else."""

import pytest
import torch

from triptych.diffusion.noise import PURPOSES, image_seeds, noise_for, seeded_noise
from triptych.diffusion.process import network_denoiser
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import spaced_levels
from triptych.errors import ConfigError

SHAPE = (4, 6, 5)


def test_an_images_noise_is_its_own():
    seeds = image_seeds(1234, 5)
    together, source = seeded_noise(seeds, SHAPE), noise_for(seeds, SHAPE)
    assert together.shape == (5, *SHAPE)
    for k, seed in enumerate(seeds):
        assert torch.equal(seeded_noise([seed], SHAPE)[0], together[k])
        assert torch.equal(noise_for([seed], SHAPE)(3)[0], source(3)[k])
    assert torch.equal(source(3), source(3))


def test_image_k_of_seed_s_is_the_image_of_seed_s_plus_k():
    assert image_seeds(7, 3) == [7, 8, 9]
    assert image_seeds(7, 2, first=1) == [8, 9]
    assert image_seeds(2**32 - 1, 2) == [2**32 - 1, 0]


def test_the_start_is_what_others_draw_for_the_seed():
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(99))
    assert torch.equal(seeded_noise([99], SHAPE), expected)


def test_draws_differ_by_seed_purpose_and_step():
    draws = [
        seeded_noise([seed], SHAPE, purpose, step)
        for seed in (0, 1)
        for purpose in PURPOSES
        for step in (0, 1)
    ]
    starts = 2  # initial noise has no step
    assert len({one.sum().item() for one in draws}) == len(draws) - starts


def test_the_derivation_is_fixed():
    """If these change, no image can be regenerated."""
    assert seeded_noise([5], (2,)).tolist()[0] == pytest.approx([-0.48681, -0.60380], abs=1e-4)
    assert noise_for([5], (2,))(1).tolist()[0] == pytest.approx([0.36113, -0.90677], abs=1e-4)


def test_noise_is_standard_normal():
    noise = torch.cat([noise_for([3, 4], (1000,))(i) for i in range(20)])
    assert noise.mean().abs() < 0.02
    assert (noise.std() - 1).abs() < 0.02


def test_other_types_are_the_same_noise_rounded():
    assert torch.equal(seeded_noise([3], SHAPE, dtype=torch.bfloat16), seeded_noise([3], SHAPE).bfloat16())
    with torch.device("meta"):
        assert torch.equal(seeded_noise([3], SHAPE, device="cpu"), seeded_noise([3], SHAPE, device="cpu"))


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_cannot_be_is_said(seed):
    with pytest.raises(ConfigError, match=str(seed)):
        image_seeds(seed, 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name, net, process):
    process = process()
    levels = spaced_levels(process, 4, "lcm" if name == "lcm" else "leading")

    def images(seeds):
        *_, last = SAMPLERS[name](
            network_denoiser(net, process), seeded_noise(seeds, SHAPE), levels, noise=noise_for(seeds, SHAPE)
        )
        return last.x

    together = images(image_seeds(11, 4))
    apart = torch.cat([images([11]), images([12, 13]), images([14])])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
