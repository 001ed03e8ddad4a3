"""LoCA layers against dense float64 cosine transforms, and LoCA's schedule.

What peft's users expect of it is tested with the other methods, in test_methods.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loco_helpers import IN, OUT, net
from peft import get_peft_model
from torch import Tensor, nn

from loco_diffusion.adapters import LoCAConfig, LoCALayer, LocationSchedule
from loco_diffusion.adapters.loca import spectrum
from loco_diffusion.adapters.loca.layer import Conv2d, Linear
from loco_diffusion.errors import UserError

TOKENS = 6
KINDS = ("linear", "conv2d")
SHORT, LONG = 5, spectrum.MATRIX_LENGTH + 3


def config(**changes: Any) -> LoCAConfig:
    chosen = {"num_coefficients": 60, "target_modules": ["first", "second"], "init_weights": False}
    return LoCAConfig(**{**chosen, **changes})


def layer(kind: str = "linear", dtype: torch.dtype = torch.float64, **changes: Any) -> LoCALayer:
    """An evaluated, frozen layer with an adapter that changes it noticeably."""
    torch.manual_seed(0)
    if kind == "linear":
        made: LoCALayer = Linear(nn.Linear(IN, OUT, dtype=dtype), "default", config(**changes))
    else:
        convolution = nn.Conv2d(
            4, OUT, (3, 2), stride=(1, 2), dilation=(2, 1), padding=1, padding_mode="reflect", dtype=dtype
        )
        made = Conv2d(convolution, "default", config(**changes))
    made = made.eval().requires_grad_(False)
    return made.double() if dtype == torch.float64 else made


def example(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (2, TOKENS // 2, IN) if kind == "linear" else (2, 4, 7, 6)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@functools.cache
def cosines(size: int) -> Tensor:
    """C, from the definition of the orthonormal DCT-II."""
    rows = [
        [
            math.cos(math.pi * k * (2 * j + 1) / (2 * size)) * math.sqrt((2 if k else 1) / size)
            for j in range(size)
        ]
        for k in range(size)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def cells(made: LoCALayer, adapter: str = "default") -> tuple[Tensor, Tensor]:
    rows, columns = made.loca_l[adapter].detach().double().clamp(0, 1)
    return (rows * (made.grid[0] - 1)).round().long(), (columns * (made.grid[1] - 1)).round().long()


def dense_change(made: LoCALayer, adapter: str = "default", a: Tensor | None = None) -> Tensor:
    """W' - W as a float64 matrix, from the definition."""
    a = made.loca_a[adapter].detach().double() if a is None else a
    matrix = torch.zeros(made.grid, dtype=torch.float64)
    for value, row, column in zip(a, *cells(made, adapter), strict=True):
        index = torch.zeros(made.grid, dtype=torch.float64)
        index[row, column] = 1
        matrix = matrix + value * index
    return made.scaling[adapter] * cosines(made.grid[0]).T @ matrix @ cosines(made.grid[1])


def with_weight(made: LoCALayer, x: Tensor, weight: Tensor) -> Tensor:
    """The base layer's result with another weight, (out, in) or (out, in * kh * kw)."""
    base = made.get_base_layer()
    weights = {"weight": weight.view(base.weight.shape)}
    return torch.func.functional_call(base, weights, (x,))


def base_matrix(made: LoCALayer) -> Tensor:
    return made.get_base_layer().weight.flatten(1)


# The transforms.


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), rows=st.integers(0, 4), by_fft=st.booleans())
def test_transforms_equal_their_definition(size: int, rows: int, by_fft: bool) -> None:
    x = torch.randn(rows, size, dtype=torch.float64)
    forward, backward = (
        (spectrum._by_fft, spectrum._inverse_by_fft) if by_fft else (spectrum.dct, spectrum.idct)
    )
    torch.testing.assert_close(forward(x), x @ cosines(size).T, atol=1e-12, rtol=0)
    torch.testing.assert_close(backward(x), x @ cosines(size), atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [SHORT, LONG, LONG + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transform_gradients_and_precision(size: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, size, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = spectrum.dct(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(y.double(), x.double() @ cosines(size).T, atol=tolerance, rtol=0)
    torch.testing.assert_close(spectrum.idct(y), x, atol=tolerance, rtol=0)
    gradient = torch.randn_like(y)
    y.backward(gradient)
    torch.testing.assert_close(x.grad, spectrum.idct(gradient))


# The layer's mathematics.


@settings(deadline=None, max_examples=30)
@given(
    out=st.sampled_from([1, 2, 7, LONG]),
    size=st.sampled_from([1, 3, 8, LONG]),
    tokens=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_activations_and_gradients_equal_the_dense_reference(
    out: int, size: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    n = min(9, out * size)
    made = Linear(nn.Linear(size, out, bias=False), "default", config(num_coefficients=n, alpha=0.7)).double()
    made.loca_l["default"].data[:, 0] = torch.tensor([-0.5, 1.5])  # outside: clamped to the grid's corner
    x = torch.randn(tokens, size, dtype=torch.float64, requires_grad=True)
    g = torch.randn(tokens, out, dtype=torch.float64)

    change = dense_change(made).requires_grad_()
    expected = x @ (base_matrix(made) + change).T
    expected_x, gradient = torch.autograd.grad(expected, (x, change), g)
    y = made(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    y.backward(g)
    torch.testing.assert_close(x.grad, expected_x, atol=1e-11, rtol=0)
    check_parameter_gradients(made, gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("training", [True, False])
def test_layer_equals_dense_reference(kind: str, strength: float, training: bool) -> None:
    made = layer(kind, alpha=3.0).train(training).requires_grad_(training)
    made.set_scale("default", strength)
    assert made.scaling["default"] == strength * 3.0
    x = example(kind).requires_grad_()
    change = dense_change(made).requires_grad_()
    expected = with_weight(made, x, base_matrix(made) + change)
    y = made(x)
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=0)
    assert not torch.allclose(y, made.base_layer(x), atol=0.1)
    g = torch.randn_like(y)
    expected_x, gradient = torch.autograd.grad(expected, (x, change), g)
    made.scale_layer(0.1)  # as diffusers does between the passes
    y.backward(g)
    made.set_scale("default", strength)
    torch.testing.assert_close(x.grad, expected_x, atol=1e-11, rtol=0)
    if training:
        check_parameter_gradients(made, gradient)


def check_parameter_gradients(made: LoCALayer, gradient: Tensor) -> None:
    """dL/da: the 2-D DCT of dL/dW at the locations; dL/dl: its central differences times a / 2, within 1."""
    rows, columns = cells(made)
    transformed = made.scaling["default"] * cosines(made.grid[0]) @ gradient @ cosines(made.grid[1]).T
    torch.testing.assert_close(made.loca_a["default"].grad, transformed[rows, columns], atol=1e-10, rtol=0)

    def at(row_step: int, column_step: int) -> Tensor:
        last_row, last_column = made.grid[0] - 1, made.grid[1] - 1
        return transformed[
            (rows + row_step).clamp(0, last_row), (columns + column_step).clamp(0, last_column)
        ]

    slopes = torch.stack([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)])
    expected = (made.loca_a["default"].detach() / 2 * slopes).clamp(-1, 1)
    torch.testing.assert_close(made.loca_l["default"].grad, expected, atol=1e-10, rtol=0)


def test_location_gradients_are_clipped() -> None:
    made = layer().requires_grad_(True)
    made(example("linear")).square().sum().mul(10).backward()
    gradient = made.loca_l["default"].grad
    assert gradient.abs().max() == 1 and gradient.abs().min() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_nothing_of_the_weights_size(kind: str) -> None:
    made = layer(kind, torch.float32).train()
    for parameters in (made.loca_a, made.loca_l):
        parameters.requires_grad_(True)
    x = example(kind, torch.float32)[:1].requires_grad_()
    base_weight = made.get_base_layer().weight
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != base_weight.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made(x)
    assert saved and max(saved) < math.prod(made.grid)


@pytest.mark.parametrize("kind", KINDS)
def test_strength_zero_is_the_base_layer_bit_for_bit(kind: str) -> None:
    made = layer(kind, torch.float32)
    x = example(kind, torch.float32)
    weight = made.get_base_layer().weight.clone()
    made.scale_layer(0)
    assert torch.equal(made(x), made.base_layer(x))
    made.merge()
    assert torch.equal(made.get_base_layer().weight, weight)
    made.unscale_layer()
    assert made.scaling["default"] == made.alpha["default"]


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_add_up(kind: str) -> None:
    made = layer(kind)
    made.update_layer("other", config(num_coefficients=20, alpha=2.0))
    made.double().set_adapter(["default", "other"], inference_mode=True)
    x = example(kind)
    expected = with_weight(made, x, base_matrix(made) + dense_change(made) + dense_change(made, "other"))
    torch.testing.assert_close(made(x), expected, atol=1e-11, rtol=0)
    made.merge()
    torch.testing.assert_close(made(x), expected, atol=1e-11, rtol=0)


def test_quantised_weights_adapt_but_do_not_merge() -> None:
    class Int8Linear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) / 127, self.bias)

    quantised = Int8Linear(IN, OUT)
    quantised.weight = nn.Parameter((quantised.weight * 127).to(torch.int8), requires_grad=False)
    made = Linear(quantised, "default", config())
    x = example("linear", torch.float32)
    y = made(x)
    torch.testing.assert_close(y, quantised(x) + x @ dense_change(made).float().T)
    y.sum().backward()
    assert made.loca_a["default"].grad is not None
    with pytest.raises(UserError, match="without quantisation"):
        made.merge()


def test_half_precision_keeps_the_locations() -> None:
    made = layer(dtype=torch.float32)
    locations = made.loca_l["default"].clone()
    made.to(torch.bfloat16)
    assert made.loca_a["default"].dtype == torch.bfloat16
    assert torch.equal(made.loca_l["default"], locations)  # bfloat16 could not tell the cells apart


# The configuration.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_coefficients": 0}, "num_coefficients must be a whole number above 0"),
        ({"num_coefficients": 2.5}, "num_coefficients must be a whole number above 0"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"alpha": 0}, "alpha must be a finite number other than 0"),
        ({"bias": "lora_only"}, "bias must be one of none, all, loca_only"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(**changes)


# The schedule.


def test_phases_of_the_schedule() -> None:
    model = get_peft_model(net(), config())
    schedule = LocationSchedule(model, total_steps=80, until=0.5)
    phases = []
    for _ in range(80):
        phases.append(schedule.phase)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        suffix = {"coefficients": "loca_a", "locations": "loca_l"}[schedule.phase]
        assert trained == {f"base_model.model.{m}.{suffix}.default" for m in ("first", "second")}
        schedule.step()
    assert phases == ["coefficients"] * 10 + ["locations"] * 20 + ["coefficients"] * 50


def test_schedule_trains_in_turn_and_resumes() -> None:
    model = get_peft_model(net(), config(init_weights=True)).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    settings = {"total_steps": 100, "until": 0.2, "coefficient_steps": 2, "location_steps": 1}
    schedule = LocationSchedule(model, **settings)
    x, target = torch.randn(64, IN), torch.randn(64, 3)
    losses = []
    for step in range(30):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        moved = {
            name.split(".")[3] for name, p in model.named_parameters() if not torch.equal(p, before[name])
        }
        assert moved == {"loca_l" if step < 20 and step % 3 == 2 else "loca_a"}
        schedule.step()
        resumed = LocationSchedule(model, **settings)
        resumed.load_state_dict(schedule.state_dict())
        assert resumed.phase == schedule.phase
        schedule = resumed
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_name": "a"}, "no LoCA adapter 'a'"),
        ({"until": 1.5}, "from 0 to 1, not 1.5"),
        ({"location_steps": 0}, "location_steps above 0"),
    ],
)
def test_bad_schedules_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LocationSchedule(get_peft_model(net(), config()), total_steps=10, **changes)


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_get_peft_model_trains_only_the_adapter(autocast_adapter_dtype: bool) -> None:
    model = get_peft_model(net().bfloat16(), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {
        f"base_model.model.{m}.loca_{f}.default" for m in ("first", "second") for f in ("a", "l")
    }
    first = model.base_model.model.first
    assert first.loca_l["default"].shape == (2, 60) and first.loca_l["default"].dtype == torch.float32
    assert (first.loca_a["default"].dtype == torch.float32) == autocast_adapter_dtype
    assert "loca.Linear" in repr(model)


def test_a_location_that_is_not_finite_is_not_merged() -> None:
    torch.manual_seed(0)
    layer = get_peft_model(net(), config()).base_model.model.first
    layer.loca_l["default"].data[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged and layer.base_layer.weight.isfinite().all()
