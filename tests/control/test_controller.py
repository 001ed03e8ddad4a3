"""The controller on a tiny real FLUX pipeline: what it changes, and that it changes nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from control_helpers import SIZE, add_trained, condition_map, draw, randomise
from diffusers import FluxPipeline, StableDiffusionPipeline
from peft import BOFTConfig, LoraConfig, OFTConfig

from loco_diffusion import Controller, LoCOConfig
from loco_diffusion.control import EncoderConfig, map_tokens
from loco_diffusion.control.encoder import EncoderInput
from loco_diffusion.errors import UserError
from loco_diffusion.images import to_pil

TARGETS = ["to_q", "to_v"]


@pytest.fixture
def controller(flux: FluxPipeline) -> Controller:
    """A controller with a trained-looking adapter "canny"."""
    controller = Controller(flux)
    add_trained(controller, "canny")
    return controller


# No control is the stock pipeline.


def test_without_control_the_picture_is_the_stock_one_bit_for_bit(flux: FluxPipeline) -> None:
    stock = draw(flux)
    controller = Controller(flux)
    add_trained(controller, "canny")
    add_trained(controller, "depth", seed=1)
    image = condition_map()
    assert torch.equal(draw(flux), stock)
    with controller():
        assert torch.equal(draw(flux), stock)
    with controller(canny=image, strength=0):
        assert torch.equal(draw(flux), stock)
    with controller(canny=image, depth=image, strength={"canny": 0.0, "depth": 0.0}):
        assert torch.equal(draw(flux), stock)
    with controller(canny=image):
        assert not torch.equal(draw(flux), stock)
    assert torch.equal(draw(flux), stock)


def test_a_new_adapter_starts_at_the_stock_pipeline(flux: FluxPipeline) -> None:
    stock = draw(flux)
    controller = Controller(flux)
    controller.add_adapter("canny", LoCOConfig(r=2, num_rotations=2))
    with controller(canny=condition_map()):
        assert torch.equal(draw(flux), stock)


def test_an_exception_in_the_block_restores(flux: FluxPipeline, controller: Controller) -> None:
    stock = draw(flux)
    with pytest.raises(KeyError), controller(canny=condition_map(), strength=0.5):
        raise KeyError
    assert torch.equal(draw(flux), stock)
    with pytest.raises(UserError, match="32x32 px"), controller(canny=condition_map(height=64)):
        draw(flux)
    assert torch.equal(draw(flux), stock)
    layer = flux.transformer.transformer_blocks[0].attn.to_q
    assert layer.active_adapters == [] and layer.scaling["canny"] == 1.0


def test_delete_leaves_the_stock_model(flux: FluxPipeline) -> None:
    names = list(flux.transformer.state_dict())
    stock = draw(flux)
    controller = Controller(flux)
    add_trained(controller, "canny")
    add_trained(controller, "depth")
    controller.delete_adapter("canny")
    assert list(controller.adapters) == ["depth"]
    with controller(depth=condition_map()):
        assert not torch.equal(draw(flux), stock)
    controller.delete_adapter("depth")
    assert list(flux.transformer.state_dict()) == names
    assert not hasattr(flux.transformer, "peft_config")
    assert not flux.transformer._forward_pre_hooks and not flux.transformer.x_embedder._forward_hooks
    assert torch.equal(draw(flux), stock)
    add_trained(controller, "canny")


# Control.


def test_map_and_strength_change_the_picture(flux: FluxPipeline, controller: Controller) -> None:
    pictures = []
    for seed, strength in ((0, 1.0), (1, 1.0), (0, 0.5), (0, -1.0)):
        with controller(canny=condition_map(seed), strength=strength):
            pictures.append(draw(flux))
    for number, picture in enumerate(pictures):
        assert torch.isfinite(picture).all()
        assert all((picture - other).abs().max() > 1e-3 for other in pictures[:number])


def test_strength_is_a_factor_on_features_and_angles(flux: FluxPipeline, controller: Controller) -> None:
    with controller(canny=condition_map(), strength=0.5):
        half = draw(flux)
    groups = controller.trainable_parameters("canny")
    with torch.no_grad():
        for name, parameter in flux.transformer.named_parameters():
            if "loco_v" in name:  # the angles are linear in V
                parameter.mul_(0.5)
        for parameter in groups["encoder"][-2:]:  # the features are linear in the last layer
            parameter.mul_(0.5)
    with controller(canny=condition_map()):
        torch.testing.assert_close(draw(flux), half, atol=1e-5, rtol=1e-5)


def test_pil_and_tensor_maps_are_the_same(flux: FluxPipeline, controller: Controller) -> None:
    image = (condition_map() * 255).round() / 255
    with controller(canny=image):
        expected = draw(flux)
    with controller({"canny": to_pil(image[0])}):
        assert torch.equal(draw(flux), expected)
    with controller(canny=[to_pil(image[0])]):
        assert torch.equal(draw(flux), expected)


@pytest.mark.parametrize("source", ["pixels", "latents"])
def test_maps_and_their_tokens_are_the_same(flux: FluxPipeline, source: EncoderInput) -> None:
    controller = Controller(flux)
    add_trained(controller, "canny", encoder=EncoderConfig(input=source, hidden_size=8))
    with controller(canny=condition_map()):
        expected = draw(flux)
    tokens = map_tokens(controller.family, flux, condition_map(), source)
    for _ in range(2):
        with controller(canny=tokens):
            assert torch.equal(draw(flux), expected)
    other = replace(tokens, input="latents" if source == "pixels" else "pixels")
    with pytest.raises(UserError, match=f"its encoder reads {source}"):
        controller(canny=other)
    with pytest.raises(UserError, match=f"3 wide, but its encoder reads {tokens.tokens.shape[-1]}"):
        controller(canny=replace(tokens, tokens=tokens.tokens[..., :3]))


def test_several_conditions(flux: FluxPipeline, controller: Controller) -> None:
    add_trained(controller, "depth", seed=1, encoder=EncoderConfig(input="latents", hidden_size=8))
    canny, depth = condition_map(0), condition_map(1)
    with controller(canny=canny, depth=depth):
        both = draw(flux)
    with controller({"depth": depth}, canny=canny):  # the order of rotations is that of the adapters
        assert torch.equal(draw(flux), both)
    with controller(canny=canny, depth=depth, strength={"depth": 0.0}):
        only_canny = draw(flux)
    with controller(canny=canny):
        assert torch.equal(draw(flux), only_canny)
    with controller(canny=canny, depth=depth, strength={"depth": 0.5}):
        mixed = draw(flux)
    assert not torch.equal(both, only_canny) and not torch.equal(both, mixed)


def test_latent_input_encodes_the_map_once(flux: FluxPipeline) -> None:
    controller = Controller(flux)
    add_trained(controller, "canny", encoder=EncoderConfig(input="latents"))
    stock = draw(flux)
    pictures = []
    for seed in (0, 1):
        with controller(canny=condition_map(seed)):
            pictures.append(draw(flux))
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], stock)


def test_batches(flux: FluxPipeline, controller: Controller) -> None:
    prompts = ["a red cube", "a blue cone"]
    maps = condition_map(batch=2)
    noise = torch.randn(4, 4, 64, generator=torch.Generator().manual_seed(1))
    with controller(canny=maps):
        together = draw(flux, prompts, latents=noise, num_images_per_prompt=2)
    for row in range(4):
        with controller(canny=maps[row // 2, None]):
            alone = draw(flux, prompts[row // 2], latents=noise[row, None])
        torch.testing.assert_close(together[row, None], alone, atol=1e-4, rtol=1e-4)
    with controller(canny=maps[:1]):  # one map serves any number of pictures
        assert draw(flux, prompts, latents=noise, num_images_per_prompt=2).shape == (4, 4, 64)
    with controller(canny=maps), pytest.raises(UserError, match="2 condition maps for 1 pictures"):
        draw(flux)


def test_true_cfg_and_guidance(make_flux: Callable[..., FluxPipeline]) -> None:
    pipe = make_flux(guidance_embeds=True)
    controller = Controller(pipe)
    add_trained(controller, "canny")
    cfg = {"negative_prompt": "", "true_cfg_scale": 3.0}
    stock = draw(pipe, **cfg)
    with controller(canny=condition_map()):
        controlled = draw(pipe, **cfg)
        plain = draw(pipe)
        other_guidance = draw(pipe, guidance_scale=1.0)
    assert not torch.equal(controlled, stock) and not torch.equal(controlled, plain)
    assert not torch.equal(plain, other_guidance)


def test_other_stock_pipelines(flux: FluxPipeline, controller: Controller) -> None:
    from diffusers import FluxImg2ImgPipeline

    pipe = FluxImg2ImgPipeline.from_pipe(flux)
    image = condition_map(2)
    stock = draw(pipe, image=image, strength=0.7)
    with controller(canny=condition_map()):
        assert not torch.equal(draw(pipe, image=image, strength=0.7), stock)


def test_bf16_base_keeps_float32_adapters(flux: FluxPipeline) -> None:
    flux.to(dtype=torch.bfloat16)
    stock = draw(flux)
    controller = Controller(flux)
    add_trained(controller, "canny")
    controller.add_adapter("lora", LoraConfig(target_modules=TARGETS))
    for name in ("canny", "lora"):
        for parameters in controller.trainable_parameters(name).values():
            assert {p.dtype for p in parameters} == {torch.float32}
    with controller(canny=condition_map()):
        controlled = draw(flux)
    assert controlled.dtype == torch.bfloat16 and torch.isfinite(controlled).all()
    assert not torch.equal(controlled, stock) and torch.equal(draw(flux), stock)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5),
        LoraConfig(r=2, target_modules=TARGETS, use_dora=True),
        OFTConfig(oft_block_size=8, target_modules=TARGETS),
    ],
)
def test_other_methods_of_peft(flux: FluxPipeline, config: LoraConfig | OFTConfig) -> None:
    stock = draw(flux)
    controller = Controller(flux)
    controller.add_adapter("canny", config)
    randomise(controller, "canny")
    trainable = controller.trainable_parameters("canny")["adapter"]
    assert len({id(parameter) for parameter in trainable}) == len(trainable)
    assert controller.adapters["canny"].method == config.peft_type.value
    with controller(canny=condition_map()):
        controlled = draw(flux)
        assert torch.equal(draw(flux), controlled)  # the new layers' dropout is off in an evaluated model
    assert not torch.equal(controlled, stock) and torch.equal(draw(flux), stock)
    if isinstance(config, OFTConfig):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserError, match="OFT adapter 'canny' has no strength but 0 and 1"):
                controller(canny=condition_map(), strength=0.5)
            with controller(canny=condition_map(), strength=1):
                pass
    else:
        with controller(canny=condition_map(), strength=0.5):
            assert not torch.equal(draw(flux), controlled)


def test_a_style_lora_of_diffusers_stays_as_it_is(flux: FluxPipeline) -> None:
    flux.transformer.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False), "style")
    styled = draw(flux)
    controller = Controller(flux)
    add_trained(controller, "canny")
    assert torch.equal(draw(flux), styled)
    with controller(canny=condition_map()):
        both = draw(flux)
        assert not torch.equal(both, styled)
    assert torch.equal(draw(flux), styled)
    flux.transformer.disable_adapters()
    with pytest.raises(UserError, match="disabled"), controller(canny=condition_map()):
        pass
    flux.transformer.enable_adapters()
    with pytest.raises(UserError, match="already is an adapter 'style'"):
        controller.add_adapter("style", LoCOConfig(r=2))
    controller.delete_adapter("canny")
    assert torch.equal(draw(flux), styled)


# Merging.


def test_fused_equals_unfused(flux: FluxPipeline, controller: Controller) -> None:
    add_trained(controller, "depth", seed=1)
    stock = draw(flux)
    canny, depth = condition_map(0), condition_map(1)
    with controller(canny=canny, strength=0.7):
        expected = draw(flux)
    controller.fuse("canny", 0.7)
    with controller(canny=canny, strength=0.7):
        torch.testing.assert_close(draw(flux), expected, atol=1e-5, rtol=1e-5)
    with controller(canny=canny, strength={}), torch.no_grad():
        torch.testing.assert_close(draw(flux), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="fused at strength 0.7"):
        controller(canny=canny)
    with pytest.raises(UserError, match="'depth' is not fused"), controller(depth=depth):
        pass
    for change in (
        lambda: controller.delete_adapter("canny"),
        lambda: controller.add_adapter("mask", LoCOConfig(r=2)),
    ):
        with pytest.raises(UserError, match="'canny' is fused"):
            change()
    controller.unfuse()
    torch.testing.assert_close(draw(flux), stock, atol=1e-5, rtol=1e-5)
    with controller(canny=canny, depth=depth):
        expected = draw(flux)
    controller.fuse("depth")
    controller.fuse("canny")
    with controller(canny=canny, depth=depth):
        torch.testing.assert_close(draw(flux), expected, atol=1e-5, rtol=1e-5)
    controller.unfuse()
    torch.testing.assert_close(draw(flux), stock, atol=1e-5, rtol=1e-5)


# Training.


def predict(pipe: FluxPipeline, controller: Controller, batch: int = 2) -> torch.Tensor:
    latents = torch.randn(batch, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    text = controller.family.encode_prompts(pipe, ["a red cube"] * batch)
    return controller.family.predict(pipe.transformer, latents, torch.full((batch,), 0.5), text)


@pytest.mark.parametrize("source", ["pixels", "latents"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_reaches_adapter_and_encoder_only(
    flux: FluxPipeline, source: str, checkpointing: bool
) -> None:
    controller = Controller(flux)
    add_trained(controller, "canny", encoder=EncoderConfig(input=source))  # type: ignore[arg-type]
    groups = controller.trainable_parameters("canny")
    flux.transformer.train()
    if checkpointing:
        flux.transformer.enable_gradient_checkpointing()
    for _ in range(2):  # features are made anew in every forward
        with controller(canny=condition_map(batch=2)):
            predict(flux, controller).square().mean().backward()
    own = {id(p) for group in groups.values() for p in group}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for group in groups.values() for p in group)
    assert all(
        p.grad is None and not p.requires_grad for p in flux.transformer.parameters() if id(p) not in own
    )


def test_keep_drops_the_features_of_rows(flux: FluxPipeline, controller: Controller) -> None:
    maps = condition_map(batch=2)
    other = torch.cat([maps[:1], condition_map(5)])
    with torch.no_grad():
        with controller(canny=maps, keep=torch.tensor([True, False])):
            kept = predict(flux, controller)
        with controller(canny=other, keep=torch.tensor([True, False])):
            assert torch.equal(predict(flux, controller), kept)
        with controller(canny=maps):
            full = predict(flux, controller)
    torch.testing.assert_close(kept[0], full[0])
    assert not torch.allclose(kept[1], full[1], atol=1e-3)


def test_adding_keeps_what_is_trainable(flux: FluxPipeline, controller: Controller) -> None:
    first = controller.trainable_parameters("canny")
    controller.add_adapter("depth", LoCOConfig(r=2, num_rotations=2))
    assert all(p.requires_grad for group in first.values() for p in group)
    for parameter in first["adapter"]:
        parameter.requires_grad_(False)
    controller.add_adapter("mask", LoraConfig(target_modules=TARGETS))
    assert not any(p.requires_grad for p in first["adapter"])
    assert all(p.requires_grad for p in controller.trainable_parameters("mask")["adapter"])


def test_inference_mode_leaves_it_trainable(flux: FluxPipeline, controller: Controller) -> None:
    with torch.inference_mode(), controller(canny=condition_map()):
        expected = draw(flux)
    with controller(canny=condition_map()):
        assert torch.equal(draw(flux), expected)
        predict(flux, controller, batch=1).sum().backward()
    assert all(
        p.grad is not None for group in controller.trainable_parameters("canny").values() for p in group
    )


# Refusals.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": condition_map()}, "no adapter 'depth'; loaded are canny"),
        ({"strength": {"canny": 0.5}}, "strength for 'canny' but no map"),
        ({"canny": condition_map(), "strength": {"depth": 1.0}}, "strength for 'depth' but no map"),
        ({"canny": condition_map(), "strength": float("nan")}, "finite number"),
        ({"canny": condition_map(), "strength": "high"}, "finite number"),
        ({"canny": condition_map() * 255}, "divide 8-bit values by 255"),
        ({"canny": condition_map() * float("nan")}, r"in \[0, 1\]"),
        ({"canny": condition_map()[0]}, "float tensor"),
        ({"canny": torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)}, "float tensor"),
        ({"canny": "edges.png"}, "PIL picture"),
        ({"canny": []}, "PIL picture"),
        ({"canny": [to_pil(torch.zeros(3, 32, 32)), to_pil(torch.zeros(3, 32, 48))]}, "32x32, 48x32 px"),
        ({"canny": condition_map(height=40)}, "multiples of 16 px"),
        ({"canny": condition_map(batch=2), "keep": torch.ones(3, dtype=torch.bool)}, "batches of 2 and 3"),
    ],
)
def test_unusable_control_is_refused(controller: Controller, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        controller(**arguments)


def test_a_map_of_another_size_is_refused(flux: FluxPipeline, controller: Controller) -> None:
    with controller(canny=condition_map(height=64)), pytest.raises(UserError, match="32x64 px .* 32x32 px"):
        draw(flux)
    # As many tokens, but not in the same places.
    with controller(canny=condition_map(height=64)), pytest.raises(UserError, match="32x64 px .* 64x32 px"):
        draw(flux, width=64)
    with controller(canny=condition_map(height=64)):
        assert draw(flux, height=64).shape == (1, 8, 64)


def test_contexts_do_not_nest(controller: Controller) -> None:
    with controller(canny=condition_map()):
        for forbidden in (
            lambda: controller.fuse("canny"),
            controller.unfuse,
            lambda: controller.delete_adapter("canny"),
            lambda: controller.add_adapter("depth", LoCOConfig(r=2)),
            lambda: controller(canny=condition_map()).__enter__(),
        ):
            with pytest.raises(UserError, match="is open"):
                forbidden()
    with pytest.raises(UserError, match="given twice"):
        controller({"canny": condition_map()}, canny=condition_map())


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("canny", LoCOConfig(r=2), "already is an adapter 'canny'"),
        ("my.depth", LoCOConfig(r=2), "letters, digits"),
        ("attn", LoCOConfig(r=2), "name of a part of the model"),
        ("depth", LoCOConfig(r=2, target_modules=["no_such_layer"]), "does not fit the model"),
        ("depth", LoCOConfig(r=64, target_modules=TARGETS), "lower r or num_rotations"),
        ("depth", LoraConfig(target_modules=TARGETS, bias="all"), "bias='all'"),
        ("depth", LoraConfig(target_modules=TARGETS, modules_to_save=["proj_out"]), "modules_to_save"),
        ("depth", LoraConfig(target_modules=TARGETS, init_lora_weights="pissa"), "pissa"),
        ("depth", BOFTConfig(target_modules=["norm_out"]), "does not fit the model"),
    ],
)
def test_unusable_adapters_are_refused(
    flux: FluxPipeline, controller: Controller, name: str, config: LoCOConfig, message: str
) -> None:
    names = list(flux.transformer.state_dict())
    with pytest.raises(UserError, match=message):
        controller.add_adapter(name, config)
    assert list(flux.transformer.state_dict()) == names
    assert list(controller.adapters) == list(flux.transformer.peft_config) == ["canny"]
    with controller(canny=condition_map()):
        draw(flux)


def test_unknown_names_and_pipelines_are_refused(controller: Controller) -> None:
    for call in (controller.delete_adapter, controller.trainable_parameters, controller.fuse):
        with pytest.raises(UserError, match="no adapter 'depth'; loaded are canny"):
            call("depth")
    with pytest.raises(UserError, match="strength 0"):
        controller.fuse("canny", 0)
    with pytest.raises(UserError, match="StableDiffusionPipeline cannot be controlled"):
        Controller(StableDiffusionPipeline.__new__(StableDiffusionPipeline))


@pytest.mark.parametrize("settings", [{"input": "edges"}, {"hidden_size": 0}, {"hidden_size": 1.5}])
def test_encoder_config_checks_its_values(settings: dict) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        EncoderConfig(**settings)
