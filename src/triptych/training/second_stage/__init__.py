"""Train a denoiser on latents, the second stage of latent diffusion."""
