"""The JSON files of diffusers' folders: the configs of the parts, and what is written of ours."""

from typing import Any

from triptych.diffusion.config import DIFFUSERS_PREDICTIONS, DIFFUSERS_SCHEDULES, ProcessConfig
from triptych.errors import UserError
from triptych.models.configs.autoencoder import FirstStageConfig, TinyAutoencoderConfig
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig, levels
from triptych.weights.diffusion import autoencoder, unet
from triptych.weights.mapping.format import Names, Settings
from triptych.weights.mapping.rules import Rule

TITLE = "diffusers"
VERSION = "0.32.0"  # the first whose classes know all that is written here
STAGES = ("vae", "vqvae")
READERS = ("text_encoder", "bert")


# --------------------------------------------------------------------------------------------- the process


def read_process(said: Settings | None, where: str) -> ProcessConfig:
    """A scheduler's config as the process that it runs.

    Raises:
        UserError: there is none, or one of betas or a prediction that no process here has, or of a flow.
    """
    if said is None:
        raise UserError(
            f"{where}/scheduler_config.json, which says how the network was trained, is not there; give all of the "
            "folder"
        )
    if str(said.get("_class_name", "")).startswith("FlowMatch") or said.get("use_flow_sigmas"):
        raise UserError(f"{where} runs a flow, which triptych reads from its own format alone")
    schedule, prediction = said.get("beta_schedule", "linear"), said.get("prediction_type", "epsilon")
    if (
        schedule not in DIFFUSERS_SCHEDULES
        or prediction not in DIFFUSERS_PREDICTIONS
        or said.get("trained_betas")
    ):
        raise UserError(
            f"{where} says beta_schedule {schedule!r} and prediction_type {prediction!r}; known are "
            f"{', '.join(DIFFUSERS_SCHEDULES)} and {', '.join(DIFFUSERS_PREDICTIONS)}, without trained_betas"
        )
    ends = {}
    if schedule != "squaredcos_cap_v2":
        ends = {"beta_start": said.get("beta_start", 0.0001), "beta_end": said.get("beta_end", 0.02)}
    return ProcessConfig(
        schedule=DIFFUSERS_SCHEDULES[schedule],
        prediction=DIFFUSERS_PREDICTIONS[prediction],
        num_timesteps=said.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(said.get("rescale_betas_zero_snr", False)),
        **ends,
    )


def process_settings(config: ProcessConfig, kind: str = "DDIMScheduler") -> Settings:
    """The config of a scheduler that runs this process.

    Raises:
        UserError: a flow.
    """
    if config.schedule == "flow" or config.prediction == "flow":
        raise UserError(
            f"{TITLE}' pipelines of latent diffusion cannot say a flow; choose triptych's own format"
        )
    return {
        "_class_name": kind,
        "_diffusers_version": VERSION,
        "beta_schedule": next(k for k, v in DIFFUSERS_SCHEDULES.items() if v == config.schedule),
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "num_train_timesteps": config.num_timesteps,
        "prediction_type": next(k for k, v in DIFFUSERS_PREDICTIONS.items() if v == config.prediction),
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "clip_sample": False,
        **({"set_alpha_to_one": False, "steps_offset": 1} if kind == "DDIMScheduler" else {}),
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
    }


# ------------------------------------------------------------------------------------------------ the UNet


def said_of(names: Names, said: Settings) -> unet.Said:
    """What a UNet's config.json says and shapes do not."""
    if not said:
        return unet.Said()
    widths = list(said.get("block_out_channels", ()))
    heads, head_dim = 0, 0
    given = said.get("num_attention_heads") or said.get("attention_head_dim", 8)
    if said.get("_class_name") == "UNet2DModel" or "cross_attention_dim" not in said:
        given = said.get("attention_head_dim", 8)
        heads, head_dim = (0, given) if given else (1, 0)
    elif isinstance(given, list | tuple):
        each = {c // n for c, n in zip(widths, given, strict=True)}
        heads, head_dim = (given[0], 0) if len(set(given)) == 1 else (0, each.pop() if len(each) == 1 else 0)
        if not heads and not head_dim:
            raise UserError(
                f"{names.path}: config.json says heads {list(given)} for {widths} channels, of no one size"
            )
    else:
        heads = given
    side = said.get("sample_size")
    only = said.get("only_cross_attention", False)
    only = only if isinstance(only, list | tuple) else [only] * len(widths)
    return unet.Said(
        heads=heads,
        head_dim=head_dim,
        latent_size=None if side is None else (side, side) if isinstance(side, int) else tuple(side),
        groups=said.get("norm_num_groups") or 0,
        cross_only_downsample_factors=tuple(2**i for i, yes in enumerate(only) if yes),
        where="config.json",
    )


def unet_settings(config: UNetConfig) -> Settings:
    """A UNet's config.json.

    Raises:
        UserError: it is none that diffusers has.
    """
    down, middle, _ = levels(config)
    widths = [level.channels for level in down]
    height, width = config.latent_size
    by_block = config.resample == "resnet"
    found: Settings = {
        "_class_name": "UNet2DConditionModel" if config.context_dim else "UNet2DModel",
        "_diffusers_version": VERSION,
        "sample_size": height if height == width else [height, width],
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": widths,
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
    if config.context_dim:
        if by_block or not middle.attention or (config.num_heads == 0) == (config.head_dim == 0):
            raise UserError(f"{TITLE} cannot say this UNet with a prompt; choose another format")
        depths = config.transformer_depth
        attends = ["CrossAttn" if level.attention else "" for level in down]
        return found | {
            "down_block_types": [f"{a}DownBlock2D" for a in attends],
            "up_block_types": [f"{a}UpBlock2D" for a in reversed(attends)],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "cross_attention_dim": config.context_dim,
            "attention_head_dim": config.num_heads or [c // config.head_dim for c in widths],
            "transformer_layers_per_block": depths if isinstance(depths, int) else list(depths),
            "only_cross_attention": [2**i in config.cross_only_downsample_factors for i in range(len(down))],
            "use_linear_projection": config.projection == "linear",
            "num_class_embeds": config.num_classes or None,
            "class_embed_type": "projection" if config.vector_dim else None,
            "projection_class_embeddings_input_dim": config.vector_dim or None,
        }
    attending = {level.channels for level in (*down, middle) if level.attention}
    if config.num_classes or config.vector_dim or (config.num_heads > 1 and len(attending) > 1):
        raise UserError(
            f"{TITLE} cannot say {config.num_heads} heads at every level, or labels, without a prompt"
        )
    head_dim: int | None = config.head_dim or None
    if config.num_heads > 1 and attending:
        head_dim = attending.copy().pop() // config.num_heads

    def kind(level: Any, way: str, resampled: bool) -> str:
        if level.attention:
            return f"Attn{way}Block2D"
        return f"Resnet{way}sampleBlock2D" if by_block and resampled else f"{way}Block2D"

    last = len(down) - 1
    return found | {
        "down_block_types": [kind(level, "Down", i < last) for i, level in enumerate(down)],
        "up_block_types": [kind(level, "Up", i > 0) for i, level in reversed(list(enumerate(down)))],
        "attention_head_dim": head_dim,
        "attn_norm_num_groups": config.norm_groups,
        "add_attention": middle.attention > 0,
        "downsample_type": "resnet" if by_block else "conv",
        "upsample_type": "resnet" if by_block else "conv",
    }


# ------------------------------------------------------------------------------------------- the first stage


def stage_settings(config: FirstStageConfig) -> Settings:
    """A first stage's config.json.

    Raises:
        UserError: it is none that diffusers has.
    """
    found: Settings = {
        "_diffusers_version": VERSION,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
    }
    if isinstance(config.scale, tuple) or isinstance(config.shift, tuple):
        raise UserError(f"{TITLE} has one scale for all channels of the latents; choose another format")
    if isinstance(config, TinyAutoencoderConfig):
        blocks = [1] + [config.num_res_blocks] * (config.num_levels - 1)
        return found | {
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
        raise UserError(
            f"{TITLE} cannot say a bottleneck of {config.bottleneck_channels}; choose another format"
        )
    if vq and not config.quant_convs:
        raise UserError(f"{TITLE}' VQModel has convolutions around its codebook; choose another format")
    height, width = config.image_size
    found |= {
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
        return found | {"num_vq_embeddings": config.codebook_size, "vq_embed_dim": config.latent_channels}
    return found | {
        "use_quant_conv": config.quant_convs,
        "use_post_quant_conv": config.quant_convs,
        "shift_factor": config.shift or None,
    }


def stage_of(names: Names, said: Settings) -> tuple[FirstStageConfig, list[Rule], dict[str, str]] | None:
    """A first stage and its table; none if these are no names of one."""
    if autoencoder.tiny_layout(names) == "diffusers":
        config = autoencoder.read_tiny(names, "diffusers", said)
        return (
            config,
            autoencoder.tiny_table(config, "diffusers"),
            {"scale": "config.json" if said else "convention: 1"},
        )
    layout = autoencoder.layout_of(names)
    if layout is None or layout is autoencoder.COMPVIS:
        return None
    stage, facts = autoencoder.read(names, layout, said)
    return stage, autoencoder.table(stage, layout), facts


# --------------------------------------------------------------------------------------------------- text


def text_settings(config: TextConfig, net: Any) -> Settings:
    """A text encoder's config.json."""
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
        "eos_token_id": 2,  # as in the published ones: the pooled embedding alone reads it
        "pad_token_id": 1,
    }
