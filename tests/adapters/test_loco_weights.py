"""LoCO adapters made from others: weighted sums and products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loco_helpers import IN, config, net
from peft import get_peft_model

from loco_diffusion.adapters import LoCOLayer
from loco_diffusion.errors import UserError

# Several adapters as one.


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_composed_adapter_does_what_the_adapters_do_together(side: str) -> None:
    model = get_peft_model(net(), config(side=side, alpha=1.0)).eval()
    model.add_adapter("other", config(side=side, r=1, num_rotations=2, rank_pattern={"second": 2}))
    x = torch.randn(5, IN)
    model.base_model.set_adapter(["default", "other"])
    for module in model.modules():
        if isinstance(module, LoCOLayer):
            module.set_scale("other", -0.5)
    expected = model(x)
    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "both", combination_type="compose")
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".both"))
    model.set_adapter("both")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


def test_weighted_sum_of_generators() -> None:
    model = get_peft_model(net(), config(magnitude=True)).eval()
    x = torch.randn(5, IN)
    for module in model.modules():
        if isinstance(module, LoCOLayer):
            module.set_scale("default", 0.25)
    expected = model(x)
    model.add_weighted_adapter(["default", "default"], [0.75, -0.5], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "style"], [1.0, 1.0], "new"), "takes existing adapters"),
        ((["default"], [1.0, 1.0], "new"), "a weight for each"),
        ((["default"], [1.0], "default"), "a new name"),
        ((["default"], [1.0], "new", "svd"), "combination_type must be one of compose, lie"),
    ],
)
def test_bad_combinations_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = get_peft_model(net(), config())
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(*arguments)
