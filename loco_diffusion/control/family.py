"""What the toolkit must know of a backbone to control it; one implementation for each family of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from loco_diffusion.errors import UserError

Pipeline: TypeAlias = Any
"""A diffusers.DiffusionPipeline, whose components and methods a type checker does not see."""


class Family(Protocol):
    """A family of pipelines with the same kind of denoiser. B is the batch, C the latents' channels.

    Latents are (B, C, h, w), normalised as the denoiser sees them; pictures are (B, 3, H, W) in [0, 1].
    """

    def supports(self, pipe: Pipeline) -> bool:
        """Whether the pipeline's denoiser is of this family."""

    def denoiser(self, pipe: Pipeline) -> nn.Module:
        """The model that adapters go into, without a compile wrapper."""

    def input_layer(self, denoiser: nn.Module) -> nn.Module:
        """The layer whose output, (B, tokens, hidden_size), the condition features are added to."""

    def hidden_size(self, denoiser: nn.Module) -> int:
        """Width of the input layer's output."""

    def token_channels(self, denoiser: nn.Module) -> int:
        """Channels of one packed token of latents."""

    def token_pixels(self, pipe: Pipeline) -> int:
        """Side, in pixels, of the square that one token covers."""

    def base_numbers(self, pipe: Pipeline) -> dict[str, int]:
        """The numbers of the base model's config that an adapter's weights depend on."""

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Rows and columns of image tokens, from the keyword arguments of a denoiser call, if they tell."""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the denoiser's tokens (B, tokens, token_channels)."""

    def unpack(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Undo `pack`; `height` and `width` are the latents' h and w."""

    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        """Latents (the posterior's mode, float32) of pictures; without gradient."""

    def text_length(self, pipe: Pipeline) -> int:
        """Tokens that a prompt is padded or cut to."""

    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """What `predict` needs to know of the prompts; without gradient."""

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None = None,
    ) -> Tensor:
        """Velocity (B, C, h, w) at noisy latents = (1 - sigma) * clean + sigma * noise, target noise - clean.

        Args:
            denoiser: the model, or a wrapper of it such as DistributedDataParallel.
            latents: (B, C, h, w).
            sigma: (B,) in [0, 1].
            text: from `encode_prompts`.
            guidance: embedded guidance scale, for guidance-distilled models (None: 1); others ignore it.
        """


def family_of(pipe: Pipeline) -> Family:
    """The family of a pipeline.

    Raises:
        UserError: the pipeline's denoiser is of no known family, or missing.
    """
    from loco_diffusion.control.flux import FluxFamily

    families: tuple[Family, ...] = (FluxFamily(),)
    for family in families:
        if family.supports(pipe):
            return family
    raise UserError(
        f"{type(pipe).__name__} cannot be controlled; use a pipeline with a FluxTransformer2DModel."
    )
