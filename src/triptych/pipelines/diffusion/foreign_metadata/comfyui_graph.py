"""ComfyUI's graphs: nodes by their ids, each with its class and inputs, from either of the two notations.

`prompt`, what is executed: {"3": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], ...}}, ...}
`workflow`, what is drawn: {"nodes": [{"id": 3, "type": "KSampler", "widgets_values": [1, "fixed", 20, ...], "inputs":
[{"name": "model", "link": 7}], ...}], "links": [[7, 4, 0, 3, 0, "MODEL"], ...]}
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Names of the widgets of the nodes that are read, in their order; None is no input.
WIDGETS: dict[str, tuple[str | None, ...]] = {
    "KSampler": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": (
        *("add_noise", "noise_seed", None, "steps", "cfg", "sampler_name", "scheduler"),
        *("start_at_step", "end_at_step", "return_with_leftover_noise"),
    ),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "KarrasScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "ExponentialScheduler": ("steps", "sigma_max", "sigma_min"),
    "RandomNoise": ("noise_seed", None),
    "SamplerCustom": ("add_noise", "noise_seed", None, "cfg"),
    "CFGGuider": ("cfg",),
    "CLIPTextEncode": ("text",),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "CheckpointLoader": ("config_name", "ckpt_name"),
    "UNETLoader": ("unet_name", "weight_dtype"),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "EmptyLatentImage": ("width", "height", "batch_size"),
    "VAELoader": ("vae_name",),
    "ControlNetLoader": ("control_net_name",),
    "LatentUpscale": ("upscale_method", "width", "height", "crop"),
    "LatentUpscaleBy": ("upscale_method", "scale_by"),
    "KSampler (Efficient)": ("seed", None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "Efficient Loader": (
        *("ckpt_name", "vae_name", "clip_skip", "lora_name", "lora_model_strength", "lora_clip_strength"),
        *("positive", "negative", None, None, "empty_latent_width", "empty_latent_height", None),
    ),
    "BetaSamplingScheduler": ("steps", "alpha", "beta"),
    "PolyexponentialScheduler": ("steps", "sigma_max", "sigma_min", "rho"),
    "AlignYourStepsScheduler": ("model_type", "steps", "denoise"),
    "SamplerEulerAncestral": ("eta", "s_noise"),
    "SamplerDPMPP_2S_Ancestral": ("eta", "s_noise"),
    "SamplerDPMPP_2M_SDE": ("solver_type", "eta", "s_noise", None),
    "SamplerDPMPP_3M_SDE": ("eta", "s_noise", None),
    "SamplerDPMPP_SDE": ("eta", "s_noise", "r", None),
    "SamplerLMS": ("order",),
    "PrimitiveNode": ("value", None),
    "PrimitiveString": ("value",),
    "PrimitiveStringMultiline": ("value",),
    "PrimitiveInt": ("value", None),
    "PrimitiveFloat": ("value",),
    "String Literal": ("string",),
}
MUTED, BYPASSED = 2, 4
MOST_TEXTS = 100  # outputs of nodes that are read for the prompts
SEPARATORS = ("delimiter", "separator", "delim")
# Inputs that are texts: `text`, `string_a`, `text2`, `Value`.
_TEXT_INPUT = re.compile(r"(text|string|str|prompt|value|input)[_ ]?[a-z0-9]?", re.IGNORECASE)
DEEPEST = 200  # nodes on one path


@dataclass
class Node:
    """A node: its class, values of its inputs, and where its linked inputs come from."""

    class_type: str
    values: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Input -> id of the node that it comes from."""


class NodeGraph:
    """Nodes by id, in the file's order."""

    def __init__(self, nodes: Mapping[str, Node]):
        self.nodes = nodes
        self._texts: dict[tuple[str, str], str | None] = {}

    def upstream(self, node: Node, inputs: tuple[str, ...]) -> Iterator[Node]:
        """Yield the nodes that lead to any of these inputs, nearest first, each once."""
        queue = [node.links[name] for name in inputs if name in node.links]
        seen: set[str] = set()
        while queue and len(seen) < DEEPEST:
            name = queue.pop(0)
            if name in seen or name not in self.nodes:
                continue
            seen.add(name)
            source = self.nodes[name]
            yield source
            queue += source.links.values()

    def value(self, node: Node, *names: str) -> Any:
        """Return the first of these inputs that has a value, its own or that of the node it is linked to."""
        for name in names:
            if name in node.values:
                return node.values[name]
            if name in node.links:
                for source in self.upstream(node, (name,)):
                    wanted = (
                        name,
                        "value",
                        "string",
                        "text",
                        "STRING",
                        "seed",
                        "int",
                        "float",
                        "number",
                        "Value",
                    )
                    for key in wanted:
                        if isinstance(source.values.get(key), int | float | str):
                            return source.values[key]
        return None

    def text(self, node: Node, name: str) -> str | None:
        """Return the text of an input: its own, or what the linked nodes make of theirs; None if a node is unknown.

        Nodes that pass one text on and nodes that join several are known.
        """
        own = node.values.get(name)
        if isinstance(own, str):
            return own
        origin = node.links.get(name, "")
        if (origin, name) not in self._texts:
            self._texts[origin, name] = None  # while it is computed: of a loop there is no text
            if origin in self.nodes and len(self._texts) < MOST_TEXTS:
                self._texts[origin, name] = self._made_text(self.nodes[origin], name)
        return self._texts[origin, name]

    def _made_text(self, source: Node, name: str) -> str | None:
        texts = {
            key: self.text(source, key)
            for key in sorted(source.values.keys() | source.links.keys())
            if _TEXT_INPUT.fullmatch(key) or key == name
        }
        if re.search(r"concat|join|combine", source.class_type, re.IGNORECASE):
            separator = next((source.values[key] for key in SEPARATORS if key in source.values), "")
            joined = [text for text in texts.values() if text]
            complete = bool(joined) and None not in texts.values() and isinstance(separator, str)
            return separator.join(joined) if complete else None
        return next(iter(texts.values())) if len(texts) == 1 else None


def graph_of_prompt(nodes: Mapping[str, Any]) -> NodeGraph:
    """Return the graph of an API prompt; what is no node is left out."""
    graph: dict[str, Node] = {}
    for name, node in nodes.items():
        if not isinstance(node, dict) or not isinstance(node.get("class_type"), str):
            continue
        inputs = node.get("inputs")
        built = graph[str(name)] = Node(node["class_type"])
        for key, value in inputs.items() if isinstance(inputs, dict) else ():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
                built.links[key] = str(value[0])
            else:  # some nodes show a preview next to a file's name
                content = value.get("content") if isinstance(value, dict) else None
                built.values[key] = content if isinstance(content, str) else value
    return NodeGraph(graph)


def graph_of_workflow(workflow: Mapping[str, Any]) -> NodeGraph:
    """Return the graph of a drawn workflow: widgets are known for `WIDGETS`, muted nodes are left out, bypassed ones
    have no values."""
    sources: dict[Any, str] = {}  # link -> id of the node it starts from
    links = workflow.get("links")
    for link in links if isinstance(links, list) else ():
        if isinstance(link, dict):  # of the newer schema
            link = [link.get("id"), link.get("origin_id"), *[None] * 3]
        if isinstance(link, list) and len(link) >= 5 and isinstance(link[0], str | int):
            sources[link[0]] = str(link[1])
    graph: dict[str, Node] = {}
    nodes = workflow.get("nodes")
    for node in nodes if isinstance(nodes, list) else ():
        if not isinstance(node, dict) or not isinstance(node.get("type"), str) or node.get("mode") == MUTED:
            continue
        built = graph[str(node.get("id"))] = Node(node["type"])
        inputs = node.get("inputs")
        for entry in inputs if isinstance(inputs, list) else ():
            link = entry.get("link") if isinstance(entry, dict) else None
            if isinstance(link, str | int) and link in sources and isinstance(entry.get("name"), str):
                built.links[entry["name"]] = sources[link]
        if node.get("mode") == BYPASSED:
            built.class_type = "bypassed"
            continue
        built.values = _widget_values(node["type"], node.get("widgets_values"), built.links)
    return NodeGraph(graph)


def _widget_values(class_type: str, values: Any, links: Mapping[str, str]) -> dict[str, Any]:
    if isinstance(values, dict):
        return {name: value for name, value in values.items() if name not in links}
    if not isinstance(values, list):
        return {}
    names = WIDGETS.get(class_type)
    if names is None:  # of an unknown node only a single text box is clear
        texts = [value for value in values if isinstance(value, str)]
        return {"text": texts[0]} if len(texts) == 1 else {}
    return {name: value for name, value in zip(names, values, strict=False) if name and name not in links}
