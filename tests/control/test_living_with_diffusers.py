"""Control beside what else diffusers does to a denoiser: offloading, casting, attention, LoRAs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import (
    FluxPipeline,
)
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import DENOISERS, STRUCTURES, TINY, Tiny
from tiny_pipelines.checks import add_frozen, assert_same, draw
from tiny_pipelines.controlled import add, fresh, maps
from torch import nn

from loco_diffusion import Controller
from loco_diffusion.control import family_of
from loco_diffusion.control.adapter import Route
from loco_diffusion.errors import UserError

FLUX = TINY["flux"]
CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
on_flux = pytest.mark.parametrize("tiny", [FLUX], ids=["flux"])
on_structures = pytest.mark.parametrize("tiny", STRUCTURES.values(), ids=STRUCTURES)


@pytest.fixture(params=DENOISERS.values(), ids=DENOISERS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


@pytest.fixture
def controller(pipe: Any, route: Route) -> Controller:
    return add_frozen(pipe, route)


# Offloading. Hooks that replace a module's forward come and go while an adapter is there.


def offload_model(pipe: Any, denoiser: nn.Module) -> None:
    pipe.enable_model_cpu_offload(device=CPU)


def offload_layers(pipe: Any, denoiser: nn.Module) -> None:
    """What enable_sequential_cpu_offload does to each model."""
    cpu_offload(denoiser, CPU, offload_buffers=len(denoiser._parameters) > 0)


def offload_leaves(pipe: Any, denoiser: Any) -> None:
    denoiser.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def offload_blocks(pipe: Any, denoiser: Any) -> None:
    denoiser.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def stop_offloading(pipe: Any, denoiser: nn.Module) -> None:
    remove_hook_from_module(denoiser, recurse=True)
    for module in denoiser.modules():
        if hasattr(module, "_diffusers_hook"):
            module._diffusers_hook.remove_hook("group_offloading", recurse=False)
    pipe.remove_all_hooks()


# Hooks on every leaf depend most on how a model is built.
with_offloading = pytest.mark.parametrize(
    ("tiny", "offload"),
    [
        (tiny, offload)
        for name, tiny in DENOISERS.items()
        for offload in (offload_leaves, offload_model, offload_layers, offload_blocks)
        if offload is offload_leaves or name in STRUCTURES
    ],
    ids=lambda value: getattr(value, "name", None),
)


@with_offloading
def test_offloading_that_begins_and_ends(
    tiny: Tiny, pipe: Any, controller: Controller, offload: Callable[[Any, nn.Module], None]
) -> None:
    denoiser = controller.family.denoiser(pipe)
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    offload(pipe, denoiser)
    assert_same(tiny, pipe, controller, expected, stock)
    stop_offloading(pipe, denoiser)
    assert_same(tiny, pipe, controller, expected, stock)
    offload(pipe, denoiser)
    controller.delete_adapter("canny")
    torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)


@with_offloading
def test_an_adapter_that_comes_to_an_offloaded_denoiser(
    tiny: Tiny, pipe: Any, route: Route, offload: Callable[[Any, nn.Module], None]
) -> None:
    other = Controller(fresh(tiny))
    stock = tiny.draw(pipe)
    add(other, route)
    expected = draw(tiny, other._pipe, other)
    controller = Controller(pipe)
    denoiser = controller.family.denoiser(pipe)
    offload(pipe, denoiser)
    if offload is offload_layers:
        with pytest.raises(UserError, match="offloaded layer by layer"):
            add(controller, route)
        torch.testing.assert_close(tiny.draw(pipe), stock)
        return
    add(controller, route)
    assert_same(tiny, pipe, controller, expected, stock)
    stop_offloading(pipe, denoiser)
    assert_same(tiny, pipe, controller, expected, stock)


@pytest.mark.parametrize("route", ["encoder"])
def test_leaf_offloading_reaches_every_weight_of_an_adapter(
    tiny: Tiny, pipe: Any, controller: Controller
) -> None:
    """Its containers are called, so that hooks on them run. (On the CPU nothing is seen to move.)"""
    denoiser = controller.family.denoiser(pipe)
    offload_leaves(pipe, denoiser)
    called = []
    containers = [
        module for name, module in denoiser.named_modules() if name.endswith((".loco_u", ".loco_v"))
    ]
    for container in containers:
        container.register_forward_pre_hook(lambda module, args: called.append(module))
    tiny.draw(pipe, num_inference_steps=1)
    assert set(called) == set(containers)


@needs_cuda
@pytest.mark.parametrize("method", ["model", "sequential", "leaf_level", "block_level", "streamed"])
def test_offloading_from_an_accelerator(tiny: Tiny, pipe: Any, controller: Controller, method: str) -> None:
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    if method in ("model", "sequential"):
        getattr(pipe, f"enable_{method}_cpu_offload")(device="cuda")
    else:
        streamed = method == "streamed"
        pipe.enable_group_offload(
            torch.device("cuda"), CPU, "leaf_level" if streamed else method, 1, use_stream=streamed
        )
    for _ in range(2):
        drawn = draw(tiny, pipe, controller).cpu()
        torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tiny.draw(pipe).cpu(), stock, atol=1e-3, rtol=1e-3)


def condition_passes(tiny: Tiny, pipe: Any, controller: Controller) -> int:
    """How often the denoiser runs before the pipeline does."""
    calls: list[nn.Module] = []
    hook = controller.family.denoiser(pipe).register_forward_pre_hook(
        lambda module, args: calls.append(module)
    )
    with controller(canny=maps(tiny)):
        made = len(calls)
        tiny.draw(pipe, num_inference_steps=1)
    hook.remove()
    return made


@on_structures
@pytest.mark.parametrize("route", ["tokens"])
def test_a_kept_condition_survives_what_moves_the_weights(
    tiny: Tiny, pipe: Any, controller: Controller
) -> None:
    assert [condition_passes(tiny, pipe, controller) for _ in range(2)] == [1, 0]
    offload_layers(pipe, controller.family.denoiser(pipe))
    assert [condition_passes(tiny, pipe, controller) for _ in range(2)][1] == 0


# Precision.


def test_layerwise_casting_before_or_after_the_adapter(tiny: Tiny, pipe: Any, route: Route) -> None:
    """Adapters stay in float32, and act on what the model computes in."""
    drawn = []
    for first in (True, False):
        pipe = fresh(tiny)
        controller = Controller(pipe)
        denoiser: Any = controller.family.denoiser(pipe)
        for cast in (first, not first):
            if cast:
                denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
            else:
                add(controller, route)
        stock = tiny.draw(pipe)
        drawn.append(draw(tiny, pipe, controller))
        assert (drawn[-1] - stock).abs().max() > 1e-3 and torch.equal(tiny.draw(pipe), stock)
        weights = dict(denoiser.named_parameters())
        assert torch.float8_e4m3fn in {weight.dtype for weight in weights.values()}
        assert {weight.dtype for name, weight in weights.items() if "loco_" in name} == {torch.float32}
    assert torch.equal(*drawn)


def test_a_quantised_denoiser(tiny: Tiny, pipe: Any, route: Route) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    denoiser = family_of(pipe).denoiser(pipe)
    reference = Controller(fresh(tiny))
    add(reference, route)
    effect = draw(tiny, reference._pipe, reference) - tiny.draw(pipe)
    quantization.quantize_(denoiser, quantization.Int8WeightOnlyConfig())
    stock = tiny.draw(pipe)
    controller = Controller(pipe)
    add(controller, route)
    assert torch.equal(tiny.draw(pipe), stock)
    assert (draw(tiny, pipe, controller) - stock - effect).norm() < 0.2 * effect.norm()


# Attention.


@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_backends_of_torch(tiny: Tiny, pipe: Any, controller: Controller, backend: str) -> None:
    if backend == "_native_flash" and controller.family.text_in_condition:
        pytest.skip("flash attention takes no masks, which this model's text has")
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    with attention_backend(backend):
        assert_same(tiny, pipe, controller, expected, stock)


@torch.no_grad()
def test_other_backends_are_refused_on_the_tokens_route(route: Route) -> None:
    """In the condition pass, or where it was made before, in denoising. The encoder route does not mind."""
    pipe = fresh(FLUX)
    controller = Controller(pipe)
    add(controller, route)
    stock, expected = FLUX.draw(pipe), draw(FLUX, pipe, controller)
    for _ in range(2):
        with warnings.catch_warnings(), attention_backend("flex"):
            warnings.simplefilter("ignore")  # it is slow without torch.compile
            if route == "encoder":
                assert_same(FLUX, pipe, controller, expected, stock)
            else:
                with pytest.raises(UserError, match="reset_attention_backend"):
                    draw(FLUX, pipe, controller)
        controller.clear_cache()
    assert_same(FLUX, pipe, controller, expected, stock)


def test_an_interrupted_attention_leaves_nothing_behind() -> None:
    """Torch runs no hooks after a KeyboardInterrupt."""
    pipe = fresh(FLUX)
    controller = Controller(pipe)
    add(controller, "tokens")
    stock, expected = FLUX.draw(pipe), draw(FLUX, pipe, controller)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    layer = pipe.transformer.single_transformer_blocks[0].attn.norm_q
    hook = layer.register_forward_hook(interrupt)
    controller.clear_cache()
    with pytest.raises(KeyboardInterrupt):
        draw(FLUX, pipe, controller)
    hook.remove()
    assert torch.overrides._get_current_function_mode() is None
    assert_same(FLUX, pipe, controller, expected, stock)


def test_fused_projections_are_refused(pipe: Any, tiny: Tiny, controller: Controller, route: Route) -> None:
    denoiser: Any = controller.family.denoiser(pipe)
    if not hasattr(denoiser, "fuse_qkv_projections"):
        pytest.skip("the model cannot fuse them")
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    denoiser.fuse_qkv_projections()
    if not any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        pytest.skip("the model's are always fused")
    with pytest.raises(UserError, match="unfuse_qkv_projections"):
        draw(tiny, pipe, controller)
    if route == "encoder":
        with pytest.raises(UserError, match="unfuse_qkv_projections"):
            controller.fuse("canny")
    try:
        torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)
        stock_works = True
    except AttributeError:  # diffusers' own fusion fails in the second attentions of SD3.5
        stock_works = False
    denoiser.unfuse_qkv_projections()
    assert_same(tiny, pipe, controller, expected, stock)
    if route == "encoder" and stock_works:
        controller.fuse("canny")  # what is in the weights is in their fusion, too
        for module in denoiser.modules():
            if hasattr(module, "fused_projections"):
                module.fused_projections = False  # else older attentions keep their first fusion
        denoiser.fuse_qkv_projections()
        torch.testing.assert_close(draw(tiny, pipe, controller), expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(UserError, match="unfuse_qkv_projections"):
            controller.unfuse()


# Style LoRAs.


@pytest.fixture(scope="module")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in a file as diffusers writes it."""
    folder = tmp_path_factory.mktemp("style")
    pipe = fresh(FLUX)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "style")
    weights = get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=weights)
    return folder


@on_flux
@pytest.mark.parametrize("first", ["style", "control"])
def test_a_style_lora_beside_an_adapter(tiny: Tiny, pipe: Any, route: Route, style: Path, first: str) -> None:
    """It acts in the condition pass too, whose keys and values are made anew when it changes."""
    stock = tiny.draw(pipe)
    controller = Controller(pipe)
    if first == "control":
        add(controller, route)
        controlled = draw(tiny, pipe, controller)
    pipe.load_lora_weights(style, adapter_name="style")
    styled = tiny.draw(pipe)
    if first == "style":
        add(controller, route)
    drawn = draw(tiny, pipe, controller)
    assert torch.equal(tiny.draw(pipe), styled) and not torch.equal(styled, stock)
    pipe.set_adapters("style", 0.5)
    assert (draw(tiny, pipe, controller) - drawn).abs().max() > 1e-4
    pipe.set_adapters("style", 1.0)
    assert torch.equal(draw(tiny, pipe, controller), drawn)
    pipe.fuse_lora()
    fused = draw(tiny, pipe, controller)
    pipe.unfuse_lora()
    torch.testing.assert_close(draw(tiny, pipe, controller), drawn, atol=1e-5, rtol=1e-5)
    if first == "style":
        # A LoRA that comes later is not turned by the adapter beneath it, except when it is in the weights.
        torch.testing.assert_close(fused, drawn, atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft switches another adapter on, and says so
        pipe.delete_adapters("style")
    if first == "control":
        torch.testing.assert_close(draw(tiny, pipe, controller), controlled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)


@on_flux
def test_taking_all_adapters_out_is_noticed(
    tiny: Tiny, pipe: Any, controller: Controller, style: Path
) -> None:
    stock = tiny.draw(pipe)
    pipe.load_lora_weights(style, adapter_name="style")
    pipe.unload_lora_weights()
    with pytest.raises(UserError, match="'canny' has been taken out of the denoiser"):
        draw(tiny, pipe, controller)
    assert torch.equal(tiny.draw(pipe), stock)


@on_flux
@pytest.mark.parametrize("route", ["encoder"])
def test_unfusing_behind_the_controllers_back_is_noticed(
    tiny: Tiny, pipe: Any, controller: Controller
) -> None:
    expected = draw(tiny, pipe, controller)
    controller.fuse("canny")
    pipe.unfuse_lora()
    with pytest.raises(UserError, match="'canny' has been taken out of the base weights"):
        draw(tiny, pipe, controller)
    controller.unfuse()
    torch.testing.assert_close(draw(tiny, pipe, controller), expected, atol=1e-5, rtol=1e-5)
