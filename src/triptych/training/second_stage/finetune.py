"""Parameter-efficient fine-tuning of a latent diffusion model: low-rank updates, or the embedding of a new word."""

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import CheckpointError, ConfigError
from triptych.kernels.modules import swap_parameter
from triptych.layers.lora import LowRank
from triptych.models.configs.text import TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import TextEncoder
from triptych.network import Network
from triptych.training.configs.second_stage import SecondStageConfig
from triptych.training.second_stage.conditions import Condition, ConditionIndices
from triptych.training.second_stage.task import Denoise, SecondStage
from triptych.weights import save_embedding
from triptych.weights.diffusion.lora import layer_names, save_kohya

LORA_FILE, WORD_FILE = "lora.safetensors", "word.safetensors"


class Tuning(Network):
    """The trained parameters of a fine-tuning run. The frozen model is not a submodule, so it is in no moving average,
    optimizer or checkpoint."""

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        """Return the changed weights of `base` by name. They are differentiable functions of the trained parameters."""
        raise NotImplementedError

    def save(self, model: LatentDiffusion, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write only the trained parameters, in a format that other programs read.

        Args:
            model: the complete, changed model.
            folder: the run's folder.
            metadata: metadata about the run for the file.
        """
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return []


class LowRankTuning(Tuning):
    """Low-rank updates of the matrix products of attention in the denoiser, and in the text encoder if it is trained.

    Queries, keys and values, which are one product here, each have their own update, as in other programs.

    Args:
        base: the frozen model.
        rank: rank of each update.
        alpha: each update is multiplied by alpha / rank.
        feed_forward: also update the MLPs of transformer blocks.

    Raises:
        CheckpointError: the model has no attention.
    """

    def __init__(self, base: SecondStage, rank: int, alpha: float, feed_forward: bool = False):
        super().__init__()
        self.config, self.card, self.alpha = base.config, base.card, alpha
        names = layer_names(base.config)
        wanted = r"\.(attn|cross)\.(qkv|q|kv|proj)\.weight" + (
            r"|\.mlp\.fc[12]\.weight" if feed_forward else ""
        )
        self.names = {
            name: names[name]
            for name, weight in base.named_parameters()
            if name in names and weight.ndim == 2 and re.search(f"({wanted})$", name) and _is_read(name, base)
        }
        if not self.names:
            raise CheckpointError(
                "the denoiser has no attention, and low-rank updates are of attention; give --train all"
            )
        self.updates = nn.ModuleDict(
            {
                name.replace(".", "/"): LowRank(base.get_parameter(name), rank, alpha / rank, len(layers))
                for name, layers in self.names.items()
            }
        )

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        return {name: self.updates[name.replace(".", "/")](base.get_parameter(name)) for name in self.names}

    def save(self, model: LatentDiffusion, folder: Path, metadata: Mapping[str, str]) -> None:
        layers, rank = {}, 0
        for name, kohya_layers in self.names.items():
            update: Any = self.updates[name.replace(".", "/")]
            rank = update.rank
            for layer, (down, up) in zip(kohya_layers, update.pairs(), strict=True):
                layers[layer] = (down.detach().clone(), up.detach().clone(), self.alpha)
        metadata = {"ss_network_dim": str(rank), "ss_network_alpha": str(self.alpha), **metadata}
        save_kohya(model, folder / LORA_FILE, layers, metadata)


def _is_read(name: str, base: SecondStage) -> bool:
    """Return whether the output depends on the weight. Skipped last blocks of a text encoder do not matter."""
    match, text = re.match(r"text_encoder\.encoder\.(\d+)\.", name), base.config.text_encoder
    return (
        match is None
        or not isinstance(text, TextConfig)
        or int(match[1]) < text.depth - text.skip_last_blocks
    )


class WordTuning(Tuning):
    """The embedding of the new word: the last rows of the text encoder's embedding table.

    Args:
        base: the frozen model, whose text encoder has the word.
        word: the new word.
    """

    def __init__(self, base: SecondStage, word: str):
        super().__init__()
        self.config, self.card, self.word = base.config, base.card, word
        assert isinstance(base.text_encoder, TextEncoder)
        rows = base.text_encoder.tokenizer.added[word]
        self.vectors = nn.Parameter(base.text_encoder.tokens.weight[list(rows)].detach().clone())

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        name = "text_encoder.tokens.weight"
        return {name: torch.cat([base.get_parameter(name)[: -len(self.vectors)], self.vectors])}

    def save(self, model: LatentDiffusion, folder: Path, metadata: Mapping[str, str]) -> None:
        save_embedding(model, self.word, folder / WORD_FILE)


class Tune(Denoise):
    """`Denoise` for a frozen model of which a `Tuning` changes some weights.

    The model has the changed weights from one loss to the next, since checkpointed blocks are computed again in the
    backward pass.

    Args:
        args: arguments of `Denoise`.
        base: the frozen model without its first stage, on the run's device.
        metadata: metadata about the run, for the saved files.
    """

    def __init__(self, *args: Any, base: SecondStage, metadata: Mapping[str, str]):
        super().__init__(*args)
        self.base, self.metadata = base.eval().requires_grad_(False), metadata
        self.original_parameters: dict[str, Any] = {}  # of those that `base` currently has replaced

    def error(
        self,
        model: Tuning,
        x0: Float[Tensor, "b c h w"],
        condition: Condition,
        indices: ConditionIndices,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        self.original_parameters = swap_parameters(self.base, self.changed_parameters(model))
        return super().error(self.base, x0, condition, indices, generator)

    def changed_parameters(self, net: Tuning) -> dict[str, Tensor]:
        """Return the changed weights, and restore the original ones of the model.

        They are computed in fp32, since updates are small compared to weights.
        """
        swap_parameters(self.base, self.original_parameters)
        self.original_parameters = {}
        with torch.autocast(next(self.base.parameters()).device.type, enabled=False):
            return net.tensors(self.base)

    @torch.no_grad()
    def product(self, net: Tuning) -> LatentDiffusion:
        """Return the complete, changed model. It shares all weights that do not change."""
        changed = {
            name: nn.Parameter(tensor, requires_grad=False)
            for name, tensor in self.changed_parameters(net).items()
        }
        model = super().product(self.base)
        shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
        model = copy.deepcopy(model, shared)
        swap_parameters(model, changed)
        return model

    def save_tuning(self, net: Any, _metrics: dict[str, float], out: Path) -> None:
        """Write the trained parameters into a folder."""
        net.save(self.product(net), out, self.metadata)


def swap_parameters(net: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Replace parameters of a network by name, and return the previous ones."""
    return {name: swap_parameter(net, name, tensor) for name, tensor in tensors.items()}


def make_tuning(config: SecondStageConfig, base: SecondStage) -> Tuning:
    """Return the trained parameters of a run that does not train all of `base`.

    Raises:
        ConfigError: low-rank updates of a DiT, for which there is no file format.
    """
    if config.train == "words":
        return WordTuning(base, config.word.name.strip())
    if not isinstance(base.config.network, UNetConfig):
        raise ConfigError(
            f"train=lora writes updates of a UNet, and init {config.init} has a DiT; give --train all"
        )
    lora = config.lora
    return LowRankTuning(base, lora.rank, lora.alpha, lora.feed_forward)


def kohya_metadata(
    config: SecondStageConfig, base: SecondStage, num_images: int, size: tuple[int, int]
) -> dict[str, str]:
    """Return the metadata that kohya's scripts write into a LoRA file.

    Web UIs show it, and use ss_v2 to know which models the file fits.
    """
    metadata = {
        "ss_sd_model_name": Path(str(config.init)).name,
        "ss_num_train_images": str(num_images),
        "ss_resolution": str((size[1], size[0])),
        "ss_learning_rate": str(config.optim.lr),
        "ss_seed": str(config.loop.seed),
    }
    width, prediction = base.config.network.context_dim, base.config.process.prediction
    if width in (768, 1024):  # the widths of the text encoders of Stable Diffusion 1 and 2
        version = "sd_v1" if width == 768 else "sd_v2" + ("_v" if prediction == "v" else "")
        metadata |= {"ss_v2": str(width == 1024), "ss_base_model_version": version}
    return metadata
