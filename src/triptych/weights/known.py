"""Every published format that is read and written; the first that recognises a file reads it."""

from triptych.weights.swin import FORMATS as SWIN
from triptych.weights.vit import FORMATS as VIT

FORMATS = (*SWIN, *VIT)
