"""ComfyUI: the first pass of its graph, from the node that samples back to prompts, model, LoRAs and size."""

from collections.abc import Mapping
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_graph import (
    Node,
    NodeGraph,
    graph_of_prompt,
    graph_of_workflow,
)
from triptych.pipelines.diffusion.foreign_metadata.comfyui_sampling import SEEDS, set_sampling, set_strength
from triptych.pipelines.diffusion.foreign_metadata.settings import (
    ForeignSettings,
    as_number,
    json_object,
    model_name,
)

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
    set_sampling(settings, graph, first)
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


def _set_prompts(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The texts that the conditionings come from."""
    guiders = [one for one in graph.upstream(node, ("guider",)) if "Guider" in one.class_type]
    source = guiders[0] if guiders else node
    positive = ("conditioning",) if "conditioning" in source.links else ("positive",)
    text = _text(settings, graph, source, positive)
    settings.set_texts(text or "", _text(settings, graph, source, ("negative",)) or "")
    if text is None:
        settings.note("no prompt was found in the graph; give it as an option")


def _text(settings: ForeignSettings, graph: NodeGraph, node: Node, inputs: tuple[str, ...]) -> str | None:
    """The text of a conditioning; None if none was found."""
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
    if not node.links.keys() & set(inputs):  # a pipe of all that a loader has
        held = (source.values.get(inputs[0]) for source in graph.upstream(node, tuple(node.links)))
        return next((text for text in held if isinstance(text, str)), None)
    return None


def _linked(node: Node, inputs: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the inputs that are linked; all links of a node that gets them through a pipe."""
    return tuple(name for name in inputs if name in node.links) or tuple(node.links)


def _set_latents(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The size of an empty latent, or the note that there was an image."""
    sources = list(graph.upstream(node, _linked(node, ("latent_image", "latent", "samples"))))
    for source in sources:
        width = graph.value(source, "width", "empty_latent_width")
        height = graph.value(source, "height", "empty_latent_height")
        if width is not None and height is not None and "Upscale" not in source.class_type:
            settings.set_size(width, height)
            break
    denoise = as_number(graph.value(node, "denoise"), float)
    if any("VAEEncode" in source.class_type or "LoadImage" in source.class_type for source in sources):
        set_strength(settings, denoise)
        settings.note("made from another image, which the file does not hold")
    elif denoise is not None and denoise < 1:
        settings.note(f"denoise: {denoise:g} of an empty latent is not reproduced")


def _set_model(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """The checkpoint, LoRAs and clip skip on the way to the sampling node."""
    sources = list(graph.upstream(node, _linked(node, ("model", "guider", "positive"))))
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
