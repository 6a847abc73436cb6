"""Published formats of segmenters: UPerNet on Swin. The first that matches a file reads it."""

from triptych.weights.segmenter.hf import FORMAT as HF_FORMAT
from triptych.weights.segmenter.mmseg import MMSEG_FORMAT, SWIN_SEG_FORMAT

FORMATS = (HF_FORMAT, MMSEG_FORMAT, SWIN_SEG_FORMAT)
