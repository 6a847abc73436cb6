"""Published formats of latent diffusion and its parts. The first that matches a file reads it."""

from triptych.weights.diffusion.compvis import FORMATS as COMPVIS
from triptych.weights.diffusion.diffusers import FORMATS as DIFFUSERS
from triptych.weights.diffusion.dit import FORMATS as DIT
from triptych.weights.diffusion.dit_pipeline import FORMATS as DIT_PIPELINE

FORMATS = (*COMPVIS, *DIT_PIPELINE, *DIFFUSERS, *DIT)
