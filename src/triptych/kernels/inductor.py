"""Parts of `torch.compile`'s backend without a public call: its cache folder, its compiler, its limits."""

import contextlib
from collections.abc import Iterator


def default_cache_folder() -> str:
    """Return the folder that inductor chooses if TORCHINDUCTOR_CACHE_DIR is not set. When imported, inductor sets the
    variable to it."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return default_cache_dir()


def find_compiler() -> str:
    """Return the C++ compiler that inductor would call.

    Raises:
        Exception: there is none; the class has moved between versions of PyTorch.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def raise_recompile_limit(least: int) -> None:
    """Let dynamo compile at least that many versions of one function."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, least)


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    """Treat weights as constants in everything that is compiled while the block runs, so that inductor packs them."""
    from torch._inductor import config

    with config.patch(freezing=True):
        yield


def backend_error() -> type[Exception]:
    """Return the exception of a backend that could not compile."""
    from torch._dynamo.exc import BackendCompilerFailed

    return BackendCompilerFailed
