"""What tells a denoiser what to paint, for the examples of a source: classes, captions, or the pictures themselves."""

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
from triptych.errors import UserError
from triptych.model_card import Preprocess
from triptych.models.image_tokens import TokenProjection
from triptych.models.text import ClassToken, TextEncoder
from triptych.models.tokenization.tokenizer import Tokenizer
from triptych.network import Network

ConditionIndices = np.ndarray
"""int64 (b,): what each picture of a batch is said to be."""
MAX_CACHED_BYTES = 1 << 30  # of a frozen encoder's contexts that stay in memory
MAX_TOKENS = 77


class Condition(Protocol):
    """Says what the examples of one source are, and makes contexts of it."""

    nothing: int
    """What stands for no condition."""

    def named(self, count: int) -> tuple[str, ...]:
        """Some of what is said, spread over the source, as prompts."""
        ...

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        """What those examples are said to be: one of all that they may be called, or the first without `rng`."""
        ...

    def context(self, reader: Any, chosen: ConditionIndices) -> Float[Tensor, "b n d"] | None:
        """The tokens that the denoiser looks at. `reader` is the part that learns to make them, if one does."""
        ...


class Unconditional:
    """Nothing is said."""

    nothing = 0

    def named(self, count: int) -> tuple[str, ...]:
        return ()

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return np.zeros(len(rows), np.int64)

    def context(self, reader: Any, chosen: ConditionIndices) -> None:
        return None


class Classes:
    """The label, from 0; the number after the last is no class."""

    def __init__(self, labels: np.ndarray, count: int):
        self.labels, self.nothing = labels, count

    def named(self, count: int) -> tuple[str, ...]:
        return tuple(
            str(self.labels[row]) for row in spread(len(self.labels), count) if self.labels[row] >= 0
        )

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return self.labels[np.asarray(rows, np.int64)]

    def context(self, reader: ClassToken, chosen: ConditionIndices) -> Float[Tensor, "b 1 d"]:
        return reader(copy_to_device(torch.from_numpy(chosen), reader.classes.weight.device))


class Captions:
    """Captions as token numbers, each different one once; the empty one, the first, is no condition.

    Args:
        sayings: all that each example may be called. One without any is called nothing.
        tokenizer, length, pad: of the text encoder.
    """

    nothing = 0

    def __init__(self, sayings: Sequence[tuple[str, ...]], tokenizer: Tokenizer, length: int, pad: int):
        known = {"": 0}
        numbers = [
            [known.setdefault(text.strip(), len(known)) for text in texts or ("",)] for texts in sayings
        ]
        self.texts = list(known)
        self.count = np.array([len(texts) for texts in numbers], np.int64)
        self.first = np.cumsum([0, *self.count])[:-1]
        self.numbers = np.array([number for texts in numbers for number in texts], np.int64)
        ids = [tokenizer.framed(tokenizer.ids(text), length, pad) for text in known]
        self.tokens = torch.tensor(ids, dtype=torch.int32)  # K n

    def named(self, count: int) -> tuple[str, ...]:
        return tuple(self.texts[self.numbers[self.first[row]]] for row in spread(len(self.first), count))

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        at = np.asarray(rows, np.int64)
        which = (
            0
            if rng is None
            else (distributed.draw_rows(len(at), rng.random) * self.count[at]).astype(np.int64)
        )
        return self.numbers[self.first[at] + which]

    def context(self, reader: TextEncoder, chosen: ConditionIndices) -> Float[Tensor, "b n d"]:
        """Each different caption of the batch is read once."""
        each, back = np.unique(chosen, return_inverse=True)
        device = reader.positions.device
        read = reader.encode_tokens(copy_to_device(self.tokens[each].long(), device))
        return read[copy_to_device(torch.from_numpy(back), device)]


class FrozenCaptions(Captions):
    """Captions that a text encoder reads which does not learn. What it made of each is kept while it fits in memory."""

    def __init__(self, sayings: Sequence[tuple[str, ...]], encoder: TextEncoder):
        config = encoder.config
        super().__init__(sayings, encoder.tokenizer, config.max_length, config.pad_token)
        self.encoder = encoder
        self.kept: Tensor | None = None
        self.has = np.zeros(len(self.texts), bool)
        if len(self.texts) * config.max_length * config.embed_dim * 2 <= MAX_CACHED_BYTES:
            self.kept = torch.empty(len(self.texts), config.max_length, config.embed_dim, dtype=torch.float16)

    @torch.no_grad()
    def context(self, reader: Any, chosen: ConditionIndices) -> Float[Tensor, "b n d"]:
        if (kept := self.kept) is None:
            return super().context(self.encoder, chosen)
        missing = np.unique(chosen[~self.has[chosen]])
        if len(missing):
            kept[missing] = super().context(self.encoder, missing).to(kept)
            self.has[missing] = True
        return copy_to_device(kept[torch.from_numpy(chosen)], self.encoder.positions.device).float()


class FrozenImages:
    """Pictures themselves: what a frozen ViT or Swin sees in them, the same at every step. It is kept while it fits in
    memory.

    Args:
        source: the pictures.
        backbone: on the run's device.
        how: what the backbone is fed.
        loading: what to do about damaged pictures.
    """

    def __init__(self, source: Source, backbone: Network, how: Preprocess, loading: DataConfig):
        self.source, self.backbone, self.how = source, backbone, how
        self.loading = replace(loading, workers=0, cache="off", eval_batch_size=32)
        self.nothing = len(source)
        self.has = np.zeros(len(source), bool)
        self.kept: Tensor | None = None

    def named(self, count: int) -> tuple[str, ...]:
        return ()

    def choose(self, rows: Sequence[int], rng: np.random.Generator | None) -> ConditionIndices:
        return np.asarray(rows, np.int64)

    def context(self, reader: TokenProjection, chosen: ConditionIndices) -> Float[Tensor, "b n d"]:
        seen = self.features(np.where(chosen == self.nothing, 0, chosen))
        none = copy_to_device(torch.from_numpy(chosen == self.nothing), seen.device)[:, None, None]
        return torch.where(none, reader.nothing(seen.shape[1]).to(seen.dtype), reader(seen))

    @torch.no_grad()
    def features(self, rows: ConditionIndices) -> Float[Tensor, "b n c"]:
        """The cells of the last map, in fp32."""
        device = next(self.backbone.parameters()).device
        each, back = np.unique(rows, return_inverse=True)
        missing = each[~self.has[each]]
        if len(missing):
            fresh = self._see(missing)
            if self.kept is None and len(self.source) * fresh[0].numel() * 2 > MAX_CACHED_BYTES:
                return fresh[copy_to_device(torch.from_numpy(back), device)].float()
            kept = self.kept
            if kept is None:
                kept = self.kept = torch.zeros(len(self.source), *fresh.shape[1:], dtype=torch.float16)
            kept[missing] = fresh.to(kept)
            self.has[missing] = True
        assert self.kept is not None
        return copy_to_device(self.kept[rows], device).float()

    def _see(self, rows: ConditionIndices) -> Float[Tensor, "b n c"]:
        device = next(self.backbone.parameters()).device
        found: list[Tensor] = []
        good: list[int] = []
        for batch in make_loader(Subset(self.source, rows), self.loading, self.how, train=False):
            images = preprocess_batch(
                batch["image"].to(device), self.how.mean, self.how.std, self.how.background
            )
            found.append(rearrange(self.backbone.features(images)[-1].float(), "b c h w -> b (h w) c"))
            good += batch["row"]
        if not found:
            raise UserError("none of these pictures could be read")
        seen = torch.cat(found)
        whole = seen.new_zeros(
            len(rows), *seen.shape[1:]
        )  # damaged pictures, which no batch asks for, stay 0
        whole[good] = seen
        return whole


def spread(size: int, count: int) -> list[int]:
    """`count` indices, spread evenly."""
    return [i * size // count for i in range(min(count, size))]


def tokens_needed(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """Tokens of the longest text with start and end, rounded up to a multiple of 4, from 8 to 77."""
    longest = max((len(tokenizer.ids(text)) for text in texts), default=0) + 2
    return min(max(-(-longest // 4) * 4, 8), MAX_TOKENS)
