"""Files of textual inversion (Gal et al. 2023): of A1111, the authors and diffusers."""

import os
from pathlib import Path

from torch import Tensor

from triptych.errors import CheckpointError, TriptychError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder, add_embedding
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.write import write_safetensors


def read_embedding(path: str | os.PathLike[str]) -> tuple[str, Tensor]:
    """Return the word and its vectors (n, D) in a .pt (string_to_param), .bin or .safetensors (a word, or emb_params).

    In A1111's files the word is the file name, regardless of the content.

    Raises:
        CheckpointError: the file is no such embedding.
    """
    checkpoint, name = open_checkpoint(path), Path(path).stem
    entries = [entry for entry in checkpoint.entries if len(checkpoint.shapes[entry]) in (1, 2)]
    if len(entries) != 1 or len(checkpoint.entries) > 2:
        raise CheckpointError(
            f"{path} holds {len(checkpoint.entries)} tensors; an embedding of textual inversion is one"
        )
    key = entries[0].split("/")[-1]
    vectors = checkpoint.read(entries[0])
    named = key not in ("*", "emb_params", "string_to_param")
    return (key if named else name), (vectors[None] if vectors.ndim == 1 else vectors)


def load_embedding(
    net: LatentDiffusion | TextEncoder, path: str | os.PathLike[str], token: str | None = None
) -> str:
    """Add the word of a file to a text encoder, and return it. Prompts can then use the word.

    Args:
        token: another name for the word.

    Raises:
        CheckpointError: no such embedding, one of another width, or a word that exists already.
    """
    reader = net if isinstance(net, TextEncoder) else net.text_encoder
    if not isinstance(reader, TextEncoder):
        raise CheckpointError(f"{path} is a word's embedding, and this network reads no text")
    word, vectors = read_embedding(path)
    try:
        add_embedding(reader, token or word, vectors.float())
    except TriptychError as problem:
        raise CheckpointError(f"{path}: {problem}") from problem
    return token or word


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
