"""Steps, seed, sampler and noise levels of a sampling node of ComfyUI, or of the nodes that make up a custom one."""

import math
from typing import Any

from triptych.pipelines.diffusion.foreign_metadata.comfyui_graph import Node, NodeGraph
from triptych.pipelines.diffusion.foreign_metadata.comfyui_names import COMFYUI_DISCARDS, COMFYUI_VARIANTS
from triptych.pipelines.diffusion.foreign_metadata.settings import ForeignSettings, as_number

SEEDS = ("seed", "noise_seed")
# Nodes that compute noise levels -> the name of these, and the settings that our schedule of that name has.
SCHEDULE_NODES: dict[str, tuple[str, dict[str, float | str]]] = {
    "KarrasScheduler": ("karras", {"sigma_max": 14.6146, "sigma_min": 0.02917, "rho": 7.0}),
    "ExponentialScheduler": ("exponential", {"sigma_max": 14.6146, "sigma_min": 0.02917}),
    "PolyexponentialScheduler": ("exponential", {"sigma_max": 14.6146, "sigma_min": 0.02917, "rho": 1.0}),
    "BetaSamplingScheduler": ("beta", {"alpha": 0.6, "beta": 0.6}),
    "AlignYourStepsScheduler": ("align-your-steps", {"model_type": "SD1", "denoise": 1.0}),
}
# Settings of the nodes that are one sampler each, such as SamplerDPMPP_2M_SDE, as ours have them.
SAMPLER_SETTINGS: dict[str, float | str] = {
    **{"s_noise": 1.0, "r": 0.5, "rtol": 0.05, "atol": 0.0078, "h_init": 0.05},
    **{"pcoeff": 0.0, "icoeff": 1.0, "dcoeff": 0.0, "accept_safety": 0.81},
}
# Samplers that end at the last noise level before the clean image, and levels whose last one is the schedule's first.
_ENDS_EARLY = ("dpm-fast", "dpm-adaptive")
_LAST_IS_FIRST = (None, "uniform", "karras", "exponential", "beta-times", "kl-optimal")


def set_sampling(settings: ForeignSettings, graph: NodeGraph, node: Node) -> None:
    """Set what `node` samples with.

    Args:
        settings: is changed.
        graph: the node's graph.
        node: a sampling node.
    """
    parts = [node]
    if node.class_type.startswith("SamplerCustom"):
        parts += graph.upstream(node, ("noise", "guider", "sampler", "sigmas"))

    def value(*names: str) -> Any:
        values = (graph.value(part, *names) for part in parts)
        return next((one for one in values if one is not None), None)

    settings.set_number("num_steps", value("steps"), 1, 10**6, int, called="steps")
    settings.set_number("guidance_scale", value("cfg"), -1e6, 1e6, called="cfg")
    settings.set_seed(value(*SEEDS))
    sampler, schedule = value("sampler_name"), value("scheduler")
    for part in parts[1:]:
        if part.class_type in SCHEDULE_NODES:
            schedule, own = SCHEDULE_NODES[part.class_type]
            _note_differences(settings, graph, part, own)
        elif part.class_type.endswith("Scheduler") and part.class_type != "BasicScheduler":
            schedule = part.class_type
        elif sampler is None and part.class_type.startswith("Sampler"):
            sampler = _named_by_its_node(settings, graph, part)
    settings.set_sampler(sampler, schedule, discards=COMFYUI_DISCARDS, variants=COMFYUI_VARIANTS)
    name, levels = settings.values.get("sampler"), settings.values.get("schedule")
    if sampler is None:
        settings.note("the graph names no sampler; dpm++2m is used")
    elif name in _ENDS_EARLY and levels not in _LAST_IS_FIRST:
        settings.note(f"{name} ended at the last noise level of {levels}; here it ends at the model's first")
    first, last = as_number(value("start_at_step"), int), as_number(value("end_at_step"), int)
    if first or (last is not None and last < settings.values.get("num_steps", 0)):
        settings.note(f"only steps {first or 0} to {last} were done; all are done here")


def set_strength(settings: ForeignSettings, denoise: float | None) -> None:
    """Set the strength of image to image. ComfyUI computes the levels of steps / denoise steps and takes the last ones,
    as many as `steps` says."""
    steps = settings.values.get("num_steps")
    if denoise is None or steps is None or not 0 < denoise < 1:
        settings.set_number("strength", denoise, 0, 1)
        return
    total = int(steps / denoise)
    settings.values["num_steps"], settings.values["strength"] = total, math.ceil(1e6 * steps / total) / 1e6
    settings.note(f"{steps} steps with denoise {denoise:g} are the last {steps} of {total} steps here")


def _named_by_its_node(settings: ForeignSettings, graph: NodeGraph, node: Node) -> str:
    """Return the name of the sampler that a node like SamplerEulerAncestral is."""
    name = node.class_type.removeprefix("Sampler").replace("Adaptative", "_adaptive")
    eta = as_number(graph.value(node, "eta"), float)
    if eta is not None and name == "DPM_adaptive":
        name, eta = ("DPM_adaptive_ancestral", None) if eta == 1 else (name, eta or None)
    if eta not in (None, 1):
        settings.leave_out("eta", eta)
    _note_differences(settings, graph, node, SAMPLER_SETTINGS | {"order": 4 if name == "LMS" else 3})
    return f"{name}_heun" if graph.value(node, "solver_type") == "heun" else name


def _note_differences(
    settings: ForeignSettings, graph: NodeGraph, node: Node, own: dict[str, float | str]
) -> None:
    """Note the node's settings that are not ours."""
    for name, ours in own.items():
        theirs = graph.value(node, name)
        number = as_number(theirs, float)
        near = number is not None and isinstance(ours, float | int) and abs(number - ours) <= 0.01 * abs(ours)
        if theirs is not None and theirs != ours and not near:
            settings.leave_out(name, theirs)
