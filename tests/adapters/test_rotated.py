"""Rotated layers, with LoCO's rotations: against dense float64 matrices, and in the runtimes they must fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import conv2d, linear
from torch.utils.checkpoint import checkpoint

from loco_diffusion import LoCOConfig
from loco_diffusion.adapters.loco.layer import Conv2d, Linear, LoCOLayer
from loco_diffusion.adapters.rotated import SIDES, Side
from loco_diffusion.errors import UserError

IN, OUT = 32, 24

BASES: dict[str, Callable[..., nn.Module]] = {
    "linear": partial(nn.Linear, IN, OUT),
    "linear without bias": partial(nn.Linear, IN, OUT, bias=False),
    "conv2d": partial(nn.Conv2d, IN, OUT, (3, 2), stride=2, dilation=2, padding=(2, 1)),
    "conv2d without bias": partial(
        nn.Conv2d, IN, OUT, (1, 3), padding="same", padding_mode="circular", bias=False
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "input": {},
    "output": {"side": "output", "map": "exp"},
    "both": {"side": "both", "chain_order": 1},
    "magnitude": {"magnitude": True},
    "both and magnitude": {"side": "both", "magnitude": True},
}


def config(**changes: Any) -> LoCOConfig:
    return LoCOConfig(**{"r": 2, "num_rotations": 3, "init_weights": False, **changes})


def layer(kind: str = "linear", dtype: torch.dtype = torch.float64, **changes: Any) -> LoCOLayer:
    """An evaluated, frozen layer with an adapter that turns noticeably."""
    torch.manual_seed(0)
    base = BASES[kind](dtype=dtype)
    layer_cls = Conv2d if isinstance(base, nn.Conv2d) else Linear
    made = layer_cls(base, "default", config(**changes)).eval().requires_grad_(False)
    for v in (*made.loco_v.values(), *made.loco_v_out.values()):
        v.mul_(8)
    return made


def inputs(made: LoCOLayer, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, IN, 5, 6) if made.is_convolution else (2, 5, IN)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def base(made: LoCOLayer, x: Tensor) -> Tensor:
    return made.get_base_layer()(x)


def dense_rotation(made: LoCOLayer, side: Side, adapter: str = "default") -> Tensor:
    """A side's rotation as a float64 matrix: from the definition if the chain is exact."""
    if side not in made.sides(adapter):
        return torch.eye(made.channels(side), dtype=torch.float64)
    if made.chain_order[adapter] != "exact":
        basis, core = (t.double() for t in made.get_chain(adapter, side))
        return torch.eye(len(basis)) + basis @ core @ basis.T
    rotation = eye = torch.eye(made.channels(side), dtype=torch.float64)
    factors = (made._parameters_on(side, kind)[adapter].double() for kind in "uv")
    for u, v in zip(*factors, strict=True):
        generator = made.scaling[adapter] * (u @ v.T - v @ u.T)
        if made.rotation_map[adapter] == "exp":
            rotation = rotation @ torch.matrix_exp(generator)
        else:
            rotation = rotation @ torch.linalg.inv(eye - generator / 2) @ (eye + generator / 2)
    return rotation


def dense_weight(made: LoCOLayer, adapter: str = "default", weight: Tensor | None = None) -> Tensor:
    """D_out R_out W R_in D_in in float64, from the definition."""
    weight = made.get_base_layer().weight if weight is None else weight
    for side in SIDES:
        logarithms = made._parameters_on(side, "m").get(adapter, torch.zeros(()))
        rotation = dense_rotation(made, side, adapter)
        magnitude = (made.scaling[adapter] * logarithms.double()).exp()
        indices = "oi...,ip->op..." if side == "input" else "oi...,po->pi..."
        scaled = rotation * (magnitude if side == "input" else magnitude[..., None])
        weight = torch.einsum(indices, weight.double(), scaled)
    return weight


def with_weight(made: LoCOLayer, weight: Tensor, x: Tensor) -> Tensor:
    return functional_call(made.get_base_layer(), {"weight": weight}, (x,))


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
        name.startswith(("loco_v.", "loco_v_out", "loco_m")) for name in parameter_names(made)
    )


def parameter_names(made: LoCOLayer) -> list[str]:
    return [name for name, _ in made.named_parameters()]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("settings", ["input", "output", "both"])
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


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("settings", ["input", "both", "both and magnitude"])
def test_merging_in_half_precision_rounds_once(
    dtype: torch.dtype, digits: int, kind: str, settings: str
) -> None:
    made = layer(kind, dtype, **SETTINGS[settings])
    weight = made.get_base_layer().weight.double()
    exact = dense_weight(made)
    made.merge()
    merged = made.get_base_layer().weight
    assert merged.dtype == dtype
    error = (merged.double() - exact).abs() - 2.0**-digits * exact.abs()
    assert error.max() < 1e-6
    made.unmerge()
    difference = made.get_base_layer().weight.double() - weight
    if settings != "both and magnitude":
        assert difference.norm() < 2.0 ** (1 - digits) * weight.norm()


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


@pytest.mark.parametrize("can_requantise", [False, True])
def test_torchao_int8_weights(can_requantise: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    weight_only = quantization.Int8WeightOnlyConfig()
    linear_layer = nn.Sequential(nn.Linear(IN, OUT))
    quantization.quantize_(linear_layer, weight_only)
    kwargs = {"get_apply_tensor_subclass": lambda: weight_only} if can_requantise else {}
    made = Linear(linear_layer[0], "default", config(side="both"), kwargs)
    x = torch.randn(2, IN)
    weight = made.get_base_layer().weight.dequantize()
    expected = linear(x, dense_weight(made, weight=weight).float(), made.get_base_layer().bias)
    torch.testing.assert_close(made(x), expected, atol=1e-4, rtol=1e-4)
    made(x).sum().backward()
    assert made.loco_v["default"].grad.abs().max() > 0
    if can_requantise:
        made.merge()
        torch.testing.assert_close(made(x), expected, atol=0.05, rtol=0.05)
    else:
        with pytest.raises(UserError, match="without quantisation"):
            made.merge()


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


# Precision and runtimes.


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("settings", ["input", "both and magnitude"])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(kind: str, settings: str, training: bool) -> None:
    made = layer(kind, torch.float32, **SETTINGS[settings]).train(training)
    x = inputs(made, torch.float32)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16 and exact.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, atol=0.06, rtol=0.02)
    made.get_base_layer().to(torch.bfloat16)
    half = made(x.bfloat16())
    assert half.dtype == torch.bfloat16 and made.loco_u["default"].dtype == torch.float32
    torch.testing.assert_close(half.float(), exact, atol=0.06, rtol=0.02)


def test_half_precision_keeps_small_magnitudes() -> None:
    made = layer(dtype=torch.bfloat16, magnitude=True)
    for v in made.loco_v.values():
        v.zero_()
    for m in (made.loco_m["default"], made.loco_m_out["default"]):
        m.fill_(2.0**-10)  # bfloat16 rounds 1 + 2^-10 to 1
    factors = made._make_factors("default", "input", torch.bfloat16)
    torch.testing.assert_close(factors.gain.float(), torch.full((IN,), 2.0**-10), atol=2.0**-18, rtol=0)


def gradients(made: LoCOLayer, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Of a loss with respect to the adapters and the input."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    run(x).square().sum().backward()
    return [p.grad for p in (*made.parameters(), x) if p.grad is not None]


def trainable(kind: str, **settings: Any) -> LoCOLayer:
    """Two active adapters in training."""
    made = layer(kind, torch.float32, **settings).train()
    made.update_layer("other", config(map="exp"))
    made.set_adapter(["default", "other"])
    return made


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compiles_into_one_graph(kind: str, backend: str) -> None:
    made = trainable(kind, side="both", magnitude=True)
    x = inputs(made, torch.float32)
    expected = gradients(made, made, x)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradients(made, compiled, x), expected, atol=1e-3, rtol=1e-3)
    made.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_cuda_graphs(kind: str) -> None:
    made = trainable(kind, side="both", magnitude=True).cuda()
    x = inputs(made, torch.float32).cuda()
    weights = [p for p in made.parameters() if p.requires_grad]
    run = torch.cuda.make_graphed_callables(made, (x,))
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.1)
    found = torch.autograd.grad(run(x).square().sum(), weights)
    torch.cuda.set_sync_debug_mode("error")
    expected = torch.autograd.grad(made(x).square().sum(), weights)
    torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    made = trainable("linear", side="both", magnitude=True)
    x = inputs(made, torch.float32)
    expected = gradients(made, made, x)
    recomputed = gradients(made, partial(checkpoint, made, use_reentrant=use_reentrant), x)
    torch.testing.assert_close(recomputed, expected, atol=0, rtol=0)


def _train_one_step(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    made = trainable("linear", side="both", magnitude=True)
    parallel = nn.parallel.DistributedDataParallel(made)
    parallel(inputs(made, torch.float32)[rank]).square().sum().backward()
    torch.save([p.grad for p in made.parameters() if p.grad is not None], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_training(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_one_step, (str(tmp_path),), nprocs=2)
    made = trainable("linear", side="both", magnitude=True)
    made(inputs(made, torch.float32)).square().sum().backward()
    expected = [p.grad / 2 for p in made.parameters() if p.grad is not None]
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, atol=1e-4, rtol=1e-4)


# What evaluation keeps.


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
