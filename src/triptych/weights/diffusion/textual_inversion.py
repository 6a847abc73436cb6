"""Files of textual inversion (Gal et al. 2023): A1111's, the authors' and diffusers'."""

import os
from pathlib import Path

from torch import Tensor

from triptych.errors import UserError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder, add_embedding
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.write import write_safetensors


def read_embedding(path: str | os.PathLike[str]) -> tuple[str, Tensor]:
    """The word and its vectors (n, D) in a .pt (string_to_param), .bin or .safetensors (a word, or emb_params).

    A1111's word is the file's name, whatever stands inside.

    Raises:
        UserError: the file is no such embedding.
    """
    checkpoint, name = open_checkpoint(path), Path(path).stem
    found = [entry for entry in checkpoint.entries if len(checkpoint.shapes[entry]) in (1, 2)]
    if len(found) != 1 or len(checkpoint.entries) > 2:
        raise UserError(
            f"{path} holds {len(checkpoint.entries)} tensors; an embedding of textual inversion is one"
        )
    key = found[0].split("/")[-1]
    vectors = checkpoint.read(found[0])
    named = key not in ("*", "emb_params", "string_to_param")
    return (key if named else name), (vectors[None] if vectors.ndim == 1 else vectors)


def load_embedding(
    net: LatentDiffusion | TextEncoder, path: str | os.PathLike[str], token: str | None = None
) -> str:
    """Teach a text encoder the word of a file, or call it `token`; gives the word that prompts then know.

    Raises:
        UserError: no such embedding, one of another family (its width), or a word that is known already.
    """
    reader = net if isinstance(net, TextEncoder) else net.text_encoder
    if not isinstance(reader, TextEncoder):
        raise UserError(f"{path} is a word's embedding, and this network reads no text")
    word, vectors = read_embedding(path)
    try:
        add_embedding(reader, token or word, vectors.float())
    except UserError as problem:
        raise UserError(f"{path}: {problem}") from problem
    return token or word


def save_embedding(net: LatentDiffusion | TextEncoder, token: str, path: str | os.PathLike[str]) -> None:
    """Write an added word as a .safetensors that diffusers and A1111 read: {token: vectors}.

    Raises:
        UserError: the word was not added to this network.
    """
    reader = net if isinstance(net, TextEncoder) else net.text_encoder
    if not isinstance(reader, TextEncoder) or token not in reader.tokenizer.added:
        raise UserError(f"{token!r} is no word that was added to this network")
    rows = list(reader.tokenizer.added[token])
    write_safetensors(path, {token: reader.tokens.weight.detach()[rows].contiguous()}, {"format": "pt"})
