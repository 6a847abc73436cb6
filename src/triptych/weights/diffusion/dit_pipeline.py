"""diffusers' folder of a DiT: transformer, vae, scheduler, and class names in model_index.json."""

from triptych.errors import CheckpointError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion import autoencoder, diffusers, dit
from triptych.weights.mapping.defaults import HALF
from triptych.weights.mapping.format import (
    Draft,
    Format,
    Hints,
    LoadPlan,
    Settings,
    StateDictKeys,
    cpu_state_dict,
)
from triptych.weights.mapping.round_trip import verify_round_trip
from triptych.weights.mapping.rules import add_prefixes, export_tensors

TITLE = "diffusers (a DiT's folder)"


def matches(keys: StateDictKeys) -> bool:
    return "model_index" in keys.settings and dit.matches_diffusers(keys.subset("transformer/"))


def read(keys: StateDictKeys, hints: Hints) -> LoadPlan:
    settings = keys.settings
    net, facts = dit.of_diffusers(keys.subset("transformer/"), settings.get("transformer/config", {}))
    rules = add_prefixes(dit.diffusers_table(net), "transformer/", "network.")
    result = diffusers.stage_of(keys.subset("vae/"), settings.get("vae/config", {}))
    if result is None:
        raise CheckpointError(f"{keys.path} has no vae that this triptych knows; give the whole folder")
    stage, table, more = result
    rules += add_prefixes(table, "vae/", "autoencoder.")
    process = diffusers.read_process(settings.get("scheduler/scheduler_config"), f"{keys.path}/scheduler")
    config = LatentDiffusionConfig(autoencoder=stage, network=net, process=process)
    preprocess = Preprocess(size=config.image_size, mean=HALF, std=HALF)
    facts |= {**more, "process": "scheduler_config.json", "preprocess": "convention: pixels in [-1, 1]"}
    classes = _classes(settings["model_index"].get("id2label"), net.num_classes)
    facts["classes"] = "model_index.json" if classes else "none"
    return LoadPlan(
        "latent-diffusion", config, rules, ModelCard(preprocess=preprocess, classes=classes), facts
    )


def _classes(id2label: object, count: int) -> tuple[str, ...] | None:
    """Return the class names of {"0": name, ...}; None if any is missing."""
    if not isinstance(id2label, dict) or not all(isinstance(id2label.get(str(i)), str) for i in range(count)):
        return None
    return tuple(id2label[str(i)] for i in range(count))


def draft(net: LatentDiffusion) -> Draft:
    """Return the draft of a pipeline, with a DiT or a UNet."""
    config = net.config
    if not isinstance(config.network, DiTConfig):
        return diffusers.draft(net)
    if not isinstance(config.autoencoder, AutoencoderConfig) or config.autoencoder.regularization != "kl":
        raise CheckpointError(f"{TITLE} has a KL autoencoder; choose another format")
    rules = add_prefixes(dit.diffusers_table(config.network), "transformer/", "network.")
    rules += add_prefixes(
        autoencoder.table(config.autoencoder, autoencoder.DIFFUSERS), "vae/", "autoencoder."
    )
    index: Settings = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.VERSION,
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if net.card.classes:
        index["id2label"] = {str(i): name for i, name in enumerate(net.card.classes)}
    settings: Settings = {
        "transformer/config": dit.settings_of(config.network),
        "vae/config": diffusers.stage_settings(config.autoencoder),
        "scheduler/scheduler_config": diffusers.process_settings(config.process),
        "model_index": index,
    }
    rules = [one for one in rules if one.ours]
    tensors = export_tensors(rules, cpu_state_dict(net), f"{TITLE} has no key for all of this network")
    return verify_round_trip(Draft(tensors, settings), net, read, TITLE, "safetensors")


FORMATS = (Format("diffusers", "latent-diffusion", TITLE, "pipeline", matches, read, draft),)
