"""From what a user writes to a place on disk: a path, the name of a shipped model, or a hub id."""

import os
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from triptych.errors import UserError, did_you_mean
from triptych.weights.files.folder import PIPELINE, SUFFIXES, UNUSED, read_json
from triptych.weights.files.sanitize import printable

SHIPPED = {
    "vit-emoji": "vit_emoji.safetensors",
    "swin-scenes": "swin_scenes.safetensors",
    "ldm-emoji": "ldm_emoji",
}
"""Name -> file or folder in the package's assets."""

# What is asked of the hub, in this order, until weights are found: the safest and most common first.
_BESIDE = ["config.json", "preprocessor_config.json", PIPELINE]
_WANTED: tuple[list[str], ...] = (
    ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
    ["*.safetensors", "*.npz", "*.pth"],
)
# Of a pipeline's part: the names' beginning, the variant, the ending.
_WEIGHTS = tuple(
    (f"diffusion_pytorch_model|{stem}", variant, ending)
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin"))
    for variant in ("", r"\.fp16")
)
_OUT_OF_REACH = (
    "no file or folder {}, the hub cannot be reached for it and its cache lacks it; connect, or give a file"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def locate(source: str | os.PathLike[str]) -> Path:
    """The file or folder that a source means. A path never touches the network.

    Args:
        source: an existing file or folder; a shipped model's name, "vit-emoji"; or a hub id, "owner/name" or
            "owner/name@revision", fetched through huggingface_hub and its cache.

    Raises:
        UserError: it is none of these, or the hub cannot be reached and its cache does not have it.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    text = os.fspath(source)
    if text in SHIPPED:
        shipped = Path(str(files("triptych").joinpath("assets", SHIPPED[text])))
        if not shipped.exists():
            raise UserError(
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
    raise UserError(f"no file or folder {text}{hint}")


def _from_hub(text: str) -> Path:
    repo, _, revision = text.partition("@")
    for patterns in _WANTED:
        folder = _fetched(text, repo, revision, [*_BESIDE, *patterns])
        if (folder / PIPELINE).is_file():
            return _pipeline(text, repo, revision, folder)
        if any(path.suffix in SUFFIXES for path in folder.iterdir()):
            return folder
    raise UserError(f"the hub's {repo} holds no checkpoint ({', '.join(SUFFIXES)}); choose another model")


def _fetched(text: str, repo: str, revision: str, patterns: list[str]) -> Path:
    """The folder in the hub's cache, with all files that match there.

    Raises:
        UserError: the hub refuses, or is out of reach and its cache lacks the model.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
        )
    except errors.GatedRepoError as problem:
        raise UserError(f"{repo} is gated; accept its licence on the hub, then `hf auth login`") from problem
    except errors.RepositoryNotFoundError as problem:
        raise UserError(
            f"no file or folder {text}, and the hub has no model {repo}; check the name"
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise UserError(f"the hub's {repo} has no revision {revision!r}; check the name") from problem
    except Exception as problem:  # whatever HTTP library is underneath, its errors have no common base
        if isinstance(problem, errors.HfHubHTTPError) and not isinstance(problem, FileNotFoundError):
            reason = printable(problem) or type(problem).__name__
            raise UserError(f"the hub refused {repo}: {reason}; try again later or give a file") from problem
        raise UserError(_OUT_OF_REACH.format(text)) from problem


def _pipeline(text: str, repo: str, revision: str, folder: Path) -> Path:
    """A pipeline of diffusers, of which no more is fetched than is read. Out of reach, what the cache has of it."""
    import huggingface_hub

    index = read_json(folder / PIPELINE)
    try:
        files = huggingface_hub.list_repo_files(repo, revision=revision or None)
    except Exception:  # offline: the cache may hold it
        if any(path.suffix in SUFFIXES for path in folder.glob("*/*")):
            return folder
        raise UserError(_OUT_OF_REACH.format(text)) from None
    return _fetched(text, repo, revision, [PIPELINE, *pipeline_files(files, index)])


def pipeline_files(files: Sequence[str], index: Mapping[str, Any]) -> list[str]:
    """Those of a repository's files that a pipeline is read from: JSON and vocabularies, and of each part the weights
    once: safetensors before pickles, whole numbers before halves, never both."""
    chosen = []
    for part, made_by in index.items():
        if part.startswith("_") or part in UNUSED or not isinstance(made_by, list) or None in made_by:
            continue
        inside = [name.removeprefix(f"{part}/") for name in files if name.startswith(f"{part}/")]
        chosen += [
            f"{part}/{name}" for name in inside if "/" not in name and name.endswith((".json", ".txt"))
        ]
        for stems, variant, ending in _WEIGHTS:
            pattern = rf"(?:{stems}){variant}(?:-\d+-of-\d+)?\.{ending}"
            if weights := [name for name in inside if re.fullmatch(pattern, name)]:
                chosen += [f"{part}/{name}" for name in weights]
                break
    return chosen
