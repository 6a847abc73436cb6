"""Files of textual inversion (Gal et al. 2023): of A1111, the authors and diffusers."""

import os
from pathlib import Path

from torch import Tensor

from triptych.errors import CheckpointError, TriptychError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder, add_embeddings
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.write import write_safetensors

_UNNAMED = ("*", "emb_params", "string_to_param", "clip_l")
_MAX_WORDS = 64


def read_embeddings(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the words in a .pt (string_to_param), .bin or .safetensors (words, or emb_params), each with its vectors
    (n, D). Most files have one.

    In A1111's files the word is the file name, regardless of the content.

    Raises:
        CheckpointError: the file is no such embedding.
    """
    checkpoint = open_checkpoint(path)
    keys = [key for key, shape in checkpoint.shapes.items() if len(shape) in (1, 2)]
    widths = {checkpoint.shapes[key][-1] for key in keys}
    if {key.split("/")[-1] for key in keys} >= {"clip_l", "clip_g"}:
        raise CheckpointError(
            f"{path} is an embedding for the two text encoders of Stable Diffusion XL; give one for Stable Diffusion 1 "
            "or 2"
        )
    layers = any(key.endswith((".weight", ".bias")) for key in keys)
    if (
        not 0 < len(keys) <= _MAX_WORDS
        or len(checkpoint.entries) > len(keys) + 1
        or len(widths) > 1
        or layers
    ):
        raise CheckpointError(
            f"{path} holds {len(checkpoint.entries)} tensors; an embedding of textual inversion has one for each word"
        )
    words = {}
    for key in keys:
        name, vectors = key.split("/")[-1], checkpoint.read(key)
        word = Path(path).stem if name in _UNNAMED else name
        words[word] = vectors[None] if vectors.ndim == 1 else vectors
    return words


def load_embedding(
    net: LatentDiffusion | TextEncoder, path: str | os.PathLike[str], token: str | None = None
) -> str:
    """Add the word of a file to a text encoder, and return it. Prompts can then use the word.

    Args:
        net: a network with a text encoder, or the text encoder.
        path: the file. If it has several words, all are added, and returned with spaces between them.
        token: another name for the word; of several words, the one to add.

    Raises:
        CheckpointError: no such embedding, one of another width, or a word that exists already.
    """
    reader = net if isinstance(net, TextEncoder) else net.text_encoder
    if not isinstance(reader, TextEncoder):
        raise CheckpointError(f"{path} is a word's embedding, and this network reads no text")
    words = chosen_words(read_embeddings(path), path, token)
    try:
        add_embeddings(reader, {word: vectors.float() for word, vectors in words.items()})
    except TriptychError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem
    return " ".join(words)


def chosen_words(
    words: dict[str, Tensor], path: str | os.PathLike[str], token: str | None
) -> dict[str, Tensor]:
    """Return the words of a file that a call asks for: all, the one of several that has that name, or the only one
    under that name.

    Raises:
        CheckpointError: the file has several words, and none has that name.
    """
    if token is None:
        return words
    if token in words:
        return {token: words[token]}
    if len(words) > 1:
        raise CheckpointError(
            f"{path} has the words {', '.join(words)}, not {token}; choose one of them, or leave it out"
        )
    return {token: next(iter(words.values()))}


def save_embedding(net: LatentDiffusion | TextEncoder, token: str, path: str | os.PathLike[str]) -> None:
    """Write an added word as a .safetensors file that diffusers and A1111 read: {token: vectors}.

    Raises:
        CheckpointError: the word was not added to this network.
    """
    reader = net if isinstance(net, TextEncoder) else net.text_encoder
    if not isinstance(reader, TextEncoder) or token not in reader.tokenizer.added:
        raise CheckpointError(f"{token!r} is no word that was added to this network")
    rows = list(reader.tokenizer.added[token])
    write_safetensors(path, {token: reader.tokens.weight.detach()[rows].contiguous()}, {"format": "pt"})
