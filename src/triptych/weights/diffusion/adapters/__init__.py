"""Files that change a diffusion model's weights: LoRA and its relatives, by formula, by layer names and by config."""
