"""Declares torchvision's operators, so that torchvision and timm import next to a CPU build of torch.

Published builds of torchvision bring operators compiled for one build of torch; its Python code registers shapes and
gradients for them at import, which fails if they do not exist. Here they exist without an implementation: the networks
of torchvision and timm work, `nms` and `roi_align` do not. To be imported before either.

`make test` installs both into a folder of their own, which is added to the path here: transformers and diffusers import
a torchvision that they find, so in a program without these operators they would fail.
"""

import importlib.util
import sys
from pathlib import Path

import torch

REFERENCES = Path(sys.prefix) / "references"
_IMAGE = "Tensor input, Tensor rois, float spatial_scale"
_POOLED = "SymInt pooled_height, SymInt pooled_width"
_SIZES = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_DEFORM = (
    ", ".join(f"SymInt {name}_{axis}" for name in ("stride", "pad", "dilation") for axis in ("h", "w"))
    + ", SymInt groups, SymInt offset_groups, bool use_mask"
)

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align({_IMAGE}, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, "
    f"{_POOLED}, {_SIZES}, int sampling_ratio, bool aligned) -> Tensor",
    f"roi_pool({_IMAGE}, {_POOLED}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, {_POOLED}, {_SIZES}) -> Tensor",
    f"ps_roi_align({_IMAGE}, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_POOLED}, int sampling_ratio, {_SIZES}) -> Tensor",
    f"ps_roi_pool({_IMAGE}, {_POOLED}) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    f"{_POOLED}, {_SIZES}) -> Tensor",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_DEFORM}) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    f"{_DEFORM}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def declare() -> torch.library.Library | None:
    """Declare the operators if torchvision is installed and its own do not load. They live as long as what is
    returned."""
    package = importlib.util.find_spec("torchvision")
    if package is None:
        return None
    compiled = [
        path for place in package.submodule_search_locations or () for path in Path(place).glob("_C*.so")
    ]
    try:
        torch.ops.load_library(*compiled)
    except (OSError, TypeError):  # built for another torch, or none there
        library = torch.library.Library("torchvision", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
        return library
    return None


if REFERENCES.is_dir() and str(REFERENCES) not in sys.path:
    sys.path.append(str(REFERENCES))
LIBRARY = declare()
