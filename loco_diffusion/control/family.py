"""What the toolkit must know of a backbone to control it; one implementation for each family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from loco_diffusion.control.joint import JointCondition
from loco_diffusion.control.rows import Rows
from loco_diffusion.control.sampling import Sampling
from loco_diffusion.errors import UserError

Pipeline: TypeAlias = Any
"""A diffusers.DiffusionPipeline, whose components and methods a type checker does not see."""

# By the denoiser's class; a module is imported when it is needed.
_FAMILIES = {
    "FluxTransformer2DModel": "flux:FluxFamily",
    "Flux2Transformer2DModel": "flux2:Flux2Family",
    "QwenImageTransformer2DModel": "qwenimage:QwenImageFamily",
    "SD3Transformer2DModel": "sd3:SD3Family",
    "PixArtTransformer2DModel": "pixart:PixArtFamily",
    "SanaTransformer2DModel": "sana:SanaFamily",
    "UNet2DConditionModel": "unet:UNetFamily",
}


class Family(Protocol):
    """A family of pipelines with the same kind of denoiser. B is the batch, C the latents' channels.

    Latents are (B, C, h, w), normalised as the denoiser sees them; pictures are (B, 3, H, W) in [0, 1]. A token
    is what the input layer makes one vector of: a square of latents, or for a UNet a single one.

    Attributes:
        spatial: whether the input layer's output is a map (B, hidden_size, h, w) and not a row of tokens.
        flow: whether the denoiser predicts a velocity, see `predict`; others predict noise, or what their
            scheduler's `prediction_type` says.
        linear_attention: whether self-attentions sum up keys and values.
        text_in_condition: whether a condition pass needs text tokens, which then precede the condition's.
    """

    spatial: bool
    flow: bool
    linear_attention: bool
    text_in_condition: bool

    def denoiser(self, pipe: Pipeline) -> nn.Module:
        """The model that adapters go into, without a compile wrapper."""

    def input_layer(self, denoiser: nn.Module) -> nn.Module:
        """The layer whose output, (B, tokens, hidden_size) or a map, the condition features are added to."""

    def self_attentions(self, denoiser: nn.Module) -> list[nn.Module]:
        """The attentions among image tokens, in any fixed order; cross-attentions to the text are none."""

    def guidance_copies(self, pipe: Pipeline) -> int:
        """2 where the pipeline, as it runs now, stacks both halves of classifier-free guidance, else 1."""

    def asks_one_half(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of the denoiser with these keyword arguments is for the conditional half only, where
        other calls are for both."""

    def watched(self, pipe: Pipeline) -> AbstractContextManager[None]:
        """The block in which a controlled pipeline runs, for what `guidance_copies` must see of it."""

    def hidden_size(self, denoiser: nn.Module) -> int:
        """Width of the input layer's output."""

    def token_channels(self, denoiser: nn.Module) -> int:
        """Channels of one packed token of latents."""

    def token_pixels(self, pipe: Pipeline) -> int:
        """Side, in pixels, of the square that one token covers."""

    def base_numbers(self, pipe: Pipeline) -> dict[str, int]:
        """The numbers of the base model's config that an adapter's weights depend on."""

    def grid(self, arguments: Mapping[str, Any]) -> tuple[int, int] | None:
        """Rows and columns of the tokens of the picture being drawn, from the keyword arguments of a denoiser
        call, if they tell; tokens of reference pictures, which come after it, are left out."""

    def pack(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as the denoiser's tokens (B, tokens, token_channels)."""

    def unpack(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Undo `pack`, for a grid of rows x columns tokens."""

    def encode_pictures(self, pipe: Pipeline, pictures: Tensor) -> Tensor:
        """Latents (the posterior's mode, float32) of pictures; without gradient."""

    def decode_latents(self, pipe: Pipeline, latents: Tensor) -> Tensor:
        """Pictures, float32, of latents as `encode_pictures` gives them; without gradient."""

    def default_sampling(self, pipe: Pipeline) -> Sampling:
        """The size, steps and guidance that suit the model."""

    def text_length(self, pipe: Pipeline) -> int:
        """Tokens that a prompt is padded or cut to."""

    def prompt_length(self, pipe: Pipeline, prompt: str) -> int:
        """Tokens of a prompt that is neither padded nor cut."""

    def guidance_arguments(self, pipe: Pipeline, guidance: float, batch: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a guidance scale and that many prompts; 1 is none."""

    def encode_prompts(self, pipe: Pipeline, prompts: list[str]) -> dict[str, Tensor]:
        """What `predict` needs to know of the prompts; without gradient."""

    def condition_text(self, pipe: Pipeline) -> dict[str, Tensor]:
        """What stands for a prompt, in a batch of 1, when a condition's tokens go through the denoiser alone:
        no text where the denoiser can do without, else the empty prompt."""

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        text: Mapping[str, Tensor],
        guidance: float | None = None,
        stride: int = 1,
    ) -> Tensor:
        """What the denoiser predicts, (B, C, h, w): the velocity noise - clean at the latents
        (1 - sigma) clean + sigma noise, or for a family that is not `flow` the noise or its like.

        Args:
            denoiser: the model, or a wrapper of it such as DistributedDataParallel.
            latents: (B, C, h, w).
            sigma: (B,) in [0, 1]: the time, 0 for clean latents; others than `flow` families have it as a share
                of their training timesteps.
            text: from `encode_prompts` or `condition_text`; a batch of 1 serves all rows.
            guidance: embedded guidance scale, for guidance-distilled models (None: 1); others ignore it.
            stride: how many tokens of the picture a token stands for along each side; positions are spread
                accordingly, each to the middle of those tokens.
        """

    def joint_forward(
        self, denoiser: nn.Module, conditions: Sequence[JointCondition], rows: Rows
    ) -> Callable[..., Any]:
        """A forward in place of the denoiser's own, in which conditions see the picture.

        Args:
            denoiser: the model.
            conditions: at least one.
            rows: of the denoiser's batch.

        Raises:
            UserError: the family has none.
        """


def family_of(pipe: Pipeline) -> Family:
    """The family of a pipeline.

    Raises:
        UserError: the pipeline's denoiser is of no known family, or missing.
    """
    for component in ("transformer", "unet"):
        for base in type(unwrapped(getattr(pipe, component, None))).__mro__:
            if base.__name__ in _FAMILIES:
                module, _, name = _FAMILIES[base.__name__].partition(":")
                family: Family = getattr(import_module(f"loco_diffusion.control.{module}"), name)()
                return family
    raise UserError(
        f"{type(pipe).__name__} cannot be controlled; use a pipeline with one of {', '.join(_FAMILIES)}."
    )


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    for attribute in ("module", "_orig_mod"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module):
            model = inner
    return model


def stack_rows(text: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    """Text embeddings of a batch of 1 for that many rows; larger batches stay."""
    return {name: t.expand(rows, *t.shape[1:]) if len(t) == 1 else t for name, t in text.items()}


def spread_positions(tokens: int, stride: int, device: torch.device) -> Tensor:
    """Positions (tokens,) along a side of tokens that each stand for `stride` of the picture's."""
    return torch.arange(tokens, device=device, dtype=torch.float32) * stride + (stride - 1) / 2
