"""LoRAs and textual inversion on a pipeline's network: those of a call are applied, those of earlier calls removed."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych.errors import CheckpointError, ConfigError, TriptychError
from triptych.models.text import TextEncoder
from triptych.models.tokenization.prompt_syntax import extract_loras
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.weights.diffusion.lora import Applied, LoraWeight, find_lora, load_lora, lora_hash
from triptych.weights.diffusion.textual_inversion import load_embedding
from triptych.weights.files.folder import SUFFIXES

_NONE: dict[str, Any] = {"loras": {}, "embeddings": {}, "hashes": {}}


class Adapters:
    """The adapters that are applied to a network.

    Args:
        net: the pipeline's own `LatentDiffusion`; its modules change, the caller's network does not.
        folder: where LoRAs are found by name.
    """

    def __init__(self, net: Any, folder: Path):
        self.net, self.folder = net, folder
        self._current = _NONE
        self._applied: Applied | None = None
        self._original: tuple[Any, Any, Any] | None = None  # the text encoder's table, tokenizer and config
        self._hashes: dict[tuple[str, int, int], str] = {}

    def resolve(self, record: GenerationRecord) -> GenerationRecord:
        """Return the record with files in place of names, and the prompt's `<lora:name:weight>` among its LoRAs.

        Raises:
            ConfigError: an unknown LoRA (near names are listed), or one in the negative prompt.
        """
        prompt, requested = extract_loras(record.prompt)
        if wrong := extract_loras(record.negative_prompt)[1]:
            raise ConfigError(
                f"the negative prompt asks for the LoRA {wrong[0].name!r}, which changes the whole network; put it in "
                "the prompt"
            )
        loras: dict[str, LoraWeight] = {}
        named = [*record.loras.items(), *((lora.name, lora.weight) for lora in requested)]
        for i, (name, weight) in enumerate(named):
            is_file = i < len(record.loras) and Path(name).exists()
            path = os.fspath(Path(name) if is_file else self._find(name))
            loras[path] = _sum(loras.get(path, 0.0), weight)
        return replace(record, prompt=prompt.strip() if requested else prompt, loras=loras)

    def _find(self, name: str) -> Path:
        """Return a LoRA's file, by its name or by its path."""
        path = Path(name)
        if path.suffix not in SUFFIXES and len(path.parts) == 1:
            return find_lora(name, self.folder)
        if not (moved := self.folder / path.name).exists():  # an image's metadata hold the path at that time
            raise CheckpointError(
                f"no LoRA {name}, nor {path.name} in {self.folder}; name its folder by --lora-dir (lora_dir=)"
            )
        return moved

    def hashes(self, record: GenerationRecord) -> dict[str, str]:
        """Return a hash of each file: "LoRA style" -> digits."""
        files = {f"LoRA {Path(path).stem}": path for path in record.loras}
        files |= {f"word {word}": path for word, path in record.embeddings.items()}
        return {role: self._hash(path) for role, path in files.items()}

    def _hash(self, path: str) -> str:
        if not Path(path).is_file():
            return ""  # a folder or a missing file; loading reports which
        stamp = os.stat(path)
        key = (path, stamp.st_size, stamp.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = lora_hash(path)
        return self._hashes[key]

    def apply(self, record: GenerationRecord) -> bool:
        """Apply a resolved record's LoRAs and embeddings; return whether that changed the network.

        Raises:
            TriptychError: a file does not fit the network, which is left without adapters.
        """
        requested = {"loras": record.loras, "embeddings": record.embeddings, "hashes": self.hashes(record)}
        if requested == self._current:
            return False
        if self.net.text_encoder is None and self.net.config.text_encoder is not None:
            raise ConfigError(
                "the text encoder was freed after the first prompts (low_memory=True); make a new pipeline for other "
                "LoRAs or words"
            )
        self._remove()
        try:
            for word, path in record.embeddings.items():
                self._remember_text_encoder()
                load_embedding(self.net, path, word)
            if record.loras:
                self._applied = load_lora(self.net, record.loras)
        except TriptychError:
            self._remove()
            raise
        self._current = requested
        return True

    def _remember_text_encoder(self) -> None:
        encoder = self.net.text_encoder
        if self._original is None and isinstance(encoder, TextEncoder):
            self._original = (encoder.tokens, encoder.tokenizer, encoder.config)

    def _remove(self) -> None:
        if self._applied is not None:
            self._applied.undo()
        if self._original is not None:
            encoder = self.net.text_encoder
            encoder.tokens, tokenizer, encoder.config = self._original
            encoder.tokenizer = tokenizer
        self._applied = self._original = None
        self._current = _NONE


def _sum(a: LoraWeight, b: LoraWeight) -> LoraWeight:
    """The sum of weights, either of which may be a pair for text encoder and UNet; one number where both are equal."""
    pairs = [weight if isinstance(weight, tuple) else (weight, weight) for weight in (a, b)]
    text, unet = (sum(weights) for weights in zip(*pairs, strict=True))
    return text if text == unet else (text, unet)
