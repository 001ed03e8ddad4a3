"""The chains that rotated layers keep in evaluation, and what makes them compute new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rotated_helpers import IN, config, dense_weight, inputs, layer, with_weight
from torch import Tensor, nn

from loco_diffusion.adapters.loco.layer import LoCOLayer
from loco_diffusion.adapters.rotated import Side


def kept(made: LoCOLayer, side: Side = "input") -> Any:
    found = made._kept.get(("default", side))
    return None if found is None else found.factors


def halved(made: LoCOLayer) -> dict[str, Tensor]:
    return {name: value * 0.5 if "loco_v" in name else value for name, value in made.state_dict().items()}


def step(made: LoCOLayer) -> None:
    """Of an optimizer."""
    made.loco_v["default"].grad = torch.ones_like(made.loco_v["default"])
    torch.optim.AdamW([made.loco_v["default"]], lr=0.3).step()


CHANGES: dict[str, Callable[[LoCOLayer], object]] = {
    "in place": lambda made: made.loco_v["default"].mul_(0.5),
    "in place, magnitude": lambda made: made.loco_m["default"].add_(0.5),
    "optimizer": step,
    "data swapped": lambda made: setattr(made.loco_v["default"], "data", made.loco_v["default"].data * 0.5),
    "new parameter": lambda made: made.loco_v.update({"default": nn.Parameter(made.loco_v["default"] * 0.5)}),
    "strength": lambda made: made.set_scale("default", 0.5),
    "load_state_dict": lambda made: made.load_state_dict(halved(made)),
    "load with assign": lambda made: made.load_state_dict(halved(made), assign=True),
    "moved": lambda made: made.to(torch.float64),
    "trained in between": lambda made: step(made.train()) or made.eval(),
    "adapter replaced": lambda made: made.update_layer("default", config()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_kept_chain_is_dropped_when_something_changes(change: str) -> None:
    made = layer(magnitude=True)
    x = inputs(made)
    made(x)
    first = kept(made)
    made(x)
    assert first is not None and kept(made) is first
    with torch.no_grad():
        CHANGES[change](made)
        torch.testing.assert_close(made(x), with_weight(made, dense_weight(made), x), atol=1e-5, rtol=0)
    assert kept(made) is not first


def test_kept_chains_follow_the_active_adapter() -> None:
    made = layer(side="output")
    made.update_layer("other", config(side="output", inference_mode=True))
    x = inputs(made)
    for name in ("default", "other", "default"):
        made.set_adapter(name, inference_mode=True)
        expected = with_weight(made, dense_weight(made, name), x)
        torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=0)
    made.delete_adapter("default")
    assert kept(made, "output") is None


def test_kept_chain_follows_the_activations_dtype() -> None:
    made = layer(dtype=torch.float32)
    made(torch.randn(2, IN))
    with torch.autocast("cpu", torch.bfloat16):
        made(torch.randn(2, IN))
    assert kept(made).rotation[0].dtype == torch.bfloat16


def test_training_keeps_no_chain() -> None:
    made = layer()
    x = inputs(made)
    made(x)
    made.train()
    assert kept(made) is None
    made(x)
    assert kept(made) is None


def test_evaluation_with_gradients_keeps_no_chain() -> None:
    made = layer()
    made.loco_v.requires_grad_()
    x = inputs(made)
    made(x).sum().backward()
    assert kept(made) is None and made.loco_v["default"].grad.abs().max() > 0
    with torch.no_grad():
        made(x)
    assert kept(made) is not None


def test_chain_kept_in_inference_mode_serves_gradients_of_the_input() -> None:
    made = layer()
    x = inputs(made)
    with torch.inference_mode():
        expected = made(x)
    first = kept(made)
    x = x.clone().requires_grad_()
    out = made(x)
    out.sum().backward()
    torch.testing.assert_close(out, expected.clone())
    assert kept(made) is first and x.grad is not None
