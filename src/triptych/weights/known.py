"""Every published format that is read and written; the first that recognises a file reads it."""

from triptych.weights.diffusion import FORMATS as DIFFUSION
from triptych.weights.segmenter import FORMATS as SEGMENTER
from triptych.weights.swin import FORMATS as SWIN
from triptych.weights.vit import FORMATS as VIT

# Those with a backbone inside come first: the backbone's own names are among theirs.
FORMATS = (*SEGMENTER, *SWIN, *VIT, *DIFFUSION)
