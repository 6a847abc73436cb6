"""What all tests share. Under pytest the shapes in the signatures of `layers`, `models` and `heads` are checked at each
call."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before the first import of either: the hook rewrites modules as they are loaded.
install_import_hook(["triptych.layers", "triptych.models", "triptych.heads"], "beartype.beartype")

# Tests draw the same examples every time; no clock decides, since a busy machine is no bug.
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
