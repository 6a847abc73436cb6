"""ComfyUI: the first pass of its graph, from the node that samples back to prompts, model, LoRAs and size."""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_graph import (
    Node,
    NodeGraph,
    graph_of_prompt,
    graph_of_workflow,
)
from triptych.pipelines.diffusion.foreign_metadata.comfyui_names import COMFYUI_DISCARDS, COMFYUI_VARIANTS
from triptych.pipelines.diffusion.foreign_metadata.settings import (
    ForeignSettings,
    as_number,
    json_object,
    model_name,
)

SEEDS = ("seed", "noise_seed")
TEXT_INPUTS = ("text", "text_g", "prompt", "clip_l", "t5xxl", "string", "value")
MODELS = ("ckpt_name", "unet_name", "model_name")
# Parts of class names -> what such a node does that nothing here does.
LOSSES = {
    "ControlNetApply": "ControlNet",
    "IPAdapter": "IP-Adapter",
    "FreeU": "FreeU",
    "HypernetworkLoader": "the hypernetwork",
    "FaceDetailer": "face detailing",
    "FaceRestore": "face restoration",
    "UltimateSDUpscale": "Ultimate SD upscale",
    "ModelMerge": "the merge of models",
    "ModelSampling": "the changed noise schedule",
    "RescaleCFG": "the rescaled guidance",
    "PerturbedAttention": "perturbed-attention guidance",
    "ConditioningCombine": "the combination of prompts",
    "ConditioningConcat": "the concatenation of prompts",
    "ConditioningSetArea": "the areas of prompts",
    "ConditioningAverage": "the average of prompts",
    "ConditioningSetMask": "the masks of prompts",
    "ConditioningSetTimestepRange": "the steps of prompts",
    "FluxGuidance": "Flux's guidance",
    "StyleModelApply": "the style model",
    "SelfAttentionGuidance": "self-attention guidance",
    "unCLIP": "unCLIP",
    "GLIGEN": "GLIGEN",
    "PatchModelAddDownscale": "Kohya's deep shrink",
    "HyperTile": "HyperTile",
    "DynamicThresholding": "dynamic thresholding",
}


def recognizes(texts: Mapping[str, str]) -> bool:
    return _graph(texts) is not None


def read(texts: Mapping[str, str]) -> ForeignSettings:
    graph = _graph(texts)
    assert graph is not None
    settings = ForeignSettings("ComfyUI")
    samplers = _sampler_nodes(graph)
    if not samplers:
        settings.note("the graph has no node that samples; give the settings as options")
        return settings
    first = _first_pass(graph, samplers)
    if len(samplers) > 1:
        others = ", ".join(node.class_type for node in samplers if node is not first)
        settings.note(f"the first of {len(samplers)} sampling passes is read; not reproduced: {others}")
    _set_sampling(settings, graph, first)
    _set_prompts(settings, graph, first)
    _set_latents(settings, graph, first)
    _set_model(settings, graph, first)
    for part, feature in LOSSES.items():
        if names := {node.class_type for node in graph.nodes.values() if part in node.class_type}:
            settings.note(f"{feature} is not reproduced ({', '.join(sorted(names))})")
    settings.note_noise()
    return settings


def _graph(texts: Mapping[str, str]) -> NodeGraph | None:
    """The graph that was executed, else the one that was drawn; None without a node in either."""
    for key in ("prompt", "parameters", "generation_data"):
        values = json_object(texts.get(key))
        if values is not None:
            sent = values.get("prompt")  # around it where it was saved as it is sent to the server
            graph = graph_of_prompt(sent if isinstance(sent, dict) else values)
            if graph.nodes:
                return graph
    for key in ("workflow", "parameters"):
        values = json_object(texts.get(key))
        if values is not None and (graph := graph_of_workflow(values)).nodes:
            return graph
    return None


def _sampler_nodes(graph: NodeGraph) -> list[Node]:
    """Nodes that take noise to an image."""
    nodes = []
    for node in graph.nodes.values():
        inputs = node.values.keys() | node.links.keys()
        custom = node.class_type in ("SamplerCustom", "SamplerCustomAdvanced")
        if custom or ({"steps", "cfg"} <= inputs and any(seed in inputs for seed in SEEDS)):
            nodes.append(node)
    return nodes


def _first_pass(graph: NodeGraph, samplers: list[Node]) -> Node:
    """The sampling node that no other one leads to; one that starts from an empty latent if there are several."""

    def rank(node: Node) -> tuple[int, bool]:
        before = list(graph.upstream(node, ("latent_image", "latent", "samples", "image")))
        later = sum(one is other for one in before for other in samplers)
        return later, not any("EmptyLatent" in one.class_type for one in before)

    return min(samplers, key=rank)


def _set_sampling(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """Steps, guidance, seed, sampler and levels: of the node itself, or of those that make up a custom one."""
    parts = [node]
    if node.class_type.startswith("SamplerCustom"):
        parts += graph.upstream(node, ("noise", "guider", "sampler", "sigmas"))

    def value(*names: str) -> Any:
        values = (graph.value(part, *names) for part in parts)
        return next((one for one in values if one is not None), None)

    settings.set_number("num_steps", value("steps"), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", value("cfg"), -1e6, 1e6, called="cfg")
    settings.set_seed(value(*SEEDS))
    ramps = {"KarrasScheduler": "karras", "ExponentialScheduler": "exponential"}
    ramp = next((ramps[part.class_type] for part in parts if part.class_type in ramps), None)
    settings.set_sampler(
        value("sampler_name"),
        ramp or value("scheduler"),
        discards=COMFYUI_DISCARDS,
        variants=COMFYUI_VARIANTS,
    )
    first, last = as_number(value("start_at_step"), int), as_number(value("end_at_step"), int)
    if first or (last is not None and last < settings.values.get("num_steps", 0)):
        settings.note(f"only steps {first or 0} to {last} were done; all are done here")


def _set_prompts(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The texts that the conditionings come from."""
    guiders = [one for one in graph.upstream(node, ("guider",)) if "Guider" in one.class_type]
    source = guiders[0] if guiders else node
    positive = ("conditioning",) if "conditioning" in source.links else ("positive",)
    settings.set_texts(
        _text(settings, graph, source, positive), _text(settings, graph, source, ("negative",))
    )


def _text(settings: ForeignSettings, graph: NodeGraph, node: Node, inputs: tuple[str, ...]) -> str:
    if isinstance(node.values.get(inputs[0]), str):  # nodes that hold their prompts themselves
        return node.values[inputs[0]]
    for source in graph.upstream(node, inputs):
        if "ConditioningZeroOut" in source.class_type:
            return ""
        names = (*inputs, *TEXT_INPUTS)  # a loader may hold both prompts
        keys = [key for key in names if isinstance(source.values.get(key), str) or key in source.links]
        if "TextEncode" in source.class_type or (keys and "clip" not in source.class_type.lower()):
            text = next((text for key in keys if (text := graph.text(source, key)) is not None), None)
            if text is not None:
                return text
            if keys:
                makers = ", ".join(one.class_type for one in graph.upstream(source, tuple(keys)))
                settings.note(f"the {inputs[0]} prompt comes from nodes that are not read ({makers})")
                return ""
    return ""


def _set_latents(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The size of an empty latent, or the note that there was an image."""
    inputs = ("latent_image", "latent", "samples")
    sources = list(graph.upstream(node, inputs))
    for source in sources:
        width = graph.value(source, "width", "empty_latent_width")
        height = graph.value(source, "height", "empty_latent_height")
        if width is not None and height is not None and "Upscale" not in source.class_type:
            settings.set_size(width, height)
            break
    denoise = as_number(graph.value(node, "denoise"), float)
    if any("VAEEncode" in source.class_type or "LoadImage" in source.class_type for source in sources):
        settings.set_number("strength", denoise, 0, 1)
        settings.note("made from another image, which the file does not hold")
    elif denoise is not None and denoise < 1:
        settings.note(f"denoise: {denoise:g} of an empty latent is not reproduced")


def _set_model(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The checkpoint, LoRAs and clip skip on the way to the sampling node."""
    sources = list(graph.upstream(node, ("model", "guider", "positive")))
    loras: dict[str, Any] = {}
    for source in sources:
        name = graph.value(source, "lora_name")
        if isinstance(name, str) and name != "None":
            stem = model_name(name)
            weight = graph.value(source, "strength_model", "lora_model_strength")
            clip = graph.value(source, "strength_clip", "lora_clip_strength")
            loras[stem] = weight if clip is None else (clip, weight)
        elif entries := [
            value for value in source.values.values() if isinstance(value, dict) and "lora" in value
        ]:
            loras |= {
                model_name(str(one["lora"])): one.get("strength", 1.0)
                for one in entries
                if one.get("on", True)
            }
        elif name is None and "lora" in source.class_type.lower():
            settings.note(f"the LoRAs of the node {source.class_type} are not reproduced")
        layer = as_number(graph.value(source, "stop_at_clip_layer", "clip_skip"), int)
        if layer is not None and layer < -1:
            settings.set_number("clip_skip", -layer, 1, 100, int)
    settings.set_loras(loras)
    models = (graph.value(source, name) for source in sources for name in MODELS if name in source.values)
    settings.note_model(next((model for model in models if isinstance(model, str)), None))
    vae = next((source for source in sources if "vae_name" in source.values), None)
    if vae is not None:
        settings.note(f"the VAE {vae.values['vae_name']} is not loaded; the model's own is used")
