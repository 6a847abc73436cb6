"""`torch.compile`, block by block, with the generated code cached on disk for later processes."""

import os
from pathlib import Path

from torch import nn

from triptych.errors import DeviceError
from triptych.kernels import inductor
from triptych.network import Network


def compile_blocks(net: nn.Module) -> None:
    """Compile each block of a network at its first call, in place. Equal blocks share their code.

    A module without `blocks()` is compiled as one. Generated code is stored in `cache_folder()`, unless
    TORCHINDUCTOR_CACHE_DIR names another folder, so that later processes only read it. Each new image size, batch size
    or precision is compiled again.

    Compilation pays off for many passes of one size, above all on GPUs, and where norms and activations take much of
    the time. On CPUs the eager path already uses fused kernels: on one busy core of a Xeon with AMX, in bf16, a pass of
    a small UNet took 0.8 to 0.9 of its eager time, of a ViT 1.06 to 1.14, so leave a ViT uncompiled there. The first
    call took 105 s for a ViT-B/16 and 350 s for the nine distinct blocks of the UNet; from the cache 10 and 33 s.

    Raises:
        DeviceError: no C++ compiler is installed.
    """
    _check_compiler()
    # Inductor writes its default, in the temporary folder, into the environment when it is imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, inductor.default_cache_folder()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
    blocks = net.blocks() if isinstance(net, Network) else [net]
    # A UNet has more distinct blocks and map sizes than dynamo compiles versions of one function by default; it would
    # run the rest eagerly. Dynamic shapes are off since inductor fails at some of their gradients.
    inductor.raise_recompile_limit(8 * (1 + len(blocks)))
    for block in blocks:
        block.compile(dynamic=False)


def cache_folder() -> Path:
    """Return the folder for generated files: TRIPTYCH_CACHE, else `triptych` in the user's cache folder."""
    if named := os.environ.get("TRIPTYCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def _check_compiler() -> None:
    """Raise an error of one line. Inductor itself would fail in the first call, with a traceback."""
    try:
        inductor.find_compiler()
    except Exception as problem:  # InvalidCxxCompiler, whose module depends on the version of torch
        raise DeviceError(
            "compiling needs a C++ compiler, and none was found: install g++ or clang++, or name one with CXX; or "
            "leave compile out"
        ) from problem
