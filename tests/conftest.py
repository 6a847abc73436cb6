"""Fixtures of all tests. Under pytest the shapes in signatures of `layers`, `models` and `heads` are checked at each
call."""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook
from PIL import Image
from tests import torchvision_operators  # noqa: F401 - declares them

# A shell that runs the tests in the background makes them ignore SIGINT, and their child processes would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first import of either: the hook rewrites modules as they are loaded.
install_import_hook(["triptych.layers", "triptych.models", "triptych.heads"], "beartype.beartype")

# Tests draw the same examples every time, without deadlines, since a busy machine is not a bug.
settings.register_profile(
    "triptych",
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("triptych")

# Networks here are tiny. On a busy machine a second thread is mostly waited for: the same tests took ten times as long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def color_images(tmp_path_factory) -> Path:
    """A folder of three classes of noisy, nearly uniform colors, 14 images each."""
    folder = tmp_path_factory.mktemp("color_images")
    rng = np.random.default_rng(0)
    for name, color in {"blue": (30, 40, 200), "green": (40, 190, 40), "red": (200, 30, 30)}.items():
        (folder / name).mkdir()
        for i in range(14):
            pixels = np.clip(np.array(color) + rng.normal(0, 25, (24, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder
