"""Conditions whose tokens see the picture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class JointCondition:
    """A condition whose tokens run beside the picture's in every step.

    Attributes:
        adapter: the name of its adapter.
        tokens: packed latents, (B, rows * columns, token_channels).
        grid: rows and columns of its tokens.
        stride: see `TokensConfig`.
        bias: what is added to the logits of its keys, see `attention.Recall`.
    """

    adapter: str
    tokens: Tensor
    grid: tuple[int, int]
    stride: int
    bias: Tensor | None
