"""Nodes of ComfyUI and of its extensions, with the inputs that their own code declares."""

import json

import pytest

from triptych.pipelines.diffusion.foreign_metadata import read_foreign_settings

pytestmark = pytest.mark.proves(
    "Prompts and generation metadata", "nodes of ComfyUI and its extensions", by="names"
)

COMMON = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "dog", "clip": ["4", 1]}},
}
AYS = "multistep-align-your-steps"
LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}


def sampling(**inputs):
    values = {
        "seed": 5,
        "steps": 20,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    return {"class_type": "KSampler", "inputs": values | LINKS | inputs}


def custom(sampler, sigmas):
    inputs = {"add_noise": True, "noise_seed": 4, "cfg": 6, "sampler": ["11", 0], "sigmas": ["12", 0]}
    nodes = {"3": {"class_type": "SamplerCustom", "inputs": inputs | LINKS}}
    for name, (class_type, values) in {"11": sampler, "12": sigmas}.items():
        nodes[name] = {"class_type": class_type, "inputs": values}
    return nodes


def read(nodes, key="prompt"):
    settings = read_foreign_settings({key: json.dumps(nodes)})
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("sampler", "expected", "note"),
    [
        (
            ("SamplerDPMPP_2M_SDE", {"solver_type": "heun", "eta": 1.0, "s_noise": 1.0}),
            "dpm++2m-sde-heun",
            None,
        ),
        (
            ("SamplerDPMPP_2M_SDE", {"solver_type": "midpoint", "eta": 0.4, "s_noise": 1.0}),
            "dpm++2m-sde",
            "eta: 0.4",
        ),
        (("SamplerDPMPP_SDE", {"eta": 1.0, "s_noise": 1.0, "r": 0.3}), "dpm++sde", "r: 0.3"),
        (("SamplerEulerAncestral", {"eta": 1.0, "s_noise": 1.1}), "euler-ancestral", "s_noise: 1.1"),
        (("SamplerLMS", {"order": 4}), "lms", None),
        (("SamplerLMS", {"order": 2}), "lms", "order: 2"),
        (("SamplerDPMAdaptative", {"order": 3, "rtol": 0.05, "eta": 0.0}), "dpm-adaptive", None),
        (
            ("SamplerDPMAdaptative", {"order": 2, "rtol": 0.05, "eta": 1.0}),
            "dpm-adaptive-ancestral",
            "order: 2",
        ),
        (("SamplerSASolver", {}), None, "the sampler 'SASolver' is unknown"),
        (("KSamplerSelect", {"sampler_name": "heunpp2"}), "heun++2", None),
    ],
)
def test_nodes_that_are_a_sampler(sampler, expected, note):
    settings = read(COMMON | custom(sampler, ("BasicScheduler", {"scheduler": "karras", "steps": 12})))
    assert settings.values.get("sampler") == expected
    lines = [line for line in settings.notes if "model x" not in line and "at each step" not in line]
    assert [line.startswith(note or "") for line in lines] == ([True] if note else [])


@pytest.mark.parametrize(
    ("sigmas", "schedule", "notes"),
    [
        (("AlignYourStepsScheduler", {"model_type": "SD1", "steps": 12}), "multistep-align-your-steps", []),
        (
            ("AlignYourStepsScheduler", {"model_type": "SDXL", "steps": 12}),
            "multistep-align-your-steps",
            ["model_type"],
        ),
        (("BetaSamplingScheduler", {"steps": 12, "alpha": 0.6, "beta": 0.6}), "beta-times", []),
        (
            ("BetaSamplingScheduler", {"steps": 12, "alpha": 0.5, "beta": 0.7}),
            "beta-times",
            ["alpha", "beta"],
        ),
        (
            ("KarrasScheduler", {"steps": 12, "sigma_max": 8, "sigma_min": 0.0291675, "rho": 7}),
            "karras",
            ["sigma_max"],
        ),
        (("PolyexponentialScheduler", {"steps": 12, "rho": 1.0}), "exponential", []),
        (("LaplaceScheduler", {"steps": 12, "mu": 0.0}), None, ["the noise levels 'LaplaceScheduler'"]),
        (("BasicScheduler", {"scheduler": "kl_optimal", "steps": 12}), "kl-optimal", []),
    ],
)
def test_nodes_that_are_noise_levels(sigmas, schedule, notes):
    settings = read(COMMON | custom(("KSamplerSelect", {"sampler_name": "lms"}), sigmas))
    assert (settings.values["num_steps"], settings.values.get("schedule")) == (12, schedule)
    lines = [line for line in settings.notes if "model x" not in line]
    assert [line.split(":")[0].split(" are")[0] for line in lines] == notes


@pytest.mark.parametrize(
    ("steps", "denoise", "total"), [(20, 0.5, 40), (20, 0.6, 33), (7, 0.35, 20), (30, 0.9, 33)]
)
def test_image_to_image_takes_the_last_of_more_steps(steps, denoise, total):
    image = {"8": {"class_type": "VAEEncode", "inputs": {"pixels": ["9", 0]}}}
    image["9"] = {"class_type": "LoadImage", "inputs": {"image": "a.png"}}
    settings = read(COMMON | image | {"3": sampling(steps=steps, denoise=denoise, latent_image=["8", 0])})
    assert settings.values["num_steps"] == total
    assert int(total * settings.values["strength"]) == steps
    assert (
        f"{steps} steps with denoise {denoise} are the last {steps} of {total} steps here" in settings.notes
    )


def test_dpm_fast_ends_elsewhere_on_some_levels():
    assert not any("ended" in line for line in read(COMMON | {"3": sampling(sampler_name="dpm_fast")}).notes)
    notes = read(COMMON | {"3": sampling(sampler_name="dpm_fast", scheduler="simple")}).notes
    assert "dpm-fast ended at the last noise level of simple; here it ends at the model's first" in notes


def test_names_of_files_with_a_preview():
    """The custom scripts of pythongosssss."""
    name = {"content": "sub\\x.safetensors", "image": None}
    lora = {
        "lora_name": {"content": "ink.safetensors", "image": None},
        "strength_model": 0.7,
        "strength_clip": 0.6,
    }
    nodes = COMMON | {
        "4": {"class_type": "CheckpointLoader|pysssss", "inputs": {"ckpt_name": name}},
        "10": {"class_type": "LoraLoader|pysssss", "inputs": lora | {"model": ["4", 0], "clip": ["4", 1]}},
        "3": sampling(model=["10", 0]),
    }
    settings = read(nodes)
    assert settings.values["loras"] == {"ink": (0.6, 0.7)}
    assert settings.model == "sub\\x.safetensors"


def test_a_pipe_holds_what_the_loader_has():
    """Easy-Use: `easy fullLoader`, `easy preSampling`, `easy kSampler`."""
    loader = {"ckpt_name": "d.safetensors", "clip_skip": -2, "lora_name": "None", "empty_latent_width": 512}
    loader |= {"empty_latent_height": 768, "positive": "a cat", "negative": "dog"}
    settings_node = {
        "steps": 20,
        "cfg": 8.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        "seed": 8,
    }
    settings = read(
        {
            "1": {"class_type": "easy fullLoader", "inputs": loader},
            "2": {"class_type": "easy preSampling", "inputs": settings_node | {"pipe": ["1", 0]}},
            "3": {"class_type": "easy kSampler", "inputs": {"pipe": ["2", 0]}},
        }
    )
    expected = {"prompt": "a cat", "negative_prompt": "dog", "width": 512, "height": 768, "clip_skip": 2}
    assert expected.items() <= settings.values.items()
    assert settings.model == "d.safetensors"


def test_no_prompt_is_said():
    nodes = COMMON | {"3": sampling(positive=["50", 0])}
    assert "no prompt was found in the graph; give it as an option" in read(nodes).notes


def drawn(links):
    node = [
        {"name": name, "link": number}
        for number, name in enumerate(("positive", "negative", "latent_image"), 2)
    ]
    return {
        "nodes": [
            {"id": 1, "type": "Efficient Loader", "widgets_values": EFFICIENT},
            {
                "id": 2,
                "type": "KSampler (Efficient)",
                "inputs": [{"name": "model", "link": 1}, *node],
                "widgets_values": [42, "fixed", 25, 6.5, "dpmpp_2m", "karras", 1, "auto", "true"],
            },
        ],
        "links": links,
    }


EFFICIENT = ["dream.safetensors", "Baked VAE", -2, "None", 1, 1, "a cat", "dog", "none", "A1111", 512, 768, 1]


@pytest.mark.parametrize(
    "links",
    [
        [[number, 1, slot, 2, slot, "X"] for slot, number in enumerate((1, 2, 3, 4))],
        [
            {
                "id": number,
                "origin_id": 1,
                "origin_slot": slot,
                "target_id": 2,
                "target_slot": slot,
                "type": "X",
            }
            for slot, number in enumerate((1, 2, 3, 4))
        ],
    ],
    ids=["lists", "objects"],
)
def test_a_drawn_graph_of_efficiency_nodes(links):
    settings = read(drawn(links), "workflow")
    expected = {
        "prompt": "a cat",
        "negative_prompt": "dog",
        "num_steps": 25,
        "seed": 42,
        "width": 512,
        "clip_skip": 2,
    }
    assert expected.items() <= settings.values.items()
    assert (settings.values["sampler"], settings.values["schedule"]) == ("dpm++2m", "karras")
