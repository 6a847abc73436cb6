"""From what a user writes to a place on disk: a path, the name of a shipped model, or a hub id."""

import difflib
import os
import re
from importlib.resources import files
from pathlib import Path

from triptych.errors import UserError
from triptych.weights.files import SUFFIXES
from triptych.weights.legible import legible

SHIPPED = {"vit-emoji": "vit_emoji.safetensors", "swin-scenes": "swin_scenes.safetensors"}
"""Name -> file in the package's assets."""

# What is asked of the hub, in this order, until weights are found: the safest and most common first.
_BESIDE = ["config.json", "preprocessor_config.json"]
_WANTED = (
    ["model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"],
    ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"],
    ["*.safetensors", "*.npz", "*.pth"],
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
    near = difflib.get_close_matches(text, SHIPPED, n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"give a path, {', '.join(map(repr, SHIPPED))} or a hub id owner/name"
    )
    raise UserError(f"no file or folder {text}; {hint}")


def _from_hub(text: str) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    repo, _, revision = text.partition("@")
    for patterns in _WANTED:
        try:
            folder = huggingface_hub.snapshot_download(
                repo, revision=revision or None, allow_patterns=[*_BESIDE, *patterns]
            )
        except errors.GatedRepoError as problem:
            raise UserError(
                f"{repo} is gated; accept its licence on the hub, then `hf auth login`"
            ) from problem
        except errors.RepositoryNotFoundError as problem:
            raise UserError(
                f"no file or folder {text}, and the hub has no model {repo}; check the name"
            ) from problem
        except errors.RevisionNotFoundError as problem:
            raise UserError(f"the hub's {repo} has no revision {revision!r}; check the name") from problem
        except Exception as problem:  # whatever HTTP library is underneath, its errors have no common base
            if isinstance(problem, errors.HfHubHTTPError) and not isinstance(problem, FileNotFoundError):
                reason = legible(problem) or type(problem).__name__
                raise UserError(
                    f"the hub refused {repo}: {reason}; try again later or give a file"
                ) from problem
            raise UserError(
                f"no file or folder {text}, the hub cannot be reached for it and its cache lacks it; "
                "connect, or give a file"
            ) from problem
        if any(path.suffix in SUFFIXES for path in Path(folder).iterdir()):
            return Path(folder)
    raise UserError(f"the hub's {repo} holds no checkpoint ({', '.join(SUFFIXES)}); choose another model")
