"""What holds for every family of backbones, on both routes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_pipelines import DENOISERS, STRUCTURES, Tiny
from tiny_pipelines.controlled import add, maps
from torch import Tensor
from torch.overrides import TorchFunctionMode

from loco_diffusion import Controller
from loco_diffusion.control import family_of
from loco_diffusion.control.adapter import Route
from loco_diffusion.errors import UserError

on_denoisers = pytest.mark.parametrize("tiny", DENOISERS.values(), ids=DENOISERS)


def latents_of(controller: Controller, pipe: Any, image: Tensor, batch: int) -> Tensor:
    shape = controller.family.encode_pictures(pipe, image).shape[1:]
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(1))


def predict(controller: Controller, pipe: Any, latents: Tensor, time: float = 0.5) -> Tensor:
    family = controller.family
    text = family.encode_prompts(pipe, ["a red cube"] * len(latents))
    return family.predict(family.denoiser(pipe), latents, torch.full((len(latents),), time), text)


# No control is the stock pipeline.


def test_without_control_the_picture_is_the_stock_one_bit_for_bit(
    tiny: Tiny, pipe: Any, route: Route
) -> None:
    stock = tiny.draw(pipe)
    controller = Controller(pipe)
    add(controller, route)
    assert torch.equal(tiny.draw(pipe), stock)
    with controller(canny=maps(tiny), strength=0):
        assert torch.equal(tiny.draw(pipe), stock)
    with controller(canny=maps(tiny)):
        controlled = tiny.draw(pipe)
    assert torch.isfinite(controlled).all() and (controlled - stock).abs().max() > 1e-3
    assert torch.equal(tiny.draw(pipe), stock)
    controller.delete_adapter("canny")
    assert torch.equal(tiny.draw(pipe), stock)
    assert not any("forward" in vars(module) for module in controller.family.denoiser(pipe).modules())


# What the toolkit computes by itself is what the pipeline computes.


def test_packing_is_undone_and_pictures_are_whole_tokens(tiny: Tiny, pipe: Any) -> None:
    family = family_of(pipe)
    picture = maps(tiny, batch=2, scale=(1, 2))
    latents = family.encode_pictures(pipe, picture)
    assert latents.dtype == torch.float32 and not latents.requires_grad
    side = family.token_pixels(pipe)
    rows, columns = tiny.side // side, 2 * tiny.side // side
    tokens = family.pack(latents)
    assert tokens.shape == (2, rows * columns, family.token_channels(family.denoiser(pipe)))
    assert torch.equal(family.unpack(tokens, rows, columns), latents)


@torch.no_grad()
def test_predict_is_what_the_pipeline_asks_of_its_denoiser(tiny: Tiny, pipe: Any) -> None:
    """The first call of the pipeline's loop, made again by `predict`."""
    family = family_of(pipe)
    denoiser = family.denoiser(pipe)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    hook = denoiser.register_forward_hook(
        lambda m, args, kwargs, output: calls.append((args, kwargs, output[0])), with_kwargs=True
    )
    tiny.draw(pipe, width=2 * tiny.side)
    hook.remove()
    args, arguments, expected = calls[0]
    grid = family.grid(arguments | ({"sample": args[0]} if args else {}))
    sample = args[0] if args else arguments.get("hidden_states", arguments.get("sample"))
    side = family.token_pixels(pipe)
    rows, columns = tiny.side // side, 2 * tiny.side // side
    assert grid in (None, (rows, columns))
    latents = family.unpack(sample, rows, columns) if sample.ndim == 3 else sample
    text = family.encode_prompts(pipe, ["a red cube"])
    time = first_time(pipe)
    ours = family.predict(denoiser, latents, torch.full((1,), time), text, guidance=tiny_guidance(arguments))
    theirs = family.unpack(expected, rows, columns) if expected.ndim == 3 else expected
    torch.testing.assert_close(ours, theirs[:, : ours.shape[1]], atol=1e-5, rtol=1e-5)


def first_time(pipe: Any) -> float:
    """The time of the first step as `predict` counts it."""
    if family_of(pipe).flow:
        return float(pipe.scheduler.sigmas[0])
    return float(pipe.scheduler.timesteps[0]) / pipe.scheduler.config.num_train_timesteps


def tiny_guidance(arguments: dict[str, Any]) -> float | None:
    guidance = arguments.get("guidance")
    return None if guidance is None else float(guidance[0])


# The tokens route: two passes are one masked pass, made here of a batch of the picture and the condition, each
# with its time and its adapter, where the picture's row attends to the condition's keys as well.


class OnePass(TorchFunctionMode):
    """Self-attention in a batch of pictures, then as many conditions, that the pictures see.

    Args:
        tiny: says where text stands.
        tokens: of a picture, without the text.
        reads: whether a condition sees its own text.
    """

    def __init__(self, tiny: Tiny, tokens: int, reads: bool) -> None:
        super().__init__()
        self.tiny, self.tokens, self.reads = tiny, tokens, reads
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.matmul:  # linear attention: of every two products the first one sums over the keys
            sums = func(*args, **kwargs)
            self.products += 1
            half = len(sums) // 2
            return torch.cat([sums[:half] + sums[half:], sums[half:]]) if self.products % 2 else sums
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        query, key, value = ({**dict(zip(names, args, strict=False)), **kwargs}[name] for name in names)
        mask = kwargs.get("attn_mask")  # of padded text
        if query.shape[2] != key.shape[2]:  # cross-attention
            return func(*args, **kwargs)
        half, length = len(query) // 2, key.shape[2]
        image = torch.zeros(length, dtype=torch.bool)
        image[slice(length - self.tokens, None) if self.tiny.text == "before" else slice(self.tokens)] = True
        sees = torch.zeros(len(query), 1, 1, 2 * length, dtype=torch.bool)
        sees[:half, ..., :length] = True  # a picture: all of its own,
        sees[:half, ..., length:] = image  # and the condition's tokens, but not its text
        sees[half:, ..., :length] = image | self.reads  # a condition: its own tokens only
        if mask is not None:
            sees[..., :length] &= mask
        both = [torch.cat([t, torch.cat([t[half:], t[:half]])], dim=2) for t in (key, value)]
        return func(query, *both, attn_mask=sees)


@contextmanager
def adapter_in_second_half(denoiser: torch.nn.Module) -> Iterator[None]:
    """In the block, the adapter "canny" acts on the second half of a batch only."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]

    def split(layer: Any) -> Any:
        def forward(x: Tensor, *args: Any) -> Tensor:
            first, second = x.chunk(2)
            plain = type(layer).forward(layer, first, *args)
            layer._active_adapter = ["canny"]
            turned = type(layer).forward(layer, second, *args)
            layer._active_adapter = []
            return torch.cat([plain, turned])

        return forward

    for layer in layers:
        layer.forward = split(layer)
    yield
    for layer in layers:
        del layer.forward


def with_condition(controller: Controller, pipe: Any, batch: int) -> dict[str, Tensor]:
    """The text of a batch of pictures and then as many conditions."""
    family = controller.family
    text = family.encode_prompts(pipe, ["a red cube"] * batch)
    own = family.condition_text(pipe)
    length = text["prompt_embeds"].shape[1]
    joint: dict[str, Tensor] = {}
    for name, tensor in text.items():
        if len(tensor) != batch:  # positions
            joint[name] = tensor
            continue
        theirs = own.get(name, tensor[:, : own["prompt_embeds"].shape[1]])  # a mask, where nothing is padded
        if tensor.ndim > 1 and tensor.shape[1] == length and theirs.shape[1] < length:
            missing = length - theirs.shape[1]  # masked, so that any values do
            theirs = torch.nn.functional.pad(theirs, (*(0, 0) * (tensor.ndim - 2), 0, missing))
        joint[name] = torch.cat([tensor, theirs.expand_as(tensor)])
    return joint


@torch.no_grad()
def test_two_passes_are_one_masked_pass(tiny: Tiny, pipe: Any) -> None:
    controller = Controller(pipe)
    add(controller, "tokens")
    family, denoiser = controller.family, controller.family.denoiser(pipe)
    image = maps(tiny, scale=(1, 2))
    latents = latents_of(controller, pipe, image, batch=2)
    with controller(canny=image):
        controlled = predict(controller, pipe, latents)
    assert (controlled - predict(controller, pipe, latents)).abs().max() > 1e-4

    clean = family.encode_pictures(pipe, image).expand_as(latents)
    times = torch.tensor([0.5, 0.5, 0, 0])
    text, tokens = with_condition(controller, pipe, 2), family.pack(latents).shape[1]
    with adapter_in_second_half(denoiser), OnePass(tiny, tokens, family.text_in_condition):
        both = family.predict(denoiser, torch.cat([latents, clean]), times, text)
    torch.testing.assert_close(controlled, both[:2], atol=1e-5, rtol=1e-5)


@on_denoisers
@torch.no_grad()
def test_a_smaller_condition_costs_less(tiny: Tiny, pipe: Any) -> None:
    controller = Controller(pipe)
    add(controller, "tokens", "canny")
    add(controller, "tokens", "small", stride=2)
    image = maps(tiny, scale=(2, 2))
    pictures, sizes = [], []
    for name in ("canny", "small"):
        controller.clear_cache()
        with controller({name: image}):
            pictures.append(tiny.draw(pipe, height=2 * tiny.side, width=2 * tiny.side))
        sizes.append(controller.cache_nbytes)
    assert torch.isfinite(pictures[1]).all() and not torch.equal(*pictures)
    assert sizes[0] == sizes[1] if controller.family.linear_attention else sizes[0] > 3 * sizes[1]
    with pytest.raises(UserError, match="multiples of"):
        controller(small=image[..., : -controller.family.token_pixels(pipe)])


# Both routes.


@on_denoisers
@torch.no_grad()
def test_strength_is_monotone_from_no_control_on(tiny: Tiny, pipe: Any, route: Route) -> None:
    controller = Controller(pipe)
    add(controller, route)
    latents = latents_of(controller, pipe, maps(tiny), batch=1)
    free = predict(controller, pipe, latents)
    distances = []
    for strength in (1e-4, 0.25, 0.5, 1.0):
        with controller(canny=maps(tiny), strength=strength):
            distances.append((predict(controller, pipe, latents) - free).norm().item())
    assert distances == sorted(distances) and distances[0] < 1e-2 * distances[3]


@on_denoisers
@pytest.mark.parametrize("keep", [None, torch.tensor([True, False])])
def test_gradients_reach_what_is_trained_also_with_checkpointing(
    tiny: Tiny, pipe: Any, route: Route, keep: Tensor | None
) -> None:
    controller = Controller(pipe)
    add(controller, route)
    groups = controller.trainable_parameters("canny")
    parameters = [parameter for group in groups.values() for parameter in group]
    denoiser = controller.family.denoiser(pipe)
    latents = latents_of(controller, pipe, maps(tiny), batch=2)

    def gradients() -> list[Tensor]:
        denoiser.zero_grad()
        for parameter in parameters:
            parameter.grad = None
        with controller(canny=maps(tiny, batch=2), keep=keep):
            predict(controller, pipe, latents).square().mean().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    expected = gradients()
    reached = [bool(gradient.any()) for gradient in expected]
    if route == "encoder":
        names = {parameter: name for name, parameter in denoiser.named_parameters()}
        assert reached == [not names.get(p, "").startswith(tiny.unread) for p in parameters]
    assert 2 * sum(reached) >= len(reached)
    denoiser.enable_gradient_checkpointing()
    denoiser.train()
    torch.testing.assert_close(gradients(), expected, atol=1e-7, rtol=1e-4)
    assert not any(p.grad is not None for p in denoiser.parameters() if not p.requires_grad)

    @torch.no_grad()
    def prediction() -> Tensor:
        with controller(canny=maps(tiny, batch=2), keep=keep):
            return predict(controller, pipe, latents)

    # On the tokens route, what comes after the last keys and values of the condition has no effect.
    before = prediction()
    with torch.no_grad():
        for parameter, seen in zip(parameters, reached, strict=True):
            parameter.mul_(1 if seen else 2)
    assert torch.equal(prediction(), before)


@torch.no_grad()
def test_each_picture_of_a_batch_has_its_own_condition(tiny: Tiny, pipe: Any, route: Route) -> None:
    """Also with several pictures of a prompt, and in both halves of classifier-free guidance."""
    controller = Controller(pipe)
    add(controller, route)
    # Of one length: the stock Qwen-Image mixes masks of text up where a prompt has several pictures.
    prompts = ["a pink cube", "a blue cone"]
    images = maps(tiny, batch=2)
    one = tiny.draw(pipe)
    noise = torch.randn(4, *(tiny.start or one.shape[1:]), generator=torch.Generator().manual_seed(1))
    with controller(canny=images):
        together = tiny.draw(pipe, prompts, latents=noise, num_images_per_prompt=2, **tiny.guided)
    for row in range(4):
        with controller(canny=images[row // 2, None]):
            alone = tiny.draw(pipe, prompts[row // 2], latents=noise[row, None], **tiny.guided)
        torch.testing.assert_close(together[row, None], alone, atol=1e-4, rtol=1e-4)
    with controller(canny=images[:1]):
        shared = tiny.draw(pipe, prompts, latents=noise, num_images_per_prompt=2, **tiny.guided)
    torch.testing.assert_close(shared[:2], together[:2], atol=1e-4, rtol=1e-4)
    for arguments in ({}, tiny.guided):
        with controller(canny=images), pytest.raises(UserError, match="2 condition maps for 1 pictures"):
            tiny.draw(pipe, **arguments)


@on_denoisers
@torch.no_grad()
def test_each_prediction_of_a_batch_has_its_own_condition(tiny: Tiny, pipe: Any, route: Route) -> None:
    """Whatever guidance the pipeline has had before."""
    controller = Controller(pipe)
    add(controller, route)
    tiny.draw(pipe, num_inference_steps=1, **tiny.guided)
    images = maps(tiny, batch=2)
    latents = latents_of(controller, pipe, images, batch=2)
    with controller(canny=images):
        together = predict(controller, pipe, latents)
    for row in range(2):
        with controller(canny=images[row, None]):
            alone = predict(controller, pipe, latents[row, None])
        torch.testing.assert_close(together[row, None], alone, atol=1e-5, rtol=1e-5)


@on_denoisers
def test_several_conditions_of_both_routes(tiny: Tiny, pipe: Any) -> None:
    controller = Controller(pipe)
    add(controller, "encoder", "canny")
    add(controller, "tokens", "depth", seed=1)
    add(controller, "tokens", "mask", seed=2)
    named = {"canny": maps(tiny), "depth": maps(tiny, seed=1), "mask": maps(tiny, seed=2)}
    pictures = [tiny.draw(pipe)]
    for names in (["canny"], ["depth"], ["depth", "mask"], ["canny", "depth", "mask"]):
        with controller({name: named[name] for name in names}):
            pictures.append(tiny.draw(pipe))
    for number, picture in enumerate(pictures):
        assert all((picture - other).abs().max() > 1e-4 for other in pictures[:number])


@on_denoisers
def test_other_shapes_and_half_precision(tiny: Tiny, pipe: Any, route: Route) -> None:
    pipe.to(dtype=torch.bfloat16)
    controller = Controller(pipe)
    add(controller, route)
    size = {"height": tiny.side, "width": 2 * tiny.side}
    stock = tiny.draw(pipe, **size)
    with controller(canny=maps(tiny, scale=(1, 2))):
        controlled = tiny.draw(pipe, **size)
    assert controlled.dtype == stock.dtype and torch.isfinite(controlled).all()
    assert not torch.equal(controlled, stock) and torch.equal(tiny.draw(pipe, **size), stock)
    if route == "encoder":
        with controller(canny=maps(tiny)), pytest.raises(UserError, match="pass a map of the picture's size"):
            tiny.draw(pipe, **size)


@on_denoisers
@torch.no_grad()
def test_a_condition_may_act_for_a_part_of_the_steps(tiny: Tiny, pipe: Any, route: Route) -> None:
    controller = Controller(pipe)
    add(controller, route)
    stock = tiny.draw(pipe)
    drawn = {}
    for window in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.9, 1.0)):
        with controller(canny=maps(tiny), start=window[0], end=window[1]):
            drawn[window] = tiny.draw(pipe)
            if window == (0.0, 0.5):
                assert torch.equal(
                    tiny.draw(pipe), drawn[window]
                )  # the next picture starts at the first step
    assert torch.equal(drawn[0.9, 1.0], stock)  # of two steps the second begins after a half
    different = [stock, drawn[0.0, 1.0], drawn[0.0, 0.5], drawn[0.5, 1.0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("tiny", STRUCTURES.values(), ids=STRUCTURES)
@pytest.mark.parametrize("route", ["tokens"])
@torch.no_grad()
def test_compiled_as_a_whole_and_only_once(tiny: Tiny, pipe: Any, route: Route) -> None:
    """Also where it is compiled before there is any control. (See test_schedule and test_unet_family, too.)"""
    controller = Controller(pipe)
    add(controller, route)
    with controller(canny=maps(tiny)):
        expected = tiny.draw(pipe, num_inference_steps=3)
    stock = tiny.draw(pipe)
    torch._dynamo.reset()
    denoiser = controller.family.denoiser(pipe)
    denoiser.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)
    with controller(canny=maps(tiny)):
        tiny.draw(pipe, num_inference_steps=1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            controlled = tiny.draw(pipe, num_inference_steps=3)
    torch.testing.assert_close(controlled, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiny.draw(pipe), stock, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
