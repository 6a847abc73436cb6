"""Train an autoencoder, the first stage of latent diffusion."""
