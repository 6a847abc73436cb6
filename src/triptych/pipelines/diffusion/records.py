"""Lists of records: one per seed, one per class, and groups that are generated together."""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from triptych.diffusion.config import NUM_SEEDS
from triptych.errors import ConfigError, near_names_hint
from triptych.model_card import ModelCard
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.pipelines.diffusion.options import GenerationRecord

LORA_TAG = re.compile(r"<lora:[^<>]*>")


def with_seeds(records: Sequence[GenerationRecord], num_images: int) -> list[GenerationRecord]:
    """Return `num_images` copies of each record, with seeds that rise by one from the first record's; the variation
    seeds rise instead where they are used, as in the web UI."""
    if num_images < 1:
        raise ConfigError(f"num_images is {num_images}, which must be at least 1")
    copies = [record for record in records for _ in range(num_images)]
    first = records[0].seed
    if records[0].variation_strength:
        first = records[0].variation_seed
        return [replace(record, variation_seed=(first + k) % NUM_SEEDS) for k, record in enumerate(copies)]
    return [replace(record, seed=(first + k) % NUM_SEEDS) for k, record in enumerate(copies)]


def batchable_groups(
    net: LatentDiffusion, records: Sequence[GenerationRecord], batch_size: int
) -> Iterator[list[GenerationRecord]]:
    """Split records into runs that `DiffusionPipeline.generate` takes at once.

    Records of one prompt are one group, whatever their number. Others are grouped up to the batch size by the length
    of their contexts and by the LoRAs that their prompts ask for.
    """
    chunks = getattr(net.text_encoder, "chunks", None)
    if chunks is None or len({record.prompt for record in records}) < 2:
        yield list(records)
        return

    def key(record: GenerationRecord) -> Any:
        if (
            record.embeddings
        ):  # embeddings of several tokens: the prompt's length is known only once they are loaded
            return record.prompt
        return chunks(LORA_TAG.sub("", record.prompt)), sorted(LORA_TAG.findall(record.prompt))

    for _, run in itertools.groupby(records, key):
        while group := list(itertools.islice(run, batch_size)):
            yield group


def with_class(
    record: GenerationRecord, name: int | str, config: LatentDiffusionConfig, card: ModelCard
) -> GenerationRecord:
    """Return the record for one class of a model.

    Args:
        name: the class's index, or its name on the card, see `class_index`.
        config: config of a model that takes classes.

    Raises:
        ConfigError: there is no such class; near names are listed.
    """
    assert config.classes is not None
    count, names = config.classes.num_classes, card.classes or ()
    index = class_index(name, names, count) if isinstance(name, str) else name
    if not 0 <= index < count:
        raise ConfigError(f"class {index} is not from 0 to {count - 1}")
    return replace(record, label=index, class_name=names[index] if index < len(names) else None)


def class_index(name: str, names: Sequence[str], count: int) -> int:
    """Return the index of a class by its name, one of its synonyms ("tabby, tabby cat"), or its index as text.

    Raises:
        ConfigError: there is no such class; near names are listed.
    """
    wanted = name.strip().lower()
    for index, known in enumerate(names):
        if wanted in (known.lower(), *(synonym.strip().lower() for synonym in known.split(","))):
            return index
    if wanted.isdecimal():
        return int(wanted)
    synonyms = [synonym.strip() for known in names for synonym in known.split(",")]
    hint = near_names_hint(wanted, synonyms, f"give a number from 0 to {count - 1}")
    raise ConfigError(f"no class is called {name!r}; {hint}")
