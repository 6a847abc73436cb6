"""JSON files of diffusers' folders: the configs of the parts, read and written."""

from typing import Any

from triptych.diffusion.config import DIFFUSERS_PREDICTIONS, DIFFUSERS_SCHEDULES, ProcessConfig
from triptych.errors import CheckpointError
from triptych.models.configs.autoencoder import FirstStageConfig, TinyAutoencoderConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig, UNetLevel, levels
from triptych.weights.diffusion import autoencoder, unet
from triptych.weights.diffusion import diffusers_defaults as defaults_of
from triptych.weights.files.sanitize import printable
from triptych.weights.mapping.format import Settings, StateDictKeys
from triptych.weights.mapping.rules import Rule

TITLE = "diffusers"
VERSION = "0.32.0"  # the first whose classes accept all fields written here
STAGES = ("vae", "vqvae")
READERS = ("text_encoder", "bert")


# --------------------------------------------------------------------------------------------- the process


def read_process(config_json: Settings | None, where: str) -> ProcessConfig:
    """Return the diffusion process of a scheduler's config.

    Raises:
        CheckpointError: it is missing; it is a flow; or its betas or prediction are unknown.
    """
    if config_json is None:
        raise CheckpointError(
            f"{where}/scheduler_config.json, which says how the network was trained, is not there; give all of the "
            "folder"
        )
    if str(config_json.get("_class_name", "")).startswith("FlowMatch") or config_json.get("use_flow_sigmas"):
        raise CheckpointError(f"{where} runs a flow, which triptych reads from its own format alone")
    name = config_json.get("_class_name", "DDIMScheduler")
    defaults = defaults_of.SCHEDULERS.get(name)
    if defaults is None:
        if not {"beta_schedule", "beta_start", "beta_end", "num_train_timesteps"} <= set(config_json):
            raise CheckpointError(
                f"{where} is a {printable(name, 60)!r} without all its betas, which triptych does not know; "
                f"put the config of another scheduler there, such as DDIMScheduler"
            )
        defaults = defaults_of.SCHEDULERS["DDIMScheduler"]
    schedule, prediction = (
        config_json.get("beta_schedule", defaults[0]),
        config_json.get("prediction_type", "epsilon"),
    )
    if (
        schedule not in DIFFUSERS_SCHEDULES
        or prediction not in DIFFUSERS_PREDICTIONS
        or config_json.get("trained_betas")
    ):
        raise CheckpointError(
            f"{where} says beta_schedule {schedule!r} and prediction_type {prediction!r}; known are "
            f"{', '.join(DIFFUSERS_SCHEDULES)} and {', '.join(DIFFUSERS_PREDICTIONS)}, without trained_betas"
        )
    ends = {}
    if schedule != "squaredcos_cap_v2":
        ends = {
            "beta_start": config_json.get("beta_start", defaults[1]),
            "beta_end": config_json.get("beta_end", defaults[2]),
        }
    return ProcessConfig(
        schedule=DIFFUSERS_SCHEDULES[schedule],
        prediction=DIFFUSERS_PREDICTIONS[prediction],
        num_timesteps=config_json.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(config_json.get("rescale_betas_zero_snr", False)),
        **ends,
    )


def process_settings(config: ProcessConfig, scheduler: str = "DDIMScheduler") -> Settings:
    """Return the config of a scheduler that runs the process.

    Raises:
        CheckpointError: it is a flow.
    """
    if config.schedule == "flow" or config.prediction == "flow":
        raise CheckpointError(
            f"{TITLE}' pipelines of latent diffusion cannot store a flow; choose triptych's own format"
        )
    return {
        "_class_name": scheduler,
        "_diffusers_version": VERSION,
        "beta_schedule": next(k for k, v in DIFFUSERS_SCHEDULES.items() if v == config.schedule),
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "num_train_timesteps": config.num_timesteps,
        "prediction_type": next(k for k, v in DIFFUSERS_PREDICTIONS.items() if v == config.prediction),
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "clip_sample": False,
        **({"set_alpha_to_one": False, "steps_offset": 1} if scheduler == "DDIMScheduler" else {}),
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
    }


# ------------------------------------------------------------------------------------------------ the UNet


def file_config_of(keys: StateDictKeys, config_json: Settings) -> unet.UNetFileConfig:
    """Return the values in a UNet's config.json that shapes do not determine. Keys that it lacks have the defaults of
    its class.

    Raises:
        CheckpointError: it describes a UNet that this package does not have.
    """
    if not config_json:
        return unet.UNetFileConfig()
    conditional = keys.any_endswith(".attn2.to_k.weight") and config_json.get("_class_name") != "UNet2DModel"
    defaults_of.require_supported(
        keys, config_json, defaults_of.UNET if conditional else defaults_of.UNCONDITIONAL_UNET
    )
    only, count = config_json.get("only_cross_attention", False), keys.count_blocks("down_blocks.{i}.")
    only = only if isinstance(only, list | tuple) else [only] * count
    heads, head_dim = _heads(keys, config_json, conditional)
    side = config_json.get("sample_size")
    return unet.UNetFileConfig(
        heads=heads,
        head_dim=head_dim,
        latent_size=None if side is None else (side, side) if isinstance(side, int) else tuple(side),
        groups=config_json.get("norm_num_groups", defaults_of.NORM_GROUPS) or 0,
        cross_only_downsample_factors=tuple(2**i for i, yes in enumerate(only) if yes),
        where="config.json",
    )


def _heads(keys: StateDictKeys, config_json: Settings, conditional: bool) -> tuple[int, int]:
    """Return the number of heads and their width, one of them 0."""
    value = config_json.get("attention_head_dim", defaults_of.HEAD_DIM)
    if not conditional:
        return (0, value) if value else (1, 0)
    value = config_json.get("num_attention_heads") or value
    if not isinstance(value, list | tuple):
        return value, 0
    if len(set(value)) == 1:
        return value[0], 0
    first = "down_blocks.{}.resnets.0.conv1.weight"
    widths = [keys.shape(first.format(i), 4)[0] for i in range(len(value))]
    each = {width // n for width, n in zip(widths, value, strict=True)}
    if len(each) > 1:
        raise CheckpointError(
            f"{keys.path}: config.json says heads {list(value)} for {widths} channels, of no one size"
        )
    return 0, each.pop()


def unet_settings(config: UNetConfig) -> Settings:
    """Return a UNet's config.json.

    Raises:
        CheckpointError: diffusers has no such UNet.
    """
    height, width = config.latent_size
    common: Settings = {
        "_class_name": "UNet2DConditionModel" if config.context_dim else "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": height if height == width else [height, width],
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": [level.channels for level in levels(config)[0]],
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.norm_groups,
        "norm_eps": 1e-5,
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
    }
    return common | (_conditional_settings(config) if config.context_dim else _unconditional_settings(config))


def _conditional_settings(config: UNetConfig) -> Settings:
    """Return the settings of a UNet2DConditionModel, which has transformers."""
    down, middle, _ = levels(config)
    if (
        config.resample == "resnet"
        or not middle.attention
        or (config.num_heads == 0) == (config.head_dim == 0)
    ):
        raise CheckpointError(f"{TITLE} cannot store this UNet with a prompt; choose another format")
    depths = config.transformer_depth
    prefixes = ["CrossAttn" if level.attention else "" for level in down]
    return {
        "down_block_types": [f"{prefix}DownBlock2D" for prefix in prefixes],
        "up_block_types": [f"{prefix}UpBlock2D" for prefix in reversed(prefixes)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": config.context_dim,
        "attention_head_dim": config.num_heads or [level.channels // config.head_dim for level in down],
        "transformer_layers_per_block": depths if isinstance(depths, int) else list(depths),
        "only_cross_attention": [2**i in config.cross_only_downsample_factors for i in range(len(down))],
        "use_linear_projection": config.projection == "linear",
        "num_class_embeds": config.num_classes or None,
        "class_embed_type": "projection" if config.vector_dim else None,
        "projection_class_embeddings_input_dim": config.vector_dim or None,
    }


def _unconditional_settings(config: UNetConfig) -> Settings:
    """Return the settings of a UNet2DModel, which has self-attention only."""
    down, middle, _ = levels(config)
    by_block = config.resample == "resnet"
    attention_channels = {level.channels for level in (*down, middle) if level.attention}
    if config.num_classes or config.vector_dim or (config.num_heads > 1 and len(attention_channels) > 1):
        raise CheckpointError(
            f"{TITLE} cannot store {config.num_heads} heads at every level, or labels, without a prompt"
        )
    head_dim: int | None = config.head_dim or None
    if config.num_heads > 1 and attention_channels:
        head_dim = next(iter(attention_channels)) // config.num_heads

    def block_type(level: UNetLevel, direction: str, resampled: bool) -> str:
        if level.attention:
            return f"Attn{direction}Block2D"
        return f"Resnet{direction}sampleBlock2D" if by_block and resampled else f"{direction}Block2D"

    last = len(down) - 1
    return {
        "down_block_types": [block_type(level, "Down", i < last) for i, level in enumerate(down)],
        "up_block_types": [block_type(level, "Up", i > 0) for i, level in reversed(list(enumerate(down)))],
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": config.norm_groups,
        "add_attention": middle.attention > 0,
        "downsample_type": "resnet" if by_block else "conv",
        "upsample_type": "resnet" if by_block else "conv",
    }


# ------------------------------------------------------------------------------------------- the first stage


def stage_settings(config: FirstStageConfig) -> Settings:
    """Return a first stage's config.json.

    Raises:
        CheckpointError: diffusers has no such first stage.
    """
    result: Settings = {
        "_diffusers_version": VERSION,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
    }
    if isinstance(config.scale, tuple) or isinstance(config.shift, tuple):
        raise CheckpointError(f"{TITLE} has one scale for all channels of the latents; choose another format")
    if isinstance(config, TinyAutoencoderConfig):
        blocks = [1] + [config.num_res_blocks] * (config.num_levels - 1)
        return result | {
            "_class_name": "AutoencoderTiny",
            "encoder_block_out_channels": [config.base_channels] * config.num_levels,
            "decoder_block_out_channels": [config.base_channels] * config.num_levels,
            "num_encoder_blocks": blocks,
            "num_decoder_blocks": blocks[::-1],
            "latent_channels": config.latent_channels,
            "scaling_factor": config.scale,
            "shift_factor": config.shift,
        }
    attends = [
        "Attn" if 2**i in config.attention_downsample_factors else ""
        for i in range(len(config.channel_multipliers))
    ]
    vq = config.regularization == "vq"
    if config.bottleneck_channels not in (0, config.latent_channels) and not vq:
        raise CheckpointError(
            f"{TITLE} cannot store a bottleneck of {config.bottleneck_channels}; choose another format"
        )
    if vq and not config.quant_convs:
        raise CheckpointError(f"{TITLE}' VQModel has convolutions around its codebook; choose another format")
    height, width = config.image_size
    result |= {
        "_class_name": "VQModel" if vq else "AutoencoderKL",
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": [config.base_channels * m for m in config.channel_multipliers],
        "layers_per_block": config.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": (config.bottleneck_channels or config.latent_channels)
        if vq
        else config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "sample_size": height if height == width else [height, width],
        "scaling_factor": config.scale,
        "mid_block_add_attention": config.middle_attention,
    }
    if vq:
        return result | {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    return result | {
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "shift_factor": config.shift or None,
    }


def stage_of(
    keys: StateDictKeys, config_json: Settings
) -> tuple[FirstStageConfig, list[Rule], dict[str, str]] | None:
    """Return the config, rules and facts of a first stage; None if the keys are not of one."""
    if autoencoder.tiny_layout(keys) == "diffusers":
        defaults_of.require_supported(keys, config_json, defaults_of.TINY)
        config = autoencoder.read_tiny(keys, "diffusers", config_json)
        return (
            config,
            autoencoder.tiny_table(config, "diffusers"),
            {"scale": "config.json" if config_json else "convention: 1"},
        )
    layout = autoencoder.layout_of(keys)
    if layout is None or layout is autoencoder.COMPVIS:
        return None
    defaults_of.require_supported(keys, config_json, defaults_of.AUTOENCODER)
    stage, facts = autoencoder.read(keys, layout, config_json)
    return stage, autoencoder.table(stage, layout), facts


# --------------------------------------------------------------------------------------------------- text


def text_settings(config: TextConfig, net: Any) -> Settings:
    """Return a text encoder's config.json."""
    if config.type == "ldm-bert":
        return {
            "architectures": ["LDMBertModel"],
            "model_type": "ldmbert",
            "vocab_size": config.vocab_size + config.num_added_tokens,
            "max_position_embeddings": config.max_length,
            "encoder_layers": config.depth,
            "encoder_ffn_dim": config.mlp_dim,
            "encoder_attention_heads": config.num_heads,
            "head_dim": config.head_dim or config.embed_dim // config.num_heads,
            "d_model": config.embed_dim,
            "activation_function": "gelu",
            "pad_token_id": config.pad_token,
        }
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.depth - config.skip_last_blocks,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_length,
        "vocab_size": config.vocab_size + config.num_added_tokens,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "projection_dim": config.embed_dim,
        "bos_token_id": 0,
        "eos_token_id": 2,  # as published; only the pooled embedding uses it
        "pad_token_id": 1,
    }
