"""Published formats of latent diffusion and its parts. The first that recognises a file reads it."""

from triptych.weights.diffusion.compvis import FORMATS as COMPVIS

FORMATS = COMPVIS
