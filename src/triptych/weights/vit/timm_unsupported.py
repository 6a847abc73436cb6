"""Networks of timm that have the keys of a ViT and run differently: refused by name, or by what gives them away."""

import re

from triptych.errors import CheckpointError
from triptych.weights.mapping.format import StateDictKeys

# Parts of the names of architectures that have a ViT's keys and are none.
_OTHERS = {
    "_rope_|eva02": "has rotary positions of another form",
    "_rpn_": "has its norms after the branches",
    "relpos": "has relative positions",
    "_pe_(core|lang|spatial)": "has rotary positions of another form",
    "_radio_": "has another stem and norm",
    "sapiens": "has RMS norms",
    "_xp_|_(d?pwee|dwee|dlittle)_": "has parallel or differential attention",
    "_\\d+x2_": "has parallel branches",
}


def refuse_unsupported(keys: StateDictKeys, architecture: str, named_in: str) -> None:
    """Refuse networks that have the keys of a ViT and run differently.

    Raises:
        CheckpointError: names the architecture.
    """
    for part, what in _OTHERS.items():
        if re.search(part, architecture):
            raise CheckpointError(
                f"{keys.path} is timm's {architecture} ({named_in}), which {what}; this package has no such network"
            )
    swiglu = (
        keys.shapes.get("blocks.0.mlp.fc2.weight", (0, 0))[-1] * 2
        == keys.shapes.get("blocks.0.mlp.fc1.weight", (1,))[0]
    )
    if "pos_embed" in keys and swiglu and "blocks.0.attn.q_bias" in keys:
        raise CheckpointError(
            f"{keys.path} looks like an EVA-02, which has rotary positions of another form; this package has no such "
            "network"
        )
    scaled = keys.any_endswith(".gamma_1") or keys.any_endswith(".ls1.gamma")
    if "norm_pre.weight" in keys and not architecture and ("attn_pool.latent" in keys or scaled):
        raise CheckpointError(
            f"{keys.path} looks like a Perception Encoder, which has rotary positions of another form; if it is "
            "another network, put its config.json next to it"
        )
    for present, what in (
        (
            any("rel_pos" in key or "relative_position" in key for key in keys.shapes),
            "has relative positions, as BEiT",
        ),
        (keys.any_endswith(".attn.proj_l.weight"), "has talking heads, as CaiT"),
        (len(keys.shapes.get("pos_embed", ())) == 4, "has a grid of positions, as the image encoder of SAM"),
    ):
        if present:
            raise CheckpointError(f"{keys.path} {what}; this package has no such network")
    if "rope.freqs" in keys:
        raise CheckpointError(
            f"{keys.path} has rotary positions that were learned (rope.freqs); this package has no such network"
        )
