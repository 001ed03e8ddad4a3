"""Condition maps: from what a user passes to tensors, and to another size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from loco_diffusion.errors import UserError
from loco_diffusion.images import to_rgb, to_tensor

ConditionMap: TypeAlias = Image.Image | Sequence[Image.Image] | Tensor
"""A picture, a batch of pictures of one size, or a float tensor (B, 3, H, W) in [0, 1]."""


def map_tensor(maps: ConditionMap, name: str = "control", multiple: int = 1) -> Tensor:
    """Condition maps as a float32 tensor (B, 3, H, W) in [0, 1].

    Args:
        maps: see `ConditionMap`.
        name: the condition, for messages.
        multiple: what height and width must be multiples of.

    Raises:
        UserError: `maps` is none of those, empty, of several sizes, of a size that is no multiple, out of
            range or not finite.
    """
    tensor = _as_tensor(maps, name)
    height, width = tensor.shape[-2:]
    if height % multiple or width % multiple:
        raise UserError(
            f"The map for {name!r} is {width}x{height} px, but sides must be multiples of {multiple} px; "
            "resize it to the picture's size."
        )
    return tensor


def _as_tensor(maps: ConditionMap, name: str) -> Tensor:
    if isinstance(maps, Image.Image):
        maps = [maps]
    if isinstance(maps, Tensor):
        return _checked(maps, name)
    if not isinstance(maps, Sequence) or not maps or not all(isinstance(m, Image.Image) for m in maps):
        raise UserError(
            f"The map for {name!r} must be a PIL picture, a list of them or a tensor (B, 3, H, W) in [0, 1], "
            f"not {type(maps).__name__}."
        )
    sizes = {picture.size for picture in maps}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise UserError(f"The maps for {name!r} differ in size ({listed} px); resize them to one size.")
    return torch.stack([to_tensor(to_rgb(picture)) for picture in maps])


def _checked(maps: Tensor, name: str) -> Tensor:
    if maps.ndim != 4 or maps.shape[1] != 3 or not maps.numel() or not maps.is_floating_point():
        raise UserError(
            f"The map for {name!r} must be a float tensor (B, 3, H, W); got {maps.dtype} of shape "
            f"{tuple(maps.shape)}."
        )
    low, high = (bound.item() for bound in torch.aminmax(maps))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN; interpolation may overshoot by a rounding
        raise UserError(
            f"The map for {name!r} has values from {low:g} to {high:g}, but they must be in [0, 1]; "
            "divide 8-bit values by 255."
        )
    return maps.float()


def resize_map(maps: Tensor, condition: str, height: int, width: int) -> Tensor:
    """Bring condition maps to another size without leaving what the condition's maps look like.

    - canny: the maximum over the pixels that a new pixel covers (their repetition when enlarging), because
      interpolation turns one-pixel edges gray and picking single pixels loses them.
    - mask: antialiased among visible pixels only, and black wherever a new pixel touches the hidden (black)
      region, because a blend of hidden and visible pixels is neither.
    - others: antialiased bilinear interpolation.

    The aspect ratio is not kept. To extract a map anew from a picture of the right size is always better.

    Args:
        maps: (B, 3, H, W) in [0, 1].
        condition: the condition's name.
        height: new height in pixels.
        width: new width in pixels.

    Returns:
        (B, 3, height, width) in [0, 1]; `maps` itself if it has that size.
    """
    size = (height, width)
    if tuple(maps.shape[-2:]) == size:
        return maps
    if condition == "canny":
        return F.adaptive_max_pool2d(maps, size)
    resized = _interpolate(maps, size)
    if condition == "mask":
        hidden = (maps.amax(1, keepdim=True) == 0).to(maps)
        # Hidden pixels are zero; dividing by the visible weight takes them out of the averages.
        resized = resized / _interpolate(1 - hidden, size).clamp_min(1e-6)
        resized = resized * (1 - F.adaptive_max_pool2d(hidden, size))
    return resized.clamp(0, 1)


def _interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", antialias=True)
