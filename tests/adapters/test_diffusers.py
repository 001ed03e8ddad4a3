"""The adapters' life inside a diffusers model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from method_helpers import METHODS, assert_close, weaken
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor

from loco_diffusion.adapters.adapted import AdaptedLayer
from loco_diffusion.adapters.config import AdapterConfig


def flux(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return (
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 2, 2),
        )
        .to(dtype)
        .eval()
    )


def run_flux(model: FluxTransformer2DModel, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    dtype = model.x_embedder.weight.dtype
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 6, 4, generator=generator).to(dtype),
            encoder_hidden_states=torch.randn(1, 3, 16, generator=generator).to(dtype),
            pooled_projections=torch.randn(1, 8, generator=generator).to(dtype),
            timestep=torch.tensor([0.5], dtype=dtype),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(3, 3),
            joint_attention_kwargs={"scale": scale},
        ).sample


def config(method: str, **changes: Any) -> AdapterConfig:
    return METHODS[method](**{"init_weights": False, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_strength(method: str) -> None:
    model = flux()
    plain = run_flux(model)
    model.add_adapter(config(method), "a")
    model.add_adapter(config(method), "b")
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model.set_adapters(["a"], [1.0])
    full = run_flux(model)
    assert not torch.allclose(full, plain, atol=1e-3)
    assert torch.equal(run_flux(model, scale=0.0), plain)
    half = run_flux(model, scale=0.5)
    assert torch.equal(run_flux(model), full)
    model.set_adapters(["a"], [0.5])
    assert torch.equal(run_flux(model), half)
    model.set_adapters(["a", "b"], [1.0, 0.0])
    assert torch.equal(run_flux(model), full)
    model.disable_adapters()
    assert torch.equal(run_flux(model), plain)
    model.enable_adapters()
    model.set_adapters(["a"], [1.0])
    model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    assert_close(run_flux(model), half)
    model.unfuse_lora()
    model.set_adapters(["a"], [1.0])
    assert_close(run_flux(model), full)
    model.delete_adapters("b")
    assert_close(run_flux(model), full)
    for layer in adapted(model):
        weaken(layer, "a")
    assert_close(run_flux(model), half)
    model.unload_lora()
    assert not adapted(model)
    assert_close(run_flux(model), plain)


def adapted(model: FluxTransformer2DModel) -> list[AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, AdaptedLayer)]


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_model_gets_float32_adapter(method: str) -> None:
    model = flux(torch.bfloat16)
    plain = run_flux(model)
    inject_adapter_in_model(config(method, init_weights=True), model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(run_flux(model), plain)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora_first", [True, False])
def test_stacks_with_lora(method: str, lora_first: bool) -> None:
    """On a layer that both adapt, the inner one is the base layer of the outer one, merged or not."""
    model = flux()
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    configs: list[PeftConfig] = [lora, config(method)] if lora_first else [config(method), lora]
    for name, adapter_config in zip("ab", configs, strict=True):
        inject_adapter_in_model(adapter_config, model, name)
    expected = run_flux(model)
    for module in reversed(list(model.modules())):  # inner ones first
        if hasattr(module, "merge"):
            module.merge()
    assert_close(run_flux(model), expected)
