"""k-diffusion's own samplers, imported without the parts of that package that need torchvision or train networks."""

import importlib
import importlib.util
import sys
import types

import pytest


def k_diffusion_sampling() -> types.ModuleType:
    """Return `k_diffusion.sampling`; skip the test where the package is not installed (`make` installs it)."""
    if "k_diffusion.sampling" not in sys.modules:
        for name in ("k_diffusion", "torchsde", "torchdiffeq"):
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")
        spec = importlib.util.find_spec("k_diffusion")
        assert spec is not None
        # The package's __init__ imports all of it, and its module of image helpers imports torchvision.
        package = importlib.util.module_from_spec(spec)
        helpers = types.ModuleType("k_diffusion.utils")
        vars(helpers)["append_dims"] = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
        vars(package)["utils"] = helpers
        sys.modules["k_diffusion"], sys.modules["k_diffusion.utils"] = package, helpers
    return importlib.import_module("k_diffusion.sampling")
