"""The condition features of the encoder route: computed once, added in every denoiser call."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from loco_diffusion.control.rows import Rows
from loco_diffusion.errors import UserError


@dataclass(frozen=True)
class Features:
    """What one condition adds to the input layer's output.

    Attributes:
        tensor: (B or 1, tokens, hidden_size) or (B or 1, hidden_size, rows, columns), times the strength.
        grid: rows and columns of its tokens.
    """

    tensor: Tensor
    grid: tuple[int, int]


@dataclass
class FeatureSum:
    """The features of all conditions together.

    Attributes:
        conditions: by name, at least one.
        token_pixels: side of a token in pixels, for messages.
        rows: of the denoiser's batch.
        drawn_grid: rows and columns of tokens of the picture being drawn, where they are known.
    """

    conditions: dict[str, Features]
    token_pixels: int
    rows: Rows
    drawn_grid: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        first, *others = (features.tensor for features in self.conditions.values())
        self._sum = sum(others, first) if len({t.shape[1:] for t in (first, *others)}) == 1 else first

    def add(self, hidden: Tensor) -> Tensor:
        """The input layer's output plus the features; same shape and dtype.

        Tokens of reference pictures, which come after the picture's, stay as they are.

        Raises:
            UserError: the maps are for another number or grid of tokens, or their number does not fit.
        """
        self._check(hidden)
        features = self.rows.spread_or_drop(self._sum.to(hidden), len(hidden), nothing=0.0)
        if hidden.ndim == 3 and hidden.shape[1] > features.shape[1]:
            features = F.pad(features, (0, 0, 0, hidden.shape[1] - features.shape[1]))
        return hidden + features

    def _check(self, hidden: Tensor) -> None:
        drawn = (hidden.shape[2], hidden.shape[3]) if hidden.ndim == 4 else self.drawn_grid
        for name, features in self.conditions.items():
            rows, columns = features.grid
            if features.grid == drawn or drawn is None and rows * columns == hidden.shape[1]:
                continue
            picture = f"{hidden.shape[1]} tokens"
            if drawn is not None:
                picture = f"{drawn[1] * self.token_pixels}x{drawn[0] * self.token_pixels} px"
            remedy = "pass a map of the picture's size"
            if drawn is None and hidden.shape[1] > rows * columns:
                remedy += ", or do not compile the denoiser if there are reference pictures"
            raise UserError(
                f"The map for {name!r} is {columns * self.token_pixels}x{rows * self.token_pixels} px "
                f"({rows * columns} tokens), but the picture has {picture}; {remedy}."
            )
