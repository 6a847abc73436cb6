"""Find a model on disk: by path, by the name of a shipped model, or by hub id."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from triptych.errors import CheckpointError, did_you_mean
from triptych.weights.files.folder import PIPELINE, SUFFIXES, UNUSED, read_json
from triptych.weights.files.sanitize import printable

SHIPPED = {
    "vit-emoji": "vit_emoji.safetensors",
    "swin-scenes": "swin_scenes.safetensors",
    "ldm-emoji": "ldm_emoji",
}
"""Name -> file or folder in the package's assets."""

# Files requested from the hub. Weights in this order until some exist: the safest and most common first.
_CONFIGS = ["config.json", "preprocessor_config.json", PIPELINE]
_WEIGHTS_PATTERNS: tuple[list[str], ...] = (
    ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
    ["*.safetensors", "*.npz", "*.pth"],
)
# Weights of a pipeline's part: stem, variant, suffix.
_PART_WEIGHTS = tuple(
    (f"diffusion_pytorch_model|{stem}", variant, ending)
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin"))
    for variant in ("", r"\.fp16")
)
_OUT_OF_REACH = (
    "no file or folder {}, the hub cannot be reached for it and its cache lacks it; connect, or give a file"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the file or folder that a source means. A path never causes network traffic.

    Args:
        source: an existing file or folder; a shipped model's name, "vit-emoji"; or a hub id, "owner/name" or
            "owner/name@revision", downloaded through huggingface_hub and its cache.

    Raises:
        CheckpointError: it is none of these, or the hub cannot be reached and its cache lacks it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = os.fspath(source)
    if text in SHIPPED:
        shipped = Path(str(files("triptych").joinpath("assets", SHIPPED[text])))
        if not shipped.exists():
            raise CheckpointError(
                f"the shipped model {text!r} is missing from {shipped.parent}; install triptych again"
            )
        return shipped
    looks_like_path = (
        not isinstance(source, str) or path.suffix in (*SUFFIXES, ".json") or text[:1] in "./~\\"
    )
    if not looks_like_path and _HUB_ID.fullmatch(text.removeprefix("hf-hub:")):
        return _from_hub(text.removeprefix("hf-hub:"))
    hint = (
        did_you_mean(text, SHIPPED)
        or f"; give a path, {', '.join(map(repr, SHIPPED))} or a hub id owner/name"
    )
    raise CheckpointError(f"no file or folder {text}{hint}")


def _from_hub(text: str) -> Path:
    repo, _, revision = text.partition("@")
    for patterns in _WEIGHTS_PATTERNS:
        folder = _download(text, repo, revision, [*_CONFIGS, *patterns])
        if (folder / PIPELINE).is_file():
            return _download_pipeline(text, repo, revision, folder)
        if any(path.suffix in SUFFIXES for path in folder.iterdir()):
            return folder
    raise CheckpointError(
        f"the hub's {repo} holds no checkpoint ({', '.join(SUFFIXES)}); choose another model"
    )


def _download(text: str, repo: str, revision: str, patterns: list[str]) -> Path:
    """Download all files that match, and return their folder in the hub's cache.

    Raises:
        CheckpointError: the hub refuses, or it cannot be reached and its cache lacks the model.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
        )
    except errors.GatedRepoError as problem:
        raise CheckpointError(
            f"{repo} is gated; accept its license on the hub, then `hf auth login`"
        ) from problem
    except errors.RepositoryNotFoundError as problem:
        raise CheckpointError(
            f"no file or folder {text}, and the hub has no model {repo}; check the name"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise CheckpointError(f"the hub's {repo} has no revision {revision!r}; check the name") from problem
    except Exception as problem:  # the exceptions of the HTTP libraries have no common base
        if isinstance(problem, errors.HfHubHTTPError) and not isinstance(problem, FileNotFoundError):
            reason = printable(problem) or type(problem).__name__
            raise CheckpointError(
                f"the hub refused {repo}: {reason}; try again later or give a file"
            ) from problem
        raise CheckpointError(_OUT_OF_REACH.format(text)) from problem


def _download_pipeline(text: str, repo: str, revision: str, folder: Path) -> Path:
    """Download the files of a diffusers pipeline that are read. Offline, use what the cache has."""
    import huggingface_hub

    index = read_json(folder / PIPELINE)
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision or None)
    except Exception:  # offline: the cache may have it
        if any(path.suffix in SUFFIXES for path in folder.glob("*/*")):
            return folder
        raise CheckpointError(_OUT_OF_REACH.format(text)) from None
    return _download(text, repo, revision, [PIPELINE, *pipeline_files(files, index)])


def pipeline_files(files: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """Return the files of a repository that a pipeline is read from.

    These are JSON and vocabularies, and one set of weights for each part: safetensors rather than pickles, full
    precision rather than fp16.

    Args:
        files: all files of the repository.
        index: the content of model_index.json.
    """
    chosen = []
    for part, classes in index.items():
        if part.startswith("_") or part in UNUSED or not isinstance(classes, list) or None in classes:
            continue
        inside = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        chosen += [
            f"{part}/{name}" for name in inside if "/" not in name and name.endswith((".json", ".txt"))
        ]
        for stems, variant, suffix in _PART_WEIGHTS:
            pattern = rf"(?:{stems}){variant}(?:-\d+-of-\d+)?\.{suffix}"
            if weights := [name for name in inside if re.fullmatch(pattern, name)]:
                chosen += [f"{part}/{name}" for name in weights]
                break
    return chosen
