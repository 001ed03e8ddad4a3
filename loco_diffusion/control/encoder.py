"""The condition encoder: from a condition map to features for the denoiser's input layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from loco_diffusion.errors import UserError

EncoderInput = Literal["pixels", "latents"]


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of a condition encoder.

    Attributes:
        input: "pixels" reads the map itself and keeps thin edges; "latents" reads the VAE's latents of it.
        hidden_size: width between the two layers.

    Raises:
        UserError: a value is out of its range.
    """

    input: EncoderInput = "pixels"
    hidden_size: int = 256

    def __post_init__(self) -> None:
        if self.input not in get_args(EncoderInput):
            known = " or ".join(get_args(EncoderInput))
            raise UserError(f"EncoderConfig.input must be {known}, got {self.input!r}.")
        size = self.hidden_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise UserError(f"EncoderConfig.hidden_size must be a whole number above 0, got {size!r}.")


@dataclass(frozen=True)
class TokensConfig:
    """Settings of the tokens route.

    Attributes:
        stride: tokens of the picture, along each side, that one token of the condition stands for; 2 makes the
            condition four times as cheap.
        joint: whether the condition's tokens see the picture and are computed anew in each step, as in
            OminiControl; FLUX.1 only.

    Raises:
        UserError: a value is out of its range.
    """

    stride: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stride, bool) or not isinstance(self.stride, int) or self.stride < 1:
            raise UserError(f"TokensConfig.stride must be a whole number above 0, got {self.stride!r}.")


class ConditionEncoder(nn.Module):
    """Two layers with SiLU between them: linear, for each token on its own, or 3 x 3 convolutions for a UNet.

    The second layer starts at zero, so that training starts at the base model. Parameters are float32.

    Args:
        in_features: channels of a token of the map.
        out_features: the denoiser's hidden size.
        config: the settings.
        spatial: whether tokens come as a map.
    """

    def __init__(
        self, in_features: int, out_features: int, config: EncoderConfig, spatial: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.in_features = in_features
        layer: Callable[[int, int], nn.Linear | nn.Conv2d] = nn.Linear
        if spatial:
            layer = partial(nn.Conv2d, kernel_size=3, padding=1)
        self.input_layer = layer(in_features, config.hidden_size)
        self.output_layer = layer(config.hidden_size, out_features)
        assert self.output_layer.bias is not None
        nn.init.zeros_(self.output_layer.weight)
        nn.init.zeros_(self.output_layer.bias)
        self.float()

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (B, tokens, out_features) of a map's tokens (B, tokens, in_features); or
        (B, out_features, rows, columns) of (B, in_features, rows, columns)."""
        features: Tensor = self.output_layer(F.silu(self.input_layer(tokens)))
        return features
