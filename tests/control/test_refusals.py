"""What cannot be controlled is refused in one sentence, and the pipeline is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import TINY, Tiny
from tiny_pipelines.checks import add_frozen, assert_same, draw
from tiny_pipelines.controlled import add, fresh, maps
from torch.overrides import TorchFunctionMode

from loco_diffusion import Controller
from loco_diffusion.control import CacheSettings, family_of
from loco_diffusion.control.adapter import Route
from loco_diffusion.errors import UserError

on_flux = pytest.mark.parametrize("tiny", [TINY["flux"]], ids=["flux"])


@pytest.fixture
def controller(pipe: Any, route: Route) -> Controller:
    return add_frozen(pipe, route)


@on_flux
def test_another_denoiser_is_noticed(tiny: Tiny, pipe: Any, controller: Controller) -> None:
    pipe.transformer = fresh(tiny).transformer
    with pytest.raises(UserError, match="make a new Controller"):
        draw(tiny, pipe, controller)


class Full:
    """A hook that finds the memory full."""

    def __call__(self, *args: Any) -> None:
        raise torch.OutOfMemoryError


@pytest.mark.parametrize("cache", [CacheSettings(), CacheSettings(dtype=torch.bfloat16)])
@on_flux
def test_a_condition_that_does_not_fit(tiny: Tiny, pipe: Any, cache: CacheSettings) -> None:
    """In the condition pass; the message says what would have been kept."""
    controller = Controller(pipe, cache)
    add(controller, "tokens")
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    with torch.no_grad(), controller(canny=maps(tiny)):
        size = controller.cache_nbytes / 2**20
    controller.clear_cache()
    hook = pipe.transformer.transformer_blocks[-1].register_forward_hook(Full())
    with pytest.raises(UserError, match=rf"about {size:.1f} MB: .*CacheSettings.*TokensConfig"):
        draw(tiny, pipe, controller)
    hook.remove()
    assert controller.cache_nbytes == 0
    assert_same(tiny, pipe, controller, expected, stock)


@on_flux
def test_appending_a_condition_that_does_not_fit(tiny: Tiny, pipe: Any) -> None:
    controller = Controller(pipe)
    add(controller, "tokens")
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    with (
        controller(canny=maps(tiny)),
        Crowded(4 * 4 + 12),
        pytest.raises(UserError, match="does not suffice"),
    ):
        tiny.draw(pipe)
    assert_same(tiny, pipe, controller, expected, stock)


class Crowded(TorchFunctionMode):
    """Memory for so many keys."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys = keys

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        attention = func is torch.nn.functional.scaled_dot_product_attention and "key" in kwargs
        if attention and kwargs["key"].shape[2] > self.keys:
            raise torch.OutOfMemoryError
        return func(*args, **kwargs)


@on_flux
def test_a_condition_that_only_some_attentions_have_seen(tiny: Tiny, pipe: Any) -> None:
    """As with a cache of blocks that skips the others."""
    controller = Controller(pipe)
    add(controller, "tokens")
    stock, expected = tiny.draw(pipe), draw(tiny, pipe, controller)
    controller.clear_cache()
    block = pipe.transformer.single_transformer_blocks[0]
    block.forward = lambda hidden_states, encoder_hidden_states, **others: (
        encoder_hidden_states,
        hidden_states,
    )
    with pytest.raises(UserError, match=r"Only 1 of 2 self-attentions .*disable_cache"):
        draw(tiny, pipe, controller)
    del block.forward
    assert_same(tiny, pipe, controller, expected, stock)


def test_an_adapter_of_another_family(tiny: Tiny, pipe: Any, controller: Controller, tmp_path: Path) -> None:
    for other in TINY.values():
        theirs = fresh(other)
        if type(family_of(theirs)) is not type(controller.family):
            break
    else:
        pytest.skip("there is one family only")
    folder = controller.save_adapter(tmp_path / "canny", "canny")
    stock = other.draw(theirs)
    with pytest.raises(UserError, match="was trained for a model with"):
        Controller(theirs).load_adapter(folder)
    assert torch.equal(other.draw(theirs), stock)
