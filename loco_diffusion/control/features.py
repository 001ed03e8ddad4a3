"""The condition features of one `with controller(...)`: computed once, added in every denoiser call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loco_diffusion.control.encoder import ConditionEncoder
from loco_diffusion.control.map_tokens import MapTokens
from loco_diffusion.errors import UserError


@dataclass(frozen=True)
class ConditionInput:
    """One condition and its encoder.

    Attributes:
        map: of the encoder's input.
        strength: factor on the features.
        encoder: what turns the map's tokens into features.
    """

    map: MapTokens
    strength: float
    encoder: ConditionEncoder


@dataclass
class Features:
    """The sum of the features of all conditions, made in the first denoiser call, whose autocast and gradient
    modes it so obeys, and kept for the next ones while gradients are off.

    Attributes:
        inputs: the conditions by name; at least one. Batches are equal or 1.
        token_pixels: side of a token in pixels, for messages.
        keep: (B,) bool, False where a row's features are dropped (condition dropout in training), or None.
        drawn_grid: rows and columns of the tokens of the picture being drawn, where known.
    """

    inputs: dict[str, ConditionInput]
    token_pixels: int
    keep: Tensor | None = None
    drawn_grid: tuple[int, int] | None = None
    _kept: Tensor | None = field(default=None, init=False)

    @property
    def pending(self) -> bool:
        """Whether the next call will compute features without gradient: the moment to learn the grid."""
        return self._kept is None and not torch.is_grad_enabled()

    def add(self, hidden: Tensor) -> Tensor:
        """The input layer's output (B', tokens, hidden_size) plus the features; same shape and dtype.

        Raises:
            UserError: the maps are for another number or grid of tokens, or B' is no multiple of B.
        """
        features = None if torch.is_grad_enabled() else self._kept
        if features is None:
            self._check(hidden)
            features = self._sum(hidden.device).to(hidden.dtype)
            self._kept = None if torch.is_grad_enabled() else features
        repeats, rest = divmod(hidden.shape[0], features.shape[0])
        if rest:
            raise UserError(
                f"There are {features.shape[0]} condition maps for {hidden.shape[0]} pictures; pass one map, "
                "or as many maps as prompts."
            )
        # A pipeline lays out the pictures of one prompt side by side.
        return hidden + features.repeat_interleave(repeats, dim=0).to(hidden)

    def _sum(self, device: torch.device) -> Tensor:
        total: Tensor | None = None
        for condition in self.inputs.values():
            with torch.inference_mode(False):  # parameters moved in inference mode could never be trained
                condition.encoder.to(device)
            features = condition.strength * condition.encoder(condition.map.tokens.to(device))
            if self.keep is not None:
                features = features * self.keep.to(device)[:, None, None]
            total = features if total is None else total + features
        assert total is not None
        return total

    def _check(self, hidden: Tensor) -> None:
        for name, condition in self.inputs.items():
            rows, columns = condition.map.grid
            drawn = self.drawn_grid
            if hidden.shape[1] == rows * columns and drawn in (None, (rows, columns)):
                continue
            picture = f"{hidden.shape[1]} tokens"
            if drawn is not None and drawn[0] * drawn[1] == hidden.shape[1]:
                picture = f"{drawn[1] * self.token_pixels}x{drawn[0] * self.token_pixels} px"
            raise UserError(
                f"The map for {name!r} is {columns * self.token_pixels}x{rows * self.token_pixels} px "
                f"({rows * columns} tokens), but the picture has {picture}; pass a map of the picture's size."
            )
