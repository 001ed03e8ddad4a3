"""The condition encoder: from the tokens of a condition map to features of the denoiser's image tokens."""

from __future__ import annotations

from dataclasses import dataclass
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


class ConditionEncoder(nn.Module):
    """Two linear layers with SiLU between them, for each token on its own.

    The second layer starts at zero, so that training starts at the base model. Parameters are float32.

    Args:
        in_features: channels of a token of the map.
        out_features: the denoiser's hidden size.
        config: the settings.
    """

    def __init__(self, in_features: int, out_features: int, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.input_layer = nn.Linear(in_features, config.hidden_size)
        self.output_layer = nn.Linear(config.hidden_size, out_features)
        nn.init.zeros_(self.output_layer.weight)
        nn.init.zeros_(self.output_layer.bias)
        self.float()

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (B, tokens, out_features) of a map's tokens (B, tokens, in_features)."""
        return self.output_layer(F.silu(self.input_layer(tokens)))
