"""Load and save tokenizers: vocab.txt, tokenizer.json, and the `tokenizer` folder of a published model."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from triptych.atomic_write import write_text_atomically
from triptych.errors import CheckpointError, TriptychError
from triptych.models.tokenization.tokenizer import (
    BERT_END,
    BERT_START,
    CLIP_END,
    CLIP_START,
    PAD,
    Tokenizer,
    bert_tokenizer,
    clip_backend,
    clip_tokenizer,
    clip_vocabulary,
)

# Names of start, end and padding tokens, for vocabularies without a config.
FRAME_TOKENS = (
    *((CLIP_START, CLIP_END), (BERT_START, BERT_END)),
    *(("<s>", "</s>"), ("<bos>", "<eos>"), ("<|endoftext|>",) * 2),
)
PADS = (PAD, "<pad>", "<|pad|>")


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: BERT's vocab.txt, a tokenizer.json, or a folder with one of them or with CLIP's vocab.json and merges.txt;
            for the folder of a diffusers model its subfolder `tokenizer` is read.

    Raises:
        CheckpointError: there is no tokenizer, or it is damaged.
    """
    path = Path(path)
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a vocab.txt, a tokenizer.json, or a tokenizer's folder")
    try:
        return _from_folder(path) if path.is_dir() else _from_file(path, _settings(path.parent))
    except TriptychError:
        raise
    except Exception as problem:  # the Rust library raises nothing narrower, and a file may hold anything
        reason = " ".join(str(problem).split())[:200] or type(problem).__name__
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({reason}); get it again") from problem


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | os.PathLike[str], pad: int | None = None, length: int = 77
) -> None:
    """Write a tokenizer as the folder that transformers and diffusers read.

    Args:
        pad: the padding token, if the network has another than the tokenizer.
        length: largest number of tokens of a text, with start and end.

    An added token of several vectors becomes `token`, `token_1`, `token_2`, ..., as diffusers has them.
    """
    folder = Path(folder)
    model = json.loads(tokenizer.backend.to_str())["model"]
    start, end, named = tokenizer.frame
    named = named if pad is None else tokenizer.backend.id_to_token(pad)
    frame = {"pad_token": named}
    if model["type"] == "WordPiece":
        vocabulary = sorted(model["vocab"], key=model["vocab"].get)
        files = {"vocab.txt": "".join(f"{token}\n" for token in vocabulary)}
        frame |= {"cls_token": start, "sep_token": end, "unk_token": model["unk_token"]}
        tokenizer_class = {"tokenizer_class": "BertTokenizer", "do_lower_case": _lowercases(tokenizer)}
    elif _is_clip(model):
        merges = "".join(f"{a} {b}\n" for a, b in map(_merge, model["merges"]))
        files = {"vocab.json": json.dumps(model["vocab"], ensure_ascii=False), "merges.txt": f"#version: 0.2\n{merges}"}
        frame |= {"bos_token": start, "eos_token": end, "unk_token": end}
        tokenizer_class = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    else:
        files = {"tokenizer.json": tokenizer.backend.to_str(pretty=True)}
        frame |= {"bos_token": start, "eos_token": end}
        tokenizer_class = {"tokenizer_class": "PreTrainedTokenizerFast"}
    added = {f"{name}_{k}" if k else name: i for name, rows in tokenizer.added.items() for k, i in enumerate(rows)}
    about = {**tokenizer_class, **frame, "model_max_length": length}
    if added:
        plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
        about["added_tokens_decoder"] = {str(i): {"content": name, **plain} for name, i in added.items()}
        files["added_tokens.json"] = json.dumps(added, indent=2, ensure_ascii=False)
    files["special_tokens_map.json"] = json.dumps(frame, indent=2, ensure_ascii=False)
    files["tokenizer_config.json"] = json.dumps(about, indent=2, ensure_ascii=False)
    for name, text in files.items():
        write_text_atomically(folder / name, text)


def _from_folder(folder: Path) -> Tokenizer:
    settings = _settings(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        vocabulary = _object(folder / "vocab.json")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [line for line in lines if line and not line.startswith("#version")]
        if any(token.endswith("</w>") for token in vocabulary):  # else files of another type of byte pairs
            return _clip(vocabulary, merges, settings)
    for name in ("tokenizer.json", "vocab.txt"):
        if (folder / name).is_file():
            return _from_file(folder / name, settings)
    raise CheckpointError(
        f"{folder} holds no tokenizer; it needs CLIP's vocab.json and merges.txt, a tokenizer.json, or a vocab.txt"
    )


def _from_file(path: Path, settings: dict[str, Any]) -> Tokenizer:
    if path.suffix == ".json":
        return _from_json(path, settings)
    lines = path.read_text(encoding="utf-8").split("\n")
    vocabulary = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    return bert_tokenizer(vocabulary, bool(settings.get("do_lower_case", True)))


def _from_json(path: Path, settings: dict[str, Any]) -> Tokenizer:
    """Load a file of the `tokenizers` library. CLIP's is rebuilt, since some files mark "!" as special for padding."""
    content = _object(path)
    model, tokens = content["model"], content.get("added_tokens") or []
    known = len(model["vocab"])
    mine = [token for token in tokens if token["id"] >= known and not token["special"]]
    settings = {**settings, "added": {**{token["content"]: token["id"] for token in mine}, **settings["added"]}}
    if _is_clip(model):
        return _clip(model["vocab"], model["merges"], settings)
    content["added_tokens"] = [token for token in tokens if token not in mine]
    backend = Backend.from_str(json.dumps(content))
    backend.no_truncation()
    backend.no_padding()
    names = backend.get_vocab()
    frame = next((pair for pair in (_frame_of(settings), *FRAME_TOKENS) if all(name in names for name in pair)), None)
    if frame is None:
        raise CheckpointError(
            f"{path} does not name the start and end tokens; put its tokenizer_config.json into the same folder"
        )
    pad = next((name for name in (settings.get("pad_token"), *PADS) if name in names), None)
    return Tokenizer(backend, frame[0], frame[1], pad, _added(settings, known))


def _clip(vocabulary: dict[str, int], merges: Sequence[Any], settings: dict[str, Any]) -> Tokenizer:
    pairs = [_merge(merge) for merge in merges]
    shipped = (vocabulary, pairs) == clip_vocabulary()
    backend = clip_tokenizer().backend if shipped else clip_backend(vocabulary, pairs)
    start, end = _frame_of({"bos_token": CLIP_START, "eos_token": CLIP_END, **settings})
    return Tokenizer(backend, start, end, settings.get("pad_token"), _added(settings, len(vocabulary)))


def _settings(folder: Path) -> dict[str, Any]:
    """Return the settings next to a vocabulary: names of special tokens, and added tokens."""
    settings: dict[str, Any] = {}
    # Where they differ, as in SD 2, the latter is right.
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            for key, value in _object(folder / name).items():
                settings[key] = value["content"] if isinstance(value, dict) and "content" in value else value
    added = {token["content"]: int(i) for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    if (folder / "added_tokens.json").is_file():
        added |= _object(folder / "added_tokens.json")
    return {key: value for key, value in settings.items() if value is not None} | {"added": added}


def _frame_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    start = settings.get("bos_token") or settings.get("cls_token") or ""
    return str(start), str(settings.get("eos_token") or settings.get("sep_token") or "")


def _added(settings: Mapping[str, Any], known: int) -> dict[str, list[int]]:
    """Return added tokens with their rows; successive `token`, `token_1`, `token_2` are one."""
    added: dict[str, list[int]] = {}
    name = None
    for token, i in sorted(settings["added"].items(), key=lambda item: item[1]):
        if i < known:
            continue
        if name is not None and token == f"{name}_{len(added[name])}" and i == added[name][-1] + 1:
            added[name].append(i)
        else:
            name, added[token] = token, [i]
    return added


def _is_clip(model: Mapping[str, Any]) -> bool:
    return model.get("type") == "BPE" and model.get("end_of_word_suffix") == "</w>"


def _merge(merge: Any) -> tuple[str, str]:
    a, b = merge.split(" ") if isinstance(merge, str) else merge
    return a, b


def _lowercases(tokenizer: Tokenizer) -> bool:
    normalizer = json.loads(tokenizer.backend.to_str()).get("normalizer") or {}
    return bool(normalizer.get("lowercase", True))


def _object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object; get it again")
    return value
