"""Noise depends on an image's own seed and on the step, and on nothing else."""

import numpy as np
import pytest
import torch

from triptych.diffusion.config import ADAPTIVE_SAMPLERS
from triptych.diffusion.noise import (
    PURPOSES,
    cuda_normal,
    image_seeds,
    mix_noise,
    noise_for,
    philox,
    seeded_noise,
)
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


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ADAPTIVE_SAMPLERS])
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


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_variation_noise_is_the_web_uis(share):
    """Its slerp, column by column of an image (c, h, w), as its first operand's norms run along the height."""
    noise, other = (seeded_noise([seed, seed + 5], (4, 8, 6), dtype=torch.float64) for seed in (1, 2))
    mixed = mix_noise(noise, other, share)
    for image, a, b in zip(mixed, noise, other, strict=True):
        for channel in range(4):
            for column in range(6):
                low, high = a[channel, :, column], b[channel, :, column]
                angle = torch.acos(low @ high / (low.norm() * high.norm()))
                expected = (
                    torch.sin((1 - share) * angle) * low + torch.sin(share * angle) * high
                ) / angle.sin()
                torch.testing.assert_close(image[channel, :, column], expected)
    torch.testing.assert_close(mix_noise(noise, noise, share), noise)  # parallel: no angle to divide by


def test_philox_is_random123s():
    """Two of the known answers that its authors publish (kat_vectors)."""

    def words(*counter, key):
        columns = [np.array([word], dtype=np.uint64) for word in counter]
        return [f"{int(word[0]):08x}" for word in philox(columns, key)]

    assert words(0, 0, 0, 0, key=0) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(*counter, key=0x299F31D0A4093822) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]


def test_noise_of_a_gpu_without_one():
    """torch.manual_seed(0); torch.randn(3, 4, device="cuda"), as printed in the web UI's rng_philox.py."""
    printed = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    torch.testing.assert_close(cuda_normal(0, (3, 4)), torch.tensor(printed), rtol=1e-6, atol=1e-7)
    noise = seeded_noise([0, 5], (3, 4), rng="cuda")
    assert torch.equal(noise[0], cuda_normal(0, (3, 4)))
    steps = noise_for([0], (3, 4), rng="cuda")
    assert torch.equal(steps(2)[0], cuda_normal(0, (3, 4), 3))  # the first draw is the start
    many = cuda_normal(7, (100_000,))
    assert abs(many.mean()) < 0.01
    assert abs(many.std() - 1) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("seed", [0, 3864674281])
def test_noise_of_a_gpu_on_one(seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    for draw in range(3):
        expected = torch.randn(4, 64, 64, generator=generator, device="cuda").cpu()
        torch.testing.assert_close(cuda_normal(seed, (4, 64, 64), draw), expected, rtol=1e-5, atol=1e-6)
