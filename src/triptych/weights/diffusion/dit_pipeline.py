"""diffusers' folder of a DiT: transformer, vae, scheduler, and the names of the classes in its model_index.json."""

from triptych.errors import UserError
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.autoencoder import AutoencoderConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.diffusion import autoencoder, diffusers, dit
from triptych.weights.diffusion.rule_helpers import inside
from triptych.weights.mapping.defaults import HALF
from triptych.weights.mapping.format import Draft, Format, Hints, Names, Reading, Settings, state
from triptych.weights.mapping.round_trip import checked
from triptych.weights.mapping.rules import to_theirs

TITLE = "diffusers (a DiT's folder)"


def recognises(names: Names) -> bool:
    return "model_index" in names.settings and dit.recognises_diffusers(names.within("transformer/"))


def read(names: Names, hints: Hints) -> Reading:
    settings = names.settings
    net, facts = dit.of_diffusers(names.within("transformer/"), settings.get("transformer/config", {}))
    rules = inside(dit.diffusers_table(net), "transformer/", "network.")
    found = diffusers.stage_of(names.within("vae/"), settings.get("vae/config", {}))
    if found is None:
        raise UserError(f"{names.path} has no vae that this triptych knows; give the whole folder")
    stage, table, more = found
    rules += inside(table, "vae/", "autoencoder.")
    process = diffusers.read_process(settings.get("scheduler/scheduler_config"), f"{names.path}/scheduler")
    config = LatentDiffusionConfig(autoencoder=stage, network=net, process=process)
    preprocess = Preprocess(size=config.image_size, mean=HALF, std=HALF)
    facts |= {**more, "process": "scheduler_config.json", "preprocess": "convention: pixels in [-1, 1]"}
    classes = _classes(settings["model_index"].get("id2label"), net.num_classes)
    facts["classes"] = "model_index.json" if classes else "none"
    return Reading(
        "latent-diffusion", config, rules, ModelCard(preprocess=preprocess, classes=classes), facts
    )


def _classes(said: object, count: int) -> tuple[str, ...] | None:
    """The names of the classes, from {"0": name, ...}; none if they are not all there."""
    if not isinstance(said, dict) or not all(isinstance(said.get(str(i)), str) for i in range(count)):
        return None
    return tuple(said[str(i)] for i in range(count))


def draft(net: LatentDiffusion) -> Draft:
    """A pipeline's folder, of a DiT or of a UNet."""
    config = net.config
    if not isinstance(config.network, DiTConfig):
        return diffusers.draft(net)
    if not isinstance(config.autoencoder, AutoencoderConfig) or config.autoencoder.regularization != "kl":
        raise UserError(f"{TITLE} has a KL autoencoder; choose another format")
    rules = inside(dit.diffusers_table(config.network), "transformer/", "network.")
    rules += inside(autoencoder.table(config.autoencoder, autoencoder.DIFFUSERS), "vae/", "autoencoder.")
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
    tensors = to_theirs(rules, state(net), f"{TITLE} has no place for all of this network")
    return checked(Draft(tensors, settings), net, read, TITLE, "safetensors")


FORMATS = (Format("diffusers", "latent-diffusion", TITLE, "pipeline", recognises, read, draft),)
