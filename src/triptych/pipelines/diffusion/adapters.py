"""LoRAs and added words on a pipeline's network: what each call asks for is put on, and what it does not taken off."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from triptych.errors import UserError
from triptych.models.text import TextEncoder
from triptych.models.tokenization.prompt_syntax import extract_loras
from triptych.pipelines.diffusion.settings import Settings
from triptych.weights.diffusion.lora import Applied, find_lora, load_lora, lora_hash
from triptych.weights.diffusion.textual_inversion import load_embedding
from triptych.weights.files.folder import SUFFIXES


class Adapters:
    """What of it a network wears now.

    Args:
        net: a `LatentDiffusion` of the pipeline's own; only its modules change, the caller's network does not.
        folder: where LoRAs are found by name.
    """

    def __init__(self, net: Any, folder: Path):
        self.net, self.folder = net, folder
        self._worn: dict[str, Any] = {"loras": {}, "embeddings": {}, "hashes": {}}
        self._applied: Applied | None = None
        self._bare: tuple[Any, Any, Any] | None = None  # the text encoder's table, tokenizer and config
        self._hashes: dict[tuple[str, int, int], str] = {}

    def resolved(self, settings: Settings) -> Settings:
        """The settings with files for names, and with the prompt's `<lora:name:weight>` among their LoRAs.

        Raises:
            UserError: no such LoRA (near names are listed), or one in the negative prompt.
        """
        prompt, asked = extract_loras(settings.prompt)
        if wrong := extract_loras(settings.negative)[1]:
            raise UserError(
                f"the negative prompt asks for the LoRA {wrong[0].name!r}, which changes the whole network; put it in "
                "the prompt"
            )
        loras: dict[str, float] = {}
        named = [*settings.loras.items(), *((one.name, one.weight) for one in asked)]
        for i, (name, weight) in enumerate(named):
            is_file = i < len(settings.loras) and Path(name).exists()
            path = os.fspath(Path(name) if is_file else self._found(name))
            loras[path] = loras.get(path, 0.0) + weight
        return replace(settings, prompt=prompt.strip() if asked else prompt, loras=loras)

    def _found(self, name: str) -> Path:
        """A file by name, or where it lies now."""
        path = Path(name)
        if path.suffix not in SUFFIXES and len(path.parts) == 1:
            return find_lora(name, self.folder)
        if not (here := self.folder / path.name).exists():  # a picture's file names where it was
            raise UserError(
                f"no LoRA {name}, nor {path.name} in {self.folder}; --lora-dir (lora_dir=) names its folder"
            )
        return here

    def hashes(self, settings: Settings) -> dict[str, str]:
        """What tells each file from another one: "LoRA style" -> digits."""
        files = {f"LoRA {Path(path).stem}": path for path in settings.loras}
        return {role: self._hash(path) for role, path in files.items()} | {
            f"word {word}": self._hash(path) for word, path in settings.embeddings.items()
        }

    def _hash(self, path: str) -> str:
        if not Path(path).is_file():
            return ""  # a folder, or nothing: reading it says which
        stamp = os.stat(path)
        key = (path, stamp.st_size, stamp.st_mtime_ns)
        if key not in self._hashes:
            self._hashes[key] = lora_hash(path)
        return self._hashes[key]

    def wear(self, settings: Settings) -> bool:
        """Put on what resolved settings ask for; whether that changed anything.

        Raises:
            UserError: a file that does not fit the network, which is bare then.
        """
        asked = {"loras": settings.loras, "embeddings": settings.embeddings, "hashes": self.hashes(settings)}
        if asked == self._worn:
            return False
        if self.net.text is None and self.net.config.text is not None:
            raise UserError(
                "the text encoder's memory was given back after the first prompts (low_memory=True); make a new "
                "pipeline for other LoRAs or words"
            )
        self._undress()
        try:
            for word, path in settings.embeddings.items():
                self._remember()
                load_embedding(self.net, path, word)
            if settings.loras:
                self._applied = load_lora(self.net, settings.loras)
        except UserError:
            self._undress()
            raise
        self._worn = asked
        return True

    def _remember(self) -> None:
        reader = self.net.text
        if self._bare is None and isinstance(reader, TextEncoder):
            self._bare = (reader.tokens, reader.tokenizer, reader.config)

    def _undress(self) -> None:
        if self._applied is not None:
            self._applied.undo()
        if self._bare is not None:
            reader = self.net.text
            reader.tokens, tokenizer, reader.config = self._bare
            reader.tokenizer = tokenizer
        self._applied = self._bare = None
        self._worn = {"loras": {}, "embeddings": {}, "hashes": {}}
