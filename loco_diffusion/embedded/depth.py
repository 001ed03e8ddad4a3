"""Recipe of the packaged depth network: a small Depth Anything, trained on the scenes' exact depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

from loco_diffusion.data.scenes import TRAIN_SEEDS
from loco_diffusion.embedded.loop import train
from loco_diffusion.embedded.pictures import SIZE, rendered_scenes

SCENES, BATCH = 6000, 16


def build_depth(
    steps: int, runs: Path, device: str
) -> tuple[DepthAnythingForDepthEstimation, DPTImageProcessor]:
    """Train the depth network; it predicts inverse depth in [0, 1], near is 1, the sky is 0."""
    torch.manual_seed(0)
    network = DepthAnythingForDepthEstimation(_config()).to(device).train()
    pictures, depths = rendered_scenes(TRAIN_SEEDS[:SCENES], runs)

    def loss_of_step(step: int) -> torch.Tensor:
        chosen = torch.from_numpy(np.random.default_rng(step).integers(SCENES, size=BATCH))
        pixels = pictures[chosen].to(device).float() / 127.5 - 1
        error = network(pixel_values=pixels).predicted_depth - depths[chosen].to(device).float() / 255
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + edges

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    train(runs / "depth", network, [optimizer], loss_of_step, steps)
    processor = DPTImageProcessor(
        size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        keep_aspect_ratio=True,
        ensure_multiple_of=8,
    )
    return network.eval(), processor


def _config() -> DepthAnythingConfig:
    backbone = Dinov2Config(
        image_size=SIZE,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        mlp_ratio=3,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    return DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=96,
        neck_hidden_sizes=[16, 32, 48, 64],
        fusion_hidden_size=24,
        head_hidden_size=16,
    )
