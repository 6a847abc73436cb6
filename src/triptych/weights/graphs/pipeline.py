"""pipeline.json: how the graphs of a latent diffusion model join."""

import json
from pathlib import Path
from typing import Any

from triptych.config import to_json
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder
from triptych.version import __version__

PIPELINE_FILE = "pipeline.json"
TOKENIZER = "tokenizer.json"


def write_pipeline(ldm: LatentDiffusion, folder: Path, files: dict[str, str]) -> None:
    """Write pipeline.json, and tokenizer.json (of the `tokenizers` library) for a model that reads text.

    Args:
        files: the graphs' files by name.
    """
    text = ldm.text_encoder
    data = pipeline_json(ldm, files)
    if isinstance(text, TextEncoder) and text.has_tokenizer:
        (folder / TOKENIZER).write_text(text.tokenizer.backend.to_str(), encoding="utf-8")
        data["tokenizer"] = {
            "file": TOKENIZER,
            "start": text.tokenizer.start,
            "end": text.tokenizer.end,
            "pad": text.config.pad_token,
            "length": text.config.max_length,
            "added": {name: list(rows) for name, rows in text.tokenizer.added.items()},
        }
    (folder / PIPELINE_FILE).write_text(
        json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def pipeline_json(ldm: LatentDiffusion, files: dict[str, str]) -> dict[str, Any]:
    """Return what a sampler needs besides the graphs.

    "alphas" and "sigmas" are the process's table, for the times "first_time", "first_time" + 1, ...: x = alpha x_0 +
    sigma eps. "prediction" is what the network's output stands for, "eps", "v", "x0" or "flow".
    """
    process, config = ldm.process, ldm.config
    classes = config.classes
    return {
        "producer": f"triptych {__version__}",
        "graphs": files,
        "condition": config.condition,
        "concat": config.concat,
        "null_label": classes.num_classes if classes is not None and classes.null_class else None,
        "latents": {
            "channels": config.autoencoder.latent_channels,
            "downsample_factor": config.autoencoder.downsample_factor,
            "size": [side // config.autoencoder.downsample_factor for side in config.image_size],
        },
        "guidance_scale": ldm.card.guidance_scale,
        "prediction": process.config.prediction,
        "process": to_json(process.config),
        "first_time": process.first,
        "alphas": list(process.alphas),
        "sigmas": list(process.sigmas),
    }
