"""Recipes by name. A recipe is a function that returns a complete config; its docstring has the command and score."""

import importlib
from collections.abc import Callable
from typing import Any

from triptych.errors import require_known

# Name -> the module that holds the function of that name.
RECIPES = {
    "vit": "triptych.recipes.vit",
    "vit_finetune": "triptych.recipes.vit",
    "vit_emoji": "triptych.recipes.vit",
    "vit_emoji64": "triptych.recipes.vit",
    "vit_s16_imagenet": "triptych.recipes.vit",
    "deit_s16_imagenet": "triptych.recipes.vit",
    "deit_b16_imagenet": "triptych.recipes.vit",
    "swin": "triptych.recipes.swin",
    "swin_emoji": "triptych.recipes.swin",
    "swin_emoji64": "triptych.recipes.swin",
    "swin_scenes": "triptych.recipes.swin",
    "unet_scenes": "triptych.recipes.swin",
    "swin_t_imagenet": "triptych.recipes.swin",
    "upernet_swin_t_ade20k": "triptych.recipes.swin",
    "simmim": "triptych.recipes.swin",
    "simmim_swin_b_imagenet": "triptych.recipes.swin",
    "autoencoder": "triptych.recipes.autoencoder",
    "autoencoder_emoji": "triptych.recipes.autoencoder",
    "autoencoder_kl_f8": "triptych.recipes.autoencoder",
    "autoencoder_vq_f4": "triptych.recipes.autoencoder",
    "latent_diffusion": "triptych.recipes.latent_diffusion",
    "latent_diffusion_emoji": "triptych.recipes.latent_diffusion",
    "sd_full": "triptych.recipes.stable_diffusion",
    "sd_lora": "triptych.recipes.stable_diffusion",
    "sd_words": "triptych.recipes.stable_diffusion",
}


def recipe(name: str) -> Callable[[], Any]:
    """Return the recipe of that name. Hyphens in `name` stand for underscores.

    Raises:
        ConfigError: `name` is unknown; the message lists similar names.
    """
    name = require_known(name.replace("-", "_"), RECIPES, "recipe")
    return getattr(importlib.import_module(RECIPES[name]), name)
