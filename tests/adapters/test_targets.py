"""Which layers adapters sit on: refusals, selections, and presets against tiny instances of the denoisers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
from method_helpers import METHODS, TARGETS, Case, net
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from loco_diffusion.adapters import default_target_modules
from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.targets import DENOISERS, PRESETS
from loco_diffusion.errors import UserError

FAMILIES = ("loco", "loft", "loca")


def adapted(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)}


# Refusals.


@pytest.mark.parametrize("method", FAMILIES)
def test_a_target_that_does_not_exist(method: str) -> None:
    with pytest.raises(UserError, match="found nothing to adapt in Net"):
        get_peft_model(net(), METHODS[method](target_modules=["third"]))


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize(
    "target",
    [nn.Conv2d(64, 64, 1, groups=2), nn.Conv1d(64, 64, 1), nn.LayerNorm(64)],
    ids=lambda target: type(target).__name__,
)
def test_other_layers_are_refused(method: str, target: nn.Module) -> None:
    with pytest.raises(UserError, match=f"'0' is a {type(target).__name__}"):
        get_peft_model(nn.Sequential(target), METHODS[method](target_modules=["0"]))


@pytest.mark.parametrize("method", FAMILIES)
def test_a_layer_that_torch_bypasses_is_refused(method: str) -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2)})
    with pytest.raises(UserError, match="'attention.out_proj' is a NonDynamicallyQuantizableLinear"):
        get_peft_model(attention, METHODS[method](target_modules=["out_proj"]))


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("by_pattern", [False, True])
@pytest.mark.parametrize(
    ("method", "r", "message"),
    [
        ("loco", 5, r"30 \(r = 5, num_rotations = 3\) exceeds the 24 inputs"),
        ("loco-output", 9, r"36 \(r = 9, num_rotations = 2\) exceeds the 32 outputs"),
        ("loft", 25, "r = 25 exceeds the 24 inputs"),
        ("loft-free", 25, "r = 25 exceeds the 24 inputs"),
    ],
)
def test_more_directions_than_channels(
    method: str, r: int, message: str, by_pattern: bool, kind: str
) -> None:
    settings = {"rank_pattern": {TARGETS[kind][0]: r}} if by_pattern else {"r": r}
    with pytest.raises(UserError, match=message):
        Case(method, kind).model(**settings)


@pytest.mark.parametrize(("kind", "weights"), [("linear", 32 * 24), ("conv2d", 32 * 24 * 9)])
def test_more_coefficients_than_weights(kind: str, weights: int) -> None:
    message = f"num_coefficients = {weights + 1} coefficients in a target layer of {weights} weights"
    with pytest.raises(UserError, match=message):
        Case("loca", kind).model(num_coefficients=weights + 1)


# Selections.


class Blocks(nn.Module):
    """Two lists of blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(24, 24)}) for _ in range(3))
        self.inner = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(24, 24)}) for _ in range(3))


@pytest.mark.parametrize("method", FAMILIES)
@pytest.mark.parametrize("targets", [["proj"], r".*\.proj"])
@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"layers_to_transform": 1}, {"outer.1.proj", "inner.1.proj"}),
        ({"layers_to_transform": [0, 2], "layers_pattern": "inner"}, {"inner.0.proj", "inner.2.proj"}),
        ({"exclude_modules": r"blocks\.outer\..*"}, {f"inner.{i}.proj" for i in range(3)}),
    ],
)
def test_selection_of_blocks(
    method: str, targets: Any, selection: dict[str, Any], expected: set[str]
) -> None:
    model = nn.ModuleDict({"blocks": Blocks()})
    inject_adapter_in_model(METHODS[method](target_modules=targets, **selection), model)
    assert adapted(model) == {f"blocks.{name}" for name in expected}


# Presets.

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


# Every layer of the tiny models is wide enough for these.
SMALLEST: dict[str, dict[str, Any]] = {
    "loco": {"r": 1, "num_rotations": 1},
    "loft": {"r": 2},
    "loca": {"num_coefficients": 1},
}


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "loco") for name in MODELS), ("flux", "loft"), ("sana", "loca")]
)
def test_presets_match_the_intended_layers(name: str, method: str) -> None:
    for preset in PRESETS:
        model = MODELS[name]()
        inject_adapter_in_model(METHODS[method](target_modules=preset, **SMALLEST[method]), model)
        expected = intended(model, preset)
        assert adapted(model) == {path.removesuffix(".base_layer") for path in expected}
        assert expected


def test_known_denoisers() -> None:
    assert {type(make()).__name__ for make in MODELS.values()} == set(DENOISERS)
    assert default_target_modules("Net") is None
    assert default_target_modules("FluxTransformer2DModel", "ff") is None
