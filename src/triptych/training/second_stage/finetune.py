"""Fine-tuning a latent diffusion model by little: low-rank updates of some weights, or the rows of a new word."""

import copy
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import UserError
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

LORA, WORD = "lora.safetensors", "word.safetensors"


class Tuning(Network):
    """What learns of a model that stays as it is. That model is not among it, so that no average, optimiser or
    checkpoint carries it along."""

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        """The weights of `base` that change, as they are now; gradients reach what learns through them."""
        raise NotImplementedError

    def save(self, whole: LatentDiffusion, folder: Path, said: Mapping[str, str]) -> None:
        """Write what was learned, and nothing else, as other programs read it. `said` is of the run."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        return []


class LowRankTuning(Tuning):
    """Updates of the products of every attention of the denoiser, and of the text encoder where that is to learn.

    Queries, keys and values, one product here, have each an update of their own, as in other programs.
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
            raise UserError(
                "the denoiser has no attention, whose products low-rank updates are of; train all of it"
            )
        self.updates = nn.ModuleDict(
            {
                name.replace(".", "/"): LowRank(base.get_parameter(name), rank, alpha / rank, len(theirs))
                for name, theirs in self.names.items()
            }
        )

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        return {name: self.updates[name.replace(".", "/")](base.get_parameter(name)) for name in self.names}

    def save(self, whole: LatentDiffusion, folder: Path, said: Mapping[str, str]) -> None:
        layers, rank = {}, 0
        for name, theirs in self.names.items():
            update: Any = self.updates[name.replace(".", "/")]
            rank = update.rank
            for layer, (down, up) in zip(theirs, update.pairs(), strict=True):
                layers[layer] = (down.detach().clone(), up.detach().clone(), self.alpha)
        about = {"ss_network_dim": str(rank), "ss_network_alpha": str(self.alpha), **said}
        save_kohya(whole, folder / LORA, layers, about)


def _is_read(name: str, base: SecondStage) -> bool:
    """Whether the weight has a part in what the network gives: not in the last blocks of a text encoder that is read
    before its end."""
    found, text = re.match(r"text_encoder\.encoder\.(\d+)\.", name), base.config.text_encoder
    return (
        found is None
        or not isinstance(text, TextConfig)
        or int(found[1]) < text.depth - text.skip_last_blocks
    )


class WordTuning(Tuning):
    """The last rows of the text encoder's table: those of its newest word."""

    def __init__(self, base: SecondStage, word: str):
        super().__init__()
        self.config, self.card, self.word = base.config, base.card, word
        assert isinstance(base.text_encoder, TextEncoder)
        rows = base.text_encoder.tokenizer.added[word]
        self.vectors = nn.Parameter(base.text_encoder.tokens.weight[list(rows)].detach().clone())

    def tensors(self, base: SecondStage) -> dict[str, Tensor]:
        name = "text_encoder.tokens.weight"
        return {name: torch.cat([base.get_parameter(name)[: -len(self.vectors)], self.vectors])}

    def save(self, whole: LatentDiffusion, folder: Path, said: Mapping[str, str]) -> None:
        save_embedding(whole, self.word, folder / WORD)


class Tune(Denoise):
    """`Denoise` of a model that stays as it is but for what a `Tuning` makes of some of its weights. It wears these
    from one loss to the next, since blocks may be computed again when the gradient comes.

    Args:
        base: the whole of that model but its first stage; on the run's device.
        about: what the files are to say of the run.
    """

    def __init__(self, *how: Any, base: SecondStage, about: Mapping[str, str]):
        super().__init__(*how)
        self.base, self.about = base.eval().requires_grad_(False), about
        self.bare: dict[str, Any] = {}  # its own weights, where it wears others

    def error(
        self,
        model: Tuning,
        x0: Float[Tensor, "b c h w"],
        said: Condition,
        chosen: ConditionIndices,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        self.bare = put(self.base, self.changed(model))
        return super().error(self.base, x0, said, chosen, generator)

    def changed(self, net: Tuning) -> dict[str, Tensor]:
        """What `net` makes of the weights of the model, which is bare then; in fp32: updates are small beside them."""
        put(self.base, self.bare)
        self.bare = {}
        with torch.autocast(next(self.base.parameters()).device.type, enabled=False):
            return net.tensors(self.base)

    @torch.no_grad()
    def product(self, net: Tuning) -> LatentDiffusion:
        """The whole model, changed. It shares every weight that stays as it is."""
        changed = {
            name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self.changed(net).items()
        }
        whole = super().product(self.base)
        own = {id(tensor): tensor for tensor in itertools.chain(whole.parameters(), whole.buffers())}
        whole = copy.deepcopy(whole, own)
        put(whole, changed)
        return whole

    def keep(self, net: Any, figures: dict[str, float], out: Path) -> None:
        """Write what was learned into the run's folder."""
        net.save(self.product(net), out, self.about)


def put(net: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Give a network these tensors in the place of its parameters of those names. Returns what was there."""
    return {name: swap_parameter(net, name, tensor) for name, tensor in tensors.items()}


def make_tuning(config: SecondStageConfig, base: SecondStage) -> Tuning:
    """What learns of `base` in a run that does not train all of it.

    Raises:
        UserError: it has a DiT, whose updates nobody's files have a place for.
    """
    if config.train == "words":
        return WordTuning(base, config.word.name.strip())
    if not isinstance(base.config.network, UNetConfig):
        raise UserError(
            f"train=lora writes updates of a UNet, and init {config.init} has a DiT; give --train all"
        )
    lora = config.lora
    return LowRankTuning(base, lora.rank, lora.alpha, lora.feed_forward)


def metadata(
    config: SecondStageConfig, base: SecondStage, pictures: int, size: tuple[int, int]
) -> dict[str, str]:
    """What kohya's scripts say of a LoRA, of this run; web UIs show it, and tell by ss_v2 which models it is for."""
    said = {
        "ss_sd_model_name": Path(str(config.init)).name,
        "ss_num_train_images": str(pictures),
        "ss_resolution": str((size[1], size[0])),
        "ss_learning_rate": str(config.optim.lr),
        "ss_seed": str(config.loop.seed),
    }
    width, guesses = base.config.network.context_dim, base.config.process.prediction
    if width in (768, 1024):  # the widths of the text encoders of Stable Diffusion 1 and 2
        version = "sd_v1" if width == 768 else "sd_v2" + ("_v" if guesses == "v" else "")
        said |= {"ss_v2": str(width == 1024), "ss_base_model_version": version}
    return said
