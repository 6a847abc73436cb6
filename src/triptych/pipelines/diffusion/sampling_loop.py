"""A latent diffusion model at work: one loop over a sampler, whatever the task."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.config import to_json
from triptych.device import choose_device, choose_dtype, log_dtype, place_network
from triptych.diffusion.config import Prediction
from triptych.diffusion.guidance import guided, projected, within
from triptych.diffusion.inpainting import masked
from triptych.diffusion.noise import noise_for, seeded_noise
from triptych.diffusion.process import Denoiser
from triptych.diffusion.samplers import sampler
from triptych.errors import UserError
from triptych.layers.resnet import packed, seamless
from triptych.models.autoencoder import FirstStage
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.unet_acceleration import deep_cached, merged_tokens
from triptych.network import Network
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.adapters import Adapters
from triptych.pipelines.diffusion.latent_codec import Preview, Rendering, picture
from triptych.pipelines.diffusion.prepare import Job, check_task, prepare
from triptych.pipelines.diffusion.progress import Waiting, ticking
from triptych.pipelines.diffusion.settings import Settings
from triptych.pipelines.image_input import Picture
from triptych.torch_compile import compile_blocks
from triptych.version import __version__

log = logging.getLogger(__name__)

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Painter:
    """A latent diffusion model on its device in its precision, and how settings become its pictures."""

    def __init__(
        self,
        ldm: LatentDiffusion | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        glance: FirstStage | None = None,
        lora_dir: str | Path | None = None,
        prediction: Prediction | None = None,
        compile: bool = False,
    ) -> None:
        self.source = "" if isinstance(ldm, nn.Module) else os.fspath(ldm)
        net: Any = ldm
        if self.source:
            from triptych.weights import load

            net = load(self.source, prediction=prediction)
        elif prediction is not None:
            raise UserError("prediction is of a file that does not say it; a network's is in its config")
        if not isinstance(net, LatentDiffusion):
            raise UserError(
                f"{self.source or 'the network'} is a {type(net).__name__}, which makes no pictures; give a latent "
                "diffusion model"
            )
        self.weights = fingerprint(net)
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.net: Any = place_network(net, self.device, self.dtype, shared=not self.source)
        self.compiled = compile
        if compile:
            compile_blocks(self.net)
        self.card, self.config = self.net.card, self.net.config
        self.low_memory = low_memory
        self.rendering = self.glance = Rendering(self.net.autoencoder)
        if glance is not None:
            small: Any = place_network(glance, self.device, self.dtype)
            self.glance = Rendering(small)
        self._decoders: dict[str, tuple[str, Rendering]] = {}  # by file
        self._encoded: dict[tuple[str, ...], Tensor] = {}
        self._adapters = Adapters(self.net, Path(lora_dir) if lora_dir is not None else self._beside())

    def _beside(self) -> Path:
        """Where the model lies; the working folder for one that lies nowhere."""
        path = Path(self.source or ".")
        return path.parent if path.is_file() else path if path.is_dir() else Path()

    @cached_property
    def model_hash(self) -> str:
        """As AUTOMATIC1111's web UI names the file; of what is no single file, the start of `weights`."""
        return image_metadata.model_hash(self.source) or self.weights[:10]

    @property
    def dtype_name(self) -> str:
        return DTYPES.get(self.dtype, str(self.dtype))

    def make(
        self,
        each: Sequence[Settings],
        *,
        image: Picture | None = None,
        mask: Picture | None = None,
        depth: Picture | None = None,
        map: Picture | None = None,
        latents: Tensor | None = None,
        batch_size: int = 1,
        preview: Callable[[Preview], object] | None = None,
        progress: Waiting = True,
        cancel: Callable[[], bool] | None = None,
        finished: Callable[[Image.Image], object] | None = None,
        wanted: Callable[[Settings], bool] | None = None,
        keep: bool = True,
    ) -> list[Image.Image]:
        """Pictures that differ in seed, and in class or prompt, alone: what all tasks come down to.

        Arguments as in `How`, and

        Args:
            wanted: whether to make a picture, from all that would be in its `info`.
            keep: return the pictures. Otherwise they are `finished`'s alone, and memory does not grow with them.

        Raises:
            UserError: settings, model and what is given do not go together.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}, which must be at least 1")
        check_task(self.config, each[0], self.source or "this model")
        log_dtype(self.dtype, self.device)
        resolved = {one.prompt: self._adapters.resolved(one) for one in each}
        asked, dressed = each[0], resolved[each[0].prompt]
        if any(one.loras != dressed.loras for one in resolved.values()):
            raise UserError(
                "prompts that ask for different LoRAs cannot be painted at once; make them one by one"
            )
        each = [replace(one, prompt=resolved[one.prompt].prompt, loras=dressed.loras) for one in each]
        given = {"image": image, "mask": mask, "depth": depth, "map": map}
        if self._adapters.wear(dressed):
            self._encoded = {}
        if self.compiled and (asked.merge_tokens or asked.deep_cache > 1):
            raise UserError(
                "merge_tokens and deep_cache change a network that compile has fixed; give one or the other"
            )
        digest, _ = self._decoder(asked.decoder)
        with torch.inference_mode():
            job = prepare(self.net, self.rendering, self._encode, each, given, self._noise(latents, each))
            worn = self._adapters.hashes(dressed) | ({"decoder": digest} if digest else {})
            job = replace(job, each=[replace(one, hashes=one.hashes | worn) for one in job.each])
            self._compare(asked, job.each[0])
            rows = [i for i, one in enumerate(job.each) if wanted is None or wanted(self._signed(one))]
            return self._run(job, rows, batch_size, preview, progress, cancel, finished, keep)

    def _run(
        self,
        job: Job,
        every: list[int],
        batch_size: int,
        preview: Callable[[Preview], object] | None,
        progress: Waiting,
        cancel: Callable[[], bool] | None,
        finished: Callable[[Image.Image], object] | None,
        keep: bool,
    ) -> list[Image.Image]:
        """Batch by batch through the sampler, picture by picture through the decoder."""
        images: list[Image.Image] = []
        tiling = job.each[0].tiling
        batches = -(-len(every) // batch_size)
        with (
            nullcontext() if self.low_memory or self.compiled else packed(self.net.unet),
            seamless(self.net.unet, x="x" in tiling, y="y" in tiling),
            ticking(progress, batches * (len(job.levels) - 1), "painting") as tick,
        ):
            for first in range(0, len(every), batch_size):
                rows = every[first : first + batch_size]
                with (
                    merged_tokens(self.net.unet, job.each[0].merge_tokens),
                    deep_cached(self.net.unet, job.each[0].deep_cache),
                ):
                    latents, stopped = self._sample(job, rows, tick, preview, cancel)
                for row, one in zip(rows, latents, strict=True):
                    made = self._picture(job, replace(job.each[row], stopped_at=stopped), one)
                    if keep:
                        images.append(made)
                    if finished is not None:
                        finished(made)
                if cancel is not None and cancel():
                    break
        return images

    def _sample(
        self,
        job: Job,
        rows: list[int],
        tick: Callable[[], None],
        preview: Callable[[Preview], object] | None,
        cancel: Callable[[], bool] | None,
    ) -> tuple[Tensor, int | None]:
        """Latents of some of the pictures, and the step at which they were stopped, if they were."""
        settings, seeds = job.each[0], [job.each[row].seed for row in rows]
        levels = job.levels
        if job.start is None:
            noise = seeded_noise(seeds, job.shape, device=self.device)
        else:
            noise = job.start[rows] if len(job.start) > 1 else job.start.expand(len(seeds), -1, -1, -1)
        x = noise if job.fresh else levels[0].noised(job.known, noise)  # type: ignore[arg-type]
        if len(levels) == 1:  # strength 0
            return job.known.expand_as(noise), None  # type: ignore[union-attr]
        denoise = self._denoiser(job, rows, seeds)
        if job.cells is not None:
            start = levels[0].t if job.fresh else None
            known, cells = job.known, job.cells.to(noise)
            denoise = masked(denoise, self.net.process, known, cells, noise, start=start)  # type: ignore[arg-type]
        draws = noise_for(seeds, job.shape, device=self.device)
        stopped = None
        for step in sampler(settings.sampler)(denoise, x, levels, noise=draws):
            x = step.x
            tick()
            if preview is not None:
                now = levels[step.index]
                preview(
                    Preview(
                        step.index + 1,
                        step.num_steps,
                        (now.alpha, now.sigma),
                        seeds,
                        step.x0,
                        self.glance,
                        settings.tiling,
                    )
                )
            if cancel is not None and step.index + 1 < step.num_steps and cancel():
                x, stopped = step.x0, step.index + 1
                break
        for seed, one in zip(seeds, x, strict=True):
            if not one.isfinite().all():
                cure = "" if self.dtype == torch.float32 else ", or give dtype='fp32'"
                raise UserError(
                    f"the latents of the picture with seed {seed} became NaN in {self.dtype_name}: lower guidance{cure}"
                )
        return x, stopped

    def _denoiser(self, job: Job, rows: list[int], seeds: Sequence[int]) -> Denoiser:
        """The network under the job's conditions, guided."""
        settings, count = job.each[0], len(seeds)
        beside = None if job.beside is None else job.beside(seeds).to(self.device).expand(count, -1, -1, -1)

        def under(context: Tensor | None, times: int) -> Denoiser:
            labels = None
            if job.labels is not None:
                first = torch.tensor(job.labels)[rows if len(job.labels) > 1 else [0]].expand(count)
                rest = first if job.no_label is None else torch.full_like(first, job.no_label)
                labels = torch.cat([first, *[rest] * (times - 1)]).to(self.device)
            more = None if beside is None else beside.repeat(times, 1, 1, 1)
            return self.net.denoiser(context, beside=more, labels=labels)

        positive = job.positive
        if positive is not None:
            positive = positive[rows] if len(positive) > 1 else positive.expand(count, -1, -1)
        scale = settings.guidance
        if scale is None or (job.negative is None and job.no_label is None):
            return under(positive, 1)
        context = None
        if positive is not None and job.negative is not None:
            context = torch.cat([positive, job.negative.expand(count, -1, -1)])
        both = under(context, 2)
        if settings.apg is not None:
            denoise = projected(both, scale, **settings.apg)
        else:
            denoise = guided(both, scale, process=self.net.process, rescale=settings.rescale)
        if settings.interval is not None:
            denoise = within(denoise, under(positive, 1), self.net.process, *settings.interval)
        return denoise

    def _picture(self, job: Job, settings: Settings, latents: Tensor) -> Image.Image:
        """Bytes, with what made them in `info`."""
        _, rendering = self._decoder(settings.decoder)
        pixels = rendering.pixels(latents[None], settings.tiled_decode, settings.tiling)
        made = picture(pixels if job.canvas is None else job.canvas.finished(pixels))
        settings = self._signed(settings)
        made.info.update(to_json(settings) | {"parameters": image_metadata.parameters(settings)})
        return made

    def _signed(self, settings: Settings) -> Settings:
        """With what they are made by."""
        return replace(
            settings,
            dtype=self.dtype_name,
            model=self.source,
            model_hash=self.model_hash,
            weights=self.weights,
            made_by=f"triptych {__version__}",
        )

    def _decoder(self, file: str) -> tuple[str, Rendering]:
        """The first stage in a file, and what tells it from another; the model's own for none.

        Raises:
            UserError: it cannot be read, or is not on the model's latents.
        """
        if not file:
            return "", self.rendering
        if file not in self._decoders:
            from triptych.weights import load

            net: Any = load(file)
            if not isinstance(net, FirstStage):
                raise UserError(
                    f"the decoder {file} is a {type(net).__name__}; give an autoencoder, such as TAESD's"
                )
            own, other = self.config.autoencoder, net.config
            if (own.latent_channels, own.factor) != (other.latent_channels, other.factor):
                raise UserError(
                    f"the decoder {file} is on {other.latent_channels} channels of 1/{other.factor}, the model on "
                    f"{own.latent_channels} of 1/{own.factor}; give one that was made for its latents"
                )
            self._decoders[file] = fingerprint(net)[:12], Rendering(place_network(net, self.device, self.dtype))
        return self._decoders[file]

    def _encode(self, prompts: tuple[str, ...]) -> Tensor:
        """The contexts of prompts, one row each."""
        if prompts in self._encoded:
            return self._encoded[prompts]
        if self.net.text is None:
            raise UserError(
                "the text encoder's memory was given back after the first prompts (low_memory=True); make a new "
                "pipeline for other ones"
            )
        contexts = self.net.text.encode_prompts(prompts)
        if self.low_memory:
            self._encoded = {prompts: contexts}
            self.net.drop_text()
        return contexts

    def _noise(self, latents: Tensor | None, each: Sequence[Settings]) -> Tensor | None:
        """Latents to start from, on the device; a `UserError` if they are not of the model, or too few."""
        if latents is None:
            return None
        c = self.config.autoencoder.latent_channels
        if latents.ndim != 4 or latents.shape[1] != c or len(latents) not in (1, len(each)):
            raise UserError(
                f"latents are {tuple(latents.shape)}, which must be (1 or {len(each)}, {c}, height / "
                f"{self.rendering.factor}, width / {self.rendering.factor})"
            )
        return latents.to(self.device, torch.float32)

    def _compare(self, asked: Settings, made: Settings) -> None:
        """Says what is not as it was when a picture is made again."""
        for role, known in asked.hashes.items():
            if made.hashes.get(role) != known:
                log.warning("the %s is not the one that the picture was made from", role)
        if asked.weights and asked.weights != self.weights:
            log.warning("it was made with another model than this one (%s)", asked.model or "unnamed")
        if asked.dtype and asked.dtype != self.dtype_name:
            log.warning("it was made in %s, this is %s: pixels may differ", asked.dtype, self.dtype_name)


def fingerprint(net: Network) -> str:
    """Hexadecimal digits that another network has not: SHA-256 of its config and the names, the shapes and the first
    256 numbers of its parameters. It takes milliseconds, where a hash of the file takes seconds."""
    digest = hashlib.sha256(json.dumps(to_json(net.config), sort_keys=True).encode())
    for name, parameter in net.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().reshape(-1)[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()
