"""`torch.compile`, block by block, with what it made kept on disk for the next process."""

import os
from pathlib import Path

from torch import nn

from triptych.errors import UserError
from triptych.kernels import inductor
from triptych.network import Network


def compile_blocks(net: nn.Module) -> None:
    """Compile each block of a network at its first call, in place; equal blocks share what was compiled. Of a module
    without `blocks()` all of it.

    What inductor makes goes into a folder of ours (`cache_folder`), so that the next process only reads it, unless
    TORCHINDUCTOR_CACHE_DIR names another. A new size of image, batch or precision is compiled anew.

    It pays for many passes of one size, on GPUs above all, and where norms and activations are much of the time. On a
    processor our eager path has the fast calls already: on one busy core of a Xeon with AMX, in bf16, a pass of a small
    UNet took 0.8 to 0.9 of its eager time, of a ViT 1.06 to 1.14, so that a ViT is better left as it is there. The
    first call took 105 s for a ViT-B/16 and 350 s for the UNet's nine kinds of block; from the cache 10 and 33 s.

    Raises:
        UserError: there is no C++ compiler.
    """
    _check_compiler()
    # Inductor writes its own choice, which no restart survives, into the environment as it is imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, inductor.default_cache_folder()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor")
    blocks = net.blocks() if isinstance(net, Network) else [net]
    # A UNet has more kinds of block, on maps of more sizes, than dynamo compiles versions of one function; it would
    # leave the others be. It would also make the second size general, and inductor fails at the gradients of some.
    inductor.raise_recompile_limit(8 * (1 + len(blocks)))
    for block in blocks:
        block.compile(dynamic=False)


def cache_folder() -> Path:
    """Where what can be made again is kept: TRIPTYCH_CACHE, else `triptych` in the user's cache folder."""
    if named := os.environ.get("TRIPTYCH_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triptych"


def _check_compiler() -> None:
    """Inductor would say it at the first call, in a traceback."""
    try:
        inductor.find_compiler()
    except Exception as problem:  # InvalidCxxCompiler, whose place in torch has changed
        raise UserError(
            "compiling needs a C++ compiler, and none was found: install g++ or clang++, or name one with CXX; or "
            "leave compile out"
        ) from problem
