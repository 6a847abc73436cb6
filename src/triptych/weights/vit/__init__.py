"""Published formats of the Vision Transformer, one module each. The first that matches a file reads it."""

from triptych.weights.vit.google import BIG_VISION_FORMAT, PAPER_FORMAT
from triptych.weights.vit.hf import FORMAT as HF_FORMAT
from triptych.weights.vit.timm_variants import DEIT_FORMAT, DINOV2_FORMAT, DINOV3_FORMAT, TIMM_FORMAT
from triptych.weights.vit.torchvision import FORMAT as TORCHVISION_FORMAT

FORMATS = (
    PAPER_FORMAT,
    BIG_VISION_FORMAT,
    TORCHVISION_FORMAT,
    HF_FORMAT,
    DINOV3_FORMAT,
    DINOV2_FORMAT,
    DEIT_FORMAT,
    TIMM_FORMAT,
)
