"""Encoders that turn a prompt into the context of a denoiser (Rombach et al. 2022, Section 3.3: tau_theta):
transformers for text, and a table for classes."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych.errors import CheckpointError, ConfigError
from triptych.kernels.linear import linear
from triptych.layers.attention import AttentionModule, attention
from triptych.layers.initialization import initialize_weights
from triptych.layers.mlp import Mlp, QuickMlp
from triptych.model_card import ModelCard
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.tokenization.prompt_syntax import Chunk, pack, parse_prompt
from triptych.models.tokenization.tokenizer import Tokenizer, clip_tokenizer
from triptych.network import Network

log = logging.getLogger(__name__)


class TextAttention(AttentionModule):
    """Multi-head self-attention with an optional mask; the heads together may have fewer channels than a token."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.inner, bias=config.causal)
        self.proj = nn.Linear(config.inner, config.embed_dim)

    def forward(self, x: Float[Tensor, "b n d"], mask: Float[Tensor, "1 1 n n"] | None) -> Float[Tensor, "b n d"]:
        qkv = linear(x, self.qkv.weight, self.qkv.bias)                                  # b n 3 inner
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        x = rearrange(attention(q, k, v, self.tap, mask), "b h n d -> b n (h d)")        # b n inner
        return linear(x, self.proj.weight, self.proj.bias)


class TextBlock(nn.Module):
    """One block: attention, then MLP, each after a LayerNorm and with a skip connection."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.attn = TextAttention(config)
        self.norm2 = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = (QuickMlp if config.activation == "quick_gelu" else Mlp)(config.embed_dim, config.mlp_dim)

    def forward(self, z: Float[Tensor, "b n d"], mask: Float[Tensor, "1 1 n n"] | None) -> Float[Tensor, "b n d"]:
        z = z + self.attn(self.norm1(z), mask)
        return z + self.mlp(self.norm2(z))


class TextEncoder(Network):
    """A transformer for text. It returns a vector for each token: `text(["a red apple"])` is (1, L, D).

    It holds its tokenizer. The types `clip` and `openclip` have the shipped one; others encode strings once `tokenizer`
    is set, and token numbers without it.
    """

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        self._tokenizer: Tokenizer | None = None
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self.tokens = nn.Embedding(config.vocab_size + config.num_added_tokens, config.embed_dim)
        self.positions = nn.Parameter(torch.empty(config.max_length, config.embed_dim))
        self.encoder = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        if config.logits:
            self.logits = nn.Linear(config.embed_dim, config.vocab_size)
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order, for checkpointing, compilation and sharding."""
        return list(self.encoder)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which may be set.

        Raises:
            CheckpointError: there is none, or the vocabulary of a new one is larger than the embedding table.
        """
        if self._tokenizer is None:
            if self.config.type == "ldm-bert":
                raise CheckpointError("the text encoder has no tokenizer; load a vocab.txt into text.tokenizer")
            self.tokenizer = clip_tokenizer()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was set; the shipped one is loaded when it is first needed."""
        return self._tokenizer is not None

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        rows = self.config.vocab_size + self.config.num_added_tokens
        if tokenizer.size > self.config.vocab_size or any(max(row) >= rows for row in tokenizer.added.values()):
            held = f"{tokenizer.size} tokens" + (f" and {', '.join(tokenizer.added)}" if tokenizer.added else "")
            raise CheckpointError(
                f"the tokenizer has {held} and the text encoder {rows} embeddings; use the tokenizer of the same model"
            )
        self._tokenizer = tokenizer

    @property
    def room(self) -> int:
        """Number of tokens that are encoded at once, without start and end."""
        return self.config.max_length - 2

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "b n"]:
        """Return token numbers with start, end and padding. Longer texts are cut, and a warning logs the rest."""
        if isinstance(texts, str) or not texts:
            raise ConfigError(f"texts is {texts!r}, which must be a list of strings such as ['a red apple']")
        rows = []
        for text in texts:
            ids = self.tokenizer.ids(text)
            if len(ids) > self.room:
                lost = self.tokenizer.text(ids[self.room :])
                log.warning("the text has %d tokens and %d are read; left out: %s", len(ids), self.room, lost)
            rows.append(self.tokenizer.framed(ids, self.config.max_length, self.config.pad_token))
        return torch.tensor(rows, device=self.positions.device)

    def encode_tokens(self, ids: Int[Tensor, "b n"], skip_last_blocks: int | None = None) -> Float[Tensor, "b n d"]:
        """Return the context of token numbers, start and end included: the output of the last block, or of an earlier
        one, through the final norm.

        Args:
            skip_last_blocks: how many of the last blocks are left out; None is as many as the config says.

        Raises:
            ConfigError: more tokens than there are positions, or no block is left.
        """
        n = ids.shape[1]
        skip = self.config.skip_last_blocks if skip_last_blocks is None else skip_last_blocks
        if not 0 <= skip < self.config.depth:
            raise ConfigError(f"{skip} of the text encoder's {self.config.depth} blocks are to be left out; leave one")
        if n > self.config.max_length:
            raise ConfigError(f"{n} tokens are given, but this text encoder has positions for {self.config.max_length}")
        z = self.tokens(ids) + self.positions[:n]                                        # b n D
        mask = None
        if self.config.causal:
            mask = torch.full((1, 1, n, n), -math.inf, dtype=z.dtype, device=z.device).triu(1)
        for block in self.encoder[: self.config.depth - skip]:
            z = block(z, mask)
        return self.norm(z)

    def forward(self, texts: Sequence[str]) -> Float[Tensor, "b n d"]:
        """Return the context of strings without prompt syntax, cut to `room` tokens."""
        return self.encode_tokens(self.tokenize(texts))

    def encode_prompt(self, prompt: str) -> Float[Tensor, "1 n d"]:
        """Return `encode_prompts` of one prompt."""
        return self.encode_prompts([prompt])

    def encode_prompts(
        self, prompts: Sequence[str], skip_last_blocks: int | None = None
    ) -> Float[Tensor, "b n d"]:
        """Return the context of prompts of any length, with weights (the syntax of `tokenization.prompt_syntax`).

        A prompt is encoded in chunks of `room` tokens, each with its own start and end, which are concatenated; shorter
        prompts of the list get empty chunks. Chunks are encoded one by one, so that a prompt's context does not depend
        on the other prompts, bit for bit.

        Args:
            skip_last_blocks: as in `encode_tokens`.

        Raises:
            ConfigError: no prompt, or a weight beyond 10,000.
        """
        if isinstance(prompts, str) or not prompts:
            raise ConfigError(f"prompts is {prompts!r}, which must be a list of strings such as ['a (red:1.3) apple']")
        packed = [pack(parse_prompt(prompt), self.tokenizer.spans, self.room) for prompt in prompts]
        most = max(len(chunks) for chunks in packed)
        known: dict[tuple[int, ...], Tensor] = {}
        rows = []
        for chunks in packed:
            chunks = chunks + [[]] * (most - len(chunks))
            parts = [self._encode_chunk(chunk, known, skip_last_blocks) for chunk in chunks]
            rows.append(torch.cat(parts, dim=1))
        return torch.cat(rows)

    def chunks(self, prompt: str) -> int:
        """Return how many chunks a prompt takes; its context is that many times as long."""
        return len(pack(parse_prompt(prompt), self.tokenizer.spans, self.room))

    def _encode_chunk(
        self, chunk: Chunk, known: dict[tuple[int, ...], Tensor], skip: int | None
    ) -> Float[Tensor, "1 n d"]:
        ids = self.tokenizer.framed([i for i, _ in chunk], self.config.max_length, self.config.pad_token)
        if (key := tuple(ids)) not in known:
            known[key] = self.encode_tokens(torch.tensor([ids], device=self.positions.device), skip)
        weights = torch.ones(1, self.config.max_length)
        weights[0, 1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        return emphasize(known[key], weights.to(self.positions.device))


class ClassToken(Network):
    """A class as a prompt of one token (Rombach et al. 2022, Appendix E.2.1)."""

    def __init__(self, config: ClassTokenConfig):
        super().__init__()
        self.config = config
        self.card = ModelCard()
        self.classes = nn.Embedding(config.num_classes + int(config.null_class), config.embed_dim)
        nn.init.normal_(self.classes.weight, std=0.02)

    @property
    def null(self) -> int | None:
        """Index of the null class; None without one."""
        return self.config.num_classes if self.config.null_class else None

    def blocks(self) -> list[nn.Module]:
        return []

    def forward(self, labels: Int[Tensor, "b"] | Sequence[int]) -> Float[Tensor, "b 1 d"]:
        """Return the context of classes, from 0; `null` is the null class.

        Raises:
            ConfigError: a number in a list is not a class.
        """
        if not isinstance(labels, Tensor):
            rows = self.classes.num_embeddings
            if wrong := [label for label in labels if not 0 <= label < rows]:
                raise ConfigError(f"class {wrong[0]} is not from 0 to {rows - 1}")
            labels = torch.tensor(labels, dtype=torch.long, device=self.classes.weight.device)
        return self.classes(labels)[:, None]


def emphasize(z: Float[Tensor, "b n d"], weights: Float[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
    """Return each token's vector times its weight, rescaled to the original mean, as in AUTOMATIC1111's web UI."""
    weighted = z.float() * weights[..., None]
    before, after = z.float().mean((1, 2), keepdim=True), weighted.mean((1, 2), keepdim=True)
    return (weighted * torch.where(after == 0, 1.0, before / after)).to(z.dtype)


def add_embedding(text: TextEncoder, token: str, vectors: Float[Tensor, "n d"] | Float[Tensor, "d"]) -> None:
    """Add a word to a text encoder, in place: textual inversion (Gal et al. 2023).

    Args:
        text: the encoder, which gets rows in its table and a tokenizer with the word.
        token: the word, such as "<cat>"; upper and lower case are equal in prompts.
        vectors: one vector, or several that follow each other.

    Raises:
        ConfigError: vectors of another width or too many, a word that exists already or has characters of the prompt
            syntax.
    """
    add_embeddings(text, {token: vectors})


def add_embeddings(text: TextEncoder, words: Mapping[str, Tensor]) -> None:
    """Add several words with their vectors as `add_embedding` does: all of them, or none if one is refused."""
    several = {token: vectors[None] if vectors.ndim == 1 else vectors for token, vectors in words.items()}
    for token, vectors in several.items():
        count, width = vectors.shape
        if width != text.config.embed_dim:
            raise ConfigError(
                f"{token!r} has vectors of {width} numbers, this text encoder's have {text.config.embed_dim}"
            )
        if not 0 < count <= text.room:
            raise ConfigError(
                f"{token!r} has {count} vectors, which must be from 1 to {text.room}, the length of a chunk"
            )
        if set(token) & set("()[]\\"):
            raise ConfigError(
                f"the token {token!r} has brackets or backslashes, which are syntax in prompts; rename it"
            )
    table, tokenizer = text.tokens.weight, text.tokenizer
    size = len(table)
    for token, vectors in several.items():
        tokenizer = tokenizer.add(token, range(size, size + len(vectors)))
        size += len(vectors)
    text.config = replace(text.config, num_added_tokens=text.config.num_added_tokens + size - len(table))
    wider = torch.cat([table.detach(), *(vectors.detach().to(table) for vectors in several.values())])
    text.tokens = nn.Embedding.from_pretrained(wider, freeze=not table.requires_grad)
    text.tokenizer = tokenizer
