"""Load networks of other libraries from their folders with their own readers. Of our package only `timm_import` is
imported, so that a program that measures the memory of another library loads little else."""

import contextlib
from pathlib import Path
from typing import Any

import torch

from triptych.bench.peers import timm_import


def transformers_network(folder: str | Path, dtype: torch.dtype) -> Any:
    """Load a classifier of transformers from its folder, with the fused attention kernel."""
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    with contextlib.redirect_stderr(None):
        theirs = AutoModelForImageClassification.from_pretrained(
            folder, attn_implementation="sdpa", dtype=dtype
        )
    return theirs.eval()


def timm_network(folder: str | Path, dtype: torch.dtype) -> Any:
    """Load a network of timm from its folder, without the stochastic depth that its Swin has by default."""
    timm, _ = timm_import.timm()  # not a dependency, not even of the tests
    net = timm.create_model(f"local-dir:{folder}", pretrained=True, drop_path_rate=0.0)
    return net.eval().to(dtype)


def diffusers_part(folder: Path, part: str, dtype: torch.dtype) -> Any:
    """Load the "unet" or the "vae" from a folder of diffusers."""
    import diffusers
    from diffusers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    network_class: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[part]
    with contextlib.redirect_stderr(None):
        return network_class.from_pretrained(folder / part, torch_dtype=dtype).eval()
