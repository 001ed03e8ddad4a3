"""Recipe of the packaged base model: a Flux-shaped DiT and its text encoders, trained together on scenes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from loco_diffusion.control.flux import FluxFamily
from loco_diffusion.data.render import render
from loco_diffusion.data.scenes import COLORS, KINDS, MAX_OBJECTS, TRAIN_SEEDS, Scene, sample_scene
from loco_diffusion.embedded.loop import half_precision, train
from loco_diffusion.embedded.pictures import rendered_scenes
from loco_diffusion.embedded.text import build_text_encoders, build_tokenizers, share_capitals

SCENES, BATCH, TEXT_DROPOUT = 24_000, 48, 0.1
# Of the times, in training and drawing alike (SD3, arXiv 2403.03206, section 5.3.2): where solids are to stand is
# decided while the 32 channels of latents are nearly all noise.
TIME_SHIFT = 3.0
# Of tokens that show a solid, over others, when there is no noise. 400 steps with it, from step 11,000, left 1 to 2 %
# less error in them than 400 without, at every noise, and 2 % more in ground and sky.
SOLIDS_WEIGHT = 8.0
LAYOUT_WEIGHT = 0.5  # of the loss by which an inner layer learns what stands where
_LAYOUT_SIZE = 32  # pixels along a side of the pictures from which the layout is counted


def build_base(
    steps: int, vae: AutoencoderKL, runs: Path, device: str, compiled: bool = False
) -> FluxPipeline:
    """Train the transformer with its text encoders (or take them from their last checkpoint).

    Compiled, a step took 1.4 instead of 1.7 s on the two cores of an EPYC with AVX-512 BF16.
    """
    pipe = untrained_pipeline(vae.to(device))
    if compiled:
        for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
            block.compile(dynamic=False)
    model = nn.ModuleDict(
        {
            "transformer": pipe.transformer.to(device),
            "text_encoder": pipe.text_encoder.to(device),
            "text_encoder_2": pipe.text_encoder_2.to(device),
            "layout": layout_head(FluxFamily().hidden_size(pipe.transformer)).to(device),
        }
    ).train()
    latents = scene_latents(pipe, runs)
    scenes = [sample_scene(seed) for seed in TRAIN_SEEDS[:SCENES]]
    layouts = scene_layouts(scenes, latents.shape[-1] // FluxFamily.patch)
    clip_ids, t5_ids = _tokens(pipe, [scene.caption for scene in scenes] + [""])
    inner = KeptOutput(pipe.transformer.single_transformer_blocks[0])

    def loss_of_step(step: int) -> torch.Tensor:
        chosen, told = batch_of_step(step)
        layout = layouts[chosen].to(device)
        with half_precision(device):
            text = _read(model, clip_ids[told].to(device), t5_ids[told].to(device))
            loss = _loss(model["transformer"], latents[chosen].to(device).float(), text, layout)
            told_layout = model["layout"](inner.output[1])  # of the picture's tokens
        return loss + LAYOUT_WEIGHT * layout_loss(told_layout, layout)

    train(runs / "base", model, optimizers(model, lr=2e-3), loss_of_step, steps)
    share_capitals(pipe.tokenizer_2, pipe.text_encoder_2)
    model.eval()
    return pipe


def batch_of_step(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers (BATCH,) of a step's scenes and of their captions, SCENES for that of no text."""
    rng = np.random.default_rng(step)
    chosen = torch.from_numpy(rng.integers(SCENES, size=BATCH))
    return chosen, torch.where(torch.from_numpy(rng.random(BATCH) < TEXT_DROPOUT), SCENES, chosen)


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


def untrained_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """The pipeline around `vae` with fresh text encoders and a fresh transformer of about 11 M parameters."""
    clip, t5 = build_tokenizers()
    text_encoder, text_encoder_2 = build_text_encoders(clip, t5)
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * vae.config.latent_channels,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=text_encoder_2.config.d_model,
        pooled_projection_dim=text_encoder.config.hidden_size,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    _start_at_identity(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    )


def _start_at_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero the modulations and the output layer (adaLN-Zero, DiT, arXiv 2212.09748 section 3.2)."""
    for name, module in transformer.named_modules():
        if name.endswith(
            ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
        ):
            if name.endswith("proj_out") and name != "proj_out":
                continue  # the single blocks' own output layers
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def optimizers(model: nn.ModuleDict, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside transformer blocks, AdamW with learning rate `lr` for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer_blocks." in name and parameter.ndim == 2 and "norm" not in name
        (matrices if inside else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]


def _read(model: nn.ModuleDict, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "pooled_prompt_embeds": model["text_encoder"](clip_ids).pooler_output,
        "prompt_embeds": model["text_encoder_2"](t5_ids)[0],
        "text_ids": torch.zeros(t5_ids.shape[1], 3, device=t5_ids.device),
    }


def _loss(
    transformer: nn.Module, clean: torch.Tensor, text: dict[str, torch.Tensor], layouts: torch.Tensor
) -> torch.Tensor:
    """Flow matching (SD3, arXiv 2403.03206, equations 14 and 23) at the times that drawing takes.

    Logit-normal times, which are usual, hardly ever come near pure noise: one in 400 has sigma > .98, where drawing
    takes two of 20 steps, and what captions tell had been learnt for lower ones only. Every batch covers all times.
    """
    noise = torch.randn_like(clean)
    sigma = (torch.arange(len(clean)) + torch.rand(len(clean))).to(clean.device) / len(clean)
    sigma = TIME_SHIFT * sigma / (1 + (TIME_SHIFT - 1) * sigma)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    velocity = FluxFamily().predict(transformer, mixed, sigma, text)
    return velocity_loss(velocity - (noise - clean), 1 - sigma, layouts)


def _tokens(pipe: FluxPipeline, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the captions for both encoders."""
    return token_ids(pipe.tokenizer, captions), token_ids(pipe.tokenizer_2, captions)


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> torch.Tensor:
    """Token ids of the captions, padded as pipelines pad them."""
    told = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return told.input_ids


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
