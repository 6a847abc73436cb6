"""Names of samplers and noise levels in other programs.

Names are compared by their letters and digits alone: "DPM++ 2S a", `dpmpp_2s_ancestral`, `k_dpmpp_2s_a` and
`DPM++ 2S Ancestral` are one.
"""

import re

# Without separators, "++" as pp, and a for ancestral.
SAMPLER_NAMES = {
    "euler": "euler",
    "eulera": "euler-ancestral",
    "heun": "heun",
    "heunpp2": "heun++2",
    "restart": "restart",
    "lms": "lms",
    "dpm2": "dpm2",
    "dpm2a": "dpm2-ancestral",
    "dpmfast": "dpm-fast",
    "dpmfasta": "dpm-fast-ancestral",
    "dpmadaptive": "dpm-adaptive",
    "dpmad": "dpm-adaptive",  # the web UI's API
    "dpmadaptivea": "dpm-adaptive-ancestral",
    "dpmpp2sa": "dpm++2s-ancestral",
    "dpmppsde": "dpm++sde",
    "dpmsolversde": "dpm++sde",
    "dpmpp2m": "dpm++2m",
    "dpmsolver": "dpm++2m",
    "dpmsolverpp": "dpm++2m",
    "dpmsolverpp2m": "dpm++2m",
    "dpmpp2msde": "dpm++2m-sde",
    "dpmpp2msdeheun": "dpm++2m-sde-heun",
    "dpmpp3msde": "dpm++3m-sde",
    "deis": "deis",
    "unipc": "unipc",
    "unipcbh2": "unipc",
    "lcm": "lcm",
    "ddim": "ddim",
    "ddpm": "ddpm",
    "plms": "plms",
    "pndm": "plms",
}
# "" leaves the levels to the program.
SCHEDULE_NAMES = {
    "automatic": "",
    "default": "",
    "karras": "karras",
    "ka": "karras",  # the web UI's API
    "k": "karras",  # InvokeAI
    "exponential": "exponential",
    "polyexponential": "exponential",  # with the power of 1 that programs use
    "uniform": "uniform",
    "normal": "uniform",
    "native": "uniform",  # NovelAI
    "discrete": "uniform",  # stable-diffusion.cpp
    "sgmuniform": "sgm-uniform",
    "simple": "simple",
    "beta": "beta",
    "kloptimal": "kl-optimal",
    "alignyoursteps": "align-your-steps",
    "alignyoursteps11": "align-your-steps",  # Forge
    "ays": "align-your-steps",
    "ayssd1": "align-your-steps",  # nodes of ComfyUI
    "ddim": "leading",
    "ddimuniform": "leading",
    "leading": "leading",
    "trailing": "trailing",
    "linspace": "linspace",
}
# Schedule -> the one with a level more of which the last but one is left out.
DISCARDED = {
    "uniform": "sgm-uniform",
    "karras": "multistep-karras",
    "exponential": "multistep-exponential",
    "beta": "multistep-beta",
    "beta-times": "multistep-beta-times",
    "kl-optimal": "multistep-kl-optimal",
}
LONGEST_NAME = 80
_CLASS_WORDS = re.compile(r"scheduler|discrete|multistep")


def find_sampler(name: str) -> str | None:
    """Return our name of another program's sampler; None if there is none."""
    letters = re.sub(r"[^a-z0-9+]", "", name.lower()).replace("+", "p")
    letters = (
        _CLASS_WORDS.sub("", letters).replace("ancestral", "a").removeprefix("sample").removesuffix("gpu")
    )
    return SAMPLER_NAMES.get(letters) or SAMPLER_NAMES.get(letters.removeprefix("k"))


def find_schedule(name: str) -> str | None:
    """Return our name of another program's noise levels; "" where it leaves them open, None if there are none."""
    return SCHEDULE_NAMES.get(re.sub(r"[^a-z0-9]", "", name.lower()))


def split_sampler(name: str) -> tuple[str | None, str | None]:
    """Return our sampler, and the name of the noise levels that follow it: "DPM++ 2M Karras", `euler_ancestral_karras`.

    A sampler's name comes first: "DPM++ 2M SDE" is not "DPM++ 2M" with levels called SDE.
    """
    if (sampler := find_sampler(name)) is not None:
        return sampler, None
    if len(name) > LONGEST_NAME:
        return None, None
    for match in re.finditer(r"[\s_(-]+", name):
        head, tail = name[: match.start()], name[match.end() :].rstrip(")")
        if head and find_schedule(tail) is not None and (sampler := find_sampler(head)) is not None:
            return sampler, tail
    return None, None
