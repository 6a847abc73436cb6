"""Which files of a folder belong to a checkpoint: the weights, and the JSON and YAML configs next to them."""

import json
from pathlib import Path
from typing import Any

from triptych.errors import CheckpointError

WEIGHTS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "model.fp16.safetensors",
    "model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.bin",
    "pytorch_model.fp16.bin",
    "open_clip_model.safetensors",
)
"""Names of weights files, in the order of preference."""
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".npz", ".ckpt")

PIPELINE = "model_index.json"
"""Marks a folder that holds several networks."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator")
"""Parts of such a folder that are not read."""

_MAX_JSON = 2**24


def find_weights(folder: Path) -> Path:
    """Return the weights file, or index of shards, in a folder.

    Raises:
        CheckpointError: there is none, or there are several without a standard name.
    """
    for name in WEIGHTS_NAMES:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(path.name for path in files[:4])
        raise CheckpointError(f"{folder} holds {len(files)} checkpoints ({names}); name the one to load")
    inner = [
        sub for sub in folder.iterdir() if sub.is_dir() and any(p.suffix in SUFFIXES for p in sub.iterdir())
    ]
    if inner:
        names = ", ".join(sub.name for sub in sorted(inner, key=lambda sub: (len(sub.name), sub.name))[-4:])
        raise CheckpointError(f"{folder} holds no checkpoint, its folders do ({names}); name the one to load")
    raise CheckpointError(f"{folder} holds no checkpoint ({', '.join(SUFFIXES)}); name a folder that does")


def find_halves(path: Path) -> tuple[Path, Path] | None:
    """Return the encoder's and the decoder's file of a tiny autoencoder, which its author stores apart; else None.

    Args:
        path: one of the two, next to the other, or a folder with both and no other weights. Names differ in "encoder"
            and "decoder" alone: taesd_encoder.pth, taesd_decoder.pth.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file()]
        path = next((file for file in files if "encoder" in file.name), path) if len(files) == 2 else path
    if "tae" not in path.name:
        return None
    if "encoder" in path.name:
        encoder, decoder = path, path.with_name(path.name.replace("encoder", "decoder"))
    else:
        encoder, decoder = path.with_name(path.name.replace("decoder", "encoder")), path
    return (encoder, decoder) if encoder != decoder and encoder.is_file() and decoder.is_file() else None


def find_yaml(weights: Path) -> Path | None:
    """Return the YAML config of a weights file.

    It is the .yaml file of the same name; or, if the folder has a single checkpoint, config.yaml or the only YAML file.
    """
    own = weights.with_suffix(".yaml")
    if own.is_file():
        return own
    if len([path for path in weights.parent.iterdir() if path.suffix in SUFFIXES]) > 1:
        return None
    files = sorted(path for path in weights.parent.iterdir() if path.suffix in (".yaml", ".yml"))
    named = [path for path in files if path.stem == "config"]
    return named[0] if named else files[0] if len(files) == 1 else None


def read_configs(weights: Path) -> dict[str, Any]:
    """Return config.json and preprocessor_config.json next to a weights file, by name without the suffix.

    Raises:
        CheckpointError: one is not JSON.
    """
    configs: dict[str, Any] = {}
    for name in ("config", "preprocessor_config"):
        path = weights.parent / f"{name}.json"
        if path.is_file() and path.stat().st_size <= _MAX_JSON:
            value = _parse_json(path)
            if isinstance(value, dict):
                configs[name] = value
    return configs


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is too large, not JSON, or holds no object.
    """
    value = _parse_json(path) if path.stat().st_size <= _MAX_JSON else None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch it again")
    return value


def _parse_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as problem:
        raise CheckpointError(f"{path} is not JSON: {problem}; fetch it again or remove it") from problem
