"""LoCO and LOFT adapters as LoRA, exactly: whatever the angles, W' - W is a product of two thin matrices."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from loco_diffusion.adapters.patterns import rank_pattern
from loco_diffusion.adapters.rotated import RotatedLayer
from loco_diffusion.errors import UserError

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


def to_lora(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """An adapter, at its present strength, as a LoRA of scale 1 (alpha is the rank).

    At another scale a LoRA is not the adapter at another strength: it scales the change instead of the angles.
    diffusers takes it as ``denoiser.load_lora_adapter(state, prefix=None)``, peft with :func:`lora_config`.
    The rank of a layer is 2 * r * num_rotations on each side for LoCO, r for LOFT; for a convolution the
    input side's counts once for each weight of the kernel.

    Args:
        model: has the adapter's layers; a PeftModel or any model that they were injected into.
        adapter_name: of a LoCO or LOFT adapter that is not merged.

    Returns:
        For each layer, named as in the base model, ``lora_A.weight``: (rank, in) and ``lora_B.weight``:
        (out, rank); for Conv2d (rank, in, height, width) and (out, rank, 1, 1). float32 (or float64).

    Raises:
        UserError: there is no such adapter, it is merged, its method is another one, it changes what a LoRA
            does not (magnitudes, biases, modules_to_save), or it is on a convolution that peft's LoRA layers
            get wrong, because it is dilated or pads with other values than zeros.
    """
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    config = getattr(base, "peft_config", {}).get(adapter_name)
    if config is None:
        raise UserError(f"The model has no adapter {adapter_name!r}; add or load it first.")
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise UserError(
            f"The adapter {adapter_name!r} also trains biases or whole modules (bias, modules_to_save), which a "
            "LoRA does not hold: merge it into the base model instead."
        )
    state: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer) and adapter_name in module._all_available_adapter_names():
            path = path.replace(".base_layer", "")  # another method's layer may be around this one
            up, down = _low_rank_delta(path, module, adapter_name)
            state |= {path + _DOWN: down.contiguous(), path + _UP: up.contiguous()}
    return state


def _low_rank_delta(path: str, layer: BaseTunerLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(layer, RotatedLayer):
        raise UserError(
            f"The adapter {adapter_name!r} is neither LoCO nor LOFT, so that its change of {path} may have any "
            "rank: merge it into the base model instead."
        )
    if layer.merged:
        raise UserError(f"{path} has merged adapters, which hide its own weights: unmerge them first.")
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        _check_convolution(path, base)
    return layer.low_rank_delta(adapter_name)


def _check_convolution(path: str, base: nn.Conv2d) -> None:
    """Raise UserError where peft's LoRA layer, which has the base's kernel, stride and padding only, differs."""
    kind = ""
    if base.kernel_size != (1, 1) and base.dilation != (1, 1):
        kind = "dilated convolution"
    elif base.padding_mode != "zeros" and any(base._reversed_padding_repeated_twice):  # of "same", too
        kind = f"convolution with {base.padding_mode} padding"
    if kind:
        raise UserError(
            f"{path} is a {kind}, which peft's LoRA layers do not follow: merge the adapter into the base model "
            "instead."
        )


def lora_config(state: Mapping[str, Tensor]) -> LoraConfig:
    """peft's config for a state dict of :func:`to_lora`: its layers, their ranks, and a scale of 1."""
    ranks = {path: len(down) for path, _, down in _layers(state)}
    rank, pattern = rank_pattern(ranks)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules="|".join(map(re.escape, ranks)),
    )


class Truncation(NamedTuple):
    """A LoRA of a smaller rank, and ||change - truncated change|| / ||change|| in the Frobenius norm."""

    state: dict[str, Tensor]
    errors: dict[str, float]  # by layer
    error: float  # of all layers together


def truncate(state: Mapping[str, Tensor], rank: int) -> Truncation:
    """The nearest LoRA of at most this rank, by the singular value decomposition of each layer's change.

    Args:
        state: from :func:`to_lora`.
        rank: at least 1; layers that do not have more keep theirs.

    Raises:
        UserError: rank is below 1.
    """
    if rank < 1:
        raise UserError(f"The rank of a LoRA is a whole number above 0, got {rank}.")
    truncated: dict[str, Tensor] = {}
    lost: dict[str, float] = {}
    total: dict[str, float] = {}
    for path, up, down in _layers(state):
        left, values, right = low_rank_svd(up, down)
        total[path], lost[path] = (float(v.square().sum()) for v in (values, values[rank:]))
        if rank < len(down):
            root = values[:rank].sqrt()
            up = (left[:, :rank] * root).to(up).view(-1, len(root), *up.shape[2:])
            down = (root[:, None] * right[:rank]).to(down).view(len(root), *down.shape[1:])
        truncated |= {path + _DOWN: down.contiguous(), path + _UP: up.contiguous()}
    errors = {path: _ratio(lost[path], total[path]) for path in lost}
    return Truncation(truncated, errors, _ratio(sum(lost.values()), sum(total.values())))


def low_rank_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of up @ down by that of a matrix of the rank's size.

    Args:
        up: (out, k) or (out, k, 1, 1), down: (k, in) or (k, in, kh, kw).

    Returns:
        U: (out, p), the p singular values from the largest on, V^T: (p, in) or (p, in * kh * kw), in float64;
        p is at most k.
    """
    left, left_core = torch.linalg.qr(up.flatten(1).double())
    right, right_core = torch.linalg.qr(down.flatten(1).double().mT)
    u, values, v = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return left @ u, values, v @ right.mT


def write_lora_file(path: Path, state: Mapping[str, Tensor], component: str) -> None:
    """Write a LoRA with its config as one file of diffusers' format, atomically.

    ``pipe.load_lora_weights(folder, weight_name=name)`` reads it.

    Args:
        path: a file name that ends in .safetensors.
        state: from :func:`to_lora`.
        component: what the pipeline calls the adapted model, "transformer" or "unet".

    Raises:
        UserError: the file cannot be written.
    """
    config = lora_config(state)
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    settings = {f"{component}.{name}": getattr(config, name) for name in names}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, sort_keys=True)}
    weights = {f"{component}.{name}": tensor.cpu() for name, tensor in state.items()}
    partial = path.parent / f".{secrets.token_hex(4)}.tmp"  # same folder: the rename is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, metadata)
        os.replace(partial, path)
    except Exception as error:  # safetensors has its own exception type
        raise UserError(f"{path} cannot be written ({error}); choose another file.") from error
    finally:
        with suppress(OSError):  # already renamed when all went well
            partial.unlink(missing_ok=True)


def _layers(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Path, up and down of every layer."""
    for name, down in state.items():
        if name.endswith(_DOWN):
            path = name.removesuffix(_DOWN)
            yield path, state[path + _UP], down


def _ratio(lost: float, total: float) -> float:
    return (lost / total) ** 0.5 if total else 0.0
