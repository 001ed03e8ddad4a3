"""What both bases learn from: the scenes' latents and captions, where their solids are, and how errors count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from loco_diffusion.control.flux import FluxFamily
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import COLORS, KINDS, MAX_OBJECTS, TRAIN_SEEDS, Scene
from loco_diffusion.embedded.loop import half_precision
from loco_diffusion.embedded.pictures import rendered_scenes

SCENES, BATCH, TEXT_DROPOUT = 24_000, 48, 0.1
# Of tokens that show a solid, over others, when there is no noise. 400 steps with it, from step 11,000, left 1 to 2 %
# less error in them than 400 without, at every noise, and 2 to 3 % more elsewhere.
SOLIDS_WEIGHT = 8.0
LAYOUT_WEIGHT = 0.5  # of the loss by which an inner layer learns what stands where
_LAYOUT_SIZE = 32  # pixels along a side of the pictures from which the layout is counted


def batch_of_step(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers (BATCH,) of a step's scenes and of their captions, SCENES for that of no text."""
    rng = np.random.default_rng(step)
    chosen = torch.from_numpy(rng.integers(SCENES, size=BATCH))
    return chosen, torch.where(torch.from_numpy(rng.random(BATCH) < TEXT_DROPOUT), SCENES, chosen)


def scene_latents(pipe: DiffusionPipeline, runs: Path) -> torch.Tensor:
    """Normalised latents (SCENES, 32, 16, 16) of the training scenes, float16, kept beside the checkpoints."""
    path = runs / "base" / "latents.safetensors"
    if path.exists():
        return load_file(path)["latents"]
    pictures, _ = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)
    with half_precision(pipe.vae.device.type):
        parts = [
            FluxFamily().encode_pictures(pipe, part.float() / 255).half().cpu()
            for part in track(pictures.split(32), description=f"Encoding {SCENES} scenes")
        ]
    latents = torch.cat(parts).contiguous()  # a VAE may compute channels-last
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"latents": latents}, path)
    return latents


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> torch.Tensor:
    """Token ids of the captions, padded as pipelines pad them."""
    told = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return told.input_ids


def scene_layouts(scenes: Sequence[Scene], side: int) -> torch.Tensor:
    """Shares of each token's pixels by kind and by colour, and its mean depth: (N, side², 15) in [0, 1], float16.

    That an inner layer learns to tell what stands where makes a diffusion transformer learn several times faster
    (REPA, arXiv 2410.06940, which takes the features of a pretrained network; scenes know their own).
    """
    parts = []
    for start in track(range(0, len(scenes), 64), description="Counting layouts"):
        batch = scenes[start : start + 64]
        drawn = render(batch, _LAYOUT_SIZE)
        shares = nn.functional.adaptive_avg_pool2d(drawn.masks.float(), side)
        kinds, colors = (
            torch.stack(
                [_one_hot([getattr(solid, name) for solid in scene.solids], names) for scene in batch]
            )
            for name, names in (("kind", KINDS), ("color", tuple(COLORS)))
        )
        depth = nn.functional.adaptive_avg_pool2d(drawn.depth[:, None], side)
        by_name = torch.einsum("bshw,bsn->bnhw", shares, torch.cat([kinds, colors], dim=2))
        parts.append(torch.cat([by_name, depth], dim=1).flatten(2).mT.half())
    return torch.cat(parts)


def _one_hot(chosen: list[str], names: Sequence[str]) -> torch.Tensor:
    """(MAX_OBJECTS, len(names)), rows of zeros where nothing is chosen."""
    rows = torch.zeros(MAX_OBJECTS, len(names))
    rows[range(len(chosen)), [names.index(name) for name in chosen]] = 1
    return rows


def velocity_loss(error: torch.Tensor, signal: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    """Mean square of velocities' errors in which solids weigh more, the more so the less noise there is.

    Solids cover a fifth of the tokens and are nearly all that is hard to draw. Under pure noise all weigh the same:
    what is to be there is not known then, and a weight that depends on it would draw more solids than there are.

    Args:
        error: (B, C, h, w).
        signal: (B,) share of the clean latents, 0 to 1.
        layouts: of the batch, from `scene_layouts`, (B, T, 15).
    """
    rows, columns = error.shape[-2:]
    solid = (layouts[..., : len(KINDS)].sum(2) > 0).float()
    weight = 1 + SOLIDS_WEIGHT * signal[:, None] * solid
    side = math.isqrt(weight.shape[1])
    weight = nn.functional.interpolate(weight.view(-1, 1, side, side), size=(rows, columns), mode="nearest")
    return (error.float().square() * weight).mean() / weight.mean()


class KeptOutput:
    """What a block of the denoiser gave last."""

    output: Any

    def __init__(self, block: nn.Module) -> None:
        block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, output: object) -> None:
        self.output = output


def layout_head(width: int) -> nn.Module:
    """What reads the layout from inner tokens of that width; only training needs it."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(KINDS) + len(COLORS) + 1))


def layout_loss(logits: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the layout head's logits and `scene_layouts`, both (B, T, 15)."""
    return nn.functional.binary_cross_entropy_with_logits(logits.float(), layouts.float())


def optimizers(model: nn.ModuleDict, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW with learning rate `lr` for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks." in name and parameter.ndim == 2 and "norm" not in name
        (matrices if inside else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]
