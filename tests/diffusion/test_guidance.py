"""Guidance against two calls of the network, diffusers' functions, and slow forms of the papers' equations."""

import pytest
import torch

from triptych.diffusion.guidance import guided, projected, within
from triptych.diffusion.process import network_denoiser
from triptych.diffusion.samplers import SAMPLERS
from triptych.diffusion.schedule import spaced_levels


@pytest.fixture
def prompted(net):
    """Return (x, t, prompt) -> output, where prompt is one number per image."""
    return lambda x, t, prompt: net(x + prompt[:, None, None, None], t)


def halves(prompted, process):
    """Return a denoiser for a doubled batch, prompt first, and the two denoisers of its halves."""
    context = torch.tensor([0.5, -0.2, 0.0, 0.1])
    both = network_denoiser(lambda x, t: prompted(x, t, context), process)
    positive = network_denoiser(lambda x, t: prompted(x, t, context[:2]), process)
    negative = network_denoiser(lambda x, t: prompted(x, t, context[2:]), process)
    return both, positive, negative


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 6)


@pytest.fixture
def t():
    return torch.tensor([700.0, 700.0])


def test_guidance_is_two_calls(prompted, process, x, t):
    both, positive, negative = halves(prompted, process())
    expected = negative(x, t) + 7.5 * (positive(x, t) - negative(x, t))
    torch.testing.assert_close(guided(both, 7.5)(x, t), expected, atol=1e-4, rtol=1e-5)


def test_guidance_1_is_the_prompt_alone(prompted, process, x, t):
    both, positive, _ = halves(prompted, process())
    torch.testing.assert_close(guided(both, 1.0)(x, t), positive(x, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("settings", [{"prediction": "eps"}, {"prediction": "v"}, {"prediction": "x0"}])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guiding_the_data_is_guiding_what_is_predicted(settings, rescale, prompted, process, x, t):
    """diffusers guides the network's output, and rescales that."""
    guiders = pytest.importorskip("diffusers.guiders.guider_utils")
    process = process(**settings)
    both, _, _ = halves(prompted, process)
    context = torch.tensor([0.5, -0.2, 0.0, 0.1])
    positive, negative = prompted(x, t, context[:2]), prompted(x, t, context[2:])
    output = negative + 7.5 * (positive - negative)
    if rescale:
        output = guiders.rescale_noise_cfg(output, positive, rescale)
    ours = guided(both, 7.5, process=process, rescale=rescale)(x, t)
    torch.testing.assert_close(ours, process.to_x0(x, output, t), atol=1e-5, rtol=1e-4)


def test_rescaling_needs_the_process(prompted, process):
    both, _, _ = halves(prompted, process())
    with pytest.raises(TypeError, match="process"):
        guided(both, 7.5, rescale=0.7)(torch.zeros(2, 4, 5, 6), torch.zeros(2))


def test_rescaling_fully_restores_the_standard_deviation(prompted, process, x, t):
    process = process(prediction="v")
    both, positive, _ = halves(prompted, process)
    full = process.from_x0(x, guided(both, 9.0, process=process, rescale=1.0)(x, t), t)
    prompt = process.from_x0(x, positive(x, t), t)
    torch.testing.assert_close(full.flatten(1).std(1), prompt.flatten(1).std(1))


def slow_projection(positives, negatives, scale, eta, threshold, momentum):
    """Sadat et al. 2024, one image and one number at a time; return the last call's output."""
    average = None
    for positive, negative in zip(positives, negatives, strict=True):
        change = positive - negative
        average = change if average is None else change + momentum * average
    rows = []
    for change, prompt in zip(average, positives[-1], strict=True):
        length = sum(v**2 for v in change.flatten().tolist()) ** 0.5
        if threshold is not None and length > threshold:
            change = change * (threshold / length)
        dot = sum(a * b for a, b in zip(change.flatten().tolist(), prompt.flatten().tolist(), strict=True))
        parallel = prompt * (dot / sum(v**2 for v in prompt.flatten().tolist()))
        rows.append(prompt + (scale - 1) * (change - parallel + eta * parallel))
    return torch.stack(rows)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("threshold", [None, 2.5, 1e6])
@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_projected_guidance_is_its_slow_twin(eta, threshold, momentum, prompted, process, x):
    both, positive, negative = halves(prompted, process())
    answer = projected(both, 6.0, eta=eta, threshold=threshold, momentum=momentum)
    times = [torch.full((2,), float(t)) for t in (500, 400, 300)]
    for t in times:
        last = answer(x, t)
    expected = slow_projection(
        [positive(x, t) for t in times], [negative(x, t) for t in times], 6.0, eta, threshold, momentum
    )
    torch.testing.assert_close(last, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("momentum", [None, -0.5])
def test_projected_guidance_is_diffusers(momentum, prompted, process, x):
    guiders = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    both, positive, negative = halves(prompted, process())
    answer = projected(both, 6.0, eta=0.3, threshold=2.5, momentum=momentum or 0.0)
    buffer = None if momentum is None else guiders.MomentumBuffer(momentum)
    for t in (torch.full((2,), 500.0), torch.full((2,), 400.0)):
        # The paper's form, in which scale 0 means no guidance.
        theirs = guiders.normalized_guidance(positive(x, t), negative(x, t), 5.0, buffer, 0.3, 2.5, True)
        torch.testing.assert_close(answer(x, t), theirs, atol=1e-5, rtol=1e-5)


def test_projected_guidance_without_its_parts_is_guidance(prompted, process, x, t):
    both, _, _ = halves(prompted, process())
    plain, bare = guided(both, 5.0)(x, t), projected(both, 5.0, eta=1.0)(x, t)
    torch.testing.assert_close(bare, plain, atol=1e-5, rtol=1e-5)


def test_prompts_that_agree_are_not_guided(process, x, t):
    same = network_denoiser(lambda x, t: x, process())
    answer = projected(same, 5.0, threshold=1.0)(x, t)
    torch.testing.assert_close(answer, same(x, t))


def test_guidance_keeps_to_its_interval(process):
    process, calls = process(), []
    inside = lambda x, t: calls.append("inside") or x  # noqa: E731
    outside = lambda x, t: calls.append("outside") or x  # noqa: E731
    answer = within(inside, outside, process, 0.3, 2.0)
    levels = spaced_levels(process, 20, "karras")
    for _ in SAMPLERS["euler"](answer, torch.zeros(1, 1), levels):
        pass
    expected = ["inside" if 0.3 < level.sigma / level.alpha <= 2.0 else "outside" for level in levels[:-1]]
    assert calls == expected
    assert set(calls) == {"inside", "outside"}


def test_an_interval_can_reach_pure_noise(process):
    process = process(prediction="v", zero_terminal_snr=True)
    answer = within(lambda x, t: x + 1, lambda x, t: x, process, 0.0, float("inf"))
    for t in (0.0, 500.0, 999.0):
        assert answer(torch.zeros(1, 1), torch.tensor([t])).item() == 1


@pytest.mark.parametrize(
    "make", [lambda both, p: guided(both, 7.5, process=p, rescale=0.7), lambda both, p: projected(both, 7.5)]
)
def test_pure_noise_is_guided_too(make, prompted, process, x):
    process = process(prediction="v", zero_terminal_snr=True)
    both, _, _ = halves(prompted, process)
    assert make(both, process)(x, torch.full((2,), 999.0)).isfinite().all()
