"""The depth condition with a tiny, random DepthAnything network on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessor

from loco_diffusion.conditions import Depth
from loco_diffusion.errors import UserError


def tiny_network(folder: Path) -> DepthAnythingForDepthEstimation:
    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=28,
        patch_size=14,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
    )
    network = DepthAnythingForDepthEstimation(config)
    for weight in network.parameters():  # an untrained network hardly tells one picture from another
        torch.nn.init.normal_(weight, std=0.3)
    torch.nn.init.constant_(network.head.conv3.bias, 3.0)  # the last ReLU shall not cut everything off
    network.save_pretrained(folder)
    DPTImageProcessor(
        size={"height": 56, "width": 56}, ensure_multiple_of=14, keep_aspect_ratio=True
    ).save_pretrained(folder)
    return network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("depth")
    tiny_network(folder)
    return str(folder)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("size", [(128, 128), (100, 75), (61, 130)])
def test_map_has_the_picture_size_and_the_full_range(model: str, size: tuple[int, int]) -> None:
    depth = Depth(model=model)
    first = depth.extract(noise(size))
    pixels = np.asarray(first)
    assert first.mode == "RGB" and first.size == size
    assert (pixels[..., :1] == pixels).all() and pixels.min() == 0 and pixels.max() == 255
    assert first.tobytes() == depth.extract(noise(size), np.random.default_rng(0)).tobytes()


def test_constant_depth_is_black(tmp_path: Path) -> None:
    network = tiny_network(tmp_path)
    torch.nn.init.zeros_(network.head.conv3.weight)
    network.save_pretrained(tmp_path)
    assert np.asarray(Depth(model=str(tmp_path)).extract(noise((40, 30)))).max() == 0


def test_damaged_weights_are_reported(tmp_path: Path) -> None:
    network = tiny_network(tmp_path)
    torch.nn.init.constant_(network.head.conv3.bias, float("nan"))
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="NaN"):
        Depth(model=str(tmp_path)).extract(noise((40, 30)))


def test_half_precision_weights_are_computed_in_float32(tmp_path: Path, model: str) -> None:
    network = tiny_network(tmp_path)
    network.half().save_pretrained(tmp_path)
    half = np.asarray(Depth(model=str(tmp_path)).extract(noise((64, 64)))).astype(int)
    full = np.asarray(Depth(model=model).extract(noise((64, 64)))).astype(int)
    assert full.std() > 10 and np.abs(half - full).mean() < 3


@pytest.mark.parametrize("kind", ["missing", "empty", "text"])
def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "network"
    if kind != "missing":
        folder.mkdir()
    if kind == "text":
        (folder / "config.json").write_text("no json")
    with pytest.raises(UserError, match="cannot be loaded") as error:
        Depth(model=str(folder)).extract(noise((40, 30)))
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and "hub id or folder" in message
