"""Published formats of latent diffusion and its parts. The first that recognises a file reads it."""

from triptych.weights.diffusion.compvis import FORMATS as COMPVIS
from triptych.weights.diffusion.diffusers import FORMATS as DIFFUSERS
from triptych.weights.diffusion.dit import FORMATS as DIT

FORMATS = (*COMPVIS, *DIFFUSERS, *DIT)
