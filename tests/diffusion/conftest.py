"""A small nonlinear network with random weights, and the diffusion processes of the tests."""

import pytest
import torch

from triptych.diffusion.config import ProcessConfig
from triptych.diffusion.process import Process


@pytest.fixture
def process():
    """Return the process with these settings; by default Stable Diffusion's."""
    return lambda **settings: Process(ProcessConfig(**settings))


@pytest.fixture
def net():
    """Return (x, t) -> output of x's shape, (b, 4, h, w), which depends on t and treats each image separately."""
    generator = torch.Generator().manual_seed(7)
    inner = torch.randn(6, 4, 3, 3, generator=generator) / 6
    outer = torch.randn(4, 6, 3, 3, generator=generator) / 7
    phase = torch.randn(6, generator=generator)

    def answer(x, t):
        times = torch.sin(t.to(x.dtype)[:, None] / 150 + phase.to(x.dtype))
        hidden = torch.nn.functional.conv2d(x, inner.to(x.dtype), padding=1) + times[:, :, None, None]
        return torch.nn.functional.conv2d(torch.tanh(hidden), outer.to(x.dtype), padding=1) + 0.3 * x

    return answer
