"""The target presets against tiny instances of the denoisers they are for."""

from __future__ import annotations

from collections.abc import Callable

import diffusers
import pytest
from peft import inject_adapter_in_model
from torch import nn

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters import LoCOLayer, default_target_modules
from loco_diffusion.adapters.targets import DENOISERS, PRESETS

_SMALL = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
_UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_single_layers=1,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
        **_SMALL,
    ),
    "flux2": lambda: diffusers.Flux2Transformer2DModel(
        in_channels=4,
        num_single_layers=1,
        joint_attention_dim=16,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        **_SMALL,
    ),
    "sd3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
        **_SMALL,
    ),
    "pixart": lambda: diffusers.PixArtTransformer2DModel(
        cross_attention_dim=32, sample_size=8, caption_channels=16, use_additional_conditions=True, **_SMALL
    ),
    "sana": lambda: diffusers.SanaTransformer2DModel(
        in_channels=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        **_SMALL,
    ),
    "sana with guidance": lambda: diffusers.SanaTransformer2DModel(
        in_channels=4,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=16,
        sample_size=8,
        guidance_embeds=True,
        **_SMALL,
    ),
    "qwen": lambda: diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 2, 2), **_SMALL
    ),
    "unet": lambda: diffusers.UNet2DConditionModel(**_UNET),
    "unet like sdxl": lambda: diffusers.UNet2DConditionModel(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
        encoder_hid_dim=8,
        encoder_hid_dim_type="text_proj",
        **_UNET,
    ),
}
_FEED_FORWARD = ("ff", "ff_context", "img_mlp", "txt_mlp", "proj_mlp", "proj_out")


def intended(model: nn.Module, preset: str) -> set[str]:
    """By what the layers are, not by the presets' expressions."""
    attentions = {
        name
        for name, module in model.named_modules()
        if type(module).__name__.split("Attn")[0].endswith("Attention")
    }
    names = set()
    for name, module in model.named_modules():
        parts = name.split(".")
        is_linear = isinstance(module, nn.Linear)
        in_attention = any(".".join(parts[:depth]) in attentions for depth in range(len(parts)))
        in_block = any("blocks" in part for part in parts)
        is_block_output = "attentions" in parts and parts[-1] in ("proj_in", "proj_out")  # of a UNet
        in_ff = in_block and any(part in _FEED_FORWARD for part in parts) and not is_block_output
        pointwise = isinstance(module, nn.Conv2d) and module.groups == 1 and in_ff
        all_linear = preset == "all-linear" and (is_linear or is_block_output) and name != "proj_out"
        with_ff = preset != "attention" and in_ff and (is_linear or pointwise)
        if (in_attention and is_linear) or with_ff or all_linear:
            names.add(name)
    return names


@pytest.mark.parametrize("name", MODELS)
def test_presets_match_the_intended_layers(name: str) -> None:
    for preset in PRESETS:
        model = MODELS[name]()
        inject_adapter_in_model(LoCOConfig(r=1, num_rotations=1, target_modules=preset), model)
        adapted = {path for path, module in model.named_modules() if isinstance(module, LoCOLayer)}
        expected = intended(model, preset)
        assert adapted == {path.removesuffix(".base_layer") for path in expected}
        assert expected


def test_known_denoisers() -> None:
    assert {type(make()).__name__ for make in MODELS.values()} == set(DENOISERS)
    assert default_target_modules("Net") is None
    assert default_target_modules("FluxTransformer2DModel", "ff") is None
