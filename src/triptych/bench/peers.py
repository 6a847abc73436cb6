"""The same network in other libraries: our weights exported in their format, read by their own readers."""

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from triptych.bench.forward import Forward
from triptych.network import Network
from triptych.weights import export

log = logging.getLogger(__name__)


def available(names: tuple[str, ...]) -> dict[str, str | None]:
    """Peer -> None if it can be imported, else why not, in one line."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            importlib.import_module(name)
            found[name] = None
        except ImportError as problem:
            found[name] = str(problem).splitlines()[0]
    return found


def transformers_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """Their classifier of the same family with the fused attention kernel, images (B, C, H, W) to logits."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as said

    said.set_verbosity_error()
    said.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "hf")
        theirs = AutoModelForImageClassification.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype
        )
        theirs = theirs.eval()
    return lambda images: theirs(images).logits


def timm_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """timm's network of the same family."""
    timm = importlib.import_module("timm")  # not a dependency of ours, not even of the tests
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "timm")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(dtype)


PEERS: dict[str, Callable[[Network, torch.dtype], Forward]] = {
    "transformers": transformers_classifier,
    "timm": timm_classifier,
}


def build(net: Network, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Forward]:
    """The network of each named peer with the weights of `net`, in `dtype`, quietly."""
    with contextlib.redirect_stderr(None):
        return {name: PEERS[name](net, dtype) for name in names}


def diffusers_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """The "unet" or the "vae" of a folder of diffusers."""
    import diffusers
    from diffusers.utils import logging as said

    said.set_verbosity_error()
    kind: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    with contextlib.redirect_stderr(None):
        return kind.from_pretrained(folder / part, torch_dtype=dtype).eval()
