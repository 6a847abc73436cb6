"""What diffusers' classes assume for keys that a config.json lacks, and what of their settings triptych can run.

Folders hold what the diffusers that wrote them had: those written before 0.13 have no `scaling_factor`. A key that is
absent means the default of its class, which is not always what a network of these sizes was published with.
"""

from collections.abc import Mapping
from typing import Any

from triptych.errors import CheckpointError
from triptych.weights.files.sanitize import printable
from triptych.weights.mapping.format import Settings, StateDictKeys

SCALING_FACTOR = 0.18215
NORM_GROUPS = 32
HEAD_DIM = 8
"""`attention_head_dim` of both UNets; UNet2DConditionModel takes it for the number of heads."""
CROSS_ATTENTION_DIM = 1280
DIT_HEADS = 16
DIT_SAMPLE_SIZE = 32
BERT_HEADS = 8

# Class -> beta_schedule, beta_start, beta_end. All have 1000 training steps and predict noise.
_DDPM = ("linear", 0.0001, 0.02)
_STABLE_ENDS = ("linear", 0.00085, 0.012)
_STABLE = ("scaled_linear", 0.00085, 0.012)
SCHEDULERS: dict[str, tuple[str, float, float]] = {
    "HeunDiscreteScheduler": _STABLE_ENDS,
    "KDPM2DiscreteScheduler": _STABLE_ENDS,
    "KDPM2AncestralDiscreteScheduler": _STABLE_ENDS,
    "DPMSolverSDEScheduler": _STABLE_ENDS,
    "LCMScheduler": _STABLE,
    "TCDScheduler": _STABLE,
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDIMInverseScheduler",
            "DDIMParallelScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverMultistepInverseScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "SASolverScheduler",
            "UniPCMultistepScheduler",
        ),
        _DDPM,
    ),
}

_SILU = ("silu", "swish")
_BOTH_UNETS: dict[str, tuple[Any, ...]] = {
    "act_fn": _SILU,
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "norm_eps": (1e-5,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1,),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
}
UNET: dict[str, tuple[Any, ...]] = _BOTH_UNETS | {
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "class_embed_type": (None, "projection", "simple_projection"),
    "addition_embed_type": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
}
UNCONDITIONAL_UNET: dict[str, tuple[Any, ...]] = _BOTH_UNETS | {"class_embed_type": (None,)}
AUTOENCODER: dict[str, tuple[Any, ...]] = {
    "act_fn": _SILU,
    "norm_type": ("group",),
    "lookup_from_codebook": (False,),
}
TINY: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
DIT_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate", "gelu"),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}


def require_supported(
    keys: StateDictKeys, config_json: Settings, supported: Mapping[str, tuple[Any, ...]]
) -> None:
    """Refuse a config with a setting that the network here does not have. Each list's values mean the same.

    Raises:
        CheckpointError: names the first such setting.
    """
    for name, values in supported.items():
        value = config_json.get(name, values[0])
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in values):
            raise CheckpointError(
                f"{keys.path}: config.json says {name} {printable(value, 40)!r}; needed is {values[0]!r}"
            )
