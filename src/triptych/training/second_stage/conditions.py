"""Conditions of a denoiser for the examples of a source: classes, captions, or features of the images themselves."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from triptych import distributed
from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source, Subset
from triptych.device import copy_to_device
from triptych.errors import DataError
from triptych.model_card import Preprocess
from triptych.models.image_tokens import TokenProjection
from triptych.models.text import ClassToken, TextEncoder
from triptych.models.tokenization.tokenizer import Tokenizer
from triptych.network import Network

ConditionIndices = np.ndarray
"""int64 (b,): the condition of each image of a batch, such as its class or the number of its caption."""
MAX_CACHED_BYTES = 1 << 30  # of a frozen encoder's outputs
MAX_TOKENS = 77


class Condition(Protocol):
    """The conditions of the examples of a source, as indices, and the contexts that they are encoded to."""

    null_index: int
    """The index that stands for no condition."""

    def prompts(self, count: int) -> tuple[str, ...]:
        """Return up to `count` conditions, evenly spaced over the source, as prompts."""
        ...

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        """Return the condition of the examples in `rows`. If an example has several captions, choose one with `rng`, or
        the first if `rng` is None."""
        ...

    def context(self, encoder: Any, indices: ConditionIndices) -> Float[Tensor, "b n d"] | None:
        """Return the tokens that the denoiser attends to; `encoder` is the trained network that encodes them, if there
        is one."""
        ...


class Unconditional:
    """No condition."""

    null_index = 0

    def prompts(self, count: int) -> tuple[str, ...]:
        return ()

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return np.zeros(len(rows), np.int64)

    def context(self, encoder: Any, indices: ConditionIndices) -> None:
        return None


class Classes:
    """Class labels; the index after the last class is no condition."""

    def __init__(self, labels: np.ndarray, count: int):
        self.labels, self.null_index = labels, count

    def prompts(self, count: int) -> tuple[str, ...]:
        return tuple(
            str(self.labels[row]) for row in evenly_spaced(len(self.labels), count) if self.labels[row] >= 0
        )

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return self.labels[np.asarray(rows, np.int64)]

    def context(self, encoder: ClassToken, indices: ConditionIndices) -> Float[Tensor, "b 1 d"]:
        return encoder(copy_to_device(torch.from_numpy(indices), encoder.classes.weight.device))


class Captions:
    """Captions as tokens, each different caption once. The first one is empty and means no condition.

    Args:
        captions: the alternative captions of each example; an example without any gets the empty one.
        tokenizer, length, pad: those of the text encoder.
    """

    null_index = 0

    def __init__(self, captions: Sequence[tuple[str, ...]], tokenizer: Tokenizer, length: int, pad: int):
        known = {"": 0}
        numbers = [
            [known.setdefault(text.strip(), len(known)) for text in alternatives or ("",)]
            for alternatives in captions
        ]
        self.texts = list(known)
        self.count = np.array([len(alternatives) for alternatives in numbers], np.int64)
        self.first = np.cumsum([0, *self.count])[:-1]
        self.numbers = np.array([number for alternatives in numbers for number in alternatives], np.int64)
        ids = [tokenizer.framed(tokenizer.ids(text), length, pad) for text in known]
        self.tokens = torch.tensor(ids, dtype=torch.int32)  # K n

    def prompts(self, count: int) -> tuple[str, ...]:
        return tuple(
            self.texts[self.numbers[self.first[row]]] for row in evenly_spaced(len(self.first), count)
        )

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        index = np.asarray(rows, np.int64)
        alternative = (
            0
            if rng is None
            else (distributed.draw_rows(len(index), rng.random) * self.count[index]).astype(np.int64)
        )
        return self.numbers[self.first[index] + alternative]

    def context(self, encoder: TextEncoder, indices: ConditionIndices) -> Float[Tensor, "b n d"]:
        """Encode each different caption of the batch once."""
        unique, inverse = np.unique(indices, return_inverse=True)
        device = encoder.positions.device
        read = encoder.encode_tokens(copy_to_device(self.tokens[unique].long(), device))
        return read[copy_to_device(torch.from_numpy(inverse), device)]


class FrozenCaptions(Captions):
    """Captions for a frozen text encoder. Its outputs are cached if those of all captions fit in memory.

    Args:
        captions: the alternative captions of each example.
        encoder: the text encoder, on the run's device.
    """

    def __init__(self, captions: Sequence[tuple[str, ...]], encoder: TextEncoder):
        config = encoder.config
        super().__init__(captions, encoder.tokenizer, config.max_length, config.pad_token)
        self.encoder = encoder
        self.cached: Tensor | None = None
        self.is_cached = np.zeros(len(self.texts), bool)
        if len(self.texts) * config.max_length * config.embed_dim * 2 <= MAX_CACHED_BYTES:
            self.cached = torch.empty(
                len(self.texts), config.max_length, config.embed_dim, dtype=torch.float16
            )

    @torch.no_grad()
    def context(self, encoder: Any, indices: ConditionIndices) -> Float[Tensor, "b n d"]:
        if (cached := self.cached) is None:
            return super().context(self.encoder, indices)
        missing = np.unique(indices[~self.is_cached[indices]])
        if len(missing):
            cached[missing] = super().context(self.encoder, missing).to(cached)
            self.is_cached[missing] = True
        return copy_to_device(cached[torch.from_numpy(indices)], self.encoder.positions.device).float()


class FrozenImages:
    """Features that a frozen ViT or Swin extracts from the images, without augmentation. They are cached if those of
    all images fit in memory.

    Args:
        source: the images.
        backbone: the ViT or Swin, on the run's device.
        preprocess: preprocessing of the backbone's inputs.
        loading: what to do about damaged images.
    """

    def __init__(self, source: Source, backbone: Network, preprocess: Preprocess, loading: DataConfig):
        self.source, self.backbone, self.preprocess = source, backbone, preprocess
        self.loading = replace(loading, workers=0, cache="off", eval_batch_size=32)
        self.null_index = len(source)
        self.is_cached = np.zeros(len(source), bool)
        self.cached: Tensor | None = None

    def prompts(self, count: int) -> tuple[str, ...]:
        return ()

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return np.asarray(rows, np.int64)

    def context(self, encoder: TokenProjection, indices: ConditionIndices) -> Float[Tensor, "b n d"]:
        features = self.features(np.where(indices == self.null_index, 0, indices))
        none = copy_to_device(torch.from_numpy(indices == self.null_index), features.device)[:, None, None]
        return torch.where(none, encoder.null_tokens(features.shape[1]).to(features.dtype), encoder(features))

    @torch.no_grad()
    def features(self, rows: ConditionIndices) -> Float[Tensor, "b n c"]:
        """Return the positions of the last map as tokens, in fp32."""
        device = next(self.backbone.parameters()).device
        unique, inverse = np.unique(rows, return_inverse=True)
        missing = unique[~self.is_cached[unique]]
        if len(missing):
            new = self._extract(missing)
            if self.cached is None and len(self.source) * new[0].numel() * 2 > MAX_CACHED_BYTES:
                return new[copy_to_device(torch.from_numpy(inverse), device)].float()
            cached = self.cached
            if cached is None:
                cached = self.cached = torch.zeros(len(self.source), *new.shape[1:], dtype=torch.float16)
            cached[missing] = new.to(cached)
            self.is_cached[missing] = True
        assert self.cached is not None
        return copy_to_device(self.cached[rows], device).float()

    def _extract(self, rows: ConditionIndices) -> Float[Tensor, "b n c"]:
        device = next(self.backbone.parameters()).device
        features: list[Tensor] = []
        read_rows: list[int] = []
        for batch in make_loader(Subset(self.source, rows), self.loading, self.preprocess, train=False):
            images = preprocess_batch(
                batch["image"].to(device),
                self.preprocess.mean,
                self.preprocess.std,
                self.preprocess.background,
            )
            features.append(rearrange(self.backbone.features(images)[-1].float(), "b c h w -> b (h w) c"))
            read_rows += batch["row"]
        if not features:
            raise DataError("none of the images of a batch could be read; check the data's files")
        read_features = torch.cat(features)
        full = read_features.new_zeros(
            len(rows), *read_features.shape[1:]
        )  # damaged images, which are in no batch, stay 0
        full[read_rows] = read_features
        return full


def evenly_spaced(size: int, count: int) -> list[int]:
    """Return `count` evenly spaced indices below `size`, or all if there are fewer."""
    return [i * size // count for i in range(min(count, size))]


def tokens_needed(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """Return the length of the longest text with start and end token, rounded up to a multiple of 4, from 8 to 77."""
    longest = max((len(tokenizer.ids(text)) for text in texts), default=0) + 2
    return min(max(-(-longest // 4) * 4, 8), MAX_TOKENS)
