"""Rotated layers against dense float64 matrices: activations, weights, quantised bases, planes to start in."""

from __future__ import annotations

import math
from functools import partial
from itertools import product

import pytest
import torch
from rotated_helpers import BASES, IN, OUT, SETTINGS, base, config, dense_weight, inputs, layer, with_weight
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, linear

from loco_diffusion.adapters.loco.layer import Linear, LoCOLayer
from loco_diffusion.adapters.rotated import SIDES, Side
from loco_diffusion.errors import UserError

# The layer's mathematics.


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_layer_equals_dense_reference(kind: str, settings: str) -> None:
    made = layer(kind, alpha=3.0, **SETTINGS[settings]).to(torch.float64)
    x = inputs(made)
    for strength, training in product((1.0, -0.5, 3.0), (True, False)):
        made.train(training).set_scale("default", strength)
        assert made.scaling["default"] == strength * 3.0 / 2
        weight = dense_weight(made)
        torch.testing.assert_close(made(x), with_weight(made, weight, x), atol=1e-10, rtol=1e-10)
        change = weight - made.get_base_layer().weight
        torch.testing.assert_close(made.get_delta_weight("default"), change, atol=1e-11, rtol=0)
        assert change.abs().max() > 0.05


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_starts_at_the_identity_with_gradients(kind: str, settings: str) -> None:
    made = layer(kind, torch.float32, init_weights=True, **SETTINGS[settings]).train()
    for u in (*made.loco_u.values(), *made.loco_u_out.values()):
        torch.testing.assert_close(u.norm(dim=1), torch.ones(3, 2))
    trained = [p.requires_grad_() for name, p in made.named_parameters() if "loco_" in name]
    x = inputs(made, torch.float32)
    out = made(x)
    assert torch.equal(out, base(made, x))
    (out * torch.randn_like(out)).sum().backward()
    moving = [p for p in trained if p.grad is not None and p.grad.abs().max() > 0]
    assert len(moving) == sum(
        name.startswith(("loco_v.", "loco_v_out", "loco_k", "loco_m")) for name in parameter_names(made)
    )


def parameter_names(made: LoCOLayer) -> list[str]:
    return [name for name, _ in made.named_parameters()]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("settings", ["input", "output", "both", "both and free"])
def test_low_rank_delta(kind: str, settings: str) -> None:
    made = layer(kind, **SETTINGS[settings])
    up, down = made.low_rank_delta("default")
    x = inputs(made)
    if made.is_convolution:
        assert up.shape[2:] == (1, 1) and down.shape[1:] == made.get_base_layer().weight.shape[1:]
        convolution = made.get_base_layer()
        coordinates = functional_call(convolution, {"weight": down, "bias": None}, (x,))
        change = conv2d(coordinates, up)
    else:
        change = linear(linear(x, down), up)
        assert len(down) == 12 * len(made.sides("default"))
    torch.testing.assert_close(base(made, x) + change, made(x), atol=1e-6, rtol=1e-6)


def test_low_rank_delta_refuses_magnitudes() -> None:
    with pytest.raises(UserError, match="learned magnitudes, which no low-rank change"):
        layer(magnitude=True).low_rank_delta("default")


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_strength_zero_is_the_base_layer_bit_for_bit(kind: str) -> None:
    made = layer(kind, torch.float32, side="both", magnitude=True)
    x = inputs(made, torch.float32)
    weight = made.get_base_layer().weight.clone()
    made.scale_layer(0)
    assert torch.equal(made(x), base(made, x))
    made.merge()
    assert torch.equal(made.get_base_layer().weight, weight)
    made.unmerge()
    assert torch.equal(made.get_base_layer().weight, weight)


def test_scale_methods() -> None:
    made = layer(alpha=6.0)
    made.scale_layer(0.5)
    assert made.scaling["default"] == 1.5
    made.unscale_layer(0.5)
    assert made.scaling["default"] == 3.0
    made.scale_layer(0.3)
    made.unscale_layer()
    assert made.scaling["default"] == 3.0
    made.set_scale("unknown", 2.0)
    assert made.scaling == {"default": 3.0}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_adapters_compose_in_order_of_activation(kind: str) -> None:
    made = layer(kind, side="both", magnitude=True)
    made.update_layer("other", config(map="exp", r=3, num_rotations=2, side="both"))
    made.loco_v["other"].data *= 8
    made.to(torch.float64)
    convolution = made.get_base_layer()
    weight = convolution.weight.clone()
    x = inputs(made)
    for names in (["default", "other"], ["other", "default"]):
        made.set_adapter(names, inference_mode=True)
        expected = with_weight(made, dense_weight(made, names[1], dense_weight(made, names[0])), x)
        torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=0)
        made.merge()
        torch.testing.assert_close(made(x), expected, atol=1e-10, rtol=0)
        made.unmerge()
        made.merge(adapter_names=names[1:])
        assert made.merged_adapters == names[1:]
        torch.testing.assert_close(
            convolution.weight, dense_weight(made, names[1], weight), atol=1e-10, rtol=0
        )
        made.unmerge()
        torch.testing.assert_close(convolution.weight, weight, atol=1e-10, rtol=0)


# Merging.


def test_unmerge_uses_the_strength_of_the_merge() -> None:
    made = layer(magnitude=True)
    weight = made.get_base_layer().weight.clone()
    made.scale_layer(0.5)
    made.merge()
    made.unscale_layer(0.5)
    made.unmerge()
    torch.testing.assert_close(made.get_base_layer().weight, weight, atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="Already unmerged"):
        made.unmerge()


@pytest.mark.parametrize("settings", SETTINGS)
def test_merging_keeps_the_layout_of_the_weight(settings: str) -> None:
    made = layer("linear", torch.float32, **SETTINGS[settings])
    made.merge()
    assert made.get_base_layer().weight.is_contiguous()
    made = layer("conv2d", torch.float32, **SETTINGS[settings])
    made.get_base_layer().to(memory_format=torch.channels_last)
    made.merge()
    assert made.get_base_layer().weight.is_contiguous(memory_format=torch.channels_last)


def test_safe_merge_refuses_broken_weights_and_changes_nothing() -> None:
    made = layer(dtype=torch.float32)
    weight = made.get_base_layer().weight.clone()
    made.loco_v["default"][0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        made.merge(safe_merge=True)
    assert torch.equal(made.get_base_layer().weight, weight) and not made.merged


# Quantised base layers.


class Int8Linear(nn.Linear):
    """Weights that only this layer's own forward can read."""

    def __init__(self) -> None:
        super().__init__(IN, OUT)
        self.weight = nn.Parameter((self.weight * 127).to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype) / 127, self.bias)


@pytest.mark.parametrize("settings", SETTINGS)
def test_integer_weights_train_but_do_not_merge(settings: str) -> None:
    made = Linear(Int8Linear(), "default", config(**SETTINGS[settings]))
    x = torch.randn(2, IN)
    weight = dense_weight(made, weight=made.get_base_layer().weight.double() / 127).float()
    expected = linear(x, weight, made.get_base_layer().bias)
    torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-4)
    made(x).sum().backward()
    assert all(p.grad is not None for name, p in made.named_parameters() if "loco_" in name)
    for change in (made.merge, partial(made.low_rank_delta, "default")):
        if "magnitude" not in settings or change == made.merge:
            with pytest.raises(UserError, match="without quantisation"):
                change()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes quantises on CUDA")
@pytest.mark.parametrize("layer_name", ["Linear8bitLt", "Linear4bit"])
def test_bitsandbytes_weights(layer_name: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    options = {"has_fp16_weights": False} if layer_name == "Linear8bitLt" else {}
    quantised = getattr(bitsandbytes.nn, layer_name)(64, 64, **options).cuda()
    made = Linear(quantised, "default", config(side="both")).cuda()
    x = torch.randn(4, 64, device="cuda", dtype=torch.float16)
    expected = made(x)
    expected.float().sum().backward()
    assert made.loco_v["default"].grad.abs().max() > 0
    made.merge()
    torch.testing.assert_close(made(x), expected, atol=0.3, rtol=0.3)


# A row of a batch, an adapter.


def test_adapter_names_that_do_not_fit() -> None:
    made = layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    with pytest.raises(UserError, match="each of 3 rows"):
        made(x, adapter_names=["default"])
    made.enable_adapters(False)
    assert torch.equal(made(x, adapter_names=["default"] * 3), base(made, x))
    made.enable_adapters(True)
    made.merge()
    with pytest.raises(UserError, match="call unmerge_adapter first"):
        made(x, adapter_names=["default"] * 3)


# Planes from a gradient.


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("side", SIDES)
def test_fitted_planes_have_the_steepest_loss(kind: str, side: Side) -> None:
    """The gradient of V reaches its largest possible norm, one vector for each of the strongest planes."""
    made = layer(kind, side=side, init="skew", magnitude=True)
    assert made.needs_gradient("default") and not layer().needs_gradient("default")
    weight = made.get_base_layer().weight
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made.fit("default", gradient)
    x = inputs(made)
    torch.testing.assert_close(made(x), base(made, x))
    v = made._parameters_on(side, "v")["default"].requires_grad_()
    u = made._parameters_on(side, "u")["default"]
    torch.testing.assert_close(u.transpose(0, 1).flatten(1).mT @ u.transpose(0, 1).flatten(1), torch.eye(6))
    basis, core = made.get_chain("default", side)
    rows = weight.movedim(1 if side == "input" else 0, -1).flatten(0, -2)
    turned = (
        rows + rows @ basis.double() @ (core.mT if side == "output" else core).double() @ basis.double().mT
    )
    slope = gradient.movedim(1 if side == "input" else 0, -1).flatten(0, -2)
    (turned * slope).sum().backward()
    signal = rows.mT @ slope - slope.mT @ rows
    best = torch.linalg.svdvals(signal)[:12:2].square().sum().sqrt()
    assert math.isclose(v.grad.norm().item(), best.item(), rel_tol=1e-4)
