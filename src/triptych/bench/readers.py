"""Networks of other libraries, read from folders of theirs by their own readers, quietly. Nothing of ours is imported:
a program that measures a peer's memory holds the peer alone."""

import contextlib
import importlib
from pathlib import Path
from typing import Any

import torch


def transformers_network(folder: str | Path, dtype: torch.dtype) -> Any:
    """Their classifier in one of their folders, with the fused attention kernel."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as said

    said.set_verbosity_error()
    said.disable_progress_bar()
    with contextlib.redirect_stderr(None):
        theirs = AutoModelForImageClassification.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype
        )
    return theirs.eval()


def timm_network(folder: str | Path, dtype: torch.dtype) -> Any:
    """timm's network in one of its folders."""
    timm = importlib.import_module("timm")  # not a dependency of ours, not even of the tests
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(dtype)


def diffusers_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """The "unet" or the "vae" of a folder of diffusers."""
    import diffusers
    from diffusers.utils import logging as said

    said.set_verbosity_error()
    kind: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    with contextlib.redirect_stderr(None):
        return kind.from_pretrained(folder / part, torch_dtype=dtype).eval()
