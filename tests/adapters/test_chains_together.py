"""Chains computed for all LoCO layers at once are those that each layer computes for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loco_helpers import IN, config, net
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loco_diffusion import rotations
from loco_diffusion.adapters.loco.together import chains_together


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("map", ["cayley", "exp"])
@pytest.mark.parametrize("order", ["exact", 1])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("side", ["input", "both"])
def test_same_outputs_and_gradients(
    side: str, free: bool, order: Any, map: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"side": side, "map": map, "chain_order": order, "magnitude": True, "free": free}
    model = get_peft_model(net(), config(**settings)).train()
    x = torch.randn(5, IN)
    alone = model(x)
    wanted = gradients(model, alone.square().sum())
    with chains_together(model, torch.float32):
        monkeypatch.setattr(rotations, "chain", None)  # no layer may compute its own
        together = checkpoint(model, x, use_reentrant=False) if recomputed else model(x)
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(gradients(model, together.square().sum()), wanted)
    monkeypatch.undo()
    assert torch.equal(model(x), alone)  # the block leaves nothing behind


def test_layers_compute_their_own_for_another_dtype() -> None:
    model = get_peft_model(net(), config()).train()
    x = torch.randn(5, IN)
    alone = model(x)
    with chains_together(model, torch.bfloat16):
        assert torch.equal(model(x), alone)


def test_only_active_adapters_in_training_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(net(), config())
    monkeypatch.setattr(rotations, "chain", None)  # would fail
    with chains_together(model.eval(), torch.float32):
        pass
    with model.disable_adapter(), chains_together(model.train(), torch.float32):
        pass
