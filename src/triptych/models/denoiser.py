"""Base of UNet and DiT: a denoising network that may attend to a prompt by cross-attention."""

from jaxtyping import Float
from torch import Tensor

from triptych.errors import ConfigError
from triptych.layers.cross_attention import Context, CrossAttention, ProjectedContext
from triptych.network import Network


class Prompted(Network):
    """A denoising network whose config has `in_channels`, and `context_dim`, which is 0 if it takes no prompt."""

    def project_context(self, context: Float[Tensor, "b m width"]) -> ProjectedContext:
        """Return the prompt's keys and values for every cross-attention. `forward` takes them in place of `context`.

        Raises:
            ConfigError: the network takes no prompt, or one of another width.
        """
        self._check_context(context)
        pairs = [part.project(context) for part in self._cross_attentions()]
        return ProjectedContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def _cross_attentions(self) -> list[CrossAttention]:
        return [part for part in self.modules() if isinstance(part, CrossAttention)]

    def _number_cross_attentions(self) -> None:
        """Give each cross-attention its index in `ProjectedContext`."""
        for index, part in enumerate(self._cross_attentions()):
            part.index = index

    def _check_inputs(self, x: Tensor, context: Context | None) -> None:
        """Check that channels and prompt fit the network."""
        config = self.config
        if x.shape[1] != config.in_channels:
            raise ConfigError(f"latents have {x.shape[1]} channels, the network takes {config.in_channels}")
        if context is not None:
            self._check_context(context)
        elif config.context_dim:
            raise ConfigError(f"the network takes a prompt: give `context`, (B, tokens, {config.context_dim})")

    def _check_context(self, context: Context) -> None:
        if not self.config.context_dim:
            raise ConfigError("the network takes no prompt; leave `context` out")
        if isinstance(context, Tensor) and context.shape[-1] != self.config.context_dim:
            raise ConfigError(
                f"the prompt's tokens are {context.shape[-1]} wide, the network takes {self.config.context_dim}; "
                "encode the prompt with the text encoder that belongs to it"
            )
