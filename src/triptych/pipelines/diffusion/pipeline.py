"""Prompts, classes and pictures in, pictures out: the tasks of a latent diffusion model."""

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from PIL import Image
from torch import Tensor

from triptych.diffusion.noise import image_seeds
from triptych.errors import UserError, did_you_mean, near_names_hint
from triptych.models.spatial_conditions import Box
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.prepare import check_task
from triptych.pipelines.diffusion.sampling_loop import Painter
from triptych.pipelines.diffusion.settings import How, Settings, apg_of, sized, tiling_of
from triptych.pipelines.image_input import Picture

log = logging.getLogger(__name__)

SAMPLER = "dpm++2m"
# Of `How`: what leaves the picture as it is.
TAG = re.compile(r"<lora:[^<>]*>")
RUNNING = ("batch_size", "preview", "progress", "cancel", "finished")


class DiffusionPipeline(Painter):
    """A latent diffusion model with what surrounds it: prompts, classes and pictures in, pictures out.

    ```python
    pipe = tp.DiffusionPipeline("model.safetensors")           # or a network, a folder, a hub id
    (image,) = pipe.text_to_image("a red apple", seed=7)
    image.info["parameters"]                                   # what made it, as AUTOMATIC1111 writes it
    pipe.save([image], "apple.png")                            # with that text, and all of image.info as JSON
    pipe.again("apple.png")                                    # the same pixels
    pipe.image_to_image("a green apple", image, strength=0.6)
    pipe.inpaint("a worm", image, mask)                        # white is painted, black stays as it is, exactly
    ```

    Every task returns a list of PIL pictures whose `info` holds all that made them. Picture k of a call depends on its
    seed + k alone: `count=4` gives what four calls with seed, seed + 1, ... give, bit for bit. With a larger
    `batch_size` the kernels may add in another order, which moves a pixel by 1 of 255 now and then.

    What every task takes besides its own arguments is in `How`: spacing, rescale, interval, apg, merge_tokens,
    deep_cache, decoder, loras, embeddings, tiling, tiled_decode, batch_size, preview, progress, cancel, finished.

    Args:
        ldm: a `LatentDiffusion`, or what `tp.load` takes.
        device: None takes CUDA, then MPS, then the processor.
        dtype: "fp32", "bf16", "fp16"; None takes bf16 where the hardware multiplies it natively, and logs it
            once. The sampler's state is fp32 always.
        low_memory: give the text encoder's memory back once the prompts are encoded. The same prompts can be used
            again, others not. Of a network that the caller holds too, only its own copy goes. Nor are weights kept a
            second time, in the processor's order, while it paints, which is faster on x86; sums are rounded in another
            order so.
        glance: a small autoencoder on the same latents (TAESD), for previews.
        lora_dir: where `<lora:name:0.8>` in a prompt is looked for; None is the folder that the model lies in.
        prediction: "eps" or "v", of a file that does not say (Stable Diffusion 2), as `tp.load` takes it.
        compile: `torch.compile` each block of the denoiser at the first step; what it makes is kept on disk for the
            next process. See `triptych.torch_compile` for when it pays. Pixels may differ from those without.

    Raises:
        UserError: it is no latent diffusion model, or an argument is out of its range.
    """

    def text_to_image(
        self,
        prompt: str,
        negative: str = "",
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        depth: Picture | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Paint what a prompt says (Rombach et al. 2022, Section 4.3).

        Args:
            prompt: of any length; `(word:1.3)` weighs, `BREAK` parts, see
                `triptych.models.tokenization.prompt_syntax`. "" is allowed.
            negative: what to be guided away from.
            steps: of the sampler, from 1.
            guidance: how far to go from the negative prompt's answer to the prompt's and beyond; 1 is the prompt
                alone, which takes half the time. None is what the model's card says, for most nothing, then 7.5.
            seed: from 0 to 2^32 - 1.
            count: pictures.
            size: height and width in pixels, multiples of the autoencoder's factor (8), or one number; the model's own
                if left out.
            sampler: a name in `triptych.diffusion.config.SAMPLERS`.
            latents: standard normal noise (1 or count, c, height / f, width / f) to start from instead of the seed's.
            depth: a grey picture, near is bright, for a model that takes one.
            **how: see `How`.

        Raises:
            UserError: the model takes no prompt, or an argument is out of its range.
        """
        look, run = _split(how)
        settings = Settings(
            task="text_to_image",
            prompt=prompt,
            negative=negative,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=sized(size),
            sampler=sampler,
            **look,
        )
        return self.make(seeded([settings], count), depth=depth, latents=latents, **run)

    def image_to_image(
        self,
        prompt: str,
        image: Picture,
        strength: float = 0.6,
        negative: str = "",
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        depth: Picture | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Paint over a picture: noise is added to it, and taken away under the prompt (Meng et al. 2022).

        Args:
            image: path, bytes of a file, PIL image or uint8 array.
            strength: share of the steps that is done: 0 is the picture as the autoencoder gives it back, 1 all new.
            guidance: as there; None is 7.5, or 1 for a model that reads no prompt.
            size: height and width to bring the picture to, its centre taken; its own size if left out, whatever it is.
            The others: as in `text_to_image`.

        Raises:
            UserError: as there; or no such picture, or a strength outside 0 to 1.
        """
        look, run = _split(how)
        settings = Settings(
            task="image_to_image",
            prompt=prompt,
            negative=negative,
            strength=strength,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=sized(size),
            sampler=sampler,
            **look,
        )
        return self.make(seeded([settings], count), image=image, depth=depth, latents=latents, **run)

    def inpaint(
        self,
        prompt: str,
        image: Picture,
        mask: Picture,
        strength: float = 1.0,
        feather: float = 0.0,
        negative: str = "",
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Paint where a mask is white. Outside it the picture's pixels come back exactly as they were given.

        Networks that were trained for it are shown the mask and what is left of the picture; others are held to the
        picture outside the mask at each step (Lugmayr et al. 2022).

        Args:
            mask: white (at least half) where to paint, as large as the image.
            strength: as in `image_to_image`; below 1 what is there shines through.
            feather: pixels inside the mask's edge over which old and new are blended.
            size: height and width to paint at: all of the picture is stretched to it, what is painted is stretched
                back, and the rest is put back untouched. The picture's own size if left out.
            The others: as in `image_to_image`. "" is the prompt of a model that reads none.

        Raises:
            UserError: as there; or the mask is of another size than the image.
        """
        look, run = _split(how)
        settings = Settings(
            task="inpaint",
            prompt=prompt,
            negative=negative,
            strength=strength,
            feather=feather,
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=sized(size),
            sampler=sampler,
            **look,
        )
        return self.make(seeded([settings], count), image=image, mask=mask, latents=latents, **run)

    def upscale(
        self,
        prompt: str,
        image: Picture,
        noise_level: int = 20,
        negative: str = "",
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        count: int = 1,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Enlarge a picture by the autoencoder's factor (4), with a model that is shown it beside the latents.

        Args:
            image: the small picture; its pixels are the latents' cells.
            noise_level: time of the process whose noise the small picture gets, which leaves more to be made up; of a
                model that takes none it is ignored.
            guidance: None is 9, or 1 for a model that reads no prompt.
            The others: as in `text_to_image`. "" is the prompt of a model that reads none.

        Raises:
            UserError: the model does not enlarge, or an argument is out of its range.
        """
        look, run = _split(how)
        settings = Settings(
            task="upscale",
            prompt=prompt,
            negative=negative,
            noise_level=noise_level,
            steps=steps,
            guidance=guidance,
            seed=seed,
            sampler=sampler,
            **look,
        )
        return self.make(seeded([settings], count), image=image, latents=latents, **run)

    def unconditional(
        self,
        steps: int = 30,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Pictures of a model that takes neither prompt nor class. Arguments as in `text_to_image`."""
        look, run = _split(how)
        settings = Settings(
            task="unconditional", steps=steps, seed=seed, size=sized(size), sampler=sampler, **look
        )
        return self.make(seeded([settings], count), latents=latents, **run)

    def class_conditional(
        self,
        classes: int | str | Sequence[int | str],
        steps: int = 30,
        guidance: float | None = None,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """`count` pictures of each class, one class after the other.

        Args:
            classes: one class or several, by index or by a name on the model's card.
            guidance: how far to go from no class to the class and beyond (Ho and Salimans 2022); None is 1.5, or 1 for
                a model that does not know no class.
            seed: of the first picture; each further one has one more.
            The others: as in `text_to_image`.

        Raises:
            UserError: the model takes no classes, an unknown class (near names are listed), or as there.
        """
        look, run = _split(how)
        labels = [classes] if isinstance(classes, int | str) else list(classes)
        settings = Settings(
            task="class_conditional",
            steps=steps,
            guidance=guidance,
            seed=seed,
            size=sized(size),
            sampler=sampler,
            **look,
        )
        check_task(self.config, settings, self.source or "this model")
        if not labels:
            raise UserError("classes is empty; name one class at least")
        return self.make(seeded([self.of_class(settings, c) for c in labels], count), latents=latents, **run)

    def semantic(
        self,
        map: Picture,
        steps: int = 30,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Paint what a map of classes says (Rombach et al. 2022, Section 4.3.2).

        Args:
            map: one class number a pixel from 0, 255 for none: a grey or palette picture, or an array (H, W).
            size: height and width to stretch the map to; its own if left out, which must be multiples of 4.
            The others: as in `text_to_image`.

        Raises:
            UserError: the model takes no map, a number is no class, or as there.
        """
        look, run = _split(how)
        settings = Settings(
            task="semantic", steps=steps, seed=seed, size=sized(size), sampler=sampler, **look
        )
        return self.make(seeded([settings], count), map=map, latents=latents, **run)

    def layout(
        self,
        boxes: Sequence[Box],
        steps: int = 30,
        seed: int = 0,
        count: int = 1,
        size: int | tuple[int, int] | None = None,
        sampler: str = SAMPLER,
        latents: Tensor | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """Paint things where boxes are (Rombach et al. 2022, Section 4.3.1).

        Args:
            boxes: (class, left, top, right, bottom) each, corners from 0 to 1; see
                `models.spatial_conditions.box_tokens`.
            The others: as in `text_to_image`.

        Raises:
            UserError: the model takes no boxes, there are too many, or as there.
        """
        look, run = _split(how)
        settings = Settings(
            task="layout",
            boxes=tuple(boxes),
            steps=steps,
            seed=seed,
            size=sized(size),
            sampler=sampler,
            **look,
        )
        return self.make(seeded([settings], count), latents=latents, **run)

    def again(
        self,
        made: Settings | Picture,
        image: Picture | None = None,
        mask: Picture | None = None,
        depth: Picture | None = None,
        map: Picture | None = None,
        **how: Unpack[How],
    ) -> list[Image.Image]:
        """The picture that settings, or a file that has them inside, stand for: of the same model the same pixels.

        Args:
            made: `Settings`, or a picture of ours or of AUTOMATIC1111's web UI, as a path or an opened PIL image.
            image, mask, depth, map: what it was made from, where that is not where it was.
            **how: of `How`, what leaves the picture as it is.

        Raises:
            UserError: the file says nothing of how it was made, or what it was made from is gone.
        """
        look, run = _split(how)
        settings = made if isinstance(made, Settings) else image_metadata.read(made)
        settings = replace(settings, stopped_at=None, **look)
        return self.make([settings], image=image, mask=mask, depth=depth, map=map, **run)

    def of_class(self, settings: Settings, named: int | str) -> Settings:
        """The settings for one class, by index or by a name on the model's card."""
        count, names = self.config.classes.num_classes, list(self.card.classes or ())
        if isinstance(named, str):
            index = found(named, names, count)
        else:
            index = named
        if not 0 <= index < count:
            raise UserError(f"class {index} is not from 0 to {count - 1}")
        return replace(settings, label=index, class_name=names[index] if index < len(names) else None)

    def alike(self, every: Sequence[Settings], batch_size: int) -> Iterator[list[Settings]]:
        """Runs of settings that `make` paints at once: those of one prompt, or as many as a batch of prompts whose
        contexts are of one length and that ask for the same LoRAs."""
        chunks = getattr(self.net.text, "chunks", None)
        if chunks is None or len({one.prompt for one in every}) < 2:
            yield list(every)
            return

        def kind(one: Settings) -> Any:
            if one.embeddings:  # words of many tokens: their prompts' lengths are known later
                return one.prompt
            return chunks(TAG.sub("", one.prompt)), sorted(TAG.findall(one.prompt))

        for _, run in itertools.groupby(every, kind):
            while some := list(itertools.islice(run, batch_size)):
                yield some

    @staticmethod
    def save(images: Sequence[Image.Image], out: str | os.PathLike[str]) -> list[Path]:
        """Write pictures with what made them inside; see `infotext.save`."""
        return image_metadata.save(images, out)


def found(name: str, names: Sequence[str], count: int) -> int:
    """The index of a class by its name, by one of its synonyms ("tabby, tabby cat"), or by its number in letters.

    Raises:
        UserError: there is no such class; near names are listed.
    """
    wanted = name.strip().lower()
    for index, known in enumerate(names):
        if wanted in (known.lower(), *(one.strip().lower() for one in known.split(","))):
            return index
    if wanted.isdecimal():
        return int(wanted)
    single = [one.strip() for known in names for one in known.split(",")]
    hint = near_names_hint(wanted, single, otherwise=f"give a number from 0 to {count - 1}")
    raise UserError(f"no class is called {name!r}; {hint}")


def _split(how: How) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a picture looks like, and what leaves it as it is."""
    for name in how:
        if name not in How.__annotations__:
            hint = did_you_mean(name, How.__annotations__) or f"; there are {', '.join(How.__annotations__)}"
            raise TypeError(f"no argument is called {name!r}{hint}")
    run = {name: value for name, value in how.items() if name in RUNNING}
    look: dict[str, Any] = {name: value for name, value in how.items() if name not in RUNNING}
    for name in ("loras", "embeddings"):
        if name in look:
            look[name] = {os.fspath(key): value for key, value in look[name].items()}
    if "embeddings" in look:
        look["embeddings"] = {word: os.fspath(file) for word, file in look["embeddings"].items()}
    for name, plain in (("tiling", tiling_of), ("apg", apg_of), ("decoder", os.fspath)):
        if name in look:
            look[name] = plain(look[name])
    return look, run


def seeded(settings: Sequence[Settings], count: int) -> list[Settings]:
    """`count` of each, with seeds that rise by one."""
    if count < 1:
        raise UserError(f"count is {count}, which must be at least 1")
    all_of_them = [one for one in settings for _ in range(count)]
    seeds = image_seeds(settings[0].seed, len(all_of_them))
    return [replace(one, seed=seed) for one, seed in zip(all_of_them, seeds, strict=True)]
