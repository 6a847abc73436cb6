"""The pipeline of a latent diffusion model: tasks, sampling loop, image metadata."""
