"""Control scores of single pictures; the classes beside this file average them over a data set.

Pictures and maps are float tensors (N, 3, H, W) in [0, 1]. They are rounded to 8 bits first, so that a score
is that of the saved files. A condition that is costly to extract (edges, depth) comes in as a map.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from loco_diffusion.conditions.deblur import Deblur
from loco_diffusion.images import to_pil, to_tensor


def edge_f1(preds: Tensor, target: Tensor, tolerance: int = 0) -> Tensor:
    """F1 of edge maps, per picture.

    Without tolerance it is 2 TP / (2 TP + FP + FN) over pixels. With a tolerance of t pixels, precision is
    the part of the predicted edge pixels with a target edge among the (2t+1) x (2t+1) pixels around them,
    recall the same with the roles exchanged, and F1 their harmonic mean. Two empty maps score 1, one 0.

    Args:
        preds: edge maps (N, 3, H, W) of the generated pictures, in [0, 1]; an edge is a value above 0.5.
        target: edge maps (N, 3, H, W) of the input pictures.
        tolerance: in pixels.

    Returns:
        Scores (N,) in [0, 1].

    Example:
        >>> target = torch.zeros(1, 3, 8, 8)
        >>> target[..., 4] = 1
        >>> edge_f1(target.roll(1, dims=-1), target), edge_f1(target.roll(1, dims=-1), target, tolerance=1)
        (tensor([0.]), tensor([1.]))
    """
    _check(preds, target)
    found, wanted = _edges(preds), _edges(target)
    found_count, wanted_count = found.sum((1, 2, 3)), wanted.sum((1, 2, 3))
    # Hits over count, with a count of 0 giving 0: an empty map has no hits.
    precision = (found * _dilate(wanted, tolerance)).sum((1, 2, 3)) / found_count.clamp(min=1)
    recall = (wanted * _dilate(found, tolerance)).sum((1, 2, 3)) / wanted_count.clamp(min=1)
    both = precision + recall
    f1 = torch.where(both > 0, 2 * precision * recall / both.clamp(min=torch.finfo(both.dtype).tiny), 0.0)
    return torch.where((found_count == 0) & (wanted_count == 0), 1.0, f1)


def pixel_mse(preds: Tensor, target: Tensor) -> Tensor:
    """Mean squared error on the scale 0..255, per picture; of depth maps it is the depth error.

    Args:
        preds: pictures or maps (N, 3, H, W) in [0, 1].
        target: pictures or maps (N, 3, H, W) in [0, 1].

    Returns:
        Errors (N,) in 0..65025.

    Example:
        >>> pixel_mse(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 10 / 255))
        tensor([100.])
    """
    _check(preds, target)
    return (_to_8bit(preds) - _to_8bit(target)).square().mean((1, 2, 3))


def masked_mse(preds: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean squared error on the scale 0..255 over the hidden pixels only, per picture.

    Args:
        preds: generated pictures (N, 3, H, W) in [0, 1].
        target: original pictures (N, 3, H, W) in [0, 1].
        hidden: boolean (N, H, W), True on the pixels that the model had to fill in.

    Returns:
        Errors (N,) in 0..65025.

    Raises:
        ValueError: a picture has no hidden pixel.

    Example:
        >>> hidden = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> hidden[:, :4] = True
        >>> masked_mse(hidden[:, None].expand(1, 3, 8, 8) / 255, torch.zeros(1, 3, 8, 8), hidden)
        tensor([1.])
    """
    _check(preds, target)
    if hidden.shape != (preds.shape[0], *preds.shape[2:]):
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, the pictures {tuple(preds.shape)}")
    weight = hidden.to(preds.device, torch.float32)
    count = weight.sum((1, 2))
    if not bool((count > 0).all()):
        raise ValueError("every picture needs at least one hidden pixel")
    error = (_to_8bit(preds) - _to_8bit(target)).square().mean(1)
    return (error * weight).sum((1, 2)) / count


def gray_mse(preds: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the luma on the scale 0..255, per picture: are the given grays kept?

    Args:
        preds: pictures (N, 3, H, W) in [0, 1].
        target: pictures (N, 3, H, W) in [0, 1].

    Returns:
        Errors (N,) in 0..65025.

    Example:
        >>> gray_mse(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 10 / 255))
        tensor([100.])
    """
    _check(preds, target)
    return (luma(preds) - luma(target)).square().mean((1, 2))


def blur_mse(preds: Tensor, target: Tensor, radius: float = 5.0) -> Tensor:
    """Mean squared error of the blurred pictures on the scale 0..255, per picture: is the given blur kept?

    Args:
        preds: pictures (N, 3, H, W) in [0, 1].
        target: pictures (N, 3, H, W) in [0, 1].
        radius: of the blur of both, in pixels at a short side of 512, as in `conditions.Deblur`.

    Returns:
        Errors (N,) in 0..65025.

    Example:
        >>> blur_mse(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 10 / 255))
        tensor([100.])
    """
    _check(preds, target)
    blur = Deblur(radius=radius).extract  # the builder itself, so that scorer and condition blur alike
    blurred = [
        torch.stack([to_tensor(blur(to_pil(picture))) for picture in pictures]) if len(pictures) else pictures
        for pictures in (preds, target)
    ]
    return pixel_mse(*blurred).to(preds.device)


def luma(pictures: Tensor) -> Tensor:
    """ITU-R 601 luma (N, H, W), 0..255 as Pillow's `convert("L")` rounds it, of pictures (N, 3, H, W)."""
    red, green, blue = _to_8bit(pictures).int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) // 65536).float()


def _to_8bit(pictures: Tensor) -> Tensor:
    return (pictures.float() * 255).round()


def _edges(maps: Tensor) -> Tensor:
    """(N, 3, H, W) to 0 or 1, (N, 1, H, W)."""
    return (maps.float().mean(1, keepdim=True) > 0.5).float()


def _dilate(edges: Tensor, radius: int) -> Tensor:
    return max_pool2d(edges, 2 * radius + 1, stride=1, padding=radius) if radius else edges


def _check(preds: Tensor, target: Tensor) -> None:
    if preds.shape != target.shape or preds.ndim != 4 or preds.shape[1] != 3:
        shapes = f"{tuple(preds.shape)} and {tuple(target.shape)}"
        raise ValueError(f"expected two tensors of one shape (N, 3, H, W), got {shapes}")
    for tensor in (preds, target):
        if tensor.numel() and not bool((tensor.min() >= 0) & (tensor.max() <= 1)):  # NaN fails too
            raise ValueError("pictures and maps must have values in [0, 1], without NaN")
