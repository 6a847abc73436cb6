"""The tasks of a latent diffusion model: from prompts, classes and images to images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image

from triptych.diffusion.config import Prediction
from triptych.errors import ConfigError
from triptych.models.autoencoder import FirstStage
from triptych.models.configs.latent_diffusion import GenerationTask
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.spatial_conditions import LayoutBox
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.loaded_model import LoadedModel
from triptych.pipelines.diffusion.options import (
    GenerationArguments,
    GenerationRecord,
    LoopArguments,
    sampling_fields,
)
from triptych.pipelines.diffusion.prepare import check_task
from triptych.pipelines.diffusion.records import with_class, with_seeds
from triptych.pipelines.diffusion.sampling_loop import SamplingLoop
from triptych.pipelines.image_input import ImageInput


class DiffusionPipeline:
    """Generate images with a latent diffusion model (Rombach et al. 2022).

    ```python
    pipe = tp.DiffusionPipeline("model.safetensors")           # or a network, a folder, a hub id
    (image,) = pipe.text_to_image("a red apple", seed=7)
    image.info["parameters"]                                   # its settings, as AUTOMATIC1111 writes them
    pipe.save([image], "apple.png")                            # with that text, and image.info as JSON
    pipe.regenerate("apple.png")                               # the same pixels
    pipe.image_to_image("a green apple", image, strength=0.6)
    pipe.inpaint("a worm", image, mask)                        # white is generated, black stays exactly as it is
    ```

    Every task returns a list of PIL images whose `info` is a `GenerationRecord` as JSON, and takes the keyword
    arguments of `GenerationArguments`: num_steps, guidance_scale, seed, num_images, height, width, sampler, schedule,
    ... (`SamplingOptions` has their meaning), latents, batch_size, preview, progress, cancel and on_image.

    Image k of a call depends on seed + k alone: `num_images=4` gives what four calls with seed, seed + 1, ... give, bit
    for bit. With a larger `batch_size` kernels may sum in another order, which can move a pixel by 1 of 255.

    A pipeline may be used from several threads. Calls on one network take turns.

    Args:
        ldm: a `LatentDiffusion`, or what `tp.load` takes.
        device: None picks CUDA, then MPS, then CPU.
        dtype: "fp32", "bf16" or "fp16"; None picks bf16 where the hardware multiplies it natively. The sampler's state
            is always fp32.
        low_memory: free the text encoder once the prompts are encoded: the same prompts can be used again, others
            cannot. The caller's own network is not changed. Also keeps no packed copy of the weights (oneDNN), which
            makes sampling on x86 CPUs slower and rounds sums differently.
        preview_decoder: a small autoencoder of the same latents (TAESD) to decode previews with.
        lora_dir: folder in which LoRAs are found by name (`<lora:name:0.8>` in a prompt); None is the model's folder.
        prediction: "eps" or "v", for files that do not store it (Stable Diffusion 2), as `tp.load` takes it.
        compile: `torch.compile` each block of the denoiser at the first step, see `triptych.torch_compile`. Pixels may
            differ from those without.

    Raises:
        TriptychError: the model is no latent diffusion model, or an argument is out of its range.
    """

    def __init__(
        self,
        ldm: LatentDiffusion | str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        low_memory: bool = False,
        preview_decoder: FirstStage | None = None,
        lora_dir: str | Path | None = None,
        prediction: Prediction | None = None,
        compile: bool = False,
    ) -> None:
        self.model = LoadedModel(
            ldm, device, dtype, low_memory, preview_decoder, lora_dir, prediction, compile
        )
        self.loop = SamplingLoop(self.model)
        self.net: Any = self.model.net
        self.card, self.config = self.net.card, self.net.config
        self.source, self.device, self.dtype = self.model.source, self.model.device, self.model.dtype

    def text_to_image(
        self,
        prompt: str,
        negative_prompt: str = "",
        *,
        depth_map: ImageInput | None = None,
        **options: Unpack[GenerationArguments],
    ) -> list[Image.Image]:
        """Generate images from a prompt (Rombach et al. 2022, Section 4.3).

        Args:
            prompt: text of any length, "" included; `(word:1.3)` changes a word's weight, `BREAK` starts a new chunk,
                `[a:b:0.5]` switches and `[a|b]` alternates between steps, `a :1.2 AND b` composes; see
                `triptych.models.tokenization.prompt_syntax` and `prompt_schedule`.
            negative_prompt: text to steer away from.
            depth_map: grayscale depth image (near is bright), for depth-conditioned models.
            **options: see the class.

        Raises:
            TriptychError: the model takes no prompt, or an argument is out of its range.
        """
        return self._run(
            "text_to_image", options, {"depth_map": depth_map}, **_texts(prompt, negative_prompt)
        )

    def image_to_image(
        self,
        prompt: str,
        init_image: ImageInput,
        strength: float = 0.6,
        negative_prompt: str = "",
        *,
        depth_map: ImageInput | None = None,
        **options: Unpack[GenerationArguments],
    ) -> list[Image.Image]:
        """Change an image: add noise to it, then remove the noise under the prompt (SDEdit, Meng et al. 2022).

        Args:
            prompt: as in `text_to_image`; "" for a model that reads none.
            init_image: path, bytes of a file, PIL image or uint8 array.
            strength: share of the steps to run, 0 to 1: 0 is the image as the autoencoder reproduces it, 1 all new.
            negative_prompt, depth_map: as in `text_to_image`.
            **options: see the class. height and width resize and center-crop the image; by default it keeps its size.

        Raises:
            TriptychError: the image cannot be read, or as in `text_to_image`.
        """
        images = {"init_image": init_image, "depth_map": depth_map}
        fields = _texts(prompt, negative_prompt) | {"strength": strength}
        return self._run("image_to_image", options, images, **fields)

    def inpaint(
        self,
        prompt: str,
        init_image: ImageInput,
        mask_image: ImageInput,
        strength: float = 1.0,
        mask_feather: float = 0.0,
        negative_prompt: str = "",
        **options: Unpack[GenerationArguments],
    ) -> list[Image.Image]:
        """Generate the masked part of an image. Outside the mask its pixels come back exactly as they were.

        A network with mask channels takes the mask and the masked image as input. For any other, the known image
        replaces the sample outside the mask at each step (RePaint, Lugmayr et al. 2022).

        Args:
            prompt, negative_prompt: as in `image_to_image`.
            init_image: as in `image_to_image`.
            mask_image: as large as the image; white (at least half) is generated.
            strength: as in `image_to_image`; below 1 the old content shows through.
            mask_feather: pixels inside the mask's edge over which old and new are blended.
            **options: see the class. With height and width the whole image is stretched to that size and the result
                stretched back; by default it keeps its size.

        Raises:
            TriptychError: the mask is not as large as the image, or as in `image_to_image`.
        """
        images = {"init_image": init_image, "mask_image": mask_image}
        fields = _texts(prompt, negative_prompt) | {"strength": strength, "mask_feather": mask_feather}
        return self._run("inpaint", options, images, **fields)

    def upscale(
        self,
        prompt: str,
        init_image: ImageInput,
        noise_level: int = 20,
        negative_prompt: str = "",
        **options: Unpack[GenerationArguments],
    ) -> list[Image.Image]:
        """Enlarge an image by the autoencoder's factor (4), with a model conditioned on the small image.

        Args:
            prompt, negative_prompt: as in `image_to_image`.
            init_image: the small image; each of its pixels is one latent.
            noise_level: timestep of the noise added to it, from 0; more noise lets the model invent more. Ignored by
                models that were trained without.
            **options: see the class; not height and width.

        Raises:
            TriptychError: the model is no upscaler, or as in `image_to_image`.
        """
        fields = _texts(prompt, negative_prompt) | {"noise_level": noise_level}
        return self._run("upscale", options, {"init_image": init_image}, **fields)

    def unconditional(self, **options: Unpack[GenerationArguments]) -> list[Image.Image]:
        """Generate images with a model that takes neither prompt nor class."""
        return self._run("unconditional", options, {})

    def class_conditional(
        self, classes: int | str | Sequence[int | str], **options: Unpack[GenerationArguments]
    ) -> list[Image.Image]:
        """Generate `num_images` of each class, one class after the other.

        Args:
            classes: one class or several, by index or by a name on the model's card.
            **options: see the class.

        Raises:
            TriptychError: an unknown class (near names are listed), or the model takes no classes.
        """
        names = [classes] if isinstance(classes, int | str) else list(classes)
        if not names:
            raise ConfigError("classes is empty; name at least one class")
        return self._run("class_conditional", options, {}, classes=names)

    def semantic(self, class_map: ImageInput, **options: Unpack[GenerationArguments]) -> list[Image.Image]:
        """Generate images from a segmentation map (Rombach et al. 2022, Section 4.3.2).

        Args:
            class_map: one class index per pixel from 0, 255 for none: a grayscale or palette image, or an integer
                array (H, W).
            **options: see the class. height and width stretch the map; by default it keeps its size.

        Raises:
            TriptychError: the model takes no map, or a number is no class.
        """
        return self._run("semantic", options, {"class_map": class_map})

    def layout(self, boxes: Sequence[LayoutBox], **options: Unpack[GenerationArguments]) -> list[Image.Image]:
        """Generate images with objects inside given boxes (Rombach et al. 2022, Section 4.3.1).

        Args:
            boxes: (class, left, top, right, bottom) each, corners from 0 to 1, see
                `triptych.models.spatial_conditions.box_tokens`.
            **options: see the class.

        Raises:
            TriptychError: the model takes no boxes, or there are too many.
        """
        return self._run("layout", options, {}, boxes=tuple(boxes))

    def regenerate(
        self,
        source: GenerationRecord | ImageInput,
        *,
        init_image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        depth_map: ImageInput | None = None,
        class_map: ImageInput | None = None,
        **options: Unpack[GenerationArguments],
    ) -> list[Image.Image]:
        """Generate an image again from its metadata: with the same model, the same pixels.

        Args:
            source: an image of ours or of AUTOMATIC1111's web UI, as a path or an opened PIL image; or a record.
            init_image, mask_image, depth_map, class_map: the images it was made from, where they have moved.
            **options: replace what the metadata holds, see the class.

        Raises:
            TriptychError: the file has no metadata, or an image it was made from is missing.
        """
        record = source if isinstance(source, GenerationRecord) else image_metadata.read(source)
        fields, others = sampling_fields(options)
        records = with_seeds([replace(record, stopped_at=None, **fields)], others.pop("num_images", 1))
        images = {"init_image": init_image, "mask_image": mask_image}
        return self.generate(records, images | {"depth_map": depth_map, "class_map": class_map}, **others)

    def generate(
        self,
        records: Sequence[GenerationRecord],
        images: Mapping[str, ImageInput | None] | None = None,
        **options: Unpack[LoopArguments],
    ) -> list[Image.Image]:
        """Generate images from records, as every task does; see `SamplingLoop.run`."""
        return self.loop.run(records, images or {}, **options)

    @staticmethod
    def save(images: Sequence[Image.Image], out: str | os.PathLike[str]) -> list[Path]:
        """Write images with their metadata, see `image_metadata.save`."""
        return image_metadata.save(images, out)

    def _run(
        self,
        task: GenerationTask,
        options: GenerationArguments,
        images: Mapping[str, ImageInput | None],
        classes: Any = (),
        **fields: Any,
    ) -> list[Image.Image]:
        """Generate `num_images` images of a task, of each class if there are any."""
        sampling, others = sampling_fields(options)
        record = GenerationRecord(task=task, **fields, **sampling)
        if classes:
            check_task(self.config, record, self.source or "this model")
        records = [with_class(record, name, self.config, self.card) for name in classes] or [record]
        return self.generate(with_seeds(records, others.pop("num_images", 1)), images, **others)


def _texts(prompt: str, negative_prompt: str) -> dict[str, Any]:
    return {"prompt": prompt, "negative_prompt": negative_prompt}
