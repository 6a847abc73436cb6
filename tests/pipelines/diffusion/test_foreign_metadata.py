"""Other programs' metadata, in the form that each program's own writer gives them."""

import contextlib
import io
import json
import logging
import struct
import time
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.diffusion.config import SAMPLERS
from triptych.errors import TriptychError
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.foreign_metadata import DIALECTS, read_foreign_settings
from triptych.pipelines.diffusion.foreign_metadata.texts import decoded_comment, image_texts
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.sampler_names import find_sampler, split_sampler

pytestmark = pytest.mark.proves(
    "Prompts and generation metadata",
    "metadata of ComfyUI, SwarmUI, Fooocus, RuinedFooocus, InvokeAI, NovelAI and Civitai",
    by="names",
)

# SwarmUI: T2IParamInput.GenFullMetadataObject.
SWARM = {
    "sui_image_params": {
        "prompt": "a red apple",
        "model": "sd15/v1-5-pruned-emaonly",
        "seed": 2**32 + 7,
        "steps": 22,
        "cfgscale": 6.5,
        "aspectratio": "1:1",
        "width": 512,
        "height": 640,
        "sampler": "dpmpp_2m_sde_gpu",
        "scheduler": "karras",
        "negativeprompt": "blurry",
        "loras": ["detail"],
        "loraweights": ["0.6"],
        "refinermethod": "PostApply",
        "swarm_version": "0.9.4.0",
    },
    "sui_extra_data": {"date": "2025-01-01"},
    "sui_models": [{"name": "v1-5-pruned-emaonly.safetensors", "param": "model", "hash": "0xabc"}],
}
# Fooocus: FooocusMetadataParser.parse_string; keys are sorted.
FOOOCUS = {
    "adm_guidance": "(1.5, 0.8, 0.3)",
    "base_model": "juggernautXL_v8Rundiffusion",
    "base_model_hash": "aeb7e9e689",
    "full_negative_prompt": ["blurry"],
    "full_prompt": ["a red apple", "cinematic still a red apple"],
    "guidance_scale": 4,
    "loras": [["offset_0.1", 0.1, "4852686128"]],
    "lora_combined_1": "offset_0.1 : 0.1",
    "metadata_scheme": "fooocus",
    "negative_prompt": "blurry",
    "performance": "Speed",
    "prompt": "a red apple",
    "refiner_model": "None",
    "refiner_switch": 0.5,
    "resolution": "(896, 1152)",
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "seed": "4107331526841073001",
    "sharpness": 2.0,
    "steps": 30,
    "styles": "['Fooocus V2']",
    "vae": "Default (model)",
    "version": "Fooocus v2.5.5",
}
RUINED_FOOOCUS = {
    "Prompt": "a red apple",
    "Negative": "blurry",
    "steps": 30,
    "cfg": 8.5,
    "width": 1152,
    "height": 896,
    "seed": 3864674281,
    "sampler_name": "dpmpp_3m_sde_gpu",
    "scheduler": "simple",
    "base_model_name": "sd_xl_base_1.0.safetensors",
    "base_model_hash": "be9edd61",
    "loras": [["4852686128", "0.1 - style\\offset.safetensors"]],
    "start_step": 0,
    "denoise": None,
    "clip_skip": 1,
    "software": "RuinedFooocus",
}
NOVELAI = {
    "prompt": "1girl, {red} apple",
    "steps": 28,
    "height": 1216,
    "width": 832,
    "scale": 5.0,
    "uncond_scale": 0.0,
    "cfg_rescale": 0.2,
    "seed": 3071474384,
    "n_samples": 1,
    "hide_debug_overlay": False,
    "noise_schedule": "karras",
    "sampler": "k_euler_ancestral",
    "sm": True,
    "uc": "lowres, bad anatomy",
    "request_type": "PromptGenerateRequest",
    "signed_hash": "x==",
    "v4_prompt": {"caption": {"base_caption": "1girl", "char_captions": [{"char_caption": "girl"}]}},
}
INVOKE_3 = {
    "app_version": "4.2.0",
    "generation_mode": "txt2img",
    "positive_prompt": "landscape",
    "negative_prompt": "low quality",
    "width": 768,
    "height": 432,
    "seed": 356120443,
    "rand_device": "cpu",
    "cfg_scale": 7.5,
    "cfg_rescale_multiplier": 0,
    "steps": 50,
    "scheduler": "dpmpp_2m_sde_k",
    "seamless_x": True,
    "seamless_y": False,
    "clip_skip": 0,
    "model": {"key": "1f2", "hash": "blake3:0", "name": "amixx", "base": "sd-1", "type": "main"},
    "controlnets": [{"control_model": {"name": "canny"}}],
    "ipAdapters": [],
    "loras": [{"model": {"name": "detail"}, "weight": 0.75}],
    "vae": {"name": "sd-vae-ft-mse"},
}
INVOKE_2 = {
    "model": "stable diffusion",
    "model_weights": "stable-diffusion-1.5",
    "model_hash": "cc6c",
    "app_id": "invoke-ai/InvokeAI",
    "app_version": "2.3.5",
    "image": {
        "prompt": [{"prompt": "a red apple [blurry, text]", "weight": 1.0}],
        "steps": 20,
        "cfg_scale": 7.5,
        "threshold": 0.0,
        "perlin": 0.0,
        "height": 512,
        "width": 768,
        "seed": 5,
        "seamless": False,
        "hires_fix": True,
        "type": "txt2img",
        "postprocessing": None,
        "sampler": "k_lms",
        "variations": [],
    },
}
EASY = {
    "prompt": "a red apple",
    "negative_prompt": "blurry",
    "seed": 9,
    "width": 512,
    "height": 768,
    "num_inference_steps": 25,
    "guidance_scale": 7.5,
    "sampler_name": "euler_a",
    "use_stable_diffusion_model": "sd-v1-5",
    "use_lora_model": ["detail.safetensors"],
    "lora_alpha": [0.4],
    "use_face_correction": "GFPGANv1.4",
    "use_upscale": False,
}
COMFY = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 156680208700286,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["10", 0],
            "positive": ["12", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "SD15\\v1-5.ckpt"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": ["20", 0], "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["21", 0], "clip": ["11", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "text, watermark", "clip": ["11", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["30", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    "10": {
        "class_type": "LoraLoader",
        "inputs": {
            "lora_name": "styles\\ink.safetensors",
            "strength_model": 0.8,
            "strength_clip": 0.5,
            "model": ["4", 0],
            "clip": ["4", 1],
        },
    },
    "11": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -1, "clip": ["10", 1]}},
    "12": {
        "class_type": "ControlNetApply",
        "inputs": {"strength": 1.0, "conditioning": ["6", 0], "control_net": ["13", 0], "image": ["14", 0]},
    },
    "20": {"class_type": "PrimitiveInt", "inputs": {"value": 768}},
    "21": {"class_type": "String Literal", "inputs": {"string": "a glass bottle"}},
    "30": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 4,
            "steps": 14,
            "cfg": 8.0,
            "sampler_name": "dpmpp_2m",
            "scheduler": "simple",
            "denoise": 0.5,
            "model": ["10", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["31", 0],
        },
    },
    "31": {"class_type": "LatentUpscale", "inputs": {"width": 1024, "height": 1536, "samples": ["3", 0]}},
}
WORKFLOW = {
    "last_node_id": 9,
    "nodes": [
        {
            "id": 7,
            "type": "CLIPTextEncode",
            "inputs": [{"name": "clip", "type": "CLIP", "link": 5}],
            "widgets_values": ["text, watermark"],
        },
        {
            "id": 6,
            "type": "CLIPTextEncode",
            "inputs": [{"name": "clip", "type": "CLIP", "link": 3}],
            "widgets_values": ["a glass bottle"],
        },
        {"id": 5, "type": "EmptyLatentImage", "inputs": [], "widgets_values": [512, 768, 1]},
        {
            "id": 3,
            "type": "KSampler",
            "mode": 0,
            "inputs": [
                {"name": "model", "type": "MODEL", "link": 1},
                {"name": "positive", "type": "CONDITIONING", "link": 4},
                {"name": "negative", "type": "CONDITIONING", "link": 6},
                {"name": "latent_image", "type": "LATENT", "link": 2},
            ],
            "widgets_values": [42, "randomize", 20, 8, "dpm_2_ancestral", "karras", 1],
        },
        {"id": 4, "type": "CheckpointLoaderSimple", "inputs": [], "widgets_values": ["v1-5.ckpt"]},
    ],
    "links": [
        [1, 4, 0, 3, 0, "MODEL"],
        [2, 5, 0, 3, 3, "LATENT"],
        [3, 4, 1, 6, 0, "CLIP"],
        [4, 6, 0, 3, 1, "CONDITIONING"],
        [5, 4, 1, 7, 0, "CLIP"],
        [6, 7, 0, 3, 2, "CONDITIONING"],
    ],
    "version": 0.4,
}
CUSTOM = {  # a graph of separate nodes for noise, guider, sampler and levels
    "1": {"class_type": "RandomNoise", "inputs": {"noise_seed": 11}},
    "2": {
        "class_type": "CFGGuider",
        "inputs": {"cfg": 5.5, "model": ["3", 0], "positive": ["4", 0], "negative": ["5", 0]},
    },
    "3": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.ckpt"}},
    "4": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["3", 1]}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog", "clip": ["3", 1]}},
    "6": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}},
    "7": {
        "class_type": "BasicScheduler",
        "inputs": {"scheduler": "sgm_uniform", "steps": 12, "denoise": 1.0},
    },
    "8": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 384, "batch_size": 1}},
    "9": {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {
            "noise": ["1", 0],
            "guider": ["2", 0],
            "sampler": ["6", 0],
            "sigmas": ["7", 0],
            "latent_image": ["8", 0],
        },
    },
}
CIVITAI = {
    "resource-stack": {
        "class_type": "CheckpointLoaderSimple",
        "inputs": {"ckpt_name": "urn:air:sd1:checkpoint:1"},
    },
    "extra": {"airs": ["urn:air:sd1:checkpoint:civitai:4384@128713"]},
    "extraMetadata": json.dumps(
        {
            "prompt": "a red apple",
            "negativePrompt": "blurry",
            "steps": 25,
            "cfgScale": 7,
            "sampler": "DPM++ 2M Karras",
            "workflowId": "txt2img",
            "width": 512,
            "height": 768,
            "seed": 77,
            "clipSkip": 2,
            "resources": [{"modelVersionId": 128713, "strength": 1}],
        }
    ),
}
EFFICIENT = {  # one loader for the model, both prompts and the size
    "1": {
        "class_type": "Efficient Loader",
        "inputs": {
            "ckpt_name": "v1-5.ckpt",
            "clip_skip": -2,
            "lora_name": "None",
            "positive": "a cat",
            "negative": "a dog",
            "empty_latent_width": 640,
            "empty_latent_height": 448,
            "lora_stack": ["3", 0],
        },
    },
    "2": {
        "class_type": "KSampler (Efficient)",
        "inputs": {
            "seed": ["4", 0],
            "steps": 20,
            "cfg": 7.0,
            "sampler_name": "dpmpp_2m_sde",
            "scheduler": "karras",
            "denoise": 1.0,
            "model": ["1", 0],
            "positive": ["1", 1],
            "negative": ["1", 2],
            "latent_image": ["1", 3],
        },
    },
    "3": {
        "class_type": "Power Lora Loader (rgthree)",
        "inputs": {
            "lora_1": {"on": True, "lora": "a/ink.safetensors", "strength": 0.7},
            "lora_2": {"on": False, "lora": "b.safetensors", "strength": 1},
        },
    },
    "4": {"class_type": "Seed (rgthree)", "inputs": {"seed": 99}},
}
MRE = {
    "prompt": "a red apple",
    "negative_prompt": "blurry",
    "real_prompt": ["a red apple, sharp"],
    "steps": 30,
    "switch": 20,
    "cfg": 7.0,
    "seed": 3,
    "width": 1024,
    "height": 768,
    "base_model": "sd_xl_base_1.0.safetensors",
    "refiner_model": "None",
    "l1": "offset.safetensors",
    "w1": 0.5,
    "l2": "None",
    "w2": 0.5,
    "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras",
    "software": "Fooocus 1.0.67 MRE",
}
DRAW_THINGS = {
    "c": "a red apple",
    "uc": "blurry",
    "steps": 20,
    "scale": 7.5,
    "seed": 4,
    "size": "512x768",
    "sampler": "DPM++ 2M Karras",
    "model": "sd_v1.5_f16.ckpt",
    "strength": 1,
    "lora": [{"model": "ink_lora_f16.ckpt", "weight": 0.6}],
    "v2": {"width": 512},
}
EXPECTED = {
    "swarmui": (
        {"parameters": json.dumps(SWARM, indent=2)},
        "SwarmUI 0.9.4.0",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 22, "guidance_scale": 6.5},
            **{"width": 512, "height": 640, "seed": 7, "sampler": "dpm++2m-sde", "schedule": "karras"},
            "loras": {"detail": 0.6},
        },
        [
            "low ones are used (7), which give the same noise",
            "model sd15/v1-5-pruned-emaonly",
            "refinermethod",
        ],
    ),
    "fooocus": (
        {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"},
        "Fooocus v2.5.5",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 30, "guidance_scale": 4.0},
            **{"width": 896, "height": 1152, "seed": 4107331526841073001 % 2**32},
            **{"sampler": "dpm++2m-sde", "schedule": "karras", "loras": {"offset_0.1": 0.1}},
        },
        ["styles", "sharpness", "adm guidance", "juggernautXL_v8Rundiffusion (aeb7e9e689)"],
    ),
    "ruined fooocus": (
        {"parameters": json.dumps(json.dumps(RUINED_FOOOCUS))},  # some versions encode it twice
        "RuinedFooocus",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 30, "guidance_scale": 8.5},
            **{
                "width": 1152,
                "height": 896,
                "seed": 3864674281,
                "sampler": "dpm++3m-sde",
                "schedule": "simple",
            },
            "loras": {"offset": 0.1},
        },
        ["sd_xl_base_1.0.safetensors (be9edd61)"],
    ),
    "novelai": (
        {
            "Title": "NovelAI generated image",
            "Description": NOVELAI["prompt"],
            "Software": "NovelAI",
            "Source": "NovelAI Diffusion V4.5 4BB8B1D7",
            "Comment": json.dumps(NOVELAI),
        },
        "NovelAI",
        {
            **{"prompt": "1girl, {red} apple", "negative_prompt": "lowres, bad anatomy", "num_steps": 28},
            **{
                "guidance_scale": 5.0,
                "guidance_rescale": 0.2,
                "width": 832,
                "height": 1216,
                "seed": 3071474384,
            },
            **{"sampler": "euler-ancestral", "schedule": "karras"},
        },
        ["GPUs", "braces", "1 characters", "sm: true", "NovelAI Diffusion V4.5"],
    ),
    "invokeai 4": (
        {"invokeai_metadata": json.dumps(INVOKE_3)},
        "InvokeAI 4.2.0",
        {
            **{
                "prompt": "landscape",
                "negative_prompt": "low quality",
                "num_steps": 50,
                "guidance_scale": 7.5,
            },
            **{
                "width": 768,
                "height": 432,
                "seed": 356120443,
                "sampler": "dpm++2m-sde",
                "schedule": "karras",
            },
            **{"tiling": "x", "loras": {"detail": 0.75}, "guidance_rescale": 0.0},
        },
        ["controlnets", "model amixx"],
    ),
    "invokeai 2": (
        {"sd-metadata": json.dumps(INVOKE_2)},
        "InvokeAI 2.3.5",
        {
            **{
                "prompt": "a red apple",
                "negative_prompt": "blurry, text",
                "num_steps": 20,
                "guidance_scale": 7.5,
            },
            **{"width": 768, "height": 512, "seed": 5, "sampler": "lms", "schedule": "karras"},
        },
        ["hires_fix: true", "stable-diffusion-1.5 (cc6c)"],
    ),
    "dream": (
        {
            "Dream": '"a \\"red\\" apple [blurry]" -s 50 -S 3357757885 -W 512 -H 768 -C 7.5 -A k_euler_a -f 0.7'
        },
        "InvokeAI",
        {
            **{
                "prompt": 'a \\"red\\" apple',
                "negative_prompt": "blurry",
                "num_steps": 50,
                "guidance_scale": 7.5,
            },
            **{"width": 512, "height": 768, "seed": 3357757885, "sampler": "euler-ancestral"},
        },
        ["-f: 0.7", "on the GPU"],
    ),
    "easy diffusion": (
        {"parameters": json.dumps(EASY)},
        "Easy Diffusion",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 25, "guidance_scale": 7.5},
            **{
                "width": 512,
                "height": 768,
                "seed": 9,
                "sampler": "euler-ancestral",
                "loras": {"detail": 0.4},
            },
        },
        ["face restoration", "model sd-v1-5"],
    ),
    "comfyui": (
        {"prompt": json.dumps(COMFY), "workflow": json.dumps(WORKFLOW)},
        "ComfyUI",
        {
            **{"prompt": "a glass bottle", "negative_prompt": "text, watermark", "num_steps": 20},
            **{
                "guidance_scale": 8.0,
                "seed": 156680208700286 % 2**32,
                "sampler": "euler",
                "schedule": "uniform",
            },
            **{"width": 512, "height": 768, "loras": {"ink": (0.5, 0.8)}},
        },
        [
            "first of 2 sampling passes",
            "ControlNet is not reproduced",
            "SD15\\v1-5.ckpt",
            "more than 32 bits",
        ],
    ),
    "comfyui workflow": (
        {"workflow": json.dumps(WORKFLOW)},
        "ComfyUI",
        {
            **{"prompt": "a glass bottle", "negative_prompt": "text, watermark", "num_steps": 20, "seed": 42},
            **{"guidance_scale": 8.0, "sampler": "dpm2-ancestral", "schedule": "multistep-karras"},
            **{"width": 512, "height": 768},
        },
        ["v1-5.ckpt", "adds noise at each step"],
    ),
    "comfyui custom": (
        {"prompt": json.dumps(CUSTOM)},
        "ComfyUI",
        {
            **{
                "prompt": "a cat",
                "negative_prompt": "a dog",
                "num_steps": 12,
                "seed": 11,
                "guidance_scale": 5.5,
            },
            **{"sampler": "dpm++2m", "schedule": "sgm-uniform", "width": 256, "height": 384},
        },
        ["v1-5.ckpt"],
    ),
    "comfyui efficient": (
        {"prompt": json.dumps(EFFICIENT)},
        "ComfyUI",
        {
            **{
                "prompt": "a cat",
                "negative_prompt": "a dog",
                "num_steps": 20,
                "seed": 99,
                "guidance_scale": 7.0,
            },
            **{"sampler": "dpm++2m-sde", "schedule": "karras", "width": 640, "height": 448, "clip_skip": 2},
            "loras": {"ink": 0.7},
        },
        ["v1-5.ckpt"],
    ),
    "fooocus mre": (
        {"parameters": json.dumps(MRE)},
        "Fooocus 1.0.67 MRE",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 30, "guidance_scale": 7.0},
            **{"width": 1024, "height": 768, "seed": 3, "sampler": "dpm++2m-sde", "schedule": "karras"},
            "loras": {"offset": 0.5},
        },
        ["sd_xl_base", "switch: 20"],
    ),
    "draw things": (
        {"UserComment": json.dumps(DRAW_THINGS), "parameters": json.dumps(DRAW_THINGS)},
        "Draw Things",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 20, "guidance_scale": 7.5},
            **{"width": 512, "height": 768, "seed": 4, "sampler": "dpm++2m", "schedule": "karras"},
            "loras": {"ink_lora_f16": 0.6},
        },
        ["Apple device", "sd_v1.5_f16.ckpt"],
    ),
    "civitai": (
        {"UserComment": json.dumps(CIVITAI), "parameters": json.dumps(CIVITAI)},
        "Civitai",
        {
            **{"prompt": "a red apple", "negative_prompt": "blurry", "num_steps": 25, "guidance_scale": 7.0},
            **{"width": 512, "height": 768, "seed": 77, "sampler": "dpm++2m", "schedule": "karras"},
            "clip_skip": 2,
        },
        ["version 128713"],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_each_dialect_is_read(name):
    texts, source, values, notes = EXPECTED[name]
    settings = read_foreign_settings(texts)
    assert settings is not None
    assert settings.source == source
    assert {key: value for key, value in settings.values.items() if value != ""} == values
    settings.record()  # all values are valid
    for part in notes:
        assert any(part in note for note in settings.notes), (part, settings.notes)
    assert not any("\n" in note for note in settings.notes)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_dialect_is_recognized_by_its_own_reader_only(name):
    texts, source, _, _ = EXPECTED[name]
    matches = [dialect.name for dialect in DIALECTS if dialect.recognizes(texts)]
    assert matches[0].split()[0] in source or "fooocus" in name
    assert set(matches) - {"ComfyUI", "Civitai"} <= {matches[0]}


@pytest.mark.parametrize("key", ["Comment", "Description", "Parameters", "prompt", "UserComment"])
def test_the_web_uis_text_under_another_name(key):
    settings = read_foreign_settings({key: f"a cat\nNegative prompt: b\n{PARAMETERS}"})
    assert settings is not None
    assert settings.values["prompt"] == "a cat"
    assert settings.values["num_steps"] == 20


COMMON = {"num_steps": 25, "guidance_scale": 6.5, "seed": 123, "prompt": "a cat", "negative_prompt": "blurry"}


@pytest.mark.parametrize(
    "texts",
    [
        {
            "generation_data": json.dumps(  # TensorArt
                {
                    **{
                        "prompt": "a cat",
                        "negativePrompt": "blurry",
                        "width": 640,
                        "height": 512,
                        "seed": "123",
                    },
                    **{"samplerName": "Euler a", "steps": 25, "cfgScale": 6.5, "clipSkip": 1, "models": []},
                }
            )
        },
        {
            "parameters": json.dumps(  # AI Horde
                {
                    **{
                        "prompt": "a cat ### blurry",
                        "sampler_name": "k_euler_a",
                        "steps": 25,
                        "cfg_scale": 6.5,
                    },
                    **{"seed": "123", "width": 640, "height": 512},
                }
            )
        },
        {
            "parameters": json.dumps(
                {
                    **{
                        "prompt": "a cat",
                        "negative_prompt": "blurry",
                        "num_inference_steps": 25,
                        "seed": 123,
                    },
                    **{
                        "guidance_scale": 6.5,
                        "resolution": "640x512",
                        "scheduler": "EulerAncestralDiscreteScheduler",
                    },
                }
            )
        },
        {
            "parameters": "Include in Image: a cat; Exclude from Image: blurry; Steps: 25; Seed: 123; "
            "Guidance Scale: 6.5; Size: 640x512; Scheduler: Euler Ancestral"
        },
    ],
    ids=["TensorArt", "AI Horde", "diffusers", "Mochi Diffusion"],
)
def test_common_names_of_unknown_programs(texts):
    settings = read_foreign_settings(texts)
    assert settings is not None
    size = {"width": 640, "height": 512, "sampler": "euler-ancestral"}
    assert settings.values == COMMON | size
    assert any("no known program wrote them" in note for note in settings.notes)


@pytest.mark.parametrize(
    "value",
    [{"prompt": 5, "positive": "x", "steps": 1, "seed": 2}, {"prompt": "a cat"}, {"steps": 4, "seed": 1}],
)
def test_json_that_is_no_settings(value):
    settings = read_foreign_settings({"parameters": json.dumps(value)})
    assert settings is None or settings.values.get("prompt", "") == ""


@pytest.mark.parametrize(("performance", "steps", "noted"), [("Quality", 60, False), ("Lightning", 4, True)])
def test_steps_of_fooocus_performance(performance, steps, noted):
    values = {key: value for key, value in FOOOCUS.items() if key != "steps"} | {"performance": performance}
    settings = read_foreign_settings({"parameters": json.dumps(values)})
    assert settings is not None
    assert settings.values["num_steps"] == steps
    assert any("performance" in note for note in settings.notes) == noted


def graph_with_text(nodes):
    return {
        "prompt": json.dumps(
            CUSTOM | {"4": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0]}}} | nodes
        )
    }


def joined(inputs, class_type="StringConcatenate"):
    return {"20": {"class_type": class_type, "inputs": inputs}}


LITERALS = {
    "21": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a cat"}},
    "22": {"class_type": "ShowText", "inputs": {"text": ["23", 0]}},
    "23": {"class_type": "String Literal", "inputs": {"string": "in a hat"}},
}


@pytest.mark.parametrize(
    ("nodes", "prompt"),
    [
        (joined({"string_a": "a cat", "string_b": "in a hat", "delimiter": " "}), "a cat in a hat"),
        (joined({"string_a": ["21", 0], "string_b": ["22", 0], "delimiter": ", "}), "a cat, in a hat"),
        (
            joined({"text1": ["21", 0], "text2": "!", "clean_whitespace": "true"}, "Text Concatenate"),
            "a cat!",
        ),
        (joined({"text": ["22", 0]}, "Reroute"), "in a hat"),
        (joined({"image": ["9", 0]}, "Florence2Run"), ""),
        (joined({"text_a": ["21", 0], "text_b": ["22", 0]}, "TextSwitch"), ""),
        (joined({"text": ["20", 0]}, "Loop"), ""),
    ],
)
def test_texts_that_nodes_of_comfyui_make(nodes, prompt):
    settings = read_foreign_settings(graph_with_text(LITERALS | nodes))
    assert settings is not None
    assert settings.values["prompt"] == prompt
    class_type = nodes["20"]["class_type"]
    noted = [note for note in settings.notes if "prompt comes from nodes that are not read" in note]
    assert bool(noted) == (not prompt)
    assert all(class_type in note for note in noted)


def test_a_graph_of_texts_with_countless_paths_takes_no_time():
    nodes = {
        str(20 + i): {
            "class_type": "StringConcatenate",
            "inputs": {"string_a": [str(21 + i), 0], "string_b": [str(21 + i), 0]},
        }
        for i in range(60)
    }
    settings = read_foreign_settings(graph_with_text(nodes))
    assert settings is not None
    assert settings.values["prompt"] == ""


PARAMETERS = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512"


@pytest.mark.parametrize(
    ("text", "prompt", "negative", "notes"),
    [
        (
            f"a cat\nNegative prompt: b\n{PARAMETERS}\nTemplate: a {{cat|dog}}\nx",
            "a cat",
            "b",
            "Template: a {cat|dog} x",
        ),
        (f"a cat Negative prompt: b, c {PARAMETERS}", "a cat", "b, c", ""),
        (f"a cat, red. {PARAMETERS}, Version: v1.6.0", "a cat, red.", "", ""),
        (f"a\nb Negative prompt: c {PARAMETERS}", "a\nb Negative prompt: c", "", ""),
        (
            "a cat\nSteps: 20, Sampler: Euler a,\nCFG scale: 7, Seed: 1,\nSize: 512x512, Model: m",
            "a cat",
            "",
            "model m",
        ),
        ("cat: black, dog: white, bird: red", "cat: black, dog: white, bird: red", "", ""),
        (f"Steps: many words\n{PARAMETERS}", "Steps: many words", "", ""),
        (f"a cat\r\n{PARAMETERS}\r\n", "a cat", "", ""),
        ("a cat\nSize: 512x512, Seed: 1, Steps: 20", "a cat", "", ""),
    ],
)
def test_lines_around_the_parameters(text, prompt, negative, notes):
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    assert (settings.values["prompt"], settings.values["negative_prompt"]) == (prompt, negative)
    assert notes in "\n".join(settings.notes)
    if "Steps: 20" in text:
        assert settings.values["num_steps"] == 20
        assert settings.values["width"] == 512


@pytest.mark.parametrize(
    ("line", "sampler", "schedule"),
    [
        ("Sampler: DPM++ 2M", "dpm++2m", "uniform"),
        ("Sampler: DPM++ 2M, Version: v1.6.0", "dpm++2m", "uniform"),
        ("Sampler: DPM++ 2M Karras, Version: v1.6.0", "dpm++2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic, Version: v1.9.4", "dpm++2m", "karras"),
        ("Sampler: DPM++ 2M SDE, Schedule type: Automatic", "dpm++2m-sde", "exponential"),
        ("Sampler: DPM++ 2M, Schedule type: Uniform", "dpm++2m", "uniform"),
        ("Sampler: DPM++ 2M SDE Heun Exponential", "dpm++2m-sde-heun", "exponential"),
        ("Sampler: DPM++ 2S a Karras", "dpm++2s-ancestral", "karras"),
        ("Sampler: DPM++ SDE Karras", "dpm++sde", "karras"),
        ("Sampler: DPM++ 3M SDE, Schedule type: Exponential", "dpm++3m-sde", "multistep-exponential"),
        ("Sampler: DPM2 a Karras", "dpm2-ancestral", "multistep-karras"),
        ("Sampler: DPM2", "dpm2", "sgm-uniform"),
        ("Sampler: LMS", "lms", None),
        ("Sampler: DPM++ 2M, Schedule type: Simple", "dpm++2m", "simple"),
        ("Sampler: euler_ancestral_karras", "euler-ancestral", "karras"),
        ("Sampler: euler discrete", "euler", None),
        ("Sampler: DPM++ 2M, Schedule type: Beta, Version: v1.10.1", "dpm++2m", "beta"),
        ("Sampler: DPM2, Schedule type: Beta", "dpm2", "multistep-beta"),
        ("Sampler: Euler, Schedule type: KL Optimal", "euler", "kl-optimal-to-first"),
        ("Sampler: Euler a, Schedule type: Align Your Steps", "euler-ancestral", "align-your-steps"),
        ("Sampler: Restart, Version: v1.8.0", "restart", "karras"),
        ("Sampler: Restart, Schedule type: Automatic, Version: v1.9.4", "restart", "karras"),
        ("Sampler: DPM fast", "dpm-fast-ancestral", None),
        ("Sampler: DPM adaptive, Eta: 0", "dpm-adaptive", None),
        ("Sampler: DPM adaptive, Schedule type: Karras", "dpm-adaptive-ancestral", "karras"),
        ("Sampler: DPM++ 2M, Triptych schedule: multistep", "dpm++2m", "multistep"),
        ("Sampler: DPM++ 2M, Triptych schedule: nonsense", "dpm++2m", "uniform"),
    ],
)
def test_noise_levels_of_the_web_ui(line, sampler, schedule):
    settings = read_foreign_settings({"parameters": f"x\nSteps: 7, Seed: 3, {line}"})
    assert settings is not None
    assert settings.values["sampler"] == sampler
    assert settings.values.get("schedule") == schedule


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        *(
            (name, "euler-ancestral")
            for name in ("euler_a", "Euler a", "k_euler_a", "K_EULER_ANCESTRAL", "Euler A")
        ),
        ("EulerAncestralDiscreteScheduler", "euler-ancestral"),
        ("EulerDiscreteScheduler", "euler"),
        ("sample_euler", "euler"),
        *((name, "dpm++2s-ancestral") for name in ("DPM++ 2S a", "dpmpp_2s_ancestral", "dpm++2s_a")),
        *((name, "dpm++2m") for name in ("dpmpp_2m", "DPM++ 2M", "dpmpp2m", "DPMSolverMultistepScheduler")),
        *((name, "dpm++2m-sde") for name in ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "DPM++ 2M SDE")),
        *((name, "dpm++sde") for name in ("dpmpp_sde_gpu", "k_dpmpp_sde", "DPMSolverSDEScheduler")),
        *((name, "dpm++3m-sde") for name in ("dpmpp_3m_sde", "DPM++ 3M SDE")),
        *(
            (name, "dpm2-ancestral")
            for name in ("dpm_2_ancestral", "kdpm_2_a", "KDPM2AncestralDiscreteScheduler")
        ),
        *((name, "unipc") for name in ("uni_pc", "uni_pc_bh2", "UniPC", "UniPCMultistepScheduler")),
        *((name, "plms") for name in ("pndm", "PLMS", "PNDMScheduler")),
        *((name, "lms") for name in ("k_lms", "LMSDiscreteScheduler")),
        *((name, "deis") for name in ("deis", "DEISMultistepScheduler")),
        *((name, "heun++2") for name in ("heunpp2", "HeunPP2", "heun++2")),
        *((name, "dpm-fast") for name in ("DPM fast", "dpm_fast", "k_dpm_fast")),
        *((name, "dpm-adaptive") for name in ("DPM adaptive", "dpm_adaptive", "k_dpm_ad")),
        ("Restart", "restart"),
        *((name, None) for name in ("", "res_multistep", "ipndm", "nonsense")),
        ("dpmpp_2s", None),  # the solver without noise
    ],
)
def test_names_of_samplers(name, sampler):
    assert find_sampler(name) == sampler


def test_every_sampler_has_its_own_name_and_the_web_uis():
    for name in SAMPLERS:
        assert split_sampler(name) == (name, None)
        title = image_metadata.parameters(GenerationRecord(prompt="x", sampler=name, num_steps=3))
        assert image_metadata.parse_parameters(title).sampler == name


def test_what_the_web_ui_did_is_listed_by_feature():
    text = (
        "x <lora:ink:0.5>\nSteps: 7, Sampler: Euler a, Seed: 3, Size: 8x8, Denoising strength: 0.5, Hires upscale: 2, "
        "Hires steps: 9, Hires prompt: y, Hires upscaler: 4x-Sharp, "
        'ADetailer model: face.pt, ControlNet 0: "Module: canny, Weight: 1", Refiner: xl [5], '
        "Refiner switch at: 0.8, Hypernet: style, Hypernet strength: 0.5, ENSD: 31337, Clip skip: 1, Model: dream, "
        "Model hash: 879db523c3, "
        'Civitai resources: [{"type":"lora","weight":0.5,"modelVersionId":12,"modelName":"Ink"}]'
    )
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    assert settings.source == "Civitai"
    for part in (
        "hires fix",
        "ADetailer",
        "ControlNet",
        "the refiner",
        "hypernetwork",
        "ensd",
        "dream",
        "lora Ink",
    ):
        assert sum(part in note for note in settings.notes) == 1, part
    assert not any("clip skip" in note for note in settings.notes)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "Denoising strength: 0.55, Clip skip: 2, Hires upscale: 1.5, Hires steps: 12, "
            "Hires upscaler: Latent (bicubic)",
            {
                "hires_scale": 1.5,
                "hires_steps": 12,
                "hires_strength": 0.55,
                "hires_upscaler": "latent-bicubic",
            }
            | {"clip_skip": 2},
        ),
        (
            "Denoising strength: 0.5, Hires resize: 1024x1280, Hires upscaler: None",
            {"hires_scale": 2.0, "hires_strength": 0.5, "hires_upscaler": "lanczos"},
        ),
        ("Hires resize: 1024x0", {"hires_scale": 2.0, "hires_upscaler": "latent"}),
        ("Hires resize: 1024x1024", {}),
        (
            "Variation seed: 9, Variation seed strength: 0.25",
            {"variation_seed": 9, "variation_strength": 0.25},
        ),
        ("Clip skip: 1", {}),
    ],
)
def test_second_pass_variation_and_clip_skip(line, expected):
    settings = read_foreign_settings(
        {"parameters": f"x\nSteps: 7, Sampler: Euler a, Seed: 3, Size: 512x640, RNG: CPU, {line}"}
    )
    assert settings is not None
    known = ("prompt", "negative_prompt", "num_steps", "sampler", "seed", "width", "height")
    assert {key: value for key, value in settings.values.items() if key not in known} == expected
    assert any("hires resize" in note for note in settings.notes) is ("1024x1024" in line)
    settings.record()


@pytest.mark.parametrize(
    ("line", "rng", "noted"),
    [
        ("RNG: CPU", None, False),
        ("RNG: NV", "cuda", False),
        ("Version: v1.6.0", "cuda", True),
        ("Version: f2.0.1v1.10.1", "cuda", True),
        ("Version: ComfyUI", None, False),
        ("RNG: cuda, Version: stable-diffusion.cpp", "cuda", False),
        ("RNG: std_default, Version: stable-diffusion.cpp", None, False),
    ],
)
def test_noise_of_the_gpu(line, rng, noted):
    settings = read_foreign_settings({"parameters": f"x\nSteps: 7, Sampler: Euler, Seed: 3, {line}"})
    assert settings is not None
    assert settings.values.get("rng") == rng
    assert any("NVIDIA GPU" in note for note in settings.notes) is noted


@pytest.mark.parametrize(
    ("sampler", "rng", "noted"),
    [("Euler a", "NV", False), ("Euler a", "CPU", True), ("DPM++ SDE", "NV", True), ("Euler", "CPU", False)],
)
def test_noise_of_the_steps(sampler, rng, noted):
    settings = read_foreign_settings({"parameters": f"x\nSteps: 7, Sampler: {sampler}, Seed: 3, RNG: {rng}"})
    assert settings is not None
    assert any("adds noise at each step" in note for note in settings.notes) is noted


# Files


def png(*chunks: tuple[bytes, bytes], after: bool = False) -> bytes:
    """A PNG with these chunks before or after its pixels."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="PNG")
    data = file.getvalue()
    packed = b"".join(
        struct.pack(">I", len(body)) + chunk_type + body + struct.pack(">I", zlib.crc32(chunk_type + body))
        for chunk_type, body in chunks
    )
    cut = data.index(b"IEND") - 4 if after else data.index(b"IDAT") - 4
    return data[:cut] + packed + data[cut:]


TEXT = f"ein grüner Apfel, 林檎\n{PARAMETERS}"
LATIN = f"ein grüner Apfel\n{PARAMETERS}"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    ("chunk", "prompt"),
    [
        ((b"tEXt", b"parameters\0" + TEXT.encode()), "ein grüner Apfel, 林檎"),
        ((b"tEXt", b"parameters\0" + LATIN.encode("latin-1")), "ein grüner Apfel"),
        ((b"zTXt", b"parameters\0\0" + zlib.compress(TEXT.encode())), "ein grüner Apfel, 林檎"),
        ((b"iTXt", b"parameters\0\0\0en\0\0" + TEXT.encode()), "ein grüner Apfel, 林檎"),
        ((b"iTXt", b"parameters\0\1\0\0\0" + zlib.compress(TEXT.encode())), "ein grüner Apfel, 林檎"),
    ],
)
def test_chunks_of_each_type_and_place(chunk, prompt, after, tmp_path):
    data = png(chunk, after=after)
    (tmp_path / "x.png").write_bytes(data)
    for source in (data, tmp_path / "x.png", str(tmp_path / "x.png")):
        assert image_metadata.read(source).prompt == prompt
    with Image.open(tmp_path / "x.png") as opened:
        assert image_metadata.read(opened).prompt == prompt


def test_metadata_over_a_megabyte(tmp_path):
    """Pillow refuses such a file while its limit stands."""
    workflow = json.dumps(WORKFLOW | {"extra": "x" * 3_000_000})
    for chunk in (
        (b"tEXt", b"workflow\0" + workflow.encode()),
        (b"zTXt", b"workflow\0\0" + zlib.compress(workflow.encode())),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(workflow.encode())),
    ):
        data = png(chunk)
        assert image_metadata.read(data).seed == 42
        assert image_metadata.read_settings(data).source == "ComfyUI"


def test_a_text_that_is_a_bomb_is_refused():
    data = png((b"zTXt", b"parameters\0\0" + zlib.compress(bytes(2**27))))
    started = time.process_time()
    with pytest.raises(TriptychError, match="Decompressed data too large"):
        image_metadata.read(data)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-8", "ascii", "none"])
def test_user_comments(format, encoding):
    text = PARAMETERS if encoding in ("ascii", "none") else TEXT
    prefix = {"ascii": b"ASCII\0\0\0", "none": b"\0" * 8}.get(encoding, b"UNICODE\0")
    comment = prefix + text.encode("ascii" if encoding in ("ascii", "none") else encoding)
    assert decoded_comment(comment) == text
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format=format, exif=exif.tobytes())
    assert image_metadata.read(file.getvalue()).num_steps == 20


def test_other_places_in_exif():
    """Fooocus writes the comment into the first block, ComfyUI's nodes graphs into Make and Model."""
    exif = Image.Exif()
    exif[0x9286] = json.dumps(FOOOCUS)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG", exif=exif)
    assert image_metadata.read_settings(file.getvalue()).source == "Fooocus v2.5.5"
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:" + json.dumps(COMFY), "Workflow:" + json.dumps(WORKFLOW)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="WEBP", exif=exif)
    assert image_metadata.read(file.getvalue()).prompt == "a glass bottle"


def test_a_camera_has_comments_too():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0Screenshot"
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG", exif=exif)
    with pytest.raises(TriptychError, match="no generation metadata; give an image written by"):
        image_metadata.read(file.getvalue())


def test_each_note_is_a_line_with_file_and_program(tmp_path, caplog):
    path = tmp_path / "swarm.png"
    path.write_bytes(png((b"tEXt", b"parameters\0" + json.dumps(SWARM).encode())))
    with caplog.at_level(logging.WARNING):
        image_metadata.read(path)
    assert len(caplog.records) == len(image_metadata.read_settings(path).notes) > 2
    assert all(record.message.startswith(f"{path} (SwarmUI 0.9.4.0): ") for record in caplog.records)


# Anything at all

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
nested = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=8), scalars, max_size=3)
values = nested | st.lists(nested, max_size=3)


@st.composite
def mutated(draw):
    """A dialect's texts with some of their values replaced by anything."""
    texts = dict(draw(st.sampled_from([entry[0] for entry in EXPECTED.values()])))
    for key, text in texts.items():
        try:
            data = json.loads(text)
        except ValueError:
            continue
        data = json.loads(data) if isinstance(data, str) else data
        node = data
        for _ in range(draw(st.integers(1, 4))):
            if isinstance(node, dict) and node:
                name = draw(st.sampled_from(sorted(node)))
            elif isinstance(node, list) and node:
                name = draw(st.integers(0, len(node) - 1))
            else:
                break
            if draw(st.booleans()):
                node[name] = draw(values)
                break
            node = node[name]
        texts[key] = json.dumps(data)
    return texts


@given(mutated())
def test_any_value_is_read_or_noted(texts):
    settings = read_foreign_settings(texts)
    if settings is not None:
        settings.record()


@given(st.binary(max_size=200), st.integers(0, 3000))
def test_damaged_files_raise_no_other_error(noise, place):
    data = bytearray(
        png((b"tEXt", b"parameters\0" + TEXT.encode()), (b"iTXt", b"workflow\0\1\0\0\0" + noise))
    )
    data[place % len(data) : place % len(data) + len(noise)] = noise
    with contextlib.suppress(TriptychError):
        image_texts(bytes(data))
        image_metadata.read(bytes(data))


@pytest.mark.parametrize(
    "word", ["Hashes: {}, ", "hires a: 1, ", '"', "[" * 50, "Steps: 1, ", "Negative prompt: ", "\n"]
)
def test_long_texts_take_no_time(word):
    started = time.process_time()
    read_foreign_settings({"parameters": "x\nSteps: 1, Seed: 2, Size: 8x8, " + word * 60_000})
    read_foreign_settings({"parameters": '{"extraMetadata": ' + word * 60_000})
    assert time.process_time() - started < 5


def test_sd_nexts_own_names():
    text = (
        "a cat\nSteps: 20, Size: 512x512, Sampler: Euler a, Scheduler: EulerAncestralDiscreteScheduler, Seed: 5, "
        "CFG scale: 6.0, CFG rescale: 0.7, CLiP-skip: 2, App: SD.Next, Version: 4bc1a71, "
        "Pipeline: StableDiffusionPipeline, Operations: txt2img, Variation seed: 9, Variation strength: 0.3"
    )
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    expected = {"guidance_rescale": 0.7, "clip_skip": 2, "variation_seed": 9, "variation_strength": 0.3}
    assert expected.items() <= settings.values.items()
    assert "schedule" not in settings.values
    assert "the text does not name the noise levels; the sampler's usual ones are used" in settings.notes


def test_fooocus_loras_beside_the_prompt():
    """Its scheme "A1111" (`A1111MetadataParser.to_string`)."""
    text = (
        "a cat\nSteps: 30, Sampler: DPM++ 2M SDE Karras, Seed: 123, Size: 896x1152, CFG scale: 4, Scheduler: karras, "
        'Lora hashes: "ink: 1234567890, off: 0987654321", Lora weights: "ink: 0.5, off: 0.1", Version: Fooocus v2.5.5'
    )
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    assert settings.values["loras"] == {"ink": 0.5, "off": 0.1}


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("Steps: 20, Sampler: Euler, Denoising strength: 0.5", 11),
        ("Steps: 20, Sampler: Euler, Denoising strength: 1", 20),
        ("Steps: 22, Sampler: DPM++ 2M Karras, Denoising strength: 0.33", 8),
        ("Steps: 20, Sampler: DDIM, Denoising strength: 0.5", 10),
        ("Steps: 20, Sampler: Euler, Denoising strength: 0.5, App: SD.Next", 10),
    ],
)
def test_image_to_image_takes_as_many_steps_as_there(line, count):
    """`setup_img2img_steps` and `sigma_sched` of the web UI: with k-diffusion's samplers one more step."""
    settings = read_foreign_settings({"parameters": f"x\n{line}, Seed: 3, Size: 64x64"})
    assert settings is not None
    assert int(settings.values["strength"] * settings.values["num_steps"]) == count
    assert any("takes" in note for note in settings.notes) == (count in (11, 8))


@pytest.mark.parametrize(
    ("version", "schedule"),
    [("v1.10.1", "beta"), ("f2.0.1v1.10.1-previous-659", "beta"), ("f1.0.0v2-v1.10.1RC", "beta-times")],
)
def test_beta_of_the_web_uis_forks(version, schedule):
    text = f"x\nSteps: 7, Sampler: Euler, Schedule type: Beta, Seed: 3, Version: {version}"
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    assert settings.values["schedule"] == schedule


def test_a_changed_noise_schedule_is_said():
    text = "x\nSteps: 7, Sampler: Euler, Seed: 3, Noise Schedule: Zero Terminal SNR"
    settings = read_foreign_settings({"parameters": text})
    assert settings is not None
    assert "noise schedule: Zero Terminal SNR is not reproduced" in settings.notes


@pytest.mark.parametrize(
    ("lines", "negative", "notes"),
    [
        ("Negative prompt: dog\nTemplate: {a|b}\nNegative template: {dog|cow}", "dog", ["the templates"]),
        ("Negative prompt: \nTemplate: {a|b}", "", ["the templates"]),
        ("Template: of a cat\nNegative prompt: dog", "dog", []),
    ],
)
def test_sd_nexts_templates_are_no_prompt(lines, negative, notes):
    settings = read_foreign_settings(
        {"parameters": f"a cat\n{lines}\nSteps: 20, Sampler: Euler, Seed: 5, Size: 64x64, RNG: CPU"}
    )
    assert settings is not None
    assert settings.values["prompt"] == ("a cat" if notes else "a cat\nTemplate: of a cat")
    assert settings.values["negative_prompt"] == negative
    assert [note[:13] for note in settings.notes] == notes


def test_what_the_extras_tab_did_is_said():
    text = "a\nSteps: 20, Sampler: Euler, Seed: 5, Size: 64x64, RNG: CPU"
    settings = read_foreign_settings({"parameters": text, "postprocessing": "Postprocess upscale by: 2"})
    assert settings is not None
    assert settings.notes == ["postprocessing: Postprocess upscale by: 2 is not reproduced"]


def test_swarmuis_older_names_of_sampler_and_scheduler():
    values = {
        "prompt": "a",
        "seed": 3,
        "steps": 9,
        "comfyuisampler": "dpmpp_2m",
        "comfyuischeduler": "karras",
    }
    settings = read_foreign_settings({"parameters": json.dumps({"sui_image_params": values})})
    assert settings is not None
    assert (settings.values["sampler"], settings.values["schedule"]) == ("dpm++2m", "karras")
