"""The sampling loop: from records to images, batch by batch."""

import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.config import to_json
from triptych.device import log_dtype
from triptych.diffusion.config import ADAPTIVE_SAMPLERS
from triptych.diffusion.guidance import composed, guided, projected, within
from triptych.diffusion.inpainting import masked
from triptych.diffusion.noise import mix_noise, noise_for, seeded_noise
from triptych.diffusion.process import Denoiser
from triptych.diffusion.samplers import sampler
from triptych.diffusion.schedule import Levels
from triptych.errors import ConfigError
from triptych.layers.resnet import packed, seamless
from triptych.models.unet_acceleration import deep_cached, merged_tokens
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.hires import enlarge_latents, hires_cells
from triptych.pipelines.diffusion.latent_codec import Preview, to_image
from triptych.pipelines.diffusion.loaded_model import LoadedModel
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.prepare import SamplingJob, check_task, prepare
from triptych.pipelines.diffusion.progress import ProgressOption, progress_bar
from triptych.pipelines.diffusion.prompt_contexts import PromptContexts
from triptych.pipelines.image_input import ImageInput


@dataclass
class StepClock:
    """The step of a sampler that is running, from 0: prompts may change with it."""

    step: int = 0


@dataclass(frozen=True)
class StepHooks:
    """What is called after each sampler step."""

    tick: Callable[[], None]
    preview: Callable[[Preview], object] | None
    cancel: Callable[[], bool] | None


_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()
_MAKING_A_LOCK = threading.Lock()


def _lock_of(net: nn.Module) -> "threading.RLock":
    """Return the lock of a network, the same for all pipelines that share it."""
    with _MAKING_A_LOCK:
        return _LOCKS.setdefault(net, threading.RLock())


class SamplingLoop:
    """Generates images with one model: prepares, samples and decodes them.

    Args:
        model: the model to sample from.
    """

    def __init__(self, model: LoadedModel):
        self.model, self.net = model, model.net
        self._lock = _lock_of(model.net)

    def run(
        self,
        records: Sequence[GenerationRecord],
        images: Mapping[str, ImageInput | None],
        *,
        latents: Tensor | None = None,
        batch_size: int = 1,
        preview: Callable[[Preview], object] | None = None,
        progress: ProgressOption = True,
        cancel: Callable[[], bool] | None = None,
        on_image: Callable[[Image.Image], object] | None = None,
        should_generate: Callable[[GenerationRecord], bool] | None = None,
        return_images: bool = True,
    ) -> list[Image.Image]:
        """Generate images that differ only in seed, and in class or prompt. Every task calls this.

        Args:
            records: one per image.
            images: role (init_image, mask_image, depth_map, class_map) -> image; others are read from the records'
                files.
            others: see `LoopArguments`.

        Calls from several threads on one network take turns: LoRAs, tiling, caches and merged tokens change the network
        for the time of a call.

        Raises:
            TriptychError: records, model and images do not fit together.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, which must be at least 1")
        requested, model = records[0], self.model
        check_task(self.net.config, requested, model.source or "this model")
        log_dtype(model.dtype, model.device)
        if model.compiled and (requested.merge_tokens or requested.deep_cache > 1):
            raise ConfigError(
                "merge_tokens and deep_cache change the network, which compile=True fixes; give one or the other"
            )
        outputs: list[Image.Image] = []
        with self._lock, torch.inference_mode():
            resolved = model.apply_adapters(records)
            file_hashes = model.file_hashes(resolved[0])
            job = prepare(model, resolved, images, model.place_latents(latents, len(records)))
            done = [model.with_provenance(replace(r, hashes=r.hashes | file_hashes)) for r in job.records]
            model.warn_of_differences(requested, done[0])
            rows = [i for i, one in enumerate(done) if should_generate is None or should_generate(one)]
            with closing(self.sample(job, rows, batch_size, preview, progress, cancel)) as samples:
                for row, sample, stopped_at in samples:
                    image = self._finish(job, replace(done[row], stopped_at=stopped_at), sample)
                    if return_images:
                        outputs.append(image)
                    if on_image is not None:
                        on_image(image)
        return outputs

    def sample(
        self,
        job: SamplingJob,
        rows: Sequence[int],
        batch_size: int = 1,
        preview: Callable[[Preview], object] | None = None,
        progress: ProgressOption = True,
        cancel: Callable[[], bool] | None = None,
    ) -> Generator[tuple[int, Tensor, int | None], None, None]:
        """Sample the images `rows` of a job.

        Yields:
            An image's row, its latents (c, h, w), and the number of steps done if it was canceled, else None. After a
            canceled batch there are no more.

        Raises:
            ConfigError: latents became NaN or infinite.
        """
        record, network = job.records[0], self.net.network
        if record.sampler in ADAPTIVE_SAMPLERS:
            batch_size = 1  # an image must not depend on its batch
        batches = -(-len(rows) // batch_size)
        with (
            nullcontext() if self.model.low_memory or self.model.compiled else packed(network),
            seamless(network, x="x" in record.tiling, y="y" in record.tiling),
            progress_bar(progress, batches * _count_steps(job), "sampling") as tick,
        ):
            for first in range(0, len(rows), batch_size):
                batch = rows[first : first + batch_size]
                latents, stopped_at = self._sample_batch(job, batch, StepHooks(tick, preview, cancel))
                for row, image_latents in zip(batch, latents, strict=True):
                    yield row, image_latents, stopped_at
                if cancel is not None and cancel():
                    break

    def _sample_batch(
        self,
        job: SamplingJob,
        rows: Sequence[int],
        hooks: StepHooks,
    ) -> tuple[Tensor, int | None]:
        """Sample one batch; return its latents, and the number of steps done if it was canceled."""
        levels = job.levels
        seeds = [job.records[row].seed for row in rows]
        noise = self._initial_noise(job, rows, seeds)
        x = noise
        if job.init_latents is not None:
            if len(levels) == 1:  # strength 0
                return job.init_latents.expand_as(noise), None
            x = noise if job.from_noise else levels[0].noised(job.init_latents, noise)
        clock = StepClock()
        denoise = self._denoiser(job, rows, clock)
        if job.latent_mask is not None:
            assert job.init_latents is not None
            start = levels[0].t if job.from_noise else None
            known, mask = job.init_latents, job.latent_mask.to(noise)
            denoise = masked(denoise, self.net.process, known, mask, noise, start=start)
        x, stopped_at = self._walk(job, seeds, denoise, x, levels, hooks, clock)
        if job.hires_levels is not None and stopped_at is None:
            record, codec = job.records[0], self.model.codec
            size = (
                hires_cells(record, x.shape[2], codec.factor),
                hires_cells(record, x.shape[3], codec.factor),
            )
            x = enlarge_latents(x, size, codec, record)
            x = job.hires_levels[0].noised(x, self._seeded_noise(job, rows, seeds, x.shape[1:]))
            denoise = self._denoiser(job, rows, clock)  # guidance may remember the first pass
            x, stopped_at = self._walk(job, seeds, denoise, x, job.hires_levels, hooks, clock)
        if job.latent_mask is not None and job.hires_levels is None:
            assert job.init_latents is not None
            x = torch.where(job.latent_mask.to(x) > 0, x, job.init_latents)  # some samplers leave noise
        self._require_finite(x, seeds)
        return x, stopped_at

    def _walk(
        self,
        job: SamplingJob,
        seeds: Sequence[int],
        denoise: Denoiser,
        x: Tensor,
        levels: Levels,
        hooks: StepHooks,
        clock: StepClock,
    ) -> tuple[Tensor, int | None]:
        """Take x along the levels; return the last x, and the number of all steps done if it was canceled.

        Args:
            clock: steps of an earlier pass.
        """
        record, network = job.records[0], self.net.network
        draws = noise_for(seeds, x.shape[1:], rng=record.rng, device=self.model.device)
        # On a GPU each pass starts with a new generator; here a second pass has draws of its own.
        first_draw = 0 if record.rng == "cuda" else 2 * clock.step
        total, steps_before, pass_steps, reported = _count_steps(job), clock.step, len(levels) - 1, 0
        with merged_tokens(network, record.merge_tokens), deep_cached(network, record.deep_cache):
            for step in sampler(record.sampler)(
                denoise, x, levels, noise=lambda index: draws(first_draw + index)
            ):
                x, level = step.x, step.x0_level or levels[step.index]
                pass_done = min(step.index + 1, pass_steps)  # an adaptive sampler takes as many as it needs
                clock.step = done = steps_before + pass_done
                if pass_done > reported:
                    reported = pass_done
                    hooks.tick()
                    if hooks.preview is not None:
                        codec, noise_level = self.model.preview_codec, (level.alpha, level.sigma)
                        hooks.preview(Preview(done, total, noise_level, seeds, step.x0, codec, record.tiling))
                if hooks.cancel is not None and (done < total or step.level != levels[-1]) and hooks.cancel():
                    return step.x0, done
        for _ in range(pass_steps - reported):
            hooks.tick()
        clock.step = steps_before + pass_steps
        return x, None

    def _initial_noise(self, job: SamplingJob, rows: Sequence[int], seeds: Sequence[int]) -> Tensor:
        if job.initial_noise is None:
            return self._seeded_noise(job, rows, seeds, job.shape)
        if len(job.initial_noise) > 1:
            return job.initial_noise[rows]
        return job.initial_noise.expand(len(seeds), -1, -1, -1)

    def _seeded_noise(
        self, job: SamplingJob, rows: Sequence[int], seeds: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """Noise to start a pass from, with the variation seed's share of it."""
        record, device = job.records[0], self.model.device
        noise = seeded_noise(seeds, shape, rng=record.rng, device=device)
        share = record.variation_strength
        if share > 0:
            others = [job.records[row].variation_seed for row in rows]
            noise = mix_noise(noise, seeded_noise(others, shape, rng=record.rng, device=device), share)
        return noise

    def _require_finite(self, latents: Tensor, seeds: Sequence[int]) -> None:
        for seed, image_latents in zip(seeds, latents, strict=True):
            if not image_latents.isfinite().all():
                other = "" if self.model.dtype == torch.float32 else ", or give dtype='fp32'"
                raise ConfigError(
                    f"the latents of the image with seed {seed} became NaN in {self.model.dtype_name}: lower "
                    f"guidance_scale{other}"
                )

    def _denoiser(self, job: SamplingJob, rows: Sequence[int], clock: StepClock) -> Denoiser:
        """The network under the job's conditions, guided: (x, t) -> x0."""
        record = job.records[0]
        conditioned = self._conditioned(job, rows)
        scale = record.guidance_scale
        if job.prompts is None:
            context = None if job.context is None else _rows_of(job.context, rows)
            alone = conditioned(context, 1)
            if scale is None or (job.negative_context is None and job.null_label is None):
                return alone
            contexts = None
            if context is not None and job.negative_context is not None:
                contexts = torch.cat([context, job.negative_context.expand(len(rows), -1, -1)])
            pair = conditioned(contexts, 2)
        else:
            alone, pair = self._prompted(job.prompts, rows, conditioned, clock)
            if scale is None or pair is None:
                return alone
        if record.apg is not None:
            denoise = projected(pair, scale, **record.apg)
        else:
            denoise = guided(pair, scale, process=self.net.process, rescale=record.guidance_rescale)
        if record.guidance_interval is not None:
            denoise = within(denoise, alone, self.net.process, *record.guidance_interval)
        return denoise

    def _conditioned(self, job: SamplingJob, rows: Sequence[int]) -> Callable[[Tensor | None, int], Denoiser]:
        """A function (contexts, repeats) -> denoiser of `repeats` batches: the conditions, the last one negative."""
        count = len(rows)
        concat = None
        if job.concat is not None:
            concat = job.concat([job.records[row].seed for row in rows]).to(self.model.device)

        def conditioned(context: Tensor | None, repeats: int) -> Denoiser:
            channels = labels = None
            if concat is not None:
                channels = concat.expand(count, -1, -1, -1).repeat(repeats, 1, 1, 1)
            if job.labels is not None:
                label = torch.tensor(job.labels)[rows if len(job.labels) > 1 else [0]].expand(count)
                null = label if job.null_label is None else torch.full_like(label, job.null_label)
                labels = torch.cat([label, *[null] * (repeats - 1)]).to(self.model.device)
            return self.net.denoiser(context, concat=channels, labels=labels)

        return conditioned

    def _prompted(
        self,
        prompts: PromptContexts,
        rows: Sequence[int],
        conditioned: Callable[[Tensor | None, int], Denoiser],
        clock: StepClock,
    ) -> tuple[Denoiser, Denoiser | None]:
        """The denoiser of the prompts alone, and of prompts and negative prompt (None without), as of each step."""

        def contexts(number: int) -> list[Tensor]:
            step = prompts.contexts[number]
            negative = [] if step.negative is None else [step.negative.expand(len(rows), -1, -1)]
            return [*(_rows_of(context, rows) for context in step.prompts), *negative]

        def pair(number: int) -> Denoiser:
            tensors = contexts(number)
            return composed(conditioned(torch.cat(tensors), len(tensors)), prompts.weights)

        def current(make: Callable[[int], Denoiser]) -> Denoiser:
            denoisers: dict[int, Denoiser] = {}

            def denoise(x: Tensor, t: Tensor) -> Tensor:
                number = prompts.number_at(clock.step)
                if number not in denoisers:
                    denoisers[number] = make(number)
                return denoisers[number](x, t)

            return denoise

        if prompts.contexts[0].negative is None:
            return current(lambda number: conditioned(contexts(number)[0], 1)), None
        both = current(pair)
        if prompts.weights == (1.0,):
            return current(lambda number: conditioned(contexts(number)[0], 1)), both
        return guided(both, 1.0), both

    def _finish(self, job: SamplingJob, record: GenerationRecord, latents: Tensor) -> Image.Image:
        """Decode an image and put its record into `info`."""
        _, codec = self.model.decoder(record.decoder)
        pixels = codec.decode(latents[None], record.tiled_decode, record.tiling)
        image = to_image(pixels if job.canvas is None else job.canvas.composite(pixels))
        image.info.update(to_json(record) | {"parameters": image_metadata.parameters(record)})
        return image


def _rows_of(context: Tensor, rows: Sequence[int]) -> Tensor:
    """The contexts of a batch's images, from one for all images or one for each."""
    return context[rows] if len(context) > 1 else context.expand(len(rows), -1, -1)


def _count_steps(job: SamplingJob) -> int:
    """Sampler steps of an image in all passes."""
    return len(job.levels) - 1 + (len(job.hires_levels) - 1 if job.hires_levels else 0)
