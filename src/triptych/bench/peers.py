"""The same network in other libraries: our weights exported in their format, read by their own readers."""

import contextlib
import importlib
import logging
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from triptych.models.vit import ViT
from triptych.weights import export

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]


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


def transformers_vit(net: ViT, dtype: torch.dtype) -> Forward:
    """`ViTForImageClassification` with the fused attention kernel, images (B, C, H, W) to logits."""
    from transformers import ViTForImageClassification
    from transformers.utils import logging as said

    said.set_verbosity_error()
    said.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "hf")
        theirs = ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
        theirs = theirs.eval()
    return lambda images: theirs(images).logits


def timm_vit(net: ViT, dtype: torch.dtype) -> Forward:
    """timm's VisionTransformer."""
    timm = importlib.import_module("timm")  # not a dependency of ours, not even of the tests
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "timm")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(dtype)


PEERS: dict[str, Callable[[ViT, torch.dtype], Forward]] = {"transformers": transformers_vit, "timm": timm_vit}


def build(net: ViT, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Forward]:
    """The network of each named peer with the weights of `net`, in `dtype`, quietly."""
    with contextlib.redirect_stderr(None):
        return {name: PEERS[name](net, dtype) for name in names}
